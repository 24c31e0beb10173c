"""A run's tokens: made of text once, checked before training, found again afterwards.

A corpus is a folder with `train-NNNNNN.bin`, `val-NNNNNN.bin` (see `trainers.shards`) and, written
last, `corpus.json`: what it was made of, and the digest of every shard. While it is being made the
folder ends in `.part` and holds `progress.json`, from which a killed preparation goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainers.config import DataConfig
from trainers.documents import DataSet, Document, Files, Position, expanded, find, in_val, matches, spec_hash
from trainers.errors import InputError
from trainers.records import write_json
from trainers.shards import Shard, ShardWriter, Tokens, inspect, shard_tokens
from trainers.tokenizers import encoded

MANIFEST = "corpus.json"
PROGRESS = "progress.json"
PART = ".part"
SPLITS = ("train", "val")

SHARD_TOKENS = 100_000_000
BATCH_BYTES = 1 << 20
"""Of text, tokenised at once."""
BATCH_DOCUMENTS = 4096
COMMIT_S = 5.0
"""A killed preparation loses at most this much work; whole shards are never made again."""
HASHING_THREADS = 4


@dataclass(frozen=True, slots=True)
class Corpus:
    folder: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    digest: str
    tokens: dict[str, int]
    """Tokens by split."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a preparation has come, earlier attempts included."""

    done: int
    """Of `size`, in the source's own unit: bytes of files, or rows."""
    size: int
    rows: int
    """Documents read."""
    tokens: int


OnProgress = Callable[[Progress], None]


def cache_root() -> Path:
    """Where prepared corpora live: $MMSWEEP_CACHE, else ~/.cache/mmsweep."""
    return Path(os.environ.get("MMSWEEP_CACHE") or Path.home() / ".cache" / "mmsweep")


def identify(data: DataConfig) -> str:
    """Identity of the tokens a config stands for; part of every run's id.

    The content's SHA-256 for local sources. A Hugging Face data set pinned to a revision is
    identified by its specification, so that planning needs no download.

    Raises:
        InputError: the source is missing or unusable.
    """
    if data.source == "hf":
        return "spec:" + spec_hash(data)
    return prepare(data).digest


def prepare(data: DataConfig, *, workers: int = 1, on_progress: OnProgress | None = None) -> Corpus:
    """The corpus of a config; tokenised on first use, found in the cache afterwards.

    Every shard was read and checked when this returns, now or by an earlier call that saw the same
    file (by path, size and time of change).

    Args:
        workers: processes that tokenise. The result does not depend on their number.
        on_progress: called about once for every MB of text that is tokenised.

    Raises:
        InputError: missing files, an unknown tokenizer, a damaged shard, or tokens that do not
            have the digest which `data` pins.
    """
    corpus = _ready_shards(data) if data.source == "bin" else _cached(data, workers, on_progress)
    if data.digest is not None and data.digest.startswith("sha256:") and data.digest != corpus.digest:
        raise InputError(
            f"data {data.source}: tokens on this machine have digest {corpus.digest[:19]}…, the run needs "
            f"{data.digest[:19]}…; use the same files"
            + (" and the same Python version" if data.source == "stdlib" else "")
        )
    return corpus


def build(
    folder: Path,
    data: DataConfig,
    *,
    workers: int = 1,
    on_progress: OnProgress | None = None,
    origin: DataConfig | None = None,
) -> Corpus:
    """Make a corpus in a folder of its own, for `source: bin` on any machine that has the folder.

    The digest is the one that `data` has where it is trained on directly, so ids agree.

    Args:
        origin: what `data` is a local copy of.

    Raises:
        InputError: as `prepare`; or the folder holds something else.
    """
    made = existing(folder, origin or data)
    if made is None:
        _make(folder, find(data), origin or data, workers, on_progress)
        made = _open(folder)
    return made


def existing(folder: Path, data: DataConfig) -> Corpus | None:
    """The corpus in `folder`, made of `data`; None if the folder is missing or empty.

    Raises:
        InputError: the folder holds something else.
    """
    if not folder.exists():
        return None
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST).is_file()):
        raise InputError(f"{folder}: is there and is no corpus; choose another folder")
    if not (folder / MANIFEST).is_file():
        return None
    if _read_manifest(folder).get("spec") != _spec(data):
        raise InputError(
            f"{folder}: holds a corpus made of other text or with other options; choose another folder"
        )
    return _open(folder)


def _spec(data: DataConfig) -> str:
    """Names what a corpus is made of: the files as they are now, or the URL."""
    if data.path is not None and "://" in data.path:
        return hashlib.sha256(json.dumps([spec_hash(data), data.path]).encode()).hexdigest()
    return find(data).spec


# --- making --------------------------------------------------------------------------------------


def _cached(data: DataConfig, workers: int, on_progress: OnProgress | None) -> Corpus:
    source = find(data)
    folder = cache_root() / "corpora" / f"{data.source}-{source.spec[:16]}"
    if not (folder / MANIFEST).is_file():
        _make(folder, source, data, workers, on_progress)
    return _open(folder)


