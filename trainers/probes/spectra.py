"""Singular values and Gram statistics of weight matrices (paper, Appendix A, "Spectral diagnostics")."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trainers.config import RunConfig
from trainers.param_groups import MATRIX_KINDS, NamedParameter
from trainers.records import HeadRecord, SpectrumRecord


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


def head_records(
    named: list[NamedParameter], n_head: int, run_id: str, attempt: int, step: int
) -> Iterator[HeadRecord]:
    """Records of the queries, keys and values of every layer, whole and by head, and of every head's
    query-key product."""
    for p in named:
        if not p.name.endswith(".attn.c_attn.weight"):
            continue
        assert p.layer is not None
        for part, rows in head_spectra(p.parameter, n_head).items():
            for head, numbers in zip(range(n_head - len(rows), n_head), rows.tolist(), strict=True):
                yield HeadRecord(run_id, attempt, step, p.layer, part, head, *numbers)


def head_spectra(
    W: Tensor,  # (3 d, d): queries, keys and values on top of one another
    n_head: int,
) -> dict[str, Tensor]:  # "q", "k", "v": (1 + h, 4), the whole first; "qk": (h, 4)
    """`sigma_max, sigma_min, fro_norm, effective_rank` of each part and head, in float64 on the CPU.

    From Gram matrices, so right to 1e-8 of sigma_max. With K_Q = W_Q W_Qᵀ of one head (c x c) and K_K
    alike, `W_Qᵀ W_K / √c` has the singular values `√eig(K_Q K_K / c)`, c of them. (Rotary positions
    and QK-norm act after these weights.) A W with NaN or Inf gives NaN everywhere.
    """
    W = W.detach().double().cpu()
    if not bool(torch.isfinite(W).all()):
        return {part: torch.full((n_head + (part != "qk"), 4), torch.nan) for part in ("q", "k", "v", "qk")}
    parts = W.view(3, n_head, -1, W.size(1))  # (3, h, c, d)
    grams = parts @ parts.mT
    squares, Q = torch.linalg.eigh(grams)
    whole = parts.flatten(1, 2)
    whole_squares = torch.linalg.eigvalsh(whole @ whole.mT)
    spectra = {
        part: torch.cat([_numbers(whole_squares[i : i + 1]), _numbers(squares[i])])
        for i, part in enumerate(("q", "k", "v"))
    }
    root = Q[0] * squares[0].clamp_min(0).sqrt().unsqueeze(-2)  # K_Q = root rootᵀ
    product = root.mT @ grams[1] @ root / parts.size(-2)
    return {**spectra, "qk": _numbers(torch.linalg.eigvalsh(product))}


def _numbers(squares: Tensor) -> Tensor:  # (..., n) squared singular values, ascending -> (..., 4)
    sigma = squares.clamp_min(0).sqrt()
    share = sigma / sigma.sum(dim=-1, keepdim=True)
    rank = torch.special.entr(share).sum(dim=-1).exp()
    return torch.stack([sigma[..., -1], sigma[..., 0], torch.linalg.vector_norm(sigma, dim=-1), rank], dim=-1)
