"""Tables as functions of frames: numbers first (`t1` to `t4`, `modular`), then the same as text and as
CSV. `analysis.typeset` writes them for papers and pages."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.load import Frames
from analysis.stats import (
    SIGN_FLIP_LEAST,
    SIGN_FLIP_MOST,
    Interval,
    clopper_pearson,
    holm,
    median,
    paired_t,
    paired_t_p,
    ranks,
    sign_flip,
)
from trainers.records import FINISHED

REFERENCES = ("unconstrained", "all_stiefel")
PREDECLARED = (("hetero", "all_stiefel"), ("hetero", "unconstrained"))
"""The contrasts named before any run; every other difference is exploratory."""
PRIMARY = "primary"
EXPLORATORY = "exploratory"

PUBLISHED = {
    "unconstrained": "3.3855",
    "all_stiefel": "3.3679",
    "all_dgram": "unstable",
    "hetero": "3.3544",
    "hetero_inv": "unstable",
}
"""Final validation loss, Table 1 of the paper (arXiv 2606.13276). One run per arm."""
_PRESET = {"d_model": 768, "horizon": 50_000}


def t1(frames: Frames) -> pd.DataFrame:
    """T1: one row per arm (and axis cell), in the order of the grid.

    Losses are in nats per token. A run that finished without a finite loss at its horizon counts
    as +inf in `final_median` and in `rank`. `stable_mean` is conditional: over stable runs alone.
    `minus_<arm>` is the mean of the seed-paired differences of finite final losses, with its 95%
    t interval, number of pairs and two-sided p of the t test (`_p`) and of the exact sign-flip test
    (`_sign_p`, up to 20 pairs). `_role` is primary for the predeclared contrasts and exploratory for the
    others; `_holm` adjusts `_p` over the primary ones of the table, those without data yet among them.
    `run_ids`: the finished runs.
    """
    rows = []
    references = [arm for arm in REFERENCES if arm in set(frames.runs["arm"])]
    published = is_paper_preset(frames)
    sigma = _last_attention_sigma(frames)
    for _, runs in frames.runs.groupby("label", sort=False):
        row = _losses(frames, runs)
        for reference in references:
            row |= _difference(frames, runs, reference)
        row |= _stability(runs)
        row["attn_sigma_max"] = sigma.reindex(runs.loc[runs["status"].isin(FINISHED), "run_id"]).median()
        if published:
            row["published"] = PUBLISHED.get(row["arm"], "")
        row["run_ids"] = " ".join(runs.loc[runs["status"].isin(FINISHED), "run_id"])
        rows.append(row)
    _adjust(rows, references)
    table = pd.DataFrame(rows)
    places = pd.Series(ranks(table["final_median"].tolist()), dtype="Int64")
    table.insert(len(table.columns) - 1, "rank", places)
    return table


def is_paper_preset(frames: Frames) -> bool:
    """Whether published losses may stand beside these: all known configs are GPT-2 small at 50,000 steps."""
    known = frames.runs.dropna(subset=list(_PRESET))
    return len(known) > 0 and all((known[key] == value).all() for key, value in _PRESET.items())


def _losses(frames: Frames, runs: pd.DataFrame) -> dict[str, Any]:
    finished = runs[runs["status"].isin(FINISHED)]
    final = finished["final_val_loss"].dropna()
    whole = final[final.map(math.isfinite)]
    stable = finished.loc[~finished["unstable"].fillna(True).astype(bool), "final_val_loss"].dropna()
    first = runs.iloc[0]
    return {
        "arm": str(first["arm"]),
        "label": str(first["label"]),
        **{axis: first[axis] for axis in frames.axes},
        "attn": str(first["attn"]),
        "mlp": str(first["mlp"]),
        "n_planned": len(runs),
        "n_finished": len(finished),
        "n_diverged": len(final) - len(whole),
        "final_mean": float(final.mean()) if len(final) else math.nan,
        "final_sd": float(final.std()) if len(whole) == len(final) > 1 else math.nan,
        "final_median": median(final.tolist()),
        "best_median": float(finished["best_val_loss"].median()),
        "stable_mean": float(stable.mean()),
        "n_stable": len(stable),
    }


def paired(frames: Frames, runs: pd.DataFrame, reference: str) -> Interval:
    """`runs` minus the runs of arm `reference` with the same seed, grid and axis cell."""
    return paired_t(_differences(frames, runs, reference))


def _differences(frames: Frames, runs: pd.DataFrame, reference: str) -> list[float]:
    others = frames.runs[frames.runs["arm"] == reference]
    pairs = runs.merge(others, on=["family", "seed"], suffixes=("", "_reference"))
    differences = pairs["final_val_loss"] - pairs["final_val_loss_reference"]
    return [d for d in differences.tolist() if math.isfinite(d)]


def _difference(frames: Frames, runs: pd.DataFrame, reference: str) -> dict[str, Any]:
    name = f"minus_{reference}"
    arm = str(runs["arm"].iloc[0])
    differences = _differences(frames, runs, reference) if arm != reference else []
    found = paired_t(differences)
    role = PRIMARY if (arm, reference) in PREDECLARED else EXPLORATORY
    return {
        name: found.estimate,
        f"{name}_low": found.low,
        f"{name}_high": found.high,
        f"{name}_pairs": found.n,
        f"{name}_role": role if arm != reference else "",
        f"{name}_p": paired_t_p(differences),
        f"{name}_holm": math.nan,
        f"{name}_sign_p": sign_flip(differences) if found.n <= SIGN_FLIP_MOST else math.nan,
    }


def _adjust(rows: Sequence[dict[str, Any]], references: Sequence[str]) -> None:
    """Holm over the primary contrasts of all rows."""
    primary = [
        (row, f"minus_{reference}")
        for row in rows
        for reference in references
        if row[f"minus_{reference}_role"] == PRIMARY
    ]
    adjusted = holm([row[f"{name}_p"] for row, name in primary])
    for (row, name), p in zip(primary, adjusted, strict=True):
        row[f"{name}_holm"] = p


def _stability(runs: pd.DataFrame) -> dict[str, Any]:
    """Over finished runs with evaluations: a run that still trains may yet turn, and one that the
    machine lost says nothing."""
    judged = runs.loc[runs["status"].isin(FINISHED), "unstable"].dropna().astype(bool)
    share = clopper_pearson(int(judged.sum()), len(judged))
    return {
        "n_judged": len(judged),
        "n_unstable": int(judged.sum()),
        "unstable_low": share.low,
        "unstable_high": share.high,
    }


def _last_attention_sigma(frames: Frames) -> pd.Series[float]:
    """Per run, the largest singular value of any attention matrix in its last spectra."""
    attention = frames.spectra[frames.spectra["module"] == "attn"]
    last = attention.groupby("run_id")["step"].transform("max")
    return attention[attention["step"] == last].groupby("run_id")["sigma_max"].max()


@dataclass(frozen=True, slots=True)
class Text:
    """A table as people read it: column heads, rows of cells, which columns are words, and notes."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[bool, ...]
    notes: tuple[str, ...]


