"""GPT-2 in the manner of nanoGPT: pre-LayerNorm, GELU, learned positions, no biases, tied head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainers.config import ModelConfig
from trainers.models.attention import CausalSelfAttention
from trainers.models.decoder import Block, Decoder
from trainers.models.initialize import draw


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.d_model, config.hidden, bias=False)
        self.c_proj = nn.Linear(config.hidden, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x))), self.dropout, self.training)


class GPT2(Decoder):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        d = config.d_model
        self.wte = nn.Embedding(config.vocab_size, d)
        self.wpe = nn.Embedding(config.context, d)
        self.h = nn.ModuleList(
            Block(
                nn.LayerNorm(d, bias=False),
                CausalSelfAttention(config, rotary=False),
                nn.LayerNorm(d, bias=False),
                MLP(config),
            )
            for _ in range(config.n_layer)
        )
        self.ln_f = nn.LayerNorm(d, bias=False)

    def initialize(self, seed: int) -> None:
        draw(self, seed, residual=("c_proj.weight",), layers=self.config.n_layer)

    def embed(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, d)
        positions = torch.arange(tokens.size(1), device=tokens.device)
        placed: Tensor = self.wpe(positions)
        return super().embed(tokens) + placed
