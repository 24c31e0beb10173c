"""A store that fails: every fault of the proxy, and what becomes of objects, records and runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import boto3
import pytest
from chaos import Chaos
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tiny import job_of, tiny_run

from mmsweep import doctor, s3
from mmsweep import shipper as shippers
from mmsweep.__main__ import main as mmsweep
from mmsweep.agent import Agent, Job
from mmsweep.contents import contents
from mmsweep.keep import cut_off, problems_of
from mmsweep.objects import DamagedError, NotFound, StoreError, Upload
from mmsweep.s3 import S3Store
from mmsweep.shipper import Shipper
from mmsweep.store import RunStore, open_store, stored_name
from trainers import records
from trainers.manifest import verify, write_manifest
from trainers.records import PartWriter, StepRecord

pytestmark = pytest.mark.s3

RUN = "hetero-s1-0123abcd"
PART_BYTES = 5 * 2**20
"""The least that S3 takes."""
LARGE = os.urandom(PART_BYTES + 1000)
SMALL = os.urandom(30_000)


@pytest.fixture
def chaos(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chaos]:
    with Chaos(s3_server, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
        monkeypatch.setattr(s3, "PART_BYTES", PART_BYTES)
        yield proxy


@pytest.fixture
def objects(s3_url: str, chaos: Chaos) -> S3Store:
    store = open_store(s3_url).objects
    assert isinstance(store, S3Store)
    return store


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


# --- objects --------------------------------------------------------------------------------------

FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("answer", {"status": 503, "code": "SlowDown", "times": 1}),
    ("answer", {"status": 500, "code": "InternalError", "times": 1, "forward": True}),
    ("answer", {"status": 412, "code": "PreconditionFailed", "times": 1}),
    ("lose", {"times": 1}),
    ("cut", {"times": 1}),
    ("cut", {"times": 1, "side": "request"}),
    ("flip", {"times": 2}),
    ("flip", {"times": 1, "side": "request"}),
    ("delay", {"times": 1, "pause": 0.2}),
]


@pytest.mark.parametrize(
    ("kind", "facts"), FAULTS, ids=[f"{k}-{'-'.join(map(str, f.values()))}" for k, f in FAULTS]
)
def test_what_is_written_and_read_through_a_fault_is_what_was_meant(objects, chaos, tmp_path, kind, facts):
    (tmp_path / "large").write_bytes(LARGE)
    for key, data in (("a/small", SMALL), ("a/large", LARGE)):
        path = tmp_path / key.rpartition("/")[2]
        path.write_bytes(data)
        for match, use in (
            ("^PUT", lambda key=key, path=path: objects.put_file(key, path)),
            ("^GET [^?]*$", lambda key=key, path=path: objects.get_file(key, path.with_suffix(".out"))),
        ):
            before = chaos.counts().get(kind, 0)
            chaos.do(kind, match=match, **facts)
            use()
            chaos.stop()
            bodiless = match != "^PUT" and facts.get("side") == "request"
            assert chaos.counts()[kind] > before or bodiless
        assert path.with_suffix(".out").read_bytes() == data
        assert objects.get(key) == data
    assert objects.list("") == ["a/large", "a/small"]
    assert objects.unfinished() == []


def test_a_body_that_always_arrives_damaged_is_never_used(objects, chaos, tmp_path):
    objects.put("a", SMALL)
    chaos.do("flip", match="^GET [^?]*$")
    with pytest.raises(StoreError, match="arrive damaged"):
        objects.get("a")
    with pytest.raises(StoreError, match="arrive damaged"):
        objects.get_file("a", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    chaos.stop()
    chaos.do("flip", match="^PUT", side="request")
    with pytest.raises(StoreError, match="does not arrive as it was sent") as caught:
        objects.put("b", SMALL)
    assert not isinstance(caught.value, DamagedError)  # another try may fare better
    assert "\n" not in str(caught.value)


def test_the_digest_tells_where_the_service_has_no_checksum(objects, s3_server, tmp_path):
    """As where an object was copied by something that keeps its metadata, or rots on the service's disk."""
    direct = boto3.client("s3", endpoint_url=s3_server)
    objects.put("a", SMALL)
    place = {"Bucket": objects.bucket, "Key": objects.prefix + "a"}
    written = direct.head_object(**place)["Metadata"]
    direct.put_object(**place, Body=SMALL[:-1] + bytes([SMALL[-1] ^ 1]), Metadata=written)
    for use in (lambda: objects.get("a"), lambda: objects.get_file("a", tmp_path / "out")):
        with pytest.raises(DamagedError, match=r"/a: damaged \(its SHA-256 is .* move it away"):
            use()
    assert not (tmp_path / "out").exists()
    direct.put_object(**place, Body=b"by hand")
    assert objects.get("a") == b"by hand"


