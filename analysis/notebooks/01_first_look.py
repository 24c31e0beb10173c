# %% [markdown]
# # First look
#
# **Which arms are ahead in this store, and did any run turn unstable?**
#
# It reads the store named by `MMSWEEP_STORE`: a folder, relative to the repository's root, or
# `s3://bucket/prefix`; without one, `results`. `MMSWEEP_GRID` chooses one grid of several. Sweeps that
# still run can be read too: run the notebook again for what is new.

# %%
import os

from analysis import figures, tables
from analysis.notebooks import conclusions, read, show

STORE = os.environ.get("MMSWEEP_STORE", "results")
GRID = os.environ.get("MMSWEEP_GRID")
frames = read(STORE, GRID, kinds=("evals", "spectra"))

# %% [markdown]
# ## The arms side by side
#
# A row for each arm, in the order of the grid. Compare arms by the column of paired differences, whose
# interval holds the true difference in 95 of 100 sweeps; the mean of an arm with unstable runs says little.

# %%
show(tables.t1_text(frames, tables.t1(frames), compact=True))

# %% [markdown]
# ## Validation loss
#
# A curve that turns up and goes on dashed is a run that became unstable, × its first bad evaluation. The
# right panel is a close-up of the end; where bands overlap, seeds differ as much as arms.

# %%
show(figures.f1, frames)

# %% [markdown]
# ## Singular values
#
# The largest singular value of any attention matrix (left) and of any MLP matrix (right). On a Stiefel
# manifold it stays at 1; growth by a factor of ten or more is what the paper links to instability.

# %%
show(figures.f2, frames)

# %% [markdown]
# ## What the runs say so far
#
# Every number is computed from the runs above. *Undecided* is what these seeds cannot tell.

# %%
topics = ("Progress", "Loss", "Predeclared", "Attention", "MLP", "Stability", "Spectra")
show(conclusions(frames, *topics))
