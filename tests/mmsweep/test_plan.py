"""`mmsweep plan`: prices checked by hand and against runs that were really trained."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsweep.__main__ import main as mmsweep
from mmsweep.budget import concurrent_runs
from mmsweep.grid import Grid, load_grid
from mmsweep.plan import (
    makespan,
    measured_rate,
    peak_rate,
    pilot_losses,
    plan,
    read_prices,
)
from mmsweep.resources import Resources
from mmsweep.store import RunStore, open_store
from mmsweep.stored import checkpoints_bytes, record_counts, stored_bytes, table_bytes
from trainers import corpus
from trainers.config import RunConfig, run_id
from trainers.errors import InputError
from trainers.flops import cost
from trainers.records import CostRecord, PartWriter, StepRecord
from trainers.shards import write_shard
from trainers.train import train

GRID = """
name: small
store: STORE
seeds: [1, 2, 3]
arms:
  hetero: {attn: stiefel, mlp: dgram}
  plain: {attn: none, mlp: none}
axes:
  schedule.steps: [1000, 2000]
base:
  precision: bfloat16
  data: {source: bin, path: SHARDS}
  model: {n_layer: 2, n_head: 2, d_model: 64, context: 64, vocab_size: 256}
  schedule: {warmup_steps: 10, batch_size: 8}
resources: {workers: 2, gpus_per_worker: 0.5}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    walk = np.cumsum(np.random.default_rng(0).integers(-2, 3, 30_000)) % 64
    write_shard(folder / "train.bin", walk[:25_000].astype(np.uint16))
    write_shard(folder / "val.bin", walk[25_000:].astype(np.uint16))
    return folder


@pytest.fixture
def path(tmp_path, shards) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(GRID.replace("STORE", str(tmp_path / "store")).replace("SHARDS", str(shards)))
    return file


@pytest.fixture
def grid(path) -> Grid:
    return load_grid(path, identify=corpus.identify)


# Time and money


def test_hours_follow_from_flops_and_a_share_of_the_peak(grid):
    made = plan(grid, peak_rate("H100", 0.4), 8, set())
    assert len(made.todo) == 12
    for run in made.todo:
        price = cost(grid.runs[run.run_id])
        assert run.flops == price.total
        assert run.tokens == price.tokens == grid.runs[run.run_id].schedule.steps * 8 * 64
        assert run.gpu_hours == pytest.approx(price.total / (0.4 * 989e12) / 3600)
        # Two workers on half a GPU each: the run takes as long as on one whole GPU.
        assert run.seconds == pytest.approx(price.total / (0.4 * 989e12))
    alone = Resources(workers=4, gpus_per_worker=1.0)
    by_four = plan(Grid(**{**vars(grid), "resources": alone}), peak_rate("H100", 0.4), 8, set())
    assert by_four.todo[0].seconds == pytest.approx(made.todo[0].seconds / 4)
    assert by_four.todo[0].gpu_hours == pytest.approx(made.todo[0].gpu_hours)
    # Three halves of a GPU take two GPUs from everybody else.
    by_three = Resources(workers=3, gpus_per_worker=0.5)
    wasteful = plan(Grid(**{**vars(grid), "resources": by_three}), peak_rate("H100", 0.4), 8, set())
    assert wasteful.todo[0].gpu_hours == pytest.approx(made.todo[0].gpu_hours * 4 / 3)


def test_the_peak_is_that_of_the_precision(grid):
    run = next(iter(grid.runs.values()))
    assert peak_rate("H100", 0.5)(run) == 0.5 * 989e12
    assert peak_rate("H100", 0.5)(run.model_copy(update={"precision": "float32"})) == 0.5 * 67e12


def test_runs_of_one_price_are_told_apart_by_all_but_arm_and_seed(grid):
    made = plan(grid, peak_rate("H100", 0.4), 8, set())
    prices = {(run.arm, grid.runs[run.run_id].schedule.steps): run.flops for run in made.todo}
    assert len(set(prices.values())) == 4


def test_finished_runs_are_not_counted(grid):
    first, *rest = grid.runs
    made = plan(grid, peak_rate("H100", 0.4), 8, {first})
    assert [run.run_id for run in made.todo] == rest


