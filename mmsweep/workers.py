"""The processes that train one run: on this machine, and through followers on others."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STOP_GRACE_S = 60.0
"""How long workers may take to save when they are asked to stop."""
CONNECT_S = 30.0
"""How long a follower may take to answer, and how long one may be silent before it counts as lost."""
END_S = 15.0
"""How long a follower may take to end its workers."""
EXIT_STOPPED = 75  # trainers.train.EXIT_STOPPED; importing it would load torch
EXIT_NO_DEVICE = 69  # likewise
EXIT_BAD_INPUT = 2
LOOPBACK = "127.0.0.1"
LISTENER = "MASTER_LISTEN_FD"  # read by trainers.distributed
_BACKLOG = 4096


@dataclass(frozen=True, slots=True)
class Span:
    """The machines of a run that has several. It is made for one trial and never stored."""

    host: str
    """Address of the machine that rank 0 is on."""
    followers: Sequence[tuple[str, int]]
    """Host and port of every other machine's `mmsweep.follower`, in the order of their ranks."""
    token: str
    """What followers want to hear before they obey."""


@dataclass(frozen=True, slots=True)
class Share:
    """The ranks that one machine has of a run, and where rank 0 waits for the others."""

    first: int
    count: int
    world: int
    host: str
    port: int


def command(run: dict[str, Any], run_dir: Path, attempt: int) -> list[str]:
    """Write the config of a run into its folder; what every rank then executes."""
    config = run_dir / "run.yaml"
    config.write_text(json.dumps(run))  # JSON is YAML
    return [
        *(sys.executable, "-m", "trainers.train", str(config)),
        *("--run-dir", str(run_dir), "--attempt", str(attempt), "--lifeline", "--quiet"),
    ]


class Ranks:
    """The workers of one run on one machine, one process per rank, as torchrun would start them.

    Args:
        command: what every rank executes.
        run_dir: logs go to `logs/rank-R.log` in it.
        share: which ranks these are.
        address: of this machine, as the others of the run see it.
        threads: `runtime.threads` of the run.
        meeting: the socket that listens at `share.host`, `share.port`, on the machine of rank 0.
    """

    def __init__(
        self,
        command: Sequence[str],
        run_dir: Path,
        share: Share,
        address: str,
        threads: int,
        meeting: socket.socket | None = None,
    ) -> None:
        self.share = share
        self.processes: list[subprocess.Popen[bytes]] = []
        logs = run_dir / "logs"
        logs.mkdir(exist_ok=True)
        shared = _environment(share, address, threads)
        try:
            for local in range(share.count):
                rank = share.first + local
                own = {"RANK": str(rank), "LOCAL_RANK": str(local), LISTENER: ""}
                passed = []
                if rank == 0 and meeting is not None:
                    own[LISTENER] = str(meeting.fileno())
                    passed = [meeting.fileno()]
                with (logs / f"rank-{rank}.log").open("wb") as log:
                    self.processes.append(
                        subprocess.Popen(
                            command,
                            stdin=subprocess.PIPE,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            env=shared | own,
                            pass_fds=passed,
                        )
                    )
        except BaseException:
            self.kill()
            raise

    def by_rank(self) -> dict[int, subprocess.Popen[bytes]]:
        return dict(enumerate(self.processes, start=self.share.first))

    def codes(self) -> dict[int, int | None]:
        """Exit codes by rank; None: it runs."""
        return {rank: process.poll() for rank, process in self.by_rank().items()}

    def send(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)  # nothing where it has ended

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait()
            if process.stdin:
                process.stdin.close()


def _environment(share: Share, address: str, threads: int) -> dict[str, str]:
    """What torchrun would set, but for RANK and LOCAL_RANK."""
    interface = _interface(address)  # gloo would take the one that the host's name happens to lead to
    return (
        ({"GLOO_SOCKET_IFNAME": interface} if interface else {})
        | os.environ
        | {
            "WORLD_SIZE": str(share.world),
            "LOCAL_WORLD_SIZE": str(share.count),
            "MASTER_ADDR": share.host,
            "MASTER_PORT": str(share.port),
            "OMP_NUM_THREADS": str(threads),
        }
    )


