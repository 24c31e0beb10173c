"""First weights: a function of the seed and the order of a model's parameters, and of nothing else."""

from __future__ import annotations

import math

import torch
from torch import nn

INIT_STD = 0.02
"""Standard deviation of every weight at the start; residual projections get it over √(2 layers)."""


@torch.no_grad()
def draw(model: nn.Module, seed: int, *, residual: tuple[str, ...], layers: int) -> None:
    """Draw every weight from `seed` alone, on the CPU, in the order of `named_parameters`; vectors are 1.

    Two models of one shape and seed start equal, whatever the device or the assignment. `residual`
    names the endings of the matrices that write into the residual stream.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_std = INIT_STD / math.sqrt(2 * layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0)
            continue
        std = residual_std if name.endswith(residual) else INIT_STD
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