def t1_text(frames: Frames, table: pd.DataFrame, *, compact: bool = False) -> Text:
    """T1 with four decimals. `compact` leaves out what a terminal has no room for."""
    references = [arm for arm in REFERENCES if f"minus_{arm}" in table]
    mixed = (table["n_unstable"] > 0) & (table["n_stable"] > 0)
    conditional = bool(mixed.any()) and not compact
    rows = [
        _t1_row(frames, row, references, compact=compact, conditional=conditional)
        for row in table.to_dict("records")
    ]
    columns = tuple(rows[0]) if rows else ()
    words = tuple(column in ("arm", "attention", "MLP", *frames.axes) for column in columns)
    notes = _t1_notes(table, references, compact=compact)
    return Text(columns, tuple(tuple(row.values()) for row in rows), words, notes)


def _t1_row(
    frames: Frames, row: Mapping[Any, Any], references: Sequence[str], *, compact: bool, conditional: bool
) -> dict[str, str]:
    cells = {"arm": row["label"] if not frames.grid else row["arm"]}
    cells |= {axis: _axis(row[axis]) for axis in frames.axes}
    cells |= {"attention": row["attn"], "MLP": row["mlp"], "runs": f"{row['n_finished']}/{row['n_planned']}"}
    cells["final, mean ± sd"] = _spread(row["final_mean"], row["final_sd"])
    if not compact:
        cells["median"] = _loss(row["final_median"])
        cells["best, median"] = _loss(row["best_median"])
    for reference in references:
        mark = "*" if (row["arm"], reference) in PREDECLARED else ""
        cells[f"− {reference}"] = _interval(row, f"minus_{reference}", mark)
        if not compact:
            cells |= _p_values(row, reference)
    cells["unstable"] = _share(row, bounds=not compact)
    cells["attention σ_max"] = three_digits(row["attn_sigma_max"])
    cells["rank"] = "–" if pd.isna(row["rank"]) else str(row["rank"])
    if conditional:
        mixed = row["n_unstable"] and row["n_stable"]
        cells["mean of stable runs (conditional)"] = (
            f"{row['stable_mean']:.4f} (n = {row['n_stable']})" if mixed else "–"
        )
    if "published" in row:
        cells["published"] = row["published"] or "–"
    return cells


