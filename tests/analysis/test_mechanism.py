from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paper_size import BAD, crossing_steps, paper_size

from analysis import mechanism
from analysis.mechanism import CHAIN, EVENT, QUANTITIES, Quantity, Rule
from analysis.stats import median_interval, sign_test, spikes
from analysis.stepwise import first_crossing
from analysis.tables import Text
from trainers.stability import Fired, Verdict

NAMES = [q.name for q in QUANTITIES]


@pytest.fixture(scope="module")
def paper():
    """Two unstable arms and a stable one, three seeds: the crossings are those of `crossing_steps`."""
    return paper_size(("all_dgram", "hetero_inv", "hetero"), 3)


@pytest.fixture(scope="module")
def crossed(paper):
    return mechanism.crossings(paper)


def of(table, run_id, quantity):
    found = table[(table["run_id"] == run_id) & (table["quantity"] == quantity)]
    assert len(found) == 1
    return found.iloc[0]


def runs_of(frames, *arms):
    return frames.runs[frames.runs["arm"].isin(arms)].to_dict("records")


def test_planted_crossings_are_found_in_their_brackets(paper, crossed):
    for run in runs_of(paper, *BAD):
        planted = crossing_steps(run["arm"], run["seed"])
        for quantity, step, cadence in (
            # The growth is exponential from the planted value on: 10.000 is not above 10.
            ("sigma", planted["sigma"], 250),
            ("logit", planted["logit"], 500),
            ("entropy", planted["saturated"], 500),
            ("jacobian", planted["saturated"], 500),
        ):
            found = of(crossed, run["run_id"], quantity)
            assert found["crossed"]
            assert found["after"] < found["step"] == found["after"] + cadence
            assert found["after"] <= step <= found["step"]


def test_stable_runs_are_censored_at_their_last_record(paper, crossed):
    for run in runs_of(paper, "hetero"):
        for quantity in ("sigma", "logit", "entropy", "jacobian", "loss"):
            found = of(crossed, run["run_id"], quantity)
            assert not found["crossed"]
            assert found["after"] == found["step"] >= 49_991


def test_a_small_jacobian_of_flat_rows_is_no_saturation(paper):
    flat = paper.attention.assign(jacobian_norm=0.01, p_max=0.001, entropy=1.0)
    found = mechanism.crossings(replace(paper, attention=flat))
    assert not found.loc[found["quantity"] == "jacobian", "crossed"].any()
    sharp = mechanism.crossings(replace(paper, attention=flat.assign(p_max=0.99)))
    assert sharp.loc[sharp["quantity"] == "jacobian", "crossed"].all()


def test_one_saturated_layer_is_enough_and_one_head_of_it_is_not(paper):
    calm = paper.attention.assign(entropy=0.6, p_max=0.2, jacobian_norm=0.25)
    for heads, crossed in ((12, True), (1, False)):
        sharp = (calm["layer"] == 5) & (calm["head"] < heads) & (calm["step"] >= 10_000)
        found = calm.assign(entropy=calm["entropy"].mask(sharp, 0.01), p_max=calm["p_max"].mask(sharp, 0.99))
        found["jacobian_norm"] = found["jacobian_norm"].mask(sharp, 0.01)
        table = mechanism.crossings(replace(paper, attention=found))
        own = table[table["quantity"].isin(["entropy", "jacobian"])]
        assert set(own["crossed"]) == {crossed}
        assert not crossed or set(own["step"]) == {10_000}


def test_sigma_is_that_of_attention_alone(paper):
    grown = paper.spectra.assign(
        sigma_max=paper.spectra["sigma_max"].where(paper.spectra["module"] == "attn", 1e6)
    )
    assert mechanism.crossings(replace(paper, spectra=grown)).equals(mechanism.crossings(paper))


