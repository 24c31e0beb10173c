from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import Run, curve, grid_index, paper_like, write_run, write_store

from analysis import versions
from analysis.hypotheses import measures
from analysis.load import RUN_DTYPES, load, long_dtypes, thinned
from analysis.mechanism import crossings
from analysis.tables import t1
from mmsweep.grid import INDEX_SCHEMA
from mmsweep.store import RunStore, open_store
from trainers.errors import InputError
from trainers.records import (
    KINDS,
    AttentionRecord,
    EvalRecord,
    FlowRecord,
    HeadRecord,
    PartWriter,
    StepRecord,
)
from trainers.stability import judge


def dtypes(frame):
    return {name: str(dtype) for name, dtype in frame.dtypes.items()}


def long_frames(frames):
    return {kind: getattr(frames, kind) for kind in KINDS}


def test_a_whole_sweep_is_one_row_per_run_with_its_records(paper_frames):
    runs, frames = paper_like(), paper_frames
    assert frames.grid == "quickstart"
    assert frames.arms == ("unconstrained", "all_stiefel", "all_dgram", "hetero", "hetero_inv")
    assert frames.runs["run_id"].tolist() == [run.run_id for run in runs]
    assert frames.runs["final_val_loss"].tolist() == [run.losses[-1] for run in runs]
    assert frames.runs["best_val_loss"].tolist() == [min(run.losses) for run in runs]
    hetero = frames.runs[frames.runs["arm"] == "hetero"].iloc[0]
    assert (hetero["attn"], hetero["mlp"], hetero["step"], hetero["horizon"]) == (
        "stiefel",
        "dgram",
        300,
        300,
    )
    assert len(frames.evals) == 10 * 13
    assert len(frames.spectra) == 10 * 13 * 8
    assert frames.notes == ()


def test_probes_have_frames_of_their_own(tmp_path):
    run = Run("hetero", 0, curve(2.4), status="running")
    store = write_store(tmp_path, [run])
    writer = PartWriter(tmp_path / "more", 2)
    for record in (
        HeadRecord(run.run_id, 2, 25, 1, "qk", 3, 40.0, 0.5, 44.0, 7.5),
        HeadRecord(run.run_id, 2, 25, 1, "q", -1, 2.0, 0.5, 4.0, 90.0),
        AttentionRecord(run.run_id, 2, 50, 1, 3, 1e4, 0.01, 0.99, math.nan),
        FlowRecord(run.run_id, 2, 10, "h.1.mlp.c_fc", 1, "mlp", 2.0, 1.0, 0.02, 9.0, 1.5, 0.7),
    ):
        writer.append(record)
    writer.roll()
    store.ship(run.run_id, tmp_path / "more")
    frames = load(store)
    heads = frames.heads[["arm", "seed", "step", "layer", "part", "head", "sigma_max"]]
    assert heads.to_numpy().tolist() == [
        ["hetero", 0, 25, 1, "q", -1, 2.0],
        ["hetero", 0, 25, 1, "qk", 3, 40.0],
    ]
    assert frames.attention[["step", "max_logit", "p_max"]].to_numpy().tolist() == [[50, 1e4, 0.99]]
    assert frames.attention["jacobian_norm"].isna().all()
    flow = frames.flow[["matrix", "module", "clipped_grad_norm", "activation_rms"]]
    assert flow.to_numpy().tolist() == [["h.1.mlp.c_fc", "mlp", 1.0, 0.7]]


def test_dtypes_are_fixed_also_where_there_is_nothing(tmp_path, paper_frames):
    full = paper_frames
    pending = Run("hetero", 0, [], status="pending")
    empty = load(write_store(tmp_path / "empty", [pending]))
    assert dtypes(full.runs) == dtypes(empty.runs) == RUN_DTYPES
    for kind in KINDS:
        assert dtypes(long_frames(full)[kind]) == dtypes(long_frames(empty)[kind]) == long_dtypes(kind)
    assert empty.evals.empty