def test_etags_that_are_no_digests(objects, chaos, s3_server, monkeypatch):
    """With KMS encryption they are not; then one object is read back, and the others are believed."""
    real = objects.client.put_object

    def opaque(**arguments: Any) -> Any:
        return {**real(**arguments), "ETag": '"opaque"'}

    monkeypatch.setattr(objects.client, "put_object", opaque)
    for number in range(3):
        objects.put(str(number), SMALL)
    assert sum(request.startswith("GET") for request in chaos.requests()) == 1


def test_an_upload_whose_completion_was_answered_by_nobody_is_there_once(objects, chaos, tmp_path):
    """The repeated request finds the upload gone: some services answer NoSuchUpload then."""
    (tmp_path / "large").write_bytes(LARGE)
    chaos.do("answer", match=r"^POST .*uploadId", status=404, code="NoSuchUpload", forward=True, times=1)
    objects.put_file("large", tmp_path / "large")
    assert chaos.counts() == {"answer": 1}
    assert sum(request.startswith("POST") for request in chaos.requests()) == 2  # begun once
    objects.get_file("large", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == LARGE
    chaos.do("answer", match=r"^POST .*uploadId", status=404, code="NoSuchUpload", times=1)
    objects.put_file("other", tmp_path / "large")
    assert objects.get("other") == LARGE


def test_an_upload_that_fails_is_given_up(objects, chaos, tmp_path):
    (tmp_path / "large").write_bytes(LARGE)
    chaos.do("answer", match="partNumber=2", status=403, code="AccessDenied", times=1)
    with pytest.raises(StoreError, match="access denied"):
        objects.put_file("large", tmp_path / "large")
    assert objects.unfinished() == []
    assert objects.list("") == []


def test_a_download_goes_on_where_it_broke_off(objects, chaos, tmp_path):
    (tmp_path / "large").write_bytes(LARGE)
    objects.put_file("large", tmp_path / "large")
    chaos.do("cut", match="^GET [^?]*$", times=6)
    objects.get_file("large", tmp_path / "out")
    assert chaos.counts() == {"cut": 6}  # more than it would begin anew
    assert hashlib.sha256((tmp_path / "out").read_bytes()).digest() == hashlib.sha256(LARGE).digest()


def test_a_port_that_is_closed_for_a_while(objects, chaos, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    objects.put("a", b"before")
    chaos.do("refuse", seconds=2.0)
    wait_for(lambda: "does not answer" in complaint(objects), "the port to be closed")
    wait_for(lambda: complaint(objects) == "", "the port to be open")
    assert objects.get("a") == b"before"


def complaint(objects: S3Store) -> str:
    try:
        objects.exists("a")
    except StoreError as error:
        return str(error)
    return ""


# --- credentials ----------------------------------------------------------------------------------


@pytest.fixture
def credentials(tmp_path, monkeypatch) -> Callable[[str], None]:
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    def write(key: str) -> None:
        lines = ("[default]", f"aws_access_key_id={key}", "aws_secret_access_key=x", "aws_session_token=y")
        path.write_text("\n".join(lines) + "\n")

    return write


def test_expired_credentials_are_named_and_new_ones_taken_up(objects, chaos, credentials, tmp_path):
    credentials("OLD")
    objects.put("a", b"1")
    chaos.do("expire", key="OLD")
    with pytest.raises(StoreError, match=r"credentials have expired; sign in again.*ExpiredToken") as caught:
        objects.put("a", b"2")
    assert "\n" not in str(caught.value)
    clients = objects.client
    with pytest.raises(StoreError, match="have expired"):
        objects.list("")
    assert objects.client is clients  # nothing new to try
    (tmp_path / "credentials").write_text("[default\n")  # half written
    with pytest.raises(StoreError, match="have expired"):
        objects.list("")
    credentials("NEW")
    objects.put("a", b"3")  # the first request after that, without an error
    assert objects.get("a") == b"3"
    assert chaos.counts()["expire"] >= 3


def test_many_threads_take_up_new_credentials(objects, chaos, credentials):
    credentials("OLD")
    objects.put("a", b"1")
    chaos.do("expire", key="OLD")
    credentials("NEW")
    failures: list[Exception] = []

    def use(number: int) -> None:
        try:
            objects.put(f"{number}", b"1")
        except StoreError as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_credentials_that_come_later(objects, credentials):
    with pytest.raises(StoreError, match="no credentials"):
        objects.get("a")
    credentials("NEW")
    with pytest.raises(NotFound):
        objects.get("a")


# --- uploads of killed processes ------------------------------------------------------------------

UPLOADER = """
import sys
from pathlib import Path
from mmsweep import s3
from mmsweep.store import open_store
s3.PART_BYTES = 5 * 2**20
open_store(sys.argv[1]).objects.put_file(sys.argv[2], Path(sys.argv[3]))
"""


def test_gc_discards_the_upload_of_a_killed_process(s3_url, chaos, tmp_path, capsys):
    store = open_store(s3_url)
    store.put_grid("tiny", "name: tiny\n", {"name": "tiny", "cells": []})
    (tmp_path / "large").write_bytes(LARGE)
    chaos.do("delay", match="partNumber=2", pause=60)
    key = f"runs/{RUN}/checkpoints/00000001/model.safetensors"
    command = [sys.executable, "-c", UPLOADER, s3_url, key, str(tmp_path / "large")]
    with subprocess.Popen(command) as uploader:
        wait_for(lambda: chaos.counts().get("delay", 0) > 0, "the second part")
        uploader.kill()
    chaos.stop()
    [upload] = store.objects.unfinished()
    assert upload.key == key
    assert mmsweep(["store", "gc", s3_url]) == 0
    said = capsys.readouterr().out
    assert f"cut off: {key}: an upload begun " in said
    assert "1 upload; --delete discards them" in said
    assert store.objects.unfinished() == [upload]
    assert mmsweep(["store", "gc", s3_url, "--delete"]) == 0
    assert "1 upload discarded" in capsys.readouterr().out
    assert store.objects.unfinished() == []


UPLOADS = """<?xml version="1.0" encoding="UTF-8"?><ListMultipartUploadsResult>
<Bucket>bucket</Bucket><IsTruncated>false</IsTruncated>
<Upload><Key>x/runs/{run}/checkpoints/00000001/a</Key><UploadId>1</UploadId><Initiated>{old}</Initiated></Upload>
<Upload><Key>x/runs/{run}/checkpoints/00000001/b</Key><UploadId>2</UploadId><Initiated>{new}</Initiated></Upload>
<Upload><Key>x/holiday.mov</Key><UploadId>3</UploadId><Initiated>{old}</Initiated></Upload>
</ListMultipartUploadsResult>"""


def test_an_upload_of_today_may_be_under_way_and_others_are_not_ours(s3_answers):
    old, new = (
        time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(time.time() - age)) for age in (90_000, 80_000)
    )
    listing = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
    s3_answers.answers = [listing, UPLOADS.format(run=RUN, old=old, new=new).encode()]
    assert [upload.id for upload in cut_off(open_store("s3://bucket/x"))] == ["1"]


def test_gc_without_the_right_to_see_uploads_does_the_rest(s3_url, chaos, capsys):
    open_store(s3_url).put_grid("tiny", "name: tiny\n", {"name": "tiny", "cells": []})
    chaos.do("answer", match=r"\?uploads", status=403, code="AccessDenied")
    assert mmsweep(["store", "gc", s3_url]) == 0
    said = capsys.readouterr()
    assert "s3:ListBucketMultipartUploads on the bucket" in said.err
    assert "nothing to delete" in said.out


def test_gc_discards_the_half_written_file_of_a_killed_process(tmp_path, capsys):
    store = open_store(str(tmp_path))
    store.put_grid("tiny", "name: tiny\n", {"name": "tiny", "cells": []})
    old, new = (f".tmp-{digit * 32}" for digit in "12")
    for name, age in ((old, 90_000), (new, 80_000), (".tmp-mine", 90_000)):
        path = tmp_path / "runs" / RUN / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age, time.time() - age))
    assert mmsweep(["store", "gc", str(tmp_path), "--delete"]) == 0
    assert f"cut off: runs/{RUN}/{old}" in capsys.readouterr().out
    assert [upload.id for upload in store.objects.unfinished()] == [new, ".tmp-mine"]
    with pytest.raises(ValueError, match="not an unfinished file"):
        store.objects.discard(Upload("grids/tiny.yaml", "tiny.yaml", 0.0))
    assert store.grids() == ["tiny"]


