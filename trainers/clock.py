"""Where the time of a step goes, on the device's own clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

Span = Callable[[str], AbstractContextManager[None]]
"""What a part of the step calls to have itself timed: `with span("solver"): …`."""


def no_span(_name: str) -> AbstractContextManager[None]:
    """A Span that times nothing."""
    return nullcontext()


class Clock:
    """Named spans of time. On CUDA they are events in the stream, so that nothing waits before `totals`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        begun = self._now()
        yield
        self._spans.append((name, begun, self._now()))

    def totals(self) -> dict[str, float]:
        """Milliseconds by name since the last call; waits for the device."""
        sums: dict[str, float] = {}
        for name, begun, ended in self._spans:
            if isinstance(begun, torch.cuda.Event):
                ended.synchronize()  # type: ignore[union-attr]
                span = begun.elapsed_time(ended)  # type: ignore[arg-type]
            else:
                span = (ended - begun) * 1e3  # type: ignore[operator]
            sums[name] = sums.get(name, 0.0) + span
        self._spans.clear()
        return sums

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
