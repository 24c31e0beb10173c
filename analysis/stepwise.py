"""What takes every step of a run: the alarms of the loss and of the gradient norm, spike scores and spreads.

Of every k-th step, which is what a frame of many steps holds, they would be other numbers. `analysis.load`
takes them before it thins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.stats import (
    OLMO_CORE_SIGMAS,
    OLMO_CORE_WINDOW,
    rises,
    spike_score,
    spike_window,
    spikes,
    spread,
)
from trainers.config import StabilityConfig

STEPWISE_DTYPES = {
    "run_id": "string",
    "quantity": "string",  # loss or gradient, as `mechanism.QUANTITIES` calls them
    "crossed": "bool",
    "after": "int64",
    "step": "int64",
    "value": "float64",
    "records": "int64",
    "olmo2": "float64",
    "olmo_core": "float64",
    "spread": "float64",
}
LOSS_RISE = StabilityConfig().spike_rise
"""Nats above the lowest loss so far that are an alarm: the hard-spike rule's, on single steps."""

Floats = np.ndarray[Any, np.dtype[np.float64]]
Steps = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def stepwise(steps: Steps, losses: Floats, norms: Floats, horizon: int) -> tuple[dict[str, Any], ...]:
    """A row for the loss and one for the gradient norm, with the columns of `STEPWISE_DTYPES` but the run.

    `crossed` to `records`: see `first_crossing`; of the loss by `rises`, of the gradient norm by `spikes`.
    `olmo2`, `olmo_core`: shares of the steps that are spikes, by the thresholds and windows of OLMo 2 and
    of OLMo-core; see `spike_score`. `spread`: of the loss (nats) and of ln gradient norm, over the steps
    after a tenth of the horizon.
    """
    later = steps > horizon / 10
    later_norms = norms[later]
    wide, narrow = spike_window(horizon), spike_window(horizon, OLMO_CORE_WINDOW)
    rows = []
    for quantity, values, calm in (
        ("loss", losses, losses[later]),
        ("gradient", norms, np.log(later_norms[later_norms > 0])),
    ):
        far = spikes(values, window=wide)
        near = spikes(values, window=narrow, sigmas=OLMO_CORE_SIGMAS)
        alarm = rises(values, LOSS_RISE) if quantity == "loss" else far
        scores = {"olmo2": spike_score(values, far, wide), "olmo_core": spike_score(values, near, narrow)}
        first = first_crossing(steps, values, alarm)
        rows.append({"quantity": quantity, **first, **scores, "spread": spread(calm)})
    return tuple(rows)


def stepwise_frame(rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> pd.DataFrame:
    """The rows of `stepwise`, by run, as one frame."""
    both = [{"run_id": run_id, **row} for run_id, own in rows.items() for row in own]
    return pd.DataFrame(both, columns=list(STEPWISE_DTYPES)).astype(STEPWISE_DTYPES)


def first_crossing(steps: Steps, values: Floats, out: Flags) -> dict[str, Any]:
    """Where a series first leaves its bounds; `out` says which of its records are beyond them.

    Where `crossed`, that is in `(after, step]` and `value` is the one at `step`; `after` is 0 where the
    first record is out already. Else within bounds up to `step`, the last of so many `records`.
    """
    hit = int(out.argmax()) if out.any() else -1
    return {
        "crossed": hit >= 0,
        "after": int(steps[hit - 1]) if hit > 0 else 0 if hit == 0 else int(steps[-1]),
        "step": int(steps[hit]),
        "value": float(values[hit]),
        "records": len(steps),
    }