def test_the_verdict_comes_from_the_evaluations_and_a_summary_that_differs_is_named(tmp_path):
    run = Run("hetero_inv", 0, curve(3.127, dip=2.85), attn_sigma=160.0)
    store = write_store(tmp_path, [run])
    told = store.summary(run.run_id)
    store.put_summary(run.run_id, told | {"verdict": {"unstable": False, "first_bad": None, "rules": []}})
    frames = load(store)
    row = frames.runs.iloc[0]
    expected = judge(run.evaluations, 300, run.config.stability)
    assert frames.verdicts[run.run_id] == expected
    assert expected.unstable
    assert (bool(row["unstable"]), row["first_bad"]) == (True, expected.first_bad)
    assert row["rules"] == "persistent_drift (225, 250]; no_recovery (200, 225]"
    assert frames.notes == (f"{run.run_id}: its summary says stable, its evaluations say unstable",)


def test_a_diverged_run_is_infinitely_bad_and_its_nan_is_kept(tmp_path):
    run = Run("all_dgram", 0, [5.5, 4.0, 3.0, math.nan], status="diverged")
    frames = load(write_store(tmp_path, [run]))
    row = frames.runs.iloc[0]
    assert row["final_val_loss"] == math.inf
    assert math.isnan(row["last_val_loss"])
    assert (row["best_val_loss"], row["first_bad"]) == (3.0, 75)
    assert math.isnan(frames.evals["val_loss"].iloc[-1])


def test_a_non_finite_training_loss_counts_although_no_evaluation_saw_it(tmp_path):
    run = Run("all_dgram", 0, [5.5, 4.0, 3.0], status="diverged")
    store = write_store(tmp_path, [run], index={})
    line = '{"kind":"steps","run":"%s","attempt":2,"step":61,"tokens_seen":1,"loss":"NaN","grad_norm":"NaN",'
    line += '"lr":1e-3,"muon_lr":1e-3,"step_ms":1.0,"tokens_per_s":1.0,"time":1.0}\n'
    key = f"runs/{run.run_id}/attempt-002/steps-000000.jsonl"
    store.objects.put(key, (line % run.run_id).encode())
    assert load(store).runs["first_bad"].tolist() == [61]


def test_a_running_sweep_loads(tmp_path):
    done, pending = Run("hetero", 0, curve(2.4)), Run("hetero", 1, [], status="pending")
    running = Run("hetero", 2, [5.5, 4.0, 3.5], status="running")
    unseen = Run("hetero", 3, [])
    store = write_store(
        tmp_path, [done, pending, running], index=grid_index([done, pending, running, unseen])
    )
    frames = load(store)
    assert frames.runs["status"].tolist() == ["completed", "pending", "running", "pending"]
    assert frames.runs["step"].tolist() == [300, 0, 50, 0]
    assert frames.runs["final_val_loss"].notna().tolist() == [True, False, False, False]
    assert frames.runs["last_val_loss"].tolist()[2] == 3.5
    assert frames.runs["unstable"].isna().tolist() == [False, True, False, True]


def test_a_running_run_is_judged_on_spikes_alone(tmp_path):
    drifting = Run("hetero", 0, [3.0] * 5 + [3.3] * 6, status="running")
    spiking = Run("hetero", 1, [3.0] * 5 + [4.2], status="running")
    frames = load(write_store(tmp_path, [drifting, spiking]))
    assert frames.runs["unstable"].tolist() == [False, True]


def test_a_torn_last_line_is_dropped_and_a_damaged_part_is_named(tmp_path):
    torn, damaged = (
        Run("hetero", 0, curve(2.4)[:5], status="running"),
        Run("hetero", 1, curve(2.4)[:5], status="running"),
    )
    store = write_store(tmp_path, [torn, damaged])
    part = "runs/{}/attempt-001/evals-000000.jsonl"
    data = store.objects.get(part.format(torn.run_id))
    store.objects.put(part.format(torn.run_id), data[:-20])
    store.objects.put(part.format(damaged.run_id), b"{not json}\n" + data)
    frames = load(store)
    assert frames.evals.groupby("run_id").size().to_dict() == {torn.run_id: 4}
    assert len(frames.spectra["run_id"].unique()) == 2
    assert len(frames.notes) == 1
    assert damaged.run_id in frames.notes[0]
    assert "evals" in frames.notes[0]


def test_foreign_files_in_the_store_are_not_runs(tmp_path):
    store = write_store(tmp_path, paper_like()[:1])
    root = Path(store.url)
    (root / "runs" / "README.txt").write_text("mine")
    (root / "runs" / "old backup").mkdir()
    (root / "grids" / ".DS_Store").write_bytes(b"\0")
    (root / "report").mkdir()
    assert len(load(store).runs) == 1


