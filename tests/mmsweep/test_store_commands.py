"""`mmsweep store`: listing, verification and collection, on a folder and on S3, with damage of every kind."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmsweep import keep
from mmsweep.__main__ import main as mmsweep
from mmsweep.contents import contents, kind_in_run
from mmsweep.s3 import S3Store
from mmsweep.store import DirectoryStore, ObjectStore, RunStore, open_store
from trainers.manifest import write_manifest
from trainers.records import EvalRecord, PartWriter, StepRecord

RUN, OTHER = "hetero-s1-0123abcd", "hetero-s2-0123abcd"
FOREIGN = "runs/notes of mine.txt"


def write_run(folder: Path, run_id: str, *, steps: int = 4, checkpoints: tuple[int, ...] = (2, 4)) -> Path:
    """A local run folder with two parts of each kind, and checkpoints."""
    run_dir = folder / run_id
    writer = PartWriter(run_dir, 1)
    for number in range(1, steps + 1):
        writer.append(StepRecord(run_id, 1, number, 64, 1 / number, 0.5, 1e-3, 2e-2, 12.5, 5e3, 1.7e9))
        writer.append(EvalRecord(run_id, 1, number, 64, 2.1, float("nan"), 1.7e9))
        if number % 2 == 0:
            writer.roll()
    for step in checkpoints:
        checkpoint = run_dir / "checkpoints" / f"{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(bytes([step]) * 1000)
        write_manifest(checkpoint, step=step)
    return run_dir


def model(step: int) -> str:
    """The name in the store of the file that `write_run` makes for a checkpoint."""
    return f"model.safetensors.{hashlib.sha256(bytes([step]) * 1000).hexdigest()[:16]}"


def fill(runs: RunStore, local: Path) -> RunStore:
    """A grid, a finished run with three checkpoints, one under way, and a file of somebody else."""
    cells = [{"run_id": run_id, "arm": "hetero", "seed": seed} for seed, run_id in ((1, RUN), (2, OTHER))]
    runs.put_grid("tiny", "name: tiny\n", {"name": "tiny", "cells": cells})
    runs.keep = 3
    for run_id, steps in ((RUN, (2, 3, 4)), (OTHER, (2, 4))):
        runs.put_config(run_id, {"config": {}})
        runs.ship(run_id, write_run(local, run_id, checkpoints=steps))
    summary = {"status": "completed", "steps": 4, "horizon": 4, "final_val_loss": 2.0}
    runs.put_summary(RUN, {**summary, "rows": runs.compact(RUN)})
    runs.put_status(OTHER, {"status": "running", "attempt": 1, "step": 4, "steps": 8})
    runs.objects.put(FOREIGN, b"do not touch")
    return runs


@pytest.fixture
def filled(runs: RunStore, tmp_path: Path) -> RunStore:
    return fill(runs, tmp_path / "local")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = mmsweep(["store", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def age(store: RunStore, prefix: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything below `prefix` be so much older, by the store's clock."""
    if isinstance(store.objects, DirectoryStore):
        for key in store.objects.list(prefix):
            path = store.objects.root / key
            os.utime(path, (time.time() - seconds, time.time() - seconds))
        return
    real = S3Store.time  # an S3 server dates objects itself: its clock must be ahead
    monkeypatch.setattr(S3Store, "time", lambda objects: real(objects) + seconds)


def test_ls_counts_runs_attempts_and_bytes(filled, store_url, capsys):
    code, out, _ = call(capsys, "ls", store_url)
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert code == 0
    assert rows[RUN][1] == "completed"
    assert rows[OTHER][1:3] == ["lost", "1"]
    held = [entry.bytes for entry in filled.objects.entries("") if entry.key.startswith(f"runs/{OTHER}/")]
    assert rows[OTHER][3] == str(len(held)) == "10"  # config, status, 4 parts, 2 x (model, manifest)
    assert "1 grids, 2 runs" in out
    assert f"left alone: {FOREIGN} (12 B)" in out


