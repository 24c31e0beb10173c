"""Matrices that the tests of trainers.manifold share: points on manifolds, spectra, hard cases, real ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st

from trainers.manifold import RETRACTIONS

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (12, 12)}
CONSTRAINED = ("stiefel", "dgram", "oblique")
WAYS_BACK = [(m, way) for m in CONSTRAINED for way in RETRACTIONS[m]]
PRECISIONS = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.float32, torch.bfloat16),
    "float16": (torch.float32, torch.float16),
}
"""What matrices are stored in, and what they are multiplied in where that is less."""
HALF = ("bfloat16", "float16")

MOMENTUM = np.load(FIXTURES / "real_momentum.npz")
NAMES = sorted({key.rsplit("/", 1)[0] for key in MOMENTUM.files})


def one_thread() -> Iterator[None]:
    """As a fixture: threads that wait for each other over 20 x 10 matrices cost a hundredfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def real(name: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Weight, momentum and manifold from a training run, in float64."""
    W, G = (torch.from_numpy(MOMENTUM[f"{name}/{key}"]).double() for key in ("W", "G"))
    return W, G, str(MOMENTUM[f"{name}/manifold"])


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(gaussian(m, n, seed=seed)).Q


def on_manifold(manifold: str, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Exactly on it: orthonormal columns by QR, times norms where they are free."""
    tall = gaussian(max(shape), min(shape), seed=seed)
    if manifold == "oblique":
        W = tall / tall.norm(dim=0)
    elif manifold == "spectral":
        W = tall / torch.linalg.matrix_norm(tall, 2)
    else:
        W = tall if manifold == "none" else torch.linalg.qr(tall).Q
    if manifold == "dgram":
        W = W * (0.5 + 2 * uniform(min(shape), seed=seed))
    return W if shape[0] >= shape[1] else W.mT


def batch_on_manifold(manifold: str, count: int, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.stack([on_manifold(manifold, shape, seed + k) for k in range(count)])


def with_spectrum(
    sigma: torch.Tensor,  # (n,)
    m: int,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An m x n matrix with these singular values, and its polar factor."""
    n = sigma.numel()
    U, V = orthonormal(m, n, seed), orthonormal(n, n, seed + 1)
    return U * sigma @ V.mT, U @ V.mT


SPECTRA = ("flat", "uniform", "power law", "geometric", "one small", "one large", "cliff")


def spectrum(kind: str, n: int, decades: float, seed: int = 0) -> torch.Tensor:
    """n singular values, the largest 1 and the smallest not below 10^-decades."""
    low = 10.0**-decades
    one = torch.ones(1, dtype=torch.float64)
    sigma = {
        "flat": 0.5 + 0.5 * uniform(n, seed=seed),
        "uniform": uniform(n, seed=seed),
        "power law": torch.arange(1, n + 1, dtype=torch.float64) ** -decades,
        "geometric": torch.logspace(0, -decades, n, dtype=torch.float64),
        "one small": torch.cat([0.7 + 0.3 * uniform(n - 1, seed=seed), low * one]),
        "one large": torch.cat([one, (low * one).expand(n - 1)]),
        "cliff": torch.cat([one.expand((n + 1) // 2), (low * one).expand(n // 2)]),
    }[kind]
    return (sigma / sigma.max()).clamp_min(low)


def hard_cases(shape: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """What breaks iterations: no rank, little rank, no scale."""
    G = gaussian(*shape, seed=seed)
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    entry = torch.zeros_like(G)
    entry[-1, 0] = 1
    column = G.clone()
    column[:, 0] = 0
    return {
        "zero": torch.zeros_like(G),
        "one entry": entry,
        "rank one": S[0] * U[:, :1] @ Vt[:1],
        "rank deficient": U[:, :-1] * S[:-1] @ Vt[:-1],
        "near singular": U * torch.cat([S[:-1], 1e-7 * S[:1]]) @ Vt,
        "zero column": column,
        "huge": 1e30 * G,
        "tiny": 1e-30 * G,
    }


def norms(A: torch.Tensor) -> torch.Tensor:
    """‖A‖₂ of every matrix."""
    return torch.linalg.matrix_norm(A.double(), 2)


def relative(A: torch.Tensor, B: torch.Tensor) -> float:
    """‖A - B‖_F / ‖B‖_F, 0 where both are 0."""
    difference = float((A.double() - B.double()).norm())
    return difference / float(B.double().norm()) if difference else 0.0


seeds = st.integers(0, 9_999)
sizes = st.integers(1, 16)
precisions = st.sampled_from(list(PRECISIONS))
