from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from synthetic import Run, curve, grid_index, paper_like, write_run, write_store

from analysis import compare, runtable
from analysis.contrasts import UNDECIDED, contrast, swaps, swaps_frame, swaps_text
from analysis.load import load
from analysis.mechanism import crossings
from analysis.stats import holm, paired_t, paired_t_p, runs_needed
from analysis.tables import t1
from analysis.verdict import DECIDED, TOO_FEW, Sentence, newest, standing, summary


def said(frames) -> list[Sentence]:
    table = t1(frames)
    return summary(frames, table, swaps(frames, table), crossings(frames))


def test_the_summary_is_computed(paper_frames):
    assert [(one.topic, one.text, one.verdict) for one in said(paper_frames)] == [
        ("Progress", "10 of 10 runs finished: 5 arms, 2 seeds.", ""),
        (
            "Loss",
            "Lowest median final validation loss: hetero, 2.4233 (n = 2) nats per token; "
            "highest finite one: hetero_inv, 3.1275 (n = 2, 2 unstable).",
            "",
        ),
        (
            "Predeclared",
            "hetero − all_stiefel: −0.0252 [−0.0284, −0.0221] (n = 2 pairs, Holm p = 0.0126).",
            DECIDED,
        ),
        (
            "Predeclared",
            "hetero − unconstrained: −0.0133 [−0.0178, −0.0089] (n = 2 pairs, Holm p = 0.0167).",
            DECIDED,
        ),
        (
            "Attention",
            "stiefel instead of dgram, MLP on stiefel (all_stiefel − hetero_inv): "
            "−0.6789 [−0.6796, −0.6783] (n = 2 pairs, Holm p = 0.0001); unstable: hetero_inv in 2 "
            "runs.",
            DECIDED,
        ),
        (
            "Attention",
            "stiefel instead of dgram, MLP on dgram (hetero − all_dgram): "
            "−0.4091 [−0.4111, −0.4072] (n = 2 pairs, Holm p = 0.0002).",
            DECIDED,
        ),
        (
            "MLP",
            "dgram instead of stiefel, attention on stiefel (hetero − all_stiefel): "
            "−0.0252 [−0.0284, −0.0221] (n = 2 pairs, Holm p = 0.0126).",
            DECIDED,
        ),
        (
            "MLP",
            "dgram instead of stiefel, attention on dgram (all_dgram − hetero_inv): "
            "−0.2951 [−0.2957, −0.2944] (n = 2 pairs, Holm p = 0.0002); unstable: hetero_inv in 2 runs.",
            DECIDED,
        ),
        (
            "Stability",
            "Unstable runs: hetero_inv 2 of 2 [0.16, 1.00]; 0 of 8 [0.00, 0.37] in 4 other arms.",
            "",
        ),
        (
            "Spectra",
            "Largest singular value that attention reached, by its manifold: dgram 44.0 to 176 (n = 4); "
            "none 6.50 to 7.50 (n = 2); stiefel 1.00 (n = 4).",
            "",
        ),
        (
            "Mechanism",
            "Whether the order is singular values, then logits, then saturation, then first bad evaluation "
            "cannot be told: no unstable run recorded all of these.",
            UNDECIDED,
        ),
        (
            "Seeds",
            "Noise between seeds: 0.0035 nats, below 0.0055 with 80% confidence (4 degrees of freedom). It "
            "takes 7 seeds an arm to decide a predeclared difference of 0.0135 nats with 90% power, 5 more "
            "than the smallest arm has.",
            TOO_FEW,
        ),
    ]


def test_each_number_names_its_runs(paper_frames):
    runs = paper_frames.runs.set_index("run_id")
    for sentence in said(paper_frames):
        for part in sentence.parts:
            assert bool(part.runs) <= any(c.isdigit() for c in part.text)
            assert set(part.runs) <= set(runs.index)
    difference = next(s for s in said(paper_frames) if s.text.startswith("hetero − all_stiefel")).parts[1]
    assert sorted(runs.loc[list(difference.runs), "arm"]) == ["all_stiefel"] * 2 + ["hetero"] * 2


def test_the_summary_says_the_opposite_of_opposite_data(tmp_path):
    runs = [Run("hetero", s, curve(2.9 + s / 100), attn_sigma=90.0) for s in (0, 1)]
    runs += [Run("all_stiefel", s, curve(2.4), attn_sigma=2.0) for s in (0, 1)]
    text = " ".join(sentence.text for sentence in said(load(write_store(tmp_path, runs))))
    assert "Lowest median final validation loss: all_stiefel" in text
    assert "hetero − all_stiefel: +0.5050" in text
    assert "No finished run counts as unstable: 0 of 4 [0.00, 0.60]." in text
    assert "stiefel 2.00 to 90.0" in text


