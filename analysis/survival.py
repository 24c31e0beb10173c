"""Time to divergence: when each run turned, Kaplan–Meier curves of the arms, and an exact test between two.

The event is the first bad evaluation: the earliest step of the rules of `trainers.stability`. Runs are
looked at every so often, so the event itself lies in a bracket (last good, first bad], which `times`
reports; curves and tests use its end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.load import Frames
from analysis.stats import clopper_pearson, holm
from trainers.records import DIVERGED, FINISHED, PENDING
from trainers.stability import Verdict

EXACT_MOST = 200_000
"""Assignments of runs to two arms up to which all are tried: 10 + 10 runs have 184,756."""
DRAWS = 100_000
"""Random assignments beyond that."""

_TIMES = {
    "run_id": "string",
    "arm": "string",
    "label": "string",
    "family": "string",
    "seed": "int64",
    "status": "string",
    "event": "bool",
    "after": "int64",
    "step": "int64",
    "rules": "string",
}


def times(frames: Frames) -> pd.DataFrame:
    """One row per run: divergence in `(after, step]` where `event`, else stable up to `step`.

    Events are divergences of finished runs, as in T1: a rule that fired (`rules` names the earliest), or
    the status `diverged`. A completed run in which no rule fired is censored at its horizon. Runs that the
    machine lost, and those under way, are censored at their last step and never events; where a rule had
    fired before, at the last good evaluation. Left out: runs not begun, and completed ones without verdict.
    """
    rows = []
    evaluated = {run_id: evals["step"].tolist() for run_id, evals in frames.evals.groupby("run_id")}
    for run in frames.runs.to_dict("records"):
        run_id = run["run_id"]
        found = _time(run, frames.verdicts.get(run_id), evaluated.get(run_id, []))
        if found is not None:
            event, after, step, rules = found
            own = {"event": event, "after": after, "step": step, "rules": rules}
            rows.append({name: run[name] for name in _TIMES if name not in own} | own)
    return pd.DataFrame(rows, columns=list(_TIMES)).astype(_TIMES)


def _time(
    run: Mapping[Any, Any], verdict: Verdict | None, evaluated: Sequence[int]
) -> tuple[bool, int, int, str] | None:
    """Event or not, last step known to be good, step of the event or of censoring, names of the rules."""
    step, finished = int(run["step"]), run["status"] in FINISHED
    if run["status"] == PENDING or (finished and verdict is None and run["status"] != DIVERGED):
        return None
    if verdict is not None and verdict.rules:
        first = [rule for rule in verdict.rules if rule.step == verdict.first_bad]
        good = max(rule.last_good or 0 for rule in first)
        if finished:
            return True, good, first[0].step, "; ".join(rule.rule for rule in first)
        return (False, good, good, "") if good else None
    if run["status"] == DIVERGED:  # its last step was bad, though no evaluation shows it
        return True, max((s for s in evaluated if s < step), default=0), step, ""
    end = int(run["horizon"]) if finished and not pd.isna(run["horizon"]) else step
    return (False, end, end, "") if end else None


def kaplan_meier(steps: Sequence[float], events: Sequence[bool], *, level: float = 0.95) -> pd.DataFrame:
    """Share of runs still stable after each distinct step, with its pointwise interval.

    `steps[i]` is run i's step of divergence where `events[i]`, else the step at which it was censored;
    a run that is censored at a step was at risk there. Columns: `step`, `at_risk`, `events`, `censored`,
    `survival`, `se` (Greenwood's, NaN where none survives) and `low`, `high`: the beta product interval
    of Fay, Brittain and Proschan 2013 by moments. Up to the first censoring it is Clopper–Pearson's of
    the share, and it holds its level at 2 to 8 runs, where Greenwood's normal interval does not.
    """
    at, bad = np.asarray(steps, dtype=float), np.asarray(events, dtype=bool)
    tail = (1 - level) / 2
    rows: list[dict[str, float]] = []
    survival, greenwood, factors = 1.0, 0.0, []
    for step in np.unique(at).tolist():
        risk = int((at >= step).sum())
        hit = int((bad & (at == step)).sum())
        survival *= 1 - hit / risk
        greenwood += hit / (risk * (risk - hit)) if risk > hit else math.inf
        if hit:
            factors.append((risk - hit + 1, hit))
        row = {"step": step, "at_risk": risk, "events": hit, "censored": int((at == step).sum()) - hit}
        row |= {"survival": survival, "se": survival * math.sqrt(greenwood) if survival else math.nan}
        row["low"] = _beta_product([*factors, (risk - hit, 1)], tail) if risk > hit else 0.0
        row["high"] = _beta_product(factors, 1 - tail) if factors else 1.0
        rows.append(row)
    columns = ["step", "at_risk", "events", "censored", "survival", "se", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _beta_product(factors: Sequence[tuple[int, int]], quantile: float) -> float:
    """Quantile of the beta distribution with the first two moments of a product of independent betas."""
    mean = math.prod(a / (a + b) for a, b in factors)
    rest = math.prod((a + 1) / (a + b + 1) for a, b in factors)  # second moment / mean
    size = (1 - rest) / (rest - mean)
    return float(stats.beta.ppf(quantile, mean * size, (1 - mean) * size))


def curves(frames: Frames) -> pd.DataFrame:
    """The Kaplan–Meier rows of every label, in the order of the grid."""
    parts = []
    for (arm, label), runs in times(frames).groupby(["arm", "label"], sort=False):
        curve = kaplan_meier(runs["step"].tolist(), runs["event"].tolist())
        parts.append(curve.assign(arm=str(arm), label=str(label)))
    table = pd.concat(parts, ignore_index=True) if parts else kaplan_meier([], [])
    return table.reindex(columns=["arm", "label", *(c for c in table if c not in ("arm", "label"))])


@dataclass(frozen=True, slots=True)
class LogRank:
    """Log-rank test between two arms (see `log_rank`)."""

    observed: int
    """Events in the first arm."""
    expected: float
    """Events expected there, were the arms alike."""
    chi2: float
    """(observed - expected)² / variance, as textbooks have it; NaN where the data leave no choice."""
    p: float
    """Two-sided, by permutation."""
    p_low: float
    p_high: float
    """95% interval of the Monte Carlo error; equal to `p` where all assignments were tried."""
    assignments: int
    exact: bool


def log_rank(
    steps: Sequence[float], events: Sequence[bool], first: Sequence[bool], *, exact_most: int = EXACT_MOST
) -> LogRank:
    """Whether two arms diverge at different times; `first[i]` says that run i is of the first arm.

    The statistic is |observed - expected| of Mantel 1966. p is the share of the assignments of these runs
    to two arms of these sizes in which it is at least as large: of all of them, or beyond `exact_most` of
    `DRAWS` random ones with a fixed seed, the observed one counted (Phipson and Smyth 2010). Valid where
    censoring does not depend on the arm, as with one horizon for all. p is 1 without events.

    Raises:
        ValueError: one of the arms has no run.
    """
    at, bad = np.asarray(steps, dtype=float), np.asarray(events, dtype=bool)
    own = np.asarray(first, dtype=bool)
    n, size = len(own), int(own.sum())
    if size in (0, n):
        raise ValueError("the log-rank test needs runs in both arms")
    hazard, variance = np.zeros(n), 0.0  # hazard: Nelson and Aalen's, over both arms
    for step in np.unique(at[bad]):
        risk = at >= step
        total, hit = int(risk.sum()), int((bad & (at == step)).sum())
        hazard[risk] += hit / total
        share = float(own[risk].mean())
        variance += hit * share * (1 - share) * (total - hit) / max(total - 1, 1)
    scores = bad - hazard  # of an arm, their sum is observed - expected
    excess = float(scores[own].sum())
    limit = abs(excess) - 1e-9
    observed = int(bad[own].sum())
    chi2 = excess**2 / variance if variance > 0 else math.nan
    assignments = math.comb(n, size)
    if assignments <= exact_most:
        p = float(np.mean(np.abs(scores[_choices(n, size)].sum(axis=1)) >= limit))
        return LogRank(observed, observed - excess, chi2, p, p, p, assignments, True)
    random = np.random.Generator(np.random.Philox(0))
    drawn = random.permuted(np.tile(scores, (DRAWS, 1)), axis=1)[:, :size].sum(axis=1)
    as_far = int((np.abs(drawn) >= limit).sum())
    error = clopper_pearson(as_far, DRAWS)
    p = (as_far + 1) / (DRAWS + 1)
    return LogRank(observed, observed - excess, chi2, p, error.low, error.high, DRAWS, False)


def _choices(n: int, size: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Every choice of `size` among n, a row each."""
    flat = itertools.chain.from_iterable(itertools.combinations(range(n), size))
    return np.fromiter(flat, dtype=np.intp, count=math.comb(n, size) * size).reshape(-1, size)


def comparisons(frames: Frames) -> pd.DataFrame:
    """The log-rank test between every two arms of the same grid and axis cell: exploratory.

    `holm` adjusts `p` over the rows of the table.
    """
    rows = []
    for _, family in times(frames).groupby("family", sort=False):
        for one, other in itertools.combinations(family["label"].unique(), 2):
            both = family[family["label"].isin([one, other])]
            own = (both["label"] == one).to_numpy()
            found = log_rank(both["step"].tolist(), both["event"].tolist(), own.tolist())
            rows.append(
                {
                    "label": one,
                    "other": other,
                    "n": int(own.sum()),
                    "n_other": int((~own).sum()),
                    "events": found.observed,
                    "events_other": int(both["event"].sum()) - found.observed,
                    "expected": found.expected,
                    "chi2": found.chi2,
                    "p": found.p,
                    "p_low": found.p_low,
                    "p_high": found.p_high,
                    "assignments": found.assignments,
                    "exact": found.exact,
                }
            )
    table = pd.DataFrame(rows, columns=_COMPARISONS)
    table["holm"] = holm(table["p"].tolist())
    return table


_COMPARISONS = [
    *("label", "other", "n", "n_other", "events", "events_other", "expected", "chi2"),
    *("p", "p_low", "p_high", "assignments", "exact"),
]
