"""A limit on what a grid may take: what is spent, what a run will take, and which runs may begin.

Time is that of devices: seconds of GPUs, or of workers where a worker has no GPU. What a run has taken is
read from its summary or status in the store, so a relaunch knows it too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import model_validator

from mmsweep.placement import Need
from mmsweep.resources import Positive, Resources
from trainers.config import Section


class Budget(Section):
    """`budget:` of a grid file: GPU-hours, or money and the price of one."""

    gpu_hours: Positive | None = None
    """Of workers where a worker has no GPU."""
    cost: Positive | None = None
    price_per_hour: Positive | None = None
    """Of one GPU, in the unit of `cost`."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.gpu_hours is None) == (self.cost is None):
            raise ValueError("give gpu_hours, or cost with price_per_hour")
        if (self.cost is None) != (self.price_per_hour is None):
            raise ValueError("cost and price_per_hour go together")
        return self

    @property
    def hours(self) -> float:
        """Device-hours that may be spent."""
        if self.cost is not None and self.price_per_hour is not None:
            return self.cost / self.price_per_hour
        assert self.gpu_hours is not None
        return self.gpu_hours


def devices(resources: Resources) -> float:
    """What one run holds while it trains: the GPUs that Ray reserves for it, or workers that have none."""
    need = Need.of(resources)
    return need.nodes * need.gpus or float(resources.workers)


def unit(resources: Resources) -> str:
    return "GPU-hours" if resources.gpus_per_worker else "worker-hours"


def concurrent_runs(resources: Resources, rooms: Sequence[Mapping[str, float]]) -> int:
    """Runs that go at once on machines with this much room, as `Node.total` has it."""
    runs = Need.of(resources).most(rooms)
    return min(runs, resources.max_concurrent or runs)


def device_seconds(facts: Mapping[str, Any] | None, devices: float) -> float:
    """What all attempts of a run have taken, by its summary, or its status if it is not finished.

    Where it was not counted less is known: of a finished run the time in optimizer steps or that of its last
    attempt, whichever is longer; of another one the time of its last attempt.
    """
    if not facts:
        return 0.0
    if facts.get("device_seconds") is not None:
        return float(facts["device_seconds"])
    since = float(facts.get("started") or 0.0)
    until = float(facts.get("finished") or facts.get("updated") or since)
    return devices * max(until - since, float(facts.get("train_seconds") or 0.0), 0.0)


@dataclass(frozen=True, slots=True)
class Taken:
    """How far a run is, and at what price."""

    flops: float
    """Of the whole run."""
    done: float
    """Share of it that is trained, 0 to 1."""
    hours: float
    """Device-hours so far."""


def taken(flops: float, facts: Mapping[str, Any] | None, devices: float) -> Taken:
    """The same from a run's summary, or its status if it is not finished; None: it has not begun."""
    facts = facts or {}
    done, whole = ("steps", "horizon") if "horizon" in facts else ("step", "steps")
    share = facts.get(done, 0) / max(facts.get(whole, 0), 1)
    return Taken(flops, min(share, 1.0), device_seconds(facts, devices) / 3600)


class Prices:
    """What the rest of a run will take, at the prices of a FLOP so far."""

    def __init__(self, runs: Iterable[Taken]) -> None:
        rates: dict[float, list[float]] = {}
        for run in runs:
            if run.done > 0 and run.hours > 0:
                rates.setdefault(run.flops, []).append(run.hours / (run.flops * run.done))
        self._same = {flops: statistics.median(found) for flops, found in rates.items()}
        everything = [rate for found in rates.values() for rate in found]
        self._any = statistics.median(everything) if everything else None

    def rest(self, run: Taken) -> float | None:
        """Device-hours by the median of runs with as many FLOPs (other seeds), or of all; None: unknown."""
        rate = self._same.get(run.flops, self._any)
        return None if rate is None else rate * run.flops * (1 - run.done)


def admitted(budget: Budget, runs: Mapping[str, Taken], waiting: Iterable[str], *, at_once: int) -> list[str]:
    """The runs that may begin now, in the order in which they wait.

    One may begin if what is spent and what it and those before it will take is within the budget; one
    that is too dear holds back no cheaper one. Until a price is known, as many as go at once may.

    Args:
        runs: every run of the grid by its id.
        waiting: ids of those that are to train.
        at_once: how many the cluster has room for; at least 1 counts.
    """
    left = budget.hours - spent(runs)
    prices = Prices(runs.values())
    chosen: list[str] = []
    for run_id in waiting:
        wanted = prices.rest(runs[run_id])
        if wanted is None:
            if left > 0 and len(chosen) < max(at_once, 1):
                chosen.append(run_id)
        elif wanted <= left + 1e-9 * budget.hours:
            chosen.append(run_id)
            left -= wanted
    return chosen


def spent(runs: Mapping[str, Taken]) -> float:
    """Device-hours of all attempts of all runs."""
    return sum(run.hours for run in runs.values())


def of_budget(budget_hours: float, spent_hours: float, unit: str) -> str:
    """`41.2 of 40 GPU-hours`"""
    return f"{spent_hours:.3g} of {budget_hours:.3g} {unit}"
