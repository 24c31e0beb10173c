"""What both model families share: residual blocks over token embeddings, and a head tied to them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainers.config import ModelConfig


class Block(nn.Module):
    """`x + attn(ln_1(x))`, then `x + mlp(ln_2(x))`."""

    def __init__(self, ln_1: nn.Module, attn: nn.Module, ln_2: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.ln_1 = ln_1
        self.attn = attn
        self.ln_2 = ln_2
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x  # noqa: RET504


class Decoder(nn.Module):
    """Token ids (B, T) and targets (B, T) to the mean cross-entropy in nats.

    A family sets `wte`, `h` and `ln_f`, in the order in which their first weights are drawn.
    """

    checkpointing: bool = False
    """Keep of each block its input alone, and compute the block again in the backward pass
    (arXiv 1604.06174): a third more arithmetic, the same gradient, dropout included."""

    wte: nn.Embedding
    h: nn.ModuleList
    ln_f: nn.Module

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def embed(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, d)
        embedded: Tensor = self.wte(tokens)
        return embedded

    def logits(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, vocabulary)
        x = F.dropout(self.embed(tokens), self.config.dropout, self.training)
        for block in self.h:
            x = self._through(block, x)
        return F.linear(self.ln_f(x), self.wte.weight)  # the head is the embedding

    def _through(self, block: nn.Module, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        if self.checkpointing and self.training:
            again: Tensor = checkpoint(
                block, x, use_reentrant=False, preserve_rng_state=self.config.dropout > 0
            )
            return again
        through: Tensor = block(x)
        return through

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