RULES = {
    "above": (Rule.ABOVE, 10.0, [1, 10, 10.1, 3], 2),
    "below": (Rule.BELOW, 0.1, [1, 0.1, 0.09, 1], 2),
    "not a number": (Rule.ABOVE, 10.0, [1, math.nan, 1], 1),
    "infinite": (Rule.BELOW, 0.1, [1, math.inf, 1], 1),
    "never": (Rule.ABOVE, 10.0, [1, 2, 3], None),
    "at once": (Rule.ABOVE, 10.0, [11, 2, 3], 0),
    "spike": (Rule.SPIKE, 7.0, [1.0, 1.1] * 15 + [2.0] + [1.0], 30),
    "no spike": (Rule.SPIKE, 7.0, [1.0, 1.1] * 15 + [1.35] + [1.0], None),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_by_hand(name):
    rule, threshold, values, hit = RULES[name]
    steps = np.arange(5, 5 + 5 * len(values), 5)
    values = np.array(values, dtype=float)
    out = mechanism._outside(steps, values, Quantity("x", "x", rule, threshold, "flow"), 100)
    found = first_crossing(steps, values, out)
    if hit is None:
        assert (found["crossed"], found["after"], found["step"]) == (False, steps[-1], steps[-1])
    else:
        after = 0 if hit == 0 else steps[hit - 1]
        assert (found["crossed"], found["after"], found["step"]) == (True, after, steps[hit])


@given(st.lists(st.floats(0, 1) | st.just(math.nan) | st.just(50.0), max_size=60), st.integers(2, 8))
def test_spikes_agree_with_the_definition(values, window):
    expected, past = [], []
    for value in values:
        if not math.isfinite(value):
            expected.append(True)
            continue
        last = past[-window:]
        excess = value - sum(last) / window if len(last) == window else -1.0
        spread = float(np.std(last)) if last else 0.0
        close = abs(excess - 7 * spread) < 1e-6 * max(1.0, abs(value))
        expected.append(None if close and excess > 0 else excess > 0 and excess >= 7 * spread)
        past.append(value)
    found = spikes(values, window=window)
    assert all(e is None or f == e for f, e in zip(found, expected, strict=True))


def test_lead_times_run_to_the_first_bad_evaluation(paper, crossed):
    leads = mechanism.lead_times(paper, crossed)
    assert set(leads["run_id"]) == {run["run_id"] for run in runs_of(paper, *BAD)}
    for run in runs_of(paper, *BAD):
        bad = BAD[run["arm"]][0] + 1000 * (run["seed"] % 3)
        found = of(leads, run["run_id"], "logit")
        assert (found["event_after"], found["event_step"]) == (bad - 1000, bad)
        assert found["lead"] == found["event_step"] - found["alarm_step"]
        assert found["lead_low"] == found["lead"] - 1000
        assert found["lead_high"] == found["lead"] + 500
        silent = of(leads, run["run_id"], "update")
        assert silent["lead"] == silent["lead_low"] == -math.inf
        assert pd.isna(silent["alarm_step"])


def test_alarms_count_warnings_and_false_alarms(paper, crossed):
    table = mechanism.alarms(paper, crossed).set_index("quantity")
    logit, update = table.loc["logit"], table.loc["update"]
    assert (logit["n_before"], logit["n_unstable"], logit["n_false"], logit["n_stable"]) == (6, 6, 0, 3)
    assert (logit["lead_median_steps"], logit["lead_low_steps"]) == (6000, 6000)
    assert (logit["before_low"], logit["false_high"]) == pytest.approx(
        (0.025 ** (1 / 6), 1 - 0.025 ** (1 / 3))
    )
    assert (update["n_before"], update["lead_median_steps"]) == (0, -math.inf)
    # A stable arm whose logits cross is a false alarm; the same in an arm that fails is not.
    logits = paper.attention["max_logit"]
    loud = paper.attention.assign(max_logit=logits.where(paper.attention["seed"] != 1, 1e3))
    again = mechanism.alarms(replace(paper, attention=loud)).set_index("quantity").loc["logit"]
    assert (again["n_false"], again["n_stable"], again["n_unstable"]) == (1, 3, 6)
    assert set(logit["run_ids"].split()) == set(paper.runs["run_id"])


def test_a_stable_run_of_an_unstable_arm_counts_neither_way(paper):
    calm = paper.runs.loc[(paper.runs["arm"] == "all_dgram") & (paper.runs["seed"] == 0), "run_id"].item()
    runs = paper.runs.assign(unstable=paper.runs["unstable"].where(paper.runs["run_id"] != calm, False))
    frames = replace(paper, runs=runs, verdicts={**paper.verdicts, calm: Verdict(False, ())})
    assert calm not in mechanism.stable_runs(frames)
    assert calm not in set(mechanism.lead_times(frames)["run_id"])


def test_an_alarm_at_the_bad_evaluation_is_no_warning(paper, crossed):
    late = crossed.assign(step=crossed["step"].where(crossed["quantity"] != "logit", 30_000))
    found = mechanism.alarms(paper, late).set_index("quantity").loc["logit"]
    assert (found["n_before"], found["lead_median_steps"]) == (0, -11_000)


# The order statistics, on crossings that are made by hand.


def planted(times, *, width=1, stop=10**6):
    """Crossings of runs 0, 1, ...: `times[i]` maps a quantity to its step, None where it never crossed."""
    rows = []
    for i, own in enumerate(times):
        for quantity, step in own.items():
            out = step is not None
            after = (math.ceil(step / width) - 1) * width if out else stop
            rows.append(
                {"run_id": f"r{i}", "arm": "a", "label": "a", "seed": i, "quantity": quantity, "crossed": out}
                | {"after": after, "step": after + width if out else stop, "value": 0.0, "records": 2}
            )
    return pd.DataFrame(rows)


def failing(paper, n, step=10**7):
    """Frames of n runs that fail in (step - 1, step]."""
    row = paper.runs.iloc[[0]]
    runs = pd.concat([row.assign(run_id=f"r{i}", seed=i) for i in range(n)], ignore_index=True)
    fired = Verdict(True, (Fired("hard_spike", step, step - 1, 9.0, 5.0),))
    return replace(paper, runs=runs, verdicts={f"r{i}": fired for i in range(n)})


def pair(table, a, b):
    return table[(table["a"] == a) & (table["b"] == b)].iloc[0]


def test_order_of_pairs_by_hand(paper):
    times = [{"sigma": 100, "logit": 200}] * 4  # sigma first
    times += [{"sigma": 300, "logit": 200}]  # logit first
    times += [{"sigma": 100, "logit": None}]  # logit never: sigma first
    times += [{"sigma": 104, "logit": 108}]  # both in (100, 110]: not known
    times += [{"sigma": None, "logit": None}, {"sigma": 5}]  # neither; logit not recorded
    table = mechanism.precedence(failing(paper, len(times)), planted(times, width=10))
    found = pair(table, "sigma", "logit")
    assert found[["n", "first", "second", "undecided", "neither"]].tolist() == [8, 5, 1, 1, 1]
    assert found["share_first"] == pytest.approx(5 / 6)
    assert found["p"] == pytest.approx(2 * 7 / 64)  # 0 or 1 of 6 coins
    assert len(table) == math.comb(len(NAMES), 2)
    assert table["holm"].count() == 1
    assert found["holm"] == min(1.0, len(table) * found["p"])  # pairs without data count


def test_a_quantity_that_was_not_watched_to_the_crossing_decides_nothing(paper):
    times = [{"sigma": 500, "logit": None}]
    for stop, first, undecided in ((499, 0, 1), (500, 1, 0)):
        table = mechanism.precedence(failing(paper, 1), planted(times, stop=stop))
        found = pair(table, "sigma", "logit")
        assert (found["first"], found["undecided"]) == (first, undecided)


def test_ten_runs_that_agree_support_an_order_and_nine_do_not(paper):
    for n, supported in ((9, ""), (10, "sigma")):
        times = [{name: 100 * (i + 1) for i, name in enumerate(NAMES)}] * n
        found = pair(mechanism.precedence(failing(paper, n), planted(times)), "sigma", "loss")
        assert found["supported"] == supported


def test_orders_are_counted_with_their_shares(paper):
    times = [{"sigma": 10, "logit": 20}] * 3 + [{"logit": 10, "sigma": 20}]
    times += [{"sigma": 20, "logit": 20}, {"sigma": None, "logit": 7}]
    table = mechanism.orders(failing(paper, 6), planted(times))
    assert dict(zip(table["order"], table["k"], strict=True)) == {
        "sigma < logit < event": 3,
        "logit < sigma < event": 1,
        "sigma ~ logit < event": 1,
        "logit < event": 1,
    }
    assert table["n"].unique().tolist() == [6]
    assert table["k"].sum() == 6
    assert table.iloc[0]["run_ids"] == "r0 r1 r2"
    # 3 of 6, Clopper and Pearson's tables.
    assert table.iloc[0][["share_low", "share_high"]].tolist() == pytest.approx([0.11812, 0.88188], abs=1e-4)


CHAINS = {
    "as proposed": ([{"sigma": 1, "logit": 2, "jacobian": 3}] * 2, 2, 0, "supported"),
    "as proposed, once": ([{"sigma": 1, "logit": 2, "jacobian": 3}], 1, 0, "not resolved"),
    "other way": ([{"sigma": 3, "logit": 2, "jacobian": 1}] * 6, 0, 6, "contradicted"),
    "mixed": (
        [{"sigma": 1, "logit": 2, "jacobian": 3}, {"sigma": 3, "logit": 2, "jacobian": 4}],
        *(1, 1, "not resolved"),
    ),
    "never saturated": ([{"sigma": 1, "logit": 2, "jacobian": None}] * 6, 0, 6, "contradicted"),
    "at one look": ([{"sigma": 1, "logit": 2, "jacobian": 2}] * 6, 0, 0, "not resolved"),
    "not recorded": ([{"sigma": 1, "logit": 2}] * 6, 0, 0, "no data"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_the_proposed_chain(paper, name):
    times, k, against, verdict = CHAINS[name]
    frames = failing(paper, len(times), step=10**5)
    found = mechanism.chain(frames, planted(times))
    recorded = 0 if verdict == "no data" else len(times)
    assert (found.k, found.against, found.n, found.verdict) == (k, against, recorded, verdict)
    text = mechanism.orders_text(mechanism.orders(frames, planted(times)), found)
    assert isinstance(text, Text)
    assert any(verdict in note or not recorded for note in text.notes)


def test_the_chain_names_the_runs_that_recorded_all_of_it(paper):
    times = [{"sigma": 1, "logit": 2}, {"sigma": 1, "logit": 2, "jacobian": 3}]
    table = planted(times)
    found = mechanism.chain(failing(paper, len(times), step=10**5), table)
    assert found.runs == tuple(table.loc[table["quantity"] == "jacobian", "run_id"])
    assert len(found.runs) == found.n == 1


def test_chance_orders_the_alarms_and_puts_the_failure_last(paper):
    """By chance one of the six orders of three alarms; at n runs the chain errs in 5% of sweeps at most."""
    links = CHAIN[:-1]
    random = np.random.Generator(np.random.Philox(5))
    shown = (random.permuted(np.tile(np.arange(3), (8 * 4_000, 1)), axis=1) == np.arange(3)).all(axis=1)
    as_proposed, other = dict(zip(links, (1, 2, 3), strict=True)), dict(zip(links, (2, 1, 3), strict=True))
    for n in range(1, 9):
        frames = failing(paper, n, step=10**5)
        chains = [
            mechanism.chain(frames, planted([as_proposed] * k + [other] * (n - k))) for k in range(n + 1)
        ]
        assert chains[n].p == pytest.approx(6.0**-n)
        supported = np.array([chain.verdict == "supported" for chain in chains])
        drawn = shown[: 4_000 * n].reshape(-1, n).sum(axis=1)
        assert supported[drawn].mean() <= 0.05
        assert supported[n] == (n > 1)


def test_orders_at_random_are_not_called_supported_more_often_than_the_level(paper):
    """Exchangeable crossings, of which some are censored and some fall between the same two looks."""
    random = np.random.Generator(np.random.Philox(3))
    frames, sweeps, wrong, chains = failing(paper, 12, step=1001), 100, 0, 0
    for _ in range(sweeps):
        drawn = random.integers(1, 1400, size=(12, 4))
        times = [
            {name: int(t) if t < 1000 else None for name, t in zip(NAMES[:4], row, strict=True)}
            for row in drawn
        ]
        table = planted(times, width=20, stop=1000)
        wrong += bool((mechanism.precedence(frames, table)["supported"] != "").any())
        chains += mechanism.chain(frames, table).verdict == "supported"
    # More than 11 of 100 would have a chance of 0.4% at a level of .05.
    assert wrong <= 11
    assert chains <= 11


def test_a_true_order_is_found_through_noise(paper):
    random = np.random.Generator(np.random.Philox(4))
    start = {name: 100 * (i + 1) for i, name in enumerate(NAMES)}
    times = [{name: step + int(random.integers(-20, 20)) for name, step in start.items()} for _ in range(12)]
    table = mechanism.precedence(failing(paper, 12), planted(times))
    assert table["supported"].tolist() == table["a"].tolist()


def test_nothing_recorded_and_nothing_unstable(paper):
    none = {kind: getattr(paper, kind).iloc[:0] for kind in ("stepwise", "spectra", "flow", "attention")}
    empty = mechanism.crossings(replace(paper, **none))
    assert empty.empty
    assert mechanism.alarms(paper, empty)["n_unstable"].tolist() == [0] * len(NAMES)
    calm = paper.runs[paper.runs["arm"] == "hetero"].iloc[:1]
    frames = replace(paper, runs=calm)
    assert mechanism.lead_times(frames).empty
    assert mechanism.orders(frames).empty
    assert mechanism.chain(frames).verdict == "no data"
    table = mechanism.alarms(frames)
    assert table["lead_median_steps"].isna().all()
    assert (table["n_stable"] == 1).all()
    for text in (
        mechanism.alarms_text(table),
        mechanism.precedence_text(mechanism.precedence(frames)),
        mechanism.orders_text(mechanism.orders(frames), mechanism.chain(frames)),
    ):
        assert not any("nan" in cell for row in text.rows for cell in row)


def test_texts_name_what_they_count(paper, crossed):
    alarms = mechanism.alarms_text(mechanism.alarms(paper, crossed))
    by_name = {row[0]: row for row in alarms.rows}
    assert by_name["largest attention logit"][2:] == (
        "6/6 [0.54, 1.00]",
        "6,000 [6,000, 6,000]",
        "0/3 [0.00, 0.71]",
    )
    assert by_name["update ‖ΔW‖/‖W‖, largest matrix"][3] == "−∞ [−∞, −∞]"
    pairs = mechanism.precedence_text(mechanism.precedence(paper, crossed))
    assert all(row[8] == "–" for row in pairs.rows)  # six runs support nothing among 21 pairs
    assert (
        "first bad evaluation"
        in mechanism.orders_text(mechanism.orders(paper, crossed), mechanism.chain(paper, crossed)).rows[0][0]
    )
    assert EVENT not in {q.name for q in QUANTITIES}


# The numbers beneath.


@pytest.mark.parametrize(("n", "cut"), [(5, None), (6, 1), (8, 1), (9, 2), (20, 6)])
def test_median_interval_takes_the_order_statistics_of_the_sign_test(n, cut):
    """Ranks of Conover's table of the sign test: 1 of 6 to 8, 2 of 9, 6 of 20."""
    found = median_interval(list(range(1, n + 1)))
    assert found.estimate == (n + 1) / 2
    if cut is None:
        assert math.isnan(found.low)
    else:
        assert (found.low, found.high) == (cut, n + 1 - cut)


def test_median_interval_holds_its_level_exactly():
    """Over all ways in which n values fall on the two sides of the true median."""
    for n in range(6, 13):
        held = 0
        for below in itertools.product((0, 1), repeat=n):
            found = median_interval([-1.0 if side else 1.0 for side in below])
            held += found.low <= 0 <= found.high
        assert held / 2**n >= 0.95


def test_median_interval_of_infinite_values():
    found = median_interval([-math.inf] * 3 + [5.0] * 4)
    assert (found.estimate, found.low, found.high) == (5.0, -math.inf, 5.0)
    with pytest.raises(ValueError, match="NaN"):
        median_interval([math.nan])


def test_sign_test_by_counting():
    for n in range(1, 10):
        for k in range(n + 1):
            extreme = min(k, n - k)
            p = (
                sum(min(h, n - h) <= extreme for h in (sum(c) for c in itertools.product((0, 1), repeat=n)))
                / 2**n
            )
            assert sign_test(k, n - k) == pytest.approx(p)
    assert math.isnan(sign_test(0, 0))
