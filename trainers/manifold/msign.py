"""The matrix sign `msign(X) = U Vᵀ` of the compact SVD `X = U S Vᵀ`: the polar factor of X.

Everything here is matrix products: half precision and batches are welcome, factorisations are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from trainers.iterations import default_steps, gram_groups

Method = Literal["polar_express", "gram", "newton_schulz"]
METHODS: tuple[Method, ...] = ("polar_express", "gram", "newton_schulz")
Triple = tuple[float, float, float]

# Polar Express, degree 5 (Amsel et al., arXiv 2505.16932, Algorithm 1): optimal for singular
# values in [1e-3, 1]; the last triple is the limit and repeats.
_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01
"""The paper's margin for rounding, on all triples but the last and on the norm."""

_GRAM_SAFETY = {torch.bfloat16: 1.10, torch.float16: 1.02}
"""`gram` in half precision takes more, because a polynomial rises steeply above its interval. Measured on 4
to 28 million random spectra of width 2 to 48, composed in twos: bfloat16 overflows 426 times at 1.07, 8
at 1.09, never from 1.10 up; float16 1,728 times at 1.01, never at 1.02. (Such widths are not composed
any more; a wide matrix of few directions is much like them.)"""

_MUON: Triple = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's Newton-Schulz triple, as in `torch.optim.Muon`. It is steep at 0 and has no fixed
point at 1: most singular values land in .7 to 1.2, small ones of square matrices below."""

HALF = (torch.float16, torch.bfloat16)


def default_dtype(like: Tensor) -> torch.dtype:
    """Arithmetic of `msign` where none is named: half precision where the device has matrix units for
    it and X is float32, else X's own. float16 on CUDA (eight times as accurate as bfloat16 at its
    price), bfloat16 on a CPU that multiplies it natively (float16 is a hundred times slower there).
    """
    if like.dtype != torch.float32:
        return like.dtype
    if like.device.type == "cuda":
        return torch.float16
    if like.device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def msign(
    X: Tensor,  # (..., m, n)
    *,
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    method: str = "polar_express",
) -> Tensor:  # (..., m, n), in X's dtype
    """Polar factor of X. Its scale does not matter.

    Args:
        X: one matrix or a batch, tall or wide.
        steps: iterations; None is `trainers.iterations.default_steps`.
        dtype: arithmetic of the iteration; None keeps X's.
        method: `polar_express` is the published iteration, on X itself (arXiv 2505.16932).
            `gram` is the same polynomials, two or three at a time on XᵀX before X is touched again:
            half the arithmetic for a tall X, and fewer steps, because the scale comes from
            ‖(XᵀX)²‖ instead of ‖X‖. `newton_schulz` is Muon's own, cheaper and never converged.

    σ_max <= 1.01 in float32 and 1.02 in half precision (`newton_schulz`: 1.3). A zero matrix stays zero.
    Other null directions hold rounding, which every step amplifies, some thousandfold at the default
    number: in half precision they come out of any size up to 1. NaN or Inf in X gives NaN in that
    matrix of the batch and no other.

    Raises:
        ValueError: unknown method, or fewer than one step.
    """
    if method not in METHODS:
        raise ValueError(f"unknown msign method {method!r}; known: {', '.join(METHODS)}")
    dtype = dtype or X.dtype
    steps = default_steps(method, _name(dtype)) if steps is None else steps
    if steps < 1:
        raise ValueError(f"msign needs at least one step, got {steps}")
    wide = X.size(-2) < X.size(-1)
    tall = (X.mT if wide else X).reshape(-1, max(X.shape[-2:]), min(X.shape[-2:]))
    if method == "gram":
        Y, _ = _gram_iterate(tall, steps, dtype)
    else:
        muon = method == "newton_schulz"
        unit, _ = _unit_norm(tall, 1.0 if muon else 1 / _SAFETY)
        Y = _iterate(unit.to(dtype), [_MUON] * steps if muon else polar_express_coefficients(steps))
    Y = Y.to(X.dtype).reshape(X.mT.shape if wide else X.shape)
    return Y.mT if wide else Y


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def msign_and_root(
    X: Tensor,  # (B, m, n), m >= n
    *,
    steps: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # (B, m, n), (B, n, n)
    """`msign(X, method="gram")` and `(XᵀX)^(-1/2)`, which that iteration passes on its way.

    Directions of X with singular values below what `steps` converge get less than their share of the
    root, never more: it is bounded also where X loses rank.
    """
    dtype = dtype or X.dtype
    steps = default_steps("gram", _name(dtype)) if steps is None else steps
    if steps < 1:
        raise ValueError(f"msign needs at least one step, got {steps}")
    Y, root = _gram_iterate(X, steps, dtype, root=True)
    assert root is not None
    return Y.to(X.dtype), root.to(X.dtype)


def polar_express_coefficients(steps: int, safety: float = _SAFETY) -> list[Triple]:
    """`steps` triples (a, b, c) of `p(x) = a x + b x³ + c x⁵`, safety margin included."""
    safe = [(a / safety, b / safety**3, c / safety**5) for a, b, c in _POLAR_EXPRESS[:-1]]
    return (safe + [_POLAR_EXPRESS[-1]] * steps)[:steps]


def gram(
    X: Tensor,  # (..., m, n)
) -> Tensor:  # (..., n, n)
    """XᵀX. On a CPU a large one is computed in column blocks, whose part above the diagonal is mirrored
    (five eighths of the arithmetic for n = 768), and one matrix at a time, which there costs nothing."""
    n = X.size(-1)
    blocks = next((k for k in (4, 3, 2) if n % k == 0 and n >= 192 * k), 1)
    if X.device.type != "cpu" or blocks == 1:
        return X.mT @ X
    R = X.new_empty(*X.shape[:-2], n, n)
    for x, r in zip(X.reshape(-1, *X.shape[-2:]), R.view(-1, n, n), strict=True):
        for k in range(blocks):
            i, j = k * n // blocks, (k + 1) * n // blocks
            r[i:, i:j] = x[:, i:].mT @ x[:, i:j]
            r[i:j, j:] = r[j:, i:j].mT
    return R


def product(A: Tensor, B: Tensor, dtype: torch.dtype | None = None) -> Tensor:  # (B, m, k), (B, k, n)
    """A B, multiplied in `dtype`, which is also the result's; None is A's. One tall matrix that lies in
    memory as its transpose stays so."""
    A, B = A.to(dtype or A.dtype), B.to(dtype or B.dtype)
    if not (A.ndim == 3 and A.size(0) == B.size(0) == 1):
        return A @ B
    a, b = A[0], B[0]  # bmm would copy a transposed operand first
    return ((b.mT @ a.mT).mT if _lies_wide(a) else a @ b).unsqueeze(0)


def add_product(
    C: Tensor,  # (B, m, n)
    A: Tensor,  # (B, m, k)
    B: Tensor,  # (B, k, n)
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> Tensor:  # (B, m, n)
    """`beta C + alpha A B`, of one dtype, where C and A lie alike in memory, and so does the result."""
    if not (A.size(0) == B.size(0) == 1 and _lies_wide(A[0])):
        return torch.baddbmm(C, A, B, beta=beta, alpha=alpha)
    return torch.addmm(C[0].mT, B[0].mT, A[0].mT, beta=beta, alpha=alpha).mT.unsqueeze(0)


def _lies_wide(a: Tensor) -> bool:
    """Whether a tall matrix is the transpose of what is in memory."""
    return a.size(0) > a.size(1) and a.mT.is_contiguous()


def column_dots(A: Tensor, B: Tensor) -> Tensor:  # (..., m, n) twice -> (..., 1, n)
    """Dot product of every column of A with the same one of B. On a CPU by blocks of rows: a temporary of
    their size is memory fresh from the system, which costs more than the arithmetic."""
    if A.device.type != "cpu":
        return (A * B).sum(dim=-2, keepdim=True)
    blocks = zip(torch.split(A, 256, dim=-2), torch.split(B, 256, dim=-2), strict=True)
    return torch.stack([(a * b).sum(dim=-2, keepdim=True) for a, b in blocks]).sum(dim=0)


def largest_entry(X: Tensor) -> Tensor:  # (..., m, n) -> (..., 1, 1)
    """max |x_ij|; NaN if there is one."""
    return torch.maximum(X.amax(dim=(-2, -1), keepdim=True), -X.amin(dim=(-2, -1), keepdim=True))


def nonzero(x: Tensor) -> Tensor:
    """x as a divisor: its zeros replaced by 1."""
    return x.masked_fill(x == 0, 1.0)


def _size(X: Tensor) -> Tensor:  # (B, m, n) -> (B, 1, 1)
    """Frobenius norm, summed in float32 at least."""
    norm: Tensor = X.norm(dim=(-2, -1), keepdim=True, dtype=torch.float32 if X.dtype in HALF else None)
    return norm


def _unit_norm(X: Tensor, norm: float) -> tuple[Tensor, Tensor]:
    """X in float32 at least, scaled to a Frobenius norm, and the factor (B, 1, 1); zero stays zero.

    By the largest entry first: the square of a float32 number need not be one.
    """
    X = X.float() if X.dtype in HALF else X
    largest = nonzero(largest_entry(X))
    Y = X / largest
    factor = norm / nonzero(_size(Y))
    return Y.mul_(factor), factor / largest


def _iterate(Y: Tensor, coefficients: Sequence[Triple]) -> Tensor:
    """`Y <- a Y + b Y K + c Y K²` with K = YᵀY, for each triple; Y (B, m, n), tall."""
    for a, b, c in coefficients:
        R = gram(Y)
        Y = add_product(Y, Y, torch.baddbmm(R, R, R, beta=b, alpha=c), beta=a)
    return Y


def _gram_iterate(
    X: Tensor,  # (B, m, n), m >= n
    steps: int,
    dtype: torch.dtype,
    *,
    root: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Polar Express on K = YᵀY in groups: with p(x) = x z(x²), Z = z(K), the next K is Z K Z, and
    after a group Y becomes Y Z₁ … Z_g. (The composition restarts from Y because rounding makes the
    carried K drift from YᵀY.)"""
    m, n = X.shape[-2:]
    # The true scale follows from K². Until then any will do that keeps K and K² within range: in float16
    # σ_max <= n^(1/4).
    if dtype == torch.float16:
        Y, factor = _unit_norm(X, n**0.25)
    else:
        largest = nonzero(largest_entry(X))
        Y, factor = X / largest, 1 / largest
    Y = Y.to(dtype)
    groups = gram_groups(m, n, steps, _name(dtype))
    safety = _GRAM_SAFETY.get(dtype, _SAFETY) if max(groups) > 1 else _SAFETY
    triples = iter(polar_express_coefficients(steps, safety))
    total: Tensor | None = None
    first = True
    for size in groups:
        K = gram(Y)
        group: Tensor | None = None
        for j in range(size):
            a, b, c = next(triples)
            if first:
                Z, first = _scaled_step(K, a, b, c), False
            else:
                Z = torch.baddbmm(K, K, K, beta=b, alpha=c)
                Z.diagonal(dim1=-2, dim2=-1).add_(a)
            group = Z if group is None else group @ Z
            if j < size - 1:
                K = Z @ (K @ Z)
        assert group is not None
        Y = product(Y, group)
        if root:
            total = group if total is None else total @ group
    if total is not None:
        total = total.to(X.dtype)
        total = (total + total.mT) * (0.5 * factor)
    return Y, total


