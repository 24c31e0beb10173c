"""Ranks as real processes that start at once: forked from a server that has imported the trainer."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from trainers.distributed import LISTENER
from trainers.farewell import leave

DEADLINE_S = 60
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "hypothesis", "torch._dynamo", "trainers.train"])


def start(world_size: int, target: Callable[..., None], *arguments: Any, log: Path) -> list[BaseProcess]:
    """`target(*arguments)` in one process per rank, with the environment that torchrun sets.

    The processes write what they print to `log`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        processes = [
            _context.Process(
                target=_enter,
                args=(rank, world_size, port, None if rank else listener, log, target, arguments),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
    return processes


def _enter(
    rank: int,
    world_size: int,
    port: int,
    listener: socket.socket | None,
    log: Path,
    target: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    faulthandler.dump_traceback_later(DEADLINE_S - 5)  # where it hangs, if it does
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LISTENER: str(listener.detach()) if listener else "",
    }
    target(*arguments)
    leave(0)


def finish(processes: list[BaseProcess], log: Path) -> None:
    """Wait for ranks that are to end well; one that fails ends the others."""
    deadline = time.monotonic() + DEADLINE_S
    try:
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            assert time.monotonic() < deadline, f"the ranks wait for one another\n{log.read_text()}"
            wait([p.sentinel for p in processes if p.is_alive()], 1)
        assert [p.exitcode for p in processes] == [0] * len(processes), log.read_text()
    finally:
        kill(processes)


def kill(processes: list[BaseProcess]) -> None:
    """What the agent does when one rank has died."""
    for process in processes:
        process.kill()  # nothing where it has ended
        process.join()