def _make(
    folder: Path, source: Files | DataSet, origin: DataConfig, workers: int, on_progress: OnProgress | None
) -> None:
    """Write the corpus, or what is missing of it; it appears whole or not at all."""
    part = folder.with_name(folder.name + PART)
    with _writing(folder), _lock(folder):
        if (folder / MANIFEST).is_file():  # another process was first
            return
        manifest = {"data": origin.model_dump(mode="json", exclude={"digest"}), "spec": _spec(origin)}
        manifest |= _tokenise(part, source, origin, workers, on_progress)
        write_json(part / MANIFEST, manifest)
        (part / PROGRESS).unlink()
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)


def _tokenise(
    part: Path, source: Files | DataSet, data: DataConfig, workers: int, on_progress: OnProgress | None
) -> dict[str, Any]:
    """Shards of both splits in `part`, and what the manifest says of them."""
    writers, then, rows, documents = _begin(part, source.spec)
    committed, finished = time.monotonic(), 0
    try:
        for batch, tokens in _batches(source, then, data.tokenizer, workers):
            for document, own in zip(batch, tokens, strict=True):
                if document.text:
                    writers["val" if in_val(document.name, data.val_fraction) else "train"].add(own)
                    documents += 1
            rows += len(batch)
            whole = sum(len(writer.finished) for writer in writers.values())
            if whole > finished or time.monotonic() - committed > COMMIT_S:
                _commit(part, source.spec, writers, batch[-1].then, rows, documents)
                committed, finished = time.monotonic(), whole
            if on_progress:
                total = sum(writer.total for writer in writers.values())
                on_progress(Progress(batch[-1].done, source.size, rows, total))
        for split, writer in writers.items():
            writer.close()
            if not writer.total:
                raise InputError(
                    f"data {data.source}: no tokens in the {split} split; change data.val_fraction"
                )
    finally:
        for writer in writers.values():
            writer.abandon()
    shards = {split: writer.finished for split, writer in writers.items()}
    return {"digest": _corpus_digest(shards), "rows": rows, "documents": documents, "shards": shards}


