"""Runs of several machines, without Ray: an agent's side, a follower, and what dead ones leave."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import processes, tiny_run, wait_for

from mmsweep.follower import Follower, FollowerProcess, Invitation
from mmsweep.workers import EXIT_STOPPED, LOOPBACK, Span, Workers

LONG = 100_000


@pytest.fixture
def run_of(texts) -> Callable[[int], dict[str, Any]]:
    def make(steps: int) -> dict[str, Any]:
        return tiny_run(texts, steps=steps, every=steps, threads=1).model_dump(mode="json")

    return make


@pytest.fixture
def follower(texts) -> Iterator[FollowerProcess]:
    process = FollowerProcess(Invitation(LOOPBACK, "token"))
    yield process
    process.close()
    wait_for(lambda: not processes("mmsweep.follower") and not processes("trainers.train"), "all to end")


def span(follower: FollowerProcess, token: str = "token") -> Span:
    return Span(LOOPBACK, [(LOOPBACK, follower.port)], token)


def follower_process() -> psutil.Process:
    (found,) = processes("mmsweep.follower")
    return found


def step_losses(run_dir: Path) -> list[float]:
    parts = sorted(run_dir.glob("attempt-001/steps-*"))
    return [json.loads(line)["loss"] for part in parts for line in part.read_text().splitlines()]


def until_it_trains(workers: Workers) -> None:
    wait_for(lambda: len(step_losses(workers.run_dir)) > 2 or workers.poll() is not None, "steps")
    assert workers.poll() is None, (workers.run_dir / "logs" / "rank-0.log").read_text()


def until_it_ends(workers: Workers) -> int:
    wait_for(lambda: workers.poll() is not None, "the workers to end")
    return workers.poll()


def test_two_machines_compute_the_bits_of_one(run_of, follower, tmp_path):
    run, folders = run_of(12), [tmp_path / "one", tmp_path / "two"]
    for folder, where in zip(folders, (None, span(follower)), strict=True):
        folder.mkdir()
        with Workers(run, folder, 1, 2, where) as workers:
            assert until_it_ends(workers) == 0
            assert workers.codes() == {0: 0, 1: 0}
            assert len(workers.processes) == (2 if where is None else 1)
    one, two = map(step_losses, folders)
    assert len(one) == 12
    assert one == two


def test_every_rank_knows_its_place(run_of, follower, tmp_path):
    with Workers(run_of(LONG), tmp_path, 1, 4, span(follower)) as workers:
        wait_for(lambda: len(processes("trainers.train")) == 4, "four ranks")
        places = [process.environ() for process in processes("trainers.train")]
        assert len(workers.processes) == 2
        assert {place["MASTER_PORT"] for place in places} == {str(workers.ranks.share.port)}
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
    assert sorted(tuple(place[name] for name in names) for place in places) == [
        (str(rank), str(rank % 2), "4", "2", LOOPBACK, "lo") for rank in range(4)
    ]


def test_a_rank_that_dies_elsewhere_ends_the_attempt_with_its_log(run_of, follower, tmp_path):
    with Workers(run_of(LONG), tmp_path, 1, 2, span(follower)) as workers:
        until_it_trains(workers)
        (far,) = follower_process().children()
        far.kill()
        begun = time.monotonic()
        until_it_ends(workers)
        wait_for(lambda: workers.codes()[1] == -signal.SIGKILL, "the code of rank 1")
        assert (tmp_path / "logs" / "rank-1.log").is_file()
        assert workers.lost == ""
    assert processes("trainers.train") == []
    assert time.monotonic() - begun < 30


def test_a_follower_that_is_killed_is_a_lost_machine(run_of, follower, tmp_path):
    with Workers(run_of(LONG), tmp_path, 1, 2, span(follower)) as workers:
        until_it_trains(workers)
        follower_process().kill()
        assert until_it_ends(workers) != 0
        wait_for(lambda: bool(workers.lost), "the loss to be noticed")
        assert workers.lost == f"{LOOPBACK}, a machine of this run, is gone"
    wait_for(lambda: not processes("trainers.train"), "workers of the dead follower to end")


@pytest.mark.parametrize("how", ["machine goes", "launcher gone", "agent says so"])
def test_all_ranks_save_and_stop_when_one_machine_is_to_stop(run_of, follower, tmp_path, how):
    with Workers(run_of(LONG), tmp_path, 1, 2, span(follower)) as workers:
        until_it_trains(workers)
        if how == "machine goes":
            follower_process().terminate()
        elif how == "launcher gone":
            follower.close()
        else:
            assert workers.stop() == EXIT_STOPPED
        assert until_it_ends(workers) == EXIT_STOPPED
        wait_for(lambda: None not in workers.codes().values(), "all codes")
        assert workers.codes() == {0: EXIT_STOPPED, 1: EXIT_STOPPED}
        assert not workers.overdue
        assert workers.lost == ""
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/manifest.json")
    assert int(checkpoint.parent.name) == len(step_losses(tmp_path))


def test_a_follower_whose_agent_is_gone_kills_its_workers_and_serves_the_next(run_of, follower, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with Workers(run_of(LONG), first, 1, 2, span(follower)) as workers:
        until_it_trains(workers)
        (far,) = follower_process().children()
        workers.far[0]._socket.shutdown(socket.SHUT_RDWR)  # as when the agent's machine is lost
        wait_for(lambda: not far.is_running(), "the far worker to end")
    with Workers(run_of(8), second, 2, 2, span(follower)) as workers:
        assert until_it_ends(workers) == 0


def test_paused_workers_stand_still_everywhere_until_they_are_resumed(run_of, follower, tmp_path):
    with Workers(run_of(LONG), tmp_path, 1, 2, span(follower)) as workers:
        until_it_trains(workers)
        workers.pause()
        everywhere = processes("trainers.train")
        assert len(everywhere) == 2
        stopped = psutil.STATUS_STOPPED
        wait_for(lambda: all(process.status() == stopped for process in everywhere), "all to stand still")
        workers.resume()
        assert workers.stop() == EXIT_STOPPED


def test_stacks_of_workers_on_other_machines(run_of, follower, tmp_path):
    with Workers(run_of(LONG), tmp_path, 1, 2, span(follower)) as workers:
        until_it_trains(workers)
        (sight,) = workers.far_sights(30)
        assert sight["rank"] == 1
        assert "in _train_step" in sight["dump"]


def test_without_the_token_nothing_is_started(run_of, follower, tmp_path):
    with Workers(run_of(LONG), tmp_path, 1, 2, span(follower, token="guess")) as workers:
        wait_for(lambda: bool(workers.lost), "the refusal")
        assert follower_process().children() == []


@contextlib.contextmanager
def trickling(launcher_gone: threading.Event) -> Iterator[tuple[threading.Thread, socket.socket]]:
    """A follower's thread, and one who has connected and sends a byte now and then, but never a line."""
    follower = Follower(Invitation(LOOPBACK, "token"), launcher_gone, threading.Event())
    over = threading.Event()
    with socket.create_connection((LOOPBACK, follower.port)) as stranger:

        def trickle() -> None:
            with contextlib.suppress(OSError):
                while not over.wait(0.02):
                    stranger.sendall(b" ")

        threads = [threading.Thread(target=target) for target in (follower.serve, trickle)]
        for thread in threads:
            thread.start()
        try:
            yield threads[0], stranger
        finally:
            launcher_gone.set()
            over.set()
            threads[1].join()
    threads[0].join()


