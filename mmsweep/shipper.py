"""Ships what a run writes while it trains."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mmsweep.contents import size
from mmsweep.store import RunStore, StoreError

SHIP_S = 2.0
"""Pause between two looks for something to send."""
STATUS_S = 5.0
"""Pause between two reports, and between two tries of a store that is away."""
BACK_OFF_S = 30.0
"""The longest pause of the files; a report that gets through ends it."""
COUNT_S = 0.5
COUNT_SHARE = 0.02
"""The share of its time that the counting thread may work: after a long outage there are many files."""
SILENT_S = 20.0
"""A report that has had no answer for so long means that the store is away."""
CAP_BYTES = 20 * 10**9
EASED = 0.5
"""Share of the cap below which what waits must fall before there is room again."""


class Shipper:
    """Ships closed parts and checkpoints while the workers train, and keeps `status.json` fresh.

    A store that is away delays it and nothing else: the files wait on disk, and go up in their order
    once it is back. Three threads, so that neither a large file nor a store that does not answer
    holds up the others: one sends files, one reports, one counts what waits.
    """

    def __init__(
        self,
        store: RunStore,
        run_id: str,
        run_dir: Path,
        publish: Callable[[], None],
        fenced: threading.Event,
        *,
        cap_bytes: int = CAP_BYTES,
    ) -> None:
        """`publish` writes `status.json`; once `fenced` is set the run is somebody else's."""
        self.store, self.run_id, self.run_dir = store, run_id, run_dir
        self.publish = publish
        self.fenced = fenced
        self.cap_bytes = cap_bytes
        self.trouble = ""
        """Why nothing can be shipped at the moment."""
        self.waiting = 0
        """Bytes that are complete here and not in the store."""
        self.full = threading.Event()
        """More than `cap_bytes` wait, and have not been worked off since."""
        self._over = threading.Event()
        self._answered = threading.Event()
        self._failures: dict[str, str] = {}
        """The last error of each thread that cannot get on."""
        self._away_since: float | None = None
        self._report_began: float | None = None
        work = (self._ship_all, self._report, self._count)
        self._threads = [threading.Thread(target=one, name=one.__name__, daemon=True) for one in work]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Return when nothing is being sent any more. What waits is left to `RunStore.ship`."""
        self._over.set()
        self._answered.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _goes_on(self) -> bool:
        return not self._over.is_set() and not self.fenced.is_set()

    def _ship_all(self) -> None:
        pause = SHIP_S
        while self._goes_on():
            self._answered.clear()
            if self._try("files", lambda: self.store.ship(self.run_id, self.run_dir)):
                pause = SHIP_S
                self._over.wait(pause)
            elif self._goes_on():
                pause = min(2 * pause, BACK_OFF_S)
                self._answered.wait(random.uniform(0.5, 1.0) * pause)  # noqa: S311 (many runs fail at once)

    def _report(self) -> None:
        while self._goes_on():
            self._report_began = time.monotonic()
            if self._try("report", self.publish):
                self._answered.set()
            self._report_began = None
            self._over.wait(random.uniform(1.0, 1.2) * STATUS_S)  # noqa: S311 (runs begin together)

    def _try(self, who: str, action: Callable[[], object]) -> bool:
        try:
            action()
        except (StoreError, OSError) as error:  # of this machine's disk: the next look may fare better
            self._failures[who] = str(error)
            return False
        self._failures.pop(who, None)
        return True

    def _count(self) -> None:
        while self._goes_on():
            begun = time.monotonic()
            self.waiting = self.store.waiting(self.run_id, self.run_dir)
            if self.waiting > self.cap_bytes:
                self.full.set()
            elif self.waiting <= EASED * self.cap_bytes:
                self.full.clear()
            self.trouble = self._describe()
            self._over.wait(max(COUNT_S, (time.monotonic() - begun) / COUNT_SHARE))

    def _describe(self) -> str:
        began = self._report_began
        error = next(iter(dict(self._failures).values()), "")
        if not error and began is not None and time.monotonic() - began > SILENT_S:
            error = f"{self.store.url} does not answer"
        if not error:
            self._away_since = None
            return ""
        self._away_since = self._away_since or time.time()
        since = time.strftime("%H:%M:%S", time.gmtime(self._away_since))
        return f"waiting for the store: {error} ({size(self.waiting)} wait, since {since} UTC)"
