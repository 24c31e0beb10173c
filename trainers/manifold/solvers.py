"""Directions of Manifold Muon: maximise ⟨G, A⟩ over ‖A‖₂ <= 1 and A tangent at W.

The step is `W <- retract(W - lr A)` (paper 2606.13276, Appendix A). The solvers are named choices
with different results, not speeds of one: the published dual ascent does not converge on real
gradients, and its direction is less tangent than that of plain Muon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from trainers.iterations import default_rounds, reduces
from trainers.manifold.manifolds import (
    constrained_part,
    frame,
    gram_differential,
    tangent_project,
    tangent_weights,
)
from trainers.manifold.msign import gram, msign, msign_and_root, nonzero, product

Solver = Literal["dual_ascent", "projected", "exact", "plain"]
SOLVERS: tuple[Solver, ...] = ("dual_ascent", "projected", "exact", "plain")
DUAL_IMPLS = ("published", "reduced")
Sign = Callable[[Tensor], Tensor]


def solve(
    W: Tensor,  # (..., m, n), on the manifold
    G: Tensor,  # (..., m, n), Nesterov momentum direction
    manifold: str,
    *,
    solver: str = "projected",
    dual_steps: int = 20,
    dual_alpha: float = 0.1,
    dual_impl: str = "published",
    polish: bool = False,
    exact_steps: int | None = None,
    cg_steps: int = 16,
    msign_steps: int | None = None,
    msign_dtype: torch.dtype | None = None,
    msign_method: str = "polar_express",
) -> Tensor:  # (..., m, n)
    """Direction A of the step `-lr A`; inputs are left as they are.

    Args:
        manifold: `none` and `spectral` give plain Muon, `msign(G)`, whatever the solver.
        solver: `dual_ascent` (as published; uses `dual_steps`, `dual_alpha`, and depends on the
            scale of G), `projected` (one `msign` of the tangent part of G; `polish` adds one
            re-tangent and one Newton-Schulz step; scale-free), `exact` (towards the optimum, by
            `exact_steps` rounds of majorise-minimise with `cg_steps` conjugate gradients each;
            scale-free), or `plain` (Muon's `msign(G)`, not tangent at all: the retraction alone keeps W).
            For a square Stiefel W `projected` and `exact` take the optimum's closed form.
        dual_impl: `published` multiplies as the paper does; `reduced` runs the same loop on the
            coordinates of G + 2WΛ in the columns of W and the rest of G, 2n x n instead of m x n.
        exact_steps: None is `trainers.iterations.default_rounds`.
        msign_steps, msign_dtype, msign_method: see `msign`; with an `msign_dtype` the products around
            it are in that precision too, except in `dual_ascent` as published.

    Raises:
        ValueError: unknown manifold, solver, `dual_impl` or method, or W and G of different shapes.
    """
    if W.shape != G.shape:
        raise ValueError(f"W {tuple(W.shape)} and G {tuple(G.shape)} differ in shape")
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    if dual_impl not in DUAL_IMPLS:
        raise ValueError(f"unknown dual_impl {dual_impl!r}; known: {', '.join(DUAL_IMPLS)}")
    for name, count in (("dual_steps", dual_steps), ("exact_steps", exact_steps), ("cg_steps", cg_steps)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")

    def sign(X: Tensor) -> Tensor:
        return msign(X, steps=msign_steps, dtype=msign_dtype, method=msign_method)

    if solver == "plain" or manifold in ("none", "spectral"):
        return sign(G)
    wide = G.size(-2) < G.size(-1)
    shape = G.mT.shape if wide else G.shape
    W, G = ((X.mT if wide else X).reshape(-1, *shape[-2:]) for X in (W, G))
    if solver == "dual_ascent":
        if dual_impl == "reduced" and reduces(W.size(-2), W.size(-1), manifold):
            A = _reduced_dual_ascent(W, G, manifold, sign, dual_steps, dual_alpha)
        else:
            A = _dual_ascent(W, G, manifold, sign, dual_steps, dual_alpha)
    else:
        if msign_dtype == torch.float16:
            G = _scaled(G)
        if manifold == "stiefel" and W.size(-2) == W.size(-1):
            A = _square_stiefel(W, G, sign, msign_dtype)
        elif solver == "projected":
            A = _projected(W, G, manifold, sign, polish, msign_dtype)
        else:
            rounds = default_rounds(manifold) if exact_steps is None else exact_steps
            root_steps = msign_steps if msign_method == "gram" else None
            A = _exact(W, _scaled(G), manifold, sign, rounds, cg_steps, root_steps, msign_dtype)
    A = A.reshape(shape)
    return A.mT if wide else A


def _scaled(G: Tensor) -> Tensor:
    """G with its largest entry 1, so that products stay within float16's range, and their squares within
    float32's."""
    largest = G.abs().amax(dim=(-2, -1), keepdim=True)
    return G / nonzero(largest)


def _dual_ascent(W: Tensor, G: Tensor, manifold: str, sign: Sign, steps: int, alpha: float) -> Tensor:
    """The published loop: raw scale of G, absolute alpha annealed linearly to 0."""
    multiplier = -0.25 * constrained_part(gram_differential(W, G), manifold)
    A = G
    for k in range(steps):
        symmetric = 0.5 * (multiplier + multiplier.mT)
        A = sign(G + 2 * (W @ constrained_part(symmetric, manifold)))
        violation = constrained_part(gram_differential(W, A), manifold)
        multiplier = multiplier - alpha * (1 - k / steps) * violation
    return A


def _reduced_dual_ascent(
    W: Tensor,  # (B, m, n), columns orthogonal
    G: Tensor,  # (B, m, n)
    manifold: str,
    sign: Sign,
    steps: int,
    alpha: float,
) -> Tensor:  # (B, m, n)
    """The same loop where it takes place. With W = Q D and G = Q K + (rest, with Gram matrix RᵀR), the
    polar factor of G + 2WΛ is an isometry times that of S = [K + 2DΛ; R], and QᵀA is the upper half
    of the latter. So 2n rows instead of m, and no product with W inside the loop. A square W has no
    rest. See `reduces`."""
    m, n = W.shape[-2:]
    norms = W.norm(dim=-2)
    D = norms.unsqueeze(-1)
    K, R = _coordinates(W, G, norms)
    multiplier = -0.25 * constrained_part(_symmetric(D * K), manifold)
    for k in range(steps - 1):
        top = K + 2 * D * multiplier
        top = sign(top if m == n else torch.cat([top, R], dim=-2))[..., :n, :]
        violation = constrained_part(_symmetric(D * top), manifold)
        multiplier = multiplier - alpha * (1 - k / steps) * violation
    return sign(G + 2 * (W @ multiplier))  # on the scale of G, which half precision need not hold


def _coordinates(W: Tensor, G: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """`K = QᵀG` and the upper triangular R with `RᵀR = (G - QK)ᵀ(G - QK)`, Q the unit columns of W.

    In float64: singular values of real momentum span three decades, and the Gram matrix squares them.
    A G within the span of W, or without full rank, gets R from a Gram matrix raised by 1e-12 of its size.
    """
    Q = (W / nonzero(norms).unsqueeze(-2)).double()
    K = Q.mT @ G.double()
    C = gram(G.double() - Q @ K)
    ridge = 1e-12 * G.double().square().sum(dim=(-2, -1)) / G.size(-1)
    C.diagonal(dim1=-2, dim2=-1).add_(ridge.unsqueeze(-1))
    L, info = torch.linalg.cholesky_ex(C)  # fails for G = 0 alone, or NaN
    L = torch.where((info == 0)[..., None, None], L, C)
    return K.to(G.dtype), L.mT.to(G.dtype)


def _symmetric(M: Tensor) -> Tensor:
    return M + M.mT


def _projected(
    W: Tensor, G: Tensor, manifold: str, sign: Sign, polish: bool, dtype: torch.dtype | None
) -> Tensor:
    A = sign(tangent_project(W, G.to(dtype or G.dtype), manifold, dtype=dtype)).to(G.dtype)
    if polish:
        T = tangent_project(W, A, manifold, dtype=dtype)
        A = 1.5 * T - 0.5 * product(T, product(T.mT, T, dtype), dtype)
    return A


def _square_stiefel(W: Tensor, G: Tensor, sign: Sign, dtype: torch.dtype | None) -> Tensor:
    """The exact optimum on the orthogonal group, `W msign(skew(WᵀG))`."""
    M = product(W.mT, G, dtype).to(G.dtype)
    X = sign(M - M.mT)
    return product(W, 0.5 * (X - X.mT), dtype).to(G.dtype)  # rounding leaves X a little less than skew


def _exact(
    W: Tensor,
    G: Tensor,
    manifold: str,
    sign: Sign,
    rounds: int,
    cg_steps: int,
    root_steps: int | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """Majorise-minimise on the dual, `min over Λ of ‖M‖_*` with `M = G + 2 W P(Λ)`.

    At M with polar factor A and `Z = (MᵀM)^(-1/2)`, the nuclear norm lies below the quadratic
    `tr(MᵀM Z) / 2 + const` and touches it, whose minimum solves
    `P(2 (WᵀW Δ Z + Z Δ WᵀW)) = P(WᵀA + AᵀW)`, `Λ <- Λ - Δ`. Scale-free, and no step size.
    Λ starts where `projected` is, so that it is the zeroth round. With W = Q D every product has factors
    of order 1: QᵀA, DΛ, and (DΔ) Z.
    """
    Q, lengths = frame(W, manifold)
    D = lengths.unsqueeze(-1)
    weights = constrained_part(tangent_weights(lengths), manifold)
    cross = gram(Q) if manifold == "oblique" else None  # of the others it is I

    def differential(A: Tensor) -> Tensor:
        return constrained_part(_symmetric(D * product(Q.mT, A, dtype).to(A.dtype)), manifold)

    multiplier = -0.5 * weights * differential(G)
    for _ in range(rounds):
        A, Z = msign_and_root(G + 2 * product(Q, D * multiplier, dtype), steps=root_steps, dtype=dtype)
        size = Z.abs().amax(dim=(-2, -1), keepdim=True)  # beyond float16 where M is all but zero
        Z = (Z / nonzero(size)).to(dtype or Z.dtype)

        def curvature(step: Tensor, Z: Tensor = Z, size: Tensor = size) -> Tensor:
            X = size * product(D * step, Z, Z.dtype)
            return constrained_part(2 * _symmetric(D * (X if cross is None else cross @ X)), manifold)

        step = _conjugate_gradients(curvature, differential(A), weights, cg_steps)
        multiplier = multiplier - _OVERSTEP * step
    return sign(G + 2 * product(Q, D * multiplier, dtype))


_OVERSTEP = 1.15
"""The quadratic is an upper bound, so its minimum falls short; measured on real momentum, 1 to 1.3."""


def _conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    H: Tensor,  # (B, n, n)
    preconditioner: Tensor,  # (B, n, n), elementwise
    steps: int,
) -> Tensor:  # (B, n, n)
    """`steps` iterations from 0 towards `operator(X) = H`; a matrix whose residual is 0 stays put."""
    X = torch.zeros_like(H)
    residual = H
    conditioned = preconditioner * residual
    direction = conditioned
    size = _dot(residual, conditioned)
    for _ in range(steps):
        image = operator(direction)
        length = _ratio(size, _dot(direction, image))
        X = torch.addcmul(X, length, direction)
        residual = torch.addcmul(residual, length, image, value=-1)
        conditioned = preconditioner * residual
        before, size = size, _dot(residual, conditioned)
        direction = torch.addcmul(conditioned, _ratio(size, before), direction)
    return X


def _dot(A: Tensor, B: Tensor) -> Tensor:  # (B, n, n) twice -> (B, 1, 1)
    return (A * B).sum(dim=(-2, -1), keepdim=True)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is not positive: rounding has taken over there."""
    return torch.where(b > 0, a / b, 0.0)