def _p_values(row: Mapping[Any, Any], reference: str) -> dict[str, str]:
    name = f"minus_{reference}"
    adjusted = p_cell(row[f"{name}_holm"]) if row[f"{name}_role"] == PRIMARY else row[f"{name}_role"] or "–"
    flipped = p_cell(row[f"{name}_sign_p"]) if row[f"{name}_pairs"] >= SIGN_FLIP_LEAST else "–"
    return {f"Holm p, − {reference}": adjusted, f"sign-flip p, − {reference}": flipped}


def p_cell(value: float) -> str:
    return "< .0001" if value < 0.0001 else _number(value, ".4f")


def _t1_notes(table: pd.DataFrame, references: Sequence[str], *, compact: bool) -> tuple[str, ...]:
    notes = [
        "Losses: validation, nats per token. runs: finished / planned. σ_max: at the end, median over runs."
    ]
    if references:
        notes.append(
            "− arm: mean difference of final losses, paired by seed, with its 95% t interval (n pairs with "
            "finite losses), not adjusted for the number of comparisons. * predeclared; others exploratory."
        )
    if references and not compact:
        notes.append(
            "Holm p: of the paired t test, adjusted over the predeclared contrasts of this table, which are "
            "primary. sign-flip p: exact, over all 2ⁿ signs of the differences, not adjusted; – below "
            f"{SIGN_FLIP_LEAST} pairs, where it cannot reach .05, and above {SIGN_FLIP_MOST}."
        )
    notes.append("unstable: k of n finished runs, with the 95% Clopper–Pearson interval of the share.")
    if (table["n_diverged"] > 0).any():
        notes.append("diverged: no finite loss at the horizon; counts as +∞ in median and rank.")
    if "published" in table:
        notes.append("published: Table 1 of arXiv 2606.13276, one run per arm.")
    return tuple(notes)


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
        cells = {"arm": row["label"] if not frames.grid else row["arm"]}
        cells |= {axis: _axis(row[axis]) for axis in frames.axes}
        cells |= {"n": str(row["n_costs"]), "tokens/s": three_digits(row["tokens_per_s"])}
        cells["speed, unconstrained = 1"] = _bounded(row, "relative_speed", three_digits)
        cells["step, ms"] = three_digits(row["step_ms"])
        for name in ("forward_backward", "solver", "retraction", "communication", "other"):
            words = name.replace("forward_backward", "forward + backward")
            cells[f"{words}, ms"] = _milliseconds(row[f"{name}_ms"])
        cells["MFU"] = _number(100 * row["flop_utilisation"], ".1f") + "%" * (
            not pd.isna(row["flop_utilisation"])
        )
        cells["memory, GiB"] = three_digits(row["peak_memory_gib"])
        cells["hours a run"] = three_digits(row["train_hours"])
        cells["device-hours a run"] = three_digits(row["device_hours"])
        cells["model, TFLOP a step"] = three_digits(row["model_tflop_per_step"])
        cells["optimizer, TFLOP a step"] = three_digits(row["optimizer_tflop_per_step"])
        rows.append(cells)
    columns = tuple(rows[0]) if rows else ()
    words_of = tuple(column in ("arm", *frames.axes) for column in columns)
    devices = "; ".join(dict.fromkeys(filter(None, table["devices"]))) or "not recorded"
    notes = (
        "Medians over n runs of the medians over a run's records; memory: the largest. speed: tokens/s "
        "over those of unconstrained, paired by seed, geometric mean with its 95% t interval. forward + "
        "backward includes the exchange of gradients that goes on meanwhile. MFU: share of the devices' "
        "peak that the model's own "
        f"FLOPs took. Hours: time in optimizer steps of finished runs. Devices: {devices}.",
    )
    return Text(columns, tuple(tuple(row.values()) for row in rows), words_of, notes)


def _milliseconds(value: float) -> str:
    return _number(value, ".1f")