def test_runs_outside_the_grid_come_only_without_a_grid_and_are_never_pooled(tmp_path):
    inside = Run("hetero", 0, curve(2.4))
    outside = Run("hetero", 1, curve(2.9), overrides={"precision": "bfloat16"})
    store = write_store(tmp_path, [inside, outside], index=grid_index([inside]))
    assert load(store, grid="quickstart").runs["run_id"].tolist() == [inside.run_id]
    frames = load(store)
    assert frames.runs["run_id"].tolist() == [inside.run_id, outside.run_id]
    assert frames.runs["grid"].tolist() == ["quickstart", ""]
    assert (
        frames.runs["group"].nunique()
        == frames.runs["family"].nunique()
        == frames.runs["label"].nunique()
        == 2
    )


def test_runs_without_any_grid_group_by_their_configs(tmp_path):
    seeds = [Run("hetero", s, curve(2.4)) for s in (0, 1)]
    other = Run("hetero", 0, curve(2.6), overrides={"optimizer": {"muon": {"lr": 0.3}}})
    plain = Run("unconstrained", 0, curve(2.5))
    frames = load(write_store(tmp_path, [*seeds, other, plain], index={}))
    runs = frames.runs.set_index("run_id")
    assert frames.grid is None
    same = runs.loc[[run.run_id for run in seeds], "group"]
    assert same.nunique() == 1
    assert runs.loc[other.run_id, "group"] != same.iloc[0]
    assert runs.loc[other.run_id, "label"] != runs.loc[seeds[0].run_id, "label"]
    # A seed's partner has the same config but for arm and assignment.
    assert runs.loc[plain.run_id, "family"] == runs.loc[seeds[0].run_id, "family"]


def test_axes_are_columns_and_numbers_stay_numbers(tmp_path):
    lr, how = "optimizer.muon.lr", "optimizer.muon.retraction"
    runs = [
        Run(
            "hetero",
            0,
            curve(2.4),
            overrides={"optimizer": {"muon": {"lr": v, "retraction": r}}},
            axes={lr: v, how: r},
        )
        for v in (0.3, 1.0)
        for r in ("svd_sorted", "column_norm")
    ]
    frames = load(write_store(tmp_path, runs, index=grid_index(runs, axes=[lr, how])))
    assert frames.axes == (lr, how)
    assert str(frames.runs[lr].dtype) == "float64"
    assert frames.runs[lr].tolist() == [0.3, 0.3, 1.0, 1.0]
    assert str(frames.runs[how].dtype) == "string"
    assert frames.runs["label"].tolist()[0] == "hetero · lr=0.3 · retraction=svd_sorted"


def test_one_run_may_fill_several_cells(tmp_path):
    run = Run("unconstrained", 0, curve(2.4))
    index = grid_index([run, run], axes=["optimizer.muon.retraction"])
    for cell, value in zip(index["cells"], ("svd_sorted", "column_norm"), strict=True):
        cell["axes"] = {"optimizer.muon.retraction": value}
    frames = load(write_store(tmp_path, [run], index=index))
    assert frames.runs["run_id"].tolist() == [run.run_id] * 2
    assert len(frames.evals) == 13


@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_store_is_named_with_the_fix(tmp_path, exists):
    root = tmp_path / "results"
    if exists:
        root.mkdir()
    with pytest.raises(InputError) as caught:
        load(str(root))
    assert str(caught.value) == f"{root}: no runs here; launch a grid into this store or check its path"


def test_an_unknown_grid_gets_the_nearest_name(tmp_path):
    store = write_store(tmp_path, paper_like()[:1])
    with pytest.raises(InputError, match=r'no grid "quikstart" \(did you mean "quickstart"\?\)$'):
        load(store, grid="quikstart")
    alone = write_store(tmp_path / "no-grid", paper_like()[:1], index={})
    with pytest.raises(InputError, match="holds no grid at all"):
        load(alone, grid="quickstart")


@pytest.mark.parametrize("change", [{"cells": [{"run_id": "../../etc"}]}, {"arms": None}, {"cells": 3}])
def test_a_broken_grid_index_is_an_input_error(tmp_path, change):
    run = Run("hetero", 0, curve(2.4))
    store = write_store(tmp_path, [run], index=grid_index([run]) | change)
    with pytest.raises(InputError, match=r"grids/quickstart\.json: not an object .*launch the grid again"):
        load(store)