def test_entries_are_those_of_the_store(filled):
    found = filled.objects.entries("")
    assert [entry.key for entry in found] == filled.objects.list("")
    for entry in found:
        assert entry.bytes == len(filled.objects.get(entry.key))
        assert abs(entry.modified - time.time()) < 60
    assert abs(filled.objects.time() - time.time()) < 60
    assert filled.objects.list("") == [entry.key for entry in found]


def test_a_whole_store_verifies(filled, store_url, capsys):
    code, out, _ = call(capsys, "verify", store_url)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"left alone: {FOREIGN} (12 B) was not written by mmsweep"
    assert lines[1].endswith(f", {len(filled.objects.list('')) - 1} objects read, all whole")
    assert len(lines) == 2


def _flip(objects: ObjectStore, key: str) -> None:
    data = bytearray(objects.get(key))
    data[len(data) // 2] ^= 1
    objects.put(key, bytes(data))


def _cut(objects: ObjectStore, key: str) -> None:
    objects.put(key, objects.get(key)[:-10])


def _replace(old: bytes, new: bytes) -> Callable[[ObjectStore, str], None]:
    def change(objects: ObjectStore, key: str) -> None:
        data = objects.get(key)
        assert old in data
        objects.put(key, data.replace(old, new, 1))

    return change


def _delete(objects: ObjectStore, key: str) -> None:
    objects.delete(key)


DAMAGE: list[tuple[str, Any, str]] = [
    (f"runs/{RUN}/checkpoints/00000003/{model(3)}", _flip, "SHA-256 does not match"),
    (f"runs/{RUN}/checkpoints/00000003/{model(3)}", _cut, "990 bytes, expected 1000"),
    (f"runs/{RUN}/checkpoints/00000003/{model(3)}", _delete, "missing, and the manifest names it"),
    (f"runs/{RUN}/checkpoints/00000003/manifest.json", _cut, "not a manifest"),
    (f"runs/{RUN}/checkpoints/00000003/manifest.json", _replace(b'"step": 3', b'"step": 4'), "of step 4"),
    (f"runs/{RUN}/steps.parquet", _cut, "damaged"),
    (f"runs/{RUN}/steps.parquet", _delete, "0 rows of steps, its summary counts 4"),
    (f"runs/{RUN}/summary.json", _replace(b'"evals":4', b'"evals":5'), "its summary counts 5"),
    (f"runs/{RUN}/summary.json", _replace(b'"status"', b'"state"'), "summary.json: not an object written"),
    (f"runs/{RUN}/config.json", _delete, "finished, and its config.json is missing"),
    (f"runs/{OTHER}/status.json", _cut, "not JSON"),
    (f"runs/{OTHER}/attempt-001/steps-000000.jsonl", _cut, "steps-000000.jsonl: cut short"),
    (
        f"runs/{OTHER}/attempt-001/steps-000001.jsonl",
        _replace(b'"loss"', b'"lost"'),
        "field 'loss' is missing",
    ),
    (f"runs/{OTHER}/attempt-001/evals-000001.jsonl", _replace(b"hetero-s2", b"hetero-s3"), "of another run"),
    (f"runs/{OTHER}/attempt-001/steps-000000.jsonl", _delete, "steps-000000.jsonl: missing"),
    ("grids/tiny.json", _cut, "not JSON"),
    (f"runs/{OTHER}/leases/0123.json", lambda objects, key: objects.put(key, b"{"), "0123.json: not JSON"),
]


@pytest.mark.parametrize(("key", "change", "said"), DAMAGE)
def test_damage_is_one_line(tmp_path, capsys, key, change, said):
    store = fill(open_store(str(tmp_path / "store")), tmp_path / "local")
    change(store.objects, key)
    code, out, _ = call(capsys, "verify", store.url)
    *problems, foreign, last = out.splitlines()
    assert code == 1
    assert len(problems) == 1, problems
    assert said in problems[0]
    assert problems[0].startswith(store.url)
    assert foreign.startswith("left alone")
    assert last.endswith("1 problem")


def test_all_damage_is_found(filled, store_url, capsys):
    for key, change, _ in (DAMAGE[0], DAMAGE[5], DAMAGE[10], DAMAGE[13]):
        change(filled.objects, key)
    code, out, _ = call(capsys, "verify", store_url)
    assert code == 1
    assert out.splitlines()[-1].endswith("4 problems")
    for key, _, said in (DAMAGE[0], DAMAGE[5], DAMAGE[10], DAMAGE[13]):
        where = key.rsplit("/", 1)[0]
        assert any(where in line and said in line for line in out.splitlines())


UNREAD = (
    "grids/tiny.launches/tiny-1.log",
    "grids/tiny.lease/0123.json",
    "grids/tiny.stop",
    "grids/tiny.yaml",
    "report/index.html",
    f"runs/{OTHER}/attempt-001/rank-0.log",
    f"runs/{OTHER}/checkpoints-bad/00000002-1/manifest.json",
    f"runs/{OTHER}/checkpoints/00000004/state.json.0123456789abcdef",
    f"runs/{OTHER}/checkpoints/00000006/model.safetensors.0123456789abcdef",
    f"runs/{OTHER}/leases/0123.json",
    f"runs/{OTHER}/stop.json",
)
"""What no check of documents, records and checkpoints reads."""


@pytest.mark.s3
def test_every_object_is_read_once_and_compared_with_its_digest(s3_url, tmp_path, capsys):
    store = fill(open_store(s3_url), tmp_path)
    objects = store.objects
    for name in UNREAD:
        objects.put(name, b"{}")
    count = f", {len(objects.list('')) - 1} objects read, "
    code, out, _ = call(capsys, "verify", s3_url)
    assert (code, out.splitlines()[-1].endswith(count + "all whole")) == (0, True)
    for name in UNREAD:
        place = {"Bucket": objects.bucket, "Key": objects.prefix + name}
        written = objects.client.head_object(**place)["Metadata"]
        objects.client.put_object(**place, Body=b"[]", Metadata=written)
    code, out, _ = call(capsys, "verify", s3_url)
    *problems, foreign, last = out.splitlines()
    assert code == 1
    assert sorted(line.split(": damaged (its SHA-256 is ")[0] for line in problems) == [
        f"{s3_url}/{name}" for name in UNREAD
    ]
    assert foreign.startswith("left alone")
    assert last.endswith(f"{count}{len(UNREAD)} problems")


@pytest.mark.s3
def test_the_report_of_a_launch_is_in_the_store(s3_url, tmp_path, monkeypatch, capsys):
    """And nothing that was in the folder before: it may be the user's own."""
    store = fill(open_store(s3_url), tmp_path / "local")
    for run_id in (RUN, OTHER):
        store.put_config(run_id, {"config": {"arm": "hetero", "seed": 1}})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "notes.txt").write_text("mine")
    assert mmsweep(["report", s3_url, "--into-store"]) == 0
    here, there = capsys.readouterr().out.splitlines()[-2:]
    assert (here, there) == ("report/index.html", f"{s3_url}/report/index.html")
    files = {str(path.relative_to(tmp_path)) for path in (tmp_path / "report").rglob("*") if path.is_file()}
    assert set(store.objects.list("report")) == files - {"report/notes.txt"}
    assert store.objects.get("report/index.html") == (tmp_path / here).read_bytes()
    assert call(capsys, "verify", s3_url)[0] == 0


