"""Text to token shards on disk.

A corpus is a folder with `train-NNNNNN.bin`, `val-NNNNNN.bin` and `corpus.json`. Shards use the
`.bin` format of the GPT speed-run community, so published shards drop in: 256 int32 of header
(magic 20240520, version 1, number of tokens), then uint16 tokens.
"""

from __future__ import annotations

import fcntl
import functools
import glob
import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainers.config import DataConfig
from trainers.errors import InputError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000
SPLIT_SEED = b"mmsweep-split-1"
"""Documents are ordered and split by SHA-256(SPLIT_SEED + name): stable, and no generator state."""

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Corpus:
    folder: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    digest: str
    tokens: dict[str, int]
    """Tokens by split."""


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
        return "spec:" + _spec_hash(data)
    return prepare(data).digest


def prepare(data: DataConfig) -> Corpus:
    """The corpus of a config; tokenised on first use, found in the cache afterwards.

    Raises:
        InputError: missing files, an unknown tokenizer, a damaged shard, or tokens that do not
            have the digest which `data` pins.
    """
    corpus = _ready_shards(data) if data.source == "bin" else _cached(data)
    if data.digest is not None and data.digest.startswith("sha256:") and data.digest != corpus.digest:
        raise InputError(
            f"data {data.source}: tokens on this machine have digest {corpus.digest[:19]}…, the run needs "
            f"{data.digest[:19]}…; use the same files"
            + (" and the same Python version" if data.source == "stdlib" else "")
        )
    return corpus


# --- sources -------------------------------------------------------------------------------------


def _cached(data: DataConfig) -> Corpus:
    documents, spec = _documents(data)
    folder = cache_root() / "corpora" / f"{data.source}-{spec[:16]}"
    if not (folder / "corpus.json").is_file():
        with _writable_cache(), _lock(folder):
            if not (folder / "corpus.json").is_file():  # another process may have been first
                _write_corpus(folder, documents(), data)
    return _open(folder)


Documents = Callable[[], Iterator[tuple[str, bytes]]]


def _documents(data: DataConfig) -> tuple[Documents, str]:
    """A function that yields (name, UTF-8 text) in training order, and a hash that names the result."""
    if data.source == "hf":
        return functools.partial(_hf_documents, data), _spec_hash(data)
    if data.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [p for p in root.rglob("*.py") if "site-packages" not in p.parts and p.is_file()]
    else:
        paths = [p for p in _matches(str(data.path)) if p.is_file()]
        if not paths:
            raise InputError(
                f'data.path "{data.path}" matches no file; give a glob such as "corpus/**/*.txt"'
            )
        root = Path(os.path.commonpath([p.parent for p in paths]))
    # Names decide order and split, so they are relative: a corpus may be moved.
    names = {p.relative_to(root).as_posix(): p for p in paths}
    stat = [[name, p.stat().st_size, p.stat().st_mtime_ns] for name, p in sorted(names.items())]
    spec = hashlib.sha256(json.dumps([_spec_hash(data), str(root), stat]).encode())
    return functools.partial(_read_shuffled, names), spec.hexdigest()


def _read_shuffled(names: dict[str, Path]) -> Iterator[tuple[str, bytes]]:
    for name in sorted(names, key=_rank):
        try:
            yield name, names[name].read_bytes()
        except OSError as error:
            raise InputError(f"{names[name]}: {error.strerror}; make it readable or leave it out") from None


def _hf_documents(data: DataConfig) -> Iterator[tuple[str, bytes]]:
    import datasets  # slow to import, needed only here

    try:
        rows = datasets.load_dataset(data.dataset, revision=data.revision, split="train")
    except Exception as error:  # the library raises many kinds; all mean "cannot be had"
        raise InputError(
            f'data set "{data.dataset}": {type(error).__name__}: {_first_line(error)}'
        ) from error
    if data.text_column not in rows.column_names:
        raise InputError(
            f'data set "{data.dataset}" has no column "{data.text_column}" (columns: {rows.column_names})'
        )
    for index in range(len(rows)):
        yield str(index), rows[index][data.text_column].encode()


