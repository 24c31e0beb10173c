"""The verdict: the paper's own curves, each rule by hand, and properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trainers.config import StabilityConfig
from trainers.stability import (
    EARLY_TERMINATION,
    HARD_SPIKE,
    NO_RECOVERY,
    PERSISTENT_DRIFT,
    judge,
)

HORIZON = 50_000
STYLES = [StabilityConfig(style="paper"), StabilityConfig(style="scale_free")]


def falling(final: float, *, until: int = HORIZON) -> list[tuple[int, float]]:
    """A smooth GPT-2 curve from ln(50304) to `final` at 50k, evaluated every 1,000 steps."""
    return [
        (s, final + (10.83 - final) * (math.exp(-s / 2500) + 0.04 * (1 - s / HORIZON)))
        for s in range(0, until, 1000)
    ]


def paper_curve(final: float) -> list[tuple[int, float]]:
    return [*falling(final), (HORIZON, final)]


def spiking(at: int, loss: float) -> list[tuple[int, float]]:
    """Falls like the others until `at`, where the paper's figure shows `loss`, and stays up there."""
    return [*falling(3.38, until=at), *((s, loss) for s in range(at, HORIZON + 1, 1000))]


@pytest.mark.parametrize("rules", STYLES, ids=["paper", "scale_free"])
@pytest.mark.parametrize("final", [3.3855, 3.3679, 3.3544])
def test_the_papers_stable_arms_never_fire(rules, final):
    curve = paper_curve(final)
    assert not judge(curve, HORIZON, rules).unstable
    for end in range(1, len(curve)):
        assert not judge(curve[:end], HORIZON, rules).unstable


@pytest.mark.parametrize("rules", STYLES, ids=["paper", "scale_free"])
@pytest.mark.parametrize(("at", "loss"), [(16_000, 5.41), (20_000, 6.84)], ids=["all_dgram", "hetero_inv"])
def test_the_papers_unstable_arms_fire_at_their_first_bad_evaluation(rules, at, loss):
    verdict = judge(spiking(at, loss), HORIZON, rules)
    assert verdict.unstable
    assert verdict.first_bad == at
    by_rule = {rule.rule: rule for rule in verdict.rules}
    assert set(by_rule) == {HARD_SPIKE, PERSISTENT_DRIFT, NO_RECOVERY}
    assert (by_rule[HARD_SPIKE].last_good, by_rule[HARD_SPIKE].value) == (at - 1000, loss)
    assert {rule.step for rule in verdict.rules} == {at}


def test_drift_and_recovery_wait_for_the_end_of_the_run():
    evals = [(s, 3.0 if s <= 500 else 3.2) for s in range(0, 1001, 100)]
    rules = StabilityConfig()
    assert not judge(evals[:-1], 1000, rules).unstable
    fired = {rule.rule: rule for rule in judge(evals, 1000, rules).rules}
    assert set(fired) == {PERSISTENT_DRIFT, NO_RECOVERY}
    assert (fired[PERSISTENT_DRIFT].last_good, fired[PERSISTENT_DRIFT].step) == (500, 600)
    assert fired[PERSISTENT_DRIFT].threshold == pytest.approx(3.1)
    assert (fired[NO_RECOVERY].last_good, fired[NO_RECOVERY].step) == (500, 600)


def test_a_late_dip_below_the_line_is_a_recovery():
    evals = [(s, 3.0) for s in range(0, 600, 100)] + [(600, 3.2), (700, 3.2), (850, 3.04), (1000, 3.09)]
    assert not judge(evals, 1000, StabilityConfig()).unstable


def test_a_spike_during_the_first_tenth_is_the_start_of_training_and_not_counted():
    evals = [(0, 3.0), (100, 9.0), (200, 3.0), (1000, 3.0)]
    assert not judge(evals, 1000, StabilityConfig()).unstable
    assert judge(evals, 900, StabilityConfig()).first_bad == 100