@given(
    st.lists(st.floats(0.1, 100), min_size=1, max_size=30),
    st.integers(1, 8),
)
def test_the_longest_first_on_the_lane_that_is_free(seconds, lanes):
    ends = [0.0] * lanes
    for job in sorted(seconds, reverse=True):
        ends[ends.index(min(ends))] += job
    assert makespan(seconds, lanes) == pytest.approx(max(ends))
    least = max(max(seconds), sum(seconds) / lanes)
    assert least * (1 - 1e-12) <= makespan(seconds, lanes) <= (4 / 3) * sum(seconds)
    assert makespan(seconds, 1) == pytest.approx(sum(seconds))


def test_no_runs_take_no_time():
    assert makespan([], 4) == 0


@pytest.mark.parametrize(
    ("resources", "gpus", "runs"),
    [
        ({"gpus_per_worker": 1.0, "max_concurrent": 2}, [8], 2),
        ({"gpus_per_worker": 1.0, "workers": 4}, [12], 3),
        ({"gpus_per_worker": 1.0, "workers": 4}, [6, 6], 2),
        ({"gpus_per_worker": 0.5, "workers": 3}, [3], 1),
    ],
)
def test_runs_that_go_at_once(resources, gpus, runs):
    rooms = [{"CPU": math.inf, "GPU": count} for count in gpus]
    assert concurrent_runs(Resources(**resources), rooms) == runs


@pytest.mark.parametrize(("nodes", "at_once"), [([], 3), (["--nodes", "2"], 2)])
def test_no_run_spans_two_machines_that_is_not_told_to(path, capsys, nodes, at_once):
    path.write_text(path.read_text().replace("2, gpus_per_worker: 0.5", "4, gpus_per_worker: 1"))
    _, out, _ = call(capsys, path, "--gpu", "H100", "--gpus", "12", "--fresh", *nodes)
    assert f"12 runs to train, 0 finished; {at_once} at once, " in out


# Measured speed


def write_speeds(store: RunStore, folder: Path, run: RunConfig, speeds: list[float], *, workers: int) -> None:
    """A run that was so fast, in tokens a second of all workers together."""
    name = run_id(run)
    store.put_config(
        name, {"config": run.model_dump(mode="json"), "provenance": {"world_size": workers, "device": "cpu"}}
    )
    writer = PartWriter(folder / name, 1)
    for step, speed in enumerate(speeds, start=1):
        writer.append(CostRecord(name, 1, step, speed, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0, 1))
    writer.roll()
    store.ship(name, folder / name)


def test_measured_speed_is_that_of_the_same_way_of_training(grid, tmp_path):
    store = open_store(str(tmp_path / "measured"))
    hetero, plain = (next(run for run in grid.runs.values() if run.arm == arm) for arm in ("hetero", "plain"))
    # The first figure has the start in it; other seeds count together.
    write_speeds(store, tmp_path / "local", hetero, [1.0, 100.0, 120.0, 140.0], workers=2)
    other = hetero.model_copy(update={"seed": 9})
    write_speeds(store, tmp_path / "local", other, [1.0, 180.0, 180.0], workers=1)
    price = cost(hetero)
    per_token = (price.model_step + price.optimizer_step) / (8 * 64)
    rate = measured_rate(store, grid)
    assert rate(hetero) == pytest.approx((60 + 180) / 2 * per_token)
    assert rate(plain) == rate(hetero)  # the same model is all there is
    write_speeds(store, tmp_path / "local", plain, [1.0, 500.0], workers=1)
    price = cost(plain)
    assert measured_rate(store, grid)(plain) == pytest.approx(
        500 * (price.model_step + price.optimizer_step) / (8 * 64)
    )


def test_steps_tell_the_speed_where_costs_were_off(grid, tmp_path):
    store = open_store(str(tmp_path / "measured"))
    run = next(iter(grid.runs.values()))
    write_speeds(store, tmp_path / "local", run, [], workers=1)
    writer = PartWriter(tmp_path / "steps", 1)
    for step, speed in enumerate([1.0, 300.0, 300.0], start=1):
        writer.append(StepRecord(run_id(run), 1, step, 64, 2.0, 0.5, 1e-3, 2e-2, 12.5, speed, 1.7e9))
    writer.roll()
    store.ship(run_id(run), tmp_path / "steps")
    price = cost(run)
    expected = 300 * (price.model_step + price.optimizer_step) / (8 * 64)
    assert measured_rate(store, grid)(run) == pytest.approx(expected)


