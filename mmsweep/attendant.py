"""What a launch does beside its runs: it looks for requests to stop, keeps its log in the store, and notices
when the store is away."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import TracebackType

from mmsweep.notify import Webhook
from mmsweep.progress import Log, duration
from mmsweep.store import RunStore, StoreError
from trainers.errors import InputError

POLL_S = 2.0
"""Pause between two looks for a request."""
LOG_S = 10.0
"""Pause between two copies of the log."""
AWAY_S = 300.0
"""A store that has not answered for so long is worth a message."""


def in_a_line(error: BaseException) -> str:
    """Why a launch ended that an exception has ended."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C"
    if isinstance(error, SystemExit):
        return "stopped by SIGTERM"
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, InputError | StoreError) else f"{type(error).__name__}: {text}"


class Attendant:
    """A thread for the length of a launch.

    with Attendant(store, "paper", "paper-1122-120311", log, hook) as attendant:
        ...  # `attendant.stopping` says why the launch was asked to stop; empty: it was not
    """

    def __init__(
        self,
        store: RunStore,
        grid: str,
        launch: str,
        log: Log,
        hook: Webhook,
        *,
        poll_s: float = POLL_S,
        away_s: float = AWAY_S,
    ) -> None:
        self.store = store
        self.grid = grid
        self.launch = launch
        self.log = log
        self.hook = hook
        self.poll_s = poll_s
        self.away_s = away_s
        self.stopping = ""
        self._kept = ""
        self._kept_at = 0.0
        self._away_since: float | None = None
        self._told = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._attend, name=f"attendant of {grid}", daemon=True)

    def __enter__(self) -> Attendant:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if error is not None:
            self.log.keep(f"{self.grid}: ended: {in_a_line(error)}")
        with suppress(StoreError):
            self._keep_log()

    def stop(self, why: str) -> None:
        """End the launch as Ctrl-C does: its runs save their state. Only the first call counts.

        Signal handlers call it: it prints nothing.
        """
        if not self.stopping:
            self.stopping = why
            os.kill(os.getpid(), signal.SIGINT)

    def _attend(self) -> None:
        while not self._over.wait(self.poll_s):
            try:
                if not self.stopping and self.store.stop_requested(grid=self.grid):
                    self.stop("stopped by request")
                if time.monotonic() - self._kept_at > LOG_S:
                    self._keep_log()
            except StoreError as error:
                self._is_away(str(error))
            else:
                self._is_back()

    def _keep_log(self) -> None:
        text = self.log.text()
        if text != self._kept:
            self.store.put_launch_log(self.grid, self.launch, text)
            self._kept = text
        self._kept_at = time.monotonic()

    def _is_away(self, error: str) -> None:
        now = time.monotonic()
        self._away_since = self._away_since or now
        if not self._told and now - self._away_since > self.away_s:
            self._told = True
            self.hook.send(
                f"{self.grid}: the store has been away for {duration(now - self._away_since)}; "
                f"runs go on and keep what they write: {error}"
            )

    def _is_back(self) -> None:
        if self._told and self._away_since is not None:
            away = duration(time.monotonic() - self._away_since)
            self.hook.send(f"{self.grid}: the store is back after {away}")
        self._away_since, self._told = None, False
