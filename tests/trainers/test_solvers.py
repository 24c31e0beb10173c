"""Directions of Manifold Muon: against the published loop, closed forms and converged optima, on real
momentum, and by their invariants."""

from __future__ import annotations

import functools

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import (
    CONSTRAINED,
    HALF,
    NAMES,
    PRECISIONS,
    SHAPES,
    batch_on_manifold,
    gaussian,
    hard_cases,
    norms,
    on_manifold,
    one_thread,
    orthonormal,
    precisions,
    real,
    relative,
    seeds,
    sizes,
)

from trainers.manifold import (
    MANIFOLDS,
    METHODS,
    constrained_part,
    distance,
    retract,
    solve,
    tangency_residual,
    tangent_project,
)

single_threaded = pytest.fixture(scope="module", autouse=True)(one_thread)

DIRECTIONS = {
    "dual_ascent": {"solver": "dual_ascent"},
    "reduced": {"solver": "dual_ascent", "dual_impl": "reduced"},
    "projected": {"solver": "projected"},
    "polished": {"solver": "projected", "polish": True},
    "exact": {"solver": "exact"},
}
SQUARE = [name for name in NAMES if name.endswith("attn.c_proj")]
SCALE_FREE = ("projected", "polished", "exact")
manifolds = st.sampled_from(CONSTRAINED)

ROUNDING = {"float64": 1e-11, "float32": 2e-4, "float16": 0.03, "bfloat16": 0.15}
"""Relative difference that rounding may make where all singular values are of one size."""


def direction(W, G, manifold, name, precision="float64", method="gram", **options):
    dtype, half = PRECISIONS[precision]
    A = solve(
        W.to(dtype),
        G.to(dtype),
        manifold,
        msign_dtype=half,
        msign_method=method,
        **DIRECTIONS[name],
        **options,
    )
    assert A.dtype == dtype
    return A


