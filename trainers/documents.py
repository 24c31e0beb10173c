"""Where text comes from: files (whole, or a row of JSON Lines or Parquet each) and Hugging Face data sets.

A source yields documents in one fixed order, and can begin anywhere in it.
"""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from trainers.config import DataConfig
from trainers.errors import InputError

SPLIT_SEED = b"mmsweep-split-1"
"""Documents are ordered and split by SHA-256(SPLIT_SEED + name): stable, and no generator state."""

PARQUET_ROWS = 1024
"""Rows decoded at once."""

Position: TypeAlias = tuple[int, int]
"""File and row; of the next document to read."""
Row: TypeAlias = tuple[int, bytes, int]
"""Number, text, and how much of the file has been read."""


@dataclass(frozen=True, slots=True)
class Document:
    name: str
    """Decides the split; relative, so that a corpus may be moved."""
    text: bytes
    """UTF-8."""
    then: Position
    """Where the next document begins."""
    done: int
    """How much of the source's `size` has been read."""


class Files:
    """Local files in the order of their names' hashes."""

    def __init__(self, data: DataConfig, root: Path, paths: list[Path]) -> None:
        names = {p.relative_to(root).as_posix(): p for p in paths}
        stat = [[name, p.stat().st_size, p.stat().st_mtime_ns] for name, p in sorted(names.items())]
        self.files = [(name, names[name]) for name in sorted(names, key=_rank)]
        self.column = data.text_column
        self.spec = hashlib.sha256(json.dumps([spec_hash(data), str(root), stat]).encode()).hexdigest()
        """Names what is read: the files as they are now, and what is to be done with them."""
        self._sizes = [p.stat().st_size for _, p in self.files]
        self.size = sum(self._sizes)
        """Bytes."""

    def documents(self, start: Position) -> Iterator[Document]:
        """All documents from `start` on.

        Raises:
            InputError: an unreadable file or a bad row, with its line.
        """
        before = sum(self._sizes[: start[0]])
        for index, (name, path) in enumerate(self.files):
            if index < start[0]:
                continue
            skip = start[1] if index == start[0] else 0
            if is_table(path):
                for number, text, read in _rows(path, self.column, skip):
                    yield Document(f"{name}:{number}", text, (index, number + 1), before + read)
            elif not skip:
                text = _whole(path)
                yield Document(name, text, (index + 1, 0), before + len(text))
            before += self._sizes[index]


class DataSet:
    """The `train` split of a Hugging Face data set, in its own order. Fetched when first read."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.spec = spec_hash(data)

    @property
    def size(self) -> int:
        """Rows."""
        return len(self._rows)

    @functools.cached_property
    def _rows(self) -> Any:
        import datasets  # slow to import, needed only here

        data = self.data
        try:
            rows = datasets.load_dataset(
                data.dataset, name=data.subset, revision=data.revision, split="train"
            )
        except Exception as error:  # the library raises many kinds; all mean "cannot be had"
            raise InputError(
                f'data set "{data.dataset}": {type(error).__name__}: {_first_line(error)}'
            ) from error
        if data.text_column not in rows.column_names:
            raise InputError(
                f'data set "{data.dataset}" has no column "{data.text_column}" (columns: {rows.column_names})'
            )
        if data.rows is not None and len(rows) != data.rows:
            raise InputError(
                f'data set "{data.dataset}" has {len(rows)} rows at revision "{data.revision}", data.rows '
                f"says {data.rows}; name the revision that has as many, or correct data.rows"
            )
        return rows.select_columns([data.text_column])

    def documents(self, start: Position) -> Iterator[Document]:
        """All documents from `start` on. Raises InputError: it cannot be had, or has a bad row."""
        rows, column = self._rows, self.data.text_column
        number = start[1]
        rest = rows.select(range(number, len(rows))) if number < len(rows) else rows.select([])
        for part in rest.iter(PARQUET_ROWS):
            for value in part[column]:
                text = _text(value, f'data set "{self.data.dataset}" row {number}', column)
                yield Document(str(number), text, (0, number + 1), number + 1)
                number += 1


def find(data: DataConfig) -> Files | DataSet:
    """The documents that a config stands for; nothing is read or fetched yet.

    Raises:
        InputError: no file matches.
    """
    if data.source == "hf":
        return DataSet(data)
    if data.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return Files(data, root, [p for p in _modules(root) if p.is_file()])
    paths = [p for p in matches(str(data.path)) if p.is_file()]
    if not paths:
        raise InputError(f'data.path "{data.path}" matches no file; give a glob such as "corpus/**/*.txt"')
    return Files(data, Path(os.path.commonpath([p.parent for p in paths])), paths)


def _modules(root: Path) -> Iterator[Path]:
    """Python's own: packages that were installed may be many times as many files."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name != "site-packages"]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def spec_hash(data: DataConfig) -> str:
    """Of the fields by name, so that a field added later changes no id."""
    fields = [data.source, data.dataset, data.revision, data.text_column, data.tokenizer, data.val_fraction]
    if data.subset is not None:
        fields.append(data.subset)
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def in_val(name: str, fraction: float) -> bool:
    """Whether the document of this name validates."""
    # A second hash: independent of the order, so that the split does not sit at one end.
    point = int.from_bytes(hashlib.sha256(b"val" + SPLIT_SEED + os.fsencode(name)).digest()[:8], "big")
    return point < fraction * 2**64