def _spec_hash(data: DataConfig) -> str:
    """Of the fields by name, so that a field added later changes no id."""
    fields = [data.source, data.dataset, data.revision, data.text_column, data.tokenizer]
    return hashlib.sha256(json.dumps([*fields, data.val_fraction]).encode()).hexdigest()


def _rank(name: str) -> bytes:
    return hashlib.sha256(SPLIT_SEED + os.fsencode(name)).digest()


def _in_val(name: str, fraction: float) -> bool:
    # A second hash: independent of the order, so that the split does not sit at one end.
    point = int.from_bytes(hashlib.sha256(b"val" + SPLIT_SEED + os.fsencode(name)).digest()[:8], "big")
    return point < fraction * 2**64


# --- tokens --------------------------------------------------------------------------------------


def tokenizer(name: str) -> Callable[[bytes], Tokens]:
    """UTF-8 text to tokens: `bytes` (values 0 to 255) or `gpt2` (BPE, each document ends in <|endoftext|>).

    Raises:
        InputError: GPT-2's vocabulary is neither cached nor downloadable.
    """
    if name == "bytes":
        return lambda text: np.frombuffer(text, np.uint8).astype(np.uint16)
    encoding = gpt2_encoding()

    def encode(text: bytes) -> Tokens:
        tokens = encoding.encode_ordinary(text.decode("utf-8", errors="replace"))
        return np.array([*tokens, encoding.eot_token], np.uint16)

    return encode