# --- the shipper ----------------------------------------------------------------------------------


def write_part(run_dir: Path, number: int) -> None:
    writer = PartWriter(run_dir, 1)
    writer.append(StepRecord(RUN, 1, number, 64 * number, 1 / number, 0.5, 1e-3, 2e-2, 12.5, 5e3, 1.7e9))
    writer.roll()


def write_checkpoint(run_dir: Path, step: int, size: int = 1000) -> Path:
    folder = run_dir / "checkpoints" / f"{step:08d}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes([step]) * size)
    (folder / "state.json").write_text(f'{{"step":{step}}}')
    write_manifest(folder, step=step)
    return folder


def in_store(checkpoint: Path, file: str) -> str:
    """The name that a file of a local checkpoint has in the store."""
    return file if file == "manifest.json" else stored_name(file, verify(checkpoint)["files"][file])


class Shipping:
    """A shipper of `run_dir` with short pauses, which reports by writing the run's status."""

    def __init__(self, store: RunStore, run_dir: Path, cap_bytes: int = 10**9) -> None:
        self.store = store
        self.reports = 0
        self.fenced = threading.Event()
        self.shipper = Shipper(store, RUN, run_dir, self.report, self.fenced, cap_bytes=cap_bytes)

    def report(self) -> None:
        self.store.put_status(RUN, {"status": "running", "step": self.reports})
        self.reports += 1


