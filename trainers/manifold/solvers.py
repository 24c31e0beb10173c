"""Directions of Manifold Muon: maximise ⟨G, A⟩ over ‖A‖₂ <= 1 and A tangent at W.

The step is `W <- retract(W - lr A)` (paper 2606.13276, Appendix A). The two solvers are named
choices with different results, not two speeds of one: the published dual ascent does not converge
on real gradients, and its direction is less tangent than that of plain Muon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from trainers.manifold.manifolds import constrained_part, gram_differential, tangent_project
from trainers.manifold.msign import POLAR_EXPRESS_STEPS, msign

Solver = Literal["dual_ascent", "projected"]
SOLVERS: tuple[Solver, ...] = ("dual_ascent", "projected")
Sign = Callable[[Tensor], Tensor]


def solve(
    W: Tensor,  # (..., m, n), on the manifold
    G: Tensor,  # (..., m, n), Nesterov momentum direction
    manifold: str,
    *,
    solver: str = "projected",
    dual_steps: int = 20,
    dual_alpha: float = 0.1,
    polish: bool = False,
    msign_steps: int = POLAR_EXPRESS_STEPS,
    msign_dtype: torch.dtype | None = None,
) -> Tensor:  # (..., m, n)
    """Direction A of the step `-lr A`; inputs are left as they are.

    Args:
        manifold: `none` gives plain Muon, `msign(G)`, whatever the solver.
        solver: `dual_ascent` (as published; uses `dual_steps`, `dual_alpha`, and depends on the
            scale of G) or `projected` (one `msign` of the tangent part of G; `polish` adds one
            re-tangent and one Newton-Schulz step; scale-free).
        msign_steps, msign_dtype: see `msign`; `msign_dtype` None keeps G's dtype.

    Raises:
        ValueError: unknown manifold or solver, or W and G of different shapes.
    """
    if W.shape != G.shape:
        raise ValueError(f"W {tuple(W.shape)} and G {tuple(G.shape)} differ in shape")
    wide = G.size(-2) < G.size(-1)
    if wide:
        W, G = W.mT, G.mT

    def sign(X: Tensor) -> Tensor:
        return msign(X, steps=msign_steps, dtype=msign_dtype)

    if manifold == "none":
        A = sign(G)
    elif solver == "dual_ascent":
        A = _dual_ascent(W, G, manifold, sign, dual_steps, dual_alpha)
    elif solver == "projected":
        A = _projected(W, G, manifold, sign, polish)
    else:
        raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    return A.mT if wide else A


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


def _projected(W: Tensor, G: Tensor, manifold: str, sign: Sign, polish: bool) -> Tensor:
    if manifold == "stiefel" and W.size(-2) == W.size(-1):
        M = W.mT @ G
        return W @ sign(0.5 * (M - M.mT))  # the exact optimum on the orthogonal group
    A = sign(tangent_project(W, G, manifold))
    if polish:
        T = tangent_project(W, A, manifold)
        A = 1.5 * T - 0.5 * T @ (T.mT @ T)
    return A
