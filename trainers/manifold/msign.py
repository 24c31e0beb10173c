"""The matrix sign `msign(X) = U Vᵀ` of the compact SVD `X = U S Vᵀ`: the polar factor of X."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Polar Express, degree 5 (Amsel et al., arXiv 2505.16932, Algorithm 1): optimal for singular
# values in [1e-3, 1]; the last triple is the limit and repeats.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01  # the paper's margin for rounding, on all triples but the last and on the norm

_LIMIT = _POLAR_EXPRESS[-1]  # p(1 + e) = 1 + O(e³): what to iterate once singular values are near 1

POLAR_EXPRESS_STEPS = 10
"""Steps of the published Manifold Muon code."""


def polar_express_coefficients(steps: int) -> list[tuple[float, float, float]]:
    """`steps` triples (a, b, c) of `p(x) = a x + b x³ + c x⁵`, safety margin included."""
    safe = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]]
    return (safe + [_POLAR_EXPRESS[-1]] * steps)[:steps]


def msign(
    X: Tensor,  # (..., m, n)
    *,
    steps: int = POLAR_EXPRESS_STEPS,
    dtype: torch.dtype | None = None,
) -> Tensor:  # (..., m, n), in X's dtype
    """Polar factor of X by the Polar Express iteration (arXiv 2505.16932).

    Args:
        X: one matrix or a batch, tall or wide. Its scale does not matter.
        steps: iterations; singular values above 1e-3 of the Frobenius norm are 1 to rounding
            after 10. Zero singular values stay 0, so the result is a partial isometry.
        dtype: arithmetic of the iteration; None keeps X's.

    NaN or Inf in X gives NaN in that matrix of the batch and no other.
    """
    wide = X.size(-2) < X.size(-1)
    Y = (X.mT if wide else X).to(dtype or X.dtype)
    norm = Y.norm(dim=(-2, -1), keepdim=True)
    Y = Y / (norm * _SAFETY).masked_fill(norm == 0, 1.0)  # a zero matrix stays zero
    Y = _iterate(Y, polar_express_coefficients(steps)).to(X.dtype)
    return Y.mT if wide else Y


NEAR = 0.5
"""Largest radius that `polar_near` takes; its iteration diverges from 0.53 up."""


def polar_near(
    X: Tensor,  # (..., m, n), m >= n
    radius: float,
) -> Tensor:  # (..., m, n)
    """Polar factor of an X with all singular values in [1 - radius, 1 + radius], radius <= NEAR.

    Takes as many Newton-Schulz steps as the ends of that interval need to come within 1e-7 of 1,
    which is one to five.
    """
    return _iterate(X, [_LIMIT] * steps_from(radius))


def steps_from(radius: float) -> int:
    """Newton-Schulz steps that `polar_near` takes. Raises ValueError beyond NEAR."""
    if not radius <= NEAR:
        raise ValueError(f"radius {radius} is above {NEAR}")
    a, b, c = _LIMIT
    low, high = 1 - radius, 1 + radius
    steps = 0
    while max(abs(1 - low), abs(1 - high)) >= 1e-7:
        low, high = (x * (a + b * x**2 + c * x**4) for x in (low, high))
        steps += 1
    return steps


def _iterate(Y: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """`Y <- a Y + b Y K + c Y K²` with K = YᵀY, for each triple; Y tall."""
    shape = Y.shape
    Y = Y.reshape(-1, *shape[-2:])
    for a, b, c in coefficients:
        gram = Y.mT @ Y
        Y = torch.baddbmm(Y, Y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), beta=a)
    return Y.reshape(shape)