def test_a_spike_exactly_at_the_threshold_does_not_fire():
    assert not judge([(0, 3.0), (500, 4.0), (1000, 3.0)], 1000, StabilityConfig()).unstable
    assert not judge([(0, 5.0), (500, 5.0), (1000, 5.0)], 1000, StabilityConfig(style="paper")).unstable


def test_a_non_finite_training_loss_between_evaluations_ends_the_run_as_unstable():
    verdict = judge([(0, 3.0), (100, 2.9)], 1000, StabilityConfig(), nonfinite_at=150)
    (rule,) = verdict.rules
    assert (rule.rule, rule.step, rule.last_good) == (EARLY_TERMINATION, 150, 100)


def test_a_run_cut_short_is_dated_at_what_ended_it():
    """It has had no chance to recover, so the noise before its end is not held against it."""
    evals = [(0, 5.5), (10, 4.0), (20, 3.0), (30, 3.1), (40, 4.2)]
    assert judge(evals, 300, StabilityConfig()).first_bad == 40
    verdict = judge(evals[:4], 300, StabilityConfig(), nonfinite_at=35)
    assert [(rule.rule, rule.step) for rule in verdict.rules] == [(EARLY_TERMINATION, 35)]


def test_a_loss_that_still_falls_has_not_departed():
    assert not judge([(10 * i, 8 - 0.3 * i) for i in range(15)], 140, StabilityConfig()).unstable


def test_drift_is_dated_at_the_last_stretch_above_the_line():
    plateau = [(i, 3.3) for i in range(40)]
    evals = [*plateau, (40, 3.9), (41, 3.3), *((i, 3.6) for i in range(42, 51))]
    fired = {rule.rule: rule for rule in judge(evals, 50, StabilityConfig()).rules}
    assert (fired[PERSISTENT_DRIFT].last_good, fired[PERSISTENT_DRIFT].step) == (41, 42)


def test_no_evaluations_no_verdict_of_instability():
    assert judge([], 1000, StabilityConfig()).to_dict() == {"unstable": False, "first_bad": None, "rules": []}


# Multiples of 1/64 add without rounding, so that a mean at a threshold stays there.
losses = st.lists(st.integers(64, 640).map(lambda n: n / 64), min_size=1, max_size=40)
styles = st.sampled_from(STYLES)


def every_hundred(values: list[float]) -> list[tuple[int, float]]:
    return [(100 * i, value) for i, value in enumerate(values)]


near_stable = st.lists(st.integers(192, 200).map(lambda n: n / 64), min_size=1, max_size=40)


@given(near_stable, st.integers(1, 10), styles)
def test_good_evaluations_keep_a_stable_run_stable(values, more, rules):
    horizon = 100 * (len(values) + more)
    assume(not judge(every_hundred(values), horizon, rules).unstable)
    assert not judge(every_hundred(values + [min(values)] * more), horizon, rules).unstable


@given(losses, st.data(), st.sampled_from([math.nan, math.inf]), styles)
def test_a_non_finite_evaluation_fires_early_termination_at_its_step(values, data, bad, rules):
    at = data.draw(st.integers(0, len(values) - 1))
    values = [*values[:at], bad, *values[at + 1 :]]
    verdict = judge(every_hundred(values), 100 * len(values), rules)
    assert [r.step for r in verdict.rules if r.rule == EARLY_TERMINATION] == [100 * at]


@given(losses, losses, styles)
def test_a_spike_seen_online_is_never_taken_back(values, later, rules):
    horizon = 100 * (len(values) + len(later))
    before = judge(every_hundred(values), horizon, rules).rules
    after = judge(every_hundred(values + later), horizon, rules).rules
    assert before == after[: len(before)]
    final = judge(every_hundred(values + later), horizon, rules).rules
    assert set(after) <= set(final)


@given(losses, styles)
def test_every_rule_is_bracketed_by_evaluations(values, rules):
    steps = [step for step, _ in every_hundred(values)]
    for rule in judge(every_hundred(values), steps[-1], rules).rules:
        assert rule.step in steps
        assert rule.last_good is None or rule.last_good < rule.step
        assert rule.last_good is None or rule.last_good in steps
