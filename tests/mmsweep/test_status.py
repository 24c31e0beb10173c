"""`mmsweep status`: what it says of runs in every state, how little it reads, and how it watches."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from mmsweep.__main__ import main as mmsweep
from mmsweep.lease import Claim
from mmsweep.objects import DirectoryStore, Keys
from mmsweep.status import LOST, Survey, standing
from mmsweep.store import RunStore, open_store
from trainers import records

HOLDER = """
import sys
from mmsweep.store import open_store
lease = open_store(sys.argv[1]).run_lease(sys.argv[2], "test")
while not lease.advance():
    pass
print("held", flush=True)
sys.stdin.readline()
lease.release()
"""


def name(arm: str, seed: int = 1) -> str:
    return f"{arm}-s{seed}-0123abcd"


def put_grid(store: RunStore, run_ids: list[str], grid: str = "tiny", **more: object) -> None:
    cells = [{"run_id": run_id, "arm": "a", "seed": 1, "axes": {}} for run_id in run_ids]
    store.put_grid(grid, f"name: {grid}\n", {"name": grid, "cells": cells, **more})


def summary(loss: float = 2.0, **more: object) -> dict[str, object]:
    return {"status": "completed", "steps": 9, "horizon": 9, "final_val_loss": loss, "attempts": 2, **more}


def running(**more: object) -> dict[str, object]:
    now = time.time()
    return {
        "status": "running",
        "step": 3,
        "steps": 9,
        "attempt": 1,
        "updated": now,
        "progressed": now,
        **more,
    }


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = mmsweep(["status", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def row_of(out: str, run_id: str) -> str:
    (line,) = (line for line in out.splitlines() if line.startswith(run_id))
    return line


class Counting(DirectoryStore):
    """Counts what is asked of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: Counter[str] = Counter()

    def get(self, key: str) -> bytes:
        self.asked[f"get {key.rsplit('/', 1)[1]}"] += 1
        return super().get(key)

    def list(self, prefix: str) -> Keys:
        self.asked["list"] += 1
        return super().list(prefix)

    def exists(self, key: str) -> bool:
        self.asked["exists"] += 1
        return super().exists(key)


def test_a_finished_run_is_read_once_and_one_that_waits_never(tmp_path):
    objects = Counting(tmp_path)
    store = RunStore(objects)
    ids = [name("a", seed) for seed in range(40)]
    put_grid(store, ids)
    for number, run_id in enumerate(ids[:30]):
        store.put_status(run_id, {"status": "pending", "step": 3, "steps": 9})
        if number < 20:
            store.put_summary(run_id, summary())
    survey = Survey(store, "tiny")
    objects.asked.clear()
    first = survey.look()
    assert objects.asked == {"get summary.json": 30, "get status.json": 10, "get tiny.json": 1}
    assert first.counts() == "20 pending, 20 completed"
    store.put_summary(ids[25], summary())
    objects.asked.clear()
    assert survey.look().counts() == "19 pending, 21 completed"
    assert objects.asked == {"get summary.json": 10, "get status.json": 9, "get tiny.json": 1}


def test_a_finished_run_is_told_by_its_summary(store_url):
    store = open_store(store_url)
    store.put_status(name("a"), running(val_loss=9.0))
    store.put_summary(name("a"), summary(1.5, finished=1_700_000_000.0, device_seconds=7.0))
    (row,) = standing(store)
    assert {k: row[k] for k in ("status", "step", "steps", "attempt", "val_loss", "updated")} == {
        "status": "completed",
        "step": 9,
        "steps": 9,
        "attempt": 2,
        "val_loss": 1.5,
        "updated": 1_700_000_000.0,
    }
    assert row["device_seconds"] == 7.0


def test_a_run_whose_owner_is_gone_is_lost_and_one_that_is_held_is_not(tmp_path, capsys):
    store = open_store(str(tmp_path))
    for arm in ("held", "killed", "gone"):
        store.put_status(name(arm), running())
    holders = {}
    for arm in ("held", "killed"):
        command = [sys.executable, "-c", HOLDER, str(tmp_path), name(arm)]
        holders[arm] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holders[arm].stdout.readline() == "held\n"
    holders["killed"].kill()
    holders["killed"].wait()
    code, out, _ = shown(capsys, tmp_path)
    holders["held"].communicate("\n")
    assert code == 1
    assert row_of(out, name("held")).split()[1] == records.RUNNING
    for arm in ("killed", "gone"):
        assert row_of(out, name(arm)).split()[1] == LOST
        assert "the process that worked on it is gone" in row_of(out, name(arm))
    assert "1 running, 2 lost" in out