def _begin(part: Path, spec: str) -> tuple[dict[str, ShardWriter], Position, int, int]:
    """Writers, where to read on, rows and documents so far: as a killed preparation left them, or new."""
    try:
        state = json.loads((part / PROGRESS).read_text())
        if state["spec"] == spec:
            writers = {s: ShardWriter(part, s, SHARD_TOKENS, state["splits"][s]) for s in SPLITS}
            for half in part.glob(".*.json.*"):  # `write_json` was killed at it
                half.unlink()
            file, row = state["then"]
            return writers, (file, row), state["rows"], state["documents"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing was left, or nothing that can be used
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    writers = {split: ShardWriter(part, split, SHARD_TOKENS) for split in SPLITS}
    _commit(part, spec, writers, (0, 0), 0, 0)
    return writers, (0, 0), 0, 0


def _commit(
    part: Path, spec: str, writers: dict[str, ShardWriter], then: Position, rows: int, documents: int
) -> None:
    splits = {split: writer.commit() for split, writer in writers.items()}
    state = {"spec": spec, "then": then, "rows": rows, "documents": documents, "splits": splits}
    write_json(part / PROGRESS, state)


def _batches(
    source: Files | DataSet, start: Position, name: str, workers: int
) -> Iterator[tuple[list[Document], list[Tokens]]]:
    """Documents in order with their tokens."""
    waiting: deque[list[Document]] = deque()

    def texts() -> Iterator[list[bytes]]:
        for batch in by_size(source.documents(start)):
            waiting.append(batch)
            yield [document.text for document in batch]

    for tokens in encoded(texts(), name, workers=workers):
        yield waiting.popleft(), tokens


def by_size(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in batches to tokenise at once."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- opening -------------------------------------------------------------------------------------


def _open(folder: Path) -> Corpus:
    """A corpus with a manifest, every shard checked against it."""
    shards = _read_manifest(folder)["shards"]
    paths = {split: tuple(folder / entry["name"] for entry in shards[split]) for split in SPLITS}
    for split in SPLITS:
        for path, entry, found in zip(paths[split], shards[split], inspected(paths[split]), strict=True):
            _check(path, entry, found)
    tokens = {split: sum(entry["tokens"] for entry in shards[split]) for split in SPLITS}
    return Corpus(folder, paths["train"], paths["val"], _corpus_digest(shards), tokens)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """`corpus.json`, with all that is read of it."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        for entry in (entry for split in SPLITS for entry in manifest["shards"][split]):
            if not (Path(entry["name"]).name == entry["name"] and entry["tokens"] > 0):
                raise ValueError(f"not a shard: {entry}")
        if manifest["digest"] != _corpus_digest(manifest["shards"]):
            raise ValueError("the digests do not agree")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / MANIFEST}: unreadable ({error}); remove {folder} and prepare it again"
        ) from None
    return manifest


def _check(path: Path, entry: dict[str, Any], found: Shard) -> None:
    if (found.tokens, found.sha256) != (entry["tokens"], entry["sha256"]):
        raise InputError(
            f"{path}: damaged: {found.tokens} tokens with SHA-256 {found.sha256[:12]}…, {MANIFEST} lists "
            f"{entry['tokens']} with {entry['sha256'][:12]}…; fetch it again, or remove {path.parent} and "
            "prepare it again"
        )


def _ready_shards(data: DataConfig) -> Corpus:
    """A folder that `build` made, or shards somebody else made: those with "val" in their name validate."""
    given = expanded(str(data.path))
    if (given / MANIFEST).is_file():
        return _open(given)
    splits = _by_name(str(data.path))
    tokens = {split: sum(shard_tokens(p) for p in members) for split, members in splits.items()}
    every = inspected([p for split in SPLITS for p in splits[split]])
    found = {"train": every[: len(splits["train"])], "val": every[len(splits["train"]) :]}
    digest = _corpus_digest({split: [asdict(shard) for shard in found[split]] for split in SPLITS})
    return Corpus(given, tuple(splits["train"]), tuple(splits["val"]), digest, tokens)


def _by_name(path: str) -> dict[str, list[Path]]:
    given = expanded(path)
    if given.with_name(given.name + PART).is_dir() and not given.exists():
        raise InputError(f'data.path "{path}" is not finished; the command that prepares it goes on')
    paths = matches(str(given / "*.bin") if given.is_dir() else path)
    if not paths:
        raise InputError(f'data.path "{path}" holds no .bin shard')
    splits = {
        "train": [p for p in paths if "val" not in p.name],
        "val": [p for p in paths if "val" in p.name],
    }
    for split, members in splits.items():
        if not members:
            raise InputError(
                f'data.path "{path}" holds no {split} shard (validation shards have "val" in their name)'
            )
    return splits


def _corpus_digest(shards: dict[str, list[dict[str, Any]]]) -> str:
    content = json.dumps([[split, [entry["sha256"] for entry in shards[split]]] for split in SPLITS])
    return "sha256:" + hashlib.sha256(content.encode()).hexdigest()


def verify(path: Path) -> Iterator[tuple[Path, Shard | InputError]]:
    """Read every shard of a corpus, a folder or glob of shards, or one shard, whatever was seen before.

    Raises:
        InputError: nothing is there, or its manifest is unreadable.
    """
    path = expanded(str(path))
    entries: dict[Path, dict[str, Any]] = {}
    if (path / MANIFEST).is_file():
        shards = _read_manifest(path)["shards"]
        entries = {path / entry["name"]: entry for split in SPLITS for entry in shards[split]}
    found = matches(str(path / "*.bin") if path.is_dir() else str(path))
    if not found and not entries:
        raise InputError(f"{path}: no .bin shard is there")
    for shard in sorted({*found, *entries}):
        try:
            result = inspect(shard)
            if entries and shard not in entries:
                raise InputError(f"{shard}: not in {MANIFEST}; move it elsewhere")
            if entries:
                _check(shard, entries[shard], result)
            yield shard, result
        except InputError as error:
            yield shard, error


# --- the cache -----------------------------------------------------------------------------------


def inspected(paths: Sequence[Path]) -> list[Shard]:
    """`inspect` of every shard, remembered by path, size and time of change: 17 GB take half a minute.

    Raises:
        InputError: a damaged shard, or the cache cannot be written.
    """
    known = [_recall(path) for path in paths]
    if None in known:
        folder = cache_root() / "digests"
        # One process reads, the others on this machine wait for what it finds.
        with _writing(folder), _lock(folder), ThreadPoolExecutor(HASHING_THREADS) as threads:
            known = list(threads.map(lambda path: _recall(path) or _remember(path), paths))
    return [shard for shard in known if shard is not None]


def _memory(path: Path) -> Path:
    status = path.stat()
    seen = json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return cache_root() / "digests" / f"{hashlib.sha256(seen.encode()).hexdigest()[:32]}.json"


def _recall(path: Path) -> Shard | None:
    try:
        return Shard(**json.loads(_memory(path).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _remember(path: Path) -> Shard:
    shard_tokens(path)  # says it where the shard is missing
    memory = _memory(path)  # as the file was before it was read
    shard = inspect(path)
    memory.parent.mkdir(parents=True, exist_ok=True)
    write_json(memory, asdict(shard))
    return shard


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        if cache_root() in folder.parents:
            raise InputError(
                f"cannot write the token cache ({reason}); set MMSWEEP_CACHE to a folder with room"
            ) from None
        raise InputError(f"cannot write {folder} ({reason}); name a folder with room") from None


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process prepares, the others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
