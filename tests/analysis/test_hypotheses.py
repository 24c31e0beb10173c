from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic import Run, curve, grid_index, planted, write_store

from analysis.hypotheses import (
    CONTRADICTED,
    MARGIN,
    NINE,
    NO_DATA,
    NOT_RESOLVED,
    SUPPORTED,
    VAL_LOSS,
    Claim,
    Comparison,
    answers,
    answers_text,
    applies,
    comparisons_text,
    frame,
    measures,
)
from analysis.load import load
from analysis.stats import Interval, spread

QUICK = {"steps": 100, "every": 50, "norms": {}}


def frames_of(folder, runs):
    return load(write_store(folder, runs, index=grid_index(runs, name="modular_manifolds")))


def answered(folder, runs):
    return {answer.name: answer for answer in answers(frames_of(folder, runs))}


def one(answer, arm, reference, column="val_loss"):
    found = [
        c for c in answer.comparisons if (c.arm, c.reference, c.measure.column) == (arm, reference, column)
    ]
    assert len(found) == 1
    return found[0]


def ends(**finals):
    """Quick runs by arm: one final loss per seed; None leaves a seed out, inf is a run that diverged."""
    runs = []
    for arm, losses in finals.items():
        for seed, final in enumerate(losses):
            if final == math.inf:
                runs.append(planted(arm, seed, 4.0, losses=[5.0, math.nan], status="diverged", **QUICK))
            elif final is not None:
                runs.append(planted(arm, seed, 4.0, losses=[5.0, 4.5, final], **QUICK))
    return runs


def with_losses(frames, **finals):
    """Of the three seeds, the arms named, with these final losses; inf is a run that diverged."""
    runs = frames.runs[frames.runs["arm"].isin(finals)].copy()
    for arm, losses in finals.items():
        runs.loc[runs["arm"] == arm, "final_val_loss"] = losses
    runs["unstable"] = runs["final_val_loss"] == math.inf
    return {answer.name: answer for answer in answers(replace(frames, runs=runs))}


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        (["baseline", "muon_all"], True),
        (["stiefel_ffn", "manifold_muon", "something"], True),
        (["baseline", "stiefel_all", "spectral_all"], False),
        (["muon_all", "muon_ffn", "manifold_muon"], False),
        (["baseline", "baseline_no_decay"], False),
        (["hetero", "unconstrained"], False),
    ],
)
def test_the_section_stands_where_muon_meets_adamw(modular_frames, arms, expected):
    runs = pd.DataFrame({"arm": arms})
    assert applies(replace(modular_frames, runs=runs)) is expected


def comparison(low, high, claim, *, below=0, above=0):
    found = Interval((low + high) / 2, low, high, 3)
    return Comparison(VAL_LOSS, "a", "b", 0.0, 0.0, found, below, above, claim, "")


@pytest.mark.parametrize(
    ("low", "high", "lost", "expected"),
    [
        (-0.3, -0.1, {}, SUPPORTED),
        (-0.3, 0.1, {}, NOT_RESOLVED),
        (0.1, 0.3, {}, CONTRADICTED),
        (-0.3, -0.1, {"above": 1}, NOT_RESOLVED),
        (-0.3, -0.1, {"below": 1}, SUPPORTED),
        (0.1, 0.3, {"below": 1}, NOT_RESOLVED),
        (0.1, 0.3, {"above": 1}, CONTRADICTED),
        (math.nan, math.nan, {"below": 5}, NOT_RESOLVED),
    ],
)
def test_a_verdict_needs_the_whole_interval_and_no_diverged_seed_against_it(low, high, lost, expected):
    assert comparison(low, high, Claim.LOWER, **lost).verdict == expected
    swapped = {{"above": "below", "below": "above"}[side]: n for side, n in lost.items()}
    assert comparison(-high, -low, Claim.HIGHER, **swapped).verdict == expected


@pytest.mark.parametrize(
    ("low", "high", "lost", "expected"),
    [
        (-0.9 * MARGIN, 0.01, {}, SUPPORTED),
        (-0.9 * MARGIN, -0.5 * MARGIN, {}, SUPPORTED),  # a benefit, and less than matters
        (-1.1 * MARGIN, 0.01, {}, NOT_RESOLVED),
        (-1.1 * MARGIN, -0.5 * MARGIN, {}, CONTRADICTED),
        (0.1, 0.2, {}, SUPPORTED),
        (0.1, 0.2, {"below": 1}, NOT_RESOLVED),
        (-0.2, -0.1, {"above": 1}, NOT_RESOLVED),
    ],
)
def test_no_benefit_is_shown_by_an_interval_above_the_margin(low, high, lost, expected):
    assert comparison(low, high, Claim.NO_BENEFIT, **lost).verdict == expected


