"""A small LLaMA: pre-RMSNorm, SwiGLU, rotary positions, no biases, tied head."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from trainers.config import ModelConfig
from trainers.models.attention import CausalSelfAttention
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


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.RMSNorm(config.d_model)
        self.attn = CausalSelfAttention(config, rotary=True)
        self.ln_2 = nn.RMSNorm(config.d_model)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x  # noqa: RET504


class Llama(nn.Module):
    """Token ids (B, T) and targets (B, T) to the mean cross-entropy in nats."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.RMSNorm(config.d_model)

    def initialize(self, seed: int) -> None:
        draw(self, seed, residual=("attn.c_proj.weight", "mlp.w2.weight"), layers=self.config.n_layer)

    def logits(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, vocabulary)
        x = F.dropout(self.wte(tokens), self.config.dropout, self.training)
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)  # the head is the embedding

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
