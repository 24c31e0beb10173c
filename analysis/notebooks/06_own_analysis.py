# %% [markdown]
# # An analysis of one's own
#
# **How do I get at the records, compare arms by a number of my own, and draw and export the result?**
#
# It reads the store named by `MMSWEEP_STORE` (a folder, relative to the repository's root, or
# `s3://bucket/prefix`; without one, `results`), and of it the grid `MMSWEEP_GRID`. Every column and unit is
# in docs/export.md.

# %%
import math
import os
import tempfile
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis import tables, theme
from analysis.figures import NoDataError
from analysis.figures.drawing import plain_decades
from analysis.notebooks import read, show
from analysis.stats import median, paired_t, paired_t_p
from trainers.records import KINDS

STORE = os.environ.get("MMSWEEP_STORE", "results")
GRID = os.environ.get("MMSWEEP_GRID")
frames = read(STORE, GRID)
show(pd.DataFrame([{"frame": kind, "rows": len(getattr(frames, kind))} for kind in KINDS]))

# %% [markdown]
# ## The records of one run
#
# Frames are long: a row for each observation, with `run_id`, `arm`, `seed` and `step`.

# %%
run_id = frames.runs["run_id"].iloc[0]
run = frames.evals[frames.evals["run_id"] == run_id]
show(run[["run_id", "step", "train_loss", "val_loss"]].tail(5), empty=f"{run_id} has no evaluations yet")

# %% [markdown]
# ## Joining records
#
# `run_id` and `step` join any two frames: here the largest singular value of attention with the loss.

# %%
attention = frames.spectra[frames.spectra["module"] == "attn"]
sigma = attention.groupby(["run_id", "step"], observed=True)["sigma_max"].max().reset_index()
joined = frames.evals[["run_id", "arm", "step", "val_loss"]].merge(sigma, on=["run_id", "step"])
show(joined.groupby("arm", observed=True).tail(1), empty="no run has spectra at an evaluation")

# %% [markdown]
# ## A statistic of one's own
#
# One number per run, then differences of runs that share everything but the arm (`family` and `seed`), with
# their 95% t interval. Here: the mean validation loss over the second half of the schedule. Runs that still
# train have no number; a run that diverged has ∞, and its pair counts as `lost`.


# %%
def late_loss(runs: pd.DataFrame, evals: pd.DataFrame) -> "pd.Series[float]":
    """Of each run, the mean validation loss over the second half of its planned steps (nats per token):
    +inf where it diverged, NaN where it has not finished."""
    half = runs.drop_duplicates("run_id").set_index("run_id")["horizon"] / 2
    late = evals[evals["step"] >= evals["run_id"].astype(str).map(half)].fillna({"val_loss": math.inf})
    means = late.groupby("run_id", observed=True)["val_loss"].mean()
    final = runs["final_val_loss"]
    return runs["run_id"].astype(str).map(means).where(final.abs() < math.inf, final)


runs = frames.runs.assign(late=late_loss(frames.runs, frames.evals))
reference = frames.arms[0]
pairs = runs.merge(runs[runs["arm"] == reference], on=["family", "seed"], suffixes=("", "_reference"))
pairs = pairs.dropna(subset=["late", "late_reference"])
rows = []
for label, own in pairs[pairs["arm"] != reference].groupby("label", sort=False):
    values = [d for d in own["late"] - own["late_reference"] if math.isfinite(d)]
    found = paired_t(values)
    row = {"label": label, "median": median(own["late"]), "difference": found.estimate}
    row |= {"difference_low": found.low, "difference_high": found.high, "pairs": found.n}
    rows.append(row | {"p": paired_t_p(values), "lost": len(own) - found.n})
compared = pd.DataFrame(rows)
show(compared, empty=f"no arm beside {reference} has finished runs")

# %% [markdown]
# ## A figure of one's own
#
# `theme` gives every arm its colour and marker, and makes the same bytes from the same figure.


# %%
def loss_against_sigma(points: pd.DataFrame) -> Figure:
    """One mark per run: validation loss against the singular value, at the last step that has both."""
    last = points.groupby("run_id", observed=True).tail(1)
    if last.empty:
        raise NoDataError("this figure needs spectra at an evaluation")
    styles = theme.arm_styles(frames.arms)
    with theme.look():
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        ax = figure.subplots()
        for arm, own in last.groupby("arm", observed=True):
            style = styles[str(arm)]
            ax.plot(
                own["sigma_max"], own["val_loss"], ls="", marker=style.marker, color=style.colour, label=arm
            )
        ax.set_xscale("log")
        plain_decades(ax.xaxis, *ax.get_xlim())
        ax.set_xlabel("σ_max of attention, last evaluation")
        ax.set_ylabel("validation loss (nats per token)")
        figure.legend(loc="outside right upper", frameon=False)
    return figure


show(loss_against_sigma, joined)

# %% [markdown]
# ## Files
#
# The table, the figure and a frame as files; any folder will do in place of `OUT`. All frames of a store at
# once: `mmsweep export`.

# %%
OUT = Path(tempfile.mkdtemp(prefix="mmsweep-"))
(OUT / "late_loss.csv").write_text(tables.to_csv(compared), encoding="utf-8")
joined.to_parquet(OUT / "joined.parquet")
if len(joined):
    (OUT / "loss_against_sigma.svg").write_bytes(theme.svg(loss_against_sigma(joined)))
print(f"In {OUT}: {', '.join(sorted(path.name for path in OUT.iterdir()))}.")