def test_gc_leaves_what_is_needed(filled, store_url, capsys):
    filled.keep = 2
    before = filled.objects.list("")
    code, out, _ = call(capsys, "gc", store_url)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith(f"{RUN}: checkpoint 00000002: the run is finished, and 2 newer are kept (1.")
    assert lines[1].startswith(f"left alone: {FOREIGN}")
    assert lines[2].startswith("2 objects")
    assert lines[2].endswith("--delete deletes them")
    assert filled.objects.list("") == before
    assert call(capsys, "gc", store_url, "--delete")[0] == 0
    gone = set(before) - set(filled.objects.list(""))
    assert gone == {f"runs/{RUN}/checkpoints/00000002/{name}" for name in ("manifest.json", model(2))}
    assert "nothing to delete" in call(capsys, "gc", store_url, "--delete")[1]
    assert call(capsys, "verify", store_url)[0] == 0


def test_gc_can_drop_all_checkpoints_of_finished_runs(filled, store_url, capsys):
    call(capsys, "gc", store_url, "--delete", "--keep", "0")
    left = [key for key in filled.objects.list("") if "/checkpoints/" in key]
    assert left
    assert all(OTHER in key for key in left)
    assert call(capsys, "gc", store_url, "--keep", "-1")[0] == 2


def test_parts_that_a_killed_compaction_left_go(filled, store_url, capsys, tmp_path):
    parts = {
        path.relative_to(tmp_path / "local").as_posix(): path.read_bytes()
        for path in (tmp_path / "local" / RUN).glob("attempt-001/*.jsonl")
    }
    for key, data in parts.items():
        filled.objects.put(f"runs/{key}", data)
    table = filled.table(RUN, "evals")
    # A part with a row that the table lacks is no garbage, nor are the others of its kind.
    extra = StepRecord(RUN, 1, 5, 64, 0.2, 0.5, 1e-3, 2e-2, 12.5, 5e3, 1.7e9)
    writer = PartWriter(tmp_path / "more", 1)
    writer.append(extra)
    writer.roll()
    filled.objects.put(
        f"runs/{RUN}/attempt-001/steps-000002.jsonl",
        (tmp_path / "more" / "attempt-001" / "steps-000000.jsonl").read_bytes(),
    )
    _, out, _ = call(capsys, "gc", store_url, "--delete", "--keep", "9")
    assert f"{RUN}: 2 parts of evals: in evals.parquet already" in out
    assert "steps" not in out
    left = [key for key in filled.objects.list(f"runs/{RUN}") if key.endswith(".jsonl")]
    assert len(left) == 3
    assert all("steps" in key for key in left)
    assert filled.table(RUN, "steps").num_rows == 5
    assert repr(filled.table(RUN, "evals").to_pylist()) == repr(table.to_pylist())


