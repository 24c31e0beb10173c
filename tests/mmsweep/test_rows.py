"""Reading records: the same rows by every way, no more bytes than are wanted, and no damage unseen."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsweep.objects import DamagedError, DirectoryStore
from mmsweep.rows import GROUP_ROWS, from_parquet, merge, parse, read, to_parquet, to_table
from trainers.records import (
    RECORD_TYPES,
    EvalRecord,
    HeadRecord,
    SpectrumRecord,
    StepRecord,
    encode,
    latest,
    parse_part,
)

RUN = "hetero-s0-0123abcd"
numbers = st.one_of(st.floats(), st.integers(-(2**53), 2**53).map(float))
heads = st.builds(
    HeadRecord,
    *(
        st.just(RUN),
        st.integers(1, 3),
        st.integers(0, 3),
        st.integers(0, 1),
        st.sampled_from(["q", "qk", "é"]),
    ),
    *(st.integers(-1, 1), st.sampled_from([1.0, 2.0, math.nan]), numbers, numbers, numbers),
)


def step(n: int, *, attempt: int = 1, loss: float = 0.5) -> StepRecord:
    return StepRecord(RUN, attempt, n, 64 * n, loss, 1.0, 6e-4, 0.02, 10.0, 6400.0, 1e9 + n)


def spectrum(n: int, matrix: str = "h.0.attn.c_attn") -> SpectrumRecord:
    sigma = [float(v) for v in np.linspace(2, 1, 64) + n]
    return SpectrumRecord(RUN, 1, n, matrix, 0, "attn", "none", sigma, sigma[0], sigma[-1], sigma, 0.0, 1.0)


def same(a: pa.Table, b: pa.Table) -> bool:
    """Equal, NaN to NaN."""
    return a.schema == b.schema and repr(a.to_pylist()) == repr(b.to_pylist())


@settings(deadline=None)
@given(st.lists(heads, max_size=30))
def test_merging_keeps_what_the_plain_loop_keeps(records):
    table, alarms = merge([to_table(records, "heads")], "heads")
    kept, conflicts = latest(records)
    assert same(table, to_table(kept, "heads"))
    assert sum(int(alarm.split()[1]) for alarm in alarms.values()) == len(conflicts)


@settings(deadline=None)
@given(st.lists(heads, max_size=5), st.integers(0, 400))
def test_a_part_is_read_as_it_is_line_by_line(records, cut):
    data = b"".join(map(encode, records))
    data = data[: max(0, len(data) - cut)]
    assert same(parse(data, "heads"), to_table(list(parse_part(data, name="line")), "heads"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{}\n", "line:2: not a record"),
        (b"{\n", "line:2: "),
        (b'"steps"\n', "line:2: not a record"),
        (encode(EvalRecord(RUN, 1, 1, 1, 1.0, 1.0, 1.0)), "holds records that are not steps"),
        (encode(step(2)).replace(b'"step":2,', b""), "line:2: field 'step' is missing"),
        (encode(step(2)).replace(b'"step":2,', b'"step":null,'), "step is missing in 1 rows"),
        (encode(step(2)).replace(b'"loss":0.5', b'"loss":"low"'), "line:2: 'low'"),
    ],
)
def test_a_broken_line_is_named(line, reason):
    with pytest.raises((ValueError, TypeError, KeyError)) as caught:
        parse(encode(step(1)) + line + encode(step(3)), "steps")
    assert reason in str(caught.value)


@pytest.fixture
def stored(tmp_path):
    """A run's Parquet files: 40,000 steps, and spectra of 1,500 matrices at as many steps."""
    objects = DirectoryStore(tmp_path)
    steps = to_table([step(n) for n in range(1, 40_001)], "steps")
    spectra = to_table([spectrum(n) for n in range(1_500)], "spectra")
    for kind, table in (("steps", steps), ("spectra", spectra)):
        objects.put(f"runs/{RUN}/{kind}.parquet", to_parquet(table, {}))
    return objects, {"steps": steps, "spectra": spectra}


class Counting:
    """The same objects through ranges alone; counts the bytes that were asked for."""

    def __init__(self, objects: DirectoryStore) -> None:
        self.objects, self.url, self.bytes = objects, objects.url, 0

    def get(self, key: str) -> bytes:
        data = self.objects.get(key)
        self.bytes += len(data)
        return data

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self.bytes += length
        return Path(self.objects.root, key).read_bytes()[start : start + length]


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("steps", None),
        ("steps", ["step"]),
        ("steps", ["loss", "step"]),
        ("spectra", None),
        ("spectra", ["gram_norm", "sigma"]),
    ],
)
@pytest.mark.parametrize("steps", [None, (1, 1), (600, 700), (-5, 10**9), (5, 4)])
def test_a_part_of_a_table_is_that_part(stored, monkeypatch, kind, columns, steps):
    monkeypatch.setattr("mmsweep.rows.WHOLE", 0)
    objects, tables = stored
    expected = tables[kind]
    if steps:
        inside = [steps[0] <= n <= steps[1] for n in expected["step"].to_pylist()]
        expected = expected.filter(pa.array(inside, pa.bool_()))
    if columns:
        expected = expected.select([name for name in expected.column_names if name in columns])
    entries = objects.entries(f"runs/{RUN}")
    for way in (objects, Counting(objects)):
        found = read(way, entries, kind, columns=columns, steps=steps).table
        assert found.equals(expected)


