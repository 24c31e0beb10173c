from __future__ import annotations

import itertools
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from synthetic import Run, grid_index, write_store

from analysis.load import load
from analysis.stats import (
    clopper_pearson,
    holm,
    lr_sensitivity,
    median,
    paired_t,
    paired_t_p,
    pilot_sigma,
    power,
    ranks,
    rises,
    runs_needed,
    sign_flip,
    spike_score,
    spike_window,
    spikes,
    spread,
)
from analysis.tables import t1, t1_text


def test_clopper_pearson_agrees_with_r():
    # R's example of binom.test: 682 of 925, Mendel's peas.
    found = clopper_pearson(682, 925)
    assert (found.low, found.high) == pytest.approx((0.7076683, 0.7654066), abs=5e-8)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_clopper_pearson_at_the_ends_is_in_closed_form(n):
    bound = 0.025 ** (1 / n)
    none, every = clopper_pearson(0, n), clopper_pearson(n, n)
    assert (none.low, none.high) == pytest.approx((0, 1 - bound))
    assert (every.low, every.high) == pytest.approx((bound, 1))


def test_nothing_observed_says_nothing():
    found = clopper_pearson(0, 0)
    assert (found.low, found.high, math.isnan(found.estimate)) == (0, 1, True)


def test_more_events_than_trials_is_refused():
    with pytest.raises(ValueError, match="3 of 2"):
        clopper_pearson(3, 2)


@given(st.integers(0, 60), st.integers(0, 60))
def test_clopper_pearson_holds_its_estimate_and_mirrors(k, rest):
    n = k + rest
    if n == 0:
        return
    found, mirrored = clopper_pearson(k, n), clopper_pearson(rest, n)
    assert 0 <= found.low <= k / n <= found.high <= 1
    assert (found.low, found.high) == pytest.approx((1 - mirrored.high, 1 - mirrored.low))


