"""T2: what a run of each arm costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.load import Frames
from analysis.stats import paired_t
from analysis.tables.cells import Text, arm_cells, bounded_cell, number_cell, three_digits
from trainers.records import FINISHED

_COSTS = {
    "tokens_per_s": "tokens_per_s",
    "flop_utilisation": "flop_utilisation",
    "step_ms": "step_ms",
    "forward_backward_ms": "forward_backward_ms",
    "solver_ms": "solver_ms",
    "retraction_ms": "retraction_ms",
    "communication_ms": "communication_ms",
}
"""Columns of T2 by field of the records."""


def t2(frames: Frames) -> pd.DataFrame:
    """T2: what a run of each arm (and axis cell) costs, in the order of the grid.

    Medians over the `n_costs` runs that recorded costs, of the medians over a run's records: tokens per
    second of all workers, share of the devices' peak FLOPs (MFU), milliseconds of a step and of its parts
    (`other_ms` is the rest), `peak_memory_gib`. `train_hours`: time in optimizer steps of a finished run,
    `device_hours` that times its workers. `relative_speed`: tokens per second over those of arm
    `unconstrained` with the same seed and cell, the geometric mean over `n_pairs` pairs with its 95% t
    interval (of the logarithm).
    TFLOP of a step from the config: the model's (forward and backward), and the optimizer's.
    """
    runs = frames.runs.drop_duplicates("run_id").set_index("run_id")
    values = frames.costs.groupby("run_id")[list(_COSTS)].median().reindex(runs.index)
    parts = ["forward_backward_ms", "solver_ms", "retraction_ms", "communication_ms"]
    values["other_ms"] = values["step_ms"] - values[parts].sum(axis=1, min_count=1)
    values["peak_memory_gib"] = frames.costs.groupby("run_id")["peak_memory"].max() / 2**30
    hours = _train_hours(frames).where(runs["status"].isin(FINISHED))
    facts = {r: frames.configs[r].get("provenance") or {} for r in runs.index if r in frames.configs}
    workers = pd.Series({r: f.get("world_size") or 1 for r, f in facts.items()}, dtype=float)
    values["train_hours"], values["device_hours"] = hours, hours * workers
    for column, key in (
        ("model_tflop", "model_flops_per_step"),
        ("optimizer_tflop", "optimizer_flops_per_step"),
    ):
        flops = pd.Series({r: f.get(key) for r, f in facts.items()}, dtype=float)
        values[f"{column}_per_step"] = flops / 1e12
    speed = runs[["family", "seed", "arm"]].assign(speed=values["tokens_per_s"]).reset_index()
    rows = []
    for label, group in frames.runs.groupby("label", sort=False):
        ids = group["run_id"].tolist()
        known = [r for r in ids if not math.isnan(values["step_ms"].get(r, math.nan))]
        devices = dict.fromkeys(str(facts[r].get("device") or "") for r in ids if r in facts)
        rows.append(
            {"arm": str(group["arm"].iloc[0]), "label": str(label), "n_costs": len(known)}
            | {axis: group[axis].iloc[0] for axis in frames.axes}
            | {"devices": "; ".join(filter(None, devices))}
            | values.loc[ids].median().to_dict()
            | _relative(speed, ids)
            | {"run_ids": " ".join(known)}
        )
    return pd.DataFrame(rows)


def _train_hours(frames: Frames) -> pd.Series[float]:
    """By run: what its summary says, else the sum over its steps."""
    summed = frames.steps.groupby("run_id")["step_ms"].sum() * frames.stride / 3.6e6
    said = {r: s["train_seconds"] / 3600 for r, s in frames.states.items() if s.get("train_seconds")}
    ids = frames.runs["run_id"].unique()
    return pd.Series(said, dtype=float).reindex(ids).fillna(summed.reindex(ids))


def _relative(speed: pd.DataFrame, ids: Sequence[str]) -> dict[str, Any]:
    own = speed[speed["run_id"].isin(ids) & (speed["arm"] != "unconstrained")]
    both = own.merge(speed[speed["arm"] == "unconstrained"], on=["family", "seed"])
    ratios = np.log((both["speed_x"] / both["speed_y"]).dropna())
    found = paired_t([float(r) for r in ratios if math.isfinite(r)])
    bounds = {"relative_speed_low": math.exp(found.low), "relative_speed_high": math.exp(found.high)}
    return {"relative_speed": math.exp(found.estimate), **bounds, "n_pairs": found.n}


def t2_text(frames: Frames, table: pd.DataFrame) -> Text:
    """The same with three digits."""
    rows = []
    for row in table.to_dict("records"):
        cells = arm_cells(frames, row)
        cells |= {"n": str(row["n_costs"]), "tokens/s": three_digits(row["tokens_per_s"])}
        cells["speed, unconstrained = 1"] = bounded_cell(row, "relative_speed", three_digits)
        cells["step, ms"] = three_digits(row["step_ms"])
        for name in ("forward_backward", "solver", "retraction", "communication", "other"):
            words = name.replace("forward_backward", "forward + backward")
            cells[f"{words}, ms"] = _milliseconds(row[f"{name}_ms"])
        cells["MFU"] = number_cell(100 * row["flop_utilisation"], ".1f") + "%" * (
            not pd.isna(row["flop_utilisation"])
        )
        cells["memory, GiB"] = three_digits(row["peak_memory_gib"])
        cells["hours a run"] = three_digits(row["train_hours"])
        cells["device-hours a run"] = three_digits(row["device_hours"])
        cells["model, TFLOP a step"] = three_digits(row["model_tflop_per_step"])
        cells["optimizer, TFLOP a step"] = three_digits(row["optimizer_tflop_per_step"])
        rows.append(cells)
    devices = "; ".join(dict.fromkeys(filter(None, table["devices"]))) or "not recorded"
    note = (
        "Medians over n runs of the medians over a run's records; memory: the largest. speed: tokens/s "
        "over those of unconstrained, paired by seed, geometric mean with its 95% t interval. forward + "
        "backward includes the exchange of gradients that goes on meanwhile. MFU: share of the devices' "
        "peak that the model's own "
        f"FLOPs took. Hours: time in optimizer steps of finished runs. Devices: {devices}."
    )
    return Text.of(rows, ("arm", *frames.axes), note)


def _milliseconds(value: float) -> str:
    return number_cell(value, ".1f")
