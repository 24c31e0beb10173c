"""Polar factors: `msign` and what it is made of, against SVDs, and by their invariants."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import (
    FIXTURES,
    HALF,
    PRECISIONS,
    SHAPES,
    SPECTRA,
    gaussian,
    hard_cases,
    norms,
    one_thread,
    orthonormal,
    precisions,
    relative,
    seeds,
    spectrum,
    uniform,
    with_spectrum,
)

from trainers.iterations import default_steps, gram_groups
from trainers.manifold import METHODS, default_dtype, msign
from trainers.manifold.msign import (
    COARSE,
    add_product,
    apply_correction,
    correction_unseen,
    gram,
    gram_error,
    inverse_root,
    msign_and_root,
    polar_near,
    product,
    steps_from,
)

single_threaded = pytest.fixture(scope="module", autouse=True)(one_thread)

CONVERGING = ("polar_express", "gram")
LARGEST = {"float64": 1.01, "float32": 1.01, "bfloat16": 1.02, "float16": 1.02}
"""The documented bound of ‖msign(X)‖₂; of `newton_schulz` it is 1.3."""

matrices = st.builds(
    lambda m, n, seed, exponent: gaussian(m, n, seed=seed) * 10.0**exponent,
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 10_000),
    st.integers(-30, 30),
)


def in_precision(X: torch.Tensor, precision: str, method: str, steps: int | None = None) -> torch.Tensor:
    dtype, half = PRECISIONS[precision]
    return msign(X.to(dtype), dtype=half, method=method, steps=steps)


# --- the polar factor ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", CONVERGING)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_msign_is_the_polar_factor(shape, method):
    X = gaussian(*shape)
    U, _, Vt = torch.linalg.svd(X, full_matrices=False)
    assert torch.allclose(msign(X, steps=16, method=method), U @ Vt, atol=1e-10)


@pytest.mark.parametrize("method", CONVERGING)
def test_msign_reaches_singular_values_a_thousandth_of_the_norm(method):
    X, _ = with_spectrum(torch.logspace(0, -3, 20, dtype=torch.float64), 40)
    assert torch.linalg.svdvals(msign(X, method=method)) == pytest.approx(np.ones(20), abs=1e-6)


@given(
    st.sampled_from(SPECTRA), st.integers(1, 48), st.integers(0, 100), st.floats(0, 3), seeds, st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_gram_is_converged_down_to_a_thousandth_of_the_largest_singular_value(
    kind, n, extra, decades, seed, wide
):
    X, polar = with_spectrum(spectrum(kind, n, decades, seed), n + extra, seed)
    if wide:
        X, polar = X.mT, polar.mT
    for precision in ("float64", "float32"):
        assert norms(in_precision(X, precision, "gram") - polar) < 1e-3


@pytest.mark.parametrize(("precision", "error"), [("bfloat16", 0.1), ("float16", 0.02)])
@pytest.mark.parametrize("method", CONVERGING)
@given(st.sampled_from(SPECTRA), st.integers(1, 48), st.integers(0, 100), st.floats(0, 1), seeds)
@settings(max_examples=25, deadline=None)
def test_half_precision_resolves_a_tenth_of_the_largest_singular_value(
    method, precision, error, kind, n, extra, decades, seed
):
    # Rounding of X alone turns a singular direction by eps * σ_max / σ, whatever the iteration.
    X, polar = with_spectrum(spectrum(kind, n, decades, seed), n + extra, seed)
    assert relative(in_precision(X, precision, method), polar) < error


@pytest.mark.parametrize("method", CONVERGING)
@given(st.sampled_from(SPECTRA), st.integers(1, 24), st.integers(0, 48), st.floats(0, 4), seeds)
@settings(max_examples=20, deadline=None)
def test_more_steps_are_not_worse(method, kind, n, extra, decades, seed):
    X, polar = with_spectrum(spectrum(kind, n, decades, seed), n + extra, seed)
    for precision, noise in (("float64", 1e-12), ("float32", 1e-5)):
        errors = [float(norms(in_precision(X, precision, method, k) - polar)) for k in (7, 8, 10, 14, 30)]
        assert all(after <= before + noise for before, after in itertools.pairwise(errors))


# --- its invariants ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CONVERGING)
@given(matrices)
@settings(max_examples=40, deadline=None)
def test_msign_ignores_scale_and_never_exceeds_one(method, X):
    A = msign(X, steps=16, method=method)
    assert torch.isfinite(A).all()
    assert norms(A) <= 1.01
    assert torch.allclose(A, msign(X * 7.5, steps=16, method=method), atol=1e-6)


@given(precisions, st.sampled_from(METHODS), matrices, st.integers(-20, 20))
@settings(max_examples=60, deadline=None)
def test_a_power_of_two_changes_no_bit(precision, method, X, exponent):
    X = X.to(PRECISIONS[precision][0])
    A = in_precision(X, precision, method)
    assert torch.equal(in_precision(X * 2.0**exponent, precision, method), A)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e-38),
        (torch.float32, 1e-42),
        (torch.bfloat16, 1e-38),
        (torch.float16, 1e-6),
        (torch.float64, 1e-320),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_numbers_of_a_type_have_a_polar_factor(method, dtype, scale):
    A = msign((gaussian(24, 10) * scale).to(dtype), method=method)
    assert torch.isfinite(A).all()
    assert 0.5 < norms(A) < 1.3


@given(
    precisions,
    st.sampled_from(METHODS),
    st.sampled_from(SPECTRA),
    st.integers(1, 48),
    st.floats(1, 4),
    st.floats(0, 4),
    seeds,
)
@settings(max_examples=250, deadline=None)
def test_no_spectrum_exceeds_the_documented_norm(precision, method, kind, n, aspect, decades, seed):
    X, _ = with_spectrum(spectrum(kind, n, decades, seed), int(aspect * n), seed)
    bound = 1.3 if method == "newton_schulz" else LARGEST[precision]
    assert norms(in_precision(X, precision, method)) <= bound


OVERFLOWS = np.load(FIXTURES / "gram_overflow.npz")


@pytest.mark.parametrize("steps", [None, 7, 8, 10, 14])
@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("name", OVERFLOWS.files)
def test_spectra_whose_composed_polynomials_overflowed(name, precision, steps):
    """Above their interval the polynomials grow without bound, and rounding in a composed Gram matrix can
    carry a singular value there. These few of some million random spectra did, with norms of 2 to 1e38:
    in bfloat16 with safety margins of 1.01 to 1.09 instead of 1.10, in float16 with 1.01."""
    X = torch.from_numpy(OVERFLOWS[name])
    A = in_precision(X, precision, "gram", steps)
    assert torch.isfinite(A).all()
    assert norms(A) <= 1.02


@pytest.mark.parametrize("name", OVERFLOWS.files)
def test_the_same_spectra_in_a_matrix_of_a_real_width(name):
    """Few directions in a large matrix: rounding has as little to average over as in a small one."""
    X = torch.from_numpy(OVERFLOWS[name])
    m, n = X.shape
    padded = torch.zeros(768, 256)
    padded[:m, :n] = X
    A = in_precision(padded, "bfloat16", "gram")
    assert torch.isfinite(A).all()
    assert not A[m:].any()
    assert not A[:, n:].any()
    assert norms(A[:m, :n]) <= 1.02


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (7, 1), (1, 7), (1, 1)], ids=str)
def test_hard_cases_have_finite_polar_factors(shape, method, precision):
    cases = hard_cases(shape)
    bound = 1.3 if method == "newton_schulz" else LARGEST[precision]
    for name, X in cases.items():
        A = in_precision(X, precision, method)
        assert torch.isfinite(A).all(), name
        assert norms(A) <= bound, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_msign_of_a_batch_is_the_batch_of_msigns(dtype, method):
    X = gaussian(3, 2, 9, 5).to(dtype)
    single = torch.stack([torch.stack([msign(M, method=method) for M in row]) for row in X])
    assert msign(X, method=method).dtype == dtype
    half = dtype in (torch.bfloat16, torch.float16)
    assert torch.allclose(msign(X, method=method).double(), single.double(), atol=2e-2 if half else 1e-5)


@given(precisions, st.sampled_from(METHODS), seeds, st.integers(1, 8), st.integers(0, 30))
@settings(max_examples=40, deadline=None)
def test_msign_commutes_with_orthogonal_factors_and_transposition(precision, method, seed, n, extra):
    X, _ = with_spectrum(spectrum("geometric", n, 1, seed), n + extra, seed)
    A = in_precision(X, precision, method)
    noise = {"float64": 1e-12, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}[precision]
    P, Q = orthonormal(n + extra, n + extra, seed + 2), orthonormal(n, n, seed + 3)
    assert relative(in_precision(P @ X @ Q, precision, method), P @ A.double() @ Q) < noise
    assert relative(in_precision(X.mT, precision, method), A.mT) < noise


def test_msign_keeps_zero_and_null_directions():
    assert torch.equal(msign(torch.zeros(4, 3)), torch.zeros(4, 3))
    rank_one = torch.outer(gaussian(6), gaussian(4, seed=1))
    for method in CONVERGING:
        sigma = torch.linalg.svdvals(msign(rank_one, method=method))
        assert sigma[0] == pytest.approx(1, abs=1e-9)
        assert sigma[1:].max() < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_msign_iterates_in_the_precision_it_is_told(dtype, method):
    """The result of a half-precision iteration is a half-precision number, whatever X's type."""
    X = gaussian(24, 10).float()
    before = X.clone()
    A = msign(X, dtype=dtype, method=method)
    assert torch.equal(X, before)
    assert A.dtype == torch.float32
    assert torch.equal(A, A.to(dtype).float())
    if method != "newton_schulz":
        U, _, Vt = torch.linalg.svd(gaussian(24, 10), full_matrices=False)
        assert (A - U @ Vt).abs().max() < 0.03


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_msign_confines_nan_to_its_matrix(method, precision, value):
    for shape in ((3, 5, 4), (3, 4, 9), (3, 4, 4)):
        X = gaussian(*shape)
        clean = in_precision(X, precision, method)
        X[1, 0, 0] = value
        A = in_precision(X, precision, method)
        assert A[1].isnan().all()
        assert torch.equal(A[[0, 2]], clean[[0, 2]])