def _interface(address: str) -> str | None:
    """Name of the network interface with an IPv4 address; None where it is not found (or no Linux)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


class Workers:
    """The processes of one run, on all its machines.

    The port at which rank 0 meets the others is bound before any of them starts, and stays bound:
    of many runs that start at once on a machine no two get the same one.

    Leaving the `with` block kills what still runs, everywhere.
    """

    def __init__(
        self, run: dict[str, Any], run_dir: Path, attempt: int, world_size: int, span: Span | None = None
    ) -> None:
        """`world_size`: processes on all machines together."""
        self.run = run
        self.run_dir = run_dir
        self.attempt = attempt
        self.world_size = world_size
        self.span = span
        self.command = command(run, run_dir, attempt)
        self.ranks: Ranks
        self.far: list[_Follower] = []
        self.overdue = False
        """Whether `stop` had to kill some."""

    def __enter__(self) -> Workers:
        span = self.span or Span(LOOPBACK, (), "")
        count = self.world_size // (1 + len(span.followers))
        family = socket.AF_INET6 if ":" in span.host else socket.AF_INET
        with socket.create_server((span.host, 0), family=family, backlog=_BACKLOG) as meeting:
            port = meeting.getsockname()[1]
            shares = [
                Share(first, count, self.world_size, span.host, port)
                for first in range(0, self.world_size, count)
            ]
            for address, share in zip(span.followers, shares[1:], strict=True):
                order = {"run": self.run, "attempt": self.attempt, "share": asdict(share)}
                self.far.append(_Follower(address, span.token, order, self.run_dir))
            threads = self.run["runtime"]["threads"]
            try:
                self.ranks = Ranks(self.command, self.run_dir, shares[0], span.host, threads, meeting)
            except BaseException:
                for follower in self.far:
                    follower.close()
                raise
        return self

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """Those of this machine."""
        return self.ranks.processes

    @property
    def lost(self) -> str:
        """Which machine of the run has gone without a word of its workers; empty: none."""
        return next((follower.lost for follower in self.far if follower.lost), "")

    def codes(self) -> dict[int, int | None]:
        """Exit codes by rank, on all machines; None: it runs, or nobody knows."""
        codes = self.ranks.codes()
        for follower in self.far:
            codes |= follower.codes
        return codes

    def poll(self) -> int | None:
        """None while all is well, 0 when all have ended well, else the first bad exit code.

        A machine that is lost is no better than a killed worker.
        """
        codes = self.codes()
        bad = [code for code in codes.values() if code]
        if bad or self.lost:
            return bad[0] if bad else -signal.SIGKILL
        return None if None in codes.values() else 0

    def stop(self) -> int:
        """Ask all to save and end; returns the first bad exit code, that of SIGKILL if some did not end.

        Paused ones have to be resumed first.
        """
        self.ranks.send(signal.SIGTERM)
        self._tell("stop")
        deadline = time.monotonic() + STOP_GRACE_S
        while not (ended := None not in self.codes().values()) and not self.lost:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        self.overdue = not ended
        if self.overdue:
            return -signal.SIGKILL  # which `__exit__` sends
        return next((code for code in self.codes().values() if code), 0)

    def pause(self) -> None:
        """Have all stand still, as SIGSTOP does."""
        self.ranks.send(signal.SIGSTOP)
        self._tell("pause")

    def resume(self) -> None:
        self.ranks.send(signal.SIGCONT)
        self._tell("resume")

    def far_sights(self, timeout: float) -> list[dict[str, Any]]:
        """Fields of a `mmsweep.failures.Sight` for every worker on another machine that answers in time."""
        for follower in self.far:
            follower.forget_sights()
        self._tell("stacks")
        return [sight for follower in self.far for sight in follower.sights(timeout)]

    def _tell(self, what: str) -> None:
        for follower in self.far:
            follower.tell({"do": what})

    def __exit__(self, *_: object) -> None:
        self._tell("kill")
        self.ranks.kill()
        for follower in self.far:
            follower.close()


class _Follower:
    """The machine of some ranks, as the machine of rank 0 sees it."""

    def __init__(self, address: tuple[str, int], token: str, order: dict[str, Any], run_dir: Path) -> None:
        host, port = address
        self.name = host
        self.run_dir = run_dir
        share = order["share"]
        self.codes: dict[int, int | None] = dict.fromkeys(
            range(share["first"], share["first"] + share["count"])
        )
        self.lost = ""
        self._socket: socket.socket | None = None
        self._seen: list[dict[str, Any]] = []
        self._saw = threading.Event()
        self._over = threading.Event()
        try:
            self._socket = socket.create_connection((host, port), timeout=CONNECT_S)
        except OSError as error:
            self.lost = f"{host} of this run does not answer: {error.strerror or error}"
            self._over.set()
            return
        notice_silence(self._socket)
        self._reader = threading.Thread(target=self._read, args=(self._socket,), daemon=True)
        self._reader.start()
        self.tell({"token": token})
        self.tell(order)

    def tell(self, message: dict[str, Any]) -> None:
        if self._socket is not None and not self._over.is_set():
            with contextlib.suppress(OSError):  # the reader notices
                self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _read(self, connection: socket.socket) -> None:
        try:
            with connection.makefile("rb") as lines:
                for line in lines:
                    self._hear(json.loads(line))
        except (OSError, ValueError):
            pass
        if None in self.codes.values():
            self.lost = f"{self.name}, a machine of this run, is gone"
        self._over.set()
        self._saw.set()

    def _hear(self, message: dict[str, Any]) -> None:
        for rank, text in message.get("logs", {}).items():
            (self.run_dir / "logs" / f"rank-{int(rank)}.log").write_text(text)
        self.codes |= {int(rank): code for rank, code in message.get("codes", {}).items()}
        if "sights" in message:
            self._seen = message["sights"]
            self._saw.set()

    def forget_sights(self) -> None:
        self._seen = []
        if not self._over.is_set():
            self._saw.clear()

    def sights(self, timeout: float) -> list[dict[str, Any]]:
        self._saw.wait(timeout)
        return self._seen

    def close(self) -> None:
        """Wait until its workers have ended, as they were told to, and let go."""
        if self._socket is not None:
            self._over.wait(END_S)
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            self._reader.join(END_S)


def notice_silence(connection: socket.socket) -> None:
    """Have a connection fail when the machine at its other end has been gone for CONNECT_S."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * CONNECT_S))
