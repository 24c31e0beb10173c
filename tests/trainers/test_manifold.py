"""Manifolds: projectors, tangent spaces, retractions and norms, against an oracle and by invariants."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import (
    CONSTRAINED,
    FIXTURES,
    SHAPES,
    WAYS_BACK,
    batch_on_manifold,
    gaussian,
    hard_cases,
    on_manifold,
    one_thread,
    orthonormal,
    relative,
    seeds,
    sizes,
    spectrum,
    with_spectrum,
)

from trainers.manifold import (
    MANIFOLDS,
    RETRACTIONS,
    constrained_part,
    distance,
    msign,
    retract,
    spectral_norm,
    tangency_residual,
    tangent_project,
)
from trainers.manifold.manifolds import svd_sorted_without_svd

single_threaded = pytest.fixture(scope="module", autouse=True)(one_thread)

ALL_WAYS = [(m, way) for m in MANIFOLDS for way in RETRACTIONS[m]]
FIXED_WAYS = [way for way in ALL_WAYS if way[1] != "svd_sorted"]
"""Retractions that leave the manifold alone."""
RADII = (None, 0.0, 1e-4, 0.02, 0.3)
COARSE = (None, torch.bfloat16, torch.float16)
manifolds = st.sampled_from(CONSTRAINED)


# --- the projector and the tangent space -----------------------------------------------------------


@pytest.mark.parametrize("manifold", MANIFOLDS)
@given(st.integers(1, 12), st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_the_projector_is_idempotent_and_self_adjoint(manifold, n, seed):
    M, N = (X + X.mT for X in gaussian(2, n, n, seed=seed))
    P, Q = constrained_part(M, manifold), constrained_part(N, manifold)
    assert torch.equal(constrained_part(P, manifold), P)
    assert (P * N).sum() == pytest.approx((M * Q).sum().item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("manifold", MANIFOLDS)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_the_tangent_projection_is_one(manifold, m, n, seed):
    W = on_manifold(manifold, (m, n), seed)
    A, B = gaussian(2, m, n, seed=seed + 1)
    T = tangent_project(W, A, manifold)
    assert tangency_residual(W, T, manifold) < 1e-12
    assert torch.allclose(tangent_project(W, T, manifold), T, atol=1e-11)
    # self-adjoint: <T(A), B> = <A, T(B)>
    assert (T * B).sum() == pytest.approx((A * tangent_project(W, B, manifold)).sum().item(), abs=1e-9)


@pytest.mark.parametrize("manifold", CONSTRAINED)
@pytest.mark.parametrize(("dtype", "noise"), [(torch.bfloat16, 0.02), (torch.float16, 0.0025)])
@given(sizes, sizes, seeds)
@settings(max_examples=20, deadline=None)
def test_a_tangent_projection_with_half_precision_products(manifold, dtype, noise, m, n, seed):
    W, A = on_manifold(manifold, (m, n), seed), gaussian(m, n, seed=seed + 1)
    exact = tangent_project(W, A, manifold)
    T = tangent_project(W.float(), A.float(), manifold, dtype=dtype)
    assert T.dtype == torch.float32
    assert (T - exact).norm() <= noise * A.norm()
    assert tangency_residual(W, T.double(), manifold) <= noise * A.norm()


@given(manifolds, sizes, sizes, seeds)
@settings(max_examples=30, deadline=None)
def test_the_tangent_projection_is_equivariant_and_linear(manifold, m, n, seed):
    W, A, B = on_manifold(manifold, (m, n), seed), *gaussian(2, m, n, seed=seed + 1)
    T = tangent_project(W, A, manifold)
    assert torch.allclose(tangent_project(W, 3 * A + B, manifold), 3 * T + tangent_project(W, B, manifold))
    if m != n:  # a square matrix is its own transpose's shape, and columns are what is constrained
        assert torch.allclose(tangent_project(W.mT, A.mT, manifold), T.mT)
    if m >= n:
        Q = orthonormal(m, m, seed + 2)
        assert torch.allclose(tangent_project(Q @ W, Q @ A, manifold), Q @ T)
    both = tangent_project(torch.stack([W, W]), torch.stack([A, B]), manifold)
    assert torch.allclose(both[0], T)


def test_a_zero_column_constrains_nothing():
    W, A = on_manifold("dgram", (9, 4)), gaussian(9, 4, seed=1)
    W[:, 1:3] = 0
    T = tangent_project(W, A, "dgram")
    assert tangency_residual(W, T, "dgram") < 1e-12
    assert torch.allclose(
        T[:, 1:3],
        A[:, 1:3] - W[:, [0, 3]] @ (W[:, [0, 3]].mT @ A[:, 1:3] / W[:, [0, 3]].square().sum(0)[:, None]),
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [1e3, 1e-3, 1e-6, 1e-20])
def test_the_norms_of_columns_do_not_matter(norm, dtype):
    """DGram leaves them free: after a start of little rank, or a long run, they differ by decades."""
    for norms in (torch.full((6,), norm), torch.logspace(0, np.log10(norm), 6)):
        Q, A = orthonormal(9, 6), gaussian(9, 6, seed=1)
        T = tangent_project((Q * norms).float(), A.float(), "dgram", dtype=dtype)
        assert torch.isfinite(T).all()
        exact = tangent_project(Q * norms, A, "dgram")
        assert relative(T, exact) < (0.02 if dtype else 1e-5)


# --- retractions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("manifold", "way"), WAYS_BACK)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_retractions_land_on_the_manifold(manifold, way, m, n, seed):
    W = retract(gaussian(m, n, seed=seed), manifold, method=way)
    scale = (W.mT @ W if m >= n else W @ W.mT).norm()
    assert distance(W, manifold) <= 1e-5 * scale


@pytest.mark.parametrize(("manifold", "way"), FIXED_WAYS)
@given(sizes, sizes, seeds, st.sampled_from(RADII), st.sampled_from(COARSE))
@settings(max_examples=40, deadline=None)
def test_other_retractions_leave_the_manifold_alone(manifold, way, m, n, seed, radius, dtype):
    """A step of length 0, for ten steps, with whatever radius and precision of corrections."""
    W = on_manifold(manifold, (m, n), seed)
    for exact in (True, False):
        moved = start = W if exact else W.float()
        for _ in range(10):
            moved = retract(moved, manifold, method=way, radius=radius, dtype=dtype)
        assert moved.dtype == start.dtype
        # Ten roundings of numbers up to 2.5; Newton-Schulz stops within 1e-7.
        assert torch.allclose(moved, start, rtol=0, atol=1e-6 if exact else 1e-5)


def test_none_leaves_everything_alone():
    W = gaussian(5, 3)
    assert torch.equal(retract(W, "none"), W)
    assert retract(W, "none") is not W
    assert distance(W, "none") == 0


@pytest.mark.parametrize(("manifold", "way"), [("stiefel", "polar"), ("dgram", "column_norm")])
@given(sizes, sizes, seeds, st.floats(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_radius_changes_the_cost_of_a_retraction_and_not_its_result(manifold, way, m, n, seed, radius):
    W = on_manifold(manifold, (m, n), seed)
    V = W + radius * msign(gaussian(m, n, seed=seed + 1), steps=16)
    assert torch.allclose(
        retract(V, manifold, method=way, radius=radius), retract(V, manifold, method=way), atol=1e-6
    )


@pytest.mark.parametrize(("manifold", "way"), [("stiefel", "polar"), ("dgram", "column_norm")])
@pytest.mark.parametrize(("dtype", "noise"), [(torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
@given(sizes, sizes, seeds, st.floats(0, 0.5))
@settings(max_examples=25, deadline=None)
def test_half_precision_corrections_are_off_by_a_share_of_the_step(
    manifold, way, dtype, noise, m, n, seed, radius
):
    W = on_manifold(manifold, (m, n), seed)
    V = W + radius * msign(gaussian(m, n, seed=seed + 1), steps=16)
    exact = retract(V, manifold, method=way)
    A = retract(V.float(), manifold, method=way, radius=radius, dtype=dtype)
    # 3e-5 is where half precision stops iterating. A direction of unit norm has Frobenius norm √n at most.
    assert (A - exact).norm() <= (noise * radius + 3e-5) * min(m, n) ** 0.5 * exact.norm().clamp_min(1)


@pytest.mark.parametrize(("manifold", "way"), ALL_WAYS)
@given(sizes, sizes, seeds, st.sampled_from(RADII[2:]))
@settings(max_examples=15, deadline=None)
def test_retractions_of_a_batch_are_the_batch_of_retractions(manifold, way, m, n, seed, radius):
    W = batch_on_manifold(manifold, 3, (m, n), seed)
    V = W + radius * msign(gaussian(3, m, n, seed=seed + 3), steps=16)
    before = V.clone()
    for r in (None, radius):
        together = retract(V, manifold, method=way, radius=r)
        single = torch.stack([retract(v, manifold, method=way, radius=r) for v in V])
        assert torch.equal(V, before)
        assert torch.allclose(together, single, atol=1e-6)
    assert torch.allclose(retract(V[None], manifold, method=way)[0], retract(V, manifold, method=way))
    if m != n:
        assert torch.allclose(retract(V.mT, manifold, method=way), retract(V, manifold, method=way).mT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("manifold", "way"), ALL_WAYS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_retractions_of_hard_cases_are_finite(shape, manifold, way, dtype):
    cases = hard_cases(shape)
    for name, V in cases.items():
        W = retract(V.to(dtype), manifold, method=way)
        assert torch.isfinite(W).all(), name
        assert W.dtype == dtype
    together = retract(torch.stack(list(cases.values())).to(dtype), manifold, method=way)
    assert torch.isfinite(together).all()


@pytest.mark.parametrize(("manifold", "way"), WAYS_BACK)
def test_a_matrix_whose_float32_svd_is_nan(manifold, way):
    """From a training run: finite, singular values in [1, 1.12], and yet LAPACK's sgesdd gives NaN."""
    V = torch.from_numpy(np.load(FIXTURES / "svd_nan.npz")["V"])
    W = retract(torch.stack([V, V.mT]), manifold, method=way)
    assert (distance(W.double(), manifold) < 1e-4).all()


