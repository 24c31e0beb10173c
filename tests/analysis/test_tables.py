from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from paper_size import paper_size
from synthetic import ARMS, Run, curve, grid_index, paper_like, planted, write_run, write_store

from analysis import figures
from analysis.load import load
from analysis.report import write_report
from analysis.tables import modular, modular_text, t1, t1_text, t2, t2_text, t3, t3_text, to_csv
from mmsweep.grid import load_grid
from mmsweep.store import open_store


def flat(final, n=13):
    return [5.0] + [final] * (n - 1)


def row(table, arm):
    return table[table["arm"] == arm].iloc[0]


def test_t1_by_hand(tmp_path):
    runs = [Run("unconstrained", s, flat(v), attn_sigma=7.0) for s, v in enumerate((2.1, 2.3, 2.5))]
    runs += [Run("hetero", s, flat(v)) for s, v in enumerate((2.0, 2.1, 2.4))]
    table = t1(load(write_store(tmp_path, runs)))
    hetero = row(table, "hetero")
    assert (hetero["attn"], hetero["mlp"], hetero["n_finished"], hetero["n_planned"]) == (
        "stiefel",
        "dgram",
        3,
        3,
    )
    # Mean 6.5/3; sum of squared deviations .086667; median 2.1.
    assert hetero["final_mean"] == pytest.approx(2.1666667)
    assert hetero["final_sd"] == pytest.approx(math.sqrt(0.0866667 / 2), rel=1e-6)
    assert hetero["final_median"] == hetero["best_median"] == 2.1
    # Differences -.1, -.2, -.1: standard error .0333333, t(.975, 2) = 4.3026527.
    assert hetero["minus_unconstrained"] == pytest.approx(-0.4 / 3)
    assert hetero["minus_unconstrained_low"] == pytest.approx(-0.2767551)
    assert hetero["minus_unconstrained_high"] == pytest.approx(0.0100884, abs=1e-7)
    assert hetero["minus_unconstrained_pairs"] == 3
    assert (hetero["n_unstable"], hetero["n_judged"], hetero["unstable_low"]) == (0, 3, 0)
    assert hetero["unstable_high"] == pytest.approx(1 - 0.025 ** (1 / 3))
    assert (hetero["attn_sigma_max"], hetero["rank"]) == (1.0, 1)
    plain = row(table, "unconstrained")
    assert (plain["attn_sigma_max"], plain["rank"], plain["minus_unconstrained_pairs"]) == (7.0, 2, 0)
    assert "minus_all_stiefel" not in table


def test_pairs_are_matched_by_seed_and_incomplete_or_diverged_ones_left_out(tmp_path):
    runs = [Run("unconstrained", s, flat(v)) for s, v in ((0, 2.0), (1, 3.0), (2, 2.5), (4, 2.5))]
    runs += [Run("hetero", s, flat(v)) for s, v in ((1, 2.8), (0, 1.9), (3, 2.0))]
    runs += [
        Run("hetero", 2, [5.0, math.nan], status="diverged"),
        Run("hetero", 4, flat(1.0)[:3], status="running"),
    ]
    hetero = row(t1(load(write_store(tmp_path, runs))), "hetero")
    assert hetero["minus_unconstrained_pairs"] == 2
    assert hetero["minus_unconstrained"] == pytest.approx((-0.1 - 0.2) / 2)


def test_a_diverged_run_is_infinite_in_median_and_rank_and_absent_from_the_conditional_mean(tmp_path):
    runs = [Run("hetero", 0, flat(2.0)), Run("hetero", 1, [5.0, 2.0, math.nan], status="diverged")]
    runs += [Run("hetero", 2, [5.0, 2.5, 2.4], status="diverged"), Run("unconstrained", 0, flat(4.9))]
    frames = load(write_store(tmp_path, runs))
    table = t1(frames)
    hetero = row(table, "hetero")
    assert hetero["final_median"] == hetero["final_mean"] == math.inf
    assert math.isnan(hetero["final_sd"])
    assert (hetero["n_diverged"], hetero["n_finished"]) == (2, 3)
    assert (hetero["rank"], row(table, "unconstrained")["rank"]) == (2, 1)
    text = t1_text(frames, table)
    assert "diverged" in text.rows[0]
    assert "mean of stable runs (conditional)" in text.columns


def test_failed_and_running_runs_are_no_evidence_about_stability(tmp_path):
    runs = [Run("hetero", 0, flat(2.0)), Run("hetero", 1, [3.0] * 5 + [9.0], status="failed")]
    runs += [Run("hetero", 2, [3.0] * 5 + [9.0], status="running")]
    hetero = row(t1(load(write_store(tmp_path, runs))), "hetero")
    assert (hetero["n_unstable"], hetero["n_judged"], hetero["n_finished"], hetero["n_planned"]) == (
        0,
        1,
        1,
        3,
    )


