"""The mathematics of trainers.manifold: against a naive oracle, against SVDs, and by its invariants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.manifold import (
    MANIFOLDS,
    RETRACTIONS,
    constrained_part,
    distance,
    msign,
    retract,
    solve,
    tangency_residual,
    tangent_project,
)
from trainers.manifold.manifolds import svd_sorted_without_svd
from trainers.manifold.msign import polar_near, steps_from

CONSTRAINED = ("stiefel", "dgram", "oblique")
SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (12, 12)}
WAYS_BACK = [(m, way) for m in CONSTRAINED for way in RETRACTIONS[m]]
FIXTURES = np.load(Path(__file__).parents[1] / "fixtures" / "real_momentum.npz")
NAMES = sorted({key.rsplit("/", 1)[0] for key in FIXTURES.files})


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def on_manifold(manifold: str, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Exactly on it: orthonormal columns by QR, times norms where they are free."""
    tall = gaussian(max(shape), min(shape), seed=seed)
    W = tall / tall.norm(dim=0) if manifold == "oblique" else torch.linalg.qr(tall).Q
    if manifold == "dgram":
        W = W * (0.5 + 2 * torch.rand(min(shape), dtype=torch.float64))
    return W if shape[0] >= shape[1] else W.mT


def real(name: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    W, G = (torch.from_numpy(FIXTURES[f"{name}/{key}"]).double() for key in ("W", "G"))
    return W, G, str(FIXTURES[f"{name}/manifold"])


matrices = st.builds(
    lambda m, n, seed, exponent: gaussian(m, n, seed=seed) * 10.0**exponent,
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 10_000),
    st.integers(-30, 30),
)
manifolds = st.sampled_from(CONSTRAINED)


# --- msign ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_msign_is_the_polar_factor(shape):
    X = gaussian(*shape)
    U, _, Vt = torch.linalg.svd(X, full_matrices=False)
    assert torch.allclose(msign(X, steps=16), U @ Vt, atol=1e-10)


def test_msign_reaches_singular_values_a_thousandth_of_the_norm():
    U, V = torch.linalg.qr(gaussian(40, 20)).Q, torch.linalg.qr(gaussian(20, 20, seed=1)).Q
    X = U * torch.logspace(0, -3, 20, dtype=torch.float64) @ V.mT
    assert torch.linalg.svdvals(msign(X)) == pytest.approx(np.ones(20), abs=1e-6)


