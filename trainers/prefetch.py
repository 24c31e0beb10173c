"""Batches read and pinned while the device works on the one before."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from trainers.batches import Batches
from trainers.distributed import Group


class Prefetch:
    """This rank's rows of each step's batch, on its device. What a step gets does not depend on what was
    asked before: `Batches.batch` is a function of (seed, step)."""

    def __init__(self, batches: Batches, seed: int, batch_size: int, group: Group) -> None:
        self._batches = batches
        self._seed = seed
        self._batch_size = batch_size
        self._group = group
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: dict[int, Future[Tensor]] = {}

    def rows(self, step: int, *, last: bool = False) -> Tensor:  # (share, context + 1)
        """Rows of batch `step`; the next one is begun unless this is the `last`.

        Raises:
            InputError: see `Batches.read`.
        """
        ready = self._ahead.pop(step, None)
        rows = ready.result() if ready else self._read(step)
        self._ahead.clear()
        if not last:
            self._ahead[step + 1] = self._reader.submit(self._read, step + 1)
        return rows.to(self._group.device, non_blocking=True)

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def _read(self, step: int) -> Tensor:
        group = self._group
        rows = self._batches.batch(self._seed, step, self._batch_size, group.rank, group.world_size)
        tensor = torch.from_numpy(rows)
        return tensor.pin_memory() if group.device.type == "cuda" else tensor