def test_what_is_not_decided_is_said_to_be_undecided(tmp_path):
    noisy = [Run("hetero", s, curve(2.4 + d)) for s, d in enumerate((-0.1, 0.08))]
    noisy += [Run("all_stiefel", s, curve(2.4)) for s in (0, 1)]
    found = next(s for s in said(load(write_store(tmp_path / "noisy", noisy))) if s.topic == "Predeclared")
    assert found.verdict == UNDECIDED
    assert "−0.0100" in found.text
    assert "undecided: Holm p = 0.9296." in found.text


def test_one_seed_says_what_is_missing(tmp_path):
    runs = [Run("hetero", 0, curve(2.39)), Run("all_stiefel", 0, curve(2.4))]
    runs.append(Run("unconstrained", 0, [], status="pending"))
    by_topic = {s.text.partition(":")[0]: s for s in said(load(write_store(tmp_path, runs)))}
    one = by_topic["hetero − all_stiefel"]
    assert one.text == "hetero − all_stiefel: −0.0100 (n = 1 pair), undecided: one pair gives no interval."
    assert one.verdict == UNDECIDED
    none = by_topic["hetero − unconstrained"]
    assert none.text == "hetero − unconstrained: no pair of finished runs yet."
    assert none.verdict == UNDECIDED
    seeds = said(load(write_store(tmp_path / "again", runs)))[-1]
    assert seeds.verdict == TOO_FEW
    needed = runs_needed(0.0135, 0.002, paired=True, level=1 - 0.05 / 2)
    assert f"takes {needed} seeds an arm" in seeds.text


def test_the_seeds_that_are_lacking_are_counted_over_all_arms_and_runs_of_many_cells_once(tmp_path):
    lr = "optimizer.muon.lr"
    noise = (0.0, 0.004, 0.007)
    runs = [
        Run("hetero", s, curve(2.4 + noise[s]), overrides={"optimizer": {"muon": {"lr": v}}}, axes={lr: v})
        for v in (0.1, 0.2)
        for s in range(3)
    ]
    for value in (0.1, 0.2):  # as an arm that the axis means nothing to: one run, two cells
        runs += [Run("unconstrained", s, curve(2.5 + noise[s]), axes={lr: value}) for s in range(3)]
    runs += [Run("all_stiefel", s, [], status="pending", axes={lr: 0.1}) for s in range(3)]
    frames = load(write_store(tmp_path, runs, index=grid_index(runs, axes=[lr])))
    text = said(frames)[-1].text
    assert "(6 degrees of freedom)" in text
    needed = int(text.partition("It takes ")[2].partition(" ")[0])
    assert f"{needed} more than the smallest arm has" in text


def test_a_seed_that_diverged_takes_away_the_verdict_it_speaks_against(tmp_path):
    runs = [Run("hetero", s, curve(2.3 + s / 1000)) for s in range(4)]
    runs[3] = Run("hetero", 3, [5.5, 3.0, math.nan], status="diverged")
    runs += [Run("all_stiefel", s, curve(2.4 + s * s / 1000)) for s in range(4)]
    frames = load(write_store(tmp_path, runs))
    (swap,) = swaps(frames, t1(frames))
    assert swap.contrast.holm < 0.05
    assert swap.contrast.verdict == UNDECIDED
    found = next(s for s in said(frames) if s.topic == "Predeclared")
    assert (
        "undecided: the arm with the lower mean also diverged; hetero alone diverged in 1 seed." in found.text
    )


def test_swaps_are_of_arms_that_differ_in_one_module_and_nothing_else(tmp_path, paper_frames):
    found = [(s.module, s.this, s.that, s.held) for s in swaps(paper_frames, t1(paper_frames))]
    assert found == [
        ("attention", "stiefel", "dgram", "stiefel"),
        ("attention", "stiefel", "dgram", "dgram"),
        ("MLP", "dgram", "stiefel", "stiefel"),
        ("MLP", "dgram", "stiefel", "dgram"),
    ]
    runs = paper_like()
    runs = [replace(r, overrides={"precision": "bfloat16"}) if r.arm == "hetero" else r for r in runs]
    other = load(write_store(tmp_path, runs))
    assert not [s for s in swaps(other, t1(other)) if "hetero" in (s.contrast.arm, s.contrast.reference)]


def test_swaps_carry_the_numbers_of_the_pairs(paper_frames):
    """Against a computation from the runs alone, with Holm over the three that were not predeclared."""
    table = t1(paper_frames)
    found = {(s.contrast.arm, s.contrast.reference): s.contrast for s in swaps(paper_frames, table)}
    loss = paper_frames.runs.set_index(["arm", "seed"])["final_val_loss"]
    differences = {pair: (loss[pair[0]] - loss[pair[1]]).tolist() for pair in found}
    exploratory = [pair for pair in found if pair != ("hetero", "all_stiefel")]
    adjusted = dict(zip(exploratory, holm([paired_t_p(differences[p]) for p in exploratory]), strict=True))
    adjusted[("hetero", "all_stiefel")] = table.set_index("arm").loc["hetero", "minus_all_stiefel_holm"]
    for pair, one in found.items():
        expected = paired_t(differences[pair])
        np.testing.assert_allclose(
            [one.estimate, one.low, one.high], [expected.estimate, expected.low, expected.high]
        )
        assert one.holm == pytest.approx(adjusted[pair])
        assert one.estimate < 0  # the arm is the one with the lower mean
    frame = swaps_frame(swaps(paper_frames, table))
    assert frame["verdict"].tolist() == ["lower"] * 4
    text = swaps_text(swaps(paper_frames, table))
    assert text.rows[2][-2:] == ("primary", "dgram lower")