def test_a_config_of_another_version_is_named_and_the_run_still_shown(tmp_path):
    run = Run("hetero", 0, curve(2.4))
    store = write_store(tmp_path, [run])
    config = store.config(run.run_id)
    config["config"]["warp_drive"] = True
    store.put_config(run.run_id, config)
    frames = load(store)
    assert frames.runs["status"].tolist() == ["completed"]
    assert frames.runs["unstable"].isna().all()
    assert "config.json is not of this version (warp_drive" in frames.notes[0]


def test_several_grids_keep_their_cells_apart(tmp_path):
    run = Run("hetero", 0, curve(2.4))
    store = write_store(tmp_path, [run])
    store.put_grid("again", "", grid_index([run], name="again"))
    frames = load(store)
    assert frames.grid is None
    assert frames.runs["grid"].tolist() == ["again", "quickstart"]
    assert frames.runs["label"].nunique() == 2
    write_run(store, Run("hetero", 1, curve(2.5)), tmp_path / "more")
    assert len(load(store, grid="again").runs) == 1


# Many stores and parts of them


def test_several_stores_are_one_sweep(tmp_path):
    """Each run from where it has ended; the grid's cells once."""
    a, b, c = (Run("hetero", seed, curve(2.4 + seed)) for seed in range(3))
    index = grid_index([a, b, c])
    begun = Run("hetero", 1, curve(9.9)[:3], status="running")
    first = write_store(tmp_path / "first", [a, begun], index=index)
    second = write_store(tmp_path / "second", [b, c], index=index)
    frames = load([first, second.url])
    assert frames.store == f"{first.url}, {second.url}"
    assert frames.grid == "quickstart"
    assert frames.runs["run_id"].tolist() == [run.run_id for run in (a, b, c)]
    assert frames.runs["final_val_loss"].tolist() == [2.4, 3.4, 4.4]
    assert frames.urls[b.run_id] == f"{second.url}/runs/{b.run_id}"
    assert load([second, first]).runs["final_val_loss"].tolist() == [2.4, 3.4, 4.4]
    with pytest.raises(InputError, match="no runs here"):
        load([first, str(tmp_path / "nowhere")])


def test_pairs_are_of_one_store_where_two_hold_the_same_seeds(tmp_path):
    """Of other data, say: what is not the same but for the arm is no pair."""
    arms, stores = ("hetero", "unconstrained"), []
    for place, digest in (("first", "sha256:1"), ("second", "sha256:2")):
        runs = [
            Run(arm, seed, curve(2.4 + seed), overrides={"data": {"digest": digest}})
            for arm in arms
            for seed in (0, 1)
        ]
        stores.append(write_store(tmp_path / place, runs, index=grid_index(runs)))
    table = t1(load(stores))
    assert table.loc[table["arm"] == "hetero", "minus_unconstrained_pairs"].tolist() == [4]


def test_a_run_that_ended_as_diverged_is_unstable_whatever_its_evaluations_say(tmp_path):
    calm = Run("hetero", 0, curve(2.4), status="diverged")
    frames = load(write_store(tmp_path, [calm, Run("hetero", 1, curve(2.4))]))
    assert frames.runs["unstable"].tolist() == [True, False]
    assert t1(frames)["n_unstable"].tolist() == [1]
    assert frames.notes == (f"{calm.run_id}: it ended as diverged and its evaluations do not say so",)


def test_several_grids_by_name(tmp_path):
    runs = [Run("hetero", seed, curve(2.4)) for seed in range(3)]
    store = write_store(tmp_path, runs, index=grid_index(runs[:1], name="a"))
    for name, run in zip(("b", "c"), runs[1:], strict=True):
        store.put_grid(name, "", grid_index([run], name=name))
    frames = load(store, grid=["a", "c"])
    assert frames.grid is None
    assert frames.runs["run_id"].tolist() == [runs[0].run_id, runs[2].run_id]
    with pytest.raises(InputError, match='no grid "d"'):
        load(store, grid=["a", "d"])


