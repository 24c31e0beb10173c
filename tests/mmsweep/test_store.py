"""One suite over both kinds of store, with crashes at every write."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mmsweep.objects import Entry
from mmsweep.s3 import S3Store
from mmsweep.store import (
    DirectoryStore,
    NotFound,
    ObjectStore,
    RunStore,
    StoreError,
    check_key,
    open_store,
    stored_name,
)
from trainers.errors import InputError
from trainers.manifest import verify, write_manifest
from trainers.records import (
    KINDS,
    RECORD_TYPES,
    EvalRecord,
    PartWriter,
    Record,
    SpectrumRecord,
    StepRecord,
    UpdateRecord,
    encode,
)

RUN = "hetero-s1-0123abcd"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def step(number: int, *, attempt: int = 1, loss: float | None = None) -> StepRecord:
    loss = 1 / number if loss is None else loss
    return StepRecord(RUN, attempt, number, 64 * number, loss, 0.5, 1e-3, 2e-2, 12.5, 5e3, 1.7e9 + number)


def evaluation(number: int, *, attempt: int = 1, val_loss: float = 2.0) -> EvalRecord:
    return EvalRecord(RUN, attempt, number, 64 * number, 2.1, val_loss, 1.7e9 + number)


def spectrum(number: int, matrix: str, *, attempt: int = 1) -> SpectrumRecord:
    sigma = [3.0, math.inf, math.nan]
    return SpectrumRecord(
        RUN, attempt, number, matrix, 0, "attn", "stiefel", sigma, 3.0, 0.1, [1.0], 0.5, float("nan")
    )


def update(number: int, matrix: str, *, attempt: int = 1) -> UpdateRecord:
    return UpdateRecord(RUN, attempt, number, matrix, 0, "attn", "stiefel", 0.05, 1e-4, 1.0, 0.02)


def write_parts(run_dir: Path, attempt: int, *parts: list[Record]) -> None:
    writer = PartWriter(run_dir, attempt)
    for part in parts:
        for record in part:
            writer.append(record)
        writer.roll()


def write_checkpoint(run_dir: Path, number: int, *, manifest: bool = True) -> Path:
    folder = run_dir / "checkpoints" / f"{number:08d}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(hashlib.sha256(str(number).encode()).digest() * 100)
    (folder / "state.json").write_text(f'{{"step":{number}}}')
    if manifest:
        write_manifest(folder, step=number)
    return folder


def in_store(checkpoint: Path, file: str) -> str:
    """The name that a file of a local checkpoint has in the store."""
    return file if file == "manifest.json" else stored_name(file, verify(checkpoint)["files"][file])


def rows(table: pa.Table) -> str:
    return repr(table.to_pylist())  # repr, since NaN is not equal to itself


# Objects


def test_round_trip(objects: ObjectStore) -> None:
    objects.put("a/b.json", b"\x00\xff")
    assert objects.get("a/b.json") == b"\x00\xff"
    objects.put("a/b.json", b"")
    assert objects.get("a/b.json") == b""
    assert objects.exists("a/b.json")
    objects.delete("a/b.json")
    objects.delete("a/b.json")
    assert not objects.exists("a/b.json")
    assert objects.list("") == []


def test_an_object_that_is_not_there(objects: ObjectStore, tmp_path: Path) -> None:
    objects.put("a/b", b"1")
    for key in ("nothing", "a/nothing", "a/b/below", "a"):
        with pytest.raises(NotFound, match=f"{key}: not found"):
            objects.get(key)
        with pytest.raises(NotFound):
            objects.get_file(key, tmp_path / "file")
        with pytest.raises(NotFound):
            objects.move("nothing", "elsewhere")
        assert not objects.exists(key)
        objects.delete(key)
    assert objects.list("") == ["a/b"]
    assert not (tmp_path / "file").exists()
    assert objects.list("nothing") == objects.children("nothing") == objects.children("a/b") == []


def test_files_of_several_parts(objects: ObjectStore, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 20  # above the size from which S3 uploads are split
    (tmp_path / "in").write_bytes(data)
    objects.put_file("big", tmp_path / "in")
    objects.get_file("big", tmp_path / "deep" / "out")
    assert (tmp_path / "deep" / "out").read_bytes() == data
    with pytest.raises(FileNotFoundError):
        objects.put_file("other", tmp_path / "nothing")
    assert objects.list("") == ["big"]


def test_move(objects: ObjectStore) -> None:
    objects.put("a/b/c", b"1")
    objects.move("a/b/c", "d/e")
    assert objects.list("") == ["d/e"]
    assert objects.get("d/e") == b"1"
    assert objects.children("") == ["d"]


def test_listing_is_sorted_and_knows_folders(objects: ObjectStore) -> None:
    for key in ("runs/b/x", "runs/a/y/z", "runs/a/x", "runs/ab/x", "top", "runs/a.json"):
        objects.put(key, b"")
    assert objects.list("runs/a") == objects.list("runs/a/") == ["runs/a/x", "runs/a/y/z"]
    assert objects.children("runs") == ["a", "a.json", "ab", "b"]
    assert objects.children("runs/a/") == ["x", "y"]
    assert objects.children("") == ["runs", "top"]
    expected = ["runs/a.json", "runs/a/x", "runs/a/y/z", "runs/ab/x", "runs/b/x", "top"]
    assert objects.list("") == expected


@pytest.mark.s3
def test_listing_of_more_than_one_page(s3_url: str) -> None:
    runs = open_store(s3_url)
    assert isinstance(runs.objects, S3Store)

    def short_pages(params: dict[str, Any], **_: Any) -> None:
        params["MaxKeys"] = 2

    runs.objects.client.meta.events.register("provide-client-params.s3.ListObjectsV2", short_pages)
    keys = [f"runs/{number}/{name}" for number in range(5) for name in "ab"]
    for key in keys:
        runs.objects.put(key, b"")
    assert runs.objects.list("runs") == keys
    assert runs.objects.children("runs") == ["0", "1", "2", "3", "4"]


BAD_KEYS = ["", "/etc/passwd", "../up", "a/../b", "a//b", "a/", "a/./b", "..", "a\\..\\b", "a\0b", ".tmp-x/a"]


def test_keys_stay_inside(objects: ObjectStore, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    uses: list[Callable[[str], object]] = [
        check_key,
        objects.get,
        lambda key: objects.put(key, b""),
        lambda key: objects.put_file(key, file),
        lambda key: objects.get_file(key, tmp_path / "out"),
        objects.exists,
        objects.delete,
        lambda key: objects.move(key, "a"),
        lambda key: objects.move("a", key),
    ]
    for key in BAD_KEYS:
        for use in uses:
            with pytest.raises(ValueError, match="not a plain key"):
                use(key)
    for prefix in ("..", "a/../..", "/etc", "a//b"):
        with pytest.raises(ValueError, match="not a plain key"):
            objects.list(prefix)
        with pytest.raises(ValueError, match="not a plain key"):
            objects.children(prefix)
    assert objects.list("") == []


def test_a_reader_never_sees_half_an_object(objects: ObjectStore) -> None:
    size = 300_000
    objects.put("runs/status.json", b"0" * size)
    over = threading.Event()

    def write() -> None:
        number = 0
        while not over.is_set():
            number += 1
            objects.put("runs/status.json", str(number % 10).encode() * size)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    seen = set()
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        data = objects.get("runs/status.json")
        assert len(data) == size
        assert data == data[:1] * size
        assert objects.list("") == ["runs/status.json"]
        seen.add(data[:1])
    over.set()
    for writer in writers:
        writer.join()
    assert len(seen) > 1


def test_a_killed_writer_leaves_the_old_object(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mmsweep.store import DirectoryStore\n"
        "store = DirectoryStore(Path(sys.argv[1]))\n"
        "for n in range(10**9):\n"
        "    store.put('runs/a', str(n % 10).encode() * 3_000_000); print(n, flush=True)\n"
    )
    objects = DirectoryStore(tmp_path)
    for delay in (0.003, 0.011):
        command = [sys.executable, "-c", script, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline()
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
        data = objects.get("runs/a")
        assert data == data[:1] * 3_000_000
        assert objects.list("") == ["runs/a"]
        assert objects.children("runs") == ["a"]


def test_emptied_folders_vanish_while_others_write(tmp_path: Path) -> None:
    """Deleting removes empty folders; a writer in the same folder must not trip over it."""
    objects = DirectoryStore(tmp_path / "root")

    def churn(name: str) -> None:
        for _ in range(300):
            objects.put(f"a/b/{name}", b"1")
            objects.delete(f"a/b/{name}")

    failures: list[BaseException] = []

    def watched(name: str) -> None:
        try:
            churn(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=watched, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert objects.children("") == []


# URLs and messages


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("./results").url == str(tmp_path / "results")
    assert open_store(f"file://{tmp_path}/a%20b").url == str(tmp_path / "a b")
    assert open_store("s3://bucket/a/b/").url == "s3://bucket/a/b"
    assert open_store("s3://bucket").url == "s3://bucket"
    assert open_store("odd #1?").url == str(tmp_path / "odd #1?")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "url", ["", "s3://", "s3://B/x", "s3:///x", "s3://bucket/a/../b", "gs://bucket/x", "file://host/x"]
)
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(InputError, match=r"write|use|remove|slashes") as caught:
        open_store(url)
    assert "\n" not in str(caught.value)
    assert url in str(caught.value)


def test_the_url_opens_the_same_store_elsewhere(runs: RunStore) -> None:
    runs.put_config(RUN, {"config": {}})
    assert open_store(runs.url).config(RUN) == {"config": {}}


def complaint(url: str) -> str:
    with pytest.raises(StoreError) as caught:
        open_store(url).run_ids()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(url)
    return message


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "not a folder" in complaint(str(tmp_path / "file"))
    with pytest.raises(StoreError, match="not a folder"):
        open_store(str(tmp_path / "file")).put_config(RUN, {})


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "runs" / RUN / "config.json" / "x").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"config\.json: a file or folder is in the way"):
        open_store(str(tmp_path)).put_config(RUN, {})
    assert open_store(str(tmp_path)).objects.list("") == []


def test_a_write_that_fails_half_way(tmp_path: Path) -> None:
    """As on a full disk; here the process may write no file above 1,000 bytes."""
    script = (
        "import resource, signal, sys; from mmsweep.store import StoreError, open_store\n"
        "objects = open_store(sys.argv[1]).objects\n"
        "objects.put('runs/a', b'old')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    objects.put('runs/a', b'new' * 1000)\n"
        "except StoreError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{tmp_path}/runs/a: File too large; check that the disk has room")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"]
    assert (tmp_path / "runs" / "a").read_bytes() == b"old"


@pytest.mark.s3
def test_a_missing_bucket(s3_server: str) -> None:
    message = complaint("s3://no-such-bucket/x")
    assert "there is no such bucket; create it (aws s3 mb s3://no-such-bucket)" in message
    store = open_store("s3://no-such-bucket/x")
    with pytest.raises(StoreError, match="no such bucket"):
        store.put_config(RUN, {})
    with pytest.raises(StoreError, match="no such bucket"):
        store.config(RUN)
    with pytest.raises(StoreError, match="no such bucket"):
        store.objects.exists("x")


@pytest.mark.s3
def test_a_dead_endpoint(aws: pytest.MonkeyPatch, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    aws.setenv("AWS_ENDPOINT_URL", endpoint)
    message = complaint("s3://bucket/x")
    assert f"{endpoint} does not answer" in message
    assert "check AWS_ENDPOINT_URL" in message
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StoreError, match="does not answer"):
        open_store("s3://bucket/x").objects.put_file("a", tmp_path / "file")
    with pytest.raises(StoreError, match="does not answer"):
        open_store("s3://bucket/x").objects.get_file("a", tmp_path / "other")


@pytest.mark.s3
def test_an_endpoint_that_is_no_url(aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    assert "Invalid endpoint" in complaint("s3://bucket/x")


@pytest.mark.s3
def test_no_credentials(aws: pytest.MonkeyPatch) -> None:
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.delenv("AWS_SECRET_ACCESS_KEY")
    message = complaint("s3://bucket/x")
    assert "no credentials" in message
    assert "aws configure" in message


@pytest.mark.s3
@pytest.mark.parametrize(
    ("status", "code", "fix"),
    [
        (403, "AccessDenied", "s3:PutObject"),
        (403, "InvalidAccessKeyId", "credentials are not valid"),
        (403, "SignatureDoesNotMatch", "credentials are not valid"),
        (400, "ExpiredToken", "sign in again"),
        (403, "RequestTimeTooSkewed", "set its clock"),
        (404, "NoSuchBucket", "create it"),
        (503, "SlowDown", "try again later"),
        (500, "InternalError", "try again later"),
        (418, "SomethingNew", "SomethingNew was the answer"),
    ],
)
def test_what_the_service_refuses(s3_answers: Any, status: int, code: str, fix: str, tmp_path: Path) -> None:
    s3_answers.answers = [(status, code)]
    store = open_store("s3://bucket/x")
    (tmp_path / "file").write_bytes(b"x")
    for use in (
        store.run_ids,
        lambda: store.put_status(RUN, {}),
        lambda: store.status(RUN),
        lambda: store.objects.put_file("a", tmp_path / "file"),
    ):
        with pytest.raises(StoreError, match=fix) as caught:
            use()
        assert str(caught.value).startswith("s3://bucket/x: ")
        assert "\n" not in str(caught.value)


@pytest.mark.s3
def test_a_short_outage_goes_unnoticed(s3_answers: Any, aws: pytest.MonkeyPatch) -> None:
    aws.delenv("AWS_MAX_ATTEMPTS")
    s3_answers.answers = [(503, "SlowDown"), (500, "InternalError"), b'{"status":"running","attempt":3}']
    assert open_store("s3://bucket/x").status(RUN) == {"status": "running", "attempt": 3}
    assert s3_answers.requests == 3


# Grids and the documents of a run


def test_grids(runs: RunStore, objects: ObjectStore) -> None:
    assert runs.grids() == []
    paper = {"schema": 1, "name": "paper", "cells": []}
    runs.put_grid("paper", "name: paper\n", paper)
    runs.put_grid("a.json", "name: a.json\n", {"schema": 2})
    objects.put("grids/Not a name.json", b"{}")
    assert runs.grids() == ["a.json", "paper"]
    assert runs.grid_index("paper") == paper
    assert objects.get("grids/paper.yaml") == b"name: paper\n"
    with pytest.raises(NotFound):
        runs.grid_index("other")


SUMMARY = {"status": "completed", "steps": 3, "horizon": 3, "final_val_loss": math.nan, "attempts": 9}


def test_documents(runs: RunStore) -> None:
    assert runs.config(RUN) is runs.status(RUN) is runs.summary(RUN) is None
    runs.put_config(RUN, {"schema": 1, "config": {"arm": "Infinity"}})
    runs.put_status(RUN, {"status": "running", "val_loss": math.inf})
    runs.put_summary(RUN, {**SUMMARY, "verdict": {"rules": [{"value": -math.inf}]}})
    assert runs.config(RUN) == {"schema": 1, "config": {"arm": "Infinity"}}
    assert runs.status(RUN) == {"status": "running", "val_loss": math.inf}
    summary = runs.summary(RUN)
    assert summary is not None
    assert math.isnan(summary["final_val_loss"])
    assert summary["verdict"]["rules"][0]["value"] == -math.inf


BAD_NAMES = ["", "..", "a/b", "../x", "A", "a" * 65, "a..b", "a\n", "ü", "-a"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_are_checked(tmp_path: Path, name: str) -> None:
    runs = open_store(str(tmp_path / "store"))
    uses: list[Callable[[], object]] = [
        lambda: runs.put_grid(name, "", {}),
        lambda: runs.grid_index(name),
        lambda: runs.config(f"{name}/x-s1-0123abcd"),
        lambda: runs.put_status(f"{name}-s1-0123abc", {}),
        lambda: runs.ship(f"{name}/", tmp_path),
        lambda: runs.table(name, "steps"),
    ]
    for use in uses:
        with pytest.raises(InputError, match="is not a"):
            use()
    assert not (tmp_path / "store").exists()


def test_foreign_things_among_the_runs(runs: RunStore, objects: ObjectStore) -> None:
    for key in ("runs/.DS_Store", "runs/notes.txt", "runs/Backup/x", "runs/a..b-s1-0123abcd/x"):
        objects.put(key, b"\xff")
    objects.put(f"runs/{RUN}/notes", b"")
    assert runs.run_ids() == [RUN]
    assert runs.config(RUN) is None


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[1]", b"null", b'{"a":', b"[" * 100_000, b'{"a": 1}'])
def test_garbage_documents(tmp_path: Path, data: bytes) -> None:
    runs = open_store(str(tmp_path))
    for name, read in (("config", runs.config), ("status", runs.status), ("summary", runs.summary)):
        runs.objects.put(f"runs/{RUN}/{name}.json", data)
        with pytest.raises(
            StoreError,
            match=rf"^{tmp_path}/runs/{RUN}/{name}\.json: not an object written by .*away$",
        ):
            read(RUN)
    runs.objects.put("grids/paper.json", data)
    with pytest.raises(StoreError, match=r"grids/paper\.json"):
        runs.grid_index("paper")


def test_next_attempt(runs: RunStore, objects: ObjectStore) -> None:
    assert runs.next_attempt(RUN) == 1
    objects.put(f"runs/{RUN}/attempt-002/steps-000000.jsonl", b"")
    objects.put(f"runs/{RUN}/attempt-junk/x", b"")
    assert runs.next_attempt(RUN) == 3
    runs.put_status(RUN, {"status": "running", "attempt": 7})
    assert runs.next_attempt(RUN) == 8
    runs.put_summary(RUN, SUMMARY)
    assert runs.next_attempt(RUN) == 10
    objects.put(f"runs/{RUN}/status.json", b"garbage")  # it is rewritten by the next attempt
    assert runs.next_attempt(RUN) == 10


# Ship and restore


def test_ship_sends_what_is_new_and_closed(runs: RunStore, objects: ObjectStore, tmp_path: Path) -> None:
    local = tmp_path / "local"
    assert runs.ship(RUN, local) == 0
    write_parts(local, 1, [step(1), evaluation(1)], [step(2)])
    (local / "attempt-001" / "steps-000002.jsonl.open").write_bytes(encode(step(3)))
    (local / "attempt-001" / "notes.jsonl").write_text("x")
    checkpoint = write_checkpoint(local, 2)
    write_checkpoint(local, 3, manifest=False)
    assert runs.ship(RUN, local) == 6
    base = f"runs/{RUN}"
    expected = [
        f"{base}/attempt-001/evals-000000.jsonl",
        f"{base}/attempt-001/steps-000000.jsonl",
        f"{base}/attempt-001/steps-000001.jsonl",
        f"{base}/checkpoints/00000002/manifest.json",
        f"{base}/checkpoints/00000002/{in_store(checkpoint, 'model.safetensors')}",
        f"{base}/checkpoints/00000002/{in_store(checkpoint, 'state.json')}",
    ]
    assert objects.list("") == expected
    assert runs.ship(RUN, local) == 0
    assert RunStore(objects).ship(RUN, local) == 0
    write_manifest(local / "checkpoints" / "00000003")
    assert RunStore(objects).ship(RUN, local) == 3


def test_ship_keeps_the_newest_checkpoints(runs: RunStore, objects: ObjectStore, tmp_path: Path) -> None:
    def stored() -> list[str]:
        return objects.children(f"runs/{RUN}/checkpoints")

    for number in (1, 2, 3):
        write_checkpoint(tmp_path, number)
        runs.ship(RUN, tmp_path)
    assert stored() == ["00000002", "00000003"]
    assert runs.ship(RUN, tmp_path) == 0
    # Left by a crash in mid-upload, and one that another process is uploading now.
    objects.put(f"runs/{RUN}/checkpoints/00000001/state.json", b"")
    objects.put(f"runs/{RUN}/checkpoints/00000009/state.json", b"")
    objects.put(f"runs/{RUN}/checkpoints/notes/x", b"")
    write_checkpoint(tmp_path, 4)
    assert RunStore(objects, keep=1).ship(RUN, tmp_path) == 3
    assert stored() == ["00000004", "00000009", "notes"]


def test_an_old_local_folder_changes_nothing(runs: RunStore, objects: ObjectStore, tmp_path: Path) -> None:
    for number in (3, 4):
        write_checkpoint(tmp_path / "new", number)
    write_checkpoint(tmp_path / "old", 1)
    assert runs.ship(RUN, tmp_path / "new") == 6
    before = objects.list("")
    assert open_store(runs.url).ship(RUN, tmp_path / "old") == 0
    assert objects.list("") == before


def test_a_damaged_local_checkpoint_is_not_shipped(runs: RunStore, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    folder = write_checkpoint(tmp_path, 2)
    flip(folder / "model.safetensors")
    store = RunStore(runs.objects, keep=1)
    assert store.ship(RUN, tmp_path) == 3  # the one before, in its place
    assert store.ship(RUN, tmp_path) == 0
    assert runs.restore(RUN, tmp_path / "elsewhere") == 1


def test_a_checkpoint_of_the_same_step_replaces_the_other(runs: RunStore, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", 1)
    other = write_checkpoint(tmp_path / "b", 1, manifest=False)
    (other / "state.json").write_text("another")
    write_manifest(other, step=1)
    assert runs.ship(RUN, tmp_path / "a") == 3
    assert open_store(runs.url).ship(RUN, tmp_path / "b") == 3
    assert runs.restore(RUN, tmp_path / "c") == 1
    assert (tmp_path / "c" / "checkpoints" / "00000001" / "state.json").read_text() == "another"


class Stalls(DirectoryStore):
    """Its last write, of a checkpoint's state, waits for `go`; then the process ends."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked, self.go = threading.Event(), threading.Event()

    def put_file(self, key: str, path: Path) -> None:
        if "state.json" in key:
            self.asked.set()
            assert self.go.wait(60)
        super().put_file(key, path)

    def put(self, key: str, data: bytes) -> None:
        raise StoreError("no manifest any more")


