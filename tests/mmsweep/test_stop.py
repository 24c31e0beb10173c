"""`mmsweep stop`: real launches that are asked, and what is said to those who ask for nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmsweep import stop
from mmsweep.__main__ import main as mmsweep
from mmsweep.grid import load_grid
from mmsweep.store import RunStore, open_store
from trainers import records
from trainers.corpus import identify

GRID = """
name: tiny
seeds: [1]
arms:
  hetero: {attn: stiefel, mlp: dgram}
  plain: {attn: none, mlp: none}
base:
  data: {source: text, path: TEXTS}
  model: {n_layer: 1, n_head: 2, d_model: 16, context: 16, vocab_size: 256}
  optimizer: {muon: {lr: 0.1, solver: projected}}
  schedule: {steps: 1000000, warmup_steps: 2, batch_size: 8}
  evaluation: {every: 1000000, batches: 1}
  runtime: {checkpoint_every: 1000000, threads: 1}
resources: {cpus_per_worker: 0.5}
"""
RUN, OTHER = "hetero-s1-0123abcd", "plain-s1-0123abcd"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = mmsweep(["stop", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def store(tmp_path) -> RunStore:
    """A grid of two runs that nobody launches."""
    store = open_store(str(tmp_path / "store"))
    cells = [{"run_id": run_id, "arm": "a", "seed": 1, "axes": {}} for run_id in (RUN, OTHER)]
    store.put_grid("tiny", "name: tiny\n", {"name": "tiny", "cells": cells})
    return store


@pytest.fixture
def grid(tmp_path, texts) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(GRID.replace("TEXTS", texts))
    return path


def wait_until(condition: object, what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)


def test_a_run_and_then_the_grid_save_and_end(grid, tmp_path):
    where = tmp_path / "store"
    store = open_store(str(where))
    hetero, plain = load_grid(grid, identify=identify).runs
    for run_id in (hetero, plain):  # left over from another day: the launch forgets them
        store.request_stop(run_id=run_id)
    store.request_stop(grid="tiny")
    launch = subprocess.Popen(
        [sys.executable, "-m", "mmsweep.launch", str(grid), "--store", str(where)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def training(run_id: str) -> bool:
        assert launch.poll() is None, launch.communicate()
        return (store.status(run_id) or {}).get("step", 0) > 0

    def ask(*names: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "mmsweep.stop", str(where), *names],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    wait_until(lambda: training(hetero) and training(plain), "both runs to train")
    asked, outcome = ask(hetero)
    assert asked.startswith(f"{hetero}: asked pid ")
    step = store.saved_step(hetero)
    assert step > 0
    assert outcome == f"{hetero}: pending, saved at step {step} of 1000000"
    assert store.status(hetero)["step"] == step
    assert store.status(plain)["status"] == records.RUNNING
    assert launch.poll() is None

    asked, outcome = ask("tiny")
    assert asked == f"tiny: asked pid {launch.pid} " + asked.split(" ", 4)[4]
    assert outcome == f"{plain}: pending, saved at step {store.saved_step(plain)} of 1000000"
    printed, _ = launch.communicate(timeout=60)
    assert launch.returncode == 1
    assert "tiny: stopped by request\n" in printed
    assert "0 of 2 runs done" in printed
    assert "SIG" not in printed
    assert store.launches("tiny") == []


def test_an_unknown_name_gets_the_nearest(store, capsys):
    code, out, err = call(capsys, store.url, "tinny")
    assert (code, out, err) == (2, "", f'{store.url} has no grid and no run "tinny" (did you mean "tiny"?)\n')
    code, out, err = call(capsys, store.url, "tiny", RUN.replace("abcd", "abce"))
    assert (code, out) == (2, "")
    assert f'(did you mean "{RUN}"?)' in err


def test_nothing_runs(store, capsys):
    code, out, _ = call(capsys, store.url, "tiny", RUN)
    assert (code, out) == (0, f"nothing of tiny is running\nnothing of {RUN} is running\n")
    assert not store.stop_requested(grid="tiny")
    assert not store.stop_requested(run_id=RUN)


def test_a_run_that_has_not_begun_will_not(store, capsys):
    with store.grid_lease("tiny", "tiny-1") as lease:
        assert lease.acquire() is None
        code, out, _ = call(capsys, store.url, RUN)
    assert (code, out) == (0, f"{RUN} is not running; the launch of tiny will not begin it\n")
    assert store.stop_requested(run_id=RUN)
    assert not store.stop_requested(run_id=OTHER)


def test_a_request_that_a_new_launch_withdrew_is_made_again_and_another_launch_s_run_is_not_waited_for(
    store, capsys
):
    """A launch that took the lease just now forgets old requests; the one it overlooked comes again."""
    with store.run_lease(OTHER, "another grid's launch") as elsewhere:
        wait_until(elsewhere.advance, "a lease")
        with store.grid_lease("tiny", "tiny-1") as lease:
            assert lease.acquire() is None
            answers: list[tuple[int, str, str]] = []
            thread = threading.Thread(target=lambda: answers.append(call(capsys, store.url, "tiny")))
            thread.start()
            for _ in range(2):
                wait_until(lambda: store.stop_requested(grid="tiny"), "a request")
                store.withdraw_stop(grid="tiny")
            assert thread.is_alive()
        thread.join(60)
    assert not thread.is_alive()
    assert answers[0][0] == 0
    assert answers[0][1].startswith(f"tiny: asked pid {os.getpid()} on ")
    assert len(answers[0][1].splitlines()) == 1


def test_no_wait_leaves_the_request(store, capsys):
    with store.grid_lease("tiny", "tiny-1") as lease:
        assert lease.acquire() is None
        code, _, _ = call(capsys, store.url, "tiny", "--no-wait")
        assert code == 0
        assert store.stop_requested(grid="tiny")
        assert store.launches("tiny") != []


def test_a_launch_that_is_silent_is_not_waited_for(store, capsys, monkeypatch):
    """Its machine is another one, and gone: nothing but its claim is left."""
    with store.grid_lease("tiny", "tiny-1") as lease:
        assert lease.acquire() is None
        (claim,) = store.launches("tiny")
    elsewhere = claim.model_copy(update={"machine": "elsewhere", "ttl": 0.2, "host": "n\x1b[2J"})
    store.objects.put(f"grids/tiny.lease/{claim.nonce}.json", elsewhere.model_dump_json().encode())
    monkeypatch.setattr(stop, "POLL_S", 0.05)
    code, out, _ = call(capsys, store.url, "tiny")
    assert code == 0
    assert out.startswith(f"tiny: asked pid {os.getpid()} on n\\x1b[2J (launch tiny-1), since ")
