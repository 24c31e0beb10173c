"""The manifolds of weight matrices: constraint, tangent space, retraction.

Every manifold is described by the self-adjoint projector P that selects the part of the Gram
differential `WᵀA + AᵀW` which must vanish (paper 2606.13276, Appendix A, "Tangent constraint").
Matrices are (..., m, n); a wide one is handled through its transpose, so formulas assume m >= n.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from trainers.iterations import POLAR_STEPS
from trainers.manifold.msign import (
    NEAR,
    add_product,
    column_dots,
    correction_near,
    gram,
    largest_entry,
    msign,
    nonzero,
    polar_near,
    product,
)

Manifold = Literal["none", "stiefel", "dgram", "oblique", "spectral"]
MANIFOLDS: tuple[Manifold, ...] = ("none", "stiefel", "dgram", "oblique", "spectral")
RETRACTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "stiefel": ("polar",),
    "dgram": ("svd_sorted", "column_norm"),
    "oblique": ("normalize",),
    "spectral": ("scale",),
}
"""Retractions by manifold; the first is the default."""


def constrained_part(
    M: Tensor,  # (..., n, n), symmetric
    manifold: str,
) -> Tensor:  # (..., n, n)
    """P(M): all of M (stiefel), its off-diagonal part (dgram), its diagonal (oblique), 0 (none, spectral)."""
    if manifold == "stiefel":
        return M
    if manifold == "dgram":
        off = M.clone()
        off.diagonal(dim1=-2, dim2=-1).zero_()
        return off
    if manifold == "oblique":
        return torch.diag_embed(M.diagonal(dim1=-2, dim2=-1))
    if manifold in ("none", "spectral"):  # a norm that is rescaled leaves every direction open
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


def columns(W: Tensor) -> tuple[Tensor, Tensor]:  # (..., m, n) -> (..., m, n), (..., n)
    """Unit columns Q of a tall W, and their norms over the largest; a zero column stays zero, and one
    below the square root of the smallest number times the largest entry counts as zero.

    The tangent space of a cone does not depend on W's scale, and in these coordinates no factor of a
    product leaves half precision's range, however the norms of the columns differ.
    """
    W, norms = _with_norms(W)
    return W / nonzero(norms), (norms / nonzero(norms.amax(dim=-1, keepdim=True))).squeeze(-2)


def _with_norms(W: Tensor) -> tuple[Tensor, Tensor]:  # (..., m, n) -> (..., m, n), (..., 1, n)
    """W, scaled where squares leave its range, and the norms of its columns."""
    squares = column_dots(W, W)
    if _out_of_range(squares):
        W, _ = _scaled(W)
        squares = column_dots(W, W)
    return W, squares.sqrt()


def _out_of_range(squares: Tensor) -> bool:
    """Whether a matrix with these squared norms must be `_scaled`. On a GPU nothing is read: any is."""
    return squares.device.type != "cpu" or not bool(((squares > 1e-30) & (squares < 1e30)).all())


def _scaled(W: Tensor) -> tuple[Tensor, Tensor]:  # (..., m, n) -> (..., m, n), (..., 1, 1)
    """W with its largest entry in [1/2, 1), and the power of two that undoes it: exact, so that a batch has
    the bits of its matrices."""
    _, exponent = torch.frexp(largest_entry(W))
    return torch.ldexp(W, -exponent), torch.ldexp(torch.ones_like(exponent, dtype=W.dtype), exponent)


def frame(W: Tensor, manifold: str) -> tuple[Tensor, Tensor]:
    """`columns` of a W on a manifold, which for `stiefel` it is itself."""
    return (W, W.new_ones(W[..., 0, :].shape)) if manifold == "stiefel" else columns(W)


def tangent_weights(lengths: Tensor) -> Tensor:  # (..., n) -> (..., n, n)
    """`1 / (d_i² + d_j²)`; 0 where both are below 1e-15 of the longest."""
    squares = lengths.square()
    sums = squares.unsqueeze(-1) + squares.unsqueeze(-2)
    least = 1e-30 * squares.amax(dim=-1)[..., None, None]
    return torch.where(sums > least, 1 / sums, 0.0)


def tangent_project(
    W: Tensor,  # (..., m, n), on the manifold
    A: Tensor,  # (..., m, n)
    manifold: str,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:  # (..., m, n)
    """Orthogonal projection of A on the tangent space at W.

    `A - W (w ∘ P(WᵀA + AᵀW))` with `w_ij = 1/(d_i² + d_j²)`, `d_j` the norm of column j; exact
    where the columns of W are orthogonal, and for `oblique` always. A zero column constrains
    nothing and is left alone. `dtype` is the arithmetic of the two products, None is A's own.
    """
    if manifold in ("none", "spectral"):
        return A.clone()
    wide = A.size(-2) < A.size(-1)
    W, A = _tall(W), _tall(A)
    precise = W.dtype
    weights: Tensor | float
    D = None
    if manifold == "stiefel":
        weights = 0.5
    elif dtype == torch.float16:
        W, lengths = columns(W)
        weights, D = tangent_weights(lengths), lengths.unsqueeze(-1)
    else:  # every other type has the range that W's own columns take
        W, norms = _with_norms(W)
        weights = tangent_weights(norms.squeeze(-2))
    W = W.to(dtype or W.dtype)
    M = product(W.mT, A, dtype).to(precise)
    if D is not None:
        M = D * M
    multiplier = weights * constrained_part(M + M.mT, manifold)
    if D is not None:
        multiplier = D * multiplier
    if A.ndim == 3 and A.dtype == W.dtype:
        T = add_product(A, W, multiplier.to(W.dtype), alpha=-1)
    else:
        T = A - product(W, multiplier, dtype).to(A.dtype)
    return T.mT if wide else T


def retract(
    V: Tensor,  # (..., m, n)
    manifold: str,
    *,
    method: str | None = None,
    radius: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # (..., m, n), on the manifold
    """Bring V back to the manifold, in V's own precision.

    Args:
        manifold: `stiefel`: polar factor of V. `oblique`: columns of unit norm. `spectral`: V divided
            by its largest singular value. `none`: V itself. `dgram`: see `method`.
        method: for `dgram`, `svd_sorted` (paper: `U S Qᵀ -> (U Qᵀ) diag(S)`, which hands the
            singular values to the columns in descending order and so moves even a V that is on the
            manifold) or `column_norm` (`Q` the polar factor of V with its columns scaled to unit
            norm, `W = Q diag(Qᵀ V)`, which leaves such a V alone). None is the manifold's default.
        radius: an upper bound on ‖V - W‖₂ for some W on the manifold, if one is known (a step's
            length): makes `stiefel` and `column_norm` cheaper; the result is the same to rounding.
        dtype: arithmetic of the corrections of a V that is near; see `polar_near`.

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
        W: Tensor = columns(V)[0]
    elif manifold == "spectral":
        V = V / nonzero(V.abs().amax(dim=(-2, -1), keepdim=True))
        W = V / nonzero(spectral_norm(V)[..., None, None])
    elif manifold == "stiefel":
        W = _polar(V, radius, dtype)
    elif method == "column_norm":
        W = _column_norm(V, radius, dtype)
    else:
        W = _svd_sorted(V)
    return W.mT if wide else W


