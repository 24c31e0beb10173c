"""Differences of two arms' final losses, in pairs that share a seed, and whether they are decided.

Predeclared contrasts are those of T1. Beside them, for the question which assignment suits which module,
every two arms of a cell that differ in the assignment of one module alone: exploratory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.load import Frames
from analysis.stats import holm, paired_t, paired_t_p
from analysis.tables import EXPLORATORY, PREDECLARED, PRIMARY, Text, bounds, p_cell, signed
from mmsweep.regrid import flat

LEVEL = 0.05
UNDECIDED = "undecided"
MODULES = {"attn": "attention", "mlp": "MLP"}


@dataclass(frozen=True, slots=True)
class Contrast:
    """`arm` minus `reference`, both labels: the mean over seeds with its 95% t interval."""

    arm: str
    reference: str
    estimate: float
    low: float
    high: float
    pairs: int
    """With two finite losses."""
    arm_lost: int
    """Seeds in which the arm diverged and the reference did not."""
    reference_lost: int
    arm_unstable: int
    """Pairs in which a stability rule fired in the arm's run, which has a finite loss all the same."""
    reference_unstable: int
    p: float
    holm: float
    role: str
    runs: tuple[str, ...]
    """Of every pair whose runs have finished."""

    @property
    def verdict(self) -> str:
        """`lower` or `higher`, of the arm, where Holm's p is below `LEVEL` and no seed in which one of the
        two alone diverged speaks against it; else UNDECIDED."""
        if self.holm < LEVEL and self.estimate < 0 and not self.arm_lost:
            return "lower"
        if self.holm < LEVEL and self.estimate > 0 and not self.reference_lost:
            return "higher"
        return UNDECIDED

    @property
    def why_undecided(self) -> str:
        if not self.pairs and self.arm_lost + self.reference_lost:
            return "no pair of finite losses"
        if not self.pairs:
            return "no pair of finished runs yet" if not self.runs else "both diverged"
        if self.pairs == 1:
            return "one pair gives no interval"
        if math.isnan(self.p):
            return "the differences are all alike, so their spread is not known"
        if not self.holm < LEVEL:
            return f"Holm p = {p_cell(self.holm)}"
        return "the arm with the lower mean also diverged"


def contrast(runs: pd.DataFrame, others: pd.DataFrame) -> Contrast:
    """`runs` minus `others`, rows of `Frames.runs`: exploratory, and not adjusted yet."""
    pairs = runs.merge(others, on=["family", "seed"], suffixes=("", "_reference"))
    pairs = pairs[pairs["final_val_loss"].notna() & pairs["final_val_loss_reference"].notna()]
    left, right = pairs["final_val_loss"], pairs["final_val_loss_reference"]
    differences = [d for d in (left - right).tolist() if math.isfinite(d)]
    found = paired_t(differences)
    return Contrast(
        _name(runs),
        _name(others),
        found.estimate,
        found.low,
        found.high,
        found.n,
        int(((left == math.inf) & (right != math.inf)).sum()),
        int(((left != math.inf) & (right == math.inf)).sum()),
        int((pairs["unstable"].fillna(False).astype(bool) & (left != math.inf)).sum()),
        int((pairs["unstable_reference"].fillna(False).astype(bool) & (right != math.inf)).sum()),
        paired_t_p(differences),
        math.nan,
        EXPLORATORY,
        (*pairs["run_id"].astype(str), *pairs["run_id_reference"].astype(str)),
    )


def _name(runs: pd.DataFrame) -> str:
    return str(runs["label" if runs["label"].nunique() == 1 else "arm"].iloc[0])


def predeclared(frames: Frames, table: pd.DataFrame) -> list[Contrast]:
    """The contrasts named before any run, adjusted as in `table`, T1; one per axis cell."""
    found = []
    for arm, reference in PREDECLARED:
        others = frames.runs[frames.runs["arm"] == reference]
        for row in table[table["arm"] == arm].to_dict("records"):
            if len(others):
                runs = frames.runs[frames.runs["label"] == row["label"]]
                adjusted = row[f"minus_{reference}_holm"]
                found.append(replace(contrast(runs, others), holm=adjusted, role=PRIMARY))
    return found


@dataclass(frozen=True, slots=True)
class Swap:
    """A contrast of two arms whose configs differ in the assignment of one module alone."""

    module: str
    this: str
    """What the arm has on the module."""
    that: str
    """What the reference has there."""
    held: str
    """What both have on the other module."""
    contrast: Contrast


