"""Every run as a row of the page: where it stands, how it ended, and the details below it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.load import Frames
from mmsweep.regrid import flat
from trainers.config import RunConfig
from trainers.records import DIVERGED, FINISHED, PENDING, RUNNING

GOOD, BAD, BUSY, IDLE = "good", "bad", "busy", "idle"
"""How a status is painted; all that is neither finished, running nor pending needs somebody."""


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    key: float | str
    """What the column is sorted by."""
    word: bool = False
    small: str = ""
    """A second line."""


@dataclass(frozen=True, slots=True)
class Row:
    run_id: str
    arm: str
    status: str
    paint: str
    cells: tuple[Cell, ...]
    """One per column after the run's id."""
    axes: Mapping[str, str]
    details: tuple[tuple[str, tuple[str, ...]], ...]
    folder: str
    """Link to the run's folder from the page; "" where the store is no folder."""


def paint(status: str) -> str:
    """The colour class of a status."""
    known = {PENDING: IDLE, RUNNING: BUSY, DIVERGED: BAD} | {s: GOOD for s in FINISHED if s != DIVERGED}
    return known.get(status, "failed")


def columns(parts: Sequence[Frames]) -> list[tuple[str, bool]]:
    """Heads of `Row.cells`, and whether they are words."""
    grid = [("grid", True)] if len(parts) > 1 else []
    axes = [(axis, False) for axis in axes_of(parts)]
    return [("arm", True), *grid, *axes, ("seed", False), ("status", True), ("step", False), *_OUTCOME]


_OUTCOME = (("final loss", False), ("best loss", False), ("rules that fired: (last good, first bad]", True))


def axes_of(parts: Sequence[Frames]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(axis for frames in parts for axis in frames.axes))


def choices(rows: Sequence[Row]) -> list[tuple[str, str, tuple[str, ...]]]:
    """What the table can be filtered by: key, name, and the values that there are."""
    facts = [{"arm": row.arm, "status": row.status, **row.axes} for row in rows]
    return [
        (key, key.rpartition(".")[2], tuple(dict.fromkeys(fact[key] for fact in facts)))
        for key in (facts[0] if facts else ())
    ]


def rows(parts: Sequence[Frames], page: Path) -> list[Row]:
    """Each run once, in the order of the grids. `page` is where the links start."""
    grids: dict[str, list[str]] = {}
    for frames in parts:
        for run_id, grid in zip(frames.runs["run_id"], frames.runs["grid"], strict=True):
            grids.setdefault(run_id, []).append(grid or "none")
    axes, same = axes_of(parts), _in_common(parts)
    found: dict[str, Row] = {}
    for frames in parts:
        for run in frames.runs.to_dict("records"):
            if run["run_id"] not in found:
                names = ", ".join(dict.fromkeys(grids[run["run_id"]])) if len(parts) > 1 else ""
                found[run["run_id"]] = _row(frames, run, axes, names, same, page)
    return list(found.values())


def _row(
    frames: Frames,
    run: Mapping[Any, Any],
    axes: Sequence[str],
    grids: str,
    same: Mapping[str, Any],
    page: Path,
) -> Row:
    values = {axis: plain(run[axis]) if axis in frames.axes else "–" for axis in axes}
    horizon = "" if pd.isna(run["horizon"]) else f" / {run['horizon']:,}"
    finished = run["status"] in FINISHED
    loss = run["final_val_loss"] if finished else run["last_val_loss"]
    judged = not pd.isna(run["unstable"])
    rules = (run["rules"] or "none") if judged else "–"
    cells = (
        Cell(run["arm"], run["arm"], word=True),
        *([Cell(grids, grids, word=True)] if grids else []),
        *(Cell(values[axis], run[axis] if axis in frames.axes else "") for axis in axes),
        Cell(str(run["seed"]), run["seed"]),
        Cell(str(run["status"]), run["status"], word=True, small=str(run["reason"])),
        Cell(f"{run['step']:,}{horizon}", run["step"]),
        Cell(_loss(loss) + ("" if finished or pd.isna(loss) else " so far"), loss),
        Cell(_loss(run["best_val_loss"]), run["best_val_loss"]),
        Cell(rules, "" if rules in ("none", "–") else rules, word=True),
    )
    url = frames.urls.get(run["run_id"], "")
    return Row(
        str(run["run_id"]),
        str(run["arm"]),
        str(run["status"]),
        paint(str(run["status"])),
        cells,
        values,
        tuple(_details(frames, run, same)),
        Path(os.path.relpath(url, page)).as_posix() + "/" if url and "://" not in url else "",
    )


def _details(
    frames: Frames, run: Mapping[Any, Any], same: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What one wants to know of a run, where it is known. `same` is what all runs have in common."""
    finished = run["status"] in FINISHED
    config = frames.configs.get(run["run_id"], {})
    provenance = flat(config.get("provenance") or {})
    state = frames.states.get(run["run_id"], {})
    facts = {
        "reason": [str(run["reason"])] if run["reason"] else [],
        "spike scores": _spike_scores(frames, run["run_id"]),
        "attempts": [str(run["attempts"])] if run["attempts"] > 1 else [],
        "failures": _failures(state.get("failures")),
        "last lines": [str(line) for line in _listed(state.get("log_tail"))] if not finished else [],
        "not the default": [
            f"{path} = {plain(v)}" for path, v in unusual(config.get("config") or {}).items()
        ],
        "not as in other runs": [f"{p} = {plain(v)}" for p, v in provenance.items() if same.get(p) != v],
        "records": [frames.urls[run["run_id"]]] if run["run_id"] in frames.urls else [],
    }
    return ((name, tuple(values)) for name, values in facts.items() if values)


def _spike_scores(frames: Frames, run_id: str) -> list[str]:
    """Shares of the run's steps that are spikes, where it has steps enough to tell. They judge nothing."""
    found = frames.stepwise[frames.stepwise["run_id"] == run_id].dropna(subset=["olmo2", "olmo_core"])
    names = {"loss": "loss", "gradient": "gradient norm"}
    shares = (100 * found[["olmo2", "olmo_core"]]).to_numpy()
    return [
        f"{names[quantity]}: {olmo2:.3g}% (OLMo 2), {olmo_core:.3g}% (OLMo-core)"
        for quantity, (olmo2, olmo_core) in zip(found["quantity"], shares, strict=True)
    ]


def _failures(history: Any) -> list[str]:
    """Of the attempts that did not finish, as `status.json` lists them."""
    return [
        f"attempt {one.get('attempt', '?')}, step {one.get('step', '?')}: {one.get('kind', 'failed')}"
        + f" ({one['reason']})" * bool(one.get("reason"))
        for one in _listed(history)
        if isinstance(one, Mapping)
    ]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _in_common(parts: Sequence[Frames]) -> dict[str, Any]:
    """Provenance that is the same for all runs."""
    every = [flat(config.get("provenance") or {}) for frames in parts for config in frames.configs.values()]
    first = every[0] if every else {}
    return {path: value for path, value in first.items() if all(other.get(path) == value for other in every)}


_DEFAULTS = flat(RunConfig().model_dump(mode="json"))


def unusual(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a run's config that differ from the defaults, as dotted paths; arm and seed aside."""
    found = flat(config)
    return {
        p: v
        for p, v in found.items()
        if p not in ("arm", "seed") and (p not in _DEFAULTS or _DEFAULTS[p] != v)
    }


def plain(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "–"}[value]
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:g}"
    return str(value)


def _loss(value: float) -> str:
    return "–" if pd.isna(value) else "not finite" if value == math.inf else f"{value:.4f}"
