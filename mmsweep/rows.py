"""Records as Arrow tables and Parquet: typed, each row once, the same bytes for the same rows."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainers.records import RECORD_TYPES, Record, latest


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


def _schema(kind: str) -> pa.Schema:
    return pa.schema([(f.name, _ARROW[str(f.type)]) for f in fields(RECORD_TYPES[kind])])


def to_table(records: list[Record], kind: str) -> pa.Table:
    if any(record.kind != kind for record in records):
        raise ValueError(f"holds records that are not {kind}")
    schema = _schema(kind)
    return pa.table({n: [getattr(r, n) for r in records] for n in schema.names}, schema=schema)


def merge(tables: list[pa.Table], kind: str) -> tuple[pa.Table, dict[str, str]]:
    """Each row once, ordered by key, and the alarms.

    Lists (nearly all of the bytes) stay in Arrow: `latest` sees the rows without them.
    """
    table = pa.concat_tables(tables) if tables else _schema(kind).empty_table()
    rows = _light_rows(table, kind)
    position = {id(row): index for index, row in enumerate(rows)}
    kept, conflicts = latest(rows)
    table = table.take(pa.array([position[id(row)] for row in kept], pa.int64())).combine_chunks()
    return table, _alarms(conflicts, kind)


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
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes, kind: str) -> tuple[pa.Table, dict[str, str]]:
    table = pq.read_table(pa.BufferReader(data))
    alarms = dict(json.loads((table.schema.metadata or {}).get(_ALARMS, b"{}")))
    schema = _schema(kind)
    return table.select(schema.names).cast(schema).combine_chunks(), alarms