def test_axis_cells_are_rows_and_pair_within_their_cell(tmp_path):
    lr = "optimizer.muon.lr"
    runs = [
        Run(arm, 0, flat(final), overrides={"optimizer": {"muon": {"lr": value}}}, axes={lr: value})
        for arm, final in (("unconstrained", 2.0), ("hetero", 1.5))
        for value, final in ((0.3, final), (1.0, 2 * final))
    ]
    table = t1(load(write_store(tmp_path, runs, index=grid_index(runs, axes=[lr]))))
    assert table[["arm", lr]].to_numpy().tolist() == [
        [a, v] for a in ("unconstrained", "hetero") for v in (0.3, 1.0)
    ]
    assert table["minus_unconstrained"].tolist()[2:] == [-0.5, -1.0]
    assert table["rank"].tolist() == [2, 4, 1, 3]


def paper_preset(arm, **model):
    steps = {"steps": 50_000, "warmup_steps": 1000, "batch_size": 64}
    size = {"n_layer": 12, "n_head": 12, "d_model": 768, "context": 1024, "vocab_size": 50304} | model
    return Run(
        arm, 0, [10.8, 3.5, 3.4], steps=50_000, every=25_000, overrides={"model": size, "schedule": steps}
    )


def test_published_losses_stand_only_beside_the_papers_preset(tmp_path, paper_frames):
    table = t1(load(write_store(tmp_path / "paper", [paper_preset(arm) for arm in ARMS])))
    assert table["published"].tolist() == ["3.3855", "3.3679", "unstable", "3.3544", "unstable"]
    for other in ({"d_model": 384}, {"n_layer": 6}, {"context": 512}):
        runs = [paper_preset("hetero"), paper_preset("all_dgram", **other)]
        assert "published" not in t1(load(write_store(tmp_path / repr(other), runs)))
    assert "published" not in t1(paper_frames)


@pytest.mark.parametrize(
    "runs",
    [
        [Run("hetero", 0, [], status="pending")],
        [Run("hetero", 0, curve(2.4))],
        [Run("all_dgram", s, [5.5, math.nan], status="diverged") for s in (0, 1)],
    ],
    ids=["nothing yet", "one run", "all diverged"],
)
def test_t1_is_whole_where_there_is_little(tmp_path, runs, paper_frames):
    frames = load(write_store(tmp_path, runs))
    table = t1(frames)
    full = t1(paper_frames)
    assert list(table.columns) == [c for c in full.columns if not re.match(r"minus_", c)]
    assert len(t1_text(frames, table).rows) == 1
    assert not any("nan" in cell for cell in t1_text(frames, table).rows[0])


def test_csv_of_the_same_numbers_is_the_same_bytes(tmp_path):
    runs = paper_like()[4:8]
    first = write_store(tmp_path / "a", runs)
    # The other store was filled in another order, and one of its runs in another attempt.
    other = write_store(tmp_path / "b", [], index=grid_index(runs))
    for run in reversed(runs):
        write_run(other, run, tmp_path / "b" / "scratch" / run.run_id)
    assert to_csv(t1(load(first))) == to_csv(t1(load(other)))


def test_csv_reads_back_as_the_same_numbers(paper_frames):
    table = t1(paper_frames)
    back = pd.read_csv(io.StringIO(to_csv(table)))
    assert list(back.columns) == list(table.columns)
    for name in table.columns:
        if str(table[name].dtype).startswith(("float", "int", "Int")):
            assert back[name].tolist() == pytest.approx(
                table[name].astype(float).tolist(), abs=5e-7, nan_ok=True
            )


def test_csv_cells_that_a_spreadsheet_would_run_get_a_quote_and_numbers_do_not():
    words = ["=1+1", "+1", "-1", "@cmd", "plain, with comma"]
    numbers = [-0.5, math.inf, -math.inf, math.nan, 1.0]
    rows = list(
        csv.reader(io.StringIO(to_csv(pd.DataFrame({"=head": words, "x": numbers, "n": [-1, 0, 1, 2, 3]}))))
    )
    assert rows[0] == ["'=head", "x", "n"]
    assert [r[0] for r in rows[1:]] == ["'=1+1", "'+1", "'-1", "'@cmd", "plain, with comma"]
    assert [r[1] for r in rows[1:]] == ["-0.500000", "inf", "-inf", "", "1.000000"]
    assert rows[1][2] == "-1"