def test_an_attempt_that_lost_the_run_spoils_no_checkpoint_of_the_next(tmp_path: Path) -> None:
    """Both ship the same step; what the first still had under way arrives last."""
    for attempt in ("first", "second"):
        folder = write_checkpoint(tmp_path / attempt, 100, manifest=False)
        for path in folder.iterdir():
            path.write_text(f"{path.name} of the {attempt} attempt")
        write_manifest(folder, step=100)
    stalled, runs = Stalls(tmp_path / "store"), open_store(str(tmp_path / "store"))

    def ship_in_vain() -> None:
        with pytest.raises(StoreError, match="no manifest"):
            RunStore(stalled).ship(RUN, tmp_path / "first")

    late = threading.Thread(target=ship_in_vain)
    late.start()
    assert stalled.asked.wait(60)
    assert runs.ship(RUN, tmp_path / "second") == 3
    stalled.go.set()
    late.join()
    assert len(runs.objects.children(f"runs/{RUN}/checkpoints/00000100")) == 5
    assert runs.restore(RUN, tmp_path / "third") == 100
    restored = tmp_path / "third" / "checkpoints" / "00000100" / "state.json"
    assert restored.read_text() == "state.json of the second attempt"


def test_a_checkpoint_of_an_older_store_is_restored(
    runs: RunStore, objects: ObjectStore, tmp_path: Path
) -> None:
    """Its files have the names that they have here."""
    folder = write_checkpoint(tmp_path / "here", 2)
    for path in folder.iterdir():
        objects.put_file(f"runs/{RUN}/checkpoints/00000002/{path.name}", path)
    assert runs.saved_step(RUN) == 2
    assert runs.ship(RUN, tmp_path / "here") == 0
    assert runs.restore(RUN, tmp_path / "there") == 2
    for number in (3, 4):
        write_checkpoint(tmp_path / "here", number)
    runs.ship(RUN, tmp_path / "here")
    assert objects.children(f"runs/{RUN}/checkpoints") == ["00000003", "00000004"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage(objects: ObjectStore, key: str, how: str) -> None:
    data = bytearray(objects.get(key))
    if how == "flipped":
        data[len(data) // 2] ^= 1
    objects.put(key, bytes(data[:-9] if how == "truncated" else data))
    if how == "missing":
        objects.delete(key)


def test_restore(runs: RunStore, tmp_path: Path) -> None:
    assert runs.restore(RUN, tmp_path / "there") is None
    for number in (1, 2):
        write_checkpoint(tmp_path / "here", number)
    runs.ship(RUN, tmp_path / "here")
    (tmp_path / "there" / "checkpoints" / "00000002").mkdir(parents=True)  # cut off while it was saved
    assert open_store(runs.url).restore(RUN, tmp_path / "there") == 2
    assert verify(tmp_path / "there" / "checkpoints" / "00000002")["step"] == 2
    assert [p.name for p in (tmp_path / "there" / "checkpoints").iterdir()] == ["00000002"]


@pytest.mark.parametrize(
    ("file", "how", "reason"),
    [
        ("model.safetensors", "flipped", "model.safetensors: SHA-256 does not match the manifest"),
        ("model.safetensors", "truncated", "model.safetensors: 3191 bytes, expected 3200"),
        ("state.json", "missing", "state.json: not found"),
        ("manifest.json", "truncated", "manifest.json: not a manifest"),
        ("manifest.json", "garbage", "manifest.json: not a manifest"),
        ("manifest.json", "escape", "manifest.json: not a manifest"),
    ],
)
def test_restore_falls_back(
    runs: RunStore, objects: ObjectStore, tmp_path: Path, file: str, how: str, reason: str
) -> None:
    here = [write_checkpoint(tmp_path / "here", number) for number in (1, 2)]
    runs.ship(RUN, tmp_path / "here")
    key = f"runs/{RUN}/checkpoints/00000002/{in_store(here[1], file)}"
    reason = reason.replace("state.json: not", f"{in_store(here[1], 'state.json')}: not")
    if how == "garbage":
        objects.put(key, b"\xff")
    elif how == "escape":
        objects.put(key, b'{"version":1,"files":{"../../x":{"bytes":1,"sha256":""}}}')
    else:
        damage(objects, key, how)
    assert runs.restore(RUN, tmp_path / "there") == 1
    assert verify(tmp_path / "there" / "checkpoints" / "00000001")["step"] == 1
    assert not (tmp_path / "there" / "checkpoints" / "00000002").exists()
    assert objects.children(f"runs/{RUN}/checkpoints") == ["00000001"]
    bad = f"runs/{RUN}/checkpoints-bad/00000002-1"
    assert f'"reason":"{reason}' in objects.get(f"{bad}/reason.json").decode().replace(
        runs.url + "/", ""
    ).replace(f"runs/{RUN}/checkpoints/00000002/", "")
    assert f"{bad}/manifest.json" in objects.list(bad)
    # The step is reached again, bit for bit the same, and now counts.
    assert runs.ship(RUN, tmp_path / "here") == 3
    assert runs.restore(RUN, tmp_path / "again") == 2


def test_restore_prefers_a_good_local_checkpoint(runs: RunStore, tmp_path: Path) -> None:
    """After an outage the disk may be ahead of the store."""
    for number in (1, 2):
        write_checkpoint(tmp_path, number)
    runs.ship(RUN, tmp_path)
    newer = write_checkpoint(tmp_path, 3)
    assert runs.restore(RUN, tmp_path) == 3
    flip(newer / "state.json")
    flip(tmp_path / "checkpoints" / "00000002" / "state.json")
    assert runs.restore(RUN, tmp_path) == 2
    assert verify(tmp_path / "checkpoints" / "00000002")["step"] == 2
    assert sorted(p.name for p in (tmp_path / "checkpoints-bad").iterdir()) == ["00000002-1", "00000003-1"]
    assert "SHA-256" in (tmp_path / "checkpoints-bad" / "00000003-1" / "reason.json").read_text()


def test_an_incomplete_checkpoint_is_none(runs: RunStore, objects: ObjectStore, tmp_path: Path) -> None:
    objects.put(f"runs/{RUN}/checkpoints/00000005/model.safetensors", b"x")
    assert runs.restore(RUN, tmp_path) is None
    write_checkpoint(tmp_path / "here", 4)
    runs.ship(RUN, tmp_path / "here")
    assert runs.restore(RUN, tmp_path) == 4
    assert objects.exists(f"runs/{RUN}/checkpoints/00000005/model.safetensors")


def test_every_flipped_bit_is_caught(tmp_path: Path) -> None:
    """One bit in every eighth of every file: never used, always the one before instead."""
    source = open_store(str(tmp_path / "store"))
    for number in (1, 2):
        write_checkpoint(tmp_path / "here", number)
    source.ship(RUN, tmp_path / "here")
    base = f"runs/{RUN}/checkpoints/00000002"
    whole = {file: source.objects.get(f"{base}/{file}") for file in source.objects.children(base)}
    for file in sorted(set(whole) - {"manifest.json"}):
        for bit in range(3, 8 * len(whole[file]), len(whole[file])):
            data = bytearray(whole[file])
            data[bit // 8] ^= 1 << bit % 8
            for name, good in whole.items():
                source.objects.put(f"{base}/{name}", bytes(data) if name == file else good)
            assert source.restore(RUN, tmp_path / "there" / f"{file}-{bit}") == 1


# Crashes at every write


class Crash(BaseException):
    """The process dies here."""


class CrashingStore:
    """Passes everything on to a store, until it dies instead of the n-th write."""

    def __init__(self, objects: ObjectStore, survive: int) -> None:
        self._objects = objects
        self._left = survive
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._objects, name)
        if name not in ("put", "put_file", "delete", "move"):
            return method

        def write(*arguments: Any) -> Any:
            with self._lock:
                if self._left == 0:
                    raise Crash
                self._left -= 1
            return method(*arguments)

        return write


def every_write(objects: ObjectStore) -> int:
    return 1 if isinstance(objects, DirectoryStore) else 3


def crash_at_every_write(objects: ObjectStore, act: Callable[[RunStore], object]) -> Any:
    """Yields after a crash at the first write of `act`, the second, and so on, until it completes.

    On S3, which is slower and runs the same code, at every third.
    """
    for survive in range(0, 1000, every_write(objects)):
        try:
            act(RunStore(CrashingStore(objects, survive)))
        except Crash:
            yield survive
        else:
            return
    raise AssertionError("never completed")


def test_a_crash_while_shipping(runs: RunStore, objects: ObjectStore, tmp_path: Path) -> None:
    """At any moment the store holds a whole checkpoint, and all records that led to it."""
    local = tmp_path / "local"
    write_parts(local, 1, [step(1)])
    write_checkpoint(local, 1)
    runs.ship(RUN, local)
    write_parts(local, 2, [step(2)], [step(3)])
    for number in (2, 3):
        write_checkpoint(local, number)
    windows = 0
    for survive in crash_at_every_write(objects, lambda dying: dying.ship(RUN, local)):
        windows += 1
        restored = runs.restore(RUN, tmp_path / f"after-{survive}")
        assert restored in (1, 2, 3)
        assert objects.children(f"runs/{RUN}/checkpoints-bad") == []  # nothing looked complete too soon
        assert {row["step"] for row in runs.table(RUN, "steps").to_pylist()} >= set(range(1, restored + 1))
        # Back to before, or each crash would have less left to do.
        for key in objects.list(f"runs/{RUN}"):
            if "attempt-002" in key or "/0000000" in key:
                objects.delete(key)
        RunStore(objects).ship(RUN, only(local, tmp_path / f"first-{survive}"))
    assert windows > 9 // every_write(objects)
    assert open_store(runs.url).ship(RUN, local) == 0
    assert objects.children(f"runs/{RUN}/checkpoints") == ["00000002", "00000003"]
    assert runs.table(RUN, "steps").num_rows == 3


def only(local: Path, copy: Path) -> Path:
    (copy / "checkpoints").mkdir(parents=True)
    (copy / "attempt-001").symlink_to(local / "attempt-001")
    (copy / "checkpoints" / "00000001").symlink_to(local / "checkpoints" / "00000001")
    return copy


SEEN = {"steps": 4, "evals": 2, "spectra": 2, "updates": 1}
"""Rows of `two_attempts`."""


def two_attempts(local: Path) -> None:
    write_parts(local, 1, [step(1), step(2), evaluation(1)], [step(3), spectrum(3, "b"), spectrum(3, "a")])
    write_parts(
        local,
        2,
        [update(4, "a", attempt=2), step(3, attempt=2), step(4, attempt=2), evaluation(4, attempt=2)],
    )


def test_a_crash_while_compacting(runs: RunStore, objects: ObjectStore, tmp_path: Path) -> None:
    """In every window the tables are the same as before, and compacting again completes."""
    two_attempts(tmp_path)
    runs.ship(RUN, tmp_path)
    parts = {key: objects.get(key) for key in objects.list("")}
    before = {kind: rows(runs.table(RUN, kind)) for kind in KINDS}
    windows = 0
    for _ in crash_at_every_write(objects, lambda dying: dying.compact(RUN)):
        windows += 1
        fresh = RunStore(objects)
        assert {kind: rows(fresh.table(RUN, kind)) for kind in KINDS} == before
        assert fresh.compact(RUN) == SEEN
        assert {kind: rows(fresh.table(RUN, kind)) for kind in KINDS} == before
        for key in objects.list(""):
            objects.delete(key)
        for key, data in parts.items():
            objects.put(key, data)
    assert windows == -(-(len(parts) + len(SEEN)) // every_write(objects))
    assert objects.list("") == [f"runs/{RUN}/{kind}.parquet" for kind in sorted(SEEN)]


# Tables


def test_an_empty_table_is_typed(runs: RunStore) -> None:
    arrow = {
        "str": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "list[float]": pa.list_(pa.float64()),
    }
    for kind, record in RECORD_TYPES.items():
        table = runs.table(RUN, kind)
        assert table.num_rows == 0
        assert [(f.name, f.type) for f in table.schema] == [(f.name, arrow[f.type]) for f in fields(record)]
    assert runs.compact(RUN) == {}
    assert runs.objects.list("") == []
    assert runs.conflicts(RUN) == []
    with pytest.raises(InputError, match="did you mean"):
        runs.table(RUN, "step")


def test_tables_are_the_same_from_parts_and_parquet(
    runs: RunStore, objects: ObjectStore, tmp_path: Path
) -> None:
    two_attempts(tmp_path)
    runs.ship(RUN, tmp_path)
    parts = {kind: runs.table(RUN, kind) for kind in KINDS}
    assert runs.compact(RUN) == SEEN
    assert runs.compact(RUN) == SEEN
    for kind, table in parts.items():
        again = runs.table(RUN, kind)
        assert again.schema == table.schema
        assert again.schema.metadata is None
        assert rows(again) == rows(table)
        assert all(column.null_count == 0 for column in again.columns)
    steps = parts["steps"].to_pylist()
    assert [(row["step"], row["attempt"]) for row in steps] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert parts["spectra"]["matrix"].to_pylist() == ["a", "b"]
    assert repr(parts["spectra"]["sigma"].to_pylist()[0]) == "[3.0, inf, nan]"


def test_parts_that_arrive_after_the_parquet(runs: RunStore, tmp_path: Path) -> None:
    write_parts(tmp_path, 1, [step(1), step(2)])
    runs.ship(RUN, tmp_path)
    runs.compact(RUN)
    write_parts(tmp_path, 2, [step(2, attempt=2), step(3, attempt=2)])
    runs.ship(RUN, tmp_path)
    table = runs.table(RUN, "steps")
    assert table["attempt"].to_pylist() == [1, 2, 2]
    assert runs.compact(RUN)["steps"] == 3
    assert rows(runs.table(RUN, "steps")) == rows(table)


def test_a_torn_last_line_is_dropped(runs: RunStore, objects: ObjectStore) -> None:
    whole = encode(step(1)) + encode(step(2))
    objects.put(f"runs/{RUN}/attempt-001/steps-000000.jsonl", whole[:-5])
    objects.put(f"runs/{RUN}/attempt-002/steps-000000.jsonl", encode(step(2, attempt=2)))
    assert runs.table(RUN, "steps")["attempt"].to_pylist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("attempt-001/steps-000000.jsonl", b"{}\n" + encode(step(1)), "line:1: not a record"),
        ("attempt-001/steps-000000.jsonl", encode(evaluation(1)), "holds records that are not steps"),
        ("attempt-001/steps-000000.jsonl", encode(step(1)).replace(b'"step":1', b'"step":"x"'), "damaged"),
        ("attempt-001/steps-000000.jsonl", encode(step(1)).replace(b":64", b":" + b"9" * 30), "damaged"),
        ("attempt-001/steps-000000.jsonl", b"[" * 100_000 + b"\n", "recursion"),
        ("steps.parquet", b"PAR1 not really", "damaged"),
        ("steps.parquet", b"", "damaged"),
    ],
)
def test_damaged_records_are_named(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    runs = open_store(str(tmp_path))
    runs.objects.put(f"runs/{RUN}/{name}", data)
    for read in (lambda: runs.table(RUN, "steps"), lambda: runs.compact(RUN), lambda: runs.conflicts(RUN)):
        with pytest.raises(StoreError) as caught:
            read()
        assert str(caught.value).startswith(f"{tmp_path}/runs/{RUN}/{name}: damaged")
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
    assert runs.objects.list("") == [f"runs/{RUN}/{name}"]


def test_a_parquet_of_another_shape_is_named(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    runs = open_store(str(tmp_path))
    path = tmp_path / "runs" / RUN / "evals.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"step": [1]}), path)
    with pytest.raises(StoreError, match=r"evals\.parquet: damaged"):
        runs.table(RUN, "evals")


def test_attempts_that_disagree_raise_an_alarm(runs: RunStore, tmp_path: Path) -> None:
    write_parts(tmp_path, 1, [step(n) for n in range(1, 6)] + [evaluation(2), spectrum(2, "w")])
    write_parts(
        tmp_path, 2, [step(3, attempt=2), step(4, attempt=2, loss=0.5), step(5, attempt=2, loss=math.nan)]
    )
    write_parts(tmp_path, 3, [evaluation(2, attempt=3, val_loss=2.5), spectrum(2, "w", attempt=3)])
    runs.ship(RUN, tmp_path)
    expected = [
        "steps: 2 rows of attempt 2 differ from attempt 1, first at step 4: loss 0.25, then 0.5",
        "evals: 1 row of attempt 3 differ from attempt 1, first at step 2: val_loss 2.0, then 2.5",
    ]
    assert runs.conflicts(RUN) == expected
    runs.compact(RUN)
    assert runs.conflicts(RUN) == expected  # although the older rows are gone
    write_parts(tmp_path, 4, [step(6, attempt=4), evaluation(6, attempt=4)])
    runs.ship(RUN, tmp_path)
    assert runs.conflicts(RUN) == expected
    runs.compact(RUN)
    assert runs.conflicts(RUN) == expected


def test_a_repeat_that_agrees_raises_none(runs: RunStore, tmp_path: Path) -> None:
    for attempt in (1, 2):
        write_parts(tmp_path, attempt, [step(1, attempt=attempt, loss=math.nan)])
    runs.ship(RUN, tmp_path)
    assert runs.conflicts(RUN) == []


@pytest.mark.s3
def test_both_stores_make_the_same_parquet(s3_url: str, tmp_path: Path) -> None:
    two_attempts(tmp_path / "local")
    digests = []
    for url in (s3_url, str(tmp_path / "store"), str(tmp_path / "again")):
        runs = open_store(url)
        runs.ship(RUN, tmp_path / "local")
        runs.compact(RUN)
        parquet = [runs.objects.get(f"runs/{RUN}/{kind}.parquet") for kind in SEEN]
        digests.append([hashlib.sha256(data).hexdigest() for data in parquet])
    assert digests[0] == digests[1] == digests[2]


def test_parquet_bytes_depend_on_the_rows_alone(tmp_path: Path) -> None:
    """Not on how they were cut into parts."""
    made = []
    for name, cut in (("one", 40), ("many", 7)):
        records: list[Record] = [step(n) for n in range(1, 41)]
        write_parts(tmp_path / name, 1, *(records[i : i + cut] for i in range(0, 40, cut)))
        runs = open_store(str(tmp_path / f"{name}-store"))
        runs.ship(RUN, tmp_path / name)
        runs.compact(RUN)
        made.append(runs.objects.get(f"runs/{RUN}/steps.parquet"))
    assert made[0] == made[1]


def test_reading_while_another_process_compacts(runs: RunStore, objects: ObjectStore, tmp_path: Path) -> None:
    """The parts that were listed may be gone when they are read; the Parquet file is there then."""
    two_attempts(tmp_path)
    runs.ship(RUN, tmp_path)

    class Compacting:
        def __getattr__(self, name: str) -> Any:
            return getattr(objects, name)

        def entries(self, prefix: str) -> list[Entry]:
            found = objects.entries(prefix)
            runs.compact(RUN)
            return found

    assert RunStore(Compacting()).table(RUN, "steps").num_rows == 4


@pytest.mark.s3
def test_restore_does_not_blame_an_outage_on_the_checkpoint(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = open_store(s3_url)
    write_checkpoint(tmp_path / "here", 1)
    runs.ship(RUN, tmp_path / "here")
    before = runs.objects.list("")

    class Down:
        def __getattr__(self, name: str) -> Any:
            return getattr(runs.objects, name)

        def get_file(self, key: str, path: Path) -> None:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
            monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
            open_store(s3_url).objects.get_file(key, path)

    with pytest.raises(StoreError, match="does not answer"):
        RunStore(Down()).restore(RUN, tmp_path / "there")
    assert runs.objects.list("") == before
    assert list((tmp_path / "there" / "checkpoints").iterdir()) == []
    assert runs.restore(RUN, tmp_path / "there") == 1


def test_threads_share_a_store(runs: RunStore, tmp_path: Path) -> None:
    ids = [f"arm-s{seed}-0123abcd" for seed in range(6)]
    written: list[int] = []

    def work(run_id: str) -> None:
        local = tmp_path / run_id
        write_parts(local, 1, [step(1)], [step(2)])
        write_checkpoint(local, 2)
        runs.put_config(run_id, {"schema": 1})
        written.append(runs.ship(run_id, local))

    threads = [threading.Thread(target=work, args=(run_id,)) for run_id in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == [5] * len(ids)
    assert runs.run_ids() == ids


def test_importing_the_store_loads_no_boto3() -> None:
    slow = ("boto3", "botocore", "torch", "ray", "pandas")
    script = f"import mmsweep.store, sys; sys.exit(any(m in sys.modules for m in {slow}))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
