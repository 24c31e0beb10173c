"""Causal self-attention for both model families: softmax or pointwise scores, learned or rotary positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainers.config import ModelConfig

ROTARY_BASE = 10_000.0


class CausalSelfAttention(nn.Module):
    """Multi-head attention with one fused input matrix `c_attn` (3d x d) and an output matrix `c_proj`.

    `config.attention` names the weights: `softmax`; `sigmoid`, σ(z - log T) with T the context; or
    `relu`, max(z, 0) / (number of visible tokens). The pointwise ones have no normalisation across
    tokens: what they do not share with softmax is not due to it. `config.qk_norm` puts an RMS norm
    without parameters on every query and key.
    """

    def __init__(self, config: ModelConfig, *, rotary: bool) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.kind = config.attention
        self.qk_norm = config.qk_norm
        self.rotary = rotary
        self.context = config.context
        self.c_attn = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.c_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, d) -> 3 x (B, h, T, d / h)
        """Queries, keys and values as they enter the scores."""
        B, T, d = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, d // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(d, dim=2)
        )
        if self.qk_norm:
            q, k = (F.rms_norm(part, (part.size(-1),)) for part in (q, k))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        B, T, d = x.shape
        q, k, v = self.heads(x)
        dropout = self.dropout if self.training else 0.0
        if self.kind == "softmax":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            y = F.dropout(pointwise_weights(q, k, self.kind, self.context), dropout) @ v
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, d))
        return F.dropout(y, self.dropout, self.training)


def pointwise_weights(
    q: Tensor, k: Tensor, kind: str, context: int
) -> Tensor:  # 2 x (B, h, T, c) -> (B, h, T, T)
    """Attention weights without a softmax: `sigmoid` (arXiv 2409.04431, bias -log T) or `relu` (arXiv
    2309.08586, divided by the number of tokens that a row sees)."""
    T = q.size(-2)
    scores = q @ k.mT / math.sqrt(q.size(-1))
    if kind == "sigmoid":
        weights = torch.sigmoid(scores - math.log(context))
    else:
        seen = torch.arange(1, T + 1, device=q.device, dtype=scores.dtype).unsqueeze(-1)
        weights = F.relu(scores) / seen
    return weights.tril()


def rotate(x: Tensor) -> Tensor:  # (B, h, T, c) -> (B, h, T, c)
    """Rotary positions (arXiv 2104.09864): pairs (i, i + c/2) turn by position / base^(2i / c)."""
    T, c = x.shape[-2:]
    frequency = ROTARY_BASE ** (-torch.arange(0, c, 2, device=x.device, dtype=torch.float32) / c)
    angle = torch.arange(T, device=x.device, dtype=torch.float32).unsqueeze(-1) * frequency  # (T, c / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