@pytest.fixture
def shipping(s3_url, chaos, tmp_path, monkeypatch) -> Iterator[Callable[..., Shipping]]:
    monkeypatch.setattr(shippers, "SHIP_S", 0.05)
    monkeypatch.setattr(shippers, "STATUS_S", 0.1)
    monkeypatch.setattr(shippers, "COUNT_S", 0.02)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    started: list[Shipping] = []

    def start(**options: Any) -> Shipping:
        started.append(Shipping(open_store(s3_url), tmp_path / "run", **options))
        started[-1].shipper.start()
        return started[-1]

    yield start
    chaos.stop()
    for one in started:
        one.shipper.stop()


def test_what_waits_is_counted_and_goes_up_in_order_when_the_store_is_back(shipping, chaos, tmp_path):
    run_dir = tmp_path / "run"
    chaos.do("answer", status=503, code="SlowDown")
    one = shipping(cap_bytes=5000)
    shipper = one.shipper
    for number in range(1, 6):
        write_part(run_dir, number)
    checkpoint = write_checkpoint(run_dir, 5, size=4000)
    parts = sum(path.stat().st_size for path in run_dir.glob("attempt-001/*.jsonl"))
    held = sum(path.stat().st_size for path in run_dir.glob("checkpoints/*/*"))
    wait_for(lambda: shipper.waiting == parts + held, "the count")
    wait_for(shipper.full.is_set, "the cap")
    assert parts + held > 5000
    wait_for(lambda: "kB wait, since " in shipper.trouble, "the words")
    assert shipper.trouble.startswith(f"waiting for the store: {one.store.url}: the service is failing")
    before = len(chaos.requests())
    chaos.stop()
    wait_for(lambda: shipper.waiting == 0, "the files")
    wait_for(lambda: shipper.trouble == "" and not shipper.full.is_set(), "better news")
    sent = [line for line in chaos.requests()[before:] if line.startswith("PUT") and "status" not in line]
    names = [line.split("?")[0].split(f"{RUN}/")[1] for line in sent]
    assert list(dict.fromkeys(names)) == [
        *(f"attempt-001/steps-{number:06d}.jsonl" for number in range(5)),
        f"checkpoints/00000005/{in_store(checkpoint, 'model.safetensors')}",
        f"checkpoints/00000005/{in_store(checkpoint, 'state.json')}",
        "checkpoints/00000005/manifest.json",
    ]
    assert one.store.table(RUN, "steps")["step"].to_pylist() == [1, 2, 3, 4, 5]
    assert one.store.restore(RUN, tmp_path / "elsewhere") == 5


