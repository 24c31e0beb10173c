"""Budgets: what is spent, what may begin, and a launch that stops at one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mmsweep.budget import Budget, Prices, Taken, admitted, device_seconds, devices, spent, taken, unit
from mmsweep.grid import load_grid
from mmsweep.resources import Resources
from mmsweep.store import open_store
from trainers.corpus import identify
from trainers.errors import InputError

GRID = """
name: tiny
seeds: [1, 2, 3]
arms: {hetero: {attn: stiefel, mlp: dgram}}
base:
  data: {source: text, path: TEXTS}
  model: {n_layer: 1, n_head: 2, d_model: 16, context: 16, vocab_size: 256}
  optimizer: {muon: {lr: 0.1, solver: projected}}
  schedule: {steps: 12, warmup_steps: 2, batch_size: 8}
  evaluation: {every: 12, batches: 1}
resources: {workers: 1, max_concurrent: 1}
budget: {gpu_hours: 0.00001}
"""


def test_a_budget_is_hours_or_money():
    assert Budget(gpu_hours=10.0).hours == 10
    assert Budget(cost=25.0, price_per_hour=2.5).hours == 10
    for bad, said in (
        ({}, "give gpu_hours, or cost with price_per_hour"),
        ({"gpu_hours": 1.0, "cost": 1.0, "price_per_hour": 1.0}, "give gpu_hours, or cost"),
        ({"cost": 1.0}, "cost and price_per_hour go together"),
        ({"gpu_hours": 1.0, "price_per_hour": 1.0}, "cost and price_per_hour go together"),
        ({"gpu_hours": 0.0}, "greater than 0"),
    ):
        with pytest.raises(ValidationError, match=said):
            Budget(**bad)


def test_a_grid_s_budget_is_checked_with_its_line_and_is_in_the_index(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(GRID.replace("{source: text, path: TEXTS}", "{}"))
    grid = load_grid(path, identify=lambda data: "sha256:" + "0" * 64)
    assert grid.index()["budget"] == {"hours": 1e-5, "unit": "worker-hours", "devices": 1.0}
    path.write_text(path.read_text().replace("{gpu_hours: 0.00001}", "{cost: 3}"))
    with pytest.raises(InputError, match=r"tiny\.yaml:12: budget: cost and price_per_hour go together"):
        load_grid(path, identify=identify)


def test_devices_are_gpus_or_workers_without():
    assert devices(Resources(workers=4, gpus_per_worker=0.5)) == 2
    assert devices(Resources(workers=4, cpus_per_worker=0.5)) == 4
    assert devices(Resources(workers=3, gpus_per_worker=0.5)) == 2  # Ray divides one GPU, not several
    assert devices(Resources(workers=6, nodes=2, gpus_per_worker=0.5)) == 4
    assert unit(Resources(gpus_per_worker=1.0)) == "GPU-hours"
    assert unit(Resources()) == "worker-hours"


def test_what_a_run_has_taken():
    assert device_seconds(None, 2.0) == 0
    assert device_seconds({"status": "pending"}, 2.0) == 0
    assert device_seconds({"device_seconds": 7.5, "started": 1.0, "finished": 99.0}, 2.0) == 7.5
    assert device_seconds({"device_seconds": None, "started": 10.0, "updated": 15.0}, 2.0) == 10
    assert device_seconds({"started": 10.0, "finished": 15.0, "train_seconds": 3.0}, 2.0) == 10
    assert device_seconds({"started": 10.0, "finished": 15.0, "train_seconds": 30.0}, 2.0) == 60
    assert device_seconds({"started": 15.0, "updated": 10.0}, 2.0) == 0  # clocks differ


def test_how_far_a_run_is():
    assert taken(5.0, None, 2.0) == Taken(5.0, 0.0, 0.0)
    status = {"status": "pending", "step": 3, "steps": 12, "device_seconds": 7200.0}
    assert taken(5.0, status, 2.0) == Taken(5.0, 0.25, 2.0)
    summary = {"status": "diverged", "steps": 9, "horizon": 12, "device_seconds": 3600.0}
    assert taken(5.0, summary, 2.0) == Taken(5.0, 0.75, 1.0)
    assert taken(5.0, {"status": "pending", "steps": 12, "reason": "budget spent"}, 2.0) == Taken(
        5.0, 0.0, 0.0
    )


def test_the_rest_of_a_run_is_priced_by_its_like():
    prices = Prices(
        [Taken(100.0, 1.0, 2.0), Taken(100.0, 0.5, 3.0), Taken(400.0, 1.0, 4.0), Taken(7.0, 0.0, 1.0)]
    )
    assert prices.rest(Taken(100.0, 0.0, 0.0)) == pytest.approx(4.0)  # between .02 and .06 hours a FLOP
    assert prices.rest(Taken(400.0, 0.25, 9.0)) == pytest.approx(3.0)
    assert prices.rest(Taken(50.0, 0.0, 0.0)) == pytest.approx(1.0)  # .02: the median of .01, .02, .06
    assert Prices([Taken(7.0, 0.0, 1.0)]).rest(Taken(7.0, 0.0, 0.0)) is None


def done(hours: float) -> Taken:
    return Taken(1.0, 1.0, hours)


NEW = Taken(1.0, 0.0, 0.0)


def test_without_a_price_as_many_begin_as_go_at_once():
    runs = {"a": NEW, "b": NEW, "c": NEW}
    assert admitted(Budget(gpu_hours=1.0), runs, runs, at_once=2) == ["a", "b"]
    assert admitted(Budget(gpu_hours=1.0), runs, runs, at_once=0) == ["a"]
    lost = {**runs, "d": Taken(1.0, 0.0, 1.0)}  # an attempt that came to nothing took it all
    assert admitted(Budget(gpu_hours=1.0), lost, runs, at_once=2) == []


def test_one_that_is_too_dear_holds_back_no_cheaper_one():
    runs = {"a": done(2.0), "long": Taken(4.0, 0.0, 0.0), "half": Taken(4.0, 0.75, 3.0), "b": NEW, "c": NEW}
    order = ["long", "half", "b", "c"]
    # 5 hours are spent; of what has 4 FLOPs an hour buys one, of what has 1 a half.
    assert admitted(Budget(gpu_hours=6.5), runs, order, at_once=9) == ["half"]
    assert admitted(Budget(gpu_hours=8.0), runs, order, at_once=9) == ["half", "b"]
    assert admitted(Budget(gpu_hours=9.0), runs, order, at_once=9) == ["long"]


@given(
    st.floats(0, 20),
    st.floats(0.1, 40),
    st.lists(st.floats(0.01, 10), max_size=12),
)
def test_what_is_admitted_stays_within_the_budget(taken, limit, sizes):
    runs = {"done": Taken(1.0, 1.0, 1.0), "lost": Taken(3.0, 0.0, taken)}
    runs |= {str(n): Taken(size, 0.0, 0.0) for n, size in enumerate(sizes)}
    waiting = [name for name in runs if name not in ("done", "lost")]
    chosen = admitted(Budget(gpu_hours=limit), runs, waiting, at_once=3)
    rate = 1.0
    total = spent(runs) + sum(rate * runs[name].flops for name in chosen)
    assert not chosen or total <= limit * (1 + 1e-6)
    for name in set(waiting) - set(chosen):
        assert total + rate * runs[name].flops > limit
    assert chosen == [name for name in waiting if name in chosen]


# --- a launch ------------------------------------------------------------------------------------


def test_a_launch_stops_at_its_budget_and_a_relaunch_knows_what_was_spent(tmp_path, texts):
    path, where = tmp_path / "tiny.yaml", tmp_path / "store"
    path.write_text(GRID.replace("TEXTS", texts))

    def mmsweep(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", f"mmsweep.{command}", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, timeout=240, cwd=tmp_path)

    first = mmsweep("launch", path, "--store", where)
    assert first.returncode == 1, first.stdout + first.stderr
    assert re.search(r"tiny: budget spent: \S+ of 1e-05 worker-hours; 2 runs are not begun\n", first.stdout)
    assert "1 of 3 runs done" in first.stdout
    store = open_store(str(where))
    ids = list(load_grid(path, identify=identify).runs)
    assert [store.summary(run_id) is not None for run_id in ids] == [True, False, False]
    used = device_seconds(store.summary(ids[0]), 1.0) / 3600
    assert used > 1e-5
    reason = f"budget spent: {used:.3g} of 1e-05 worker-hours"
    for run_id in ids[1:]:
        status = store.status(run_id)
        assert (status["status"], status["steps"], status["reason"]) == ("pending", 12, reason)

    shown = mmsweep("status", where, "--grid", "tiny")
    assert shown.returncode == 0
    assert shown.stdout.count(reason) == 2
    assert f"tiny: {used:.3g} of 1e-05 worker-hours spent, 0 left\n" in shown.stdout

    again = mmsweep("launch", path, "--store", where)
    assert again.returncode == 1
    assert reason in again.stdout
    assert "1 of 3 runs done" in again.stdout
    assert all(store.next_attempt(run_id) == 1 for run_id in ids[1:])  # none was tried

    path.write_text(path.read_text().replace("gpu_hours: 0.00001", "cost: 100, price_per_hour: 2"))
    planned = mmsweep("plan", path, "--store", where, "--measured", where)
    assert planned.returncode == 0, planned.stderr
    assert f"budget: {used:.3g} of 50 worker-hours spent, " in planned.stdout
    last = mmsweep("launch", path, "--store", where)
    assert last.returncode == 0, last.stdout + last.stderr
    assert "3 of 3 runs done" in last.stdout
