"""Records as Arrow tables and Parquet: typed, each row once, the same bytes for the same rows.

`read` takes from a store what is wanted of one kind of one run: some columns, some steps.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmsweep.objects import DamagedError, DirectoryStore, Entry, NotFound, ObjectStore
from trainers.records import PART, RECORD_TYPES, Record, decode, latest, parse_part, with_floats


@dataclass(frozen=True)
class Rows:
    table: pa.Table
    alarms: dict[str, str]
    """By kind and pair of attempts; see `_alarms`."""
    parts: list[str]
    """Keys of the parts among its sources."""


_ARROW = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "list[float]": pa.list_(pa.float64())}
_ALARMS = b"mmsweep.alarms"
"""Parquet metadata: the alarms outlive the rows of older attempts."""
GROUP_ROWS, LIST_GROUP_ROWS = 16_384, 512
"""Rows of a row group, the least that can be read; fewer where rows hold lists of numbers."""
WHOLE = 1 << 20
"""Bytes up to which a file is fetched by one request, whatever is wanted of it."""

Steps = tuple[int, int]
"""The first and the last step that are wanted."""


def _schema(kind: str, columns: Collection[str] | None = None) -> pa.Schema:
    """All columns of a kind, or those wanted, in the order of the record's fields."""
    named = [(f.name, _ARROW[str(f.type)]) for f in fields(RECORD_TYPES[kind])]
    return pa.schema([pair for pair in named if columns is None or pair[0] in columns])


def to_table(records: list[Record], kind: str) -> pa.Table:
    if any(record.kind != kind for record in records):
        raise ValueError(f"holds records that are not {kind}")
    schema = _schema(kind)
    return pa.table({n: [getattr(r, n) for r in records] for n in schema.names}, schema=schema)


def parse(data: bytes, kind: str) -> pa.Table:
    """The rows of a part. A torn last line is dropped.

    Raises:
        ValueError, TypeError, RecursionError, pyarrow.ArrowException: damaged, where line by line says.
    """
    whole = data.rfind(b"\n") + 1
    try:
        rows = json.loads(b"[" + data[:whole].rstrip(b"\n").replace(b"\n", b",") + b"]")
        tables = [_from_json(rows, kind)]
        if whole < len(data) and (torn := _torn(data[whole:])):
            tables.append(to_table([torn], kind))
        return pa.concat_tables(tables)
    except (ValueError, KeyError, TypeError, RecursionError, pa.ArrowException):
        # Ten times slower, and it names the line. Lists with NaN or infinities go this way too.
        return _complete(to_table(list(parse_part(data, name="line")), kind))


def _from_json(rows: list[dict[str, Any]], kind: str) -> pa.Table:
    if any(row["kind"] != kind for row in rows):
        raise ValueError(f"holds records that are not {kind}")
    columns = {}
    for field in _schema(kind):
        values = [row[field.name] for row in rows]
        if field.type == pa.float64() and any(isinstance(value, str) for value in values):
            values = with_floats(values)
        columns[field.name] = pa.array(values, field.type)
    return _complete(pa.table(columns, schema=_schema(kind)))


def _torn(line: bytes) -> Record | None:
    try:
        return decode(line)
    except (ValueError, KeyError, TypeError):
        return None


def _complete(table: pa.Table) -> pa.Table:
    empty = [name for name in table.column_names if table[name].null_count]
    if empty:
        raise ValueError(f"{empty[0]} is missing in {table[empty[0]].null_count} rows")
    return table


def merge(tables: list[pa.Table], kind: str) -> tuple[pa.Table, dict[str, str]]:
    """Each row once, ordered by key, and the alarms.

    Rows whose key occurs once, nearly all, stay in Arrow; `latest` sees the others, without their lists.
    """
    table = pa.concat_tables(tables) if tables else _schema(kind).empty_table()
    key = RECORD_TYPES[kind].key
    order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in key]).to_numpy()
    again = _repeats(table.select(list(key)).take(pa.array(order)))  # as the row before
    shared = again | np.append(again[1:], False)
    conflicts: list[tuple[Record, Record]] = []
    if shared.any():
        places = np.sort(order[shared])
        rows = _light_rows(table.take(pa.array(places)), kind)
        position = {id(row): place for row, place in zip(rows, places.tolist(), strict=True)}
        kept, conflicts = latest(rows)
        wanted = np.isin(order, [position[id(row)] for row in kept])
        order = order[~shared | wanted]
    return table.take(pa.array(order)).combine_chunks(), _alarms(conflicts, kind)


def _repeats(keys: pa.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """For each row of a sorted table whether it equals the one before."""
    same = np.ones(keys.num_rows, dtype=bool)
    same[:1] = False
    for column in keys.combine_chunks().columns:
        same[1:] &= pc.equal(column[1:], column[:-1]).to_numpy()
    return same


def _light_rows(table: pa.Table, kind: str) -> list[Record]:
    lists: dict[str, Any] = {f.name: [] for f in table.schema if pa.types.is_list(f.type)}
    names = [name for name in table.schema.names if name not in lists]
    columns = [table[name].to_pylist() for name in names]
    build = RECORD_TYPES[kind]
    return [build(**dict(zip(names, row, strict=True)), **lists) for row in zip(*columns, strict=True)]


def _alarms(conflicts: list[tuple[Record, Record]], kind: str) -> dict[str, str]:
    pairs: dict[str, list[tuple[Record, Record]]] = {}
    for older, newer in conflicts:
        pairs.setdefault(f"{kind} {older.attempt} {newer.attempt}", []).append((older, newer))
    return {pair: _alarm(rows, kind) for pair, rows in pairs.items()}


def _alarm(rows: list[tuple[Record, Record]], kind: str) -> str:
    older, newer = min(rows, key=lambda row: row[0].step)
    values = ((n, getattr(older, n), getattr(newer, n)) for n in older.exact)
    name, before, after = next(v for v in values if repr(v[1]) != repr(v[2]))
    where = f", {older.matrix}" if hasattr(older, "matrix") else ""
    return (
        f"{kind}: {len(rows)} row{'s' if len(rows) > 1 else ''} of attempt {newer.attempt} differ from "
        f"attempt {older.attempt}, first at step {older.step}{where}: {name} {before!r}, then {after!r}"
    )


def to_parquet(table: pa.Table, alarms: dict[str, str]) -> bytes:
    """The same bytes for the same rows."""
    metadata = {_ALARMS: json.dumps(alarms, sort_keys=True)} if alarms else None
    lists = any(pa.types.is_list(field.type) for field in table.schema)
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(metadata),
        buffer,
        compression="zstd",
        write_page_checksum=True,
        row_group_size=LIST_GROUP_ROWS if lists else GROUP_ROWS,
    )
    return buffer.getvalue()