def _bounded(row: Mapping[Any, Any], name: str, how: Any) -> str:
    """`0.786 [0.781, 0.790]`."""
    text: str = how(row[name])
    if pd.isna(row[f"{name}_low"]):
        return text
    return f"{text} [{how(row[f'{name}_low'])}, {how(row[f'{name}_high'])}]"


def t3(frames: Frames) -> pd.DataFrame:
    """T3: the best cell of each arm in a grid with axes, and what fresh seeds say of it. Empty without axes.

    The search is over the seeds that at least half of an arm's cells have run to the end; its winner has
    the lowest median final loss (nats per token; diverged = +inf), the first of the grid among equals.
    A winner of many cells is lucky too, so its search loss is no estimate: `fresh_mean` is, with its 95%
    t interval, over the other seeds of that cell, which had no part in the choice. `minus_next` is the
    mean difference to the second best cell over the search seeds, with its t interval.
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
    rows = (
        [_winner(frames, runs) for _, runs in frames.runs.groupby("arm", sort=False)] if frames.axes else []
    )
    return pd.DataFrame([row for row in rows if row], columns=columns)


def _winner(frames: Frames, runs: pd.DataFrame) -> dict[str, Any]:
    """A row of T3, empty where nothing has finished or there is one cell alone."""
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
    fresh = done[(done["label"] == best) & ~done["seed"].isin(searched)]
    finite = [loss for loss in fresh["final_val_loss"] if math.isfinite(loss)]
    row = {"arm": str(own["arm"].iloc[0]), "label": best, **{a: own[a].iloc[0] for a in frames.axes}}
    row |= {"n_cells": len(cells), "n_search": len(own), "search_median": medians[best]}
    row |= _to_next(own, search[search["label"] == others[0]]) if others else {"minus_next_pairs": 0}
    row |= {"next_label": others[0] if others else ""}
    judged = _stability(done[done["label"] == best])
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
        cells = {"arm": row["arm"], **{axis: _axis(row[axis]) for axis in frames.axes}}
        cells["cells"] = str(row["n_cells"])
        cells["median in the search"] = f"{_loss(row['search_median'])} (n = {row['n_search']})"
        cells["− second best"] = _interval(row, "minus_next", "")
        cells["unstable"] = f"{row['n_unstable']}/{row['n_judged']}" if row["n_judged"] else "–"
        lost = f", {row['fresh_lost']} diverged" if row["fresh_lost"] else ""
        cells["on fresh seeds"] = (
            f"{_bounded(row, 'fresh_mean', _loss)} (n = {row['n_fresh']}{lost})"
            if row["n_fresh"]
            else "none run yet"
        )
        rows.append(cells)
    columns = tuple(rows[0]) if rows else ()
    words = tuple(column in ("arm", *frames.axes) for column in columns)
    notes = (
        "The cell with the lowest median final loss (nats per token) of each arm. The best of many cells is "
        "lucky too: a claim rests on fresh seeds, those that had no part in the choice; mean with its 95% t "
        "interval. − second best: paired by seed over the search, exploratory.",
    )
    return Text(columns, tuple(tuple(row.values()) for row in rows), words, notes)


_T4 = {
    "label": "string",
    "seed": "int64",
    "run_id": "string",
    "status": "string",
    "rule": "string",
    "last_good": "Int64",
    "first_bad": "Int64",
    "value": "float64",
    "threshold": "float64",
    "earliest": "bool",
}


def t4(frames: Frames) -> pd.DataFrame:
    """T4: which rule fired when, a row for each rule that fired in a run, in the order of the grid.

    `value` crossed `threshold` (nats per token) in `(last_good, first_bad]`; no `last_good` where no
    evaluation came before. `earliest`: the rule dates the run's verdict. Runs under way are listed too.
    """
    rows = [
        {name: run[name] for name in ("label", "seed", "run_id", "status")}
        | {"rule": rule.rule, "last_good": rule.last_good, "first_bad": rule.step}
        | {"value": rule.value, "threshold": rule.threshold, "earliest": rule.step == verdict.first_bad}
        for run in frames.runs.drop_duplicates("run_id").to_dict("records")
        if (verdict := frames.verdicts.get(run["run_id"])) is not None
        for rule in sorted(verdict.rules, key=lambda fired: fired.step)
    ]
    return pd.DataFrame(rows, columns=list(_T4)).astype(_T4)


def t4_text(frames: Frames, table: pd.DataFrame) -> Text:
    """The same, with the number of runs in which no rule fired."""
    columns = ("arm", "seed", "run", "status", "rule", "last good", "first bad", "value", "threshold")
    rows = tuple(
        (
            *(row["label"], str(row["seed"]), row["run_id"], row["status"]),
            row["rule"] + "*" * row["earliest"],
            "start" if pd.isna(row["last_good"]) else str(row["last_good"]),
            str(row["first_bad"]),
            *(
                _number(row[name], ".4f") if math.isfinite(row[name]) else "–"
                for name in ("value", "threshold")
            ),
        )
        for row in table.to_dict("records")
    )
    words = tuple(column in ("arm", "run", "status", "rule") for column in columns)
    judged, fired = len(frames.verdicts), table["run_id"].nunique()
    notes = (
        f"A rule fired in {fired} of {judged} judged runs. value: validation loss, nats per token, of drift "
        "its mean at the end. The evaluation at last good kept the rule, that at first bad broke it. "
        "* earliest of its run. Drift and recovery are judged at the end of a run.",
    )
    return Text(columns, rows, words, notes)


def log_rank_text(table: pd.DataFrame) -> Text:
    """The comparisons of `survival.comparisons` in which a run diverged."""
    columns = ("arm", "other arm", "diverged", "diverged, other", "expected", "log-rank p", "Holm p")
    told = table[table["events"] + table["events_other"] > 0]
    rows = tuple(
        (
            *(row["label"], row["other"]),
            f"{row['events']}/{row['n']}",
            f"{row['events_other']}/{row['n_other']}",
            f"{row['expected']:.2f}",
            p_cell(row["p"])
            + ("" if row["exact"] else f" [{p_cell(row['p_low'])}, {p_cell(row['p_high'])}]"),
            p_cell(row["holm"]),
        )
        for row in told.to_dict("records")
    )
    notes = (
        "Exploratory: time to divergence, every two arms of a cell. Left out, but counted by Holm, where no "
        f"run diverged: {len(table) - len(told)}. diverged: runs with an event, of all that were watched. "
        "expected: events in the arm, were both alike. p: share of the assignments of these runs to the two "
        "arms that are as far from it, with its 95% interval where they were drawn.",
    )
    return Text(columns, rows, (True, True, *(False,) * 5), notes)


def modular(frames: Frames) -> pd.DataFrame:
    """The metrics of the modular-manifolds plan: one row per arm (and axis cell), in the order of the grid.

    Each is the median over finished runs of the run's own value: losses (nats per token) and perplexity
    at the end, +inf where `val_loss` is; by module kind, at the run's last records, σ_max (largest of
    any matrix), σ_min (smallest) and the Frobenius norm (largest); by module kind, the median gradient
    norm over steps and matrices, before the clip; median tokens per second over steps. `n_spectra` and
    `n_flow` count the runs that recorded spectra, and norms and gradients. `run_ids`: the finished runs.
    """
    runs = frames.runs.drop_duplicates("run_id").set_index("run_id")
    val_loss = runs["final_val_loss"]
    train_loss = frames.evals.groupby("run_id")["train_loss"].last().reindex(runs.index)
    values = pd.DataFrame({"train_loss": train_loss.mask(val_loss == math.inf, math.inf)})
    values["val_loss"], values["perplexity"] = val_loss, np.exp(val_loss)
    for kind in _KINDS:
        spectra = _last(frames.spectra[frames.spectra["module"] == kind])
        flow = frames.flow[frames.flow["module"] == kind]
        values[f"{kind}_sigma_max"] = spectra["sigma_max"].max()
        values[f"{kind}_sigma_min"] = spectra["sigma_min"].min()
        values[f"{kind}_norm"] = _last(flow)["weight_norm"].max()
        values[f"{kind}_grad_norm"] = flow.groupby("run_id")["grad_norm"].median()
    values["tokens_per_s"] = frames.steps.groupby("run_id")["tokens_per_s"].median()
    rows = []
    for label, group in frames.runs.groupby("label", sort=False):
        finished = group.loc[group["status"].isin(FINISHED), "run_id"]
        own = values.reindex(finished)
        rows.append(
            {"arm": str(group["arm"].iloc[0]), "label": str(label), "n_finished": len(finished)}
            | {axis: group[axis].iloc[0] for axis in frames.axes}
            | own.median().to_dict()
            | {"n_spectra": finished.isin(frames.spectra["run_id"]).sum()}
            | {"n_flow": finished.isin(frames.flow["run_id"]).sum(), "run_ids": " ".join(finished)}
        )
    return pd.DataFrame(rows)


_KINDS = {"attn": "attention", "mlp": "MLP"}


def _last(long: pd.DataFrame) -> Any:
    """The rows of each run's last step, by run."""
    return long[long["step"] == long.groupby("run_id")["step"].transform("max")].groupby("run_id")