@pytest.mark.parametrize("hours", [23, 25])
def test_incomplete_checkpoints_go_after_a_day(filled, store_url, capsys, monkeypatch, hours):
    filled.objects.delete(f"runs/{OTHER}/checkpoints/00000002/manifest.json")
    age(filled, f"runs/{OTHER}", hours * 3600, monkeypatch)
    _, out, _ = call(capsys, "gc", store_url, "--delete")
    assert ("without a manifest for 25 hours" in out) == (hours == 25)
    assert filled.objects.exists(f"runs/{OTHER}/checkpoints/00000002/{model(2)}") == (hours == 23)
    assert filled.objects.exists(f"runs/{OTHER}/checkpoints/00000004/{model(4)}")


@pytest.mark.parametrize("hours", [23, 25])
def test_files_beside_a_manifest_that_does_not_name_them_go_after_a_day(
    filled, store_url, capsys, monkeypatch, hours
):
    folder = f"runs/{RUN}/checkpoints/00000004"
    filled.objects.put(f"{folder}/state.json.0123456789abcdef", b"{}")
    age(filled, f"runs/{RUN}", hours * 3600, monkeypatch)
    _, out, _ = call(capsys, "gc", store_url, "--delete", "--keep", "3")
    assert (f"{RUN}: 1 files of checkpoint 00000004: not in its manifest (2 B)" in out) == (hours == 25)
    assert len(filled.objects.children(folder)) == (3 if hours == 23 else 2)
    assert call(capsys, "verify", store_url)[0] == 0