def test_every_hypothesis_is_supported_where_that_was_planted(modular_frames):
    found = answers(modular_frames)
    assert [(a.name, a.verdict, a.missing) for a in found] == [(f"H{i}", SUPPORTED, ()) for i in range(1, 6)]
    h1, h2, h3, h4, h5 = found
    # What was planted: noise of .02, .021, .022 against .01; factors of 3, 3.2, 3.4 against 1.
    assert one(h1, "muon_all", "baseline", "loss_spread").difference.estimate == pytest.approx(
        -0.011, rel=0.1
    )
    assert one(h1, "muon_all", "baseline", "grad_spread").difference.estimate == pytest.approx(-0.11, rel=0.1)
    logs = -math.log(3 * 3.2 * 3.4) / 3
    for column in ("attn_sigma_growth", "attn_norm_growth"):
        assert one(h2, "stiefel_attention", "baseline", column).difference.estimate == pytest.approx(logs)
    assert one(h3, "muon_ffn", "muon_attention").difference.estimate == pytest.approx(0.1, abs=0.005)
    assert one(h4, "manifold_muon", "stiefel_all").difference.estimate == pytest.approx(-0.25, abs=0.005)
    assert "Rank of manifold_muon by median final validation loss: 1 of 9 arms." in h4.facts
    assert one(h5, "stiefel_all_decay", "stiefel_all").difference.n == 3


def test_the_opposite_data_contradicts_every_hypothesis(tmp_path):
    finals = dict.fromkeys(NINE, 4.0)
    finals |= {
        "muon_attention": 4.1,
        "stiefel_attention": 4.1,
        "manifold_muon": 4.2,
        "stiefel_all_decay": 3.9,
    }
    runs = []
    for arm, final in finals.items():
        for seed in (0, 1):
            size = (0.04 + 0.001 * seed) if "muon" in arm else 0.01
            noise = np.random.Generator(np.random.Philox([seed, len(runs)])).standard_normal((2, 100))
            grown = 5.0 + 0.1 * seed if "stiefel" in arm or arm == "manifold_muon" else 2.0
            changes = {
                "step_losses": 4 + size * noise[0],
                "step_grads": np.exp(10 * size * noise[1]),
                "losses": [5.0, 4.5, final + 1e-3 * noise[0, 0]],
                "attn_sigma": grown,
                "mlp_sigma": grown,
            }
            runs.append(planted(arm, seed, final, **(QUICK | changes)))
    found = answered(tmp_path, runs)
    assert {name: answer.verdict for name, answer in found.items()} == dict.fromkeys(found, CONTRADICTED)
    assert "9 of 9 arms" in found["H4"].facts[0]
    assert one(found["H2"], "manifold_muon", "muon_all", "mlp_norm_growth").lacking.startswith("not recorded")


def test_seeds_that_disagree_resolve_nothing(tmp_path):
    finals = {arm: [4.0 + 0.1 * ((i + k) % 2) for i in range(2)] for k, arm in enumerate(NINE)}
    finals |= {"stiefel_all_decay": [3.9, 4.2]}
    runs = ends(**finals)
    for run in runs:
        run.step_losses, run.step_grads = (), ()
        run.attn_sigma = run.mlp_sigma = 3.0 + (run.seed + list(finals).index(run.arm)) % 2
    found = answered(tmp_path, runs)
    assert {name: answer.verdict for name, answer in found.items()} == dict.fromkeys(found, NOT_RESOLVED)


def test_one_seed_gives_estimates_and_no_verdict(modular_frames):
    runs = modular_frames.runs[modular_frames.runs["seed"] == 1]
    found = {answer.name: answer for answer in answers(replace(modular_frames, runs=runs))}
    assert {name: answer.verdict for name, answer in found.items()} == dict.fromkeys(found, NOT_RESOLVED)
    difference = one(found["H4"], "manifold_muon", "baseline").difference
    assert (difference.n, math.isnan(difference.low)) == (1, True)
    assert difference.estimate == pytest.approx(-0.4, abs=0.02)


def test_without_the_arms_there_is_no_data_and_they_are_named(tmp_path):
    found = answered(tmp_path, ends(baseline=[4.0, 4.1], muon_all=[3.9, 3.95]))
    assert {name: a.verdict for name, a in found.items() if name != "H1"} == dict.fromkeys(
        ("H2", "H3", "H4", "H5"), NO_DATA
    )
    assert found["H1"].missing == ("muon_attention", "muon_ffn")
    assert found["H3"].missing == ("muon_attention", "muon_ffn", "stiefel_attention", "stiefel_ffn")
    assert found["H5"].missing == ("stiefel_all", "stiefel_all_decay")
    rows = {row[0]: row for row in answers_text(list(found.values())).rows}
    assert rows["H5"][2:] == (NO_DATA, "1 no data", "stiefel_all, stiefel_all_decay")
    assert "no finished run: stiefel_all_decay, stiefel_all" in {
        row[6] for row in comparisons_text(list(found.values())).rows
    }