def test_a_selection_is_that_part_of_the_whole(paper_store, paper_frames):
    run_ids = paper_frames.runs["run_id"].tolist()[3:5]
    part = load(paper_store, runs=run_ids, kinds=["spectra"], between=(50, 100))
    assert part.runs["run_id"].tolist() == run_ids
    assert part.steps.empty
    assert part.evals.empty
    whole = paper_frames.spectra
    wanted = whole[whole["run_id"].isin(run_ids) & whole["step"].between(50, 100)]
    assert part.spectra.astype(str).to_numpy().tolist() == wanted.astype(str).to_numpy().tolist()
    for run_id in run_ids:  # judged by all evaluations, whatever is asked for
        assert part.verdicts[run_id] == paper_frames.verdicts[run_id]
    windowed = load(paper_store, between=(50, 100))
    assert windowed.steps["step"].between(50, 100).all()
    assert len(windowed.steps) == paper_frames.steps["step"].between(50, 100).sum() > 0
    assert len(windowed.evals) == len(paper_frames.evals)


def test_lists_come_where_they_are_asked_for(paper_store, paper_frames):
    assert not {"sigma", "gram_diag"} & set(paper_frames.spectra)
    spectra = load(paper_store, kinds=["spectra"], lists=True).spectra
    assert dtypes(spectra) == {name: str(dtype) for name, dtype in long_dtypes("spectra", lists=True).items()}
    assert [max(values) for values in spectra["sigma"]] == spectra["sigma_max"].tolist()
    nothing = load(paper_store, kinds=["evals"], lists=True).spectra
    assert nothing.empty


def test_ids_are_categories_in_the_order_of_the_grid(tmp_path):
    runs = [Run(arm, seed, curve(2.4)) for arm in ("unconstrained", "hetero") for seed in (1, 0)]
    store = write_store(tmp_path, runs)
    writer = PartWriter(tmp_path / "more", 2)
    for layer in (1, 10, 2):
        values = (2.0, 1.0, 0.02, 9.0, 1.5, 0.7)
        writer.append(FlowRecord(runs[0].run_id, 2, 10, f"h.{layer}.mlp.c_fc", layer, "mlp", *values))
    writer.roll()
    store.ship(runs[0].run_id, tmp_path / "more")
    frames = load(store)
    assert frames.evals["run_id"].cat.categories.tolist() == [run.run_id for run in runs]
    assert frames.evals["arm"].cat.categories.tolist() == ["unconstrained", "hetero"]
    matrices = [f"h.{layer}.mlp.c_fc" for layer in (1, 2, 10)]
    assert frames.flow["matrix"].cat.categories.tolist() == matrices
    # Rows keep the order of the store's keys.
    assert frames.flow["matrix"].tolist() == [matrices[i] for i in (0, 2, 1)]


@pytest.mark.parametrize("seen", ["parts", "old parquet"])
def test_a_run_that_is_compacted_meanwhile_loads(tmp_path, seen):
    """What was listed is gone, or is another file, when it is read."""
    run = Run("hetero", 0, curve(2.4), status="running")
    store = write_store(tmp_path, [run])
    if seen == "old parquet":
        store.compact(run.run_id)
        writer = PartWriter(tmp_path / "more", 2)
        writer.append(EvalRecord(run.run_id, 2, 325, 1, 2.0, 2.0, 1e9))
        writer.roll()
        store.ship(run.run_id, tmp_path / "more")
    expected = load(store)

    class Compacting:
        """Compacts after it has told what is there."""

        def __getattr__(self, name):
            return getattr(store.objects, name)

        def entries(self, prefix):
            listed = store.objects.entries(prefix)
            store.compact(run.run_id)
            return listed

    frames = load(RunStore(Compacting()))
    assert frames.notes == ()
    assert len(frames.evals) == len(expected.evals) == (13 if seen == "parts" else 14)
    assert len(frames.steps) == len(expected.steps) > 0


# Thinning


