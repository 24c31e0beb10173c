"""ManifoldMuon: Muon steps that keep weight matrices on a manifold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.clock import Span, no_span
from trainers.iterations import GPU_BATCH
from trainers.manifold import (
    DUAL_IMPLS,
    MANIFOLDS,
    METHODS,
    RETRACTIONS,
    SOLVERS,
    default_dtype,
    distance,
    retract,
    solve,
    spectral_norm,
    tangency_residual,
)
from trainers.manifold.msign import HALF, NEAR
from trainers.memory import keep_freed_memory
from trainers.retraction import exact_products, stands_still

UPDATE_SCALES = ("unit", "rows_over_cols")
_SOLVE_OPTIONS = (
    "solver", "dual_steps", "dual_alpha", "dual_impl", "polish", "exact_steps", "cg_steps",
    "msign_steps", "msign_dtype", "msign_method",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Telemetry:
    """One matrix in one step."""

    parameter: nn.Parameter
    block: int
    """Which of the parameter's `row_blocks`."""
    residual: float
    """`tangency_residual` of the direction A."""
    distance: float
    """Of the new W from its manifold; see `trainers.manifold.distance`."""
    direction_norm: float
    """‖A‖₂, 1 for a converged direction."""
    update_ratio: float
    """‖W' - W‖_F / ‖W‖_F."""


_STATISTICS = 4  # float fields of Telemetry


