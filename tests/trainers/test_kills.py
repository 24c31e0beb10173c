"""SIGKILL at any moment, also inside a save: a run that goes on ends with the bits of one that never stopped.

Three ways to die: a rank kills itself when it has done a given number of steps; rank 0 kills itself at
a given file operation of a save; a rank is killed from outside while rank 0's disk does not answer.
The ranks that are left are killed too, as the agent does.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks

from trainers import corpus, records
from trainers.batches import Batches
from trainers.config import RunConfig
from trainers.manifest import verify
from trainers.shards import write_shard
from trainers.train import train

STEPS, EVERY = 14, 3  # saves after 3, 6, 9, 12 and 14 steps
WALL_CLOCK = {"attempt", "time", "tokens_per_s", "flop_utilisation", "peak_memory"}
"""Fields that tell of the machine, besides all that end in `_ms`."""


# --- how a run dies --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """A moment in the life of a run."""

    workers: int
    way: str
    """`step`: `rank` dies after `count` steps. `save`: rank 0 dies at file operation `count` of its saves.
    `stall`: it hangs there, and `rank` is killed."""
    rank: int
    count: int

    def __str__(self) -> str:
        return f"{self.workers}-{self.way}-{self.rank}-{self.count}"


OPERATIONS = 70
"""File operations that the five saves of a run have at least: what Python opens, renames and deletes in
`.saving-*`, 14 a save and more where an older checkpoint goes."""


def moments() -> list[Kill]:
    """20: for each number of workers two between steps, two in saves, one of a disk that hangs."""
    draw = random.Random(20_260)
    chosen = []
    for workers in (1, 2, 3, 4):
        for way in ("step", "step", "save", "save", "stall"):
            # A disk that hangs in the last save would let the other ranks end well.
            last = {"step": STEPS, "save": OPERATIONS, "stall": OPERATIONS * 3 // 4}[way]
            rank = 0 if way == "save" else draw.randrange(workers)
            chosen.append(Kill(workers, way, rank, draw.randrange(1, last)))
    return chosen


def run_rank(run: RunConfig, run_dir: Path, kill: Kill | None = None) -> None:
    """What one process does."""
    rank, asked = int(os.environ["RANK"]), 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        if kill and kill.way == "step" and rank == kill.rank and asked > kill.count:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    if kill and kill.way != "step" and rank == 0:
        _meet(kill, run_dir)
    train(run, run_dir, should_stop=should_stop)


def _meet(kill: Kill, run_dir: Path) -> None:
    """Die, or hang for good, at a file operation in a folder that is being saved."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and any(
            ".saving-" in str(argument) for argument in arguments[:2]
        ):
            seen += 1
            if seen == kill.count and kill.way == "save":
                os.kill(os.getpid(), signal.SIGKILL)
            if seen >= kill.count and kill.way == "stall":
                (run_dir / "hung").touch()
                threading.Event().wait()

    sys.addaudithook(hook)


def killed(run: RunConfig, run_dir: Path, kill: Kill) -> None:
    """A first attempt that ends at that moment; its parts are closed, as the agent does."""
    processes = ranks.start(kill.workers, run_rank, run, run_dir, kill, log=run_dir / "log-1")
    if kill.way == "stall":
        deadline = time.monotonic() + ranks.DEADLINE_S
        while not (run_dir / "hung").exists():
            assert time.monotonic() < deadline, (run_dir / "log-1").read_text()
            time.sleep(0.01)
        time.sleep(kill.count / 1000)  # the others train on
        processes[kill.rank].kill()
    victim = processes[kill.rank]
    victim.join(ranks.DEADLINE_S)
    ranks.kill(processes)
    assert victim.exitcode == -signal.SIGKILL, (run_dir / "log-1").read_text()
    assert not (run_dir / records.SUMMARY).exists()
    records.close_parts(run_dir, 1)


# --- what is compared ------------------------------------------------------------------------------


def rows(run_dir: Path) -> tuple[list[records.Record], list[tuple[records.Record, records.Record]]]:
    parts = sorted(run_dir.glob("attempt-*/*.jsonl"))
    return records.latest(row for part in parts for row in records.read_part(part))


def _of_the_machine(field: str) -> bool:
    return field in WALL_CLOCK or field.endswith("_ms")


