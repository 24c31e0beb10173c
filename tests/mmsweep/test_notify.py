"""Messages to a webhook, against a real server that refuses, hangs and sends elsewhere."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from http_service import HttpService
from tiny import wait_for

from mmsweep.attendant import Attendant
from mmsweep.notify import MOST_CHARACTERS, VARIABLE, GivenUp, Webhook, webhook
from mmsweep.progress import Log
from mmsweep.store import DirectoryStore, RunStore, StoreError
from trainers.errors import InputError


class Room(HttpService):
    """A chat room: answers with the given statuses in turn, then 200, and keeps what it took."""

    def __init__(self, *answers: int, location: str = "") -> None:
        self.open = threading.Event()
        """Nobody gets an answer before."""
        self.open.set()
        self.refusals = list(answers)
        self.asked = 0
        self.taken: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = outer.refusals.pop(0) if outer.refusals else 200
                outer.asked += 1
                assert outer.open.wait(60)
                if status == 200:
                    assert self.headers["Content-Type"] == "application/json"
                    outer.taken.append(json.loads(body))
                self.send_response(status)
                if location:
                    self.send_header("Location", location)
                self.end_headers()

            do_GET = do_POST  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(Handler)


@pytest.fixture
def rooms() -> Iterator[list[Room]]:
    opened: list[Room] = []
    yield opened
    for room in opened:
        room.stop()


def test_a_message_arrives_once_after_a_refusal(rooms):
    rooms.append(Room(500))
    with Webhook(rooms[0].url + "/secret", pause=0.01) as hook:
        hook.send("paper: 25 of 25 runs done")
        hook.send("x" * 5000)
    first, second = rooms[0].taken
    assert first == {"text": "paper: 25 of 25 runs done", "content": "paper: 25 of 25 runs done"}
    assert rooms[0].asked == 3
    assert len(second["content"]) == MOST_CHARACTERS


def test_the_end_goes_ahead_and_many_runs_are_one_message(rooms):
    rooms.append(Room())
    (room,) = rooms
    room.open.clear()
    with Webhook(room.url) as hook:
        hook.send_given_up(GivenUp("paper", "a-s0-0123abcd", "failed", "at step 4: boom"))
        wait_for(lambda: room.asked == 1, "the first message")
        for seed in range(1, 151):
            how = "failed" if seed % 3 else "quarantined"
            hook.send_given_up(GivenUp("paper", f"a-s{seed}-0123abcd", how, "at step 4: boom"))
        hook.send("paper: the store is back after 12:05")
        hook.end("paper: 850 of 1000 runs done; 101 failed, 50 quarantined")
        room.open.set()
    first, end, back, others = [message["text"] for message in room.taken]
    assert first == "paper: a-s0-0123abcd failed at step 4: boom"
    assert end == "paper: 850 of 1000 runs done; 101 failed, 50 quarantined"
    assert back == "paper: the store is back after 12:05"
    assert others.startswith(
        "paper: 150 more runs: 100 failed, 50 quarantined; a-s1-0123abcd, a-s2-0123abcd, "
    )


def test_three_refusals_are_enough_and_are_said_once_without_the_url(rooms, capsys):
    rooms.append(Room(*[500] * 6))
    with Webhook(rooms[0].url + "/secret", pause=0.01) as hook:
        hook.send("one")
        hook.send("two")
        hook.send("three")
    assert rooms[0].asked == 7
    assert [message["text"] for message in rooms[0].taken] == ["three"]
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "the webhook does not take messages: HTTP 500\n")


def test_a_message_follows_no_redirect(rooms, capsys):
    rooms.append(Room())
    rooms.append(Room(302, 302, 302, location=rooms[0].url))
    with Webhook(rooms[1].url, pause=0.01) as hook:
        hook.send("one")
    assert rooms[0].asked == 0
    assert "HTTP 302" in capsys.readouterr().err


def test_nobody_who_listens_delays_nothing(capsys):
    room = Room()
    room.stop()
    with Webhook(room.url, pause=0.01) as hook:
        for _ in range(1000):
            hook.send("one")  # 900 of them are dropped
    said = capsys.readouterr().err
    assert said == "the webhook does not take messages: Connection refused\n"


def test_a_webhook_that_was_not_asked_for_is_silent():
    before = threading.active_count()
    with Webhook(None) as hook:
        hook.send("nobody hears")
        assert threading.active_count() == before


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://hooks.example/T0/secret", "shows the URL, which is a secret, to the network"),
        ("http://localhost.example/secret", "shows the URL"),
        ("ftp://hooks.example/secret", "not a URL of the web"),
        ("hooks.example/secret", "not a URL of the web"),
        ("https://[bad/secret", "not a URL"),
    ],
)
def test_a_bad_url_is_refused_and_not_repeated(url, said):
    with pytest.raises(InputError) as error:
        webhook(url)
    assert said in str(error.value)
    assert str(error.value).startswith("--webhook: ")
    assert "secret/" not in str(error.value)
    assert "example" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_the_variable_counts_and_is_not_inherited(monkeypatch, rooms):
    rooms.append(Room())
    monkeypatch.setenv(VARIABLE, rooms[0].url)
    with webhook(None) as hook:
        assert VARIABLE not in os.environ
        hook.send("one")
    assert len(rooms[0].taken) == 1
    for url in ("http://127.0.0.1:1/x", "http://[::1]:1/x", "http://localhost/x", "https://hooks.example/x"):
        webhook(url)


class Flaky(DirectoryStore):
    away = False

    def exists(self, key: str) -> bool:
        if self.away:
            raise StoreError("the store is away")
        return super().exists(key)


def test_a_store_that_was_away_for_long_is_told_once_and_that_it_is_back(tmp_path, rooms):
    rooms.append(Room())
    objects = Flaky(tmp_path)
    looks = threading.Semaphore(0)

    class Store(RunStore):
        def stop_requested(self, **of: str) -> bool:
            looks.release()
            return super().stop_requested(**of)

    def look(times: int) -> None:
        for _ in range(times):
            assert looks.acquire(timeout=60)

    with Webhook(rooms[0].url) as hook:
        attendant = Attendant(Store(objects), "tiny", "tiny-1", Log(), hook, poll_s=0.001, away_s=0.0)
        with attendant:
            objects.away = True
            look(20)
            objects.away = False
            look(20)
    away, back = rooms[0].taken
    assert away["text"].startswith("tiny: the store has been away for 0:00; runs go on")
    assert back["text"].startswith("tiny: the store is back after 0:0")


def test_the_log_of_a_launch_is_in_the_store_at_the_end(tmp_path):
    store, log = RunStore(DirectoryStore(tmp_path)), Log()
    with Attendant(store, "tiny", "tiny-1", log, Webhook(None)) as attendant:
        log.say("tiny: 4 runs")
        assert attendant.stopping == ""
    (line,) = store.launch_log("tiny", "tiny-1").splitlines()
    assert line.endswith(" tiny: 4 runs")
    assert store.launch_log("tiny", "tiny-2") == ""