def _scaled_step(K: Tensor, a: float, b: float, c: float) -> Tensor:
    """z(K / s) / √s for an s >= ‖K‖₂: ‖K²‖_F^(1/2) is above it by n^(1/4) at most, where the trace,
    the square of the Frobenius norm of Y, may be above it by n."""
    square = gram(K)
    t = nonzero(_size(square)).pow(-0.25) / _SAFETY  # 1 / σ_max of Y, or less
    Z = K.to(t.dtype) * (b * t**3) + square.to(t.dtype) * (c * t**5)  # float32 at least, as _size is
    Z.diagonal(dim1=-2, dim2=-1).add_(a * t.squeeze(-1))
    return Z.to(K.dtype)


# --- near the manifold ---------------------------------------------------------------------------

NEAR = 0.5
"""Largest radius around the manifold within which Newton-Schulz is the way back."""

CONVERGED = 1e-7
"""Distance of singular values from 1 at which the iterations near the manifold stop. Half precision,
whose noise is larger, stops at 3e-5; what is left is measured, and corrected, in the next step."""

COARSE = 0.025
"""Largest radius at which corrections may be in half precision: their noise is some percent of them,
which at width 768 and radius .02 leaves ‖WᵀW - I‖_F at 3e-4, and at .05 at 1.2e-3."""

