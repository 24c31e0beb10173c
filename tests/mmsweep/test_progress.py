"""What a launch shows, and when it refuses a cluster."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from mmsweep.agent import News
from mmsweep.cluster import check_authentication, connect
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


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "localhost:6379", "ray://127.0.0.1:10001", "local"])
def test_loopback_needs_no_token(address, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    check_authentication(address)


@pytest.mark.parametrize("address", ["192.0.2.1:6379", "ray://192.0.2.1:10001", "no-such-host.invalid:6379"])
def test_other_machines_need_a_token(address, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(InputError, match="without authentication runs code for anyone"):
        check_authentication(address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check_authentication(address)


def test_a_dead_address_is_one_line():
    with pytest.raises(InputError, match=r"nothing answers at '127\.0\.0\.1:1'"), connect("127.0.0.1:1"):
        pass