class ManifoldMuon(torch.optim.Optimizer):
    """One step of (Manifold) Muon per matrix (paper 2606.13276, Appendix A).

    ```
    buf = momentum*buf + grad ;  G = grad + momentum*buf
    W  *= 1 - lr*weight_decay
    W   = retract(W - lr * scale * solve(W, G, manifold))
    ```

    Matrices of one group and shape (up to transposition) are handled in batches. All options can be
    set per group. A step with lr 0 changes no weight.

    Args:
        params: 2-D parameters, or groups of them.
        lr: step size in units of the spectral norm: a step moves W by at most `lr * scale`. A float,
            or a 0-d tensor on the parameters' device, which a captured CUDA graph reads anew.
        momentum: Nesterov momentum.
        weight_decay: decoupled, applied before the retraction.
        manifold: `none`, `stiefel`, `dgram`, `oblique` or `spectral`.
        solver: `projected`, `exact`, `dual_ascent` or `plain`; see `trainers.manifold.solve`.
        retraction: None is the manifold's default; see `trainers.manifold.retract`.
        row_blocks: a parameter is this many matrices on top of one another, each on its own manifold:
            3 for a fused query-key-value weight, 3 * n_head for its heads.
        update_scale: `unit`, or `rows_over_cols`, √max(1, rows / cols).
        dual_steps, dual_alpha, dual_impl, polish, exact_steps, cg_steps: passed to `solve`.
        msign_method, msign_steps, msign_dtype: see `trainers.manifold.msign`. `msign_dtype` None is
            `default_dtype`: half precision where the device has matrix units for it.
        process_group: ranks that hold the same parameters and gradients, as after DDP's backward pass:
            each computes a share of the matrices, and all get the same bits. On a CPU these are the
            bits of a single process. True stands for the default group, None for no sharing.

    Raises:
        ValueError: a parameter that is not a matrix or that `row_blocks` does not divide, an unknown
            name, or a negative lr, momentum or weight decay.

    New weights are not on their manifold yet: call `retract_()` once before training, and again if you
    overwrite them. Half precision parameters get a float32 master copy, and momentum is float32 at least.
    Autocast and reduced float32 products (TF32) are switched off inside. On a CPU, glibc is asked to keep
    freed memory in the process; see `trainers.memory`.

    With `measure` set before a step, on every rank, that step leaves `telemetry()`. With `span` set to that
    of a `trainers.clock.Clock` its parts are timed: "solver", "retraction", "communication".
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        manifold: str = "none",
        solver: str = "projected",
        retraction: str | None = None,
        row_blocks: int = 1,
        update_scale: str = "unit",
        dual_steps: int = 20,
        dual_alpha: float = 0.1,
        dual_impl: str = "published",
        polish: bool = False,
        exact_steps: int | None = None,
        cg_steps: int = 16,
        msign_method: str = "gram",
        msign_steps: int | None = None,
        msign_dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | bool | None = None,
    ) -> None:
        defaults = {
            k: v for k, v in locals().items() if k not in ("self", "params", "process_group", "__class__")
        }
        self._forget()
        self._shares = _Shares(process_group) if process_group else None
        super().__init__(params, defaults)
        if self._device().type == "cpu":
            keep_freed_memory()

    def _forget(self) -> None:
        self.measure = False
        self.span: Span = no_span
        self._telemetry: list[tuple[_Item, Tensor]] = []
        self._plans: dict[tuple[Any, ...], list[_Item]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_shares": self._shares}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        self._shares = state.get("_shares", getattr(self, "_shares", None))
        for group in self.param_groups:  # of a state that an older version saved
            for name in self.defaults.keys() - {"differentiable"}:  # the base class' own
                group.setdefault(name, self.defaults[name])

    @torch.no_grad()
    def retract_(self) -> None:
        """Put every weight on its manifold, in place. Every rank does all of it."""
        for state in self.state.values():
            state.pop("master", None)
        with exact_products(self._device()):
            for item in self._items():
                W = self._gather(item, self._weight)
                group = item.group
                self._scatter(item, retract(W, group["manifold"], method=group["retraction"]))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. No number is read back from the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with exact_products(self._device()):
            self._update_momentum()
            items = [item for item in self._items(with_grad=True) if not stands_still(item.group)]
            self._telemetry = []
            if self._shares is None:
                for item in items:
                    self._finish(item, *self._update(item))
            else:
                self._shares.run(items, self._update, self._finish, measured=self.measure, span=self.span)
        return loss

    def telemetry(self) -> list[Telemetry]:
        """What the last step with `measure` set found, in the order of the groups; reads the device."""
        rows = {
            (id(parameter), block): Telemetry(parameter, block, *numbers)
            for item, statistics in self._telemetry
            for (parameter, block), numbers in zip(item.members, statistics.tolist(), strict=True)
        }
        order = ((id(p), b) for g in self.param_groups for p in g["params"] for b in range(g["row_blocks"]))
        return [rows[key] for key in order if key in rows]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise
        self._plans = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. (The base class would round float32 state of half precision
        parameters, and replace a learning rate that a captured graph reads.)"""
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, rate in zip(self.param_groups, rates, strict=True):
            if isinstance(rate, Tensor):
                group["lr"] = rate.copy_(torch.as_tensor(group["lr"]))
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for number, parameter in zip(numbers, self._parameters(), strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][key] = value.to(parameter.device, copy=True)
        self._plans = {}

    # --- one batch ---------------------------------------------------------------------------------

    def _update(self, item: _Item) -> tuple[Tensor, Tensor | None]:
        """New weights of a batch (B, m, n), and its telemetry (B, 4) if wanted."""
        group = item.group
        lr, manifold, decay = group["lr"], group["manifold"], group["weight_decay"]
        W = self._gather(item, self._weight)
        G = self._gather(item, lambda p: self._direction(p, group["momentum"]))
        options = {name: group[name] for name in _SOLVE_OPTIONS}
        dtype = options["msign_dtype"] = options["msign_dtype"] or default_dtype(W)
        with self.span("solver"):
            A = solve(W, G, manifold, **options)
        V = W * (1 - lr * decay) if decay else W
        V = V - (lr * item.scale) * A if isinstance(lr, Tensor) else torch.add(V, A, alpha=-lr * item.scale)
        # ‖A‖₂ <= 1, with two percent for rounding; W has norm 1 where the radius is read. A step size
        # on the device is not known here; the way back copes with a wrong radius.
        radius = NEAR if isinstance(lr, Tensor) else lr * (1.02 * item.scale + decay)
        coarse = dtype if dtype in HALF else None
        with self.span("retraction"):
            V = retract(V, manifold, method=group["retraction"], radius=radius, dtype=coarse)
        if isinstance(lr, Tensor):
            V = torch.where(lr == 0, W, V)
        return V, _statistics(W, V, A, manifold) if self.measure else None

    def _finish(self, item: _Item, W: Tensor, statistics: Tensor | None) -> None:
        self._scatter(item, W)
        if statistics is not None:
            self._telemetry.append((item, statistics))

    def _update_momentum(self) -> None:
        """`buf = momentum * buf + grad`, of all parameters on all ranks, so that a checkpoint of any one
        rank is complete."""
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            if not with_grad:
                continue
            for p in with_grad:
                if p.grad.is_sparse:
                    raise ValueError("ManifoldMuon needs dense gradients")
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=_wide(p.dtype))
            buffers = [self.state[p]["momentum_buffer"] for p in with_grad]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(
                buffers, [p.grad.to(b.dtype) for p, b in zip(with_grad, buffers, strict=True)]
            )

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov: `G = grad + momentum * buf`."""
        assert parameter.grad is not None
        buffer: Tensor = self.state[parameter]["momentum_buffer"]
        return torch.add(parameter.grad, buffer, alpha=momentum)

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        """The parameter, or its float32 master."""
        if parameter.dtype not in HALF:
            return parameter
        state = self.state[parameter]
        if "master" not in state:
            state["master"] = parameter.detach().float()
        master: Tensor = state["master"]
        return master

    def _gather(self, item: _Item, of: Callable[[nn.Parameter], Tensor]) -> Tensor:  # (B, m, n), m >= n
        blocks = [of(p).view(item.group["row_blocks"], -1, p.size(1))[block] for p, block in item.members]
        tall = [M.mT if M.size(0) < M.size(1) else M for M in blocks]
        return tall[0].unsqueeze(0) if len(tall) == 1 else torch.stack(tall)

    def _scatter(self, item: _Item, W: Tensor) -> None:
        for tall, (parameter, block) in zip(W, item.members, strict=True):
            for target in {self._weight(parameter), parameter}:
                rows = target.view(item.group["row_blocks"], -1, target.size(1))[block]
                rows.copy_(tall.mT if rows.size(0) < rows.size(1) else tall)

    # --- the division of work ----------------------------------------------------------------------

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for group in self.param_groups for p in group["params"])

    def _items(self, *, with_grad: bool = False) -> list[_Item]:
        """Batches of one group, shape and scale; the same on every rank and, on a CPU, for every number
        of ranks."""
        wanted = tuple(not with_grad or p.grad is not None for p in self._parameters())
        key = (wanted, tuple((group["row_blocks"], group["update_scale"]) for group in self.param_groups))
        if key not in self._plans:
            ranks = self._shares.size if self._shares else 1
            chosen = {p for p, use in zip(self._parameters(), wanted, strict=True) if use}
            self._plans[key] = [
                item for group in self.param_groups for item in _batches(group, chosen, ranks)
            ]
        return self._plans[key]

    def _device(self) -> torch.device:
        return next(self._parameters()).device


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """Matrices that are updated as one batch."""

    group: dict[str, Any]
    members: tuple[tuple[nn.Parameter, int], ...]
    """(parameter, block of rows)."""
    shape: tuple[int, int]
    """Of each, made tall."""
    scale: float

    @property
    def cost(self) -> float:
        """Arithmetic, in proportion."""
        m, n = self.shape
        rounds = {"dual_ascent": self.group["dual_steps"], "exact": 4}.get(self.group["solver"], 1)
        constrained = self.group["manifold"] not in ("none", "spectral")
        return len(self.members) * (2.0 * m * n * n + n**3) * (rounds if constrained else 1)

    @property
    def numel(self) -> int:
        return len(self.members) * self.shape[0] * self.shape[1]


def _batches(group: dict[str, Any], chosen: set[nn.Parameter], ranks: int) -> Iterator[_Item]:
    kinds: dict[tuple[int, int, float, torch.device, torch.dtype], list[tuple[nn.Parameter, int]]] = {}
    for parameter in group["params"]:
        if parameter not in chosen:
            continue
        rows, cols = parameter.size(0) // group["row_blocks"], parameter.size(1)
        scale = math.sqrt(max(1.0, rows / cols)) if group["update_scale"] == "rows_over_cols" else 1.0
        kind = (max(rows, cols), min(rows, cols), scale, parameter.device, parameter.dtype)
        members = kinds.setdefault(kind, [])
        members += [(parameter, block) for block in range(group["row_blocks"])]
    for (m, n, scale, device, _), members in kinds.items():
        if device.type == "cuda":
            size = max(1, min(math.ceil(len(members) / ranks), GPU_BATCH // (m * n)))
        else:  # batches pay for small matrices alone, and must not depend on the number of ranks
            size = max(1, min(4, 2**19 // (m * n)))
        for i in range(0, len(members), size):
            yield _Item(group, tuple(members[i : i + size]), (m, n), scale)


_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name before torch 2.13


class _Shares:
    """Divides batches over ranks by cost and exchanges the results, one exchange behind the next batch."""

    def __init__(self, process_group: dist.ProcessGroup | bool) -> None:
        self.group = None if isinstance(process_group, bool) else process_group
        self.rank = dist.get_rank(self.group)
        if self.rank < 0:
            raise ValueError("this process is not a member of the process_group")
        self.size = dist.get_world_size(self.group)

    def run(
        self,
        items: list[_Item],
        update: Callable[[_Item], tuple[Tensor, Tensor | None]],
        finish: Callable[[_Item, Tensor, Tensor | None], None],
        *,
        measured: bool,
        span: Span,
    ) -> None:
        """`update` this rank's items, `finish` everybody's; `measured` says that there is telemetry."""
        before: Callable[[], None] | None = None
        for turn in self.turns(items):
            mine = turn[self.rank]
            result = update(mine) if mine else None
            after = self._exchange(turn, result, finish, measured, span)
            if before:
                before()
            before = after
        if before:
            before()

    def turns(self, items: list[_Item]) -> list[list[_Item | None]]:
        """In each turn every rank has one item or none. The dearest item goes to the least busy rank, so
        items of a turn are of about one size; dtypes never mix in one turn."""
        turns: list[list[_Item | None]] = []
        costs = [0.0] * self.size
        for dtype in sorted({i.members[0][0].dtype for i in items}, key=str):
            lists: list[list[_Item]] = [[] for _ in range(self.size)]
            for item in sorted((i for i in items if i.members[0][0].dtype == dtype), key=lambda i: -i.cost):
                idle = costs.index(min(costs))
                lists[idle].append(item)
                costs[idle] += item.cost
            length = max(map(len, lists))
            turns += ([own[k] if k < len(own) else None for own in lists] for k in range(length))
        return turns

    def _exchange(
        self,
        turn: list[_Item | None],
        result: tuple[Tensor, Tensor | None] | None,
        finish: Callable[[_Item, Tensor, Tensor | None], None],
        measured: bool,
        span: Span,
    ) -> Callable[[], None]:
        """Start to gather a turn's weights, and telemetry after them; returns what waits and stores them."""
        some = next(item for item in turn if item)
        parameter = some.members[0][0]
        length = max(item.numel + _STATISTICS * len(item.members) for item in turn if item)
        sent = torch.zeros(length, dtype=_wide(parameter.dtype), device=parameter.device)
        if result:
            W, statistics = result
            sent[: W.numel()] = W.flatten()
            rest = sent[W.numel() :][: _STATISTICS * len(W)]
            rest.fill_(math.nan) if statistics is None else rest.copy_(statistics.flatten())
        received = torch.empty(self.size * length, dtype=sent.dtype, device=sent.device)
        work = _all_gather(received, sent, group=self.group, async_op=True)

        def store(_keep: Tensor = sent) -> None:  # the exchange reads it until it is waited for
            with span("communication"):
                work.wait()
            for item, part in zip(turn, received.view(self.size, length), strict=True):
                if item is None:
                    continue
                W = part[: item.numel].view(len(item.members), *item.shape)
                rest = part[item.numel :][: _STATISTICS * len(item.members)]
                finish(item, W, rest.view(-1, _STATISTICS).clone() if measured else None)

        return store