floats = st.floats(allow_nan=True, allow_infinity=True)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 60), floats, floats), min_size=1, max_size=40, unique_by=lambda r: r[0]
    ),
    st.integers(1, 25),
)
def test_thinning_keeps_every_kth_step_and_all_extremes(rows, k):
    rows = sorted(rows)
    columns = dict(zip(("step", "loss", "grad_norm"), zip(*rows, strict=True), strict=True))
    table = thinned(pa.table({name: pa.array(values) for name, values in columns.items()}), k).to_pylist()
    last = rows[-1][0]
    assert [row["step"] for row in table] == [s for s, *_ in rows if s % k == 0 or s == last]
    before = -1
    for row in table:
        inside = [r for r in rows if before < r[0] <= row["step"]]
        before = row["step"]
        for place, name in ((1, "loss"), (2, "grad_norm")):
            values = [r[place] for r in inside]
            finite = [v for v in values if math.isfinite(v)]
            highest = max(math.inf if math.isnan(v) else v for v in values)
            assert row[f"{name}_max"] == highest
            lowest = row[f"{name}_min"]
            assert lowest == min(finite) if finite else math.isnan(lowest)
            assert repr(row[name]) == repr(values[-1])


def long_run(seed: int, status: str, **at: float) -> Run:
    """1,000 steps, with the loss given at some."""
    losses = np.linspace(5, 3, 1_000)
    for step, loss in at.items():
        losses[int(step[1:]) - 1] = loss
    steps = {"steps": 1_000, "every": 250, "step_losses": losses, "step_grads": losses / 5}
    return Run("hetero", seed, curve(3.0, n=5), status=status, **steps)


def test_many_steps_are_thinned_and_no_spike_is_lost(tmp_path):
    runs = [long_run(0, "completed", s333=40.0), long_run(1, "running", s777=math.nan)]
    store = write_store(tmp_path, runs)
    whole = load(store)
    assert (whole.stride, len(whole.steps), whole.notes) == (1, 2_000, ())
    frames = load(store, step_rows=100)
    assert frames.stride == 20
    assert frames.notes == (
        "steps: every 20th of each run, with the extremes of loss and gradient norm between",
    )
    assert dtypes(frames.steps) == dtypes(whole.steps) == long_dtypes("steps")
    first, second = (frames.steps[frames.steps["run_id"] == run.run_id] for run in runs)
    assert first["step"].tolist() == second["step"].tolist() == [*range(20, 1_001, 20)]
    assert first.loc[first["loss_max"] == 40.0, "step"].tolist() == [340]
    assert second.loc[second["loss_max"] == math.inf, "step"].tolist() == [780]
    assert first["loss"].max() < 5
    # The verdict knows the very step, which is not among those kept.
    assert frames.verdicts[runs[1].run_id] == whole.verdicts[runs[1].run_id]
    assert frames.verdicts[runs[1].run_id].first_bad == 777
    assert load(store, step_rows=2_000).stride == 1
    assert load(store, step_rows=1_999).stride == 2


def noisy_run(seed: int, status: str = "completed") -> Run:
    """2,000 steps with noise, the loss up .6 from step 1,501 on, and a high gradient norm at step 1,001."""
    noise = np.random.Generator(np.random.Philox(seed))
    losses = 3 + 0.15 * noise.standard_normal(2_000) + 0.6 * (np.arange(2_000) >= 1_500)
    norms = np.exp(0.2 * noise.standard_normal(2_000))
    norms[1_000] = 4.0
    steps = {"steps": 2_000, "every": 500, "step_losses": losses, "step_grads": norms}
    return Run("baseline", seed, curve(3.0, n=5), status=status, **steps)