def near_singular(width: int) -> torch.Tensor:
    """A Gaussian with one planted singular value of 7e-6 of the norm, as a real start has."""
    U, S, Vt = torch.linalg.svd(gaussian(width, width), full_matrices=False)
    S[-1] = 7e-6 * S.norm()
    return (U * S @ Vt).float()


def test_a_real_start_lands_on_the_manifold():
    assert distance(retract(near_singular(768), "stiefel").double(), "stiefel") < 5e-4


def test_the_polar_factor_without_svd_is_converged_at_a_real_width():
    V = near_singular(768)
    assert torch.allclose(svd_sorted_without_svd(V), retract(V, "dgram"), atol=2e-4 * float(V.norm()))
    U, _, Vt = torch.linalg.svd(V.double(), full_matrices=False)
    assert (msign(V, steps=20).double() - U @ Vt).norm() < 0.02


def test_column_norm_leaves_columns_of_very_different_norms_alone():
    W = orthonormal(96, 48) * torch.logspace(-4, 2, 48, dtype=torch.float64)
    for _ in range(10):
        moved = retract(W.float(), "dgram", method="column_norm").double()
        assert torch.allclose(moved.norm(dim=0), W.norm(dim=0), rtol=1e-4)


@pytest.mark.parametrize(("manifold", "way"), WAYS_BACK)
def test_matrices_without_full_rank_land_on_the_manifold(manifold, way):
    V = gaussian(24, 8).float()
    V[:, 3] = V[:, 4]
    if manifold != "oblique":
        V[:, 5] = 0
    W = retract(V, manifold, method=way).double()
    assert torch.isfinite(W).all()
    if way != "column_norm":  # its equal columns leave Q a free choice that diag(QᵀV) may undo
        assert distance(W, manifold) < 1e-4 * (1 + float((W.mT @ W).norm()))


