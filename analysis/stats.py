"""Intervals for small numbers of runs. Plain numbers in, plain numbers out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its two-sided interval; the bounds are NaN where `n` allows none."""

    estimate: float
    low: float
    high: float
    n: int


def clopper_pearson(k: int, n: int, *, level: float = 0.95) -> Interval:
    """Exact binomial interval for `k` events in `n` trials; [0, 1] where n = 0.

    Source: Clopper and Pearson 1934, in the beta form.

    Raises:
        ValueError: k is not within 0..n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is not a proportion")
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else float(stats.beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k == n else float(stats.beta.ppf(1 - tail, k + 1, n - k))
    return Interval(k / n if n else math.nan, low, high, n)


def paired_t(differences: Sequence[float], *, level: float = 0.95) -> Interval:
    """Mean of paired differences with Student's t interval; no bounds below two pairs.

    Raises:
        ValueError: a difference is not finite. Leave such pairs out, and say how many remain.
    """
    if not all(math.isfinite(d) for d in differences):
        raise ValueError("differences must be finite")
    n = len(differences)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = statistics.fmean(differences)
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)
