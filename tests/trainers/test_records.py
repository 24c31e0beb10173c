"""Records: written line by line, read back exactly, each row once."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers import records
from trainers.records import (
    AttentionRecord,
    CostRecord,
    EvalRecord,
    FlowRecord,
    HeadRecord,
    PartReader,
    PartWriter,
    SpectrumRecord,
    StepRecord,
    UpdateRecord,
)

floats = st.floats(allow_nan=True, allow_infinity=True)


def step(number: int, attempt: int = 1, loss: float = 2.5) -> StepRecord:
    return StepRecord("a-s1-00000000", attempt, number, 64 * number, loss, 1.0, 6e-4, 0.02, 12.0, 5e3, 1e9)


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@given(floats, floats)
def test_any_float_survives_strict_json(loss, norm):
    record = StepRecord("a-s1-00000000", 1, 3, 192, loss, norm, 6e-4, 0.02, 12.0, 5e3, 1e9)
    line = records.encode(record)
    assert b"NaN," not in line.replace(b'"NaN"', b"")  # no bare NaN: other readers refuse it
    back = records.decode(line)
    assert same(back.loss, loss)
    assert same(back.grad_norm, norm)


def test_every_kind_is_read_back_as_it_was_written():
    spectrum = SpectrumRecord(
        "a-s1-00000000",
        2,
        5,
        "h.0.attn.c_attn",
        0,
        "attn",
        "dgram",
        [2.0, math.inf],
        2.0,
        1.0,
        [4.0, 1.0],
        0.1,
        4.1,
    )
    head = ("a-s1-00000000", 1, 5)
    written = (
        step(1),
        EvalRecord(*head, 320, 2.0, math.nan, 1e9),
        spectrum,
        UpdateRecord(*head, "h.0.mlp.c_fc", 0, "mlp", "dgram", 0.05, 1e-4, 1.0, 0.02),
        HeadRecord(*head, 0, "qk", 3, 2.0, 0.5, 4.0, 7.5),
        AttentionRecord(*head, 0, 3, 1e4, 0.1, 0.9, math.nan),
        FlowRecord(*head, "h.0.mlp.c_fc", 0, "mlp", 2.0, 1.0, 0.02, 9.0, 1.5, 0.7),
        CostRecord(*head, 9800.0, math.nan, 210.0, 150.0, 40.0, 5.0, 0.0, 10**9),
    )
    assert tuple(record.kind for record in written) == records.KINDS
    for record in written:
        assert repr(records.decode(records.encode(record))) == repr(record)


@pytest.mark.parametrize("line", [b"{", b"[]", b"{}", b'{"kind": "meals"}', b'{"kind": "steps", "run": "x"}'])
def test_other_lines_are_refused(line):
    with pytest.raises(ValueError, match=r"."):
        records.decode(line)


def test_a_torn_last_line_is_dropped_and_a_broken_one_inside_is_named(tmp_path):
    whole = records.encode(step(1)) + records.encode(step(2))
    path = tmp_path / "steps-000000.jsonl"
    path.write_bytes(whole + records.encode(step(3))[:40])
    assert [r.step for r in records.read_part(path)] == [1, 2]
    path.write_bytes(records.encode(step(1)) + b"{broken\n" + records.encode(step(2)))
    with pytest.raises(ValueError, match=r"steps-000000\.jsonl:2: "):
        list(records.read_part(path))


def test_heads_of_a_step_are_rows_of_their_own():
    keys = [(layer, part, head) for layer in (0, 1) for part in ("k", "q", "qk") for head in (-1, 0)]
    rows = [HeadRecord("a-s1-00000000", a, 5, *key, 2.0, 0.5, 4.0, 7.5) for a in (1, 2) for key in keys]
    kept, conflicts = records.latest(rows)
    assert [(r.layer, r.part, r.head, r.attempt) for r in kept] == [(*key, 2) for key in keys]
    assert conflicts == []


def test_of_two_attempts_the_later_counts_and_a_difference_is_reported():
    rows = [step(1), step(2), step(3, loss=9.0), step(2, attempt=2), step(3, attempt=2)]
    kept, conflicts = records.latest(rows)
    assert [(r.step, r.attempt) for r in kept] == [(1, 1), (2, 2), (3, 2)]
    assert [(a.loss, b.loss) for a, b in conflicts] == [(9.0, 2.5)]


def test_a_reader_follows_a_writer_over_parts(tmp_path):
    writer, reader = PartWriter(tmp_path, 1), PartReader(tmp_path, 1)
    seen = []
    for number in range(1, 10):
        writer.append(step(number))
        if number % 3 == 0:
            writer.roll()
        if number % 2 == 0:
            seen += reader.poll()
    seen += reader.poll()
    assert [r.step for r in seen] == list(range(1, 10))


def test_no_part_is_ever_written_twice(tmp_path):
    for numbers in ((1, 2), (3, 4)):  # the same attempt, opened again
        writer = PartWriter(tmp_path, 1)
        for number in numbers:
            writer.append(step(number))
        writer.roll()
    parts = sorted((tmp_path / "attempt-001").iterdir())
    assert [p.name for p in parts] == ["steps-000000.jsonl", "steps-000001.jsonl"]
    assert [r.step for p in parts for r in records.read_part(p)] == [1, 2, 3, 4]


def test_a_killed_writer_loses_no_acknowledged_row(tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from test_records import step; from trainers.records import PartWriter\n"
        "writer = PartWriter(Path(sys.argv[1]), 1)\n"
        "for number in range(1, 10**9):\n"
        "    writer.append(step(number)); print(number, flush=True)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    )
    acknowledged = 0
    for line in writer.stdout:
        acknowledged = int(line)
        if acknowledged == 500:
            writer.send_signal(signal.SIGKILL)
    writer.wait()
    records.close_parts(tmp_path, 1)
    rows = list(records.read_part(tmp_path / "attempt-001" / "steps-000000.jsonl"))
    assert acknowledged >= 500
    assert [r.step for r in rows[:acknowledged]] == list(range(1, acknowledged + 1))
