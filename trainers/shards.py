"""Token shards: the `.bin` files of the GPT speed-run community, read, checked and written.

A shard is 256 int32 of header (magic 20240520, version 1, number of tokens), then uint16 tokens,
all little-endian.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from trainers.errors import InputError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
BLOCK_BYTES = 8 << 20
"""What is read at once: more than this is not held in memory."""

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Shard:
    """What reading a whole shard tells."""

    tokens: int
    sha256: str
    """Of the tokens, without the header."""
    max_token: int
    """-1 in a shard without tokens."""


def write_shard(path: Path, tokens: Tokens) -> None:
    """Write uint16 tokens in the .bin format."""
    with path.open("wb") as file:
        file.write(_header(len(tokens)))
        file.write(tokens.astype("<u2").tobytes())
        file.flush()
        os.fsync(file.fileno())


def _header(tokens: int) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


def shard_tokens(path: Path) -> int:
    """Number of tokens a shard's header promises, checked against the file's size.

    Raises:
        InputError: missing, foreign, truncated or over-long.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    header = np.frombuffer(raw[: len(raw) // 4 * 4], "<i4")
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
        found = int(header[0]) if len(header) else "nothing"
        raise InputError(
            f"{path}: not a token shard (magic {MAGIC} version {VERSION} expected, found {found})"
        )
    tokens = int(header[2])
    promised = HEADER_BYTES + 2 * tokens
    if size != promised:
        what = "ends in half a token" if size % 2 else "is truncated" if size < promised else "is too long"
        raise InputError(f"{path}: {what}: {size} bytes, but its header promises {promised}; fetch it again")
    return tokens


def read_shard(path: Path) -> Tokens:
    """Memory-mapped tokens of a shard. Raises InputError as `shard_tokens` does."""
    return np.memmap(path, np.dtype("<u2"), "r", offset=HEADER_BYTES, shape=(shard_tokens(path),))


def inspect(path: Path) -> Shard:
    """Read a whole shard. Raises InputError as `shard_tokens` does."""
    tokens = shard_tokens(path)
    digest, largest = hashlib.sha256(), -1
    try:
        with path.open("rb") as file:
            file.seek(HEADER_BYTES)
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                largest = max(largest, int(np.frombuffer(block, "<u2").max()))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; the disk may be failing") from None
    return Shard(tokens, digest.hexdigest(), largest)


class ShardWriter:
    """Writes the tokens of one split to `<split>-NNNNNN.bin`, `size` tokens each but for the last.

    `commit` puts on disk what was added and describes it; a writer made from that description goes
    on from there, whatever was added after it.

    Raises:
        ValueError: the files are not what `state` says.
    """

    def __init__(self, folder: Path, split: str, size: int, state: dict[str, Any] | None = None) -> None:
        self.folder, self.split, self.size = folder, split, size
        self.finished: list[dict[str, Any]] = []
        """`{name, tokens, sha256, max_token}` of every whole shard."""
        self.total = 0
        self._file: BinaryIO | None = None
        self._tokens, self._largest, self._digest = 0, -1, hashlib.sha256()
        if state is not None:
            self._go_on(state)

    def add(self, tokens: Tokens) -> None:
        while len(tokens):
            head, tokens = tokens[: self.size - self._tokens], tokens[self.size - self._tokens :]
            raw = head.astype("<u2", copy=False).tobytes()
            self._open().write(raw)
            self._digest.update(raw)
            self._tokens += len(head)
            self._largest = max(self._largest, int(head.max()))
            self.total += len(head)
            if self._tokens == self.size:
                self._finish()

    def commit(self) -> dict[str, Any]:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"finished": self.finished, "open": asdict(self._shard())}

    def close(self) -> None:
        """Finish the last shard."""
        if self._tokens:
            self._finish()

    def abandon(self) -> None:
        """Let go of the file, as it is."""
        if self._file is not None:
            self._file.close()

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.finished):06d}.bin"

    def _shard(self) -> Shard:
        return Shard(self._tokens, self._digest.hexdigest(), self._largest)

    def _open(self) -> BinaryIO:
        if self._file is None:
            self._file = self._path.open("wb")
            self._file.write(_header(0))
        return self._file

    def _finish(self) -> None:
        file = self._open()
        file.seek(0)
        file.write(_header(self._tokens))
        self.commit()
        file.close()
        self.finished.append({"name": self._path.name, **asdict(self._shard())})
        self._file = None
        self._tokens, self._largest, self._digest = 0, -1, hashlib.sha256()

    def _go_on(self, state: dict[str, Any]) -> None:
        self.finished = list(state["finished"])
        for entry in self.finished:
            if (self.folder / entry["name"]).stat().st_size != HEADER_BYTES + 2 * entry["tokens"]:
                raise ValueError(f"{entry['name']} has another size")
        self.total = sum(entry["tokens"] for entry in self.finished)
        left = 2 * state["open"]["tokens"]
        if not left:
            return
        self._file = self._path.open("r+b")
        self._file.truncate(HEADER_BYTES + left)
        self._file.seek(HEADER_BYTES)
        while block := self._file.read(BLOCK_BYTES):
            self._digest.update(block)
            self._largest = max(self._largest, int(np.frombuffer(block, "<u2").max()))
            self._tokens += len(block) // 2
        self.total += self._tokens
        if asdict(self._shard()) != state["open"]:
            self.abandon()
            raise ValueError(f"{self._path.name} holds other tokens")
