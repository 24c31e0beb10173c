"""Small texts and runs, and what to wait for while they are trained."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from mmsweep.agent import Job
from mmsweep.store import RunStore
from trainers.config import RunConfig, run_id
from trainers.corpus import identify


def write_texts(folder: Path) -> str:
    """Twenty files in a folder, and the pattern that finds them."""
    folder.mkdir(exist_ok=True)
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"line {number} of a small corpus\n" * 40)
    return f"{folder}/*.txt"


def tiny_run(texts: str, *, steps: int, every: int, evaluate: int | None = None, **runtime: Any) -> RunConfig:
    """A run that saves `every` so many steps."""
    run = RunConfig.model_validate({
        "arm": "plain",
        "seed": 1,
        "data": {"source": "text", "path": texts},
        "model": {"n_layer": 1, "n_head": 2, "d_model": 16, "context": 16, "vocab_size": 256},
        "schedule": {"steps": steps, "warmup_steps": 2, "batch_size": 4},
        "evaluation": {"every": evaluate or steps, "batches": 1},
        "runtime": {"checkpoint_every": every, **runtime},
    })  # fmt: skip
    return run.model_copy(update={"data": run.data.model_copy(update={"digest": identify(run.data)})})


def job_of(run: RunConfig, store: RunStore, launch: str = "test", **resources: Any) -> Job:
    return Job(run_id(run), run.model_dump(mode="json"), store.url, launch, resources)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def processes(*words: str) -> list[psutil.Process]:
    """Processes of this test (known by their cache) with all of `words` in the command line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get("MMSWEEP_CACHE") == os.environ["MMSWEEP_CACHE"]
            if ours and all(word in " ".join(process.cmdline()) for word in words):
                found.append(process)
    return found