def sleep():
    """R's sleep data: extra hours under the first drug minus those under the second."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    return [a - b for a, b in zip(first, second, strict=True)]


def test_paired_t_agrees_with_r():
    # t.test(extra ~ group, data = sleep, paired = TRUE): t = -4.0621, p = 0.002833, mean -1.58.
    found = paired_t(sleep())
    assert paired_t_p(sleep()) == pytest.approx(0.002833, abs=5e-7)
    assert (found.estimate, found.low, found.high) == pytest.approx((-1.58, -2.4598858, -0.7001142), abs=5e-8)
    assert found.n == 10


def test_two_pairs_have_student_with_one_degree_of_freedom():
    # t(0.975, 1) = tan(0.475 pi); the standard error of (0, 2) is 1.
    found = paired_t([0.0, 2.0])
    assert found.high - found.estimate == pytest.approx(math.tan(0.475 * math.pi))


def test_one_pair_has_no_bounds_and_none_has_nothing():
    one, none = paired_t([0.5]), paired_t([])
    assert (one.estimate, one.n, math.isnan(one.low)) == (0.5, 1, True)
    assert (none.n, math.isnan(none.estimate)) == (0, True)


def test_differences_that_are_all_alike_have_no_bounds_and_no_p():
    for alike in ([-0.1, -0.1], [0.1 + 0.2, 0.3, 0.3], [0.0, 0.0]):
        found = paired_t(alike)
        assert (found.estimate, found.n) == (pytest.approx(alike[0]), len(alike))
        assert [math.isnan(x) for x in (found.low, found.high, paired_t_p(alike))] == [True] * 3
    assert paired_t([0.3, 0.3001]).low > 0.29


def test_a_diverged_pair_must_be_left_out_by_the_caller():
    with pytest.raises(ValueError, match="finite"):
        paired_t([0.1, math.inf])


def test_no_p_from_one_pair():
    assert math.isnan(paired_t_p([0.3]))
    assert paired_t_p([0.3, 0.3001]) < 0.001


def test_sign_flip_gives_fisher_s_answer_for_darwin_s_maize():
    # Fisher 1935, The Design of Experiments, section 21: crossed minus self-fertilised plants in eighths of
    # an inch; 863 of the 32,768 sums are as large as 314 or larger, and as many are as small.
    differences = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert sign_flip(differences) == 2 * 863 / 2**15


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=8))
def test_sign_flip_is_the_share_over_all_signs(numbers):
    # In units that do not add exactly, so that ties must survive rounding.
    differences = [0.1 * number for number in numbers]
    signs = itertools.product((1, -1), repeat=len(numbers))
    sums = [sum(s * x for s, x in zip(sign, numbers, strict=True)) for sign in signs]
    as_far = sum(abs(total) >= abs(sum(numbers)) for total in sums)
    assert sign_flip(differences) == as_far / len(sums)


def test_six_pairs_are_the_fewest_with_which_signs_can_reach_a_twentieth():
    assert [sign_flip([1.0 + i for i in range(n)]) for n in (5, 6, 20)] == [2 / 2**n for n in (5, 6, 20)]


def test_sign_flip_says_where_it_ends():
    assert math.isnan(sign_flip([]))
    with pytest.raises(ValueError, match="21 pairs"):
        sign_flip([1.0] * 21)
    with pytest.raises(ValueError, match="finite"):
        sign_flip([1.0, math.inf])


def test_holm_by_hand():
    # .005 x 4, .01 x 3, .03 x 2, and .04 x 1 raised to what comes before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_a_contrast_without_data_yet_counts_and_its_data_raise_no_other(p_values):
    waiting = holm([math.nan, *p_values[1:]])
    assert math.isnan(waiting[0])
    assert min(waiting[1:]) == min(1.0, len(p_values) * min(p_values[1:]))
    assert all(new <= old + 1e-12 for new, old in zip(holm(p_values)[1:], waiting[1:], strict=True))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_the_closure_of_bonferroni(p_values):
    every = range(len(p_values))
    families = [f for size in every for f in itertools.combinations(every, size + 1)]
    bonferroni = {f: min(1.0, len(f) * min(p_values[i] for i in f)) for f in families}
    expected = [max(p for f, p in bonferroni.items() if i in f) for i in every]
    assert holm(p_values) == pytest.approx(expected)


def test_median_and_ranks_know_failures_and_ties():
    medians = [
        median([2.0, 2.2, math.inf]),
        median([2.2]),
        median([1.0, math.inf]),
        median([math.inf, math.inf, 1.0]),
        median([math.nan]),
        median([math.nan, 2.0]),
    ]
    assert medians[:4] == [2.2, 2.2, math.inf, math.inf]
    assert math.isnan(medians[4])
    assert ranks(medians) == [2, 2, 4, 4, None, 1]


@pytest.mark.parametrize(("sigma", "runs"), [(0.0011, 2), (0.002, 3), (0.004, 4), (0.006, 6)])
def test_the_gap_of_the_paper_needs_so_many_runs(sigma, runs):
    assert runs_needed(0.0135, sigma) == runs
    assert power(0.0135, sigma, runs) >= 0.9
    assert runs_needed(0.0135, sigma, paired=True) == {2: 3, 3: 3, 4: 5, 6: 7}[runs]
    assert runs == 2 or power(0.0135, sigma, runs - 1) < 0.9


def test_power_agrees_with_r():
    # The first examples of its help page: power.t.test(n = 20, delta = 1, sd = 1) gives power = 0.8689528
    # (without the far tail, 2e-7), power.t.test(power = .90, delta = 1) n = 22.02110.
    assert power(1, 1, 20) == pytest.approx(0.8689528, abs=1e-6)
    assert runs_needed(1, 1) == 23


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("runs", [2, 5, 8])
def test_power_agrees_with_the_noncentral_t(runs, paired):
    freedom = runs - 1 if paired else 2 * runs - 2
    shift = 0.7 / math.sqrt(2 / runs)
    critical = scipy_stats.t.ppf(0.975, freedom)
    expected = scipy_stats.nct.sf(critical, freedom, shift) + scipy_stats.nct.cdf(-critical, freedom, shift)
    assert power(0.7, 1.0, runs, paired=paired) == pytest.approx(expected, abs=1e-8)
    assert power(0.0, 1.0, runs, paired=paired) == pytest.approx(0.05)


def test_power_of_nothing_is_refused():
    with pytest.raises(ValueError, match="two runs"):
        power(0.01, 0.002, 1)
    with pytest.raises(ValueError, match="sigma above 0"):
        power(0.01, 0.0, 5)
    with pytest.raises(ValueError, match=r"1e-06 at sigma 1 needs more than 1,000"):
        runs_needed(1e-6, 1.0)


def test_pilot_sigma_pools_within_arms_and_has_a_bound_in_closed_form():
    # Squares .02 + .02 about means that differ. With two degrees of freedom, χ²(.2) = -2 ln .8.
    found = pilot_sigma([[3.0, 3.2], [5.1, 4.9], [7.0]])
    assert (found.freedom, found.estimate) == (2, pytest.approx(math.sqrt(0.02)))
    assert found.upper == pytest.approx(math.sqrt(0.04 / (-2 * math.log(0.8))))
    assert math.isnan(pilot_sigma([[3.0], []]).upper)
    with pytest.raises(ValueError, match="finite"):
        pilot_sigma([[3.0, math.inf]])


def test_lr_sensitivity_by_hand():
    runs = [(0.01, 3.0), (0.03, 2.5), (0.1, 2.4), (0.1, 2.2), (0.3, 2.6), (1.0, 4.0), (1.0, math.inf)]
    found = lr_sensitivity(runs)
    # The best rate is .1 with the median 2.3; within four times of it .03 and .3.
    assert (found.best_lr, found.best_loss, found.at_edge) == (0.1, pytest.approx(2.3), False)
    assert (found.spread, found.n_around) == (pytest.approx(0.3), 3)
    assert (found.diverged.estimate, found.diverged.n) == (0.2, 5)
    assert found.diverged.high == clopper_pearson(1, 5).high
    assert lr_sensitivity(runs, within=10).spread == math.inf
    assert lr_sensitivity(runs[:2]).at_edge
    assert math.isnan(lr_sensitivity(runs[2:4]).spread)
    lost = lr_sensitivity([(0.1, math.inf), (0.3, math.nan)])
    assert (lost.diverged.estimate, lost.diverged.n, math.isnan(lost.best_lr)) == (1.0, 1, True)


def contrast_runs(differences):
    """hetero minus the others by seed: `differences` for unconstrained, half of them for all_stiefel."""
    finals = [("unconstrained", 1.0), ("all_stiefel", 0.5), ("hetero", 0.0)]
    return [
        Run(arm, seed, [5.0, 2.0 - share * d], steps=100, every=100)
        for arm, share in finals
        for seed, d in enumerate(differences)
    ]


def test_t1_adjusts_the_primary_contrasts_and_flips_signs_from_six_pairs(tmp_path):
    differences = [-0.1, -0.2, -0.1, 0.05, -0.15, -0.3]
    frames = load(write_store(tmp_path, contrast_runs(differences)))
    table = t1(frames).set_index("arm")
    hetero, stiefel = table.loc["hetero"], table.loc["all_stiefel"]
    p = 2 * scipy_stats.t.sf(abs(scipy_stats.ttest_1samp(differences, 0).statistic), 5)
    # Both contrasts have one t, since one is half of the other: Holm doubles both.
    for reference in ("unconstrained", "all_stiefel"):
        assert hetero[f"minus_{reference}_p"] == pytest.approx(p)
        assert hetero[f"minus_{reference}_holm"] == pytest.approx(2 * p)
        # Only the signs that leave out .05, or turn it, are as far from 0: two of 64 each way.
        assert hetero[f"minus_{reference}_sign_p"] == 4 / 64
        assert hetero[f"minus_{reference}_role"] == "primary"
    assert (stiefel["minus_unconstrained_role"], stiefel["minus_all_stiefel_role"]) == ("exploratory", "")
    assert stiefel["minus_unconstrained_p"] == pytest.approx(p)
    assert math.isnan(stiefel["minus_unconstrained_holm"])
    text = t1_text(frames, t1(frames))
    cells = dict(zip(text.columns, text.rows[2], strict=True))
    assert cells["Holm p, − unconstrained"] == f"{2 * p:.4f}"
    assert cells["sign-flip p, − unconstrained"] == "0.0625"
    assert text.rows[1][text.columns.index("Holm p, − unconstrained")] == "exploratory"
    assert any("predeclared contrasts of this table" in note for note in text.notes)


def test_below_six_pairs_t1_shows_no_sign_flip_p(tmp_path):
    frames = load(write_store(tmp_path, contrast_runs([-0.1, -0.2, -0.1, -0.05, -0.15])))
    text = t1_text(frames, t1(frames))
    assert {row[text.columns.index("sign-flip p, − unconstrained")] for row in text.rows} == {"–"}
    assert any("below 6 pairs, where it cannot reach .05" in note for note in text.notes)
    assert not any("sign-flip" in column for column in t1_text(frames, t1(frames), compact=True).columns)


def test_a_primary_contrast_that_has_no_pairs_yet_counts_for_the_other(tmp_path):
    runs = contrast_runs([-0.1, -0.2, -0.15])
    begun = [run for run in runs if run.arm != "all_stiefel"]
    hetero = t1(load(write_store(tmp_path, begun, index=grid_index(runs)))).set_index("arm").loc["hetero"]
    assert (hetero["minus_all_stiefel_pairs"], math.isnan(hetero["minus_all_stiefel_holm"])) == (0, True)
    assert hetero["minus_unconstrained_holm"] == pytest.approx(2 * hetero["minus_unconstrained_p"])


# Of the steps of one run


def score(losses, horizon):
    window = spike_window(horizon)
    return spike_score(losses, spikes(losses, window=window), window)


def naive_spike_score(losses, window):
    spikes, counted = 0, 0
    before = []
    for loss in losses:
        if not math.isfinite(loss):
            spikes, counted = spikes + 1, counted + 1
            continue
        if len(before) >= window:
            last = before[-window:]
            mean = math.fsum(last) / window
            sd = math.sqrt(math.fsum((x - mean) ** 2 for x in last) / window)
            counted += 1
            spikes += loss > mean and loss >= mean + 7 * sd
        before.append(loss)
    return spikes / counted if counted else math.nan


@given(st.data(), st.sampled_from([100, 200, 500]), st.integers(0, 2**16))
def test_the_spike_score_is_that_of_a_plain_loop(data, horizon, seed):
    noise = np.random.default_rng(seed).standard_normal(data.draw(st.integers(0, horizon)))
    losses = 3 + 0.01 * noise
    places = st.tuples(st.integers(0, max(len(losses) - 1, 0)), st.sampled_from([0.04, 0.2, 5.0, math.nan]))
    for place, rise in data.draw(st.lists(places, max_size=6)) if len(losses) else ():
        losses[place] += rise
    expected = naive_spike_score(losses.tolist(), max(20, horizon // 10))
    assert score(losses, horizon) == pytest.approx(expected, nan_ok=True)


def test_the_spike_window_is_a_thousand_in_a_long_run_and_blocks_change_nothing():
    losses = 3 + 0.01 * np.random.default_rng(0).standard_normal(5200)
    losses[[500, 1100, 5095, 5096, 5199]] += 0.2
    expected = naive_spike_score(losses.tolist(), 1000)
    assert expected == 4 / 4200
    assert score(losses, 50_000) == expected


def test_a_loss_that_never_moves_has_no_spikes():
    assert score(np.full(300, 0.1), 300) == 0
    assert math.isnan(score(np.full(10, 0.1), 300))


@given(st.floats(-2, 2), st.floats(0.1, 9), st.integers(0, 2**16))
def test_spread_is_of_the_noise_and_not_of_the_trend(slope, scale, seed):
    noise = np.random.default_rng(seed).standard_normal(50)
    trend = slope * np.arange(50)
    assert spread(trend + scale * noise) == pytest.approx(scale * spread(noise), rel=1e-6)
    changes = [b - a for a, b in pairwise(noise)]
    assert spread(noise) == pytest.approx(math.sqrt(np.var(changes, ddof=1) / 2))


def test_spread_of_independent_values_is_their_standard_deviation():
    noise = 0.3 * np.random.default_rng(0).standard_normal(100_000)
    assert spread(noise) == pytest.approx(0.3, rel=0.02)
    assert math.isnan(spread(noise[:2]))


@pytest.mark.parametrize("huge", [1e9, 1e200])
def test_a_huge_value_leaves_no_trace_once_it_is_out_of_the_window(huge):
    values = 0.3 + 0.05 * np.random.default_rng(1).standard_normal(1_000)
    values[100] = huge
    values[[150, 700]] = 0.9  # the first with the huge one in its window
    assert np.flatnonzero(spikes(values, window=128)).tolist() == [700]


def test_rises_are_above_the_lowest_so_far():
    assert rises(np.array([5, 3, 4, 4.01, 2, math.nan, 3.5]), 1.0).tolist() == [False] * 3 + [
        *(True, False, True, True)
    ]
