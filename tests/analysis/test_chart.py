from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import Run, curve, write_store

from analysis import chart
from analysis.load import load

values = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=300)


@given(values, st.integers(1, 60))
def test_a_thinned_curve_keeps_every_extreme_and_every_mean(numbers, points):
    steps = np.arange(len(numbers))
    own = np.array(numbers)
    at, rows = chart.thinned(steps, np.stack([own, own, own]), points)
    assert len(at) <= points + 1 or len(numbers) <= points
    assert (np.diff(at) > 0).all()
    assert at[-1] == steps[-1]
    before = -1
    for i, end in enumerate(at):
        inside = own[(steps > before) & (steps <= end)]
        inside = inside[np.isfinite(inside)]
        if len(rows) == 3 and len(inside):
            assert rows[1, i] == inside.min()
            assert rows[2, i] == inside.max()
            assert rows[0, i] == pytest.approx(inside.mean(), rel=1e-9, abs=1e-6)
        elif len(rows) == 3:
            assert math.isnan(rows[0, i])
        before = end


@given(values)
def test_a_short_curve_is_left_as_it_is(numbers):
    own = np.array(numbers)
    at, rows = chart.thinned(np.arange(len(own)), np.stack([own, own, own]), 300)
    assert at.tolist() == list(range(len(own)))
    np.testing.assert_array_equal(rows, own[None])


def test_extremes_between_the_rows_of_a_thinned_load_are_kept(tmp_path):
    losses = np.full(300, 3.0)
    losses[150] = 50.0
    run = Run("hetero", 0, curve(2.4), step_losses=losses.tolist(), step_grads=np.ones(300).tolist())
    frames = load(write_store(tmp_path, [run]), step_rows=30)
    assert frames.stride > 1
    found = chart.data([frames])
    place, mean, low, high = found["metrics"]["train_loss"]["runs"][run.run_id]
    assert len(mean) == len(found["steps"][place]) < 40
    assert max(high) == 50.0
    assert min(low) == 3.0


def test_what_is_drawn_is_what_was_recorded(tmp_path, paper_frames):
    found = chart.data([paper_frames])
    assert [label["name"] for label in found["labels"]] == list(paper_frames.arms)
    assert list(found["metrics"]) == ["val_loss", "train_loss", "grad_norm", "attn_sigma", "mlp_sigma"]
    assert len(found["steps"]) == 2  # the evaluations of all runs are at the same steps, and so are the steps
    for run in found["runs"]:
        evals = paper_frames.evals[paper_frames.evals["run_id"] == run["id"]]
        place, drawn = found["metrics"]["val_loss"]["runs"][run["id"]]
        assert found["steps"][place] == evals["step"].tolist()
        np.testing.assert_allclose(drawn, evals["val_loss"], rtol=1e-5)
        assert (run["bad"] is not None) == ("hetero_inv" in run["id"])
    broken = Run("all_dgram", 0, [5.5, math.nan, math.inf], status="diverged")
    one = chart.data([load(write_store(tmp_path, [broken]))])
    assert one["metrics"]["val_loss"]["runs"][broken.run_id][1] == [5.5, None, None]
    assert one["runs"][0]["state"] == "diverged"


def test_the_chart_knows_how_each_run_ended(tmp_path):
    ends = {"completed": curve(2.4), "failed": curve(2.4)[:3], "running": curve(2.4)[:3]}
    runs = [Run("hetero", seed, losses, status=status) for seed, (status, losses) in enumerate(ends.items())]
    runs.append(Run("hetero", 3, [*curve(2.4)[:-1], math.nan]))  # completed, without a result
    found = chart.data([load(write_store(tmp_path, runs))])
    assert [run["state"] for run in found["runs"]] == ["completed", "lost", "training", "diverged"]


def test_of_several_grids_labels_carry_their_grid_and_a_run_stands_once(paper_frames):
    found = chart.data([paper_frames, paper_frames])
    assert len(found["runs"]) == 10
    assert found["labels"][0]["name"] == "unconstrained · quickstart"
    assert {label["dash"] for label in found["labels"][:5]} != {
        label["dash"] for label in found["labels"][5:]
    }