def test_the_details_of_a_run_hold_its_spike_scores(paper_frames, modular_frames, tmp_path):
    run_id = modular_frames.runs["run_id"].iloc[0]
    found = modular_frames.stepwise.set_index(["run_id", "quantity"])
    known = found.assign(olmo2=found["olmo2"].mask(found.index == (run_id, "loss"), 3 / 49_000))
    known["olmo_core"] = known["olmo_core"].mask(known.index == (run_id, "gradient"), 1.0)
    row = runtable.rows([replace(modular_frames, stepwise=known.reset_index())], tmp_path)[0]
    loss, gradient = dict(row.details)["spike scores"]
    assert loss == "loss: 0.00612% (OLMo 2), 0% (OLMo-core)"
    assert gradient.endswith(", 100% (OLMo-core)")
    assert "spike scores" not in dict(runtable.rows([paper_frames], tmp_path)[0].details)  # too few steps


def test_standing_and_newest_tell_how_far_a_sweep_is(tmp_path):
    runs = [Run("hetero", 0, curve(2.4)), Run("hetero", 1, curve(2.4)[:4], status="running")]
    runs += [Run("hetero", 2, [], status="pending"), Run("hetero", 3, curve(2.4)[:3], status="failed")]
    frames = load(write_store(tmp_path, runs))
    assert list(standing(frames)) == ["completed", "running", "failed", "pending"]
    assert standing(frames)["running"] == (runs[1].run_id,)
    assert newest(frames) == 1e9 + 300


@pytest.fixture(scope="module")
def two_grids(tmp_path_factory):
    """At two learning rates; in the second, losses are .03 and .02 higher, and an arm is missing."""
    folder = tmp_path_factory.mktemp("two")
    first = [Run(arm, s, curve(2.4)) for arm in ("hetero", "all_stiefel") for s in (0, 1)]
    fast = {"optimizer": {"muon": {"lr": 0.05}}}
    second = [Run("hetero", s, curve(2.43 - s / 100), overrides=fast) for s in (0, 1)]
    store = write_store(folder, first)
    for run in second:
        write_run(store, run, folder / "scratch" / run.run_id)
    store.put_grid("fast", "", grid_index(second, name="fast"))
    return [load(store, grid=name) for name in ("quickstart", "fast")]


def test_two_grids_are_compared_in_pairs_of_a_seed(two_grids):
    rows = compare.rows(*two_grids)
    assert [row.label for row in rows] == ["hetero", "all_stiefel"]
    found = rows[0].difference
    expected = paired_t([0.03, 0.02])
    np.testing.assert_allclose(
        [found.estimate, found.low, found.high], [expected.estimate, expected.low, expected.high]
    )
    assert found.holm == pytest.approx(2 * paired_t_p([0.03, 0.02]))  # the arm without pairs counts
    assert rows[1].difference.pairs == 0
    assert rows[1].right.planned == 0
    assert compare.text(rows, ("quickstart", "fast")).rows[1][4:7] == ("0/0", "–", "–")
    assert compare.frame(rows)["pairs"].tolist() == [2, 0]


def test_cells_match_by_the_config_where_a_grid_lacks_the_axis(tmp_path):
    axis = "optimizer.muon.lr"
    one = [
        Run("hetero", 0, curve(2.4), axes={axis: lr}, overrides={"optimizer": {"muon": {"lr": lr}}})
        for lr in (0.02, 0.05)
    ]
    other = [
        Run("hetero", 0, curve(2.5), overrides={"optimizer": {"muon": {"lr": 0.05}}, "precision": "bfloat16"})
    ]
    store = write_store(tmp_path, one, index=grid_index(one, axes=[axis]))
    write_run(store, other[0], tmp_path / "scratch" / "other")
    store.put_grid("other", "", grid_index(other, name="other"))
    rows = compare.rows(load(store, grid="quickstart"), load(store, grid="other"))
    assert [(row.label, row.difference.pairs) for row in rows] == [
        ("hetero · lr=0.02", 0),
        ("hetero · lr=0.05", 1),
    ]
    assert rows[1].difference.estimate == pytest.approx(0.1)


def test_a_contrast_names_the_runs_of_its_pairs_alone(two_grids):
    runs = two_grids[0].runs
    ours, theirs = (runs[runs["arm"] == arm] for arm in ("hetero", "all_stiefel"))
    found = contrast(ours[ours["seed"] == 0], theirs)
    assert found.pairs == 1
    assert sorted(run.partition("-s")[2][0] for run in found.runs) == ["0", "0"]
