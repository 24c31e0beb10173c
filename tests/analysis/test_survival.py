"""Time to divergence: a textbook's numbers, naive oracles, and what each status of a run says."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import Run, grid_index, write_store

from analysis.load import load
from analysis.stats import clopper_pearson
from analysis.survival import comparisons, curves, kaplan_meier, log_rank, times
from analysis.tables import log_rank_text

# Weeks of remission, and whether it ended: Freireich et al. 1963 (Blood 21, 699).
SIX_MP = [(6, True)] * 3 + [(7, True), (10, True), (13, True), (16, True), (22, True), (23, True)]
SIX_MP += [(t, False) for t in (6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35)]
PLACEBO = [(t, True) for t in (1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23)]


def apart(sample):
    """Steps, and events."""
    return [t for t, _ in sample], [e for _, e in sample]


def test_kaplan_meier_of_6_mp_as_in_the_textbook():
    # Klein and Moeschberger, Survival Analysis (2003), table 4.1A: survival and Greenwood's standard error.
    curve = kaplan_meier(*apart(SIX_MP))
    ends = curve[curve["events"] > 0]
    assert ends["step"].tolist() == [6, 7, 10, 13, 16, 22, 23]
    assert ends["at_risk"].tolist() == [21, 17, 15, 12, 11, 7, 6]
    assert ends["survival"].tolist() == pytest.approx(
        [0.857, 0.807, 0.753, 0.690, 0.627, 0.538, 0.448], abs=5e-4
    )
    assert ends["se"].tolist() == pytest.approx(
        [0.0764, 0.0869, 0.0963, 0.1068, 0.1141, 0.1282, 0.1346], abs=6e-5
    )


def test_log_rank_of_6_mp_as_in_the_textbook():
    # Kleinbaum and Klein, Survival Analysis (2012), chapter 2: 9 observed, 19.25 expected, chi-square 16.79.
    found = log_rank(*apart(SIX_MP + PLACEBO), [True] * 21 + [False] * 21)
    assert (found.observed, round(found.expected, 2), round(found.chi2, 2)) == (9, 19.25, 16.79)
    # 5e11 assignments are too many. The asymptotic p is 4e-5.
    assert (found.exact, found.assignments) == (False, 100_000)
    assert 0 < found.p_low <= found.p <= found.p_high < 4e-4


samples = st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=2, max_size=8)


@given(samples)
def test_kaplan_meier_is_efron_s_redistribution_to_the_right(sample):
    """All runs begin with one mass; a censored one hands its own to those still there, in equal parts."""
    order = sorted(sample, key=lambda run: (run[0], not run[1]))
    mass = [1 / len(order)] * len(order)
    for i, (_, event) in enumerate(order):
        later = len(order) - i - 1
        if not event and later:
            mass[i + 1 :] = [m + mass[i] / later for m in mass[i + 1 :]]
            mass[i] = 0.0
    for row in kaplan_meier(*apart(sample)).itertuples():
        gone = sum(m for (t, event), m in zip(order, mass, strict=True) if event and t <= row.step)
        assert row.survival == pytest.approx(1 - gone, abs=1e-12)
        assert 0 <= row.low <= row.survival + 1e-12
        assert row.survival - 1e-12 <= row.high <= 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_up_to_the_horizon_the_interval_is_clopper_and_pearson_s(steps):
    horizon = 5
    sample = [(t, True) if t < 4 else (horizon, False) for t in steps]
    for row in kaplan_meier(*apart(sample)).itertuples():
        known = clopper_pearson(sum(t > row.step or t == horizon for t, _ in sample), len(sample))
        assert (row.survival, row.low, row.high) == pytest.approx((known.estimate, known.low, known.high))


def test_beyond_a_censored_run_the_interval_is_that_of_a_product_of_betas():
    # One of four diverges, one is lost, one of two diverges: Beta(4, 1) Beta(2, 1), and Beta(1, 1) below.
    row = kaplan_meier([1, 2, 3, 9], [True, False, True, False]).iloc[2]
    random = np.random.Generator(np.random.Philox(5))
    high = random.beta(4, 1, 400_000) * random.beta(2, 1, 400_000)
    low = high * random.beta(1, 1, 400_000)
    assert row["survival"] == pytest.approx(0.75 * 0.5)
    assert row["high"] == pytest.approx(np.quantile(high, 0.975), abs=0.01)
    assert row["low"] == pytest.approx(np.quantile(low, 0.025), abs=0.01)


def excess(sample, first):
    """Observed minus expected events of the first arm, from the 2 x 2 table of each step."""
    total = 0.0
    for step in {t for t, event in sample if event}:
        risk = [i for i, (t, _) in enumerate(sample) if t >= step]
        hits = [i for i in risk if sample[i] == (step, True)]
        own = sum(i in first for i in risk)
        total += sum(i in first for i in hits) - len(hits) * own / len(risk)
    return total


@settings(max_examples=60)
@given(samples, st.data())
def test_the_exact_p_is_the_share_over_all_assignments(sample, data):
    n = len(sample)
    first = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))
    own = [i in first for i in range(n)]
    found = log_rank(*apart(sample), own)
    seen = abs(excess(sample, first))
    others = [abs(excess(sample, set(c))) for c in itertools.combinations(range(n), len(first))]
    assert found.p == sum(other >= seen - 1e-9 for other in others) / len(others)
    assert found.observed - found.expected == pytest.approx(excess(sample, first))
    assert (found.exact, found.assignments, found.p_low) == (True, math.comb(n, len(first)), found.p)
    swapped = log_rank(*apart(sample), [not o for o in own])
    assert swapped.p == pytest.approx(found.p)
    assert swapped.chi2 == pytest.approx(found.chi2, nan_ok=True)


@pytest.mark.parametrize(("n", "p"), [(3, 2 / 20), (4, 2 / 70), (5, 2 / 252), (8, 2 / 12_870)])
def test_one_arm_diverges_throughout_and_the_other_never(n, p):
    steps, events = [*range(1, n + 1), *[99] * n], [True] * n + [False] * n
    assert log_rank(steps, events, events).p == p


def test_monte_carlo_is_repeatable_and_its_interval_holds_the_exact_p():
    steps, events = [1, 2, 3, 7, 9, 4, 5, 9, 9, 9], [True] * 4 + [False] + [True] * 2 + [False] * 3
    own = [True] * 5 + [False] * 5
    exact, drawn = log_rank(steps, events, own), log_rank(steps, events, own, exact_most=251)
    assert (exact.exact, drawn.exact) == (True, False)
    assert drawn.p_low < exact.p < drawn.p_high < drawn.p_low + 0.01
    assert drawn == log_rank(steps, events, own, exact_most=251)


def test_without_events_nothing_is_found_and_one_arm_is_refused():
    found = log_rank([9, 9, 9], [False] * 3, [True, False, False])
    assert (found.p, found.observed, math.isnan(found.chi2)) == (1.0, 0, True)
    with pytest.raises(ValueError, match="both arms"):
        log_rank([1, 2], [True, True], [True, True])


def falling(n):
    return [5.0 - 0.2 * i for i in range(n)]


def test_what_each_status_says(tmp_path):
    spiked = [*falling(5), 9.0]
    runs = [
        Run("a", 0, falling(13)),
        Run("a", 1, [*spiked, *[9.0] * 7]),
        Run("a", 2, [*falling(4), math.nan], status="diverged"),
        Run("a", 3, falling(4), status="diverged"),
        Run("b", 0, falling(4), status="failed"),
        Run("b", 1, spiked, status="failed"),
        Run("b", 2, falling(6), status="running"),
        Run("b", 3, spiked, status="oom"),
        Run("b", 4, falling(3), status="quarantined"),
        Run("b", 5, [], status="pending"),
    ]
    table = times(load(write_store(tmp_path, runs)))
    found = {
        (r.arm, r.seed): (r.event, r.after, r.step, r.rules)
        for r in table.itertuples()  # every 25 steps of 300
    }
    assert found == {
        ("a", 0): (False, 300, 300, ""),
        ("a", 1): (True, 100, 125, "hard_spike; persistent_drift; no_recovery"),
        ("a", 2): (True, 75, 100, "early_termination"),
        ("a", 3): (True, 50, 75, ""),  # it says that it diverged, and no evaluation shows it
        ("b", 0): (False, 75, 75, ""),
        ("b", 1): (False, 100, 100, ""),  # a machine's failure is no event; good until the spike
        ("b", 2): (False, 125, 125, ""),
        ("b", 3): (False, 100, 100, ""),
        ("b", 4): (False, 50, 50, ""),
    }


def test_runs_without_an_evaluation_speak_by_their_status_alone(tmp_path):
    runs = [Run("a", seed, [], status="pending") for seed in range(3)]
    store = write_store(tmp_path, runs)
    for run, status in zip(runs, ("diverged", "completed", "failed"), strict=True):
        store.put_status(run.run_id, {"status": status, "attempt": 1, "step": 40, "steps": 300})
    table = times(load(store))
    assert table[["seed", "event", "after", "step"]].to_numpy().tolist() == [
        [0, True, 0, 40],
        [2, False, 40, 40],
    ]


def test_curves_and_comparisons_are_made_within_a_cell(tmp_path):
    lr = "optimizer.muon.lr"
    bad = [*falling(5), *[9.0] * 8]
    runs = [
        Run(
            arm,
            seed,
            bad if (arm, value) == ("all_dgram", 1.0) else falling(13),
            overrides={"optimizer": {"muon": {"lr": value}}},
            axes={lr: value},
        )
        for arm in ("hetero", "all_dgram")
        for value in (0.3, 1.0)
        for seed in range(3)
    ]
    frames = load(write_store(tmp_path, runs, index=grid_index(runs, axes=[lr])))
    table = comparisons(frames)
    assert list(zip(table["label"], table["other"], strict=True)) == [
        ("hetero · lr=0.3", "all_dgram · lr=0.3"),
        ("hetero · lr=1", "all_dgram · lr=1"),
    ]
    assert table[["events", "events_other", "n", "n_other"]].to_numpy().tolist() == [
        [0, 0, 3, 3],
        [0, 3, 3, 3],
    ]
    assert table["p"].tolist() == [1.0, 2 / 20]
    assert table["holm"].tolist() == [1.0, 4 / 20]
    text = log_rank_text(table)
    assert text.rows == (("hetero · lr=1", "all_dgram · lr=1", "0/3", "3/3", "1.50", "0.1000", "0.2000"),)
    assert "where no run was unstable: 1." in text.notes[0]
    curve = curves(frames)
    assert list(curve.columns[:3]) == ["arm", "label", "step"]
    last = curve.groupby("label")["survival"].last()
    assert last.to_dict() == {label: float(label != "all_dgram · lr=1") for label in last.index}


def test_of_nothing_the_frames_are_empty_and_whole(tmp_path):
    frames = load(write_store(tmp_path, [Run("a", 0, [], status="pending")]))
    for table, column in ((times(frames), "event"), (curves(frames), "survival"), (comparisons(frames), "p")):
        assert len(table) == 0
        assert column in table
    assert log_rank_text(comparisons(frames)).rows == ()