def test_text_marks_the_predeclared_contrasts_alone(paper_frames):
    text = t1_text(paper_frames, t1(paper_frames))
    marked = {
        (r[0], c) for r in text.rows for c, cell in zip(text.columns, r, strict=True) if cell.endswith("*")
    }
    assert marked == {("hetero", "− unconstrained"), ("hetero", "− all_stiefel")}


def test_metrics_of_the_plan_by_hand(tmp_path):
    norms = {"attn": (8.0, 16.0), "mlp": (8.0, 12.0)}
    quick = {"steps": 100, "every": 50, "norms": norms, "attn_sigma": 4.0, "mlp_sigma": 2.0}
    runs = [
        planted("baseline", s, 3.0, losses=[5.0, 4.0, final], **quick)
        for s, final in enumerate((3.0, 3.1, 3.5))
    ]
    runs += [replace(planted("baseline", 3, 3.0, losses=[5.0, 1.0], **quick), status="running")]
    runs += [planted("muon_all", 0, 3.0, losses=[5.0, math.nan], status="diverged", **quick)]
    frames = load(write_store(tmp_path, runs))
    table = modular(frames)
    base = row(table, "baseline")
    assert (base["n_finished"], base["n_spectra"], base["n_flow"]) == (3, 3, 3)
    assert (base["val_loss"], base["train_loss"]) == (3.1, pytest.approx(3.07))
    assert base["perplexity"] == pytest.approx(math.exp(3.1))
    assert (base["attn_sigma_max"], base["mlp_sigma_max"]) == (4.0, 2.0)
    # σ_min is .8 of σ_max, and the smaller matrices grow by .4 of what the largest does.
    assert (base["attn_sigma_min"], base["mlp_sigma_min"]) == pytest.approx((0.8 * 2.2, 0.8 * 1.4))
    assert (base["attn_norm"], base["mlp_norm"]) == (16.0, 12.0)
    # Gradients of matrix i: (i + 1) / 10 times 1 + 1/step, at steps 1, 50 and 100; attention is 0, 1, 4, 5.
    grads = [0.1 * (i + 1) * (1 + 1 / step) for i in (0, 1, 4, 5) for step in (1, 50, 100)]
    assert base["attn_grad_norm"] == pytest.approx(statistics.median(grads))
    assert base["tokens_per_s"] == 9800.0
    lost = row(table, "muon_all")
    assert lost["val_loss"] == lost["train_loss"] == lost["perplexity"] == math.inf
    text = modular_text(frames, table)
    assert text.rows[1][2:5] == ("diverged",) * 3
    assert text.rows[0][1:5] == ("3", "3.0700", "3.1000", "22.2")


def test_metrics_are_whole_where_nothing_was_recorded(paper_frames, tmp_path):
    table = modular(paper_frames)
    assert table["n_flow"].tolist() == [0] * 5
    assert table[["attn_norm", "mlp_grad_norm"]].isna().all(axis=None)
    frames = load(write_store(tmp_path, [Run("hetero", 0, [], status="pending")]))
    assert set(modular_text(frames, modular(frames)).rows[0][2:]) == {"–"}


def test_csv_keeps_six_digits_of_small_numbers():
    values = [1.234567891e-9, -0.000123456789, 0.09999999, 2.4361234567, 123456.789, 0.0]
    lines = to_csv(pd.DataFrame({"p": values})).split("\n")[1:-1]
    assert lines == ["1.23457e-09", "-0.000123457", "0.1", "2.436123", "123456.789000", "0.000000"]


def test_every_row_of_t1_names_its_finished_runs(tmp_path):
    runs = [Run("hetero", s, flat(2.0)) for s in (0, 1)]
    runs += [
        Run("hetero", 2, flat(2.0)[:3], status="running"),
        Run("all_dgram", 0, [5.0, math.nan], status="diverged"),
    ]
    table = t1(load(write_store(tmp_path, runs)))
    assert table["run_ids"].tolist() == [f"{runs[0].run_id} {runs[1].run_id}", runs[3].run_id]
    assert list(table.columns)[-1] == "run_ids"


@pytest.fixture(scope="module")
def costs():
    return paper_size(("unconstrained", "hetero"), 3, step_every=1000, flow_every=5000, attention_every=5000)