def test_failures_are_shown_with_every_try_and_the_log(tmp_path, capsys):
    store = open_store(str(tmp_path))
    failures = [
        {
            "attempt": 1,
            "kind": "crash",
            "reason": "boom\x1b[2J",
            "step": 4,
            "launch": "l",
            "host": "n3",
            "at": 1.0,
        },
        {"attempt": 2, "kind": "oom", "reason": "too big", "step": 6},
    ]
    store.put_status(
        name("a"),
        {"status": "quarantined", "step": 6, "steps": 9, "reason": "twice the same error: boom",
         "attempt": 2, "failures": failures, "log_tail": ["Traceback", "boom"]},
    )  # fmt: skip
    store.put_status(name("b"), {"status": "oom", "step": 1, "steps": 9, "reason": "CUDA out of memory"})
    store.put_status(name("c"), {**running(), "status": "pending", "failures": failures})
    code, out, _ = shown(capsys, tmp_path)
    assert code == 1
    assert "1 pending, 1 oom, 1 quarantined" in out
    assert row_of(out, name("a")).rstrip().endswith("twice the same error: boom")
    assert [line for line in out.splitlines() if line.startswith("  ")] == [
        f"  {name('a')} | try 1: crash at step 4 on n3: boom\\x1b[2J",
        f"  {name('a')} | try 2: oom at step 6: too big",
        f"  {name('a')} | Traceback",
        f"  {name('a')} | boom",
    ]


def test_why_a_run_waits(tmp_path, capsys):
    store = open_store(str(tmp_path))
    put_grid(store, [name("a"), name("b")])
    store.put_status(
        name("b"), {"status": "pending", "step": 0, "steps": 9, "reason": "budget spent: 2 of 1 h"}
    )
    assert "waits" not in shown(capsys, tmp_path)[1]
    with store.grid_lease("tiny", "tiny-1") as lease:
        assert lease.acquire() is None
        store.put_launch_log("tiny", "tiny-1", "12:00 begun\n12:01 2 runs wait: each needs 2 GPUs\n")
        code, out, _ = shown(capsys, tmp_path)
    assert code == 0
    assert row_of(out, name("a")).rstrip().endswith("waits for its turn")
    assert row_of(out, name("b")).rstrip().endswith("budget spent: 2 of 1 h")
    assert "tiny: launched by pid " in out
    assert "tiny: 12:01 2 runs wait: each needs 2 GPUs\n" in out


def left_behind(store: RunStore, **changes: object) -> Claim:
    """The claim of a launch that is gone."""
    with store.grid_lease("tiny", "tiny-1") as lease:
        assert lease.acquire() is None
        (claim,) = store.launches("tiny")
    claim = claim.model_copy(update=changes)
    store.objects.put(f"grids/tiny.lease/{claim.nonce}.json", claim.model_dump_json().encode())
    return claim


@pytest.mark.parametrize(
    ("gone", "why"),
    [
        ({"machine": "elsewhere", "heartbeat": 1_700_000_000.0}, "silent since 2023-11-14 22:13:20 UTC"),
        ({"process_start": 1}, "its process is gone"),
    ],
)
def test_a_dead_launch_is_named_with_the_way_out_and_nobody_waits_for_it(tmp_path, capsys, gone, why):
    store = open_store(str(tmp_path))
    put_grid(store, [name("a")])
    claim = left_behind(store, **gone)
    code, out, _ = shown(capsys, tmp_path, "--watch", "0.1")
    assert code == 0
    assert out.splitlines() == [
        f"{name('a')}  pending  –",
        "1 pending",
        f"tiny: launched by {claim.who()}, {why}: to go on, launch the same command again",
        "nothing runs and nobody launches: not watching any more",
    ]


