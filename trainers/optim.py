"""ManifoldMuon: Muon steps that keep weight matrices on a manifold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainers.manifold import MANIFOLDS, RETRACTIONS, SOLVERS, retract, solve


class ManifoldMuon(torch.optim.Optimizer):
    """One step of (Manifold) Muon per matrix (paper 2606.13276, Appendix A).

    ```
    buf = momentum*buf + grad ;  G = grad + momentum*buf
    W  *= 1 - lr*weight_decay
    W   = retract(W - lr * solve(W, G, manifold))
    ```

    Matrices of one group and shape (up to transposition) are handled as one batch.

    Args:
        params: 2-D parameters, or groups of them; a group may set `manifold`, `solver`,
            `retraction`, `lr`, `momentum`, `weight_decay`.
        lr: step size in units of the spectral norm: a step moves W by at most `lr`.
        momentum: Nesterov momentum.
        weight_decay: decoupled, applied before the retraction.
        manifold: `none`, `stiefel`, `dgram` or `oblique`.
        solver: `projected` or `dual_ascent`; see `trainers.manifold.solve`.
        retraction: None is the manifold's default; see `trainers.manifold.retract`.
        dual_steps, dual_alpha, polish, msign_steps, msign_dtype: passed to `solve`.

    Raises:
        ValueError: a parameter that is not a matrix, an unknown manifold, solver or retraction,
            or a negative lr, momentum or weight decay.

    New weights are not on their manifold yet: call `retract_()` once before training.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        manifold: str = "none",
        solver: str = "projected",
        retraction: str | None = None,
        dual_steps: int = 20,
        dual_alpha: float = 0.1,
        polish: bool = False,
        msign_steps: int = 10,
        msign_dtype: torch.dtype | None = None,
    ) -> None:
        self.solve_options: dict[str, Any] = {
            "dual_steps": dual_steps,
            "dual_alpha": dual_alpha,
            "polish": polish,
            "msign_steps": msign_steps,
            "msign_dtype": msign_dtype,
        }
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "manifold": manifold,
            "solver": solver,
            "retraction": retraction,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            _check_group(group)

    @torch.no_grad()
    def retract_(self) -> None:
        """Put every weight on its manifold, in place."""
        for group in self.param_groups:
            for batch in _same_shape(group["params"]):
                W = _stack(batch)
                _unstack(retract(W, group["manifold"], method=group["retraction"]), batch)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            for batch in _same_shape(with_grad):
                self._update(batch, group)
        return loss

    def _update(self, batch: list[nn.Parameter], group: dict[str, Any]) -> None:
        lr, manifold = group["lr"], group["manifold"]
        W = _stack(batch)
        G = _stack([self._direction(p, group["momentum"]) for p in batch])
        A = solve(W, G, manifold, solver=group["solver"], **self.solve_options)
        if group["weight_decay"]:
            W = W * (1 - lr * group["weight_decay"])
        # ‖A‖₂ <= 1, with a percent for rounding; W has norm 1 where the radius is read.
        radius = 1.01 * lr + lr * group["weight_decay"]
        W = retract(W - lr * A, manifold, method=group["retraction"], radius=radius)
        _unstack(W, batch)

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov: `G = grad + momentum * buf` after `buf = momentum * buf + grad`."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        buffer.mul_(momentum).add_(parameter.grad)
        return parameter.grad.add(buffer, alpha=momentum)


def _check_group(group: dict[str, Any]) -> None:
    for parameter in group["params"]:
        if parameter.ndim != 2:
            raise ValueError(f"ManifoldMuon needs matrices; a parameter has shape {tuple(parameter.shape)}")
    for key, allowed in (("manifold", MANIFOLDS), ("solver", SOLVERS)):
        if group[key] not in allowed:
            raise ValueError(f"unknown {key} {group[key]!r}; known: {', '.join(allowed)}")
    retractions = RETRACTIONS[group["manifold"]]
    if group["retraction"] is not None and group["retraction"] not in retractions:
        raise ValueError(
            f"manifold {group['manifold']!r} has no retraction {group['retraction']!r}; "
            f"it has: {', '.join(retractions) or 'none'}"
        )
    for key in ("lr", "momentum", "weight_decay"):
        if group[key] < 0:
            raise ValueError(f"{key} must not be negative, got {group[key]}")


def _same_shape(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in batches of one shape up to transposition, in order of first appearance."""
    batches: dict[tuple[int, int], list[nn.Parameter]] = {}
    for parameter in parameters:
        m, n = parameter.shape
        batches.setdefault((max(m, n), min(m, n)), []).append(parameter)
    return list(batches.values())


def _stack(matrices: list[nn.Parameter] | list[Tensor]) -> Tensor:  # -> (B, m, n), m >= n
    return torch.stack([M.mT if M.size(0) < M.size(1) else M for M in matrices])


def _unstack(W: Tensor, parameters: list[nn.Parameter]) -> None:
    for tall, parameter in zip(W, parameters, strict=True):
        parameter.copy_(tall.mT if parameter.size(0) < parameter.size(1) else tall)