def test_the_cap_is_left_only_well_below_it(shipping, chaos, tmp_path):
    run_dir = tmp_path / "run"
    chaos.do("answer", match="00000001/model", status=503, code="SlowDown")
    chaos.do("answer", match="00000002/model", status=503, code="SlowDown", times=3)
    shipper = shipping(cap_bytes=10_000).shipper
    write_checkpoint(run_dir, 1, size=8_000)
    write_checkpoint(run_dir, 2, size=8_000)
    wait_for(shipper.full.is_set, "the cap")
    wait_for(lambda: shipper.waiting < 9_000, "the newer one")
    assert shipper.full.is_set()
    chaos.stop()
    wait_for(lambda: not shipper.full.is_set(), "the older one")


def test_a_report_ends_the_pause_of_the_files(shipping, chaos, tmp_path, monkeypatch):
    monkeypatch.setattr(shippers, "SHIP_S", 1000.0)
    monkeypatch.setattr(shippers, "BACK_OFF_S", 2000.0)
    write_part(tmp_path / "run", 1)
    chaos.do("answer", status=503, code="SlowDown")
    one = shipping()
    wait_for(lambda: "files" in one.shipper._failures, "the first try")
    chaos.stop()
    wait_for(lambda: one.store.objects.exists(f"runs/{RUN}/attempt-001/steps-000000.jsonl"), "the part")


def test_reports_go_on_while_a_large_file_is_sent(shipping, chaos, tmp_path):
    run_dir = tmp_path / "run"
    write_checkpoint(run_dir, 1)
    chaos.do("delay", match="^PUT .*model", pause=60)
    one = shipping()
    wait_for(lambda: chaos.counts().get("delay", 0) == 1, "the upload")
    reports = one.reports
    wait_for(lambda: one.reports >= reports + 3, "three more reports")
    assert one.store.objects.list(f"runs/{RUN}/checkpoints") == []
    assert one.shipper.trouble == ""


def test_a_store_that_does_not_answer_is_named_before_its_time_is_up(shipping, chaos, tmp_path, monkeypatch):
    monkeypatch.setattr(shippers, "SILENT_S", 0.3)
    one = shipping()
    wait_for(lambda: one.reports > 0, "a report")
    chaos.process.send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: "does not answer (0 B wait, since " in one.shipper.trouble, "the words")
    finally:
        chaos.process.send_signal(signal.SIGCONT)
    wait_for(lambda: one.shipper.trouble == "", "better news")


def test_a_fenced_shipper_ends(shipping):
    one = shipping()
    wait_for(lambda: one.reports > 0, "a report")
    one.fenced.set()
    wait_for(lambda: not any(thread.is_alive() for thread in one.shipper._threads), "its end")


def test_a_checkpoint_that_the_trainer_replaces_on_its_way_arrives(s3_url, chaos, tmp_path):
    """Else a store slower than the trainer would never hold a whole one."""
    store, run_dir = open_store(s3_url), tmp_path / "run"
    folder = write_checkpoint(run_dir, 1)
    chaos.do("delay", match="^PUT .*model", pause=60, times=1)
    ship = threading.Thread(target=store.ship, args=(RUN, run_dir))
    ship.start()
    wait_for(lambda: chaos.counts().get("delay", 0) == 1, "the upload")
    shutil.rmtree(folder)
    write_checkpoint(run_dir, 2)
    chaos.stop()
    ship.join()
    assert open_store(s3_url).restore(RUN, tmp_path / "elsewhere") == 1
    assert store.waiting(RUN, run_dir) > 1000
    store.ship(RUN, run_dir)
    assert store.waiting(RUN, run_dir) == 0
    assert open_store(s3_url).restore(RUN, tmp_path / "again") == 2
    assert {path.name for path in run_dir.iterdir()} <= {"checkpoints", ".shipping"}
    assert list((run_dir / ".shipping").iterdir()) == []


def test_what_will_never_be_sent_does_not_wait(s3_url, chaos, tmp_path):
    store, run_dir = open_store(s3_url), tmp_path / "run"
    for step in (1, 2, 3):
        write_checkpoint(run_dir, step)
    damaged = write_checkpoint(run_dir, 4)
    (damaged / "model.safetensors").write_bytes(b"short")
    assert store.waiting(RUN, run_dir) > 0
    store.ship(RUN, run_dir)
    assert store.objects.children(f"runs/{RUN}/checkpoints") == ["00000002", "00000003"]
    assert store.waiting(RUN, run_dir) == 0
    assert store.waiting(RUN, tmp_path / "nothing") == 0