def test_a_run_under_way_is_never_touched(filled, store_url, capsys, monkeypatch):
    filled.objects.put(f"runs/{OTHER}/checkpoints-bad/00000003-1/reason.json", b"{}")
    filled.objects.delete(f"runs/{OTHER}/checkpoints/00000002/manifest.json")
    if isinstance(filled.objects, DirectoryStore):  # its heart still beats, however old the rest is
        age(filled, f"runs/{OTHER}", 30 * 3600, monkeypatch)
        filled.put_status(OTHER, {"status": "running", "attempt": 1})
    before = filled.objects.list(f"runs/{OTHER}")
    call(capsys, "gc", store_url, "--delete", "--keep", "0")
    assert filled.objects.list(f"runs/{OTHER}") == before
    age(filled, f"runs/{OTHER}", 30 * 3600, monkeypatch)
    _, out, _ = call(capsys, "gc", store_url, "--delete", "--keep", "0")
    assert f"{OTHER}: checkpoints-bad/00000003-1: did not match its digests (2 B)" in out
    assert f"{OTHER}: checkpoint 00000002: without a manifest" in out
    assert f"{OTHER}: checkpoint 00000004" not in out  # unfinished: it resumes there


def test_a_run_that_was_taken_up_meanwhile_keeps_its_files(filled, monkeypatch):
    filled.objects.delete(f"runs/{OTHER}/checkpoints/00000004/manifest.json")
    age(filled, f"runs/{OTHER}", 30 * 3600, monkeypatch)
    items = keep.garbage(filled, contents(filled))
    assert {item.run_id for item in items} == {RUN, OTHER}
    monkeypatch.undo()  # on S3: the clock is right again, so all is fresh
    filled.put_status(OTHER, {"status": "running", "attempt": 2})
    later = f"runs/{RUN}/checkpoints-bad/00000001-1/reason.json"
    filled.objects.put(later, b"{}")  # nobody has been shown this one
    gone = keep.delete(filled, items)
    assert gone
    assert all(entry.key.startswith(f"runs/{RUN}/checkpoints/00000002/") for entry in gone)
    assert filled.objects.exists(later)
    assert filled.objects.exists(f"runs/{OTHER}/checkpoints/00000004/{model(4)}")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("summary.json", "facts"),
        ("steps.parquet", "tables"),
        ("steps.parquet.bak", None),
        ("attempt-001/steps-000000.jsonl", "parts"),
        ("attempt-001/notes-000000.jsonl", None),
        ("attempt-001/rank-0.log", "logs"),
        ("attempt-001/rank-x.log", None),
        ("stop.json", "facts"),
        ("checkpoints/00000100/model.safetensors", "checkpoints"),
        ("checkpoints/000000100/model.safetensors", None),  # a step has one name
        ("checkpoints/00000100/..", None),
        ("checkpoints/00000100/a/b", None),
        ("checkpoints-bad/00000100-1/reason.json", "quarantined"),
        ("leases/claim.json", "leases"),
        ("", None),
    ],
)
def test_what_mmsweep_writes_below_a_run(name, kind):
    assert kind_in_run(name) == kind


@pytest.mark.parametrize("command", ["ls", "verify", "gc"])
def test_no_store(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for name, said in (("file", "not a folder"), ("nothing", "holds no grid and no run")):
        code, _, err = call(capsys, command, str(tmp_path / name))
        assert code == 2
        assert err.count("\n") == 1
        assert said in err


def test_odd_keys_of_others_do_not_matter(runs, store_url, capsys):
    runs.put_grid("tiny", "name: tiny\n", {"name": "tiny", "cells": []})
    for key in (f"runs/{RUN}/mine.txt", "runs/x/y", "grids/UPPER.yaml", "top", f"runs/{RUN}/steps-1.jsonl"):
        runs.objects.put(key, b"1")
    if isinstance(runs.objects, S3Store):
        for key in (f"runs/{RUN}/attempt-001/a\\b", "a\\b", "[red]b"):
            place = {"Bucket": runs.objects.bucket, "Key": runs.objects.prefix + key}
            runs.objects.client.put_object(**place, Body=b"1")
    code, out, _ = call(capsys, "verify", store_url)
    assert code == 0
    assert out.count("left alone") == (8 if isinstance(runs.objects, S3Store) else 5)
    assert call(capsys, "gc", store_url, "--delete")[0] == 0
    assert len(runs.objects.entries("")) == (10 if isinstance(runs.objects, S3Store) else 7)
