"""How sharp attention is, and how large activations are: one forward pass over fixed sequences.

The pass is apart from training: the model as it was built (not compiled), without autocast, dropout,
gradients or random numbers. It leaves nothing behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainers.models.attention import CausalSelfAttention
from trainers.models.decoder import Block, Decoder
from trainers.param_groups import MATRIX_KINDS, kind_of
from trainers.records import AttentionRecord

FIRST_ROW = 64
"""Rows that see less than this are left out of means; where the context is no longer, its first half is."""
ROWS = 256
"""Rows whose scores exist at once."""


@dataclass(frozen=True, slots=True)
class Walk:
    """What one pass saw."""

    attention: list[list[tuple[float, float, float, float]]]
    """By layer and head: max_logit, entropy, p_max and jacobian_norm of an `AttentionRecord`."""
    activation_rms: dict[str, float]
    """Root mean square of the outputs of each attention and MLP matrix, by name, as "h.0.attn.c_attn"."""


@torch.no_grad()
def walk(
    model: Decoder,
    tokens: Tensor,  # (S, T)
    *,
    scores: bool = True,
) -> Walk:
    """Run `tokens`, on the model's device, through the blocks, and read the results back at the end.

    Args:
        scores: also look into attention; without, `attention` is empty and this is a plain forward pass.

    Of pointwise attention `max_logit` is measured as it stands, and the other three are those of its
    weights divided by their sum. Rows whose weights are all 0 are left out; NaN where no row is left.
    """
    seen: list[Tensor] = []
    with _evaluating(model), _outputs(model) as rms, torch.autocast(tokens.device.type, enabled=False):
        x = model.embed(tokens)
        for block in model.h:
            assert isinstance(block, Block)
            if scores:
                seen.append(_of_heads(block.attn, block.ln_1(x)))
            x = block(x)
    values = torch.stack(list(rms.values())).tolist()
    return Walk(
        attention=[[tuple(head) for head in layer] for layer in torch.stack(seen).tolist()] if seen else [],
        activation_rms=dict(zip(rms, values, strict=True)),
    )


def attention_records(seen: Walk, run_id: str, attempt: int, step: int) -> Iterator[AttentionRecord]:
    """One record for every layer and head."""
    for layer, heads in enumerate(seen.attention):
        for head, numbers in enumerate(heads):
            yield AttentionRecord(run_id, attempt, step, layer, head, *numbers)


def row_statistics(
    z: Tensor,  # (..., T): logarithms of the weights of a row, up to a constant; -inf is weight 0
) -> tuple[Tensor, Tensor, Tensor]:  # 3 x (...)
    """Entropy H(p) in nats, max p and ‖diag(p) - ppᵀ‖_F of `p = softmax(z)`; NaN where max z is not finite.

    With `S_k = Σ pᵏ` the norm is `√(S₂ - 2 S₃ + S₂²)`, a difference of numbers near 1 where p is near
    one-hot. So the largest weight p₁ is kept apart: with `q = 1 - p₁` and `R_k` the sums over the others,

        ‖J‖² = p₁² q² + R₂ (1 + 2 p₁² + R₂) - 2 R₃,    R₃ <= R₂ / 2.

    Likewise `H = LSE(z) - E_p[z]` is `log(1 + Σ e^u) - E_p[u]` with u = z - max z: no digits are lost.
    """
    top, place = z.max(dim=-1, keepdim=True)
    u = (z - top).clamp_min(-1e4)  # e^-1e4 is 0; -inf times 0 would be NaN
    e = u.exp().scatter(-1, place, 0.0)
    total = e.sum(dim=-1) + (top - top).squeeze(-1)  # NaN where the largest is not finite
    p_max = 1 / (1 + total)
    entropy = torch.log1p(total) - p_max * (e * u).sum(dim=-1)
    p = e * p_max.unsqueeze(-1)
    squares = p * p
    R2, R3 = squares.sum(dim=-1), (squares * p).sum(dim=-1)
    J2 = (p_max * p_max * total).square() + R2 * (1 + 2 * p_max.square() + R2) - 2 * R3
    return entropy, p_max, J2.clamp_min(0).sqrt()


def _of_heads(attention: nn.Module, x: Tensor) -> Tensor:  # (S, T, d) -> (h, 4)
    """The four numbers of a `Walk` for each head of one layer."""
    assert isinstance(attention, CausalSelfAttention)
    q, k, _ = attention.heads(x)
    rows = [_of_rows(attention, q, k, first) for first in range(0, q.size(-2), ROWS)]
    max_logit, *others, alive = torch.cat(rows, dim=-1)  # 5 x (S, h, T)
    T = max_logit.size(-1)
    first = FIRST_ROW if T > FIRST_ROW else T // 2
    alive = alive[..., first:].double()
    means = []
    for values in others:
        counted = torch.where(alive > 0, values[..., first:].double(), 0.0)
        means.append(counted.sum(dim=(0, 2)) / alive.sum(dim=(0, 2)))
    return torch.stack([max_logit.amax(dim=(0, 2)).double(), *means], dim=-1)


def _of_rows(
    attention: CausalSelfAttention,
    q: Tensor,  # (S, h, T, c)
    k: Tensor,  # (S, h, T, c)
    first: int,
) -> Tensor:  # (5, S, h, ROWS or what is left)
    """Largest score, entropy / log(i + 1), p_max, ‖J‖, and whether there is any weight, of rows i from
    `first`."""
    last = min(first + ROWS, q.size(-2))
    z = q[..., first:last, :] @ k[..., :last, :].mT / math.sqrt(q.size(-1))
    i = torch.arange(first, last, device=z.device).unsqueeze(-1)
    z = z.masked_fill(torch.arange(last, device=z.device) > i, -math.inf)
    top = z.amax(dim=-1)
    z = log_weights(z, attention.kind, attention.context)
    entropy, p_max, jacobian = row_statistics(z)
    alive = (z.amax(dim=-1) != -math.inf).to(z.dtype)  # a row with NaN counts, and shows
    return torch.stack([top, entropy / torch.log1p(i.squeeze(-1).to(z.dtype)), p_max, jacobian, alive])


def log_weights(z: Tensor, kind: str, context: int) -> Tensor:  # any shape
    """Scores to logarithms of attention weights, up to a constant per row; see `CausalSelfAttention`."""
    if kind == "softmax":
        return z
    return F.logsigmoid(z - math.log(context)) if kind == "sigmoid" else F.relu(z).log()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and then as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A dict that gets the root mean square of what each attention and MLP matrix gives out."""
    rms: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(partial(_note, rms, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and kind_of(f"{name}.weight") in MATRIX_KINDS
    ]
    try:
        yield rms
    finally:
        for hook in hooks:
            hook.remove()


def _note(rms: dict[str, Tensor], name: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
    rms[name] = output.square().mean().sqrt()
