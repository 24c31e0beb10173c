"""T1: what each assignment reaches, against which reference, and how often it is unstable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import pandas as pd

from analysis.load import Frames
from analysis.stats import (
    SIGN_FLIP_LEAST,
    SIGN_FLIP_MOST,
    clopper_pearson,
    holm,
    median,
    paired_t,
    paired_t_p,
    ranks,
    sign_flip,
)
from analysis.tables.cells import Text, arm_cells, interval_cell, loss_cell, p_cell, three_digits
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
_PRESET = {
    "model.family": "gpt2",
    "model.n_layer": 12,
    "model.n_head": 12,
    "model.d_model": 768,
    "model.context": 1024,
    "schedule.steps": 50_000,
    "schedule.batch_size": 64,
}


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
        row |= stability(runs)
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
    """Whether published losses may stand beside these: all known configs are the paper's, data aside."""
    configs = [known["config"] for known in frames.configs.values() if "config" in known]
    return bool(configs) and all(
        reduce(lambda node, key: (node or {}).get(key), path.split("."), config) == value
        for config in configs
        for path, value in _PRESET.items()
    )


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


def stability(runs: pd.DataFrame) -> dict[str, Any]:
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


def t1_text(frames: Frames, table: pd.DataFrame, *, compact: bool = False) -> Text:
    """T1 with four decimals. `compact` leaves out what a terminal has no room for."""
    references = [arm for arm in REFERENCES if f"minus_{arm}" in table]
    mixed = (table["n_unstable"] > 0) & (table["n_stable"] > 0)
    conditional = bool(mixed.any()) and not compact
    rows = [
        _t1_row(frames, row, references, compact=compact, conditional=conditional)
        for row in table.to_dict("records")
    ]
    notes = _t1_notes(table, references, compact=compact)
    return Text.of(rows, ("arm", "attention", "MLP", *frames.axes), *notes)


def _t1_row(
    frames: Frames, row: Mapping[Any, Any], references: Sequence[str], *, compact: bool, conditional: bool
) -> dict[str, str]:
    cells = arm_cells(frames, row)
    cells |= {"attention": row["attn"], "MLP": row["mlp"], "runs": f"{row['n_finished']}/{row['n_planned']}"}
    cells["final, mean ± sd"] = _spread(row["final_mean"], row["final_sd"])
    if not compact:
        cells["median"] = loss_cell(row["final_median"])
        cells["best, median"] = loss_cell(row["best_median"])
    for reference in references:
        mark = "*" if (row["arm"], reference) in PREDECLARED else ""
        cells[f"− {reference}"] = interval_cell(row, f"minus_{reference}", mark)
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


def _spread(mean: float, sd: float) -> str:
    return loss_cell(mean) if pd.isna(sd) else f"{mean:.4f} ± {sd:.4f}"


def _share(row: Mapping[Any, Any], *, bounds: bool) -> str:
    if not row["n_judged"]:
        return "–"
    share = f"{row['n_unstable']}/{row['n_judged']}"
    return f"{share} [{row['unstable_low']:.2f}, {row['unstable_high']:.2f}]" if bounds else share


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
        notes.append("published: Table 1 of arXiv 2606.13276, on OpenWebText, one run per arm.")
    return tuple(notes)