def outcome(run_dir: Path) -> dict[str, Any]:
    """Everything a run leaves but its wall-clock times: tensor files as bytes, progress, all rows."""
    newest = max((run_dir / "checkpoints").glob("[0-9]*"))
    verify(newest)
    progress = json.loads((newest / "state.json").read_text())["progress"]
    del progress["train_seconds"]
    kept, conflicts = rows(run_dir)
    assert conflicts == []
    facts = [{"kind": row.kind, **asdict(row)} for row in kept]
    summary = json.loads((run_dir / records.SUMMARY).read_text())
    return {
        "model": (newest / "model.safetensors").read_bytes(),
        "optimizer": (newest / "optimizer.safetensors").read_bytes(),
        "progress": progress,
        "rows": [records.dumps({k: v for k, v in row.items() if not _of_the_machine(k)}) for row in facts],
        "verdict": summary["verdict"],
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("shards")
    walk = np.cumsum(np.random.default_rng(0).integers(-2, 3, 30_000)) % 64
    write_shard(folder / "train.bin", walk[:25_000].astype(np.uint16))
    write_shard(folder / "val.bin", walk[25_000:].astype(np.uint16))
    config = RunConfig.model_validate(
        {
            "arm": "hetero",
            "model": {"n_layer": 1, "n_head": 2, "d_model": 16, "context": 16, "vocab_size": 256},
            "data": {"source": "bin", "path": str(folder)},
            "optimizer": {"muon": {"lr": 0.1, "solver": "projected"}},
            "assignment": {"attn": "stiefel", "mlp": "dgram"},
            "schedule": {"steps": STEPS, "warmup_steps": 2, "batch_size": 12},
            "evaluation": {"every": 4, "batches": 2},
            "runtime": {"checkpoint_every": EVERY, "device": "cpu"},
        }
    )
    digest = corpus.identify(config.data)
    return config.model_copy(update={"data": config.data.model_copy(update={"digest": digest})})


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """Folder of the uninterrupted run of a number of workers; made once."""
    done: dict[int, Path] = {}

    def folder(workers: int) -> Path:
        if workers not in done:
            done[workers] = tmp_path_factory.mktemp(f"whole-{workers}")
            log = done[workers] / "log"
            ranks.finish(ranks.start(workers, run_rank, run, done[workers], log=log), log)
        return done[workers]

    return folder


def go_on(run: RunConfig, run_dir: Path, workers: int) -> None:
    log = run_dir / "log-2"
    ranks.finish(ranks.start(workers, run_rank, run, run_dir, log=log), log)


# --- tests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill", moments(), ids=str)
def test_a_run_killed_at_any_moment_ends_with_the_bits_of_one_that_was_not(run, undisturbed, tmp_path, kill):
    killed(run, tmp_path, kill)
    saved = {int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")}
    for step in saved:
        verify(tmp_path / "checkpoints" / f"{step:08d}")  # whatever has its name is whole
    if kill.way == "step":  # this many saves had begun, and all but the last had to end
        assert max(saved, default=0) >= kill.count // EVERY * EVERY - EVERY
    go_on(run, tmp_path, kill.workers)
    got, expected = outcome(tmp_path), outcome(undisturbed(kill.workers))
    assert got["rows"] == expected["rows"]
    assert got == expected
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["00000012", "00000014"]  # two are kept, and no part of another


def test_the_moments_reach_into_saves(run, tmp_path):
    """The file operations that are counted are those of saves, and the runs above have as many."""
    kill = Kill(1, "save", 0, OPERATIONS)
    killed(run, tmp_path, kill)
    assert [path.name for path in (tmp_path / "checkpoints").glob(".saving-*")] == [".saving-00000014"]


def test_a_damaged_checkpoint_costs_steps_and_no_bits(run, undisturbed, tmp_path):
    killed(run, tmp_path, Kill(2, "step", 1, 11))
    newest = max((tmp_path / "checkpoints").glob("[0-9]*"))
    file = newest / "optimizer.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    file.write_bytes(damaged)
    go_on(run, tmp_path, 2)
    assert outcome(tmp_path) == outcome(undisturbed(2))
    said, step = (tmp_path / "log-2").read_text(), int(newest.name)
    assert f"checkpoint of step {step} refused: {file}: SHA-256 does not match" in said
    assert f"{EVERY} steps are lost; the run goes on from step {step - EVERY}" in said
    assert (newest.parent / f"bad-{newest.name}-1" / file.name).read_bytes() == damaged


def test_batches_go_on_when_four_workers_become_two(run, undisturbed, tmp_path):
    killed(run, tmp_path, Kill(4, "step", 2, 8))
    go_on(run, tmp_path, 2)
    steps, whole = (
        [row for row in rows(folder)[0] if row.kind == "steps"] for folder in (tmp_path, undisturbed(4))
    )
    assert [row.attempt for row in steps] == [1] * 6 + [2] * 8
    assert [row.tokens_seen for row in steps] == [row.tokens_seen for row in whole]
    losses = np.array([row.loss for row in steps])
    assert losses == pytest.approx([row.loss for row in whole], abs=2e-5)
    assert np.abs(np.diff(losses)).min() > 1e-4  # another batch would show
    assert "was written by 4 workers, now there are 2" in (tmp_path / "log-2").read_text()


@pytest.mark.parametrize(("before", "after"), [(8, 4), (4, 2), (2, 3), (1, 6)])
def test_all_ranks_together_read_the_same_windows_in_the_same_order(run, before, after):
    folder = Path(str(run.data.path))
    batches = Batches([folder / "train.bin"], run.model.context, run.model.vocab_size)

    def windows(step: int, workers: int) -> np.ndarray:
        shares = [batches.batch(run.seed, step, 24, rank, workers) for rank in range(workers)]
        return np.concatenate(shares)

    for step in range(20):
        assert np.array_equal(windows(step, before), windows(step, after))
    assert not np.array_equal(windows(0, after), windows(1, after))
