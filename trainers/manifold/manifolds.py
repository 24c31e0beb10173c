"""The manifolds of weight matrices: constraint, tangent space, retraction.

Every manifold is described by the self-adjoint projector P that selects the part of the Gram
differential `WᵀA + AᵀW` which must vanish (paper 2606.13276, Appendix A, "Tangent constraint").
Matrices are (..., m, n); a wide one is handled through its transpose, so formulas assume m >= n.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from trainers.manifold.msign import NEAR, msign, polar_near

Manifold = Literal["none", "stiefel", "dgram", "oblique"]
MANIFOLDS: tuple[Manifold, ...] = ("none", "stiefel", "dgram", "oblique")
RETRACTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "stiefel": ("polar",),
    "dgram": ("svd_sorted", "column_norm"),
    "oblique": ("normalize",),
}
"""Retractions by manifold; the first is the default."""

_POLAR_STEPS = 20
"""Polar Express steps that turn singular values down to 1e-6 of the Frobenius norm into 1: a Gaussian
matrix of width 768, the start of every run, has some at 1e-5, and ten steps leave them far below 1."""


def constrained_part(
    M: Tensor,  # (..., n, n), symmetric
    manifold: str,
) -> Tensor:  # (..., n, n)
    """P(M): all of M (stiefel), its off-diagonal part (dgram), its diagonal (oblique), 0 (none)."""
    if manifold == "stiefel":
        return M
    if manifold == "dgram":
        return M - torch.diag_embed(M.diagonal(dim1=-2, dim2=-1))
    if manifold == "oblique":
        return torch.diag_embed(M.diagonal(dim1=-2, dim2=-1))
    if manifold == "none":
        return torch.zeros_like(M)
    raise ValueError(f"unknown manifold {manifold!r}; known: {', '.join(MANIFOLDS)}")


def gram_differential(
    W: Tensor,  # (..., m, n)
    A: Tensor,  # (..., m, n)
) -> Tensor:  # (..., n, n)
    """WᵀA + AᵀW, symmetric to the bit. W and A tall."""
    M = W.mT @ A
    return M + M.mT


def tangency_residual(
    W: Tensor,  # (..., m, n)
    A: Tensor,  # (..., m, n)
    manifold: str,
) -> Tensor:  # (...)
    """Root mean square over the n² entries of P(WᵀA + AᵀW), 0 for a tangent A."""
    W, A = _tall(W), _tall(A)
    return constrained_part(gram_differential(W, A), manifold).square().mean(dim=(-2, -1)).sqrt()


def tangent_project(
    W: Tensor,  # (..., m, n), on the manifold
    A: Tensor,  # (..., m, n)
    manifold: str,
) -> Tensor:  # (..., m, n)
    """Orthogonal projection of A on the tangent space at W.

    `A - W (w ∘ P(WᵀA + AᵀW))` with `w_ij = 1/(d_i² + d_j²)`, `d_j` the norm of column j; exact
    where the columns of W are orthogonal, and for `oblique` always. A zero column constrains
    nothing and is left alone.
    """
    if manifold == "none":
        return A.clone()
    wide = A.size(-2) < A.size(-1)
    W, A = _tall(W), _tall(A)
    squares = W.square().sum(dim=-2)  # (..., n)
    weights = squares.unsqueeze(-1) + squares.unsqueeze(-2)
    weights = torch.where(weights > 0, 1 / weights, 0.0)
    T = A - W @ (weights * constrained_part(gram_differential(W, A), manifold))
    return T.mT if wide else T


def retract(
    V: Tensor,  # (..., m, n)
    manifold: str,
    *,
    method: str | None = None,
    radius: float | None = None,
) -> Tensor:  # (..., m, n), on the manifold
    """Bring V back to the manifold, in V's own precision.

    Args:
        manifold: `stiefel`: polar factor of V. `oblique`: columns of unit norm. `none`: V itself.
            `dgram`: see `method`.
        method: for `dgram`, `svd_sorted` (paper: `U S Qᵀ -> (U Qᵀ) diag(S)`, which hands the
            singular values to the columns in descending order and so moves even a V that is on the
            manifold) or `column_norm` (`Q` the polar factor of V with its columns scaled to unit
            norm, `W = Q diag(Qᵀ V)`, which leaves such a V alone). None is the manifold's default.
        radius: an upper bound on ‖V - W‖₂ for some W on the manifold, if one is known (a step's
            length): makes `stiefel` cheaper and changes nothing else.

    NaN or Inf in V gives NaN. A V without full rank has no polar factor: on a CPU the result is on
    the manifold all the same, elsewhere its null directions stay 0.

    Raises:
        ValueError: unknown manifold, or a method that the manifold does not have.
    """
    if manifold not in RETRACTIONS:
        raise ValueError(f"unknown manifold {manifold!r}; known: {', '.join(MANIFOLDS)}")
    methods = RETRACTIONS[manifold]
    if method is not None and method not in methods:
        raise ValueError(f"manifold {manifold!r} has no retraction {method!r}; it has: {', '.join(methods)}")
    if manifold == "none":
        return V.clone()
    wide = V.size(-2) < V.size(-1)
    V = _tall(V)
    if manifold == "oblique":
        W: Tensor = torch.nn.functional.normalize(V, dim=-2)
    elif manifold == "stiefel":
        W = _polar(V) if radius is None or radius > NEAR else polar_near(V, radius)
    elif method == "column_norm":
        Q = _polar(torch.nn.functional.normalize(V, dim=-2))
        W = Q * (Q * V).sum(dim=-2, keepdim=True)
    else:
        W = _svd_sorted(V)
    return W.mT if wide else W


def _polar(V: Tensor) -> Tensor:
    """Converged polar factor; by matrix products alone on a GPU, where factorisations are slow."""
    return _lapack_factors(V)[0] if V.device.type == "cpu" else msign(V, steps=_POLAR_STEPS)


def _svd_sorted(V: Tensor) -> Tensor:
    """Polar factor times the singular values in descending order."""
    if V.device.type != "cpu":
        return svd_sorted_without_svd(V)
    polar, sigma = _lapack_factors(V)
    return polar * sigma.unsqueeze(-2)


_SAFE_SQUARE = 1e-10
"""Smallest share of the largest eigenvalue of VᵀV from which a polar factor is taken."""


def _lapack_factors(V: Tensor) -> tuple[Tensor, Tensor]:
    """Polar factor and descending singular values of V, computed in float64; NaN where V is not finite.

    The eigenvectors of VᵀV cost half an SVD. They fail where V is near to losing rank, and there
    the SVD completes the factor. float64 is no luxury: the float32 SVD of MKL 2024.2 returned NaN
    for a well-conditioned 128 x 128 matrix, one in some thousands of training steps.
    """
    finite = torch.isfinite(V).all(dim=(-2, -1), keepdim=True)
    D = torch.where(finite, V, 0.0).double()
    squares, Q = torch.linalg.eigh(D.mT @ D)
    smallest, largest = squares[..., 0], squares[..., -1]
    if bool((smallest > _SAFE_SQUARE * largest).all()) and bool(torch.isfinite(Q).all()):
        polar = D @ (Q * squares.rsqrt().unsqueeze(-2)) @ Q.mT
        sigma = squares.sqrt().flip(-1)
    else:
        U, sigma, Qt = torch.linalg.svd(D, full_matrices=False)
        polar = U @ Qt
    return torch.where(finite, polar, torch.nan).to(V.dtype), sigma.to(V.dtype)


def svd_sorted_without_svd(
    V: Tensor,  # (..., m, n), m >= n
) -> Tensor:  # (..., m, n)
    """`retract(V, "dgram", method="svd_sorted")` from `msign` and `eigvalsh(VᵀV)`.

    Equal to the SVD's result where no singular value is below 1e-6 of the Frobenius norm.
    """
    Q = msign(V, steps=_POLAR_STEPS)
    # The Gram matrix squares the condition number, hence float64.
    gram = V.mT.double() @ V.double()
    squares = torch.linalg.eigvalsh(torch.where(torch.isfinite(gram), gram, 0.0))  # Q has the NaN
    sigma: Tensor = squares.clamp_min(0).sqrt().flip(-1).to(V.dtype)
    return Q * sigma.unsqueeze(-2)


def distance(
    W: Tensor,  # (..., m, n)
    manifold: str,
) -> Tensor:  # (...)
    """Frobenius norm of the violated part of the Gram matrix: ‖P(WᵀW - I)‖, for dgram ‖Off(WᵀW)‖."""
    W = _tall(W)
    gram = W.mT @ W
    if manifold != "dgram":
        gram = gram - torch.eye(gram.size(-1), dtype=W.dtype, device=W.device)
    norms: Tensor = torch.linalg.matrix_norm(constrained_part(gram, manifold))
    return norms


def _tall(X: Tensor) -> Tensor:
    return X.mT if X.size(-2) < X.size(-1) else X
