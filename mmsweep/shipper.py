"""Ships what a run writes while it trains."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from mmsweep.store import RunStore, StoreError

SHIP_S = 2.0
STATUS_S = 5.0


class Shipper(threading.Thread):
    """Ships closed parts and checkpoints while the workers train, and keeps `status.json` fresh.

    A store that is away delays it and nothing else: the files wait on disk.
    """

    def __init__(
        self,
        store: RunStore,
        run_id: str,
        run_dir: Path,
        publish: Callable[[], None],
        fenced: threading.Event,
    ) -> None:
        """`publish` writes `status.json`; once `fenced` is set the run is somebody else's."""
        super().__init__(daemon=True)
        self.store, self.run_id, self.run_dir = store, run_id, run_dir
        self.publish = publish
        self.fenced = fenced
        self.over = threading.Event()
        self.trouble = ""
        """Why nothing can be shipped at the moment."""

    def run(self) -> None:
        published, pause = -STATUS_S, SHIP_S
        while not self.over.wait(pause) and not self.fenced.is_set():
            try:
                self.store.ship(self.run_id, self.run_dir)
                if time.monotonic() - published > STATUS_S:
                    self.publish()
                    published = time.monotonic()
                pause, self.trouble = SHIP_S, ""
            except StoreError as error:
                self.trouble = f"waiting for the store: {error}"
                pause = min(2 * pause, 60.0)

    def stop(self) -> None:
        self.over.set()
        if self.is_alive():
            self.join()
