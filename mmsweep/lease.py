"""Leases in a store: who works on a grid or a run, so that nobody else does.

A lease is a folder of claims, each an object under a name of its own. A claimant writes its claim,
then looks at the others: one that sees a smaller name withdraws, the smallest waits until the larger
ones have withdrawn. This is Lamport's one-bit algorithm ("The Mutual Exclusion Problem: Part II",
JACM 33, 1986): of any two claimants at least one sees the other, if a listing shows all that was
written before it began. S3 and folders promise that; conditional writes are not needed.

The owner rewrites its claim every few seconds. No clock is compared with another machine's: an
observer calls an owner dead when the claim has stayed the same for `ttl` seconds of the observer's
own watching, or, on the owner's machine, when its process is gone. An owner that was only slow or
cut off finds the mark that declared it dead at its next heartbeat, and stops. Until then two may
work at once, for a heartbeat at most after it can reach the store; the attempt numbers of runs
keep the store sound meanwhile.
"""

from __future__ import annotations

import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from mmsweep.objects import DamagedError, NotFound, ObjectStore, StoreError
from trainers.yamlfile import printable

TTL_S = 60.0
"""A claim that has not changed for so long, as somebody watches, has lost its owner."""
BEAT_S = 10.0
"""Pause between two heartbeats."""
GAP_S = 5.0
"""No longer than this counts between two looks: in between the store may have been away for all."""
POLL_S = 0.1
CLAIM, DEAD = ".json", ".dead"

_Time = Annotated[float, Field(ge=0, le=1e11)]


class Claim(BaseModel):
    """One claimant, in its own words. Times are seconds since 1970 by its clock, for people to read."""

    model_config = ConfigDict(frozen=True)

    nonce: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    launch: Annotated[str, Field(pattern=r"^[^/\\\x00]*$")]
    """The name of the launch that wants the lease, and of its log."""
    host: str
    machine: str
    """Where a process id means the same process: boot and process namespace; host names repeat."""
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    process_start: int
    """Ticks since boot, because process ids come again; 0 where the system does not tell."""
    acquired: _Time
    heartbeat: _Time
    beat: int = 0
    ttl: Annotated[float, Field(gt=0, le=86_400)]
    held: bool = False

    def who(self) -> str:
        """`pid 4242 on node-3 (launch paper-1122-120311), since 2026-11-22 12:03:11 UTC`"""
        who = printable(f"pid {self.pid} on {self.host} (launch {self.launch})")
        return f"{who}, since {_utc(self.acquired)} UTC"

    def __str__(self) -> str:
        return f"{self.who()}, last heartbeat {_utc(self.heartbeat)} UTC"

    def why_dead(self) -> str:
        """Why nobody is at work any more, as far as one look and the clocks tell; empty: somebody is."""
        if self.process_is_gone():
            return "its process is gone"
        silent = time.time() - self.heartbeat > self.ttl
        return f"silent since {_utc(self.heartbeat)} UTC" if silent else ""

    def process_is_gone(self) -> bool:
        """True only where it is known: on the machine that the process ran on."""
        return self.machine == _machine() and not _runs(self.pid, self.process_start)


def claims(objects: ObjectStore, folder: str) -> list[Claim]:
    """The claims of a lease that nobody has declared dead. Raises `StoreError`."""
    names = objects.children(folder)
    found = (_read(objects, folder, nonce) for nonce in _nonces(names) if nonce + DEAD not in names)
    return [claim for claim in found if claim is not None]


@dataclass
class _Sight:
    """What one observer has seen of one claim."""

    beat: tuple[int, bool]
    at: float
    alive: bool = False
    """It has changed between two looks."""
    silent: float = 0.0