def test_defaults_follow_device_and_method(monkeypatch):
    like = torch.zeros(1)
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert default_dtype(like) == (torch.bfloat16 if native else torch.float32)
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            assert default_dtype(like.to(dtype)) == dtype
    assert default_dtype(like.to("meta")) == torch.float32
    X = gaussian(9, 4)
    for method in METHODS:
        for dtype in (torch.float64, torch.float16):
            steps = default_steps(method, str(dtype).removeprefix("torch."))
            expected = msign(X, steps=steps, dtype=dtype, method=method)
            assert torch.equal(msign(X, dtype=dtype, method=method), expected)


def test_unknown_methods_and_too_few_steps_are_errors():
    X = gaussian(4, 3)
    known = r"^unknown msign method 'polar'; known: polar_express, gram, newton_schulz$"
    with pytest.raises(ValueError, match=known):
        msign(X, method="polar")
    for method in METHODS:
        for steps in (0, -1):
            with pytest.raises(ValueError, match=rf"^msign needs at least one step, got {steps}$"):
                msign(X, steps=steps, method=method)


# --- its parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@given(st.integers(1, 24), st.integers(0, 48), st.floats(0, 1.5), seeds, st.integers(-6, 6))
@settings(max_examples=20, deadline=None)
def test_the_root_that_msign_passes_on_its_way(precision, n, extra, decades, seed, exponent):
    dtype, half = PRECISIONS[precision]
    sigma = spectrum("geometric", n, decades, seed) * 10.0**exponent
    X = with_spectrum(sigma, n + extra, seed)[0].to(dtype)[None]
    A, root = msign_and_root(X, dtype=half)
    assert torch.equal(A, msign(X, dtype=half, method="gram"))
    assert torch.equal(root, root.mT)
    squares, Q = torch.linalg.eigh(X.double().mT @ X.double())
    expected = Q * squares.rsqrt().unsqueeze(-2) @ Q.mT
    assert (
        relative(root, expected)
        < {"float64": 1e-6, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}[precision]
    )


