"""Processes that outlive whoever starts them: agents and followers.

Ray kills the direct children of a worker that ends, and these still have something to save then. The
end of their standard input tells them that their launcher is gone, SIGTERM that the machine goes away.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import IO


class Detached:
    """`python -m MODULE --detach`, as its launcher sees it. `close` (or the launcher's death) lets it go."""

    def __init__(self, module: str, line: str) -> None:
        """`line` is what it is to do, its first line of standard input."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--detach"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.output: IO[str] = self._process.stdout
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """Tell the process that nobody waits for it any more."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()  # the process that detached has long ended


@dataclass(frozen=True, slots=True)
class Call:
    """What such a process has been started for."""

    line: str
    launcher_gone: threading.Event
    machine_goes: threading.Event
    """The main thread must not wait for it: a signal handler sets it there."""


def answer(module: str, argv: list[str] | None) -> Call | None:
    """The process's own side: detach, mind the signals, read the first line. None: there was none."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--detach", action="store_true", help="go on in a process of its own")
    if parser.parse_args(argv).detach and os.fork():
        os._exit(0)
    launcher_gone, machine_goes = threading.Event(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: machine_goes.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the launcher, which then lets go
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # what follows is the watcher's
        line = stdin.readline()
    if not line.endswith(b"\n"):
        return None
    threading.Thread(target=_watch_stdin, args=(launcher_gone,), daemon=True).start()
    return Call(line.decode(), launcher_gone, machine_goes)


def _watch_stdin(launcher_gone: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    launcher_gone.set()
