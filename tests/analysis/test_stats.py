from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.stats import clopper_pearson, paired_t


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


def test_paired_t_agrees_with_r():
    # R's sleep data, t.test(extra ~ group, paired): mean of the differences -1.58.
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired_t([a - b for a, b in zip(first, second, strict=True)])
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


def test_a_diverged_pair_must_be_left_out_by_the_caller():
    with pytest.raises(ValueError, match="finite"):
        paired_t([0.1, math.inf])