def test_best_of_both_needs_both(modular_frames):
    beaten = {"baseline": [4.0, 4.1, 4.2], "stiefel_all": [4.0, 4.1, 4.2], "manifold_muon": [3.5, 3.61, 3.7]}
    found = with_losses(modular_frames, **beaten)["H4"]
    assert (found.verdict, found.missing) == (NOT_RESOLVED, ("muon_all",))
    for muon_all, expected, place in (
        ([3.7, 3.8, 3.9], SUPPORTED, 1),
        ([3.4, 3.7, 3.5], NOT_RESOLVED, 2),
        ([3.3, 3.4, 3.5], CONTRADICTED, 2),
    ):
        h4 = with_losses(modular_frames, **beaten, muon_all=muon_all)["H4"]
        assert h4.verdict == expected
        assert f": {place} of 4 arms." in h4.facts[0]


def test_pairs_share_their_seed_and_are_finished(tmp_path):
    runs = ends(stiefel_all=[4.0, 4.1, 4.3, None], stiefel_all_decay=[4.001, None, 4.303, 4.0])
    runs += [replace(planted("stiefel_all", 3, 4.0, losses=[5.0, 1.0], **QUICK), status="running")]
    frames = frames_of(tmp_path, runs)
    assert len(measures(frames)) == 6
    found = one(answers(frames)[4], "stiefel_all_decay", "stiefel_all")
    # Differences .001 and .003: mean .002, standard error .001, t(.975, 1) = 12.7062.
    assert (found.difference.n, found.difference.estimate) == (2, pytest.approx(0.002))
    assert found.difference.low == pytest.approx(0.002 - 0.0127062, abs=1e-7)
    assert found.verdict == SUPPORTED


def test_a_diverged_arm_is_counted_and_takes_the_verdict_away(modular_frames):
    finals = {"muon_ffn": [3.8, 3.81, math.inf], "muon_attention": [3.9, 3.92, math.inf]}
    finals |= {"stiefel_ffn": [3.8, 3.81, math.inf], "stiefel_attention": [3.9, 3.92, 3.9]}
    h3 = with_losses(modular_frames, **finals)["H3"]
    both, one_alone = h3.comparisons[:2]
    assert (both.difference.n, both.above, both.below) == (2, 0, 0)
    assert both.verdict == CONTRADICTED
    assert (one_alone.difference.n, one_alone.above, one_alone.below) == (2, 1, 0)
    assert one_alone.verdict == NOT_RESOLVED
    rows = comparisons_text([h3]).rows
    assert "2 [1 diverged: stiefel_ffn]" in {row[6] for row in rows}


@pytest.mark.parametrize(("seeds", "expected"), [(5, NOT_RESOLVED), (6, SUPPORTED)])
def test_unstable_runs_are_compared_by_an_exact_interval(tmp_path, seeds, expected):
    runs = ends(baseline=[math.inf] * seeds, muon_all=[3.9] * seeds)
    h1 = answered(tmp_path, runs)["H1"]
    found = one(h1, "muon_all", "baseline", "unstable")
    # No run of the arm in n pairs that differ: θ is below 1 - .025^(1/n).
    assert found.difference.estimate == found.difference.low == -1
    assert found.difference.high == pytest.approx(1 - 2 * 0.025 ** (1 / seeds))
    assert found.verdict == expected
    assert f"baseline {seeds} of {seeds} [{0.025 ** (1 / seeds):.2f}, 1.00]" in h1.facts[0]


def test_pairs_with_the_same_outcome_widen_nothing_and_count(tmp_path):
    runs = ends(baseline=[math.inf, math.inf, 4.0, 4.0], muon_all=[3.9, math.inf, math.inf, 3.9])
    found = one(answered(tmp_path, runs)["H1"], "muon_all", "baseline", "unstable").difference
    # Two of four pairs differ, one each way: 1 of 2 is between .0126 and .9874.
    assert (found.estimate, found.n) == (0, 4)
    assert (found.low, found.high) == pytest.approx((-0.5 * 0.97484, 0.5 * 0.97484), abs=1e-4)


