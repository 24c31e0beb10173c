"""Singular values and Gram statistics of weight matrices (paper, Appendix A, "Spectral diagnostics")."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trainers.config import RunConfig
from trainers.param_groups import MATRIX_KINDS, NamedParameter
from trainers.records import SpectrumRecord


def spectrum(
    W: Tensor,  # (m, n)
) -> dict[str, list[float] | float]:
    """Spectral fields of a `SpectrumRecord`, computed in float64 on the CPU.

    W itself goes through the SVD (not its Gram matrix), so that small singular values are right
    to float64's precision. A matrix with NaN or Inf gives NaN everywhere.
    """
    W = W.detach().double().cpu()
    W = W.mT if W.size(0) < W.size(1) else W
    gram = W.mT @ W
    diagonal = gram.diagonal()
    finite = bool(torch.isfinite(W).all())
    sigma = torch.linalg.svdvals(W) if finite else torch.full_like(diagonal, torch.nan)
    return {
        "sigma": sigma.tolist(),
        "sigma_max": float(sigma[0]),
        "sigma_min": float(sigma[-1]),
        "gram_diag": diagonal.tolist(),
        "gram_off_norm": float((gram - torch.diag(diagonal)).norm()),
        "gram_norm": float(gram.norm()),
    }


def spectrum_records(
    named: list[NamedParameter], run: RunConfig, run_id: str, attempt: int, step: int
) -> Iterator[SpectrumRecord]:
    """One record for every attention and MLP matrix."""
    for p in named:
        if p.kind not in MATRIX_KINDS or p.layer is None:
            continue
        yield SpectrumRecord(
            run=run_id,
            attempt=attempt,
            step=step,
            matrix=p.name.removesuffix(".weight"),
            layer=p.layer,
            module=p.kind,
            manifold=getattr(run.assignment, p.kind).manifold,
            **spectrum(p.parameter),  # type: ignore[arg-type]
        )
