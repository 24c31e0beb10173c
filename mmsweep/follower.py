"""A further machine of a run that spans several: starts its share of the workers when the agent says so.

The agent, on the machine of rank 0, has the lease, the store and the records; a follower has none of
them. It knows nothing of Ray. Its first line of standard input is an `Invitation`; it answers with
the port that it listens at. An agent that connects says the token, then what to start, then what to do:
one line of JSON each. The follower sends exit codes, logs of workers that failed, and stacks.

The end of standard input (whoever launched it is gone) and SIGTERM (this machine goes away) make it
ask its workers to stop: they vote with the others in the next step, so that the whole run saves its
state. When the agent is gone, so is the run: the workers are killed.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import queue
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mmsweep import evidence
from mmsweep.detached import Detached, answer
from mmsweep.scratch import scratch
from mmsweep.workers import (
    EXIT_BAD_INPUT,
    STOP_GRACE_S,
    Ranks,
    Share,
    command,
    notice_silence,
)

POLL_S = 0.1
HELLO_S = 10.0
"""How long one who connects may take to say the token and what to start."""
_LONGEST_LINE = 1 << 20

Said: TypeAlias = queue.Queue[dict[str, Any] | None]
"""What an agent has said; None: it says nothing more."""


@dataclass(frozen=True, slots=True)
class Invitation:
    host: str
    """The address of this machine to listen at."""
    token: str
    """What an agent has to say first."""


class Follower:
    """Serves one agent after another until `launcher_gone` or `machine_goes` is set."""

    def __init__(
        self, invitation: Invitation, launcher_gone: threading.Event, machine_goes: threading.Event
    ) -> None:
        family = socket.AF_INET6 if ":" in invitation.host else socket.AF_INET
        self.invitation = invitation
        self.launcher_gone = launcher_gone
        self.machine_goes = machine_goes
        self.listener = socket.create_server((invitation.host, 0), family=family)
        self.port: int = self.listener.getsockname()[1]

    def serve(self) -> None:
        self.listener.settimeout(POLL_S)
        with self.listener:
            while not self._told_to_end():
                with contextlib.suppress(TimeoutError):
                    connection, _ = self.listener.accept()
                    with connection, contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                        self._meet(connection)

    def _told_to_end(self) -> bool:
        return self.launcher_gone.is_set() or self.machine_goes.is_set()

    def _meet(self, connection: socket.socket) -> None:
        notice_silence(connection)
        said: Said = queue.Queue()
        threading.Thread(target=_listen, args=(connection, said), daemon=True).start()
        try:
            order = self._greeting(said)
            if order is not None:
                self._work(order, connection, said)
        finally:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # the thread that listens ends

    def _greeting(self, said: Said) -> dict[str, Any] | None:
        """What to start; None without the token, when HELLO_S are over, or when all is to end."""
        deadline = time.monotonic() + HELLO_S
        token = None
        while not self._told_to_end() and time.monotonic() < deadline:
            try:
                message = said.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if message is None or token is not None:
                return message
            token = str(message["token"])
            if not hmac.compare_digest(token.encode(), self.invitation.token.encode()):
                return None
        return None

    def _work(self, order: dict[str, Any], connection: socket.socket, said: Said) -> None:
        share = Share(**order["share"])
        with scratch("follower") as run_dir:
            run = order["run"]
            words = command(run, run_dir, int(order["attempt"]))
            ranks = Ranks(words, run_dir, share, self.invitation.host, run["runtime"]["threads"])
            try:
                self._follow(ranks, run_dir, connection, said)
            finally:
                ranks.kill()
                with contextlib.suppress(OSError):
                    _send(connection, codes=ranks.codes())

    def _follow(self, ranks: Ranks, run_dir: Path, connection: socket.socket, said: Said) -> None:
        """Do as the agent says until it has all workers killed, or is gone."""
        told: dict[int, int | None] = {}
        deadline: float | None = None
        while deadline is None or time.monotonic() < deadline:
            if (codes := ranks.codes()) != told:
                failed = any(code for code in codes.values())
                _send(connection, codes=codes, **({"logs": evidence.read_logs(run_dir)} if failed else {}))
                told = codes
            if self._told_to_end() and deadline is None:
                ranks.send(signal.SIGTERM)
                ranks.send(signal.SIGCONT)  # they may be paused
                deadline = time.monotonic() + STOP_GRACE_S
            if self._told_to_end() and None not in codes.values():
                return
            try:
                message = said.get(timeout=POLL_S)
            except queue.Empty:
                continue
            order = None if message is None else message["do"]
            if order in (None, "kill"):
                return
            if order == "stop":
                ranks.send(signal.SIGTERM)
            elif order == "pause":
                ranks.send(signal.SIGSTOP)
            elif order == "resume":
                ranks.send(signal.SIGCONT)
            elif order == "stacks":
                sights = evidence.stacks(ranks.by_rank(), run_dir)
                _send(
                    connection, sights=[asdict(sight) for sight in sights], logs=evidence.read_logs(run_dir)
                )


def _send(connection: socket.socket, **message: Any) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _listen(connection: socket.socket, said: Said) -> None:
    with contextlib.suppress(OSError, ValueError, RecursionError), connection.makefile("rb") as lines:
        while line := lines.readline(_LONGEST_LINE):
            said.put(json.loads(line))
    said.put(None)


# --- the process, and its launcher's side ---------------------------------------------------------


class FollowerProcess:
    """A follower in a process of its own, as its launcher sees it."""

    def __init__(self, invitation: Invitation) -> None:
        self._process = Detached("mmsweep.follower", json.dumps(asdict(invitation)))
        self.port = int(self._process.output.readline())

    def close(self) -> None:
        """Tell the follower that nobody needs it any more."""
        self._process.close()


def main(argv: list[str] | None = None) -> int:
    """`python -m mmsweep.follower`: an Invitation on the first line of standard input."""
    call = answer("mmsweep.follower", argv)
    if call is None:
        return EXIT_BAD_INPUT
    follower = Follower(Invitation(**json.loads(call.line)), call.launcher_gone, call.machine_goes)
    print(follower.port, flush=True)
    follower.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
