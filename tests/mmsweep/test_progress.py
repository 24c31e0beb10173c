"""What a launch shows, and when it refuses a cluster."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from rich.console import Console

from mmsweep.agent import News
from mmsweep.cluster import _check_token, asks_for_token, check_authentication, connect
from mmsweep.progress import Board, Log, duration
from trainers import records
from trainers.config import RunConfig
from trainers.errors import InputError


@pytest.fixture
def board() -> Board:
    runs = {f"arm{n}-s1-0000000{n}": RunConfig(arm=f"arm{n}", seed=1) for n in range(3)}
    return Board(runs, done_before=2, console=Console(file=io.StringIO(), width=120, force_terminal=False))


def shown(board: Board) -> str:
    board.console.print(board.table())
    return board.console.file.getvalue()


def test_the_table_says_where_every_run_is(board):
    first, second, _ = board.rows
    board.started(first)
    board.heard(
        first, News("running", step=500, steps=50_000, train_loss=3.25, val_loss=3.5, tokens_per_s=12_345.6)
    )
    board.heard(second, News("failed", step=7, reason="exit code 1: [boom]", done=True))
    text = shown(board)
    assert "2/5 done, 1 running, 1 failed" in text
    assert "500/50000" in text
    assert "3.2500" in text
    assert "12,346" in text
    assert "exit code 1: [boom]" in text  # not taken for markup
    assert text.index("arm0") < text.index("arm1") < text.index("arm2")


def test_plain_lines_say_what_changed_and_nothing_twice(board, capsys):
    [run_id, *_] = board.rows
    waiting = News("running", reason="waiting for the store: it is away")
    board.started(run_id)
    board.heard(run_id, waiting)
    board.heard(run_id, waiting)
    board.heard(run_id, News("running", step=3, train_loss=2.0))
    board.heard(run_id, News("completed", step=9, val_loss=1.5, done=True))
    assert capsys.readouterr().out.splitlines() == [
        f"[2/5 done, 1 running] {run_id}  waiting for the store: it is away",
        f"[2/5 done, 1 running] {run_id}  goes on",
        f"[3/5 done] {run_id}  completed  step 9/50000  val 1.5000",
    ]


def test_a_trial_that_died_without_a_word_has_failed(board):
    [run_id, *_] = board.rows
    board.started(run_id)
    board.failed(run_id)
    assert board.rows[run_id].news.status == records.FAILED


def test_trouble_is_told_once_and_never_of_a_run_that_is_tried_again(board):
    first, second, third = board.rows
    told = []
    board.on_trouble = lambda run_id, news: told.append((run_id, news.status))
    board.heard(first, News("failed", step=7, done=True, retry=True))
    board.retrying(first)
    board.started(first)
    assert told == []
    board.heard(first, News("quarantined", step=7, done=True))
    board.failed(first)
    board.failed(second)
    board.heard(third, News("completed", step=9, done=True))
    assert told == [(first, records.QUARANTINED), (second, records.FAILED)]
    assert board.counts() == "3/5 done, 1 failed, 1 quarantined"


def test_a_run_that_is_put_back_waits_and_says_why(board):
    [run_id, *_] = board.rows
    board.put_back(run_id, "budget spent: 2 of 1 GPU-hours")
    assert "budget spent: 2 of 1 GPU-hours" in shown(board)
    assert board.rows[run_id].news.status == records.PENDING


def test_a_log_keeps_the_end_of_what_was_said(capsys):
    log = Log(most=60)
    log.say("one")
    log.say("två", error=True)
    log.keep("three")
    assert [line[20:] for line in log.text().splitlines()] == ["två", "three"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d två", log.text().splitlines()[0])
    assert capsys.readouterr() == ("one\n", "två\n")


def test_a_board_on_a_terminal_keeps_the_lines_that_it_does_not_print(capsys):
    live = Board(
        {"a-s1-00000000": RunConfig(arm="a", seed=1)}, console=Console(force_terminal=True), log=Log()
    )
    live.heard("a-s1-00000000", News("completed", step=9, val_loss=1.5, done=True))
    assert capsys.readouterr().out == ""
    assert live.log.text().endswith("[1/1 done] a-s1-00000000  completed  step 9/50000  val 1.5000\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(42, "0:42"), (725, "12:05"), (11_220, "3:07:00"), (-5, "0:00")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "localhost:6379", "[::1]:6379"])
def test_loopback_needs_no_token(address, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    check_authentication(address)


@pytest.mark.parametrize("address", ["192.0.2.1:6379", "no-such-host.invalid:6379"])
def test_other_machines_need_a_token(address, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(InputError, match="without authentication runs code for anyone"):
        check_authentication(address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check_authentication(address)


def refusal(address: str) -> str:
    with pytest.raises(InputError) as refused, connect(address):
        pass
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_dead_address_is_one_line():
    assert "nothing answers at '127.0.0.1:1'" in refusal("127.0.0.1:1")


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265"])
def test_a_url_is_no_cluster_to_join(address, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert refusal(address).startswith(f"{address}: name the cluster as host:port, on one of its machines")


def test_auto_is_checked_where_ray_finds_it(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", frozenset)  # none of other tests
    assert "--address auto: this machine belongs to no Ray cluster" in refusal("auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("192.0.2.1:6379")
    assert "refusing '192.0.2.1:6379': a Ray cluster without authentication" in refusal("auto")
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    assert refusal("auto").startswith("ray://127.0.0.1:10001: name the cluster")


@pytest.fixture
def gcs() -> Iterator[Callable[[bool], str]]:
    """Starts what answers as the head of a cluster does, with a token or without; returns host:port."""
    servers = []

    def start(closed: bool) -> str:
        def answer(_: bytes, call: grpc.ServicerContext) -> bytes:
            if closed and "authorization" not in dict(call.invocation_metadata()):
                call.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
            return b""

        server = grpc.server(ThreadPoolExecutor(1))
        alive = {"CheckAlive": grpc.unary_unary_rpc_method_handler(answer)}
        service = grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", alive)
        server.add_generic_rpc_handlers((service,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


def test_what_a_cluster_answers_counts_not_what_we_say(gcs, monkeypatch):
    opened, closed = gcs(False), gcs(True)
    assert (asks_for_token(opened), asks_for_token(closed)) == (False, True)
    assert asks_for_token("127.0.0.1:1") is None
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(InputError, match=f"{closed} wants a token: set RAY_AUTH_MODE=token"):
        _check_token(closed)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr("mmsweep.cluster.is_loopback", lambda host: False)
    assert refusal(opened).startswith(f"refusing '{opened}': it asks for no token")


LOCAL = """
import os, pathlib, sys
from mmsweep.cluster import _keep_others_out, asks_for_token, connect
os.umask(0o022)
token = pathlib.Path.home() / ".ray" / "auth_token"
_keep_others_out()
made = token.read_text(), oct(token.stat().st_mode)[-3:]
token.chmod(0o644)
with connect("local"):
    import ray
    closed = asks_for_token(ray.get_runtime_context().gcs_address)
print(len(made[0]), made[1], oct(token.stat().st_mode)[-3:], token.read_text() == made[0], closed)
"""


def test_a_ray_of_our_own_is_closed_and_nobody_else_reads_its_token(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", LOCAL], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["64 600 600 True True"], done.stderr
