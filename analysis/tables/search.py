"""T3: the best cell of each arm in a grid with axes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.load import Frames
from analysis.stats import median, paired_t
from analysis.tables.assignments import stability
from analysis.tables.cells import Text, arm_cells, bounded_cell, interval_cell, loss_cell
from trainers.config import RunConfig, science

_NO_FRESH = (
    "none read: fresh are the seeds that this grid does not plan, of finished runs of the winner's settings "
    "in any grid read with it. Run the winners again in a grid of their own, and read both (report: --grid "
    "with the two names)."
)


def t3(frames: Frames, *others: Frames) -> pd.DataFrame:
    """T3: the best cell of each arm in a grid with axes, and what fresh seeds say of it. Empty without axes.

    The search is over the seeds that at least half of an arm's cells have run to the end; its winner has
    the lowest median final loss (nats per token; diverged = +inf), the first of the grid among equals.
    A winner of many cells is lucky too, so its search loss is no estimate: `fresh_mean` is, with its 95%
    t interval, over runs that had no part in the choice: those in `frames` and `others` whose config is
    the winner's but for the arm's name and the seed, on seeds that the searched grid does not plan, one
    run a seed. `minus_next` is the mean difference to the second best cell over the search seeds, with its
    t interval.
    """
    columns = ["arm", "label", *frames.axes, "n_cells", "n_search", "search_median"]
    columns += [f"minus_next{end}" for end in ("", "_low", "_high", "_pairs")] + ["next_label"]
    columns += [
        "n_unstable",
        "n_judged",
        "n_fresh",
        "fresh_mean",
        "fresh_mean_low",
        "fresh_mean_high",
        "fresh_lost",
    ]
    columns += ["run_ids", "fresh_run_ids"]
    known = _finished(frames, *others)
    runs = frames.runs[frames.runs["grid"] != ""]  # a run outside any grid is no cell of a search
    rows = [_winner(frames, own, known) for _, own in runs.groupby(["grid", "arm"], sort=False)]
    return pd.DataFrame([row for row in rows if row], columns=columns)


def _finished(*several: Frames) -> pd.DataFrame:
    """The runs with a final loss, and in `science` all that changes their numbers but the seed."""
    runs = pd.concat([frames.runs[["run_id", "seed", "final_val_loss"]] for frames in several])
    runs = runs[runs["final_val_loss"].notna()].drop_duplicates("run_id")
    configs = {run_id: config for frames in several for run_id, config in frames.configs.items()}
    return runs.assign(science=[_science(configs.get(run_id, {})) for run_id in runs["run_id"]])


def _science(config: Mapping[str, Any]) -> str:
    """As canonical JSON; "" where the config is not known, or not of this version."""
    try:
        fields = science(RunConfig.model_validate(config.get("config")))
    except ValueError:
        return ""
    return json.dumps({key: value for key, value in fields.items() if key != "seed"}, sort_keys=True)


def _winner(frames: Frames, runs: pd.DataFrame, known: pd.DataFrame) -> dict[str, Any]:
    """A row of T3, of one arm's `runs` in a grid: empty where nothing has finished or there is one cell
    alone. Fresh runs are taken from those `known` (`_finished`)."""
    done = runs[runs["final_val_loss"].notna()]
    cells = done["label"].unique()
    if len(cells) < 2:
        return {}
    spread = done.groupby("seed")["label"].nunique()
    searched = set(spread[2 * spread >= len(cells)].index)
    search = done[done["seed"].isin(searched)]
    medians = {
        str(c): median(own["final_val_loss"].tolist()) for c, own in search.groupby("label", sort=False)
    }
    if not medians:
        return {}
    best, *others = sorted(medians, key=medians.__getitem__)
    own = search[search["label"] == best]
    same = set(known.loc[known["run_id"].isin(own["run_id"]), "science"]) - {""}
    fresh = known[known["science"].isin(same) & ~known["seed"].isin(runs["seed"])].drop_duplicates("seed")
    finite = [loss for loss in fresh["final_val_loss"] if math.isfinite(loss)]
    row = {"arm": str(own["arm"].iloc[0]), "label": best, **{a: own[a].iloc[0] for a in frames.axes}}
    row |= {"n_cells": len(cells), "n_search": len(own), "search_median": medians[best]}
    row |= _to_next(own, search[search["label"] == others[0]]) if others else {"minus_next_pairs": 0}
    row |= {"next_label": others[0] if others else ""}
    judged = stability(done[done["label"] == best])
    row |= {"n_unstable": judged["n_unstable"], "n_judged": judged["n_judged"], "n_fresh": len(fresh)}
    found = paired_t(finite)
    row |= {"fresh_mean": found.estimate, "fresh_mean_low": found.low, "fresh_mean_high": found.high}
    row |= {"fresh_lost": len(fresh) - len(finite)}
    return row | {"run_ids": " ".join(own["run_id"]), "fresh_run_ids": " ".join(fresh["run_id"])}


def _to_next(best: pd.DataFrame, second: pd.DataFrame) -> dict[str, Any]:
    pairs = best.merge(second, on="seed", suffixes=("", "_next"))
    both = pairs[["final_val_loss", "final_val_loss_next"]].to_numpy(dtype=float)
    found = paired_t([float(a - b) for a, b in both if math.isfinite(a) and math.isfinite(b)])
    bounds = {"minus_next_low": found.low, "minus_next_high": found.high}
    return {"minus_next": found.estimate, **bounds, "minus_next_pairs": found.n}


def t3_text(frames: Frames, table: pd.DataFrame) -> Text:
    """The same with four decimals."""
    rows = []
    for row in table.to_dict("records"):
        cells = arm_cells(frames, row)
        cells["cells"] = str(row["n_cells"])
        cells["median in the search"] = f"{loss_cell(row['search_median'])} (n = {row['n_search']})"
        cells["− second best"] = interval_cell(row, "minus_next", "")
        cells["unstable"] = f"{row['n_unstable']}/{row['n_judged']}" if row["n_judged"] else "–"
        lost = f", {row['fresh_lost']} diverged" if row["fresh_lost"] else ""
        cells["on fresh seeds"] = (
            f"{bounded_cell(row, 'fresh_mean', loss_cell)} (n = {row['n_fresh']}{lost})"
            if row["n_fresh"]
            else "none read"
        )
        rows.append(cells)
    note = (
        "The cell with the lowest median final loss (nats per token) of each arm. The best of many cells is "
        "lucky too: a claim rests on fresh seeds, those that had no part in the choice; mean with its 95% t "
        "interval. − second best: paired by seed over the search, exploratory."
    )
    notes = [note, _NO_FRESH] if (table["n_fresh"] == 0).any() else [note]
    return Text.of(rows, ("arm", *frames.axes), *notes)
