"""How much the final loss depends on a learning rate that a grid varies."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.load import Frames
from analysis.stats import lr_sensitivity
from trainers.errors import InputError, did_you_mean
from trainers.records import FINISHED

RATES = ("lr", "lr_multiplier")
"""Last parts of the config paths that are learning rates, or factors of one."""


def rate_axes(frames: Frames) -> tuple[str, ...]:
    """The axes of the grid that are learning rates."""
    return tuple(path for path in frames.axes if path.rpartition(".")[2] in RATES)


def table(frames: Frames, axis: str | None = None, *, within: float = 4.0) -> pd.DataFrame:
    """One row per arm and cell of the other axes: the best rate, and what another rate costs.

    Rates are in the unit of the axis, losses in nats per token, over finished runs: `best_loss` is the
    median over the seeds of the best rate, a diverged run being +inf; `spread` is the largest minus the
    smallest such median within a factor `within` of the best rate; `diverged` counts the rates whose
    median is infinite, with the 95% Clopper–Pearson interval of their share. See `stats.lr_sensitivity`.

    Args:
        axis: the path of the rate; where None, the one there is.

    Raises:
        InputError: the grid has no such axis, or several rates and none is named.
    """
    known = rate_axes(frames)
    if axis is None and len(known) == 1:
        axis = known[0]
    if axis is None:
        found = (
            f"name one of {', '.join(known)}" if known else "add one, as in axes: {optimizer.muon.lr: [...]}"
        )
        raise InputError(f"{frames.grid or frames.store}: {len(known)} axes are learning rates; {found}")
    if axis not in frames.axes or not pd.api.types.is_float_dtype(frames.runs[axis].dtype):
        raise InputError(
            f'{frames.grid or frames.store}: no axis "{axis}" of numbers{did_you_mean(axis, known)}'
        )
    others = [path for path in frames.axes if path != axis]
    rows = []
    for cell, runs in frames.runs.groupby(["grid", "arm", *others], sort=False, dropna=False):
        finished = runs[runs["status"].isin(FINISHED)].dropna(subset=[axis, "final_val_loss"])
        if not finished.empty:
            keys = dict(zip(("grid", "arm", *others), cell, strict=True))
            rows.append(keys | {"axis": axis} | _row(finished, axis, within))
    return pd.DataFrame(rows, columns=[*("grid", "arm"), *others, "axis", *_COLUMNS])


_COLUMNS = (
    *("best_lr", "best_loss", "at_edge", "spread", "n_around"),
    *("rates", "rates_diverged", "diverged", "diverged_low", "diverged_high", "n_runs", "run_ids"),
)


def _row(runs: pd.DataFrame, axis: str, within: float) -> dict[str, Any]:
    found = lr_sensitivity(
        zip(runs[axis].tolist(), runs["final_val_loss"].tolist(), strict=True), within=within
    )
    share = found.diverged
    values = (
        *(found.best_lr, found.best_loss, found.at_edge, found.spread, found.n_around),
        *(share.n, round(share.estimate * share.n), share.estimate, share.low, share.high),
        *(len(runs), " ".join(runs["run_id"])),
    )
    return dict(zip(_COLUMNS, values, strict=True))
