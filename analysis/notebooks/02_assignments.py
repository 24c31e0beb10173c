# %% [markdown]
# # Assignments
#
# **Which manifold suits attention, which the MLP, and does the one depend on the other?**
#
# It reads the store named by `MMSWEEP_STORE` (a folder, relative to the repository's root, or
# `s3://bucket/prefix`; without one, `results`), and of it the grid `MMSWEEP_GRID`.

# %%
import os

from analysis import contrasts, figures, tables
from analysis.notebooks import assignments, conclusions, read, show

STORE = os.environ.get("MMSWEEP_STORE", "results")
GRID = os.environ.get("MMSWEEP_GRID")
frames = read(STORE, GRID, kinds=("evals",))
show(figures.f3, frames)

# %% [markdown]
# ## Attention by MLP
#
# The median final loss of every pair of assignments (nats per token, n runs in brackets). If the best
# column is the same in every row, the MLP's choice does not depend on attention's.

# %%
show(assignments.crossed(frames), empty="no run has finished")

# %% [markdown]
# ## Paired differences
#
# Arms that share a seed share initial weights and batches, so they are compared run by run. An interval
# that does not hold 0 is a difference that these seeds can tell, before any correction for looking at many.

# %%
show(figures.f4, frames)

# %% [markdown]
# ## One module changed
#
# Two arms that differ in the assignment of one module alone, with the p-value corrected for their number.

# %%
swaps = contrasts.swaps(frames, tables.t1(frames))
show(contrasts.swaps_text(swaps), empty="no two arms differ in the assignment of one module alone")

# %% [markdown]
# ## Does the one depend on the other?
#
# The interaction: how much more a change of attention does under one MLP than under the other, by seed.
# 0 means that the two choices add up. Exploratory, not corrected for the number of rows.

# %%
show(
    assignments.interactions_text(assignments.interactions(frames)),
    empty="an interaction needs four arms that cross two assignments of each module, with finite losses",
)

# %%
show(conclusions(frames, "Loss", "Predeclared", "Stability", "Seeds"))