_REACH = {3: 1.3, 5: 1.15}
"""‖E‖ up to which Newton-Schulz on I + E converges, by the order of its last step (with one of third order it
diverges from 1.34 up, with one of fifth from 1.23)."""


def polar_near(
    X: Tensor,  # (..., m, n), m >= n
    radius: float,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor | None:  # (..., m, n)
    """Polar factor of an X whose singular values are thought to be in [1 - radius, 1 + radius].

    Newton-Schulz in delta form: with E = XᵀX - I, `X + X D(E)`, where D is a polynomial that is
    iterated on E alone. One product of X with itself and one with D, whatever the number of steps,
    and an X that is there already is left alone to rounding, however coarse `dtype` is.

    On a CPU the truth about E is read: None is returned if X is too far away. On a GPU nothing is
    read, and a batch that is too far is scaled into reach, and gets nearer with each call.

    Args:
        radius: NEAR at most. On a GPU it sets the number of steps.
        dtype: arithmetic of all but E, which is computed in X's; None is X's. Half precision is not
            used beyond COARSE.
    """
    shape = X.shape
    X = X.reshape(-1, *shape[-2:])
    found = correction_near(gram_error(X), radius, dtype=dtype)
    if found is None:
        return None
    D, scale, dtype = found
    return apply_correction(X if scale is None else X * scale, D, dtype).reshape(shape)


def correction_near(
    E: Tensor,  # (B, n, n)
    radius: float,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, torch.dtype | None] | None:
    """The arithmetic of `polar_near` on E = XᵀX - I alone: (D, s, precision of X D) so that the polar factor
    is s (X + X D), s (B, 1, 1) or None for 1; or None where X is too far away."""
    if radius > COARSE:
        dtype = None
    if E.device.type != "cpu":
        return correction_unseen(E, radius, dtype)
    largest = float(E.norm(dim=(-2, -1)).amax())
    # ‖E‖₂ <= ‖E²‖_F^(1/2), which grows with n^(1/4) where ‖E‖_F grows with n^(1/2).
    if not (largest < 1 or float(_size(product(E, E)).amax()) < 1):
        return None
    if largest > 2 * COARSE * E.size(-1) ** 0.5:
        dtype = None
    return inverse_root(E, None, dtype), None, dtype


def correction_unseen(
    E: Tensor, radius: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, torch.dtype | None]:
    """`correction_near` that reads nothing from the device, and always returns something."""
    plan = steps_from(radius, 3e-5 if dtype in HALF else CONVERGED)
    size = E.norm(dim=(-2, -1), keepdim=True)
    scale = ((1 + size) / (1 + _REACH[plan[1]])).clamp_min(1.0)
    E = E / scale
    E.diagonal(dim1=-2, dim2=-1).add_((1 / scale - 1).squeeze(-1))
    return inverse_root(E, plan, dtype), scale.rsqrt(), dtype


def gram_error(X: Tensor) -> Tensor:  # (B, m, n) -> (B, n, n)
    """E = XᵀX - I."""
    E = gram(X)
    E.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return E


def inverse_root(
    E: Tensor,  # (B, n, n), symmetric
    plan: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # (B, n, n)
    """D with `I + D ≈ (I + E)^(-1/2)`, by Newton-Schulz steps (15/8, -10/8, 3/8) and a last one of third or
    fifth order.

    Each takes `Z = I - E/2 + 3/8 E²`, and leaves `E' = 5/8 E³ - 15/64 E⁴ + 9/64 E⁵`. A last one of fifth
    order adds `-5/16 E³ + 35/128 E⁴`, one product where two more steps take four or more, and leaves
    63/128 E⁵. `plan` is that of `steps_from`; without one (on a CPU, where reading a number costs nothing)
    the steps end when what is left would be rounding.
    """
    dtype = dtype or E.dtype
    D: Tensor | None = None
    steps, last = plan or (_MOST_STEPS, 3)
    for k in range(steps + 1):
        F = E.to(dtype)
        square = product(F, F)
        order = last if k == steps else None if plan else _last_order(F, square)
        Z = torch.add(0.375 * square, E, alpha=-0.5)
        if order == 5:
            Z = Z + product(square, (35 / 128) * square - (5 / 16) * F)
        D = Z if D is None else D + Z + product(D, Z, dtype)
        if order:
            break
        E = product(square, torch.baddbmm(0.625 * F - (15 / 64) * square, F, square, alpha=9 / 64)).to(
            E.dtype
        )
    assert D is not None
    return D


_MOST_STEPS = 5
_ROUNDING = {torch.float16: 1e-5, torch.bfloat16: 1e-5, torch.float32: 1e-8, torch.float64: 1e-15}
"""E' per column that is no more than rounding, in the correction of a matrix of order 1."""


def _last_order(F: Tensor, square: Tensor) -> int | None:
    """Order of a step after which E' is below what the precision resolves; None if neither third nor fifth
    will do. Judged by the leading terms, 5/8 E³ and 63/128 E⁵, of which random vectors tell the Frobenius
    norm."""
    n = F.size(-1)
    rounding = _ROUNDING[F.dtype] * (n * _PROBES) ** 0.5
    some = square @ (F @ _probes(n).to(F.dtype))
    if 5 / 8 * float(_size(some).amax()) < rounding:
        return 3
    return 5 if 63 / 128 * float(_size(square @ some).amax()) < rounding else None


_PROBES = 8


@lru_cache(maxsize=16)
def _probes(n: int) -> Tensor:  # (n, 8)
    """Gaussian: random signs would be blind to differences of two columns."""
    return torch.randn(n, _PROBES, generator=torch.Generator().manual_seed(0))


def apply_correction(X: Tensor, D: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """X + X D."""
    return product(X, D, dtype).to(X.dtype).add_(X)  # of one type: mixed ones are slow


def steps_from(radius: float, tolerance: float = CONVERGED) -> tuple[int, int]:
    """The cheapest plan of `inverse_root` that brings 1 - radius and 1 + radius within a tolerance of 1: the
    number of steps before the last, and the order of the last.

    Raises ValueError beyond NEAR.
    """
    if not radius <= NEAR:
        raise ValueError(f"radius {radius} is above {NEAR}")
    ends = 1 - radius, 1 + radius
    for steps in count():
        for order in (3, 5):
            if max(abs(_stepped(x, order) - 1) for x in ends) < tolerance:
                return steps, order
        ends = _stepped(ends[0], 3), _stepped(ends[1], 3)
    raise AssertionError  # for the type checker: count() does not end


def _stepped(x: float, order: int) -> float:
    """A singular value after a step of `inverse_root`: x times the series of `(1 + e)^(-1/2)`, e = x² - 1."""
    e = x * x - 1
    series = (1.0, -1 / 2, 3 / 8, -5 / 16, 35 / 128)
    return x * sum(term * e**k for k, term in enumerate(series[:order]))
