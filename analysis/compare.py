"""Two grids side by side: what each arm gives in either, and the difference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.contrasts import Contrast, contrast, count
from analysis.load import Frames
from analysis.stats import clopper_pearson, holm, median
from analysis.tables import Text, bounds, p_cell, signed
from mmsweep.regrid import flat
from trainers.records import FINISHED


@dataclass(frozen=True, slots=True)
class Side:
    """The runs of an arm (and axis cell) in one grid."""

    planned: int
    runs: tuple[str, ...]
    """Finished ones."""
    median: float
    """Of final losses, diverged = +inf."""
    unstable: int
    judged: int


@dataclass(frozen=True, slots=True)
class Row:
    label: str
    left: Side
    right: Side
    difference: Contrast
    """Right minus left, paired by seed."""


def rows(left: Frames, right: Frames) -> list[Row]:
    """One per arm and cell of either grid. Cells match where the configs agree on the axes of both grids.

    Differences are exploratory, with Holm's adjustment over the rows.
    """
    axes = tuple(dict.fromkeys([*left.axes, *right.axes]))
    sides = [_by_cell(frames, axes) for frames in (left, right)]
    found = []
    for cell in dict.fromkeys([*sides[0], *sides[1]]):
        here, there = (
            side.get(cell, frames.runs.iloc[:0]) for side, frames in zip(sides, (left, right), strict=True)
        )
        name = " · ".join(
            [
                cell[0],
                *(f"{axis.rpartition('.')[2]}={value}" for axis, value in zip(axes, cell[1:], strict=True)),
            ]
        )
        found.append(Row(name, _side(here), _side(there), _difference(here, there)))
    adjusted = holm([row.difference.p for row in found])
    return [
        replace(row, difference=replace(row.difference, holm=p))
        for row, p in zip(found, adjusted, strict=True)
    ]


def _by_cell(frames: Frames, axes: tuple[str, ...]) -> dict[tuple[str, ...], pd.DataFrame]:
    keys = [
        (str(run["arm"]), *(_value(frames, run, axis) for axis in axes))
        for run in frames.runs.to_dict("records")
    ]
    runs = frames.runs.assign(cell=pd.Series(keys, index=frames.runs.index, dtype=object))
    return {cell: runs[runs["cell"] == cell] for cell in dict.fromkeys(keys)}


def _value(frames: Frames, run: Mapping[Any, Any], axis: str) -> str:
    """The run's value of an axis: its cell's, else what its config says."""
    value = run[axis] if axis in frames.axes else None
    if value is None:
        value = flat(frames.configs.get(run["run_id"], {}).get("config") or {}).get(axis, "–")
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _side(runs: pd.DataFrame) -> Side:
    done = runs[runs["status"].isin(FINISHED)]
    judged = done["unstable"].dropna().astype(bool)
    ids = tuple(done["run_id"].astype(str))
    return Side(len(runs), ids, median(done["final_val_loss"].tolist()), int(judged.sum()), len(judged))


def _difference(left: pd.DataFrame, right: pd.DataFrame) -> Contrast:
    """Pairs share the seed; the cell is the same already."""
    both = [runs.assign(family="") for runs in (right, left)]
    if left.empty or right.empty:
        return Contrast("", "", *(math.nan,) * 3, *(0,) * 5, math.nan, math.nan, "", ())
    return contrast(*both)


def frame(found: list[Row]) -> pd.DataFrame:
    """The rows as numbers; losses in nats per token."""
    columns = [
        f"{side}_{name}"
        for side in ("left", "right")
        for name in ("planned", "finished", "median", "unstable")
    ]
    columns = ["label", *columns, "difference", "low", "high", "pairs", "p", "holm"]
    values = [
        (
            row.label,
            *(v for s in (row.left, row.right) for v in (s.planned, len(s.runs), s.median, s.unstable)),
            *(row.difference.estimate, row.difference.low, row.difference.high),
            *(row.difference.pairs, row.difference.p, row.difference.holm),
        )
        for row in found
    ]
    return pd.DataFrame(values, columns=columns)


def text(found: list[Row], names: tuple[str, str]) -> Text:
    """The same as people read it. `names` are those of the grids."""
    columns = ["arm"]
    for name in names:
        columns += [f"{name}: runs", f"{name}: final, median", f"{name}: unstable"]
    columns += [f"{names[1]} − {names[0]}", "Holm p"]
    shown = tuple(
        (
            row.label,
            *_side_cells(row.left),
            *_side_cells(row.right),
            _difference_cell(row.difference),
            p_cell(row.difference.holm),
        )
        for row in found
    )
    notes = (
        "Losses: final validation loss, nats per token. Difference: mean over seeds that both grids "
        "finished, with its 95% t interval (n pairs). Holm p: paired t test, over the rows of this table. "
        "Exploratory: the grids may differ in more than their arms; a grid's runs are compared as they are.",
    )
    return Text(tuple(columns), shown, (True, *(False,) * (len(columns) - 1)), notes)


def _side_cells(side: Side) -> tuple[str, str, str]:
    loss = "–" if math.isnan(side.median) else "diverged" if side.median == math.inf else f"{side.median:.4f}"
    share = clopper_pearson(side.unstable, side.judged)
    unstable = f"{side.unstable}/{side.judged} [{share.low:.2f}, {share.high:.2f}]" if side.judged else "–"
    return f"{len(side.runs)}/{side.planned}", loss, unstable


def _difference_cell(found: Contrast) -> str:
    if not found.pairs:
        return "–"
    if len(set(found.runs)) == found.pairs:  # each pair is one run, which stands in both grids
        return "the same runs"
    lost = found.arm_lost + found.reference_lost
    more = f", {count(lost, 'seed')} with one diverged" if lost else ""
    return f"{signed(found.estimate)}{bounds(found.low, found.high)} ({found.pairs}{more})"