def spectral_norm(
    X: Tensor,  # (..., m, n)
    *,
    squarings: int = 16,
) -> Tensor:  # (...)
    """σ_max of X, by power iteration: `squarings` of XᵀX make 2^squarings steps from every start at once.

    With P the normalised power, tr(P XᵀX) / tr(P) is a mean of squared singular values that weighs
    them by their own power: 16 squarings leave an error below 1e-4 however small the gap, 5 some percent.
    """
    X = _tall(X)
    largest = X.abs().amax(dim=(-2, -1), keepdim=True)
    X = X / nonzero(largest)
    K = X.mT @ X
    P = K
    for _ in range(squarings):
        trace = P.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        P = P / nonzero(trace)
        P = P @ P
    trace = P.diagonal(dim1=-2, dim2=-1).sum(-1)
    square: Tensor = (P * K).sum(dim=(-2, -1)) / nonzero(trace)
    return square.clamp_min(0).sqrt() * largest.squeeze(-1).squeeze(-1)


def _polar(V: Tensor, radius: float | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Converged polar factor: from nearby, or by LAPACK, or by matrix products alone on a GPU, where
    factorisations are slow. (How near the unit columns of a DGram matrix are depends on their norms,
    which the host does not know; `polar_near` looks, or copes.)"""
    near = polar_near(V, radius, dtype=dtype) if radius is not None and radius <= NEAR else None
    if near is not None:
        return near
    return _lapack_factors(V)[0] if V.device.type == "cpu" else msign(V, steps=POLAR_STEPS, method="gram")


def _column_norm(V: Tensor, radius: float | None, dtype: torch.dtype | None) -> Tensor:
    """`W' = Q diag(QᵀV)`, Q the polar factor of V with its columns scaled to unit norm."""
    # float16 has no range for the columns' own norms.
    if radius is not None and radius <= NEAR and dtype != torch.float16:
        W = _column_norm_near(V, radius, dtype)
        if W is not None:
            return W
    Q = _polar(columns(V)[0], radius, dtype)
    return Q * column_dots(Q, V)


def _column_norm_near(V: Tensor, radius: float, dtype: torch.dtype | None) -> Tensor | None:
    """`column_norm` of a V with nearly orthogonal columns: V D⁻¹ has the polar factor Q = V D⁻¹ (I + C), and
    all that is left but one product is n x n. None where V is too far away."""
    shape = V.shape
    V = V.reshape(-1, *shape[-2:])
    K = gram(V)
    squares = K.diagonal(dim1=-2, dim2=-1)
    power: Tensor | float = 1.0
    if _out_of_range(squares):
        V, power = _scaled(V)
        K = gram(V)
        squares = K.diagonal(dim1=-2, dim2=-1)
    inverse = 1 / nonzero(squares.sqrt()).unsqueeze(-1)  # (B, n, 1)
    E = inverse * K * inverse.mT
    E.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    found = correction_near(E, radius, dtype=dtype)
    if found is None:
        return None
    C, scale, dtype = found
    if scale is not None:
        inverse = inverse * scale
    C = inverse * C
    dots = (C * K).sum(dim=-2, keepdim=True) + inverse.mT * squares.unsqueeze(-2)  # diag(QᵀV), (B, 1, n)
    dots = dots * power
    return product(V, C * dots, dtype).to(V.dtype).addcmul_(V, inverse.mT * dots).reshape(shape)


def _svd_sorted(V: Tensor) -> Tensor:
    """Polar factor times the singular values in descending order."""
    if V.device.type != "cpu":
        return svd_sorted_without_svd(V)
    polar, sigma = _lapack_factors(V)
    return polar * sigma.unsqueeze(-2)


_SAFE_SQUARE = {torch.float64: 1e-4}
"""Smallest share of the largest eigenvalue of VᵀV from which a polar factor is taken: 1e-10, and more
where the result is to have float64's own precision."""


def _lapack_factors(V: Tensor) -> tuple[Tensor, Tensor]:
    """Polar factor and descending singular values of V, computed in float64; NaN where V is not finite.

    The eigenvectors of VᵀV cost half an SVD. They fail where V is near to losing rank, and there
    the SVD completes the factor. float64 is no luxury: the float32 SVD of MKL 2024.2 returned NaN
    for a well-conditioned 128 x 128 matrix, one in some thousands of training steps.
    """
    finite = torch.isfinite(V).all(dim=(-2, -1), keepdim=True)
    D = torch.where(finite, V, 0.0).double()
    largest = nonzero(D.abs().amax(dim=(-2, -1), keepdim=True))
    D = D / largest
    squares, Q = torch.linalg.eigh(gram(D))
    smallest, greatest = squares[..., 0], squares[..., -1]
    safe = _SAFE_SQUARE.get(V.dtype, 1e-10)
    if bool((smallest > safe * greatest).all()) and bool(torch.isfinite(Q).all()):
        polar = D @ (Q * squares.rsqrt().unsqueeze(-2) @ Q.mT)
        sigma = squares.sqrt().flip(-1)
    else:
        U, sigma, Qt = torch.linalg.svd(D, full_matrices=False)
        polar = U @ Qt
    sigma = sigma * largest.squeeze(-1)
    return torch.where(finite, polar, torch.nan).to(V.dtype), sigma.to(V.dtype)


def svd_sorted_without_svd(
    V: Tensor,  # (..., m, n), m >= n
) -> Tensor:  # (..., m, n)
    """`retract(V, "dgram", method="svd_sorted")` from `msign` and `eigvalsh(VᵀV)`.

    Equal to the SVD's result where no singular value is below 1e-6 of the Frobenius norm.
    """
    Q = msign(V, steps=POLAR_STEPS, method="gram")
    # The Gram matrix squares the condition number, hence float64.
    squares = gram(V.double())
    squares = torch.linalg.eigvalsh(torch.where(torch.isfinite(squares), squares, 0.0))  # Q has the NaN
    sigma: Tensor = squares.clamp_min(0).sqrt().flip(-1).to(V.dtype)
    return Q * sigma.unsqueeze(-2)


def distance(
    W: Tensor,  # (..., m, n)
    manifold: str,
) -> Tensor:  # (...)
    """Frobenius norm of the violated part of the Gram matrix: ‖P(WᵀW - I)‖, for dgram ‖Off(WᵀW)‖;
    for spectral |σ_max - 1|, for none 0."""
    W = _tall(W)
    if manifold == "spectral":
        return (spectral_norm(W) - 1).abs()
    K = W.mT @ W
    if manifold != "dgram":
        K = K - torch.eye(K.size(-1), dtype=W.dtype, device=W.device)
    norms: Tensor = torch.linalg.matrix_norm(constrained_part(K, manifold))
    return norms


def _tall(X: Tensor) -> Tensor:
    return X.mT if X.size(-2) < X.size(-1) else X
