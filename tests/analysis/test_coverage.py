"""Simulated sweeps whose truth is known: intervals hold it as often as they say, tests err as rarely.

1,000 sweeps each, always the same. A rate of .95 is then known to .007, one of .05 too.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from analysis.stats import holm, paired_t, paired_t_p, pilot_sigma, power, sign_flip
from analysis.survival import kaplan_meier, log_rank

SWEEPS = 1000


def sweeps(*shape, key):
    """Standard normal draws, `SWEEPS` of `shape`."""
    return np.random.Generator(np.random.Philox(key)).standard_normal((SWEEPS, *shape))


def final_losses(seeds, *, sigma, gap, key):
    """hetero, all_stiefel and unconstrained: noise of each run, what a seed's arms share, and the gap."""
    shared, own = sweeps(seeds, 1, key=key), sweeps(seeds, 3, key=key + 1)
    return 3.3679 + sigma * (0.5 * shared + own) + np.array([-gap, 0.0, 0.0])


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_the_t_interval_holds_the_true_difference(seeds):
    losses = final_losses(seeds, sigma=0.002, gap=0.0135, key=seeds)
    found = [paired_t((run[:, 0] - run[:, 1]).tolist()) for run in losses]
    assert 0.93 <= np.mean([f.low <= -0.0135 <= f.high for f in found]) <= 0.97


def primary(losses):
    """Holm's p of the two predeclared contrasts."""
    return holm([paired_t_p((losses[:, 0] - losses[:, arm]).tolist()) for arm in (1, 2)])


def test_five_seeds_find_the_gap_of_the_paper_in_both_contrasts():
    found = [max(primary(run)) for run in final_losses(5, sigma=0.002, gap=0.0135, key=11)]
    assert np.mean(np.array(found) < 0.05) >= 0.9


def test_without_a_gap_holm_finds_one_of_the_two_contrasts_no_more_often_than_it_says():
    found = [min(primary(run)) for run in final_losses(5, sigma=0.002, gap=0.0, key=21)]
    assert 0.03 <= np.mean(np.array(found) < 0.05) <= 0.07


def test_power_is_the_rate_at_which_the_paired_test_finds_the_gap():
    losses = final_losses(4, sigma=0.004, gap=0.0135, key=31)
    rate = np.mean([paired_t_p((run[:, 0] - run[:, 1]).tolist()) < 0.05 for run in losses])
    assert rate == pytest.approx(power(0.0135, 0.004, 4, paired=True), abs=0.03)


@pytest.mark.parametrize("pairs", [5, 6, 8])
def test_sign_flip_errs_exactly_as_often_as_it_may(pairs):
    """Of all signs of one set of sizes, which are equally likely without an effect, those with p <= .05 are
    the most that fit into a twentieth: none of the 16 distances of five pairs, 1 of 32, 6 of 128."""
    sizes = np.sqrt([2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0])[:pairs]
    p = np.array([sign_flip((sizes * s).tolist()) for s in itertools.product((1, -1), repeat=pairs)])
    assert (p <= 0.05).sum() == 2 * math.floor(0.05 * 2 ** (pairs - 1))


def test_the_upper_bound_of_a_pilot_holds_sigma_four_times_in_five():
    upper = [pilot_sigma(run.tolist()).upper for run in 0.002 * sweeps(2, 3, key=41)]
    assert 0.76 <= np.mean(np.array(upper) >= 0.002) <= 0.84


def divergence(rate, n, *, key):
    """Steps and events of runs that diverge at a constant rate and are watched up to step 1, in tenths."""
    random = np.random.Generator(np.random.Philox(key))
    exact = random.exponential(1 / rate, (SWEEPS, n))
    events = exact < 1
    return np.where(events, np.ceil(10 * exact) / 10, 1.0), events


@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_the_exact_log_rank_errs_in_at_most_six_of_a_hundred(rate):
    steps, events = divergence(rate, 10, key=51)
    first = [True] * 5 + [False] * 5
    p = np.array([log_rank(t, e, first).p for t, e in zip(steps, events, strict=True)])
    assert 0.005 <= np.mean(p <= 0.05) <= 0.06


def test_the_interval_of_a_survival_curve_holds_it_where_machines_are_lost():
    """Five runs that diverge at rate 1; machines are lost at half that rate. Without losses the interval is
    Clopper–Pearson's, which is exact."""
    random = np.random.Generator(np.random.Philox(61))
    turned, lost = random.exponential(1.0, (SWEEPS, 5)), random.exponential(2.0, (SWEEPS, 5))
    watched, horizon = np.minimum(turned, lost), 0.7
    held = []
    for steps, events in zip(watched, (turned < lost) & (turned < horizon), strict=True):
        last = kaplan_meier(np.minimum(steps, horizon).tolist(), events.tolist()).iloc[-1]
        low = last["low"] if last["step"] == horizon else 0.0  # nobody was left to watch
        held.append(low <= math.exp(-horizon) <= last["high"])
    assert np.mean(held) >= 0.95