def test_what_takes_every_step_does_not_depend_on_how_many_are_kept(tmp_path):
    runs = [noisy_run(seed) for seed in range(3)]
    store = write_store(tmp_path, runs)
    whole = load(store)
    crossed, measured = crossings(whole), measures(whole)
    first = whole.stepwise.set_index(["run_id", "quantity"])["step"]
    for run in runs:
        lowest = np.minimum.accumulate(run.step_losses)
        by_hand = 1 + int(np.argmax(run.step_losses > lowest + 1))
        assert first[run.run_id].to_dict() == {"loss": by_hand, "gradient": 1_001}
    scores = whole.stepwise.set_index("quantity").loc["gradient", "olmo2"]
    assert scores.tolist() == [1 / 1_800] * 3  # one of those that have the window of a tenth before them
    assert measured[["spike_score", "loss_spread", "grad_spread"]].notna().all(axis=None)
    for stride in (2, 3, 7):
        frames = load(store, step_rows=-(-6_000 // stride))
        assert frames.stride == stride
        pd.testing.assert_frame_equal(frames.stepwise, whole.stepwise)
        pd.testing.assert_frame_equal(crossings(frames), crossed)
        pd.testing.assert_frame_equal(measures(frames), measured)
    pd.testing.assert_frame_equal(load(store, kinds=(), between=(0, 9)).stepwise, whole.stepwise)


def test_steps_in_parts_say_what_they_say_in_one_file(tmp_path):
    run = noisy_run(0, "running")
    whole = load(write_store(tmp_path / "whole", [run]))
    half = replace(run, step_losses=run.step_losses[:700], step_grads=run.step_grads[:700])
    store = write_store(tmp_path / "parts", [half])
    writer = PartWriter(tmp_path / "more", 2)
    for step, loss, norm in zip(range(701, 2_001), run.step_losses[700:], run.step_grads[700:], strict=True):
        writer.append(StepRecord(run.run_id, 2, step, 1, loss, norm, 1e-3, 1e-3, 1.0, 1.0, 1.0))
        if step % 500 == 0:
            writer.roll()
    store.ship(run.run_id, tmp_path / "more")
    pd.testing.assert_frame_equal(load(store).stepwise, whole.stepwise)
    store.compact(run.run_id)
    pd.testing.assert_frame_equal(load(store, step_rows=300).stepwise, whole.stepwise)


# Versions


FIRST = Path(__file__).parents[1] / "fixtures" / "schema-1"
"""A run as the trainer's first commit left it, in parts, and one as the first store compacted it."""


def test_runs_of_the_first_version_load(tmp_path):
    shutil.copytree(FIRST, tmp_path / "store")
    now = Run("hetero", 7, curve(2.4))
    write_run(open_store(str(tmp_path / "store")), now, tmp_path / "scratch")
    frames = load(str(tmp_path / "store"))
    assert frames.notes == ()
    assert frames.runs["status"].tolist() == ["completed"] * 3
    assert frames.runs["unstable"].tolist() == [False] * 3
    assert frames.runs["final_val_loss"].tolist() == [5.49368143081665, 5.496726036071777, 2.4]
    old = FIRST / "runs" / "hetero-s0-ad04b551" / "attempt-001"
    lines = [
        json.loads(line) for part in sorted(old.glob("steps-*")) for line in part.read_text().splitlines()
    ]
    steps = frames.steps[frames.steps["run_id"] == "hetero-s0-ad04b551"]
    names = [name for name in lines[0] if name in steps]
    assert len(names) == 10
    assert steps[names].to_numpy().tolist() == [[line[name] for name in names] for line in lines]
    assert len(frames.spectra[frames.spectra["run_id"] == "hetero-s0-bfa15fe6"]) == 12


def test_versions_migrate_one_by_one():
    table = {
        "thing": {
            1: lambda value: {**value, "lr": value["rate"]},
            2: lambda value: {name: v for name, v in value.items() if name != "rate"},
        }
    }

    def now(value):
        return versions.migrated(value, "thing", newest={"thing": 3}, migrations=table)

    current = {"lr": 0.1, "schema": 3}
    assert now({"rate": 0.1}) == now({"rate": 0.1, "schema": 1}) == current
    assert now({"rate": 0.1, "lr": 0.1, "schema": 2}) == now(current) == current
    with pytest.raises(versions.TooNewError, match=r"is of schema 4, .* reads up to 3"):
        now({"schema": 4})
    for broken in (0, -1, True, "1", None, 1.0):
        with pytest.raises(ValueError, match="not a version"):
            now({"schema": broken})


def test_every_version_has_a_way_to_the_present_one():
    assert versions.NEWEST["index"] == INDEX_SCHEMA
    for what, newest in versions.NEWEST.items():
        assert set(versions.MIGRATIONS[what]) == set(range(1, newest))


# The benchmark


def test_the_benchmark_of_loading_runs(tmp_path):
    import subprocess
    import sys

    root = Path(__file__).parents[2]
    command = [sys.executable, "benchmarks/loading.py", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    (path,) = tmp_path.glob("loading-*-quick.json")
    result = json.loads(path.read_text())
    assert done.stdout == path.with_suffix(".md").read_text()
    assert "smoke test" in done.stdout
    rows = {"steps": 5_000, "evals": 10, "runs": 5}
    for way in ("cold", "warm", "baseline"):
        assert result["large"][way]["rows"] == rows
    assert result["large"]["cold"]["notes"] == result["sweep"]["load"]["notes"] == 0