def test_a_quiet_loss_does_not_outweigh_a_run_that_diverged(modular_frames):
    fine = {"baseline": [4.0, 4.1, 4.2], "muon_all": [3.9, 4.0, 4.2]}
    assert with_losses(modular_frames, **fine)["H1"].verdict == SUPPORTED
    h1 = with_losses(modular_frames, **(fine | {"muon_all": [3.9, 4.0, math.inf]}))["H1"]
    assert one(h1, "muon_all", "baseline", "loss_spread").above == 1
    assert h1.verdict == NOT_RESOLVED


def test_differences_that_are_all_alike_have_no_interval(modular_frames):
    finals = {"stiefel_all": [4.0, 4.1, 4.2], "stiefel_all_decay": [3.5, 3.6, 3.7]}
    found = one(with_losses(modular_frames, **finals)["H5"], "stiefel_all_decay", "stiefel_all")
    assert found.difference.estimate == pytest.approx(-0.5)
    assert (math.isnan(found.difference.low), found.verdict) == (True, NOT_RESOLVED)


def test_a_seed_counts_once_over_axis_cells(tmp_path):
    lr = "optimizer.adamw.lr"
    runs = [
        replace(run, overrides={"optimizer": {"adamw": {"lr": value}}}, axes={lr: value})
        for value, shift in ((3e-4, 0.0), (6e-4, 1.0))
        for run in ends(stiefel_all=[3.0, 3.0], stiefel_all_decay=[3.1 + shift, 3.3 + shift])
    ]
    index = grid_index(runs, name="modular_manifolds", axes=[lr])
    h5 = answers(load(write_store(tmp_path, runs, index=index)))[4]
    found = one(h5, "stiefel_all_decay", "stiefel_all").difference
    assert (found.n, found.estimate) == (2, pytest.approx(0.7))


def test_the_first_tenth_of_the_steps_is_no_spread(tmp_path):
    calm = 3 + 0.01 * np.random.default_rng(0).standard_normal(100)
    wild = np.where(np.arange(100) < 10, [8.0, 2.0] * 50, calm)
    run = planted("baseline", 0, 3.0, **QUICK, step_losses=wild, step_grads=np.exp(wild))
    row = measures(frames_of(tmp_path, [run])).iloc[0]
    assert row["loss_spread"] == pytest.approx(spread(calm[10:]))
    assert row["grad_spread"] == pytest.approx(spread(calm[10:]))


@pytest.mark.parametrize(
    ("sigma", "norms", "expected"),
    [
        (4.0, (8.0, 16.0), (math.log(4), math.log(2))),
        (0.5, (8.0, 2.0), (0.0, 0.0)),  # what shrinks does not explode
        (1.0005, (8.0, 8.0004), (0.0, 0.0)),
    ],
)
def test_growth_is_of_the_matrix_that_grew_most(tmp_path, sigma, norms, expected):
    both = {"attn": norms, "mlp": (1.0, 1.0)}
    run = Run("baseline", 0, curve(4.0, n=5), steps=200, every=50, attn_sigma=sigma, norms=both)
    row = measures(frames_of(tmp_path, [run])).iloc[0]
    assert (row["attn_sigma_growth"], row["attn_norm_growth"]) == pytest.approx(expected)
    assert (row["mlp_sigma_growth"], row["mlp_norm_growth"]) == (0, 0)


def test_weights_that_are_not_finite_have_exploded(tmp_path):
    frames = frames_of(tmp_path, [planted("baseline", 0, 4.0, **QUICK)])
    spectra = frames.spectra.copy()
    spectra.loc[(spectra["step"] == 100) & (spectra["matrix"] == "h.1.mlp.c_fc"), "sigma_max"] = math.nan
    row = measures(replace(frames, spectra=spectra)).iloc[0]
    assert row["attn_sigma_growth"] == pytest.approx(math.log(3))
    assert row["mlp_sigma_growth"] == math.inf


def test_without_records_nothing_is_measured(tmp_path):
    run = Run("baseline", 0, [math.nan], status="diverged")
    row = measures(frames_of(tmp_path, [run])).iloc[0]
    assert row["val_loss"] == math.inf
    assert row[["attn_sigma_growth", "attn_norm_growth"]].isna().all()


def test_the_frame_and_the_text_hold_every_comparison(modular_frames):
    found = answers(modular_frames)
    rows, text = frame(found), comparisons_text(found)
    n = sum(len(answer.comparisons) for answer in found)
    assert len(rows) == len(text.rows) == n == 12 + 16 + 6 + 6 + 2
    assert all(len(row) == len(text.columns) == len(text.words) for row in text.rows)
    assert not any("nan" in cell for row in text.rows for cell in row)
    held = next(r for r in text.rows if r[1:3] == ("growth of σ_max, MLP", "manifold_muon − muon_all"))
    assert held[3:5] == ("×1.00", "×3.50")
    assert held[5].startswith("×0.286 [×")