@given(st.sampled_from(SPECTRA), st.integers(1, 24), st.floats(0, 12), seeds)
@settings(max_examples=30, deadline=None)
def test_the_root_of_unconverged_directions_is_too_small_and_not_too_large(kind, n, decades, seed):
    U, V = orthonormal(2 * n, n, seed), orthonormal(n, n, seed + 1)
    sigma = spectrum(kind, n, decades, seed)
    _, root = msign_and_root((U * sigma @ V.mT)[None])
    share = (V.mT @ root[0] @ V).diagonal() * sigma  # 1 where converged
    assert share.max() < 1 + 1e-3
    assert share.min() > -1e-3
    assert share[sigma >= 1e-3].min() > 1 - 1e-3


def test_the_root_of_zero_is_finite():
    A, root = msign_and_root(torch.zeros(2, 5, 3))
    assert torch.equal(A, torch.zeros(2, 5, 3))
    assert torch.isfinite(root).all()


@pytest.mark.parametrize("n", [8, 512, 600, 768])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gram_blocks_are_the_gram_matrix(n, dtype):
    """512 and 768 are multiplied in two and three blocks, 8 and 600 at once."""
    X = gaussian(2, 96, n).to(dtype)
    exact = X.double().mT @ X.double()
    rounding = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    before = X.clone()
    for K in (gram(X), gram(X.mT.contiguous().mT)):
        assert K.dtype == dtype
        assert relative(K, exact) < rounding
        if n in (512, 768):
            size = {512: 256, 768: 192}[n]
            for i in range(0, n, size):
                row, below = slice(i, i + size), slice(i + size, None)
                assert torch.equal(K[:, below, row], K[:, row, below].mT)
        # Within a diagonal block it is the BLAS that decides; MKL's float64 differs in the last bit.
        assert (K - K.mT).abs().max() <= rounding * K.abs().max()
    assert torch.equal(X, before)
    assert torch.equal(gram(X)[1], gram(X[1]))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("wide", [False, True])
