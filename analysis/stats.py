"""Intervals, tests and sample sizes for small numbers of runs. Plain numbers in, plain numbers out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import integrate, stats

SIGN_FLIP_LEAST = 6
"""Pairs below which no sign-flip test reaches p < .05: the smallest p is 2 / 2^n."""
SIGN_FLIP_MOST = 20
"""Pairs up to which all 2^n signs are tried."""
SPIKE_SIGMAS = 7.0
"""As in OLMo 2 (arXiv 2501.00656)."""
SPIKE_WINDOW = 1000
"""Steps that a spike is judged by, as there; of a tenth of the horizon in shorter runs."""
SHORT_WINDOW = 20
"""Values that it is judged by at least."""
OLMO_CORE_SIGMAS, OLMO_CORE_WINDOW = 6.0, 128
"""By which OLMo-core's optimizers skip a step (`SkipStepOptimizer`)."""


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
    """Mean of paired differences with Student's t interval.

    No bounds below two pairs, and where all differences are one number: a spread of 0 is not known to be 0
    (counts of spikes easily agree in two seeds).

    Raises:
        ValueError: a difference is not finite. Leave such pairs out, and say how many remain.
    """
    if not all(math.isfinite(d) for d in differences):
        raise ValueError("differences must be finite")
    n = len(differences)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = statistics.fmean(differences)
    if n == 1 or np.ptp(differences) <= 1e-9 * np.abs(differences).max():
        return Interval(mean, math.nan, math.nan, n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_t_p(differences: Sequence[float]) -> float:
    """Two-sided p of the paired t test of mean 0; NaN where `paired_t` has no bounds.

    Raises:
        ValueError: a difference is not finite.
    """
    found = paired_t(differences)
    if math.isnan(found.low):
        return math.nan
    t = found.estimate / (statistics.stdev(differences) / math.sqrt(found.n))
    return float(2 * stats.t.sf(abs(t), found.n - 1))


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the randomisation test of paired differences: the share of all 2^n assignments of
    signs whose sum is at least as far from 0 as the observed one. Exact where both orders of a pair are
    equally likely; no normality. NaN without pairs. Source: Fisher 1935, The Design of Experiments, §21.

    Raises:
        ValueError: a difference is not finite, or there are more than `SIGN_FLIP_MOST`.
    """
    if not all(math.isfinite(d) for d in differences):
        raise ValueError("differences must be finite")
    n = len(differences)
    if n > SIGN_FLIP_MOST:
        raise ValueError(f"{n} pairs: all signs are tried up to {SIGN_FLIP_MOST}; use the t test")
    if n == 0:
        return math.nan
    sums = np.array([differences[0]], dtype=float)  # the other half of the signs gives the same distances
    for d in differences[1:]:
        sums = np.concatenate([sums + d, sums - d])
    rounding = 1e-9 * math.fsum(map(abs, differences))
    return float(np.mean(np.abs(sums) >= abs(math.fsum(differences)) - rounding))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given. NaN, a test without data yet, stays NaN and counts
    among the tests, so that no adjusted p rises when its data arrive. Source: Holm 1979."""
    adjusted = [math.nan] * len(p_values)
    known = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=p_values.__getitem__)
    least = 0.0
    for place, i in enumerate(known):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = least
    return adjusted


def median(losses: Iterable[float]) -> float:
    """Median with a diverged run as +inf. NaN, a run without result, is left out; NaN where none is left."""
    known = [loss for loss in losses if not math.isnan(loss)]
    return statistics.median(known) if known else math.nan


def ranks(medians: Sequence[float]) -> list[int | None]:
    """1 for the lowest. Equal ones share the lowest of their places, +inf among them; None for NaN."""
    known = [m for m in medians if not math.isnan(m)]
    return [None if math.isnan(m) else 1 + sum(other < m for other in known) for m in medians]


def power(gap: float, sigma: float, runs: int, *, paired: bool = False, level: float = 0.95) -> float:
    """Probability that a two-sided t test finds a difference `gap` of two arms of `runs` runs each.

    `sigma` is the standard deviation of one run's loss over seeds, in the unit of `gap`. Under the
    alternative t is noncentral, with parameter gap / (sigma √(2 / runs)) and 2 runs - 2 degrees of
    freedom; `paired`: with runs - 1, for pairs whose losses are uncorrelated, the worst that pairing by
    seed should do. Give sd(difference) / √2 as `sigma` where that of the differences is known.

    Raises:
        ValueError: fewer than two runs, or sigma is not above 0.
    """
    if runs < 2 or not sigma > 0:
        raise ValueError(f"power needs two runs an arm and sigma above 0, not {runs} and {sigma:g}")
    freedom = runs - 1 if paired else 2 * runs - 2
    shift = abs(gap) / (sigma * math.sqrt(2 / runs))
    critical = float(stats.t.ppf((1 + level) / 2, freedom))

    def found(scale: float) -> float:
        """Density of s / sigma times the probability of a finding, given s."""
        density = 2 * freedom * scale * stats.chi2.pdf(freedom * scale**2, freedom)
        tails = stats.norm.cdf(shift - critical * scale) + stats.norm.cdf(-shift - critical * scale)
        return float(density * tails)

    # scipy's noncentral t is NaN at the large shifts that small sigmas give.
    end = math.sqrt(float(stats.chi2.isf(1e-12, freedom)) / freedom)
    value, _ = integrate.quad(found, 0, end, limit=200)
    return min(1.0, float(value))