def swaps(frames: Frames, table: pd.DataFrame) -> list[Swap]:
    """Every such contrast of a cell, attention first. The arm is the one with the lower mean.

    The exploratory ones are adjusted by Holm over one another; the predeclared ones, which keep their
    direction, as in `table`, T1.
    """
    primary = {(found.arm, found.reference): found for found in predeclared(frames, table)}
    found = []
    for _, family in frames.runs.groupby("family", sort=False):
        by_label = {str(label): runs for label, runs in family.groupby("label", sort=False)}
        configs = {label: trained(frames, runs) for label, runs in by_label.items()}
        for pair in itertools.combinations([label for label in by_label if configs[label]], 2):
            kind = _only_module(*(configs[label] for label in pair))
            if kind is not None:
                arm, reference = next((p for p in (pair, pair[::-1]) if p in primary), pair)
                known = primary.get((arm, reference)) or contrast(by_label[arm], by_label[reference])
                if known.role == EXPLORATORY and known.estimate > 0:
                    known = contrast(by_label[reference], by_label[arm])
                this, that = (assigned(configs[label], kind) for label in (known.arm, known.reference))
                other = next(module for module in MODULES if module != kind)
                found.append(Swap(MODULES[kind], this, that, assigned(configs[arm], other), known))
    return sorted(_adjusted(found), key=lambda swap: list(MODULES.values()).index(swap.module))


def _adjusted(found: Sequence[Swap]) -> list[Swap]:
    exploratory = [swap for swap in found if swap.contrast.role == EXPLORATORY]
    adjusted = iter(holm([swap.contrast.p for swap in exploratory]))
    return [
        replace(swap, contrast=replace(swap.contrast, holm=next(adjusted)))
        if swap.contrast.role == EXPLORATORY
        else swap
        for swap in found
    ]


def trained(frames: Frames, runs: pd.DataFrame) -> dict[str, Any]:
    """What the runs train, as dotted paths of their config; empty where none has a config yet."""
    apart = ("arm", "seed", "runtime", "probes", "stability")
    for run_id in runs["run_id"]:
        config = frames.configs.get(run_id, {}).get("config")
        if isinstance(config, Mapping):
            return flat({key: value for key, value in config.items() if key not in apart})
    return {}


def _only_module(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The module whose assignment is all that differs."""
    paths = [path for path in {*one, *other} if one.get(path) != other.get(path)]
    kinds = {next((k for k in MODULES if path.startswith(f"assignment.{k}.")), None) for path in paths}
    return kinds.pop() if len(kinds) == 1 else None


def assigned(config: Mapping[str, Any], kind: str) -> str:
    """`stiefel`, `unconstrained`, `adamw`, `adamw stiefel`; with its own lr and decay where it has any."""
    own = {name: config.get(f"assignment.{kind}.{name}") for name in _ASSIGNMENT}
    words = ["adamw"] if own["optimizer"] == "adamw" else []
    if own["manifold"] not in (None, "none"):
        words.append(str(own["manifold"]))
    lr, decay = own["lr_multiplier"], own["weight_decay"]
    more = [f"lr × {lr:g}"] if lr not in (None, 1) else []
    more += [] if decay is None else [f"decay {decay:g}"]
    return ", ".join([" ".join(words) or "unconstrained", *more])


_ASSIGNMENT = ("optimizer", "manifold", "lr_multiplier", "weight_decay")


def swaps_frame(found: Sequence[Swap]) -> pd.DataFrame:
    """One row per swap; losses in nats per token."""
    columns = ["module", "arm_has", "reference_has", "other_module_has", "arm", "reference"]
    columns += ["difference", "low", "high", "pairs", "arm_diverged", "reference_diverged"]
    columns += ["role", "p", "holm", "verdict"]
    rows = [
        (
            *(swap.module, swap.this, swap.that, swap.held, c.arm, c.reference, c.estimate, c.low, c.high),
            *(c.pairs, c.arm_lost, c.reference_lost, c.role, c.p, c.holm, c.verdict),
        )
        for swap in found
        for c in (swap.contrast,)
    ]
    return pd.DataFrame(rows, columns=columns)


def swaps_text(found: Sequence[Swap]) -> Text:
    """The same as people read it."""
    columns: tuple[str, ...] = ("module", "has", "instead of", "other module", "arm − reference")
    rows = tuple(
        (
            *(swap.module, swap.this, swap.that, swap.held, f"{c.arm} − {c.reference}"),
            signed(c.estimate) + bounds(c.low, c.high) if c.pairs else "–",
            str(c.pairs) + (f" [{lost}]" if (lost := lost_seeds(c)) else ""),
            p_cell(c.holm),
            c.role,
            f"undecided: {c.why_undecided}" if c.verdict == UNDECIDED else f"{swap.this} {c.verdict}",
        )
        for swap in found
        for c in (swap.contrast,)
    )
    columns += ("difference", "pairs", "Holm p", "role", "verdict")
    words = tuple(column not in ("difference", "pairs", "Holm p") for column in columns)
    notes = (
        "Two arms that differ in the assignment of one module and in nothing else. difference: final "
        "validation loss, nats per token, mean over seeds with its 95% t interval. Holm p: over the "
        "exploratory rows of this table; primary rows have theirs from T1. A difference is decided below "
        f"{LEVEL:g}, unless the arm with the lower mean diverged in a seed in which the other did not.",
    )
    return Text(columns, rows, words, notes)


def lost_seeds(found: Contrast) -> str:
    """`hetero alone diverged in 1 seed`, or nothing."""
    lost = ((found.arm, found.arm_lost), (found.reference, found.reference_lost))
    return ", ".join(f"{name} alone diverged in {count(n, 'seed')}" for name, n in lost if n)


def count(n: int, noun: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
