"""Which tokens a step sees: a pure function of (seed, step), whatever the number of workers.

Batch t of a seed is drawn with the counter-based generator Philox, key = seed, counter = t, as
start positions over the whole corpus; each worker reads its slice of them. There is no generator
state to save, and nothing that evaluation could disturb.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainers.corpus import inspected
from trainers.errors import InputError
from trainers.shards import read_shard

EVALUATION_KEY = 1 << 64
"""Key of the evaluation sets, above every seed: the same windows for every seed, arm and cadence."""

Windows = npt.NDArray[np.int64]


class Batches:
    """Windows of `context` + 1 tokens from the shards of one split.

    Raises:
        InputError: no shard holds a whole window, a shard is damaged, or it holds a token that the
            model's vocabulary does not have.
    """

    def __init__(self, shards: Sequence[Path], context: int, vocab_size: int) -> None:
        self.context = context
        self.vocab_size = vocab_size
        self._paths = list(shards)
        self._shards = [read_shard(path) for path in shards]
        for path, shard in zip(shards, inspected(shards), strict=True):
            self._check(path, shard.max_token)
        starts = [max(0, len(shard) - context) for shard in self._shards]  # starts of whole windows
        self._ends = np.cumsum(starts)
        if not len(starts) or self._ends[-1] == 0:
            names = ", ".join(path.name for path in shards[:3])
            raise InputError(
                f"data: {names} hold no window of context {context} + 1 tokens; use a smaller context"
            )

    def positions(self, key: int, step: int, batch_size: int) -> Windows:
        """Start positions (batch_size,) of the global batch `step` under `key`."""
        # Raw words: numpy promises them for ever, and its distributions not. The bias of the
        # remainder is below tokens / 2^64.
        words = np.random.Philox(key=key, counter=[0, 0, 0, step]).random_raw(batch_size)
        return (words % np.uint64(self._ends[-1])).astype(np.int64)

    def batch(self, key: int, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Windows:
        """Rank's slice of global batch `step`: (batch_size / world_size, context + 1) token ids."""
        share = batch_size // world_size
        return self.read(self.positions(key, step, batch_size)[rank * share : (rank + 1) * share])

    def read(self, positions: Windows) -> Windows:
        """Windows (len(positions), context + 1) at global start positions.

        Raises:
            InputError: a shard was changed since and holds a token beyond the vocabulary.
        """
        rows = np.empty((len(positions), self.context + 1), np.int64)
        for row, position in zip(rows, positions, strict=True):
            index = int(np.searchsorted(self._ends, position, side="right"))
            start = int(position - (self._ends[index - 1] if index else 0))
            row[:] = self._shards[index][start : start + self.context + 1]
            self._check(self._paths[index], int(row.max()))
        return rows

    def _check(self, path: Path, largest: int) -> None:
        if largest >= self.vocab_size:
            raise InputError(f"{path}: holds token {largest}, model.vocab_size is {self.vocab_size}")