@pytest.mark.parametrize("radius", [None, 0.01, 0.3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("manifold", "way"), ALL_WAYS)
def test_retractions_confine_nan_to_its_matrix(manifold, way, value, radius):
    for shape in ((6, 4), (4, 6), (5, 5)):
        V = batch_on_manifold(manifold, 3, shape) + 0.01 * msign(gaussian(3, *shape))
        V[1, 2, 2] = value
        W = retract(V, manifold, method=way, radius=radius)
        assert W[1].isnan().any()
        assert torch.allclose(W[[0, 2]], retract(V[[0, 2]], manifold, method=way), atol=1e-6)
        if manifold != "oblique":  # its columns know nothing of each other
            assert W[1].isnan().all()


@pytest.mark.parametrize("manifold", CONSTRAINED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tangent_spaces_confine_nan_to_its_matrix(manifold, value):
    W, A = batch_on_manifold(manifold, 3, (6, 4)), gaussian(3, 6, 4, seed=9)
    bad = torch.where(torch.arange(3)[:, None, None] == 1, A.clone().fill_(value), A)
    for broken in ((W, bad), (bad, A)):
        T = tangent_project(*broken, manifold)
        residual = tangency_residual(*broken, manifold)
        assert T[1].isnan().all()
        assert not torch.isfinite(residual[1])
        fine = (broken[0][[0, 2]], broken[1][[0, 2]])
        assert torch.equal(T[[0, 2]], tangent_project(*fine, manifold))
        assert torch.equal(residual[[0, 2]], tangency_residual(*fine, manifold))
    apart = distance(torch.where(bad.isfinite(), W, bad), manifold)
    assert not torch.isfinite(apart[1])
    assert torch.isfinite(apart[[0, 2]]).all()


def test_svd_sorted_hands_singular_values_to_columns_in_order():
    Q = orthonormal(9, 4)
    norms = torch.tensor([0.5, 3.0, 1.0, 2.0], dtype=torch.float64)
    W = retract(Q * norms, "dgram", method="svd_sorted")
    assert W.norm(dim=0) == pytest.approx([3, 2, 1, 0.5])
    assert retract(Q * norms, "dgram", method="column_norm").norm(dim=0) == pytest.approx(
        norms.numpy(), rel=1e-6
    )


@given(st.integers(1, 16), st.integers(0, 8), st.floats(0, 4), seeds)
@settings(max_examples=30, deadline=None)
def test_svd_sorted_needs_no_svd(n, extra, decades, seed):
    # The polar iteration is converged up to a condition number of 1e4.
    V, polar = with_spectrum(spectrum("geometric", n, decades, seed), n + extra, seed)
    by_hand = polar * torch.linalg.eigvalsh(V.mT @ V).clamp_min(0).sqrt().flip(-1)
    for W in (svd_sorted_without_svd(V), retract(V, "dgram")):
        assert torch.allclose(W, by_hand, atol=1e-5)


@given(st.integers(1, 12), st.integers(0, 12), seeds, st.sampled_from(RADII[2:]), st.sampled_from(COARSE))
@settings(max_examples=30, deadline=None)
def test_column_norm_commutes_with_column_permutations(n, extra, seed, radius, dtype):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    far = gaussian(n + extra, n, seed=seed)
    near = on_manifold("dgram", (n + extra, n), seed) + radius * msign(far, steps=16)
    half = dtype is not None and radius <= 0.05
    for V, options in ((far, {}), (near, {"radius": radius, "dtype": dtype})):
        W = retract(V, "dgram", method="column_norm", **options)
        permuted = retract(V[:, order], "dgram", method="column_norm", **options)
        # Far and without half precision it is a factorisation in float64.
        assert torch.allclose(permuted, W[:, order], atol=1e-2 * radius if half else 1e-9)


@given(st.integers(1, 12), st.integers(0, 12), seeds)
@settings(max_examples=20, deadline=None)
def test_column_norm_is_its_formula(n, extra, seed):
    V = gaussian(n + extra, n, seed=seed)
    U, _, Qt = torch.linalg.svd(V / V.norm(dim=0), full_matrices=False)
    Q = U @ Qt
    assert torch.allclose(retract(V, "dgram", method="column_norm"), Q * (Q.mT @ V).diagonal(), atol=1e-8)


@pytest.mark.parametrize("manifold", CONSTRAINED)
def test_retractions_agree_with_the_oracle(manifold):
    for shape in SHAPES.values():
        V = gaussian(*shape, seed=3)
        assert torch.allclose(retract(V, manifold), oracle.retract(V, manifold), atol=1e-4)


@pytest.mark.parametrize(("manifold", "way"), ALL_WAYS)
def test_retracting_zero_is_finite(manifold, way):
    W = retract(torch.zeros(5, 3), manifold, method=way)
    assert torch.isfinite(W).all()
    if manifold == "spectral":
        assert torch.equal(W, torch.zeros(5, 3))


# --- the spectral norm -----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "exponents"), [(torch.float32, (-30, 30)), (torch.float64, (-300, 300))])
@given(st.data(), sizes, sizes, seeds, st.sampled_from([0.0, 1e-6, 1e-3, 0.5]))
@settings(max_examples=40, deadline=None)
def test_the_spectral_norm_is_the_largest_singular_value(dtype, exponents, data, m, n, seed, gap):
    sigma = torch.full((min(m, n),), 1 - gap, dtype=torch.float64)
    sigma[0] = 1
    scale = 10.0 ** data.draw(st.integers(*exponents))
    for X in (with_spectrum(sigma, max(m, n), seed)[0], gaussian(m, n, seed=seed)):
        X = ((X if m >= n else X.mT) * scale).to(dtype)
        expected = torch.linalg.svdvals(X.double() / scale)[0]
        assert spectral_norm(X).double() / scale == pytest.approx(expected.item(), rel=1e-4)
        fast = spectral_norm(X, squarings=5).double() / scale
        assert 0.9 * expected <= fast <= 1.0001 * expected


@given(sizes, sizes, seeds, st.integers(-30, 30))
@settings(max_examples=30, deadline=None)
def test_spectral_retraction_divides_by_the_norm(m, n, seed, exponent):
    V = (gaussian(m, n, seed=seed) * 10.0**exponent).float()
    W = retract(V, "spectral").double()
    assert torch.linalg.matrix_norm(W, 2) == pytest.approx(1, abs=1e-3)
    assert distance(W, "spectral") < 1e-3
    assert torch.allclose(W * torch.linalg.matrix_norm(V.double(), 2), V.double(), rtol=1e-3)


def test_spectral_norms_of_a_batch():
    X = gaussian(3, 6, 4)
    X[0] = 0
    X[1, 0, 0] = torch.nan
    sigma = spectral_norm(X)
    assert sigma[0] == 0
    assert sigma[1].isnan()
    assert sigma[2] == pytest.approx(torch.linalg.svdvals(X[2])[0].item(), rel=1e-4)
    W = retract(X, "spectral")
    assert torch.equal(W[0], torch.zeros(6, 4, dtype=torch.float64))
    assert W[1].isnan().all()


# --- errors ----------------------------------------------------------------------------------------


def test_unknown_names_are_errors():
    W = gaussian(4, 3)
    known = r"^unknown manifold 'stifel'; known: none, stiefel, dgram, oblique, spectral$"
    for function in (
        lambda: retract(W, "stifel"),
        lambda: distance(W, "stifel"),
        lambda: tangency_residual(W, W, "stifel"),
        lambda: tangent_project(W, W, "stifel"),
        lambda: constrained_part(W.mT @ W, "stifel"),
    ):
        with pytest.raises(ValueError, match=known):
            function()
    with pytest.raises(ValueError, match=r"has no retraction 'polar'; it has: svd_sorted, column_norm$"):
        retract(W, "dgram", method="polar")