def runs_needed(
    gap: float, sigma: float, *, power_wanted: float = 0.9, paired: bool = False, level: float = 0.95
) -> int:
    """Fewest runs per arm, two at least, that find `gap` with `power_wanted` (see `power`).

    Raises:
        ValueError: more than 1,000 would be needed.
    """
    low, high = 1, 2
    while power(gap, sigma, high, paired=paired, level=level) < power_wanted:
        low, high = high, 2 * high
        if high > 1024:
            raise ValueError(f"a gap of {gap:g} at sigma {sigma:g} needs more than 1,000 runs an arm")
    while high - low > 1:
        middle = (low + high) // 2
        enough = power(gap, sigma, middle, paired=paired, level=level) >= power_wanted
        low, high = (low, middle) if enough else (middle, high)
    return high


@dataclass(frozen=True, slots=True)
class Sigma:
    """Standard deviation over seeds, with a one-sided upper bound; NaN without degrees of freedom."""

    estimate: float
    upper: float
    freedom: int


def pilot_sigma(arms: Iterable[Sequence[float]], *, level: float = 0.8) -> Sigma:
    """Seed noise of a pilot: standard deviation of final losses within arms, pooled over the arms.

    `upper` = estimate √(f / χ²(1 - level, f)) holds the true value with probability `level`, where
    losses are normal with one variance. Plan with it: with few seeds the estimate is often too low.

    Raises:
        ValueError: a loss is not finite.
    """
    squares, freedom = 0.0, 0
    for losses in arms:
        if not all(math.isfinite(loss) for loss in losses):
            raise ValueError("losses must be finite")
        if len(losses) > 1:
            squares += statistics.variance(losses) * (len(losses) - 1)
            freedom += len(losses) - 1
    if not freedom:
        return Sigma(math.nan, math.nan, 0)
    estimate = math.sqrt(squares / freedom)
    return Sigma(estimate, estimate * math.sqrt(freedom / stats.chi2.ppf(1 - level, freedom)), freedom)


@dataclass(frozen=True, slots=True)
class LrSensitivity:
    """How much the final loss depends on the learning rate (see `lr_sensitivity`)."""

    best_lr: float
    best_loss: float
    at_edge: bool
    """The best rate is the lowest or the highest tried: the optimum may lie outside."""
    spread: float
    """Largest minus smallest loss over the rates around the best; +inf where one diverges."""
    n_around: int
    diverged: Interval
    """Share of the rates tried that diverge, with its Clopper–Pearson interval."""


def lr_sensitivity(runs: Iterable[tuple[float, float]], *, within: float = 4.0) -> LrSensitivity:
    """Sensitivity of one arm, from `(lr, final loss)` of its runs, several seeds a rate or one.

    A rate's loss is the median over its runs with diverged = +inf, and it diverges where that is
    infinite. Around the best means within a factor `within` of it, so that a finer grid does not look
    less sensitive; `spread` is NaN where no other rate lies there. All is NaN where every rate diverges.
    """
    by_lr: dict[float, list[float]] = {}
    for lr, loss in runs:
        if not math.isnan(loss):
            by_lr.setdefault(lr, []).append(loss)
    losses = {lr: median(values) for lr, values in sorted(by_lr.items())}
    infinite = sum(math.isinf(loss) for loss in losses.values())
    diverged = clopper_pearson(infinite, len(losses))
    if infinite == len(losses):
        return LrSensitivity(math.nan, math.nan, False, math.nan, 0, diverged)
    best = min(losses, key=losses.__getitem__)
    reach = within * (1 + 1e-9)
    around = [loss for lr, loss in losses.items() if best / reach <= lr <= best * reach]
    spread = max(around) - min(around) if len(around) > 1 else math.nan
    at_edge = best in (min(losses), max(losses))
    return LrSensitivity(best, losses[best], at_edge, spread, len(around), diverged)


def sign_test(above: int, below: int) -> float:
    """Two-sided exact p of as uneven a split of `above + below` fair coins; NaN where there are none.

    Source: Arbuthnott 1710; Conover 1999, Practical Nonparametric Statistics, §3.4.
    """
    n = above + below
    return float(min(1.0, 2 * stats.binom.cdf(min(above, below), n, 0.5))) if n else math.nan