# --- restoring ------------------------------------------------------------------------------------


def rot(store: RunStore, server: str, key: str) -> None:
    """Damage an object behind the service's back: its metadata stay."""
    direct = boto3.client("s3", endpoint_url=server)
    place = {"Bucket": store.objects.bucket, "Key": f"{store.objects.prefix}{key}"}
    found = direct.get_object(**place)
    data = bytearray(found["Body"].read())
    data[len(data) // 2] ^= 1
    direct.put_object(**place, Body=bytes(data), Metadata=found["Metadata"])


@pytest.fixture
def two_checkpoints(s3_url, tmp_path) -> RunStore:
    store = open_store(s3_url)
    for step in (1, 2):
        write_checkpoint(tmp_path / "run", step)
        store.ship(RUN, tmp_path / "run")
    return store


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_checkpoint_that_the_store_has_damaged_is_not_used(two_checkpoints, s3_server, tmp_path, name):
    store = two_checkpoints
    local = tmp_path / "run" / "checkpoints" / "00000002"
    rot(store, s3_server, f"runs/{RUN}/checkpoints/00000002/{in_store(local, name)}")
    assert store.restore(RUN, tmp_path / "there") == 1
    assert store.objects.children(f"runs/{RUN}/checkpoints-bad") == ["00000002-1"]


def test_a_whole_checkpoint_takes_the_place_of_a_damaged_one(two_checkpoints, s3_server, tmp_path):
    rot(two_checkpoints, s3_server, f"runs/{RUN}/checkpoints/00000002/manifest.json")
    again = open_store(two_checkpoints.url)
    assert again.ship(RUN, tmp_path / "run") == 3
    assert again.restore(RUN, tmp_path / "there") == 2


def test_records_and_checkpoints_that_rot_are_named(two_checkpoints, s3_server, tmp_path):
    store = two_checkpoints
    write_part(tmp_path / "run", 1)
    store.ship(RUN, tmp_path / "run")
    state = in_store(tmp_path / "run" / "checkpoints" / "00000002", "state.json")
    keys = ["attempt-001/steps-000000.jsonl", f"checkpoints/00000002/{state}"]
    for key in keys:
        rot(store, s3_server, f"runs/{RUN}/{key}")
    with pytest.raises(DamagedError, match=r"steps-000000\.jsonl: damaged"):
        store.table(RUN, "steps")
    named = [line for line in problems_of(store, contents(store)) if "SHA-256" in line]
    assert [sum(key in line for line in named) for key in keys] == [1, 1]


def test_records_arrive_as_they_are_or_not_at_all(s3_url, chaos, tmp_path):
    store, run_dir = open_store(s3_url), tmp_path / "run"
    for number in (1, 2, 3):
        write_part(run_dir, number)
    chaos.do("flip", match="^PUT .*steps", side="request", times=1)
    chaos.do("cut", match="^PUT .*steps", side="request", times=1)
    store.ship(RUN, run_dir)
    losses = [1.0, 0.5, 1 / 3]
    for form in ("jsonl", "parquet"):
        for kind in ("flip", "cut"):
            chaos.do(kind, match=f"^GET [^?]*{form}", times=2)
            assert store.table(RUN, "steps")["loss"].to_pylist() == losses
        if form == "jsonl":
            chaos.do("flip", match="^PUT .*parquet", side="request", times=1)
            store.compact(RUN)
    assert chaos.counts() == {"flip": 6, "cut": 5}


def test_a_flip_on_the_way_costs_no_checkpoint(s3_url, chaos, tmp_path):
    store, run_dir = open_store(s3_url), tmp_path / "run"
    write_checkpoint(run_dir, 1)
    store.ship(RUN, run_dir)
    chaos.do("flip", match="^GET [^?]*model", times=2)
    assert store.restore(RUN, tmp_path / "there") == 1
    assert chaos.counts() == {"flip": 2}
    assert verify(tmp_path / "there" / "checkpoints" / "00000001")["step"] == 1


# --- a run ----------------------------------------------------------------------------------------

STEPS = 1200
ENOUGH = 30
"""Steps during an outage that show that training goes on."""


def job(store: RunStore, texts: str) -> Job:
    return job_of(tiny_run(texts, steps=STEPS, every=STEPS // 8, evaluate=STEPS // 4), store)


def exact_rows(store: RunStore, run: str) -> dict[str, list[Any]]:
    """All records of a run but for what a clock has measured."""
    rows = {}
    for kind, record_type in records.RECORD_TYPES.items():
        if kind != "costs":
            names = [*record_type.key, *record_type.exact]
            rows[kind] = store.table(run, kind).select(names).to_pylist()
    return rows


def test_a_run_goes_on_while_the_store_is_away_and_loses_nothing(
    s3_url, chaos, credentials, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(shippers, "SHIP_S", 0.1)
    monkeypatch.setattr(shippers, "STATUS_S", 0.2)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    credentials("FIRST")
    away, calm = open_store(s3_url), open_store(str(tmp_path / "calm"))
    disturbed = Agent(job(away, texts), threading.Event())
    undisturbed = Agent(job(calm, texts), threading.Event())
    threads = [threading.Thread(target=agent.run) for agent in (disturbed, undisturbed)]
    for thread in threads:
        thread.start()

    def step() -> int:
        return int(disturbed.news.step)

    def strike(kind: str, **facts: Any) -> int:
        """An outage that ends when it has been noticed and training has gone on; steps done in it."""
        failures, begun = chaos.counts().get(kind, 0), step()
        chaos.do(kind, **facts)
        wait_for(lambda: chaos.counts().get(kind, 0) > failures + 1, f"{kind} to be noticed")
        wait_for(lambda: step() >= min(begun + ENOUGH, STEPS), "training to go on")
        done = step() - begun
        if kind == "expire":
            credentials("SECOND")
        chaos.stop()
        wait_for(lambda: "waiting for the store" not in disturbed.news.reason, "the store to be back")
        return done

    try:
        wait_for(lambda: step() > 0 or not threads[0].is_alive(), "the first step", 240)
        trained = [
            strike("answer", status=503, code="SlowDown"),
            strike("lose", match="^PUT"),
            strike("expire", key="FIRST"),
        ]
    finally:
        chaos.stop()
        for agent in (disturbed, undisturbed):
            if sys.exc_info()[0] is not None:
                agent.launcher_gone.set()
        for thread in threads:
            thread.join()
    assert trained[0] >= ENOUGH  # a fast machine may be done before the others
    assert disturbed.news.status == undisturbed.news.status == records.COMPLETED
    run = disturbed.job.run_id
    table = away.table(run, "steps")
    assert table["step"].to_pylist() == list(range(1, STEPS + 1))
    assert exact_rows(away, run) == exact_rows(calm, run)
    assert away.conflicts(run) == []
    assert away.summary(run)["attempts"] == 1
    assert away.summary(run)["rows"] == calm.summary(run)["rows"]
    assert [*problems_of(away, contents(away))] == []


# --- over TLS -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory, s3_server) -> Iterator[tuple[str, Path]]:
    """URL of an S3 server with a certificate of its own, and that certificate."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = write_certificate(folder)
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "-c", str(certificate), "-k", str(key)], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_for(lambda: server.poll() is None and _listens(port), "the server")
        yield f"https://127.0.0.1:{port}", certificate
    finally:
        server.kill()
        server.wait()


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "cert.pem", folder / "key.pem"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_over_tls_where_checksums_trail_the_body(tls_server, monkeypatch, tmp_path):
    url, certificate = tls_server
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3, "PART_BYTES", PART_BYTES)
    with pytest.raises(StoreError, match=r"does not answer .*CERTIFICATE_VERIFY_FAILED"):
        open_store("s3://tls-bucket/x").run_ids()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    objects = open_store("s3://tls-bucket/x").objects
    objects.client.create_bucket(Bucket="tls-bucket")
    trailers: list[str] = []

    def note(request: Any, **_: Any) -> None:
        trailers.append(str(request.headers.get("X-Amz-Trailer")))

    objects.client.meta.events.register("before-send.s3.PutObject", note)
    (tmp_path / "large").write_bytes(LARGE)
    objects.put("small", SMALL)
    objects.put_file("large", tmp_path / "large")
    assert set(trailers) == {"b'x-amz-checksum-crc32'"}
    assert objects.get("small") == SMALL
    assert objects.get("large") == LARGE
    assert [finding.level for finding in doctor.check_store(objects)].count("problem") == 0
