"""Speed of a run, and where the time of a step goes."""

from __future__ import annotations

import math

import torch

from trainers.clock import Clock
from trainers.config import RunConfig
from trainers.devices import device_name, peak, peak_memory
from trainers.flops import cost
from trainers.records import CostRecord


class Costs:
    """Times single steps, and counts all of them."""

    def __init__(self, run: RunConfig, device: torch.device, world_size: int) -> None:
        self.clock = Clock(device)
        self._device = device
        self._tokens_per_step = run.tokens_per_step
        self._model_flops = cost(run).model_step
        known = peak(device_name(device))
        rate = math.nan if known is None else getattr(known, run.precision)
        self._peak = rate * world_size
        self._steps = 0
        self._seconds = 0.0

    def count(self, steps: int, seconds: float) -> None:
        self._steps += steps
        self._seconds += seconds

    def record(self, run_id: str, attempt: int, step: int) -> CostRecord:
        """The last timed step, and the speed since the last record."""
        spans = self.clock.totals()
        rate = self._steps / self._seconds
        self._steps, self._seconds = 0, 0.0
        return CostRecord(
            run=run_id,
            attempt=attempt,
            step=step,
            tokens_per_s=rate * self._tokens_per_step,
            flop_utilisation=rate * self._model_flops / self._peak,
            step_ms=spans["forward_backward"] + spans["update"],
            forward_backward_ms=spans["forward_backward"],
            solver_ms=spans.get("solver", 0.0),
            retraction_ms=spans.get("retraction", 0.0),
            communication_ms=spans.get("communication", 0.0),
            peak_memory=peak_memory(self._device),
        )
