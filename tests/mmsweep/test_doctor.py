"""`python -m mmsweep.doctor`: real stores, real processes, and the faults it is there to name."""

from __future__ import annotations

import base64
import email.utils
import http.client
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import torch
from http_service import HttpService

from mmsweep import doctor
from mmsweep.doctor import clusters, findings, machine, stores
from mmsweep.doctor.findings import Finding
from mmsweep.store import open_store


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


# --- stores --------------------------------------------------------------------------------------


class Between(HttpService):
    """An S3 server behind this one, which refuses some requests, drops headers and shifts the date."""

    def __init__(self, server: str) -> None:
        self.refused = lambda method, path: False
        self.dropped: set[str] = set()
        self.shift_s = 0.0
        self.is_there: Callable[[str], bool | None] = lambda path: None  # for writes on a condition
        self.strict = False
        """Whether checksums are compared."""
        outer, behind = self, urlsplit(server)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def relay(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if outer.refused(self.command, self.path):
                    self.respond(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
                    return
                dropped = {"expect", *outer.dropped}
                if self.command == "PUT" and self.headers["If-None-Match"]:
                    there = outer.is_there(self.path)
                    if there:
                        self.respond(412, {}, b"<Error><Code>PreconditionFailed</Code></Error>")
                        return
                    dropped |= {"if-none-match"} if there is False else set()
                checksum = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
                if outer.strict and self.headers.get("x-amz-checksum-crc32", checksum) != checksum:
                    self.respond(400, {}, b"<Error><Code>BadDigest</Code></Error>")
                    return
                given = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
                connection = http.client.HTTPConnection(behind.hostname, behind.port, timeout=30)
                connection.request(self.command, self.path, body, given)
                answer = connection.getresponse()
                self.respond(answer.status, dict(answer.getheaders()), answer.read())
                connection.close()

            def respond(self, status: int, headers: dict[str, str], body: bytes) -> None:
                own = {"date", "server", "connection", "content-length", "transfer-encoding"}
                self.send_response_only(status)
                self.send_header("Date", email.utils.formatdate(time.time() + outer.shift_s, usegmt=True))
                for name, value in headers.items():
                    if name.lower() not in own:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = do_DELETE = do_POST = do_HEAD = relay  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(Handler)


@pytest.fixture
def between(s3_url: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Between]:
    service = Between(s3_server)
    service.bucket_url = s3_url
    monkeypatch.setenv("AWS_ENDPOINT_URL", service.url)
    yield service
    service.stop()


def examine(url: str) -> list[Finding]:
    return list(stores.check_store(open_store(url).objects))


def test_a_good_store_has_every_right_and_keeps_nothing(store_url):
    store, condition, *integrity, clock = examine(store_url)
    assert levels([store, clock]) == ["ok"] * 2
    assert store.what.endswith(": writing, reading, listing, overwriting, deleting")
    assert condition.what.startswith(("creates an object once", "honours If-None-Match, and yet of 8"))
    if "://" in store_url:  # the server of these tests compares no checksum
        assert [finding.what for finding in integrity] == ["takes a write whose checksum is wrong"]
    else:
        assert (condition.level, integrity) == ("ok", [])
    assert clock.what == "agrees with the store's"
    assert open_store(store_url).objects.children("") == []


LISTING = "list-type=2"


@pytest.mark.s3
@pytest.mark.parametrize(
    ("right", "refused"),
    [
        ("writing", lambda method, path: method == "PUT"),
        ("reading", lambda method, path: method == "GET" and LISTING not in path),
        ("listing", lambda method, path: method == "GET" and LISTING in path),
        ("deleting", lambda method, path: method == "DELETE"),
    ],
)
def test_each_right_that_is_missing_is_named(between, right, refused):
    between.refused = refused
    problems = [finding for finding in examine(between.bucket_url) if finding.level == "problem"]
    assert problems[0].what.startswith(right)
    assert "access denied; give these credentials" in problems[0].line()
    between.refused = lambda method, path: False
    left = open_store(between.bucket_url).objects.list("")
    assert len(left) == (2 if right == "deleting" else 0)
    assert not left or left[0] in problems[0].what


@pytest.mark.s3
@pytest.mark.parametrize(
    ("shift_s", "level", "words"),
    [
        (3600, "problem", "is 3600 s behind the store's"),
        (-90, "warning", "s ahead of the store's"),
        (5, "ok", "agrees"),
    ],
)
def test_a_clock_that_is_off(between, shift_s, level, words):
    between.shift_s = shift_s
    [clock] = [finding for finding in examine(between.bucket_url) if finding.subject == "clock"]
    assert clock.level == level
    assert words in clock.what.replace("3599", "3600")


@pytest.mark.s3
def test_a_store_that_ignores_conditions(between):
    between.dropped = {"if-none-match"}
    found = examine(between.bucket_url)
    assert found[1].level == "warning"
    assert found[1].what == "ignores If-None-Match: creates an object twice"
    assert open_store(between.bucket_url).objects.list("") == []


@pytest.mark.s3
@pytest.mark.parametrize(
    ("at_once", "level", "words"), [(1, "ok", "once"), (3, "warning", "8 at once 3 create")]
)
def test_writers_that_create_the_same_object_at_once(between, at_once, level, words):
    created: dict[str, int] = {}
    lock = threading.Lock()

    def is_there(path: str) -> bool | None:
        if "-race" not in path:
            return None
        with lock:
            created[path] = created.get(path, 0) + 1
            return created[path] > at_once

    between.is_there = is_there
    found = examine(between.bucket_url)
    assert found[1].level == level
    assert words in found[1].what


@pytest.mark.s3
def test_a_store_that_compares_checksums(between):
    between.strict = True
    found = examine(between.bucket_url)
    assert found[2].line().split(maxsplit=2)[::2] == ["ok", found[2].what]
    assert found[2].what == "keeps digests, and refuses a write whose checksum is wrong"


@pytest.mark.s3
def test_a_store_that_drops_metadata(between):
    between.dropped = {"x-amz-meta-sha256"}
    found = examine(between.bucket_url)
    assert found[2].level == "warning"
    assert found[2].what == "drops the metadata of objects, and with it their digests"


@pytest.mark.s3
def test_uploads_that_cannot_be_seen(between):
    between.refused = lambda method, path: "?uploads" in path
    found = examine(between.bucket_url)
    assert any("s3:ListBucketMultipartUploads on the bucket" in finding.what for finding in found)
    assert "problem" not in levels(found)


def test_a_node_that_shares_the_store_finds_the_mark_and_tries_every_right(store_url):
    with clusters.marked(open_store(store_url).objects) as mark:
        store, clock = clusters._from_here(mark)
    assert levels([store, clock]) == ["ok"] * 2
    assert store.what.endswith(": writing, reading, listing, overwriting, deleting")
    assert open_store(store_url).objects.children("") == []


def test_a_node_with_a_folder_of_its_own_is_found(tmp_path):
    with clusters.marked(open_store(str(tmp_path / "here")).objects) as mark:
        [found] = clusters._from_here(replace(mark, store=str(tmp_path / "there")))
    assert found.level == "problem"
    assert "is not the store of the machine that asks" in found.what
    assert not (tmp_path / "there").exists()


@pytest.mark.s3
def test_a_node_without_the_right_to_write_is_found(between):
    with clusters.marked(open_store(between.bucket_url).objects) as mark:
        between.refused = lambda method, path: method == "PUT"
        [found] = clusters._from_here(mark)
    assert (found.level, found.subject) == ("problem", "store")
    assert found.what.startswith("writing: ")


@pytest.mark.parametrize(
    ("endpoint", "plain"),
    [("http://192.0.2.1:9000", True), ("https://192.0.2.1:9000", False), ("http://127.0.0.1:9000", False)],
)
def test_a_service_that_encrypts_nothing(aws, endpoint, plain):
    aws.setenv("AWS_ENDPOINT_URL", endpoint)
    found = list(stores._encryption(open_store("s3://bucket/sweeps").objects))
    assert levels(found) == (["warning"] if plain else [])
    assert all(finding.what.startswith(f"{endpoint}: requests are signed") for finding in found)


def test_a_store_that_is_a_file(tmp_path):
    (tmp_path / "store").write_text("")
    [problem] = examine(str(tmp_path / "store"))
    assert problem.level == "problem"


# --- disks ---------------------------------------------------------------------------------------


def test_a_good_folder_keeps_nothing(tmp_path):
    [found] = machine.check_folder(tmp_path / "new", "cache", "point X to")
    assert found.level in ("ok", "warning")  # the test's own disk may be small or slow
    assert list((tmp_path / "new").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMSWEEP_CACHE", str(tmp_path / "file" / "cache"))
    cache, runs = machine.check_disks()
    assert (cache.level, cache.subject) == ("problem", "cache")
    assert cache.line().endswith("point MMSWEEP_CACHE to a folder that can be written")
    assert runs.level != "problem"


@pytest.mark.parametrize(
    ("free", "level", "words"),
    [(100e6, "problem", "0.1 GiB free; make room"), (5e9, "warning", "4.7 GiB free; large corpora")],
)
def test_a_disk_that_is_almost_full(tmp_path, monkeypatch, free, level, words):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    [found] = machine.check_folder(tmp_path, "cache", "point X to")
    assert found.level == level
    assert words in found.line()


# --- software, devices, processes ----------------------------------------------------------------


def test_versions_that_are_not_the_tested_ones(tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# tested\nnumpy==1.0  # old\nrich>=1\nnot-installed-here==1\n")
    [found] = machine.check_packages(constraints)
    assert found.level == "warning"
    assert "numpy " in found.what
    assert "(==1.0)" in found.what
    assert not any(name in found.what for name in ("rich", "not-installed"))


def test_versions_that_are_too_old(tmp_path, monkeypatch):
    info = tmp_path / "mmsweep-1.0.dist-info"
    info.mkdir()
    needs = ["numpy>=99", "no-such-package>=1", "rich>=1", 'pytest>=99; extra == "dev"']
    lines = [
        "Metadata-Version: 2.1",
        "Name: mmsweep",
        "Version: 1.0",
        *(f"Requires-Dist: {n}" for n in needs),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    [found] = machine.check_packages(tmp_path / "none")
    assert found.level == "problem"
    assert "(needs >=99), no-such-package is missing (needs >=1)" in found.what
    assert not any(name in found.what for name in ("rich", "pytest"))


def test_gpus_that_torch_does_not_see(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '550.54.14\\n550.54.14\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    [found] = machine.check_devices()
    assert found.level == "problem"
    seen = "is built without CUDA" if torch.version.cuda is None else f"(CUDA {torch.version.cuda}) sees none"
    assert found.what == f"driver 550.54.14 with 2 GPUs, and torch {seen}"


def test_gpus_that_ray_hands_out_and_torch_does_not_find(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    missed = next(machine.check_devices(declared=3.0))
    assert missed.level == "problem"
    assert missed.what == "Ray hands out 3 GPUs here, and torch finds 0"


def test_workers_that_cannot_find_each_other(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuch0")
    [found] = machine.check_workers()
    assert found.level == "problem"
    assert "an all-reduce of 2 processes failed: " in found.what


@pytest.mark.parametrize("world", ["1", "many"])
def test_a_worker_says_what_is_wrong_and_leaves_at_once(world):
    """The interpreter's farewell, which gloo can abort, would put its own line after the reason."""
    code = "import atexit, mmsweep.doctor.machine as m; atexit.register(print, 'farewell'); m.print_sum()"
    environment = os.environ | {"WORLD_SIZE": world, "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Error: " in done.stderr.splitlines()[-1]


# --- the command ---------------------------------------------------------------------------------


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MMSWEEP_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "mmsweep.doctor", "--store", str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    subjects = [line.split()[1] for line in lines[:-1]]
    wanted = ["python", "packages", "devices", "workers", "cache", "runs", "store", "store", "clock"]
    assert list(dict.fromkeys(subjects)) == list(dict.fromkeys(wanted))
    assert lines[-1].startswith("no problems")
    assert any(line.startswith("ok       workers  2 processes exchange tensors through ") for line in lines)
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def test_problems_are_exit_status_1(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for name in ("check_devices", "check_workers", "check_disks"):  # seconds each, and tested above
        monkeypatch.setattr(doctor, name, lambda: iter(()))
    assert doctor.main(["--store", str(tmp_path / "file" / "store")]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 problem, ")


@pytest.mark.parametrize("arguments", [["--store", "gs://bucket"], ["--store", ""], ["--sotre", "x"], ["x"]])
def test_bad_arguments_are_exit_status_2(arguments, capsys):
    try:
        status = doctor.main(arguments)
    except SystemExit as exit_:  # argparse
        status = exit_.code
    assert status == 2
    assert capsys.readouterr().out == ""


def test_a_check_that_breaks_does_not_end_the_others():
    def breaks() -> Iterator[Finding]:
        yield Finding("ok", "x", "first")
        raise ZeroDivisionError("so\nit is")

    found = list(findings.guarded("x", breaks))
    assert levels(found) == ["ok", "problem"]
    assert found[1].line() == "problem  x        this check broke: ZeroDivisionError: so it is; report it"


def test_what_a_store_says_cannot_steer_the_terminal():
    assert "\x1b" not in Finding("problem", "store", "\x1b[2Jgone").line()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "nothing answers at '127.0.0.1:1'"),
        ("192.0.2.1:6379", "without authentication runs code for anyone"),
    ],
)
def test_clusters_that_cannot_be_used(address, words, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    [found] = clusters.check_cluster(address)
    assert found.level == "problem"
    assert words in found.what


@pytest.mark.parametrize(
    ("answer", "safe", "level", "words"),
    [
        (200, True, "warning", "runs code for anyone"),
        (200, False, "problem", "runs code for anyone"),
        (401, False, "ok", "wants a token"),
    ],
)
def test_whether_jobs_need_a_token(answer, safe, level, words):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer if self.path == "/api/jobs/" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    service = HttpService(Handler)
    try:
        found = clusters._jobs_api(service.url.removeprefix("http://"), safe=safe)
    finally:
        service.stop()
    assert found.level == level
    assert words in found.what


@pytest.mark.parametrize(
    ("asks", "here_alone", "level"),
    [(True, False, "ok"), (None, False, "warning"), (False, True, "warning"), (False, False, "problem")],
)
def test_a_cluster_that_is_open_is_a_problem_also_without_a_dashboard(asks, here_alone, level):
    assert clusters._ray_itself("192.0.2.1:6379", asks, here_alone=here_alone).level == level
    assert clusters._jobs_api("", safe=False).what == "no dashboard, and so no jobs API"
