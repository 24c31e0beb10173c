"""The processes that train one run, and what their end means."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trainers import records

STOP_GRACE_S = 60.0
"""How long workers may take to save when they are asked to stop."""
LOG_TAIL_LINES = 12
EXIT_STOPPED = 75  # trainers.train.EXIT_STOPPED; importing it would load torch
EXIT_BAD_INPUT = 2
OUT_OF_MEMORY = (
    "out of memory",
    "outofmemoryerror",
    "can't allocate memory",
    "memoryerror",
    "not enough memory",
)


class Workers:
    """The processes of one run, one per rank, as torchrun would start them."""

    def __init__(self, run: dict[str, Any], run_dir: Path, attempt: int, world_size: int) -> None:
        self.run_dir = run_dir
        config = run_dir / "run.yaml"
        config.write_text(json.dumps(run))  # JSON is YAML
        self.command = [
            *(sys.executable, "-m", "trainers.train", str(config)),
            *("--run-dir", str(run_dir), "--attempt", str(attempt), "--lifeline", "--quiet"),
        ]
        self.world_size = world_size
        self.threads = run["runtime"]["threads"]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.overdue = False
        """Whether `stop` had to kill some."""

    def __enter__(self) -> Workers:
        logs = self.run_dir / "logs"
        logs.mkdir()
        port = _free_port()
        for rank in range(self.world_size):
            with (logs / f"rank-{rank}.log").open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        self.command,
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=self._environment(rank, port),
                    )
                )
        return self

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        return os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(self.threads),
        }

    def poll(self) -> int | None:
        """None while all is well, 0 when all have ended well, else the first bad exit code."""
        codes = [process.poll() for process in self.processes]
        bad = [code for code in codes if code]
        if bad:
            return bad[0]
        return None if None in codes else 0

    def stop(self) -> int:
        """Ask all to save and end; returns the first bad exit code, that of SIGKILL if some did not end."""
        for process in self.processes:
            process.terminate()
        deadline = time.monotonic() + STOP_GRACE_S
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.overdue = True
        if self.overdue:
            return -signal.SIGKILL  # which `__exit__` sends
        return next((process.returncode for process in self.processes if process.returncode), 0)

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin:
                process.stdin.close()


def explain(code: int, run_dir: Path, *, overdue: bool) -> dict[str, Any]:
    """Status and reason of workers that failed, from their exit code and last words."""
    if overdue:
        reason = f"asked to stop, a worker had not ended after {STOP_GRACE_S:.0f} s and was killed"
        return {"status": records.FAILED, "reason": reason}
    tail = log_tail(run_dir)
    last = tail[-1] if tail else "no output"
    if code == EXIT_BAD_INPUT:
        return {"status": records.FAILED, "reason": last}
    out_of_memory = any(words in line.lower() for line in tail for words in OUT_OF_MEMORY)
    if out_of_memory or code == -signal.SIGKILL:
        last = last if out_of_memory else "worker killed (SIGKILL): out of host memory, or by hand"
        return {"status": records.OOM if out_of_memory else records.FAILED, "reason": last}
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return {"status": records.FAILED, "reason": f"worker died of {name}: {last}"}
    return {"status": records.FAILED, "reason": f"exit code {code}: {last}"}


def log_tail(run_dir: Path) -> list[str]:
    """Last lines of the log of the first rank that has an error in it, else of rank 0."""
    logs = sorted((run_dir / "logs").glob("rank-*.log")) if (run_dir / "logs").is_dir() else []
    texts = [path.read_text(errors="replace").splitlines() for path in logs]
    troubled = [text for text in texts if any("Error" in line for line in text)]
    chosen = (troubled or texts or [[]])[0]
    return [line for line in chosen if line.strip()][-LOG_TAIL_LINES:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