def median_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Median with its exact interval between two order statistics: whatever the distribution, the true
    median lies in it with probability `level` at least. Values may be infinite. No bounds where even the
    extremes hold less than `level`, which is below six values at .95. Source: Thompson 1936.

    Raises:
        ValueError: a value is NaN.
    """
    if any(math.isnan(value) for value in values):
        raise ValueError("values must not be NaN")
    ordered, n = sorted(values), len(values)
    if not n:
        return Interval(math.nan, math.nan, math.nan, 0)
    lower, upper = ordered[(n - 1) // 2], ordered[n // 2]
    middle = lower if lower == upper else (lower + upper) / 2  # -inf and +inf have none
    outside = int(stats.binom.ppf((1 - level) / 2, n, 0.5))  # most that may be cut from either side
    while outside and stats.binom.cdf(outside - 1, n, 0.5) > (1 - level) / 2:
        outside -= 1
    if not outside:
        return Interval(middle, math.nan, math.nan, n)
    return Interval(middle, ordered[outside - 1], ordered[n - outside], n)


def spikes(
    values: Sequence[float] | np.ndarray[Any, np.dtype[np.float64]],
    *,
    window: int,
    sigmas: float = SPIKE_SIGMAS,
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which values lie at least `sigmas` standard deviations above the mean of the `window` before.

    A value that is not finite is a spike, and in no window; a finite one with fewer than `window` finite
    ones before it is none. The standard deviation is that of the window itself. Source: the spike score of
    OLMo 2 (arXiv 2501.00656), over 1,000 steps, which counts falls too.
    """
    array = np.asarray(values, dtype=float)
    finite = np.isfinite(array)
    known = array[finite]
    found: np.ndarray[Any, np.dtype[np.bool_]] = ~finite
    if len(known) > window:
        excess, variance = _against_past(known, window)
        rising = excess > 1e-9 * np.abs(known[window:])  # rounding of equal values is no spike
        with np.errstate(over="ignore"):
            high = excess**2 >= sigmas**2 * variance
        found[finite] = np.append(np.zeros(window, dtype=bool), rising & high)
    return found


def _against_past(
    values: np.ndarray[Any, np.dtype[np.float64]], window: int
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    """Of each value with `window` before it: how far it is above their mean, and their variance.

    Those before it are the end of one block of `window` values and the start of the next, and each of the
    two parts is a cumulative sum within its block, so that a huge value leaves no rounding once it is out
    of the window. Sums are of distances to the last value of the first block, which is in all of them.
    """
    padded = np.zeros(-(-len(values) // window) * window)
    padded[: len(values)] = values
    blocks = padded.reshape(-1, window)
    end, start = blocks[:-1] - blocks[:-1, -1:], blocks[1:] - blocks[:-1, -1:]
    with np.errstate(over="ignore", invalid="ignore"):  # the square of a huge value, and inf - inf
        mean = _window_sums(end, start) / window
        excess, variance = start - mean, _window_sums(end**2, start**2) / window - mean**2
    counted = len(values) - window
    return excess.ravel()[:counted], variance.ravel()[:counted]


def _window_sums(
    end: np.ndarray[Any, np.dtype[np.float64]], start: np.ndarray[Any, np.dtype[np.float64]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """In column j the sums over `end` from j on and over `start` before j."""
    sums = np.cumsum(end[:, ::-1], axis=1)[:, ::-1]
    sums[:, 1:] += np.cumsum(start[:, :-1], axis=1)
    return sums


def spike_window(horizon: int, longest: int = SPIKE_WINDOW) -> int:
    """Steps that a spike is judged by: `longest`, or a tenth of the horizon where that is less, and
    `SHORT_WINDOW` at least."""
    return min(longest, max(SHORT_WINDOW, horizon // 10))


def spike_score(
    values: np.ndarray[Any, np.dtype[np.float64]], found: np.ndarray[Any, np.dtype[np.bool_]], window: int
) -> float:
    """Share of `values` that are spikes, where `found = spikes(values, window=window)`.

    The finite values of the first window cannot be any and are not counted. NaN where none can be.
    """
    finite = int(np.isfinite(values).sum())
    counted = max(finite - window, 0) + len(values) - finite
    return int(found.sum()) / counted if counted else math.nan


def rises(values: np.ndarray[Any, np.dtype[np.float64]], rise: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which values lie more than `rise` above the lowest up to there. One that is not finite does."""
    lost = ~np.isfinite(values)
    lowest = np.minimum.accumulate(np.where(lost, math.inf, values))
    found: np.ndarray[Any, np.dtype[np.bool_]] = lost | (values > lowest + rise)
    return found


def spread(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Standard deviation of the changes from one value to the next, over √2: that of the values, where
    they are independent about a slow trend (von Neumann 1941). NaN below three finite values."""
    changes = np.diff(values[np.isfinite(values)])
    return float(changes.std(ddof=1) / math.sqrt(2)) if len(changes) > 1 else math.nan
