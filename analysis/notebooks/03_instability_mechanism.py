# %% [markdown]
# # The mechanism of instability
#
# **Which runs turned unstable, and what moved first: singular values, logits, attention or gradients?**
#
# It reads the store named by `MMSWEEP_STORE` (a folder, relative to the repository's root, or
# `s3://bucket/prefix`; without one, `results`), and of it the grid `MMSWEEP_GRID`. The paper proposes an
# order; here none is assumed.

# %%
import os

from analysis import figures, mechanism, survival, tables
from analysis.notebooks import conclusions, read, show

STORE = os.environ.get("MMSWEEP_STORE", "results")
GRID = os.environ.get("MMSWEEP_GRID")
frames = read(STORE, GRID, kinds=("steps", "evals", "spectra", "attention", "flow"))

# %% [markdown]
# ## Which rule fired
#
# A row for each stability rule that fired in a run. The run was still good at *last good*; a cell of the
# same name in two rows is one run that broke two rules.

# %%
show(tables.t4_text(frames, tables.t4(frames)), empty="no rule fired in any judged run")

# %% [markdown]
# ## How long runs stay stable
#
# A curve falls where a run turned; + marks stable runs that were watched to the end. Below, whether two
# arms differ in when they turn: with three runs an arm no p can be below .1.

# %%
show(figures.f5, frames)
show(tables.log_rank_text(survival.comparisons(frames)), empty="no two arms to compare, or no run diverged")

# %% [markdown]
# ## What moved first
#
# Left, when each quantity first left its bounds; right, how many steps before the loss that was. An alarm
# is useful where it rings in many unstable runs and in few stable ones.

# %%
crossed = mechanism.crossings(frames)
show(figures.f10, frames)
show(mechanism.alarms_text(mechanism.alarms(frames, crossed)))

# %% [markdown]
# ## Orders of events
#
# The orders that were seen, and what the runs say of the paper's; then every two quantities.

# %%
show(conclusions(frames, "Stability", "Mechanism"))
orders, chain = mechanism.orders(frames, crossed), mechanism.chain(frames, crossed)
show(
    mechanism.orders_text(orders, chain), empty="no finished run is unstable, so there is no order of events"
)
pairs = mechanism.precedence(frames, crossed)
show(mechanism.precedence_text(pairs), empty="of no two quantities is it known which one came first")

# %% [markdown]
# ## Inside attention
#
# Saturation is a small ‖J‖ together with a large p_max; a small ‖J‖ with a small p_max is flat attention.
# The maps show in which layers singular values grow.

# %%
show(figures.f9, frames)
show(figures.f8, frames)