def test_a_model_that_was_never_measured(grid, tmp_path):
    store = open_store(str(tmp_path / "measured"))
    run = next(iter(grid.runs.values()))
    wider = run.model_copy(update={"model": run.model.model_copy(update={"d_model": 128})})
    write_speeds(store, tmp_path / "local", wider, [1.0, 2.0], workers=1)
    store.put_config("other-s1-01234567", {"config": {"from": "another version"}})
    with pytest.raises(InputError, match="no run of arm hetero's model in bfloat16 says how fast it was"):
        measured_rate(store, grid)


# Bytes, against runs that were trained


RUNS = {
    "all probes": {
        "assignment": {"attn": "stiefel", "mlp": "dgram"},
        "model": {"n_layer": 2, "n_head": 4, "d_model": 64, "context": 16, "vocab_size": 256},
    },
    "odd cadences": {
        "assignment": {"attn": {"manifold": "none", "optimizer": "adamw"}, "mlp": "dgram"},
        "model": {
            "family": "llama",
            "n_layer": 1,
            "n_head": 2,
            "d_model": 48,
            "context": 16,
            "vocab_size": 256,
        },
        "probes": {"attention_every": 10, "updates_every": 7, "flow_every": 3, "costs_every": 11},
        "runtime": {"checkpoint_every": 100},
    },
    "split": {
        "assignment": {"attn": "stiefel", "mlp": {"manifold": "none", "optimizer": "adamw"}},
        "model": {"n_layer": 1, "n_head": 2, "d_model": 32, "context": 16, "vocab_size": 256},
        "optimizer": {"muon": {"lr": 0.1, "solver": "projected", "qkv": "per_head"}},
        "probes": {"heads": False, "costs": False, "attention_every": 40},
    },
}


@pytest.mark.parametrize("which", RUNS)
def test_rows_and_bytes_are_those_of_a_real_run(which, shards, tmp_path):
    base = {
        "data": {"source": "bin", "path": str(shards)},
        "optimizer": {"muon": {"lr": 0.1, "solver": "projected"}},
        "schedule": {"steps": 40, "warmup_steps": 2, "batch_size": 4},
        "evaluation": {"every": 6, "batches": 1},
        "runtime": {"checkpoint_every": 15},
    }
    run = RunConfig.model_validate({**base, **RUNS[which]})
    digest = corpus.identify(run.data)
    run = run.model_copy(update={"data": run.data.model_copy(update={"digest": digest})})
    train(run, tmp_path / "run")
    store, name = open_store(str(tmp_path / "store")), run_id(run)
    store.ship(name, tmp_path / "run")
    rows = store.compact(name)
    for what in ("config.json", "summary.json"):
        store.objects.put_file(f"runs/{name}/{what}", tmp_path / "run" / what)
    assert record_counts(run) == rows
    folder = tmp_path / "store" / "runs" / name
    tables = {kind: (folder / f"{kind}.parquet").stat().st_size for kind in rows}
    assert sum(table_bytes(run).values()) == pytest.approx(sum(tables.values()), rel=0.25)
    checkpoints = sum(path.stat().st_size for path in folder.glob("checkpoints/*/*"))
    assert checkpoints_bytes(run) == pytest.approx(checkpoints, rel=0.1)
    everything = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert stored_bytes(run) == pytest.approx(everything, rel=0.25)


# Seeds


def test_a_pilot_s_losses_by_what_differs_in_the_seed_alone(grid, tmp_path):
    store = open_store(str(tmp_path / "pilot"))
    for number, run in enumerate(grid.runs.values()):
        name = run_id(run)
        store.put_config(name, {"config": run.model_dump(mode="json")})
        status = "diverged" if number == 0 else "completed"
        summary = {"status": status, "steps": 1, "horizon": 1, "final_val_loss": float(number)}
        store.put_summary(name, {**summary, "verdict": {"unstable": number == 1}})
    groups = sorted(sorted(losses) for losses in pilot_losses(store))
    assert groups == [[2.0, 6.0, 10.0], [3.0, 7.0, 11.0], [4.0, 8.0], [5.0, 9.0]]


@pytest.mark.parametrize(("sigma", "seeds"), [("0.0011", 2), ("0.002", 3), ("0.004", 4), ("0.006", 6)])
def test_seeds_for_the_paper_s_gap(path, capsys, sigma, seeds):
    arguments = [str(path), "--gpu", "H100", "--fresh", "--gap", "0.0135", "--sigma", sigma]
    assert mmsweep(["plan", *arguments]) == 0
    assert f"{seeds} seeds an arm find it with 90% power" in capsys.readouterr().out


