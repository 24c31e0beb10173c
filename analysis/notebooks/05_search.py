# %% [markdown]
# # Search
#
# **Over many settings: what does each one do, which are best, and what should run again?**
#
# It reads the store named by `MMSWEEP_STORE` (a folder, relative to the repository's root, or
# `s3://bucket/prefix`; without one, `results`), and of it the grid `MMSWEEP_GRID`. A setting is an arm with
# the values of its axes.

# %%
import os

from analysis import figures, tables
from analysis.notebooks import missing, read, search, show
from trainers.errors import InputError

STORE = os.environ.get("MMSWEEP_STORE", "results")
GRID = os.environ.get("MMSWEEP_GRID")
frames = read(STORE, GRID, kinds=("evals",))

# %% [markdown]
# ## What one setting does
#
# Each row changes one setting and leaves the others alike. Left of 0 is better than the base that the row
# names; rows whose interval holds 0 are not told apart by these seeds.

# %%
show(figures.f11, frames)

# %% [markdown]
# ## Ranks
#
# Within a horizon by the median final loss, diverged settings last. A rank does not tell neighbours apart:
# look at how many runs stand behind it.

# %%
ranking = search.ranking(frames)
show(search.ranking_text(ranking), empty="no run has finished")

# %% [markdown]
# ## Would shorter runs have found the same?
#
# Losses half-way through a schedule hardly predict its end, so halving compares whole, shorter schedules;
# where all runs have one length, what comes out is the axis that a grid needs for it.
# Where Spearman's correlation is near 1, a shorter horizon ranks the settings as the next one does.

# %%
try:
    halved = search.halving(frames)
except InputError as error:
    missing(str(error))
    print(search.horizons_axis(frames))
else:
    show(search.halving_text(halved))

# %% [markdown]
# ## Run the best again
#
# The first of many are there by luck too: before any claim, run them on seeds that had no part in the
# choice. Save this as a grid file, set its `resources`, and launch it into the same store. Do not add its
# seeds to the searched grid: all of that grid's count as searched.

# %%
finite = ranking[ranking["final_median"] < float("inf")]
if finite.empty:
    missing("no setting has a finite median final loss")
else:
    best = [str(label) for label in finite["label"][:3]]
    print(search.rerun_grid(frames, best, seeds=search.fresh_seeds(frames, 5), name="rerun"))

# %% [markdown]
# ## What fresh seeds say
#
# The best setting of each arm. *On fresh seeds* is filled by the runs of that grid, as they finish.

# %%
whole = read(STORE, kinds=()) if GRID else frames
winners = tables.t3(frames, whole)
show(tables.t3_text(frames, winners), empty="no arm has two settings with finished runs")