def test_products_of_one_matrix_keep_its_layout(batch, wide):
    A, C = gaussian(batch, 12, 5), gaussian(batch, 12, 5, seed=1)
    B = gaussian(batch, 5, 5, seed=2)
    exact, sum_of_both = A @ B, 0.5 * C - 2 * (A @ B)
    if wide:
        A, C = (X.mT.contiguous().mT for X in (A, C))
    for result, expected in (
        (product(A, B), exact),
        (add_product(C, A, B, beta=0.5, alpha=-2), sum_of_both),
    ):
        assert torch.allclose(result, expected, atol=1e-12)
        if batch == 1:
            assert result[0].stride() == A[0].stride()


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 20), st.sampled_from(sorted(PRECISIONS)))
def test_gram_groups_add_up(m, n, steps, precision):
    groups = gram_groups(m, n, steps, precision)
    half = precision in ("float16", "bfloat16")
    assert sum(groups) == steps
    assert set(groups) <= ({1, 2} if half else {1, 2, 3})
    assert groups == gram_groups(n, m, steps, precision)
    if max(m, n) <= 1.5 * min(m, n) or (half and min(m, n) < 256):
        assert set(groups) == {1}


# --- near the manifold ---------------------------------------------------------------------------


def nearby(n: int, extra: int, radius: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with singular values in [1 - radius, 1 + radius], and its polar factor."""
    return with_spectrum(1 + radius * (2 * uniform(n, seed=seed) - 1), n + extra, seed)


@given(st.integers(1, 24), st.integers(0, 24), st.floats(0, 0.5), seeds)
@settings(max_examples=40, deadline=None)
def test_polar_near_is_the_polar_factor_or_nothing(n, extra, radius, seed):
    X, polar = nearby(n, extra, radius, seed)
    A = polar_near(X, radius)
    E = X.mT @ X - torch.eye(n)
    assert (A is None) == bool(min(E.norm(), (E @ E).norm()) >= 1)
    if A is not None:
        assert torch.allclose(A, polar, atol=1e-6)


@pytest.mark.parametrize("radius", [0.0, 1e-4, 0.02, 0.1, 0.2])
def test_polar_near_over_its_range(radius):
    U, V = orthonormal(40, 6), orthonormal(6, 6, seed=1)
    sigma = torch.linspace(1 - radius, 1 + radius, 6, dtype=torch.float64)
    A = polar_near(U * sigma @ V.mT, radius)
    assert A is not None
    assert torch.allclose(A, U @ V.mT, atol=1e-6)


@pytest.mark.parametrize(("dtype", "noise"), [(torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
@given(st.integers(1, 24), st.integers(0, 24), st.floats(0, 0.1), seeds)
@settings(max_examples=30, deadline=None)
def test_half_precision_corrections_are_off_by_a_share_of_the_correction(
    dtype, noise, n, extra, radius, seed
):
    X, polar = nearby(n, extra, radius, seed)
    A = polar_near(X.float(), radius, dtype=dtype)
    assert A is not None
    assert norms(A.double() - polar) < noise * radius + 3e-5  # where half precision stops iterating


@given(st.integers(1, 24), st.integers(0, 24), st.floats(0, 0.5), seeds)
@settings(max_examples=30, deadline=None)
def test_inverse_root_is_one(n, extra, radius, seed):
    sigma = 1 + radius * (2 * uniform(n, seed=seed) - 1)
    Q = orthonormal(n, n, seed)
    E = (Q * (sigma**2 - 1) @ Q.mT)[None]
    root = Q * (1 / sigma - 1) @ Q.mT
    for plan in (None, steps_from(radius)):
        error = (inverse_root(E, plan)[0] - root).norm()
        assert error < 1e-6
    coarse = (inverse_root(E.float(), dtype=torch.bfloat16)[0] - root).norm()
    assert coarse < 1e-2 * root.norm() + 1e-6


@pytest.mark.parametrize("n", [2, 3, 16])
def test_polar_near_of_a_matrix_that_is_off_in_two_columns_alone(n):
    for i, j in itertools.permutations(range(n), 2):
        X = orthonormal(n + 4, n)
        X[:, j] = 0.8 * X[:, j] + 0.6 * X[:, i]
        A = polar_near(X, 0.5)
        assert A is not None
        U, _, Vt = torch.linalg.svd(X, full_matrices=False)
        assert torch.allclose(A, U @ Vt, atol=1e-9)


@pytest.mark.parametrize("i", [0, 5, 15])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [0.01, 0.1, 0.5, 0.9])
def test_the_last_step_is_not_taken_too_early_for_a_sparse_error(i, sign, size):
    for j in set(range(16)) - {i}:
        v = torch.zeros(16, dtype=torch.float64)
        v[i], v[j] = 0.5**0.5, sign * 0.5**0.5
        E = size * torch.outer(v, v)[None]
        Y = torch.eye(16, dtype=torch.float64) + inverse_root(E)
        assert (Y @ (torch.eye(16) + E) @ Y - torch.eye(16)).norm() < 1e-12


@pytest.mark.parametrize("radius", [0.001, 0.0204, 0.025, 0.05, 0.2])
@pytest.mark.parametrize("lone", [0.3, 1.1, 1.2, 1.5, 1.6, 2.0, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_copes_without_looking_gets_nearer_with_each_call(radius, lone, dtype):
    """The way of a GPU, where nothing is read, with one singular value that is not where it was said to."""
    sigma = torch.ones(32, dtype=torch.float64)
    sigma[7] = lone
    X = (orthonormal(48, 32) * sigma @ orthonormal(32, 32, seed=1).mT).float()[None]
    off = [abs(lone - 1)]
    for _ in range(8 if lone <= 3 else 32):
        D, scale, used = correction_unseen(gram_error(X), radius, dtype if radius <= COARSE else None)
        X = apply_correction(X * scale, D, used)
        off.append(float((torch.linalg.svdvals(X.double()) - 1).abs().amax()))
        assert off[-1] < off[-2] + 1e-5
    assert off[-1] < 1e-5


def test_an_empty_batch_is_no_error():
    empty = torch.zeros(0, 4, 3)
    assert product(empty, torch.zeros(0, 3, 3)).shape == (0, 4, 3)
    assert add_product(empty, empty, torch.zeros(0, 3, 3)).shape == (0, 4, 3)
    assert product(torch.ones(1, 4, 3), torch.ones(2, 3, 3)).shape == (2, 4, 3)


def test_polar_near_takes_no_more_steps_than_it_needs():
    plans = {0.0: (0, 3), 1e-4: (0, 3), 0.02: (0, 5), 0.1: (1, 3), 0.2: (1, 5), 0.3: (2, 3), 0.5: (4, 3)}
    assert {radius: steps_from(radius) for radius in plans} == plans
    for radius in (0.6, torch.nan):
        with pytest.raises(ValueError, match=r"above 0\.5"):
            steps_from(radius)
