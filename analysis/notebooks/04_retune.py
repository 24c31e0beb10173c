# %% [markdown]
# # Retuning
#
# **Can learning rate and weight decay keep an arm stable, and how much does its loss depend on them?**
#
# It reads the store named by `MMSWEEP_STORE` (a folder, relative to the repository's root, or
# `s3://bucket/prefix`; without one, `results`), and of it the grid `MMSWEEP_GRID`. It is made for grids with
# a learning rate and a weight decay among their axes, as `retune_dgram_attention`.

# %%
import os

import pandas as pd

from analysis import figures, sensitivity, tables
from analysis.notebooks import missing, read, search, show

STORE = os.environ.get("MMSWEEP_STORE", "results")
GRID = os.environ.get("MMSWEEP_GRID")
frames = read(STORE, GRID, kinds=("evals",))

# %% [markdown]
# ## Loss against the learning rate
#
# A flat curve is an arm that forgives a wrong rate. × at the upper edge: the run diverged. A best rate at
# the edge of those tried may not be the best there is.

# %%
show(figures.f6, frames)

# %% [markdown]
# ## Sensitivity
#
# `spread`: what the worst rate within a factor of four of the best costs, in nats; ∞ where it diverges.
# `diverged`: the share of the rates tried whose median run diverges.


# %%
def costs(axis: str) -> pd.DataFrame:
    """What another rate costs each arm, without the columns that are for programs."""
    table = sensitivity.table(frames, axis)
    return table.drop(columns=["grid", "axis", "n_around", "rates_diverged", "n_runs"])


for axis in sensitivity.rate_axes(frames):
    show(costs, axis)
if not sensitivity.rate_axes(frames):
    missing("no axis of these runs is a learning rate")

# %% [markdown]
# ## Rate and decay together
#
# Hatched cells have unstable runs. A clean region, not one clean cell, is what can be recommended.

# %%
show(figures.f7, frames)

# %% [markdown]
# ## How many settings stay stable
#
# By arm, the settings in which no finished run turned unstable. With two seeds a setting that fails every
# second time looks stable in one of four.

# %%
show(search.calm_settings(frames), empty="no run has finished")

# %% [markdown]
# ## Winners
#
# The best of many settings is lucky too, so only *on fresh seeds* says how good it is: runs of the same
# settings on other seeds, from all grids of the store. `05_search` writes a grid for them.

# %%
whole = read(STORE, kinds=()) if GRID else frames
winners = tables.t3(frames, whole)
show(tables.t3_text(frames, winners), empty="no arm has two settings with finished runs")