def test_t2_by_hand(costs):
    table = t2(costs).set_index("arm")
    own = costs.costs[costs.costs["arm"] == "hetero"].groupby("run_id")
    hetero = table.loc["hetero"]
    for column in ("tokens_per_s", "step_ms", "solver_ms", "retraction_ms", "flop_utilisation"):
        assert hetero[column] == pytest.approx(statistics.median(own[column].median()))
    parts = hetero[["forward_backward_ms", "solver_ms", "retraction_ms", "communication_ms", "other_ms"]]
    assert parts["other_ms"] == pytest.approx(20.0)
    assert parts.sum() == pytest.approx(hetero["step_ms"], rel=1e-3)
    assert hetero["peak_memory_gib"] == pytest.approx(41e9 / 2**30)
    # 50 steps a run are recorded, 445 ms each.
    assert hetero["train_hours"] == hetero["device_hours"] == pytest.approx(50 * 0.445 / 3600)
    assert (hetero["model_tflop_per_step"], hetero["optimizer_tflop_per_step"]) == (56.0, 70.0)
    speed = costs.costs.groupby(["arm", "seed"])["tokens_per_s"].median()
    logs = [math.log(speed["hetero", s] / speed["unconstrained", s]) for s in range(3)]
    assert hetero["relative_speed"] == pytest.approx(math.exp(statistics.mean(logs)))
    half = 4.3026527 * statistics.stdev(logs) / math.sqrt(3)
    assert hetero["relative_speed_low"] == pytest.approx(math.exp(statistics.mean(logs) - half))
    assert (hetero["n_costs"], hetero["n_pairs"], table.loc["unconstrained", "n_pairs"]) == (3, 3, 0)
    assert hetero["run_ids"].split() == costs.runs.loc[costs.runs["arm"] == "hetero", "run_id"].tolist()
    text = t2_text(costs, t2(costs))
    assert not any("nan" in cell for row in text.rows for cell in row)
    assert "NVIDIA H100" in text.notes[0]


def test_t2_takes_the_hours_that_a_summary_says_and_counts_workers(costs):
    states = {run: {"train_seconds": 7200.0} for run in costs.runs["run_id"]}
    configs = {r: {**c, "provenance": {**c["provenance"], "world_size": 8}} for r, c in costs.configs.items()}
    table = t2(replace(costs, states=states, configs=configs))
    assert table["train_hours"].tolist() == [2.0, 2.0]
    assert table["device_hours"].tolist() == [16.0, 16.0]


def test_t2_is_whole_where_nothing_was_recorded(paper_frames, tmp_path):
    for frames in (paper_frames, load(write_store(tmp_path, [Run("hetero", 0, [], status="pending")]))):
        table = t2(frames)
        assert table["n_costs"].tolist() == [0] * len(table)
        assert not any("nan" in cell for row in t2_text(frames, table).rows for cell in row)


LR = "optimizer.muon.lr"
BASE = {"schedule": {"steps": 300, "warmup_steps": 20}, "evaluation": {"every": 25}}


def launched(folder, name, seeds, final, *, arms, **axes):
    """Launch a grid file into the store in `folder`: every arm and cell on every seed. `final(config)` is a
    run's last loss, NaN leaves it pending."""
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"name": name, "seeds": seeds, "arms": arms, "base": BASE, **axes}))
    grid = load_grid(path, identify=lambda data: "sha256:5f3c0d6e")
    store = open_store(str(folder / "store"))
    store.put_grid(name, grid.text, grid.index())
    for config in grid.runs.values():
        loss = final(config)
        losses = flat(loss) if math.isfinite(loss) else [5.0, math.nan]
        status = "pending" if math.isnan(loss) else "completed" if math.isfinite(loss) else "diverged"
        fields = config.model_dump(mode="json", exclude={"arm", "seed"})
        run = Run(config.arm, config.seed, losses, status=status, overrides=fields)
        write_run(store, run, folder / "scratch" / run.run_id)
    return store


def searched(folder, losses):
    """One arm over learning rates, as a grid: `losses[lr]` by seed 0, 1, ..., NaN where not run yet."""
    return launched(
        folder,
        "search",
        list(range(len(next(iter(losses.values()))))),
        lambda config: losses[config.optimizer.muon.lr][config.seed],
        arms={"hetero": {"attn": "stiefel", "mlp": "dgram"}},
        axes={LR: list(losses)},
    )


def run_again(folder, arms):
    """Cells of that search again, as the arms of another grid: `arms[name]` is a rate and losses by seed."""
    return launched(
        folder,
        "rerun",
        sorted({seed for _, losses in arms.values() for seed in losses}),
        lambda config: arms[config.arm][1].get(config.seed, math.nan),
        arms={
            arm: {"attn": "stiefel", "mlp": "dgram", "optimizer": {"muon": {"lr": lr}}}
            for arm, (lr, _) in arms.items()
        },
    )


