"""`launch --detach`: what is refused before anything is sent, and a whole launch by the head of a cluster."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import psutil
import pytest
from http_service import HttpService
from tiny import write_texts

from mmsweep.__main__ import main as mmsweep
from mmsweep.detach import submission_id
from mmsweep.grid import load_grid
from mmsweep.store import open_store
from tests.conftest import free_port

ROOT = Path(__file__).parents[2]
GRID = """
# its name is that of its file
seeds: [1]
arms: {hetero: {attn: stiefel, mlp: dgram}}
base:
  data: {source: text, path: TEXTS}
  model: {n_layer: 1, n_head: 2, d_model: 16, context: 16, vocab_size: 256}
  optimizer: {muon: {lr: 0.1, solver: projected}}
  schedule: {steps: STEPS, warmup_steps: 2, batch_size: 8}
  evaluation: {every: 1000000, batches: 1}
resources: {cpus_per_worker: 0.5}
"""

HERE = "/texts/*.txt"


def write(folder: Path, texts: str, steps: int = 12) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(GRID.replace("TEXTS", texts).replace("STEPS", str(steps)))
    return path


@pytest.mark.parametrize(
    ("more", "texts", "said"),
    [
        ([], HERE, '--detach wants the --address of the cluster\'s dashboard, as in http://127.0.0.1:8265'),
        (["--address", "auto"], HERE, "--address auto: with --detach name the cluster's dashboard"),
        (["--address", "http://[x"], HERE, "--address http://[x: not a URL"),
        (["--address", "http://192.0.2.1:8265"], HERE, "without https the token can be read on the way"),
        (["--address", "https://127.0.0.1:1"], HERE, "https://127.0.0.1:1: "),
        (["--address", "http://127.0.0.1:1"], HERE, "http://127.0.0.1:1: "),
        (["--address", "http://127.0.0.1:1"], "texts/*.txt", 'data.path "texts/*.txt" is relative to'),
        (["--store", "./results"], HERE, 'store "./results" would be a folder of whichever'),
        (["--store", "ftp://x"], HERE, "ftp:// is not supported"),
        (["--webhook", "https://x/secret"], HERE, "--webhook would be stored with the job: set"),
        (["--dry-run"], HERE, "--detach goes with neither --dry-run nor --open"),
    ],
)  # fmt: skip
def test_what_cannot_be_sent_is_refused_in_one_line(tmp_path, monkeypatch, capsys, more, texts, said):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    store = [] if "--store" in more else ["--store", "s3://bucket/sweeps"]
    assert mmsweep(["launch", str(write(tmp_path, texts)), "--detach", *store, *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "secret/" not in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("answer", "mode", "said"),
    [
        (200, "token", "without a token it answers HTTP 200, not 401: it runs code for anyone"),
        (404, "token", "without a token it answers HTTP 404"),
        (401, "", "wants a token: set RAY_AUTH_MODE=token"),
    ],
)
def test_a_dashboard_is_asked_without_the_token_first(tmp_path, monkeypatch, capsys, answer, mode, said):
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(answer)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    grid, service = write(tmp_path, HERE), HttpService(Handler)
    try:
        words = ["launch", str(grid), "--detach", "--store", "s3://bucket/c", "--address", service.url]
        assert mmsweep(words) == 2
    finally:
        service.stop()
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert asked == [("/api/jobs/", None)]


def test_the_same_runs_into_the_same_store_have_one_name(tmp_path):
    def name(steps: int, store: str) -> str:
        grid = load_grid(write(tmp_path, "/t/*", steps), identify=lambda data: "sha256:" + "0" * 64)
        return submission_id(grid, store)

    assert name(12, "s3://a/b") == name(12, "s3://a/b")
    assert re.fullmatch(r"tiny-[0-9a-f]{8}", name(12, "s3://a/b"))
    assert len({name(12, "s3://a/b"), name(13, "s3://a/b"), name(12, "s3://a/c")}) == 3


# --- on a cluster --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Path]:
    """Paths of sockets may be 107 bytes long, and pytest's folders are deep."""
    with tempfile.TemporaryDirectory(prefix="mmsweep-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def environment(home) -> dict[str, str]:
    """Of the head, and of who submits: a token, and the interpreter of these tests as `python`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    places = {"HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT), "MMSWEEP_CACHE": str(home / "cache")}
    return {**token, **places, "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def dashboard(home, environment) -> Iterator[str]:
    """The URL of the dashboard of a head with ports of its own."""
    port = free_port()
    ports = {
        name: free_port()
        for name in (
            "--port", "--dashboard-agent-listen-port", "--dashboard-agent-grpc-port",
            "--runtime-env-agent-port", "--metrics-export-port", "--ray-client-server-port",
        )
    }  # fmt: skip
    options = {**ports, "--dashboard-port": port, "--dashboard-host": "127.0.0.1", "--num-cpus": 1}
    options |= {"--node-ip-address": "127.0.0.1", "--temp-dir": home / "t", "--object-store-memory": 2**27}
    log = (home / "head.log").open("wb")
    head = psutil.Popen(
        ["ray", "start", "--head", "--block", *(f"{name}={value}" for name, value in options.items())],
        env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=home,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (home / "head.log").read_text():
            assert head.poll() is None, (home / "head.log").read_text()
            assert time.monotonic() < deadline, (home / "head.log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        # Never `ray stop`, which would end every Ray of this machine.
        family = [head, *head.children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)
        log.close()


def test_the_head_launches_a_grid_once_and_again_when_it_has_ended(home, environment, dashboard):
    path, where = write(home, write_texts(home / "texts"), steps=1_000_000), home / "store"
    store = open_store(str(where))

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", *map(str, words)]
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240, cwd=home)

    def submit() -> subprocess.CompletedProcess[str]:
        return run("mmsweep.launch", path, "--address", dashboard, "--detach", "--store", where)

    first = submit()
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stderr == ""
    begun, watch, stop, logs = first.stdout.splitlines()
    name = re.fullmatch(rf"tiny: 1 runs, launched by {dashboard} as (tiny-[0-9a-f]{{8}})", begun)[1]
    assert watch == f"  watch  python -m mmsweep.status {where} --grid tiny --watch"
    assert stop == f"  stop   python -m mmsweep.stop {where} tiny"
    assert logs == f"  logs   ray job logs --address {dashboard} --follow {name}"

    second = submit()
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr.splitlines() == [
        f"tiny is being launched by {dashboard} as {name}; nothing submitted", watch, stop, logs
    ]  # fmt: skip

    deadline = time.monotonic() + 240
    while not any((store.status(run_id) or {}).get("step") for run_id in store.run_ids()):
        assert time.monotonic() < deadline, (home / "head.log").read_text()
        time.sleep(0.2)
    stopped = run("mmsweep.stop", where, "tiny")
    assert stopped.returncode == 0, stopped.stderr
    assert ": pending, saved at step " in stopped.stdout
    said = subprocess.run(
        logs.split()[1:], env=environment, capture_output=True, text=True, timeout=120, cwd=home
    )
    assert "tiny: stopped by request" in said.stdout
    assert run("mmsweep.status", where, "--grid", "tiny").stdout.count("pending") == 2
    assert "Ray" not in first.stdout

    while (again := submit()).returncode == 2:  # the job takes a moment to end after its launch
        assert "nothing submitted" in again.stderr
        assert time.monotonic() < deadline
    assert again.stdout == first.stdout
    run("mmsweep.stop", where, "tiny")