def test_who_never_comes_to_the_point_is_sent_away(monkeypatch):
    monkeypatch.setattr("mmsweep.follower.HELLO_S", 0.5)
    with trickling(threading.Event()) as (_, stranger):
        stranger.settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""


def test_a_follower_ends_with_its_launcher_whoever_is_talking(monkeypatch):
    monkeypatch.setattr("mmsweep.follower.HELLO_S", 600)
    launcher_gone = threading.Event()
    with trickling(launcher_gone) as (serving, _):
        launcher_gone.set()
        serving.join(60)
        assert not serving.is_alive()


def test_a_follower_that_is_not_there_is_a_lost_machine(run_of, tmp_path):
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    with Workers(run_of(LONG), tmp_path, 1, 2, Span(LOOPBACK, [(LOOPBACK, port)], "token")) as workers:
        assert workers.poll() == -signal.SIGKILL
        assert workers.lost == f"{LOOPBACK} of this run does not answer: Connection refused"


def test_runs_that_start_at_once_never_meet_at_one_port(run_of, tmp_path):
    folders = [tmp_path / str(k) for k in range(4)]
    ports = set()
    entered = []
    try:
        for folder in folders:
            folder.mkdir()
            entered.append(Workers(run_of(8), folder, 1, 1).__enter__())
            port = entered[-1].ranks.share.port
            ports.add(port)
            with pytest.raises(OSError, match="in use"):  # nobody else can have it before rank 0 is up
                socket.create_server((LOOPBACK, port))
    finally:
        for workers in entered:
            workers.__exit__()
    assert len(ports) == 4