def from_parquet(
    source: bytes | pa.NativeFile,
    kind: str,
    *,
    columns: Collection[str] | None = None,
    steps: Steps | None = None,
) -> tuple[pa.Table, dict[str, str]]:
    """The rows of a Parquet file and its alarms; of the file no more is read than is wanted."""
    file = pa.BufferReader(source) if isinstance(source, bytes) else source
    with pq.ParquetFile(file, page_checksum_verification=True) as file:
        schema = _schema(kind, columns)
        found = file.schema_arrow
        if missing := [name for name in schema.names if name not in found.names]:
            raise ValueError(f"it has no column {missing[0]}")
        alarms = dict(json.loads((found.metadata or {}).get(_ALARMS, b"{}")))
        read = [*schema.names, *(["step"] if steps and "step" not in schema.names else [])]
        groups = [i for i in range(file.num_row_groups) if _overlaps(file.metadata.row_group(i), steps)]
        table = file.read_row_groups(groups, columns=read, use_threads=False)
    if steps:
        table = _between(table, steps)
    return _complete(table.select(schema.names).cast(schema)).combine_chunks(), alarms


def _between(table: pa.Table, steps: Steps) -> pa.Table:
    step = table["step"]
    return table.filter(pc.and_(pc.greater_equal(step, steps[0]), pc.less_equal(step, steps[1])))


def _overlaps(group: Any, steps: Steps | None) -> bool:
    """Whether a row group may hold wanted steps, by the statistics in the file's footer."""
    if steps is None:
        return True
    columns = (group.column(i) for i in range(group.num_columns))
    told = next((c.statistics for c in columns if c.path_in_schema == "step"), None)
    return told is None or not told.has_min_max or (told.min <= steps[1] and told.max >= steps[0])


def read(
    objects: ObjectStore,
    entries: Sequence[Entry],
    kind: str,
    *,
    columns: Collection[str] | None = None,
    steps: Steps | None = None,
) -> Rows:
    """What one run has of a kind, from its Parquet file and the parts that are not in it yet.

    Of a Parquet file alone, only the columns and the row groups that are wanted are read: of a file on
    disk through a memory map, of a large object by ranges. Parts are read whole.

    Args:
        entries: of the run, listed a moment ago.

    Raises:
        NotFound: an object has gone since it was listed; list again.
        DamagedError: an object cannot be read, with its place.
    """
    parts = [e.key for e in entries if (match := PART.search(e.key)) and match[2] == kind]
    tables: list[pa.Table] = []
    alarms: dict[str, str] = {}
    for entry in entries:
        if entry.key.endswith(f"/{kind}.parquet") and entry.key.count("/") == 2:
            with _readable(objects, entry.key):
                source = _source(objects, entry)
                if parts:  # all of it, to be merged
                    table, alarms = from_parquet(source, kind)
                else:
                    table, alarms = from_parquet(source, kind, columns=columns, steps=steps)
            tables.append(table)
    if tables and not parts:
        return Rows(tables[0], alarms, parts)
    for key in parts:
        data = objects.get(key)
        with _readable(objects, key):
            tables.append(parse(data, kind))
    table, fresh = merge(tables, kind)
    if steps:
        table = _between(table, steps)
    return Rows(table.select(_schema(kind, columns).names), {**fresh, **alarms}, parts)


def _source(objects: ObjectStore, entry: Entry) -> pa.NativeFile:
    if isinstance(objects, DirectoryStore):
        try:
            return pa.memory_map(str(objects.root / entry.key))
        except FileNotFoundError:
            raise NotFound(f"{objects.url}/{entry.key}") from None
    if entry.bytes > WHOLE and isinstance(objects, Ranged):
        return pa.PythonFile(_Ranges(objects, entry), mode="r")
    return pa.BufferReader(objects.get(entry.key))


@runtime_checkable
class Ranged(Protocol):
    """A store that can give a part of an object."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start` on, or as many as there are. Raises `NotFound`."""


class _Ranges(io.RawIOBase):
    """An object as a file to read at places, each read one request."""

    def __init__(self, objects: Ranged, entry: Entry) -> None:
        self._objects, self._entry, self._at = objects, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._entry.bytes}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._entry.bytes - self._at)
        size = left if size is None or size < 0 else min(size, left)
        data = self._objects.get_range(self._entry.key, self._at, size) if size else b""
        self._at += len(data)
        return data


@contextmanager
def _readable(objects: ObjectStore, key: str) -> Iterator[None]:
    try:
        yield
    except NotFound:
        raise
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise DamagedError(f"{objects.url}/{key}: damaged ({reason}); move it away") from error


_UNREADABLE = (
    *(ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, OSError),
    pa.ArrowException,
)