def modular_text(frames: Frames, table: pd.DataFrame) -> Text:
    """The same with four decimals of losses and three digits of the rest."""
    rows = []
    for row in table.to_dict("records"):
        cells = {"arm": row["label"] if not frames.grid else row["arm"]}
        cells |= {axis: _axis(row[axis]) for axis in frames.axes}
        cells |= {"n": str(row["n_finished"]), "train loss": _loss(row["train_loss"])}
        cells |= {"val loss": _loss(row["val_loss"]), "perplexity": _perplexity(row["perplexity"])}
        for kind, name in _KINDS.items():
            cells[f"{name} σ_max"] = three_digits(row[f"{kind}_sigma_max"])
            cells[f"{name} σ_min"] = three_digits(row[f"{kind}_sigma_min"])
            cells[f"{name} ‖W‖_F"] = three_digits(row[f"{kind}_norm"])
            cells[f"{name} gradient norm"] = three_digits(row[f"{kind}_grad_norm"])
        cells["tokens/s"] = three_digits(row["tokens_per_s"])
        rows.append(cells)
    columns = tuple(rows[0]) if rows else ()
    words = tuple(column in ("arm", *frames.axes) for column in columns)
    notes = (
        "Medians over n finished runs. Losses at the end, nats per token. At the last record of a run: "
        "σ_max and ‖W‖_F (Frobenius) of the largest matrix, σ_min of the smallest. Gradient norm: Frobenius, "
        "before the clip, median over steps and matrices. tokens/s: median over steps.",
    )
    return Text(columns, tuple(tuple(row.values()) for row in rows), words, notes)