class Lease:
    """One claimant's side of the lease in `folder`: `acquire` it, or `advance` until it is yours.

        with Lease(objects, "grids/paper.lease", "paper-1") as lease:
            if (owner := lease.acquire()) is None:
                ...  # it is kept alive by a thread, and released at the end of the block

    All methods raise `StoreError` when the store fails, and can then be called again.
    """

    def __init__(
        self,
        objects: ObjectStore,
        folder: str,
        launch: str,
        *,
        ttl: float = TTL_S,
        beat_s: float = BEAT_S,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_lost` is called, in another thread, when the lease is found to have been taken over."""
        self.objects = objects
        self.folder = folder
        self.launch = launch
        self.ttl = ttl
        self.beat_s = beat_s
        self.on_lost = on_lost
        self.lost = threading.Event()
        self.holder: Claim | None = None
        """Who else had the lease at the last look."""
        self.taken_from: list[tuple[Claim, str]] = []
        """Owners that were declared dead on the way, and why."""
        self._mine: Claim | None = None
        self._written = False
        self._wrote = 0.0
        self._seen: dict[str, _Sight] = {}
        self._over = threading.Event()
        self._keeper: threading.Thread | None = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self, on_silence: Callable[[Claim], None] = lambda _: None) -> Claim | None:
        """Take the lease; returns None, or the claim of a live owner.

        This takes a moment, the time to the owner's next heartbeat, or, if none comes, its `ttl`.
        `on_silence` is called once when the owner has missed a heartbeat.
        """
        begun, told = time.monotonic(), False
        self._seen.clear()  # a sign of life of long ago is none
        while not self.advance():
            if self.holder is not None and self._seen[self.holder.nonce].alive:
                return self.holder
            if self.holder is not None and not told and time.monotonic() - begun > 2 * self.beat_s:
                on_silence(self.holder)
                told = True
            time.sleep(POLL_S)
        return None

    def advance(self) -> bool:
        """One step towards the lease; True once it is held, and then kept until `release`.

        False: call again after a pause; `holder` says who has it, None while it is being settled.
        """
        if self._mine is not None and not self._written:
            self._write(self._mine)  # the last try may have arrived or not
        rivals = self._look()
        if self._mine is None:
            if rivals:
                return False
            self._claim()
            rivals = self._look()  # who is alone need not come again
        if self._mine is None:
            return False
        if self.holder is not None or any(rival.nonce < self._mine.nonce for rival in rivals):
            self._withdraw(self._mine)
            return False
        if rivals:
            if time.monotonic() - self._wrote > self.beat_s:
                self._beat(self._mine)
            return False  # until they have withdrawn, or hold it
        return self._hold(self._mine)

    def renew(self) -> bool:
        """Write a heartbeat; False, and `lost` is set, if somebody has declared this owner dead."""
        mine = self._mine
        assert mine is not None
        names = self.objects.children(self.folder)
        claim, mark = mine.nonce + CLAIM, mine.nonce + DEAD
        if self._over.is_set():  # released since: its claim may be gone for that reason
            return True
        if mark in names or claim not in names:
            self.lost.set()
            self._mine = None
            for name in (claim, mark):  # in this order: without its mark the claim would count
                self.objects.delete(f"{self.folder}/{name}")
            return False
        self._beat(mine)
        return True

    def release(self) -> None:
        """Let go. If the store is away the claim stays there, without heartbeats.

        A heartbeat that is on its way for longer than GAP_S brings the claim back when it arrives; its
        thread removes it again.
        """
        self._over.set()
        if self._keeper is not None and self._keeper is not threading.current_thread():
            self._keeper.join(timeout=GAP_S)
        if (mine := self._mine) is not None:
            with suppress(StoreError):
                self._withdraw(mine)

    # --- one's own claim --------------------------------------------------------------------------

    def _claim(self) -> None:
        now = time.time()
        self._mine = Claim(
            nonce=uuid.uuid4().hex,
            launch=self.launch,
            host=platform.node(),
            machine=_machine(),
            pid=os.getpid(),
            process_start=_process(os.getpid())[1],
            acquired=now,
            heartbeat=now,
            ttl=self.ttl,
        )
        self._write(self._mine)

    def _write(self, claim: Claim) -> None:
        self._written = False
        self.objects.put(f"{self.folder}/{claim.nonce}{CLAIM}", claim.model_dump_json().encode())
        self._mine, self._written, self._wrote = claim, True, time.monotonic()

    def _beat(self, mine: Claim, *, held: bool | None = None) -> None:
        changes = {"heartbeat": time.time(), "beat": mine.beat + 1}
        self._write(mine.model_copy(update=changes | ({} if held is None else {"held": held})))

    def _withdraw(self, mine: Claim) -> None:
        self.objects.delete(f"{self.folder}/{mine.nonce}{CLAIM}")
        self._mine = None

    def _hold(self, mine: Claim) -> bool:
        """Say that it is held, and look once more: a pause before this may have been taken for death."""
        self._beat(mine, held=True)
        self._look()
        if self._mine is None:
            return False
        if self.holder is not None:
            self._withdraw(mine)
            return False
        self._keeper = threading.Thread(
            target=self._keep, args=(mine,), name=f"lease {self.folder}", daemon=True
        )
        self._keeper.start()
        return True

    def _keep(self, mine: Claim) -> None:
        while not self._over.wait(self.beat_s):
            with suppress(StoreError):  # no heartbeat this time
                self.renew()
            if self.lost.is_set():
                self.on_lost()
                return
        with suppress(StoreError):
            self._withdraw(mine)  # also where `release` has: the last heartbeat may have come after that

    # --- the claims of others ---------------------------------------------------------------------

    def _look(self) -> list[Claim]:
        """Claims of others that may be alive; those of the dead are removed."""
        began = time.monotonic()
        names = self.objects.children(self.folder)
        mine = self._mine.nonce if self._mine is not None else None
        if mine is not None and (mine + DEAD in names or mine + CLAIM not in names):
            self._mine = None  # too slow: declared dead
        rivals = []
        for nonce in _nonces(names):
            if nonce + DEAD in names:
                self.objects.delete(f"{self.folder}/{nonce}{CLAIM}")
            elif nonce != mine and (claim := _read(self.objects, self.folder, nonce)) is not None:
                cause = self._cause_of_death(claim, began)
                if cause is None:
                    rivals.append(claim)
                else:
                    self._bury(claim, cause)
        self._seen = {rival.nonce: self._seen[rival.nonce] for rival in rivals}
        self.holder = next((rival for rival in rivals if rival.held), None)
        return rivals

    def _cause_of_death(self, claim: Claim, began: float) -> str | None:
        """Why an owner is dead, or None. `began`: when this look began, by the monotonic clock."""
        beat = (claim.beat, claim.held)
        sight = self._seen.get(claim.nonce)
        now = time.monotonic()
        if sight is None or sight.beat != beat:
            self._seen[claim.nonce] = _Sight(beat, now, alive=sight is not None)
        else:
            sight.silent += min(max(0.0, began - sight.at), GAP_S)
            sight.at = now
            if sight.silent > claim.ttl:
                return f"no heartbeat for {claim.ttl:.0f} s"
        return "its process is gone" if claim.process_is_gone() else None

    def _bury(self, claim: Claim, cause: str) -> None:
        """Declare an owner dead, which cannot be undone, then remove its claim."""
        if not claim.process_is_gone():
            self.objects.put(f"{self.folder}/{claim.nonce}{DEAD}", b"")
        if claim.held:
            self.taken_from.append((claim, cause))
        self.objects.delete(f"{self.folder}/{claim.nonce}{CLAIM}")


def _nonces(names: list[str]) -> list[str]:
    return [name.removesuffix(CLAIM) for name in names if name.endswith(CLAIM)]


def _read(objects: ObjectStore, folder: str, nonce: str) -> Claim | None:
    key = f"{folder}/{nonce}{CLAIM}"
    try:
        claim = Claim.model_validate_json(objects.get(key))
    except NotFound:
        return None
    except ValueError:
        claim = None
    if claim is None or claim.nonce != nonce:
        raise DamagedError(f"{objects.url}/{printable(key)}: not a claim written by mmsweep; remove it")
    return claim


def _utc(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"


@cache
def _machine() -> str:
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _process(pid: int) -> tuple[str, int]:
    """State (`Z`: ended, not yet waited for) and start in ticks since boot; `("", 0)` where nobody tells."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return "", 0


def _runs(pid: int, start: int) -> bool:
    """Whether the process of this id and start is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    state, started = _process(pid)
    return state not in ("Z", "X") and (not started or not start or started == start)