@given(matrices)
@settings(max_examples=40, deadline=None)
def test_msign_ignores_scale_and_never_exceeds_one(X):
    A = msign(X, steps=16)
    assert torch.isfinite(A).all()
    assert torch.linalg.matrix_norm(A, 2) <= 1.01
    assert torch.allclose(A, msign(X * 7.5, steps=16), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_msign_of_a_batch_is_the_batch_of_msigns(dtype):
    X = gaussian(3, 2, 9, 5).to(dtype)
    single = torch.stack([torch.stack([msign(M) for M in row]) for row in X])
    assert msign(X).dtype == dtype
    assert torch.allclose(msign(X).double(), single.double(), atol=2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_msign_keeps_zero_and_null_directions():
    assert torch.equal(msign(torch.zeros(4, 3)), torch.zeros(4, 3))
    rank_one = torch.outer(gaussian(6), gaussian(4, seed=1))
    sigma = torch.linalg.svdvals(msign(rank_one))
    assert sigma[0] == pytest.approx(1, abs=1e-9)
    assert sigma[1:].max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_msign_iterates_in_the_precision_it_is_told(dtype):
    """The result of a half-precision iteration is a half-precision number, whatever X's type."""
    A = msign(gaussian(24, 10).float(), dtype=dtype)
    assert A.dtype == torch.float32
    assert torch.equal(A, A.to(dtype).float())
    U, _, Vt = torch.linalg.svd(gaussian(24, 10), full_matrices=False)
    assert (A - U @ Vt).abs().max() < 0.03


@pytest.mark.parametrize("radius", [0.0, 1e-4, 0.02, 0.3, 0.5])
def test_polar_near_is_the_polar_factor_over_its_whole_range(radius):
    U, V = torch.linalg.qr(gaussian(40, 20)).Q, torch.linalg.qr(gaussian(20, 20, seed=1)).Q
    sigma = torch.linspace(1 - radius, 1 + radius, 20, dtype=torch.float64)
    assert torch.allclose(polar_near(U * sigma @ V.mT, radius), U @ V.mT, atol=1e-6)


def test_polar_near_takes_no_more_steps_than_it_needs():
    assert [steps_from(r) for r in (0.0, 1e-4, 0.02, 0.3, 0.5)] == [0, 1, 2, 3, 5]
    with pytest.raises(ValueError, match=r"above 0\.5"):
        steps_from(0.6)


@pytest.mark.parametrize("radius", [0.3, 0.9, 5.0])
def test_a_radius_changes_the_cost_of_a_retraction_and_not_its_result(radius):
    W = on_manifold("stiefel", (12, 8))
    V = W + radius * msign(gaussian(12, 8, seed=2))
    assert torch.allclose(retract(V, "stiefel", radius=radius), retract(V, "stiefel"), atol=1e-6)


@pytest.mark.parametrize(("manifold", "way"), WAYS_BACK)
def test_a_matrix_whose_float32_svd_is_nan(manifold, way):
    """From a training run: finite, singular values in [1, 1.12], and yet LAPACK's sgesdd gives NaN."""
    V = torch.from_numpy(np.load(Path(__file__).parents[1] / "fixtures" / "svd_nan.npz")["V"])
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
    W = torch.linalg.qr(gaussian(96, 48)).Q * torch.logspace(-4, 2, 48, dtype=torch.float64)
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


@pytest.mark.parametrize(("manifold", "way"), WAYS_BACK)
def test_retractions_confine_nan_to_its_matrix(manifold, way):
    V = gaussian(3, 6, 4)
    V[1, 2, 2] = torch.inf
    W = retract(V, manifold, method=way)
    assert not torch.isfinite(W[1]).all()
    assert torch.allclose(W[[0, 2]], retract(V[[0, 2]], manifold, method=way))


def test_msign_confines_nan_to_its_matrix():
    X = gaussian(3, 5, 4)
    X[1, 0, 0] = torch.nan
    A = msign(X)
    assert A[1].isnan().all()
    assert torch.allclose(A[[0, 2]], msign(X[[0, 2]]))


# --- manifolds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("manifold", CONSTRAINED)
@given(st.integers(1, 12), st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_the_projector_is_idempotent_and_self_adjoint(manifold, n, seed):
    M, N = (X + X.mT for X in gaussian(2, n, n, seed=seed))
    P, Q = constrained_part(M, manifold), constrained_part(N, manifold)
    assert torch.equal(constrained_part(P, manifold), P)
    assert (P * N).sum() == pytest.approx((M * Q).sum().item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("manifold", CONSTRAINED)
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


@pytest.mark.parametrize(("manifold", "way"), WAYS_BACK)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_retractions_land_on_the_manifold(manifold, way, m, n, seed):
    W = retract(gaussian(m, n, seed=seed), manifold, method=way)
    scale = (W.mT @ W if m >= n else W @ W.mT).norm()
    assert distance(W, manifold) <= 1e-5 * scale


@pytest.mark.parametrize(("manifold", "way"), [w for w in WAYS_BACK if w[1] != "svd_sorted"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_other_retractions_leave_the_manifold_alone(manifold, way, shape):
    W = on_manifold(manifold, shape)
    assert torch.allclose(retract(W, manifold, method=way), W, atol=1e-7)


def test_svd_sorted_hands_singular_values_to_columns_in_order():
    Q = torch.linalg.qr(gaussian(9, 4)).Q
    norms = torch.tensor([0.5, 3.0, 1.0, 2.0], dtype=torch.float64)
    W = retract(Q * norms, "dgram", method="svd_sorted")
    assert W.norm(dim=0) == pytest.approx([3, 2, 1, 0.5])
    assert retract(Q * norms, "dgram", method="column_norm").norm(dim=0) == pytest.approx(
        norms.numpy(), rel=1e-6
    )


@given(st.integers(1, 16), st.integers(0, 8), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_svd_sorted_needs_no_svd(n, extra, seed):
    V = gaussian(n + extra, n, seed=seed)
    condition = torch.linalg.cond(V)
    if condition > 1e4:  # the polar iteration is converged up to there
        return
    scale = V.norm()
    assert torch.allclose(svd_sorted_without_svd(V), retract(V, "dgram"), atol=1e-5 * float(scale))


@given(st.integers(0, 999))
@settings(max_examples=10, deadline=None)
def test_column_norm_commutes_with_column_permutations(seed):
    V = gaussian(12, 6, seed=seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    permuted = retract(V[:, order], "dgram", method="column_norm")
    assert torch.allclose(permuted, retract(V, "dgram", method="column_norm")[:, order], atol=1e-9)


@pytest.mark.parametrize("manifold", CONSTRAINED)
def test_retractions_agree_with_the_oracle(manifold):
    for shape in SHAPES.values():
        V = gaussian(*shape, seed=3)
        assert torch.allclose(retract(V, manifold), oracle.retract(V, manifold), atol=1e-4)


@pytest.mark.parametrize(("manifold", "way"), WAYS_BACK)
def test_retracting_zero_is_finite(manifold, way):
    assert torch.isfinite(retract(torch.zeros(5, 3), manifold, method=way)).all()


def test_unknown_names_are_errors():
    W = gaussian(4, 3)
    with pytest.raises(ValueError, match="unknown manifold 'stifel'"):
        retract(W, "stifel")
    with pytest.raises(ValueError, match="has no retraction 'polar'; it has: svd_sorted, column_norm"):
        retract(W, "dgram", method="polar")
    with pytest.raises(ValueError, match="unknown solver"):
        solve(W, W, "stiefel", solver="newton")
    with pytest.raises(ValueError, match="differ in shape"):
        solve(W, W.mT, "stiefel")


# --- solvers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifold", CONSTRAINED)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("scale", "steps"), [(0.01, 3), (1.0, 20), (30.0, 20)])
def test_dual_ascent_is_the_published_loop(manifold, shape, scale, steps):
    # The step size is absolute, so small gradients make the loop chaotic: rounding grows by
    # alpha / sigma_min(G) an iteration, and twenty of them could only be compared bit for bit.
    W, G = on_manifold(manifold, shape), gaussian(*shape, seed=5) * scale
    expected = oracle.dual_ascent(W, G, manifold, K=steps)
    A = solve(W, G, manifold, solver="dual_ascent", dual_steps=steps)
    assert torch.allclose(A, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_dual_ascent_is_the_published_loop_on_real_momentum(name):
    W, G, manifold = real(name)
    expected = oracle.dual_ascent(W, G, manifold)
    assert torch.allclose(solve(W, G, manifold, solver="dual_ascent"), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_projected_is_more_tangent_than_dual_ascent_on_real_momentum(name):
    W, G, manifold = real(name)
    projected = tangency_residual(W, solve(W, G, manifold, solver="projected"), manifold)
    polished = tangency_residual(W, solve(W, G, manifold, solver="projected", polish=True), manifold)
    published = tangency_residual(W, solve(W, G, manifold, solver="dual_ascent"), manifold)
    assert polished <= projected < published


@given(manifolds, st.integers(2, 14), st.integers(2, 14), st.integers(0, 999), st.booleans())
@settings(max_examples=40, deadline=None)
def test_projected_is_scale_free_bounded_and_equivariant(manifold, m, n, seed, polish):
    W, G = on_manifold(manifold, (m, n), seed), gaussian(m, n, seed=seed + 1)

    def direction(W, G):
        return solve(W, G, manifold, solver="projected", polish=polish, msign_steps=16)

    A = direction(W, G)
    assert torch.linalg.matrix_norm(A, 2) <= 1.01
    assert torch.allclose(direction(W, 1000 * G), A, atol=1e-6)
    if m != n:  # a square matrix is its own transpose's shape, and columns are what is constrained
        assert torch.allclose(direction(W.mT, G.mT), A.mT, atol=1e-9)
    if m >= n:
        Q = torch.linalg.qr(gaussian(m, m, seed=seed + 2)).Q
        assert torch.allclose(direction(Q @ W, Q @ G), Q @ A, atol=1e-6)


@pytest.mark.parametrize("n", [2, 5, 12])
def test_projected_is_exact_for_square_stiefel(n):
    W, G = on_manifold("stiefel", (n, n)), gaussian(n, n, seed=7)
    A = solve(W, G, "stiefel", solver="projected", msign_steps=16)
    assert tangency_residual(W, A, "stiefel") < 1e-10
    # The optimum of <G, W S> over skew S with norm 1 is the sum of |eigenvalues| of skew(WᵀG).
    M = W.mT @ G
    best = torch.linalg.svdvals((M - M.mT) / 2).sum()
    assert (G * A).sum() == pytest.approx(best.item(), rel=1e-6)


@pytest.mark.parametrize("solver", ["dual_ascent", "projected"])
@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_zero_and_rank_deficient_gradients_give_finite_directions(solver, manifold):
    W = on_manifold(manifold, (8, 5)) if manifold != "none" else gaussian(8, 5)
    for G in (torch.zeros(8, 5, dtype=torch.float64), torch.outer(gaussian(8), gaussian(5))):
        assert torch.isfinite(solve(W, G, manifold, solver=solver)).all()


@pytest.mark.parametrize("manifold", MANIFOLDS)
@pytest.mark.parametrize("solver", ["dual_ascent", "projected"])
def test_inputs_are_left_alone_and_batches_are_loops(manifold, solver):
    shape = (9, 6)
    W = torch.stack(
        [on_manifold(manifold, shape, s) if manifold != "none" else gaussian(*shape) for s in range(3)]
    )
    G = gaussian(3, *shape, seed=11)
    before = W.clone(), G.clone()
    A = solve(W, G, manifold, solver=solver)
    assert torch.equal(W, before[0])
    assert torch.equal(G, before[1])
    single = torch.stack([solve(w, g, manifold, solver=solver) for w, g in zip(W, G, strict=True)])
    assert torch.allclose(A, single, atol=1e-7)
