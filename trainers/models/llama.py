"""A small LLaMA: pre-RMSNorm, SwiGLU, rotary positions, no biases, tied head."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from trainers.config import ModelConfig
from trainers.models.attention import CausalSelfAttention
from trainers.models.decoder import Block, Decoder
from trainers.models.initialize import draw


class SwiGLU(nn.Module):
    """`w2(silu(w1 x) * w3 x)`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.w1 = nn.Linear(config.d_model, config.hidden, bias=False)
        self.w3 = nn.Linear(config.d_model, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class Llama(Decoder):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        d = config.d_model
        self.wte = nn.Embedding(config.vocab_size, d)
        self.h = nn.ModuleList(
            Block(nn.RMSNorm(d), CausalSelfAttention(config, rotary=True), nn.RMSNorm(d), SwiGLU(config))
            for _ in range(config.n_layer)
        )
        self.ln_f = nn.RMSNorm(d)

    def initialize(self, seed: int) -> None:
        draw(self, seed, residual=("attn.c_proj.weight", "mlp.w2.weight"), layers=self.config.n_layer)