def _statistics(W: Tensor, V: Tensor, A: Tensor, manifold: str) -> Tensor:  # (B, m, n) thrice -> (B, 4)
    change, size = (torch.linalg.matrix_norm(X) for X in (V - W, W))
    direction = spectral_norm(A, squarings=10)
    return torch.stack(
        [tangency_residual(W, A, manifold), distance(V, manifold), direction, change / size], dim=-1
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


def _check_group(group: dict[str, Any]) -> None:
    for parameter in group["params"]:
        if parameter.ndim != 2:
            raise ValueError(f"ManifoldMuon needs matrices; a parameter has shape {tuple(parameter.shape)}")
        if group["row_blocks"] < 1 or parameter.size(0) % group["row_blocks"]:
            raise ValueError(f"row_blocks {group['row_blocks']} do not divide {parameter.size(0)} rows")
    for key, allowed in (
        ("manifold", MANIFOLDS),
        ("solver", SOLVERS),
        ("msign_method", METHODS),
        ("dual_impl", DUAL_IMPLS),
        ("update_scale", UPDATE_SCALES),
    ):
        if group[key] not in allowed:
            raise ValueError(f"unknown {key} {group[key]!r}; known: {', '.join(allowed)}")
    retractions = RETRACTIONS[group["manifold"]]
    if group["retraction"] is not None and group["retraction"] not in retractions:
        raise ValueError(
            f"manifold {group['manifold']!r} has no retraction {group['retraction']!r}; "
            f"it has: {', '.join(retractions) or 'none'}"
        )
    for key in ("lr", "momentum", "weight_decay"):
        if not isinstance(group[key], Tensor) and not 0 <= group[key] < math.inf:
            raise ValueError(f"{key} must not be negative or infinite, got {group[key]}")
    for key in ("dual_steps", "exact_steps", "msign_steps", "cg_steps"):
        if group[key] is not None and group[key] < 1:
            raise ValueError(f"{key} must be at least 1, got {group[key]}")