def well_posed(manifold: str, n: int, extra: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W and G, (3n + extra) x n. The part of G outside the span of W, which no multiplier reaches, keeps
    the singular values of G + 2WΛ away from 0, where the polar factor jumps and the dual ascent is
    chaotic: there no two orders of summation agree."""
    shape = (3 * n + extra, n)
    return on_manifold(manifold, shape, seed), gaussian(*shape, seed=seed + 1)


# --- the published loop ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dual_ascent", "reduced"])
@pytest.mark.parametrize("manifold", CONSTRAINED)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (40, 8), (9, 6)], ids=str)
@pytest.mark.parametrize(("scale", "steps"), [(0.01, 3), (1.0, 20), (30.0, 20)])
def test_dual_ascent_is_the_published_loop(manifold, shape, scale, steps, name):
    # The step size is absolute, so small gradients make the loop chaotic: rounding grows by
    # alpha / sigma_min(G) an iteration, and twenty of them could only be compared bit for bit.
    W, G = on_manifold(manifold, shape), gaussian(*shape, seed=5) * scale
    expected = oracle.dual_ascent(W, G, manifold, K=steps)
    A = direction(W, G, manifold, name, method="polar_express", dual_steps=steps)
    assert torch.allclose(A, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in SQUARE])
def test_dual_ascent_is_the_published_loop_on_real_momentum(name):
    W, G, manifold = real(name)
    # The reduced coordinates need orthogonal columns; these weights, of bfloat16 runs, have them to 3e-2.
    W = retract(W, manifold, method="column_norm" if manifold == "dgram" else None)
    expected = oracle.dual_ascent(W, G, manifold)
    for implementation in ("dual_ascent", "reduced"):
        A = direction(W, G, manifold, implementation, method="polar_express")
        assert torch.allclose(A, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SQUARE)
def test_dual_ascent_is_the_published_loop_on_real_square_momentum(name):
    W, G, manifold = real(name)
    expected = oracle.dual_ascent(W, G, manifold)
    assert torch.allclose(solve(W, G, manifold, solver="dual_ascent"), expected, atol=1e-6, rtol=0)
    # Singular values of this G reach down to 1e-9. Another order of summation agrees for two steps.
    W = retract(W, manifold)
    expected = oracle.dual_ascent(W, G, manifold, K=2)
    A = direction(W, G, manifold, "reduced", method="polar_express", dual_steps=2)
    assert torch.allclose(A, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("manifold", "shape"),
    [("oblique", s) for s in SHAPES.values()]
    + [(m, s) for m in ("stiefel", "dgram") for s in ((9, 6), (6, 7))],
    ids=str,
)
def test_where_nothing_is_saved_the_reduced_loop_is_the_published_code(manifold, shape):
    """Oblique columns are not orthogonal, and 2n rows are no fewer than m."""
    W, G = on_manifold(manifold, shape), gaussian(*shape, seed=1)
    assert torch.equal(direction(W, G, manifold, "reduced"), direction(W, G, manifold, "dual_ascent"))


# --- real momentum ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("key", NAMES)
def test_each_solver_is_more_tangent_than_the_one_before_on_real_momentum(key, precision):
    W, G, manifold = real(key)
    method = "polar_express" if precision == "float64" else "gram"

    def residual(name):
        A = direction(W, G, manifold, name, precision, method)
        return float(tangency_residual(W, A.double(), manifold))

    published, projected, polished, exact = map(residual, ("dual_ascent", "projected", "polished", "exact"))
    assert polished <= projected < published
    assert exact <= projected
    if projected > 0.005:  # of a square Stiefel matrix it is the optimum already
        assert exact <= projected / 2
    else:
        assert key in SQUARE


@functools.cache
def optimum(name: str) -> torch.Tensor:
    """The tangent-constrained optimum on rectangular real momentum, by what `exact` approximates: many
    rounds of majorise-minimise, each with an SVD in float64."""
    W, G, manifold = real(name)
    if W.size(0) < W.size(1):
        W, G = W.mT, G.mT
    W = retract(W, manifold, method="column_norm" if manifold == "dgram" else None)

    def differential(A):
        return constrained_part(W.mT @ A + A.mT @ W, manifold)

    squares = W.square().sum(dim=0)
    weights = 1 / (squares[:, None] + squares)
    multiplier = -0.5 * weights * differential(G)
    for _ in range(50):
        U, S, Vt = torch.linalg.svd(G + 2 * W @ multiplier, full_matrices=False)
        Z = Vt.mT @ (Vt / S[:, None])
        residual, step = differential(U @ Vt), 0
        towards = weights * residual
        size = (residual * towards).sum()
        for _ in range(20):
            X = squares[:, None] * (towards @ Z)
            image = constrained_part(2 * (X + X.mT), manifold)
            length = size / (towards * image).sum()
            step, residual = step + length * towards, residual - length * image
            before, size = size, (residual * weights * residual).sum()
            towards = weights * residual + size / before * towards
        multiplier = multiplier - step
    U, S, Vt = torch.linalg.svd(G + 2 * W @ multiplier, full_matrices=False)
    A = U @ Vt
    # Any tangent A of norm 1 has <G, A> <= ‖G + 2WΛ‖_*, whatever Λ: near equality proves an optimum.
    assert tangency_residual(W, A, manifold) < 3e-3
    assert (G * A).sum() > (1 - 1e-3) * S.sum()
    return A


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("key", [n for n in NAMES if n not in SQUARE])
def test_exact_is_nearer_to_the_optimum_than_projected_on_real_momentum(key, precision):
    W, G, manifold = real(key)
    if W.size(0) < W.size(1):
        W, G = W.mT, G.mT
    best = optimum(key)

    def cosine(name):
        A = direction(W, G, manifold, name, precision).double()
        return float((A * best).sum() / A.norm() / best.norm())

    assert cosine("exact") > cosine("projected") + 0.03
    assert cosine("exact") > 0.94


# --- closed forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALE_FREE)
@given(st.integers(1, 16), seeds)
@settings(max_examples=25, deadline=None)
def test_scale_free_solvers_are_exact_for_square_stiefel(name, n, seed):
    W, G = on_manifold("stiefel", (n, n), seed), gaussian(n, n, seed=seed + 1)
    # The optimum of <G, W S> over skew S with norm 1 is the sum of the singular values of skew(WᵀG).
    M = W.mT @ G
    best = float(torch.linalg.svdvals((M - M.mT) / 2).sum())
    for precision, value, residual in (
        ("float64", 1e-6, 1e-12),
        ("float32", 1e-4, 1e-6),
        ("float16", 0.02, 5e-3),
        ("bfloat16", 0.1, 0.04),
    ):
        half = precision in HALF
        A = direction(W, G, "stiefel", name, precision, msign_steps=None if half else 16).double()
        assert tangency_residual(W, A, "stiefel") < residual
        assert (G * A).sum() == pytest.approx(best, rel=value, abs=value)


@pytest.mark.parametrize("n", [2, 5, 12])
@pytest.mark.parametrize("method", ["polar_express", "gram"])
def test_projected_is_exact_for_square_stiefel(n, method):
    W, G = on_manifold("stiefel", (n, n)), gaussian(n, n, seed=7)
    A = solve(W, G, "stiefel", solver="projected", msign_steps=16, msign_method=method)
    assert tangency_residual(W, A, "stiefel") < 1e-10
    M = W.mT @ G
    best = torch.linalg.svdvals((M - M.mT) / 2).sum()
    assert (G * A).sum() == pytest.approx(best.item(), rel=1e-6)


@pytest.mark.parametrize("manifold", CONSTRAINED)
def test_polish_is_a_tangent_part_and_a_newton_schulz_step(manifold):
    W, G = on_manifold(manifold, (24, 10)), gaussian(24, 10, seed=1)
    T = tangent_project(W, G, manifold)
    U, _, Vt = torch.linalg.svd(T, full_matrices=False)
    assert torch.allclose(direction(W, G, manifold, "projected", msign_steps=16), U @ Vt)
    T = tangent_project(W, U @ Vt, manifold)
    polished = 1.5 * T - 0.5 * T @ T.mT @ T
    assert torch.allclose(direction(W, G, manifold, "polished", msign_steps=16), polished)


@pytest.mark.parametrize("manifold", ["none", "spectral"])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_without_a_tangent_space_the_direction_is_plain_muon(manifold, name):
    W, G = gaussian(9, 5), gaussian(9, 5, seed=1)
    U, _, Vt = torch.linalg.svd(G, full_matrices=False)
    assert torch.allclose(direction(W, G, manifold, name, msign_steps=16), U @ Vt)


# --- invariants ------------------------------------------------------------------------------------


@given(manifolds, st.integers(2, 14), st.integers(2, 14), st.integers(0, 999), st.booleans())
@settings(max_examples=40, deadline=None)
def test_projected_is_scale_free_bounded_and_equivariant(manifold, m, n, seed, polish):
    W, G = on_manifold(manifold, (m, n), seed), gaussian(m, n, seed=seed + 1)

    def direction(W, G):
        return solve(W, G, manifold, solver="projected", polish=polish, msign_steps=16)

    A = direction(W, G)
    assert norms(A) <= 1.01
    assert torch.allclose(direction(W, 1000 * G), A, atol=1e-6)
    if m != n:  # a square matrix is its own transpose's shape, and columns are what is constrained
        assert torch.allclose(direction(W.mT, G.mT), A.mT, atol=1e-9)
    if m >= n:
        Q = orthonormal(m, m, seed + 2)
        assert torch.allclose(direction(Q @ W, Q @ G), Q @ A, atol=1e-6)


@pytest.mark.parametrize("name", SCALE_FREE)
@given(manifolds, st.integers(1, 10), st.integers(0, 8), seeds, precisions, st.floats(-20, 20))
@settings(max_examples=40, deadline=None)
def test_the_scale_of_the_gradient_does_not_matter(name, manifold, n, extra, seed, precision, exponent):
    W, G = well_posed(manifold, n, extra, seed)
    A = direction(W, G, manifold, name, precision)
    scaled = direction(W, 10.0**exponent * G, manifold, name, precision)
    assert relative(scaled, A) < ROUNDING[precision]


@pytest.mark.parametrize("name", SCALE_FREE)
@given(manifolds, sizes, sizes, seeds, precisions, st.integers(-60, 60))
@settings(max_examples=40, deadline=None)
def test_a_power_of_two_changes_no_bit(name, manifold, m, n, seed, precision, exponent):
    W, G = on_manifold(manifold, (m, n), seed), gaussian(m, n, seed=seed + 1).float()
    A = direction(W, G, manifold, name, precision)
    assert torch.equal(direction(W, 2.0**exponent * G, manifold, name, precision), A)


@pytest.mark.parametrize("name", DIRECTIONS)
@given(st.sampled_from(MANIFOLDS), sizes, sizes, seeds, precisions, st.sampled_from(METHODS))
@settings(max_examples=60, deadline=None)
def test_directions_have_norm_one(name, manifold, m, n, seed, precision, method):
    W, G = on_manifold(manifold, (m, n), seed), gaussian(m, n, seed=seed + 1)
    bound = 1.3 if method == "newton_schulz" else 1.02 if precision in HALF else 1.01
    A = direction(W, G, manifold, name, precision, method)
    assert torch.isfinite(A).all()
    assert norms(A) <= bound


@pytest.mark.parametrize("name", DIRECTIONS)
@given(
    st.sampled_from(MANIFOLDS),
    st.integers(1, 10),
    st.integers(0, 8),
    seeds,
    precisions,
    st.sampled_from(("polar_express", "gram")),
)
@settings(max_examples=40, deadline=None)
def test_directions_turn_with_their_matrices(name, manifold, n, extra, seed, precision, method):
    """Transposed, multiplied by an orthogonal matrix from the left, or one of a batch."""
    W, G = well_posed(manifold, n, extra, seed)
    A = direction(W, G, manifold, name, precision, method).double()
    tolerance = ROUNDING[precision]
    assert relative(direction(W.mT, G.mT, manifold, name, precision, method), A.mT) < tolerance
    Q = orthonormal(len(W), len(W), seed + 2)
    assert relative(direction(Q @ W, Q @ G, manifold, name, precision, method), Q @ A) < tolerance
    # Among others, of which some are harder.
    W, G = torch.stack([W, W, W]), torch.stack([torch.zeros_like(G), G, G[:, :1].expand_as(G)])
    before = W.clone(), G.clone()
    together = direction(W, G, manifold, name, precision, method)
    assert relative(together[1], A) < tolerance
    assert torch.equal(W, before[0])
    assert torch.equal(G, before[1])
    nested = direction(W[None], G[None], manifold, name, precision, method)
    assert torch.equal(nested, together[None])


@given(st.sampled_from(("stiefel", "dgram")), st.integers(1, 12), st.integers(0, 11), seeds, st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_published_loop_turns_with_matrices_of_every_shape(manifold, n, extra, seed, reduced):
    """As above without spare rows, for as many steps as rounding survives."""
    m = n + extra
    W, G = on_manifold(manifold, (m, n), seed), gaussian(m, n, seed=seed + 1)
    name = "reduced" if reduced else "dual_ascent"
    A = direction(W, G, manifold, name, dual_steps=2)
    Q = orthonormal(m, m, seed + 2)
    assert relative(direction(Q @ W, Q @ G, manifold, name, dual_steps=2), Q @ A) < 1e-6
    if m != n:
        assert relative(direction(W.mT, G.mT, manifold, name, dual_steps=2), A.mT) < 1e-6


@pytest.mark.parametrize("manifold", MANIFOLDS)
@pytest.mark.parametrize("name", DIRECTIONS)
def test_inputs_are_left_alone_and_batches_are_loops(manifold, name):
    shape = (9, 6)
    W, G = batch_on_manifold(manifold, 3, shape), gaussian(3, *shape, seed=11)
    before = W.clone(), G.clone()
    A = direction(W, G, manifold, name, method="polar_express")
    assert torch.equal(W, before[0])
    assert torch.equal(G, before[1])
    single = [direction(w, g, manifold, name, method="polar_express") for w, g in zip(W, G, strict=True)]
    assert torch.allclose(A, torch.stack(single), atol=1e-7)


# --- hard cases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_hard_gradients_give_finite_directions(manifold, name, precision):
    for shape in ((12, 5), (5, 12), (9, 7), (8, 8), (4, 1), (1, 1)):
        W = on_manifold(manifold, shape)
        n = min(shape)
        M = gaussian(n, n, seed=8)
        across = W @ (M + M.mT) if len(W) >= n == W.size(1) else (M + M.mT) @ W
        cases = hard_cases(shape, seed=4) | {
            "the weight": W,
            "the weight, nearly": W + 1e-6 * gaussian(*shape, seed=9),
            "no tangent part": across,
            "hardly a tangent part": across + 1e-4 * gaussian(*shape, seed=9),
        }
        G = torch.stack(list(cases.values()))
        for method in METHODS:
            A = direction(W.expand_as(G), G, manifold, name, precision, method)
            broken = [case for case, a in zip(cases, A, strict=True) if not torch.isfinite(a).all()]
            assert not broken, (shape, method)
            bound = 1.3 if method == "newton_schulz" else 1.02 if precision in HALF else 1.01
            assert (norms(A) <= bound).all(), (shape, method)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("norm", [1e3, 1e-3, 1e-5, 1e-20, 0.0])
def test_columns_of_any_norm_have_a_direction(norm, name, precision):
    """DGram leaves the norms of columns free, and the solvers divide by them."""
    for shape in ((24, 10), (12, 9), (10, 10)):
        n = shape[1]
        G = gaussian(*shape, seed=5)
        few = torch.where(torch.arange(n) < 2, norm, 1.0)
        for lengths in (torch.full((n,), norm), few):
            A = direction(orthonormal(*shape) * lengths, G, "dgram", name, precision)
            assert torch.isfinite(A).all()
            assert norms(A) <= (1.02 if precision in HALF else 1.01)


@pytest.mark.parametrize("precision", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("manifold", MANIFOLDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_solvers_confine_nan_to_its_matrix(manifold, name, precision, value):
    for shape in ((9, 4), (4, 9), (6, 6)):
        W, G = batch_on_manifold(manifold, 3, shape), gaussian(3, *shape, seed=1)
        clean = direction(W, G, manifold, name, precision)
        for of in (W, G) if manifold in CONSTRAINED else (G,):
            kept = of[1, 2, 3].clone()
            of[1, 2, 3] = value
            A = direction(W, G, manifold, name, precision)
            of[1, 2, 3] = kept
            assert A[1].isnan().all()
            assert torch.equal(A[[0, 2]], clean[[0, 2]])


def test_unknown_choices_are_errors():
    W = gaussian(4, 3)
    for name in DIRECTIONS:
        with pytest.raises(ValueError, match=r"^unknown manifold 'stifel'; known: none, stiefel, [a-z, ]+$"):
            direction(W, W, "stifel", name)
        with pytest.raises(ValueError, match=r"^unknown msign method 'svd'; known: [a-z_, ]+$"):
            direction(W, W, "stiefel", name, method="svd")
        with pytest.raises(ValueError, match=r"^msign needs at least one step, got 0$"):
            direction(W, W, "stiefel", name, msign_steps=0)
    known = "dual_ascent, projected, exact, plain"
    with pytest.raises(ValueError, match=rf"^unknown solver 'newton'; known: {known}$"):
        solve(W, W, "stiefel", solver="newton")
    with pytest.raises(ValueError, match=r"^unknown dual_impl 'fast'; known: published, reduced$"):
        solve(W, W, "stiefel", dual_impl="fast")
    with pytest.raises(ValueError, match=r"^W \(4, 3\) and G \(3, 4\) differ in shape$"):
        solve(W, W.mT, "stiefel")


@pytest.mark.parametrize("steps", [0, -1])
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("dual_ascent", "dual_steps"),
        ("reduced", "dual_steps"),
        ("exact", "exact_steps"),
        ("exact", "cg_steps"),
    ],
)
def test_no_steps_at_all_are_errors(name, option, steps):
    W, G = on_manifold("stiefel", (6, 3)), gaussian(6, 3)
    with pytest.raises(ValueError, match=rf"{steps}"):
        direction(W, G, "stiefel", name, **{option: steps})


# --- many steps ------------------------------------------------------------------------------------


def walk(W, G, manifold, name, precision, *, steps, lr):
    """Steps along a constant momentum, in half precision as the optimizer takes them."""
    dtype, half = PRECISIONS[precision]
    way = "column_norm" if manifold == "dgram" else None
    W, G = W.to(dtype), G.to(dtype)
    for _ in range(steps):
        A = direction(W, G, manifold, name, precision)
        W = retract(W - lr * A, manifold, method=way, radius=1.02 * lr if half else None, dtype=half)
    return W.double()


@pytest.mark.parametrize("name", NAMES)
def test_twenty_small_steps_on_real_momentum_go_as_far_as_in_float64(name):
    """bfloat16 weights, or retractions that round W instead of its correction, would not."""
    W, G, manifold = real(name)
    W = retract(W, manifold, method="column_norm" if manifold == "dgram" else None)
    far, exact = (
        (walk(W, G, manifold, "projected", precision, steps=20, lr=5e-4) - W).norm()
        for precision in ("bfloat16", "float64")
    )
    assert far == pytest.approx(exact.item(), rel=0.05)


@functools.cache
def twenty_steps(shape: tuple[int, int], name: str, precision: str) -> torch.Tensor:
    """Displacement of a random Stiefel matrix."""
    W, G = on_manifold("stiefel", shape), gaussian(*shape, seed=3)
    return walk(W, G, "stiefel", name, precision, steps=20, lr=5e-4) - W


@pytest.mark.parametrize("precision", ["float32", *HALF])
@pytest.mark.parametrize(
    ("shape", "name"),
    # On square matrices the published loop is chaotic, and arrives elsewhere.
    [(shape, name) for shape in ((36, 12), (12, 36)) for name in DIRECTIONS]
    + [((16, 16), name) for name in SCALE_FREE],
    ids=str,
)
def test_twenty_small_steps_go_where_float64_goes(shape, name, precision):
    moved, exact = (twenty_steps(shape, name, p) for p in (precision, "float64"))
    assert moved.norm() == pytest.approx(exact.norm().item(), rel=0.05)
    assert relative(moved, exact) < 0.05


@pytest.mark.parametrize(
    ("shape", "precision"),
    [((48, 24), "float32"), ((48, 24), "bfloat16"), ((24, 24), "bfloat16")],
    ids=str,
)
def test_a_thousand_steps_stay_on_the_manifold(shape, precision):
    half = PRECISIONS[precision][1]
    W = on_manifold("stiefel", shape).float()
    noise = torch.Generator().manual_seed(1)
    momentum, furthest = torch.zeros(shape), 0.0
    for step in range(1000):
        momentum = 0.95 * momentum + torch.randn(shape, generator=noise)
        lr = 0.02 * (1 - step / 1000)
        A = direction(W, momentum, "stiefel", "projected", precision)
        W = retract(W - lr * A, "stiefel", radius=1.02 * lr, dtype=half)
        if step % 50 == 49:
            furthest = max(furthest, float(distance(W.double(), "stiefel")))
    assert furthest <= 5e-4
    still = W
    for _ in range(100):
        still = retract(still - 0.0 * A, "stiefel", radius=0.0, dtype=half)
    assert torch.allclose(still, W, rtol=0, atol=1e-6)