@pytest.fixture(scope="module")
def rerun(tmp_path_factory):
    """A search whose third seed has not run, a grid that runs two of its cells again, and other runs."""
    folder = tmp_path_factory.mktemp("rerun")
    for lr in (0.7, 0.9):  # in no grid
        write_store(
            folder, [Run("hetero", 0, flat(1.0), overrides={"optimizer": {"muon": {"lr": lr}}})], index={}
        )
    searched(folder, {0.1: (2.5, 2.7, math.nan), 0.3: (2.2, 2.4, math.nan), 1.0: (2.0, math.inf, math.nan)})
    fresh = {7: 2.5, 8: 2.7, 9: math.inf}
    arms = {"hetero": (0.3, fresh), "twin": (0.3, {1: 2.1, 2: 2.1, 7: 2.5}), "other": (0.1, {7: 1.0, 8: 1.0})}
    return run_again(folder, arms)


def test_t3_chooses_by_the_search_and_estimates_by_fresh_seeds(rerun):
    frames = load(rerun, grid="search")
    (found,) = t3(frames, load(rerun, grid="rerun")).to_dict("records")
    assert (found[LR], found["n_cells"], found["n_search"]) == (0.3, 3, 2)
    assert found["search_median"] == pytest.approx(2.3)
    assert found["minus_next"] == pytest.approx(-0.3)
    assert found["next_label"] == "hetero · lr=0.1"
    # Seeds 1 and 2 are the search's, and 7 counts once: mean 2.6, half-width 12.7062047 x .1.
    assert (found["n_fresh"], found["fresh_lost"], found["fresh_mean"]) == (3, 1, pytest.approx(2.6))
    assert found["fresh_mean_low"] == pytest.approx(2.6 - 12.7062047 * 0.1)
    assert [run.rpartition("-")[0] for run in found["run_ids"].split()] == ["hetero-s0", "hetero-s1"]
    fresh = [run.rpartition("-")[0] for run in found["fresh_run_ids"].split()]
    assert fresh == ["hetero-s7", "hetero-s8", "hetero-s9"]
    text = t3_text(frames, t3(frames, load(rerun, grid="rerun")))
    assert text.rows[0][-1] == "2.6000 [1.3294, 3.8706] (n = 3, 1 diverged)"
    assert len(text.notes) == 1


@pytest.mark.parametrize("grids", [None, ["rerun", "search"]])
def test_runs_of_another_grid_or_of_none_are_no_cells_of_a_search(rerun, grids):
    (found,) = t3(load(rerun, grid=grids)).to_dict("records")
    assert (found["label"], found["n_cells"]) == ("hetero · lr=0.3 · search", 3)
    assert (found["search_median"], found["n_fresh"]) == (pytest.approx(2.3), 3)


def test_t3_of_the_search_alone_says_that_no_fresh_seeds_were_read(rerun):
    frames = load(rerun, grid="search")
    text = t3_text(frames, t3(frames))
    assert text.rows[0][-1] == "none read"
    assert text.notes[-1].startswith("none read: ")


def test_the_report_of_a_search_and_its_rerun_has_fresh_seeds(rerun, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", ())
    page = write_report([load(rerun, grid=grid) for grid in ("search", "rerun")], tmp_path).read_text()
    (row,) = csv.DictReader((tmp_path / "search" / "tables" / "t3.csv").open())
    assert row["n_fresh"] == "3"
    table = page[page.index('id="search-t3"') :]
    behind = re.search(r'data-of="([^"]*)"[^>]*>2\.6000<', table)[1]  # the number leads to the fresh runs
    assert behind.split() == [run.rpartition("-")[2] for run in row["fresh_run_ids"].split()]


def test_the_search_loss_of_a_winner_is_too_low_and_that_on_fresh_seeds_is_not(tmp_path):
    """Twenty cells that are all alike: the best of them looks better than it is."""
    noise = np.random.Generator(np.random.Philox(5))
    rates = [round(0.1 * i, 1) for i in range(1, 21)]
    losses = {lr: tuple(2.5 + 0.01 * noise.standard_normal(2)) for lr in rates}
    best = min(losses, key=lambda lr: statistics.median(losses[lr]))
    searched(tmp_path, losses)
    fresh = {10 + i: 2.5 + 0.01 * noise.standard_normal() for i in range(8)}
    store = run_again(tmp_path, {"hetero": (best, fresh)})
    (found,) = t3(load(store)).to_dict("records")
    assert found["search_median"] < 2.5 - 0.005
    assert found["fresh_mean_low"] < 2.5 < found["fresh_mean_high"]


def test_t3_is_empty_without_axes(paper_frames):
    assert t3(paper_frames).empty
    assert t3_text(paper_frames, t3(paper_frames)).rows == ()