def test_what_a_store_holds_does_not_steer_the_terminal(tmp_path, capsys):
    store = open_store(str(tmp_path))
    escape = "\x1b]0;owned\x07\x1b[2J"
    put_grid(store, [name("a"), name("b"), name("c")],
             budget={"hours": 4.0, "unit": escape, "devices": 1.0})  # fmt: skip
    left_behind(store, machine="elsewhere", heartbeat=0.0, launch=f"L{escape}", host=f"h{escape}")
    store.put_launch_log("tiny", f"L{escape}", f"12:00 {escape}\n")
    store.put_status(name("a"), {"status": f"failed{escape}", "reason": escape})
    failure = {"attempt": escape, "kind": escape, "step": escape, "host": escape, "reason": escape}
    ended = {"status": "failed", "reason": escape, "failures": [failure], "log_tail": [escape]}
    store.put_status(name("b"), ended)
    store.objects.put(f"runs/{name('c')}/status.json", b"{")
    for options in ((), ("--watch", "0.1")):
        _, out, err = shown(capsys, tmp_path, *options)
        assert out.count("\\x1b[2J") > 10
        assert all(c.isprintable() for c in (out + err).replace("\n", ""))


def test_what_is_left_of_a_budget(tmp_path, capsys):
    store = open_store(str(tmp_path))
    put_grid(store, [name("a"), name("b")], budget={"hours": 4.0, "unit": "GPU-hours", "devices": 2.0})
    store.put_summary(name("a"), summary(device_seconds=5400.0))
    store.put_status(name("b"), {**running(), "status": "pending", "started": 1000.0, "updated": 1900.0})
    _, out, _ = shown(capsys, tmp_path, "--grid", "tiny")
    assert "tiny: 2 of 4 GPU-hours spent, 2 left\n" in out  # 1.5 hours, and 900 s on two devices


def test_an_unknown_grid_and_an_empty_store_are_one_line(tmp_path, capsys):
    store = open_store(str(tmp_path))
    assert (
        shown(capsys, tmp_path)[2] == f"{tmp_path} holds no grid and no run; is this the store of a launch?\n"
    )
    put_grid(store, [name("a")])
    code, _, err = shown(capsys, tmp_path, "--grid", "tinny")
    assert (code, err) == (2, f'{tmp_path} has no grid "tinny" (did you mean "tiny"?)\n')
    code, _, err = shown(capsys, tmp_path, "--watch", "0")
    assert (code, err) == (2, "--watch 0: give seconds from 0.1 to 86400\n")


def test_a_damaged_object_is_that_run_s_alone(tmp_path, capsys):
    store = open_store(str(tmp_path))
    store.objects.put(f"runs/{name('a')}/summary.json", b"{")
    store.put_summary(name("b"), summary())
    code, out, _ = shown(capsys, tmp_path)
    assert code == 1
    assert "1 completed, 1 unreadable" in out


# --- watching ------------------------------------------------------------------------------------


def watch(store: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mmsweep.status", str(store), "--watch", "0.1", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_watching_says_what_changes_and_ends_with_the_last_run(tmp_path):
    store = open_store(str(tmp_path))
    put_grid(store, [name("a"), name("b")])
    store.put_summary(name("b"), summary(3.0))
    with store.run_lease(name("a"), "tiny-1") as lease:
        assert lease.acquire() is None
        with store.grid_lease("tiny", "tiny-1") as launch:
            assert launch.acquire() is None
            watcher = watch(tmp_path)
            said = [watcher.stdout.readline(), watcher.stdout.readline()]
            assert said == [f"{name('a')}  pending  –\n", f"{name('b')}  completed  9/9  val 3.0000\n"]
            store.put_status(name("a"), running())
            assert watcher.stdout.readline() == f"{name('a')}  running  3/9\n"
        # The launch is gone, and what it began goes on.
        for number in range(3):
            store.put_status(name("a"), running(step=5))  # a step alone is no news
            store.put_status(name("a"), running(step=6, val_loss=float(number)))
            assert watcher.stdout.readline() == f"{name('a')}  running  6/9  val {number}.0000\n"
        end = {"status": "failed", "reason": "boom", "log_tail": ["x"]}
        store.put_status(name("a"), {**running(step=6), **end})
    rest, err = watcher.communicate(timeout=60)
    assert rest.splitlines() == [
        f"{name('a')}  failed  6/9  boom",
        "1 completed, 1 failed",
        f"  {name('a')} | x",
    ]
    assert (watcher.returncode, err) == (1, "")


def test_ctrl_c_ends_a_watch_in_peace(tmp_path):
    store = open_store(str(tmp_path))
    put_grid(store, [name("a")])
    with store.grid_lease("tiny", "tiny-1") as launch:
        assert launch.acquire() is None
        watcher = watch(tmp_path, "--grid", "tiny")
        assert watcher.stdout.readline().startswith(name("a"))
        watcher.send_signal(signal.SIGINT)
        out, err = watcher.communicate(timeout=60)
    assert (watcher.returncode, out, err) == (0, "", "")
