"""Bytes that a run leaves in the store, counted from its config."""

from __future__ import annotations

import math

from mmsweep.store import KEPT_CHECKPOINTS
from trainers.config import RunConfig
from trainers.flops import evaluation_count, matrices, parameter_count


def record_counts(run: RunConfig) -> dict[str, int]:
    """Rows of each kind that a run leaves when it goes to its end."""
    probes, layers, heads = run.probes, run.model.n_layer, run.model.n_head
    steps, evaluations = run.schedule.steps, evaluation_count(run)
    every = run.evaluation.every
    shapes = matrices(run.model)
    looks = evaluations
    if (often := probes.attention_every) is not None:
        both = steps // math.lcm(often, every) + (steps % often == 0 and steps % every != 0)
        looks += steps // often - both
    moved = sum(
        len(shapes[kind]) + (run.qkv_blocks - 1 if kind == "attn" else 0)
        for kind in shapes
        if getattr(run.assignment, kind).optimizer == "muon"
    )
    counts = {"steps": steps, "evals": evaluations}
    number = sum(map(len, shapes.values())) * layers
    if probes.spectra:
        counts["spectra"] = number * evaluations
    if probes.heads:
        counts["heads"] = (4 * heads + 3) * layers * evaluations
    if probes.attention:
        counts["attention"] = heads * layers * looks
    if probes.updates and moved:
        counts["updates"] = moved * layers * _due(steps, probes.updates_every or every)
    if probes.flow:
        counts["flow"] = number * _due(steps, probes.flow_every)
    if probes.costs:
        counts["costs"] = _due(steps, probes.costs_every)
    return counts


def _due(steps: int, every: int) -> int:
    """Multiples of `every`, and the last step."""
    return steps // every + (steps % every != 0)


_TABLE = {
    "steps": (3600, 53), "evals": (2340, 36), "spectra": (3000, 30), "heads": (3300, 36),
    "attention": (3000, 30), "updates": (3600, 18), "flow": (4000, 35), "costs": (3600, 51),
}  # fmt: skip
"""Bytes of a Parquet file of a kind: of itself, and of a row without its lists. Read off finished runs."""
_SINGULAR_VALUE, _STIEFEL_VALUE = 9.5, 6.6
"""Bytes of a number in `sigma` and `gram_diag`; those of a Stiefel matrix are all near 1."""
_FACTS = 3600
"""Bytes of config, status and summary."""


def stored_bytes(run: RunConfig) -> float:
    """What a run leaves in the store: tables, checkpoints, and what is said of it."""
    return _FACTS + sum(table_bytes(run).values()) + checkpoints_bytes(run)


def table_bytes(run: RunConfig) -> dict[str, float]:
    """Parquet by kind, to a quarter or so: how well numbers compress is the run's own affair."""
    counts = record_counts(run)
    found = {kind: _TABLE[kind][0] + count * float(_TABLE[kind][1]) for kind, count in counts.items()}
    if "spectra" in counts:
        for kind, shapes in matrices(run.model).items():
            value = _STIEFEL_VALUE if getattr(run.assignment, kind).manifold == "stiefel" else _SINGULAR_VALUE
            numbers = 2 * sum(min(shape) for shape in shapes) * run.model.n_layer * evaluation_count(run)
            found["spectra"] += value * numbers
    return found


def checkpoints_bytes(run: RunConfig) -> float:
    """Weights, AdamW's two moments and Muon's momentum in float32, as often as checkpoints are kept."""
    parameters = parameter_count(run.model)
    on_muon = run.model.n_layer * sum(
        m * n
        for kind, shapes in matrices(run.model).items()
        if getattr(run.assignment, kind).optimizer == "muon"
        for m, n in shapes
    )
    kept = min(
        KEPT_CHECKPOINTS, run.runtime.keep_checkpoints, _due(run.schedule.steps, run.runtime.checkpoint_every)
    )
    return kept * 4.0 * (3 * parameters - on_muon)