# The command


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = mmsweep(["plan", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_plan_is_printed_by_arm(path, grid, capsys, tmp_path):
    prices = tmp_path / "prices.yaml"
    prices.write_text("H100: {price_per_hour: 3e6, spot_price_per_hour: 1e6}\n")
    done = next(iter(grid.runs))
    summary = {"status": "completed", "steps": 1, "horizon": 1, "final_val_loss": 2.0}
    open_store(grid.store).put_summary(done, summary)
    code, out, err = call(capsys, path, "--gpu", "H100", "--mfu", "0.5", "--gpus", "2", "--prices", prices)
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    assert (rows["hetero"][1], rows["plain"][1], rows["all"][1]) == ("5", "6", "11")
    hours = sum(cost(run).total for name, run in grid.runs.items() if name != done) / (0.5 * 989e12) / 3600
    assert f"{hours * 3e6:,.2f}" in rows["all"]
    assert f"at the spot price: {hours * 1e6:,.2f}" in out
    assert "small: 11 runs to train, 1 finished; 2 at once" in out
    assert "12 runs to train, 0 finished" in call(capsys, path, "--gpu", "H100", "--fresh")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "H1000"], '--gpu "H1000" is not in the table of peaks; it has A10, A100,'),
        ([], "--gpu is missing: name the GPU, as in --gpu H100"),
        (["--gpu", "H100", "--mfu", "35"], "--mfu 35: give a share between 0 and 1"),
        (["--gpu", "H100", "--gpus", "0"], "--gpus: too few GPUs; a run needs 2 CPUs and 1 GPU on one node"),
        (["--gpu", "H100", "--nodes", "0"], "--nodes 0: give a number above 0"),
        (["--gpu", "H100", "--price", "-1"], "--price -1: give a number above 0"),
        (["--gpu", "H100", "--gap", "0.01"], "--gap needs --sigma, or --pilot STORE"),
        (["--gpu", "H100", "--gap", "0", "--sigma", "1"], "--gap 0 at sigma 1: give numbers above 0"),
        (["--gpu", "H100", "--gap", "1e-9", "--sigma", "1"], "more than 1,000 runs an arm; ask for a larger"),
        (["--gpu", "H100", "--gap", "1", "--pilot", "EMPTY"], "no two completed, stable runs differ"),
        (["--measured", "EMPTY"], "no run of arm hetero's model"),
    ],
)
def test_bad_arguments_are_one_line(path, capsys, tmp_path, arguments, said):
    given = [str(tmp_path / "empty") if a == "EMPTY" else a for a in arguments]
    code, _, err = call(capsys, path, "--fresh", *given)
    assert code == 2
    assert err.count("\n") == 1
    assert said in err


def test_a_grid_without_gpus_wants_a_measurement(path, capsys):
    path.write_text(path.read_text().replace("gpus_per_worker: 0.5", "gpus_per_worker: 0"))
    code, _, err = call(capsys, path, "--gpu", "H100")
    assert code == 2
    assert "no table has the speed of a CPU; give --measured STORE" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("H100: {price_per_hour: 2}\nA100: {price: 1}\n", ":2: A100.price: unknown key"),
        ("H100:\n  price_per_hour: -2\n", ":2: H100.price_per_hour: wants a number above 0"),
        ("H100: {spot_price_per_hour: 2}\n", ":1: H100.price_per_hour: the key is missing"),
        ("H100: 2.5\n", ":1: H100: wants a mapping with the keys price_per_hour, spot_price_per_hour"),
    ],
)
def test_prices_are_checked_with_their_line(tmp_path, text, said):
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        read_prices(file)
    assert any(f"{file}{said}" in line for line in str(error.value).splitlines()), error.value


def test_a_gpu_without_a_price(path, capsys, tmp_path):
    file = tmp_path / "prices.yaml"
    file.write_text("h100: {price_per_hour: 2}\n")
    _, _, err = call(capsys, path, "--gpu", "H100", "--fresh", "--prices", file)
    assert err == f'{file}: no price of "H100" (did you mean "h100"?)\n'


def test_planning_needs_no_torch(path):
    code = (
        "import sys; from mmsweep.grid import load_grid; from mmsweep.plan import plan; "
        "grid = load_grid(sys.argv[1], identify=lambda data: 'sha256:' + '0' * 64); "
        "print(len(plan(grid, lambda run: 1e12, 1, set()).todo), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "12 False\n"