def gpt2_encoding() -> Any:
    """tiktoken's GPT-2 encoding; downloaded by tiktoken on first use, then cached by it."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # network errors of several libraries
        raise InputError(
            "GPT-2's vocabulary could not be downloaded "
            f"({type(error).__name__}); connect once, or point TIKTOKEN_CACHE_DIR at a folder that has it"
        ) from error


def _write_corpus(folder: Path, documents: Iterable[tuple[str, bytes]], data: DataConfig) -> None:
    encode = tokenizer(data.tokenizer)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    writers = {split: _ShardWriter(temporary, split) for split in ("train", "val")}
    for name, text in documents:
        if text:
            writers["val" if _in_val(name, data.val_fraction) else "train"].add(encode(text))
    shards = {split: writer.close() for split, writer in writers.items()}
    for split, written in shards.items():
        if not written:
            raise InputError(f"data {data.source}: no tokens in the {split} split; change data.val_fraction")
    manifest = {
        "data": data.model_dump(mode="json", exclude={"digest"}),
        "digest": _corpus_digest(shards),
        "shards": shards,
    }
    (temporary / "corpus.json").write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


class _ShardWriter:
    """Collects tokens and writes a shard whenever SHARD_TOKENS are there."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self._pending: list[Tokens] = []
        self._count = 0
        self._written: list[dict[str, Any]] = []

    def add(self, tokens: Tokens) -> None:
        self._pending.append(tokens)
        self._count += len(tokens)
        while self._count >= SHARD_TOKENS:
            joined = np.concatenate(self._pending)
            self._write(joined[:SHARD_TOKENS])
            self._pending, self._count = [joined[SHARD_TOKENS:]], len(joined) - SHARD_TOKENS

    def close(self) -> list[dict[str, Any]]:
        if self._count:
            self._write(np.concatenate(self._pending))
        return self._written

    def _write(self, tokens: Tokens) -> None:
        path = self.folder / f"{self.split}-{len(self._written):06d}.bin"
        write_shard(path, tokens)
        entry = {
            "name": path.name,
            "tokens": len(tokens),
            "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        }
        self._written.append(entry)


def _corpus_digest(shards: dict[str, list[dict[str, Any]]]) -> str:
    content = json.dumps([[s, [e["sha256"] for e in shards[s]]] for s in ("train", "val")])
    return "sha256:" + hashlib.sha256(content.encode()).hexdigest()


def _open(folder: Path) -> Corpus:
    try:
        manifest = json.loads((folder / "corpus.json").read_text())
        shards = manifest["shards"]
        paths = {split: tuple(folder / e["name"] for e in shards[split]) for split in ("train", "val")}
        tokens = {split: sum(e["tokens"] for e in shards[split]) for split in ("train", "val")}
        digest = str(manifest["digest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}/corpus.json: unreadable ({error}); delete the folder to rebuild it"
        ) from None
    for split, entries in shards.items():
        for path, entry in zip(paths[split], entries, strict=True):
            if shard_tokens(path) != entry["tokens"]:
                raise InputError(f"{path}: not {entry['tokens']} tokens; delete {folder} to rebuild it")
    return Corpus(folder, paths["train"], paths["val"], digest, tokens)


# --- ready shards --------------------------------------------------------------------------------


def _ready_shards(data: DataConfig) -> Corpus:
    """Shards somebody else made: names with "val" in them are validation, all others training."""
    given = expanded(str(data.path))
    paths = _matches(str(given / "*.bin") if given.is_dir() else str(given))
    if not paths:
        raise InputError(f'data.path "{data.path}" holds no .bin shard')
    splits = {
        "val": [p for p in paths if "val" in p.name],
        "train": [p for p in paths if "val" not in p.name],
    }
    for split, members in splits.items():
        if not members:
            raise InputError(
                f'data.path "{data.path}" holds no {split} shard (validation shards have "val" in their name)'
            )
    tokens = {split: sum(shard_tokens(p) for p in members) for split, members in splits.items()}
    digest = _digest_of_ready(splits)
    return Corpus(given, tuple(splits["train"]), tuple(splits["val"]), digest, tokens)


def _digest_of_ready(splits: dict[str, list[Path]]) -> str:
    """Content digest, remembered by size and time of change: hashing 17 GB takes half a minute."""
    every = [p.resolve() for split in ("train", "val") for p in splits[split]]
    key = hashlib.sha256(
        json.dumps([[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in every]).encode()
    ).hexdigest()
    remembered = cache_root() / "digests" / f"{key[:32]}.txt"
    if remembered.is_file():
        return remembered.read_text().strip()
    shards = {
        split: [{"sha256": hashlib.sha256(read_shard(p).tobytes()).hexdigest()} for p in members]
        for split, members in splits.items()
    }
    digest = _corpus_digest(shards)
    with _writable_cache():
        remembered.parent.mkdir(parents=True, exist_ok=True)
        temporary = remembered.with_suffix(f".{os.getpid()}")
        temporary.write_text(digest + "\n")
        temporary.rename(remembered)
    return digest


def write_shard(path: Path, tokens: Tokens) -> None:
    """Write uint16 tokens in the .bin format."""
    header = np.zeros(256, np.int32)
    header[:3] = MAGIC, VERSION, len(tokens)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2").tobytes())
        file.flush()
        os.fsync(file.fileno())


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
    header = np.frombuffer(raw[: len(raw) // 4 * 4], np.int32)
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
        found = int(header[0]) if len(header) else "nothing"
        raise InputError(
            f"{path}: not a token shard (magic {MAGIC} version {VERSION} expected, found {found})"
        )
    tokens = int(header[2])
    if size != HEADER_BYTES + 2 * tokens:
        raise InputError(f"{path}: {size} bytes, but its header promises {HEADER_BYTES + 2 * tokens}")
    return tokens


def read_shard(path: Path) -> Tokens:
    """Memory-mapped tokens of a shard. Raises InputError as `shard_tokens` does."""
    return np.memmap(path, np.dtype("<u2"), "r", offset=HEADER_BYTES, shape=(shard_tokens(path),))


def expanded(path: str) -> Path:
    """`path` with ~ resolved and from the root, as another process in another folder needs it."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:  # no such user
        raise InputError(f'path "{path}": {error}') from None


def _matches(pattern: str) -> list[Path]:
    return sorted(Path(p) for p in glob.glob(str(expanded(pattern)), recursive=True))  # noqa: PTH207


@contextmanager
def _writable_cache() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise InputError(
            f"cannot write the token cache ({reason}); set MMSWEEP_CACHE to a folder with room"
        ) from None


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process prepares, the others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