def _perplexity(value: float) -> str:
    return "diverged" if value == math.inf else three_digits(value)


def _axis(value: Any) -> str:
    return _number(value, "g") if isinstance(value, float) else str(value)


def _loss(value: float) -> str:
    return "diverged" if value == math.inf else _number(value, ".4f")


def _number(value: float, how: str) -> str:
    return "–" if pd.isna(value) else format(value, how)


def three_digits(value: float) -> str:
    """`1.00`, `46.2`, `168`, `3,012`, `1.23e+06`."""
    return _number(value, ",.0f" if 1000 <= value < 1e6 else "#.3g").rstrip(".")


def _spread(mean: float, sd: float) -> str:
    return _loss(mean) if pd.isna(sd) else f"{mean:.4f} ± {sd:.4f}"


def _interval(row: Mapping[Any, Any], name: str, mark: str) -> str:
    if not row[f"{name}_pairs"]:
        return "–"
    bounds = ""
    if not pd.isna(row[f"{name}_low"]):
        bounds = f" [{signed(row[f'{name}_low'])}, {signed(row[f'{name}_high'])}]"
    return f"{signed(row[name])}{bounds} ({row[f'{name}_pairs']}){mark}"


def signed(value: float) -> str:
    return f"{round(value, 4) + 0.0:+.4f}".replace("-", "−")  # + 0.0: no −0.0000


def _share(row: Mapping[Any, Any], *, bounds: bool) -> str:
    if not row["n_judged"]:
        return "–"
    share = f"{row['n_unstable']}/{row['n_judged']}"
    return f"{share} [{row['unstable_low']:.2f}, {row['unstable_high']:.2f}]" if bounds else share


def to_csv(table: pd.DataFrame) -> str:
    """The table as CSV: the same numbers give the same bytes. Missing cells are empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_cell(column) for column in table.columns])
    for row in table.itertuples(index=False):
        writer.writerow([_cell(value) for value in row])
    return buffer.getvalue()


def _cell(value: Any) -> str:
    """Numbers at six digits at least; text that a spreadsheet would run as a formula gets a quote."""
    if not isinstance(value, str) and pd.isna(value):
        return ""
    if isinstance(value, float):  # six decimals, or six digits of a small number: a p of 1e-9 is not 0
        return f"{value:.6g}" if 0 < abs(value) < 0.1 else f"{value:.6f}"
    text = str(value).replace("\r\n", "\n")
    return (
        "'" + text if isinstance(value, str) and text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
    )
