"""T4: which rule fired when; and the log-rank comparisons as people read them."""

from __future__ import annotations

import math

import pandas as pd

from analysis.load import Frames
from analysis.tables.cells import Text, number_cell, p_cell

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
                number_cell(row[name], ".4f") if math.isfinite(row[name]) else "–"
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
    """The comparisons of `survival.comparisons` in which a run was unstable."""
    columns = ("arm", "other arm", "unstable", "unstable, other", "expected", "log-rank p", "Holm p")
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
        "Exploratory: time to the first bad evaluation, every two arms of a cell. Left out, but counted by "
        f"Holm, where no run was unstable: {len(table) - len(told)}. unstable: runs in which a rule fired, "
        "of all that were watched. expected: events in the arm, were both alike. p: share of the assignments "
        "of these runs to the two arms that are as far from it, with its 95% interval where they were drawn.",
    )
    return Text(columns, rows, (True, True, *(False,) * 5), notes)
