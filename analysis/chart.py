"""What the page's chart is drawn from: curves of every run, thinned so that no spike is lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.figures.drawing import state_of
from analysis.load import Frames
from analysis.theme import VARIANTS, arm_styles

MOST_POINTS = 400
"""Of a curve; longer ones become the mean, the lowest and the highest value of as many stretches."""
FEWEST_POINTS = 40
ALL_POINTS = 40_000
"""Of all curves of one metric, as far as FEWEST_POINTS allow: what keeps a page of 1,000 runs small."""
_DASHES = ("", "7 2 1.5 2", "1.5 2", "7 1.5 1.5 1.5 1.5 1.5")
assert len(_DASHES) == len(VARIANTS)


@dataclass(frozen=True, slots=True)
class Metric:
    """One thing that the chart can show. `values`: run_id, step, value, and the extremes low and high."""

    name: str
    words: str
    unit: str
    values: pd.DataFrame


def metrics(frames: Frames) -> list[Metric]:
    """Those that the runs have recorded, the validation loss first."""
    heads, spectra = frames.attention, frames.spectra
    sigma = {
        kind: _reduced(spectra[spectra["module"] == kind], "sigma_max", "max") for kind in ("attn", "mlp")
    }
    known = [
        Metric("val_loss", "Validation loss", "nats per token", _plain(frames.evals, "val_loss")),
        Metric(
            "train_loss",
            "Loss of the step's batch",
            "nats per token",
            _plain(frames.steps, "loss", "loss_min", "loss_max"),
        ),
        Metric(
            "grad_norm",
            "Gradient norm",
            "before the clip",
            _plain(frames.steps, "grad_norm", "grad_norm_min", "grad_norm_max"),
        ),
        Metric("attn_sigma", "Attention: largest singular value", "of any matrix", sigma["attn"]),
        Metric("mlp_sigma", "MLP: largest singular value", "of any matrix", sigma["mlp"]),
        Metric("max_logit", "Largest attention logit", "of any head", _reduced(heads, "max_logit", "max")),
        Metric(
            "entropy",
            "Attention entropy",
            "H / log of tokens seen, mean of heads",
            _reduced(heads, "entropy", "mean"),
        ),
    ]
    return [metric for metric in known if len(metric.values)]


def _plain(long: pd.DataFrame, column: str, low: str = "", high: str = "") -> pd.DataFrame:
    """`low` and `high`: columns with the extremes between rows, where the frame has them."""
    found = long[["run_id", "step"]].assign(value=long[column])
    return found.assign(low=long.get(low, long[column]), high=long.get(high, long[column]))


def _reduced(long: pd.DataFrame, column: str, how: str) -> pd.DataFrame:
    """One value a run and step."""
    values = long.groupby(["run_id", "step"], observed=True, sort=False)[column].agg(how)
    return _plain(values.reset_index(), column)


def data(parts: Sequence[Frames]) -> dict[str, Any]:
    """For `report.js`: labels, runs and curves of one grid or several, as plain JSON.

    A curve is [index into `steps`, values] or, where it is thinned, with the lowest and the highest value
    of each stretch, which is named by its last step. Values that are not finite are null.
    """
    shown = list(dict.fromkeys(run_id for frames in parts for run_id in frames.runs["run_id"]))
    labels = _labels(parts)
    runs: dict[str, dict[str, Any]] = {}
    for which, frames in enumerate(parts):
        for run in frames.runs.drop_duplicates("run_id").to_dict("records"):
            place = next(i for i, label in enumerate(labels) if label["of"] == (which, run["label"]))
            runs.setdefault(run["run_id"], _run(run, place))
    curves: dict[str, dict[str, Any]] = {}
    steps: dict[tuple[int, ...], int] = {}
    for frames in parts:
        points = max(FEWEST_POINTS, min(MOST_POINTS, ALL_POINTS // max(len(shown), 1)))
        for metric in metrics(frames):
            facts = {"words": metric.words, "unit": metric.unit, "runs": {}}
            curves.setdefault(metric.name, facts)["runs"] |= _curves(metric.values, points, steps)
    for label in labels:
        del label["of"]
    return {
        "labels": labels,
        "runs": list(runs.values()),
        "steps": [list(s) for s in steps],
        "metrics": curves,
    }


def _labels(parts: Sequence[Frames]) -> list[dict[str, Any]]:
    """Name and look of every arm and axis cell. Of several grids, the later ones are dashed."""
    found = []
    for which, frames in enumerate(parts):
        styles, variants = arm_styles(frames.arms), dict.fromkeys(frames.arms, which)
        for label, runs in frames.runs.groupby("label", sort=False):
            arm = str(runs["arm"].iloc[0])
            line = next((i for i, v in enumerate(VARIANTS) if v == styles[arm].line), 0)
            name = f"{label} · {frames.grid}" if len(parts) > 1 else str(label)
            dash = _DASHES[(line + variants[arm]) % len(_DASHES)]
            found.append({"name": name, "colour": styles[arm].colour, "dash": dash, "of": (which, label)})
            variants[arm] += 1
    return found


def _run(run: Mapping[Any, Any], label: int) -> dict[str, Any]:
    bad = None if pd.isna(run["first_bad"]) else int(run["first_bad"])
    state = state_of(run["status"], run["final_val_loss"])
    return {"id": str(run["run_id"]), "label": label, "seed": int(run["seed"]), "bad": bad, "state": state}


def _curves(long: pd.DataFrame, points: int, steps: dict[tuple[int, ...], int]) -> dict[str, list[Any]]:
    """By run. `steps` collects the distinct sequences of steps, which most curves share."""
    found = {}
    for run_id, curve in long.groupby("run_id", sort=False, observed=True):
        at, rows = thinned(
            curve["step"].to_numpy(), curve[["value", "low", "high"]].to_numpy(float).T, points
        )
        place = steps.setdefault(tuple(at.tolist()), len(steps))
        found[str(run_id)] = [place, *([_number(v) for v in row] for row in rows.tolist())]
    return found


Array = np.ndarray[Any, Any]


def thinned(steps: Array, rows: Array, points: int) -> tuple[Array, Array]:
    """A curve of at most `points` + 1 points, and their steps.

    `rows`: value, lowest and highest at each of the ascending `steps`. Where there are more, they become
    those of equal stretches, each named by its end: mean, lowest and highest of the finite values. Only
    the values are given back where lowest and highest say the same.
    """
    if len(steps) > points:
        width = math.ceil(int(steps[-1]) / points)
        ends, first = np.unique(-(-steps // width), return_index=True)
        finite = np.isfinite(rows)
        value, low, high = rows
        total = np.add.reduceat(np.where(finite[0], value, 0.0), first)
        with np.errstate(invalid="ignore"):
            mean = total / np.add.reduceat(finite[0], first, dtype=int)
        lowest = np.minimum.reduceat(np.where(finite[1], low, math.inf), first)
        highest = np.maximum.reduceat(np.where(finite[2], high, -math.inf), first)
        steps, rows = np.minimum(ends * width, steps[-1]), np.stack([mean, lowest, highest])
    same = np.array_equal(rows[0], rows[1], equal_nan=True) and np.array_equal(
        rows[0], rows[2], equal_nan=True
    )
    return steps, rows[:1] if same else rows


def _number(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None
