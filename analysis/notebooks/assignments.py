"""Assignments of two modules against each other: medians of every pair, and interactions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd

from analysis.contrasts import assigned
from analysis.load import Frames
from analysis.stats import median, paired_t
from analysis.tables import Text, bounds, signed
from mmsweep.regrid import flat

_CHOSEN = {f"assignment.{kind}.{key}" for kind in ("attn", "mlp") for key in ("manifold", "optimizer")}
"""Axes that choose an assignment; values of the others are the cell in which assignments are compared."""


def _finished(frames: Frames) -> pd.DataFrame:
    """Finished runs with what `attention` and `MLP` have, in words (without configs, the manifolds), and the
    `cell` of the other axes."""
    done = frames.runs[frames.runs["final_val_loss"].notna()].drop_duplicates("run_id").copy()
    others = [axis for axis in frames.axes if axis not in _CHOSEN]
    words: dict[str, list[str]] = {"attention": [], "MLP": [], "cell": []}
    for run in done.to_dict("records"):
        config = flat((frames.configs.get(run["run_id"]) or {}).get("config") or {})
        own = {path: value for path, value in config.items() if path not in others}
        for column, kind in (("attention", "attn"), ("MLP", "mlp")):
            words[column].append(assigned(own, kind) if config else str(run[kind]))
        words["cell"].append(repr([run["grid"] or run["family"], *(run[axis] for axis in others)]))
    return done.assign(**words)


def crossed(frames: Frames) -> pd.DataFrame:
    """A row per assignment of attention, a column per assignment of the MLP: `median final loss (n)` over
    finished runs of all cells, a diverged run as +inf."""
    done = _finished(frames)
    columns = list(dict.fromkeys(done["MLP"]))
    rows = []
    for attention, runs in done.groupby("attention", sort=False):
        row = {"attention": str(attention)}
        for mlp in columns:
            losses = runs.loc[runs["MLP"] == mlp, "final_val_loss"].tolist()
            middle = median(losses)
            said = "diverged" if math.isinf(middle) else f"{middle:.4f}"
            row[f"MLP {mlp}"] = f"{said} ({len(losses)})" if losses else "–"
        rows.append(row)
    return pd.DataFrame(rows)


def interactions(frames: Frames) -> pd.DataFrame:
    """A row for every two assignments of attention and two of the MLP that are crossed.

    `interaction` (nats per token): the mean over seeds of (attention b - attention a, under MLP b) -
    (the same under MLP a), with its 95% t interval. A seed counts once, with its mean over the grids and
    axis cells in which all four runs have finished: its cells share weights and data. `n` seeds have a
    finite mean; in the others, `lost`, one of those runs diverged.
    """
    done = _finished(frames)
    keys = ["cell", "seed", "attention", "MLP"]
    alone = ~done.duplicated(keys, keep=False)  # arms that differ in something else would be mixed
    cells = done[alone].set_index(keys)["final_val_loss"].unstack(["attention", "MLP"])
    rows = []
    attention, mlp = (list(dict.fromkeys(done[column])) for column in ("attention", "MLP"))
    for (a, b), (c, d) in itertools.product(
        itertools.combinations(attention, 2), itertools.combinations(mlp, 2)
    ):
        if not all(pair in cells for pair in ((a, c), (a, d), (b, c), (b, d))):
            continue
        four = cells[[(b, d), (a, d), (b, c), (a, c)]].dropna()
        each = four.mul([1, -1, -1, 1]).sum(axis=1).mask(four.isin([math.inf]).any(axis=1), math.inf)
        by_seed = each.groupby("seed").mean()
        found = paired_t(by_seed[np.isfinite(by_seed)].tolist())
        row = {"attention": f"{b} − {a}", "MLP": f"{d} − {c}", "interaction": found.estimate}
        row |= {"interaction_low": found.low, "interaction_high": found.high, "n": found.n}
        rows.append(row | {"lost": len(by_seed) - found.n})
    columns = ["attention", "MLP", "interaction", "interaction_low", "interaction_high", "n", "lost"]
    return pd.DataFrame(rows, columns=columns)


def interactions_text(table: pd.DataFrame) -> Text:
    """The same with four decimals; without the rows in which no four runs are finite."""
    rows = tuple(
        (
            *(row["attention"], row["MLP"]),
            signed(row["interaction"]) + bounds(row["interaction_low"], row["interaction_high"]),
            *(str(row["n"]), str(row["lost"])),
        )
        for row in table[table["n"] > 0].to_dict("records")
    )
    notes = (
        "Final validation loss, nats per token: what the change of attention does under the MLP's second "
        "choice minus what it does under its first; mean over n seeds, of each its mean over the settings, "
        "with the 95% t interval. lost: seeds in which one of the runs diverged.",
    )
    return Text(("attention", "MLP", "interaction", "n", "lost"), rows, (True, True, *(False,) * 3), notes)