def _rank(name: str) -> bytes:
    return hashlib.sha256(SPLIT_SEED + os.fsencode(name)).digest()


# --- files ---------------------------------------------------------------------------------------


def is_table(path: Path) -> bool:
    """Whether a file holds a document in each row, by its name."""
    return path.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))


def _whole(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; make it readable or leave it out") from None


def _rows(path: Path, column: str, skip: int) -> Iterator[Row]:
    """The rows of a file from number `skip` on."""
    if path.name.endswith(".parquet"):
        yield from _parquet_rows(path, column, skip)
        return
    try:
        with path.open("rb") as file:
            lines = gzip.GzipFile(fileobj=file) if path.name.endswith(".gz") else file
            for number, line in enumerate(lines):
                if number >= skip and not line.isspace():
                    yield number, _json_text(line, f"{path}:{number + 1}", column), file.tell()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file ({_first_line(error)}); fetch it again") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; make it readable or leave it out") from None


def _json_text(line: bytes, where: str, column: str) -> bytes:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({_first_line(error)}); correct or remove the line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object; correct or remove the line")
    if column not in row:
        raise InputError(f'{where}: no key "{column}" (keys: {list(row)}); set data.text_column')
    return _text(row[column], where, column)


def _parquet_rows(path: Path, column: str, skip: int) -> Iterator[Row]:
    import pyarrow as pa  # slow to import, needed only here
    import pyarrow.parquet as pq

    size = path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise InputError(f'{path}: no column "{column}" (columns: {names}); set data.text_column')
            number, groups = _first_group(file, skip)
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=[column]):
                for value in batch.column(0).to_pylist():
                    if number >= skip:
                        text = _text(value, f"{path} row {number}", column)
                        yield number, text, size * (number + 1) // file.metadata.num_rows
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a whole Parquet file ({_first_line(error)}); fetch it again") from None


def _first_group(file: Any, skip: int) -> tuple[int, list[int]]:
    """Number of the first row to decode, and the row groups from there on."""
    first, group = 0, 0
    while group < file.num_row_groups and first + file.metadata.row_group(group).num_rows <= skip:
        first += file.metadata.row_group(group).num_rows
        group += 1
    return first, list(range(group, file.num_row_groups))


def _text(value: Any, where: str, column: str) -> bytes:
    if not isinstance(value, str):
        raise InputError(
            f'{where}: "{column}" is {type(value).__name__}, not text; set data.text_column or remove the row'
        )
    return value.encode("utf-8", errors="replace")  # JSON may hold half of a surrogate pair


# --- paths ---------------------------------------------------------------------------------------


def expanded(path: str) -> Path:
    """`path` with ~ resolved and from the root, as another process in another folder needs it."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:  # no such user
        raise InputError(f'path "{path}": {error}') from None


def matches(pattern: str) -> list[Path]:
    """Files and folders that a glob matches, each once, sorted.

    Raises:
        InputError: a URL.
    """
    if "://" in pattern:
        raise InputError(
            f'data.path "{pattern}": runs read local files; fetch it with `mmsweep data prepare --source … '
            f'--path "{pattern}" --out DIR`, then use source: bin and path: DIR'
        )
    found = glob.glob(str(expanded(pattern)), recursive=True)  # noqa: PTH207
    return sorted({Path(p) for p in found})


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
