"""The plainest way to stay on a manifold: any optimizer's step, then back.

The optimizer knows nothing of the manifold, and its direction is not tangent: what leaves the tangent
space is undone by the retraction (the "+Stiefel" and "+Spectral" of the modular-manifolds experiments).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainers.manifold import retract
from trainers.manifold.msign import HALF, NEAR


def retract_after_steps(optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Put the weights of `optimizer` on their manifolds, now and after each of its steps.

    A group of the optimizer with the key `manifold` (and, if wanted, `retraction` and `row_blocks`, as in
    `trainers.optim.ManifoldMuon`) is kept there; other groups are left alone, and so is every weight
    while its group's lr is 0. A checkpoint of the optimizer needs nothing more; one that is loaded
    afterwards is not retracted again before its next step.

    Raises:
        ValueError: a weight of such a group is no float32 or float64 matrix (rounding to half precision
            would move it off its manifold again), or `row_blocks` does not divide its rows.
    """
    for group in optimizer.param_groups:
        if _manifold(group) != "none":
            for weight in group["params"]:
                _check(weight, group.get("row_blocks", 1))
    _retract(optimizer, near=False)
    return optimizer.register_step_post_hook(lambda stepped, *_: _retract(stepped, near=True))


def _manifold(group: dict[str, Any]) -> str:
    return str(group.get("manifold", "none"))


def _check(weight: nn.Parameter, row_blocks: int) -> None:
    if weight.ndim != 2 or weight.dtype in HALF:
        raise ValueError(
            f"a manifold needs float32 matrices; a parameter is {weight.dtype} of shape {tuple(weight.shape)}"
        )
    if row_blocks < 1 or weight.size(0) % row_blocks:
        raise ValueError(f"row_blocks {row_blocks} do not divide {weight.size(0)} rows")


@torch.no_grad()
def _retract(optimizer: torch.optim.Optimizer, *, near: bool) -> None:
    for group in optimizer.param_groups:
        if _manifold(group) == "none" or (near and stands_still(group)):
            continue
        for weight in group["params"]:
            if near and weight.grad is None:
                continue
            with exact_products(weight.device):
                blocks = weight.view(group.get("row_blocks", 1), -1, weight.size(1))
                # How long a step was is not known; on a CPU the way back looks, elsewhere it copes.
                radius = NEAR if near else None
                blocks.copy_(retract(blocks, _manifold(group), method=group.get("retraction"), radius=radius))


def stands_still(group: dict[str, Any]) -> bool:
    """Whether the group's lr is known to be 0."""
    return not isinstance(group["lr"], Tensor) and group["lr"] == 0


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32: a Gram matrix that is wrong by 1e-3 would be taken for the weight's error."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        known = torch.amp.is_autocast_available(device.type)
        with torch.autocast(device.type, enabled=False) if known else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