def test_no_more_is_fetched_than_is_wanted(stored, monkeypatch):
    monkeypatch.setattr("mmsweep.rows.WHOLE", 100_000)
    objects, tables = stored
    entries = objects.entries(f"runs/{RUN}")
    sizes = {entry.key.rpartition("/")[2]: entry.bytes for entry in entries}
    for kind, wanted, most in (
        ("spectra", {"columns": ["step", "sigma_max"]}, 0.2),
        ("spectra", {"steps": (0, 99)}, 0.5),
        ("steps", {"columns": ["step", "loss"], "steps": (1, 10)}, 0.4),
    ):
        counting = Counting(objects)
        read(counting, entries, kind, **wanted)
        assert 0 < counting.bytes < most * sizes[f"{kind}.parquet"]
    assert tables["steps"].num_rows > 2 * GROUP_ROWS
    counting = Counting(objects)
    monkeypatch.setattr("mmsweep.rows.WHOLE", 10**9)
    read(counting, entries, "spectra", columns=["step"])
    assert counting.bytes == sizes["spectra.parquet"]  # one request for small ones


def test_parts_beside_a_parquet_are_merged_with_it(stored):
    objects, _ = stored
    part = b"".join(encode(step(n, attempt=2, loss=9.0)) for n in (39_999, 40_001))
    objects.put(f"runs/{RUN}/attempt-002/steps-000000.jsonl", part)
    entries = objects.entries(f"runs/{RUN}")
    rows = read(objects, entries, "steps", columns=["step", "loss"], steps=(39_998, 40_002))
    assert rows.table.to_pylist() == [
        {"step": 39_998, "loss": 0.5},
        {"step": 39_999, "loss": 9.0},
        {"step": 40_000, "loss": 0.5},
        {"step": 40_001, "loss": 9.0},
    ]
    assert list(rows.alarms.values()) == [
        "steps: 1 row of attempt 2 differ from attempt 1, first at step 39999: loss 0.5, then 9.0"
    ]


def outcome(objects, kind: str) -> pa.Table | str:
    try:
        return read(objects, objects.entries(f"runs/{RUN}"), kind).table
    except DamagedError as error:
        return str(error)


def test_no_flipped_bit_changes_a_row(stored):
    objects, tables = stored
    data = {kind: objects.get(f"runs/{RUN}/{kind}.parquet") for kind in tables}
    draw = random.Random(5)
    caught = 0
    for n in range(300):
        kind = ("steps", "spectra")[n % 2]
        at = draw.randrange(len(data[kind]))
        flipped = bytearray(data[kind])
        flipped[at] ^= 1 << draw.randrange(8)
        objects.put(f"runs/{RUN}/{kind}.parquet", bytes(flipped))
        found = outcome(objects, kind)
        if isinstance(found, str):
            assert found.startswith(f"{objects.url}/runs/{RUN}/{kind}.parquet: damaged")
            assert "\n" not in found
            caught += 1
        else:
            assert found.equals(tables[kind])  # the bit meant nothing
    assert caught > 250


def test_a_table_with_empty_cells_or_without_a_column_is_damaged(tmp_path):
    table = to_table([step(1), step(2)], "steps")
    holes = table.set_column(4, "loss", pa.array([None, 1.0]))
    with pytest.raises(ValueError, match="loss is missing in 1 rows"):
        from_parquet(to_parquet(holes, {}), "steps")
    with pytest.raises(ValueError, match="no column lr"):
        from_parquet(to_parquet(table.drop_columns(["lr"]), {}), "steps")


def test_every_kind_survives_parquet():
    for kind, record in RECORD_TYPES.items():
        values = {"str": "x", "int": 3, "float": math.nan, "list[float]": [1.0, math.inf]}
        made = record(
            **{f.name: values[f.type] for f in record.__dataclass_fields__.values() if f.type in values}
        )
        table = to_table([made], kind)
        assert same(parse(encode(made), kind), table)
        assert json.dumps(from_parquet(to_parquet(table, {"a": "b"}), kind)[1]) == '{"a": "b"}'
        assert same(from_parquet(to_parquet(table, {}), kind)[0], table)
