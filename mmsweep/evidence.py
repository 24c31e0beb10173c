"""What is left of workers that failed: their logs, and the stacks of those that do not move."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mmsweep.failures import Sight
from mmsweep.store import RunStore
from trainers import records

LOGS = "logs"
LOG_BYTES = 1 << 20
"""Of each rank's log, the last so many are read and kept in the store."""
ANSWER_S = 10.0
"""How long a worker may take to write its stacks."""
_DUMPED = "Current thread "
"""In what `faulthandler` writes."""


def log_path(run_dir: Path, rank: int) -> Path:
    return run_dir / LOGS / f"rank-{rank}.log"


def read_logs(run_dir: Path) -> dict[int, str]:
    """The end of every rank's log, by rank."""
    found = {}
    for path in (run_dir / LOGS).glob("rank-*.log"):
        with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            found[int(path.stem.removeprefix("rank-"))] = file.read().decode(errors="replace")
    return dict(sorted(found.items()))


def keep_logs(store: RunStore, run_id: str, attempt: int, logs: Mapping[int, str]) -> None:
    """Put the logs of an attempt into the store. Raises `StoreError`."""
    for rank, text in logs.items():
        key = f"runs/{run_id}/{records.attempt_dir(attempt)}/rank-{rank}.log"
        store.objects.put(key, text.encode())


def stacks(workers: Mapping[int, subprocess.Popen[bytes]], run_dir: Path) -> list[Sight]:
    """Ask workers for their stacks, which go to their logs, and look at them from outside.

    A worker that cannot answer, or does not in ANSWER_S seconds, gets a line about that in its log.
    To be asked of workers that will be killed: one that has not set itself up yet dies of the question.

    Args:
        workers: processes by rank.
    """
    begins, seen = {}, {}
    for rank, process in workers.items():
        if process.poll() is None:
            seen[rank] = _from_outside(rank, process.pid)
            begins[rank] = _size(log_path(run_dir, rank))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + ANSWER_S
    dumps: dict[int, str] = {}
    able = {rank for rank, sight in seen.items() if sight.state not in ("T", "t")}
    while (waited_for := able - dumps.keys()) and time.monotonic() < deadline:
        time.sleep(0.1)
        for rank in waited_for:
            size = _size(log_path(run_dir, rank))
            text = _read(log_path(run_dir, rank), begins[rank])
            time.sleep(0.05)
            if _DUMPED in text and size == _size(log_path(run_dir, rank)):  # it has written all
                dumps[rank] = text
    sights = []
    for rank, sight in sorted(seen.items()):
        if rank not in dumps and workers[rank].poll() is None:
            sight = _from_outside(rank, workers[rank].pid)  # it may have stopped only just then
        sights.append(replace(sight, dump=dumps.get(rank, "")))
    for sight in sights:
        if not sight.dump:
            with contextlib.suppress(OSError), log_path(run_dir, sight.rank).open("a") as log:
                log.write(f"\nrank {sight.rank} (pid {workers[sight.rank].pid}) is {sight}\n")
    return sights


def _from_outside(rank: int, pid: int) -> Sight:
    state = wchan = ""
    with contextlib.suppress(OSError, IndexError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    with contextlib.suppress(OSError):
        wchan = Path(f"/proc/{pid}/wchan").read_text().strip()
    return Sight(rank, state, wchan)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path, begin: int) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(begin)
        return file.read(LOG_BYTES).decode(errors="replace")
    return ""


def kernel_oom_kills() -> int:
    """Processes of this machine that the kernel has killed for their memory since it booted."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def corpus_grows(seconds: float) -> bool:
    """Whether some process has added to a corpus of this machine in the last `seconds`.

    A worker that makes the tokens of its run, or waits for one that does, writes no record.
    """
    from trainers.corpus import PROGRESS, cache_root  # takes a while, and is seldom needed

    for path in (cache_root() / "corpora").glob(f"*/{PROGRESS}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < seconds:
                return True
    return False
