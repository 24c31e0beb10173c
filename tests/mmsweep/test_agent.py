"""Agents of real runs, and what happens to them: notices, kills, hangs, poison, full spools, requests."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import job_of, tiny_run

from mmsweep import agent as agents
from mmsweep import evidence, failures
from mmsweep.agent import Agent, AgentProcess, Job, News
from mmsweep.contents import LOGS, contents, kind_in_run
from mmsweep.failures import BAD_INPUT, CRASH, DEVICE, HANG, KILLED, LOST, OOM, PREEMPTED
from mmsweep.keep import garbage, problems_of
from mmsweep.lease import claims
from mmsweep.objects import DirectoryStore, StoreError
from mmsweep.scratch import scratch
from mmsweep.store import RunStore, open_store
from mmsweep.workers import Workers
from trainers import records
from trainers.provenance import code_digest

DEADLINE_S = 90.0


@pytest.fixture
def store(tmp_path) -> RunStore:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def job(store, texts) -> Callable[..., Job]:
    """A job of a tiny run of `steps`; other keywords are its resources."""

    def make(steps: int = 100_000, path: str = texts, every: int = 200, **resources: Any) -> Job:
        return job_of(tiny_run(path, steps=steps, every=every), store, "first launch", **resources)

    return make


@dataclass
class Attempt:
    """An agent in a thread of this process, so that its workers are children of this process."""

    job: Job
    launcher_gone: threading.Event = field(default_factory=threading.Event)
    machine_goes: threading.Event = field(default_factory=threading.Event)
    end: News | None = None
    objects: DirectoryStore | None = None
    """Instead of those that the job names."""

    def __post_init__(self) -> None:
        self.agent = Agent(self.job, self.launcher_gone, self.machine_goes)
        if self.objects is not None:
            self.agent.store.objects = self.objects
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.end = self.agent.run()

    def ended(self) -> News:
        self.thread.join(DEADLINE_S)
        assert self.end is not None, f"no end in {DEADLINE_S} s: {self.agent.news}"
        return self.end

    def status(self) -> dict[str, Any]:
        return self.agent.store.status(self.job.run_id)

    def workers(self) -> list[psutil.Process]:
        """By rank."""
        children = [one for one in psutil.Process().children() if "trainers.train" in one.cmdline()]
        mine = [one for one in children if str(self.agent.run_dir) in " ".join(one.cmdline())]
        return sorted(mine, key=lambda one: int(one.environ()["RANK"]))

    def trains(self) -> list[psutil.Process]:
        """Wait until it does; returns the workers."""
        wait_for(lambda: self.agent.news.train_loss is not None and self.agent.news.step > 5, "steps")
        return self.workers()


@pytest.fixture
def attempt() -> Iterator[Callable[..., Attempt]]:
    started: list[Attempt] = []

    def start(job: Job, objects: DirectoryStore | None = None) -> Attempt:
        started.append(Attempt(job, objects=objects))
        return started[-1]

    yield start
    for one in started:
        one.launcher_gone.set()
        one.ended()
    assert not [one for one in psutil.Process().children() if "trainers.train" in one.cmdline()]


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s for {what}"
        time.sleep(0.05)


def losses(store: RunStore, run: str) -> list[float]:
    """Of every step, each of which is there once and in order."""
    table = store.table(run, "steps").to_pydict()
    assert table["step"] == list(range(1, len(table["step"]) + 1))
    assert store.conflicts(run) == []
    return table["loss"]


def kinds(status: dict[str, Any]) -> list[str]:
    return [failure["kind"] for failure in status["failures"]]


def process_until(agent: AgentProcess, wanted: Callable[[News], bool]) -> News:
    heard: list[News] = []
    deadline = time.monotonic() + DEADLINE_S
    while not heard or not wanted(heard[-1]):
        assert time.monotonic() < deadline, heard
        if (news := agent.news(timeout=1.0)) is not None:
            heard.append(news)
    return heard[-1]


def agent_pid(store: RunStore, job: Job) -> int:
    (claim,) = claims(store.objects, f"runs/{job.run_id}/leases")
    return claim.pid


# --- the machine goes away ------------------------------------------------------------------------


def test_sigterm_to_an_agent_loses_no_step(job, store, agent_for, tmp_path):
    wanted = job(steps=1200, every=700)
    first = agent_for(wanted)
    before = process_until(first, lambda news: news.step > 100)
    pid = agent_pid(store, wanted)
    for _ in range(2):  # a second one changes nothing
        os.kill(pid, signal.SIGTERM)
    end = process_until(first, lambda news: news.done)
    assert (end.status, end.retry, end.preempted, end.kind) == (records.PENDING, True, True, PREEMPTED)
    assert before.step <= end.step < 1200
    assert end.reason == f"machine taken away; its state is saved at step {end.step}"
    status = store.status(wanted.run_id)
    assert (status["status"], status["reason"], kinds(status)) == (records.PENDING, end.reason, [PREEMPTED])
    assert claims(store.objects, f"runs/{wanted.run_id}/leases") == []

    done = process_until(agent_for(wanted), lambda news: news.done)
    assert (done.status, done.kind, done.tries, done.preempted) == (records.COMPLETED, "", 2, False)
    attempts = store.table(wanted.run_id, "steps").to_pydict()["attempt"]
    assert attempts == [1] * end.step + [2] * (1200 - end.step)  # it began where the first stopped
    summary = store.summary(wanted.run_id)
    assert summary["device_seconds"] > summary["train_seconds"]

    elsewhere = open_store(str(tmp_path / "undisturbed"))
    process_until(agent_for(replace(wanted, store=elsewhere.url)), lambda news: news.done)
    assert losses(store, wanted.run_id) == losses(elsewhere, wanted.run_id)


class Stalls(DirectoryStore):
    """Does not answer for keys that match, until the end of the test."""

    def __init__(self, root: Path, method: str, keys: str) -> None:
        super().__init__(root)
        self.method, self.keys = method, re.compile(keys)
        self.asked, self.over = threading.Event(), threading.Event()

    def _stall(self, method: str, key: str) -> None:
        if method == self.method and self.keys.search(key):
            self.asked.set()
            self.over.wait()
            raise StoreError("too late")

    def get(self, key: str) -> bytes:
        self._stall("get", key)
        return super().get(key)

    def put(self, key: str, data: bytes) -> None:
        self._stall("put", key)
        super().put(key, data)


def test_a_notice_also_ends_what_comes_before_and_after_training(job, store, attempt):
    wanted = job(steps=30)
    stalls = [
        Stalls(store.objects.root, "put", r"\.parquet$"),  # while it compacts
        Stalls(store.objects.root, "get", r"checkpoints/.*manifest"),  # while it restores
    ]
    for number, objects in enumerate(stalls, start=1):
        begun = attempt(wanted, objects)
        wait_for(objects.asked.is_set, "the store to be asked")
        begun.machine_goes.set()
        end = begun.ended()
        assert (end.status, end.retry, end.preempted) == (records.PENDING, True, True)
        status = store.status(wanted.run_id)
        assert (status["status"], kinds(status)) == (records.PENDING, [PREEMPTED] * number)
        assert list(problems_of(store, contents(store))) == []
        objects.over.set()
    assert attempt(wanted).ended().status == records.COMPLETED
    assert len(losses(store, wanted.run_id)) == 30
    assert store.summary(wanted.run_id)["attempts"] == 3


def test_a_notice_ends_the_wait_for_somebody_else(job, store, attempt):
    wanted = job()
    with store.run_lease(wanted.run_id, "other") as lease:
        assert lease.acquire() is None
        waits = attempt(wanted)
        wait_for(lambda: "waits for pid" in waits.agent.news.reason, "it to wait")
        waits.machine_goes.set()
        end = waits.ended()
        assert (end.status, end.retry, end.preempted) == (records.PENDING, True, True)
        assert store.status(wanted.run_id) is None  # that of the other
        assert lease.renew()


# --- workers that die or stop ---------------------------------------------------------------------


def test_a_stopped_and_a_killed_rank_cost_an_attempt_each(job, store, attempt):
    wanted = job(steps=700, every=50, workers=2, max_failures=2)
    first = attempt(wanted)
    stopped = first.trains()[1]
    stopped.suspend()

    def silent() -> bool:
        first.agent.silence = 900.5  # as if so long had passed; a record that was on its way resets it
        return first.end is not None

    wait_for(silent, "the watchdog")
    assert re.fullmatch(
        r"no record for 15:0\d after step \d+; rank 1 is stopped by a signal \(SIGSTOP\); try 2 of 3",
        first.end.reason,
    )
    assert (first.end.status, first.end.kind, first.end.retry) == (records.PENDING, HANG, True)
    logs = {rank: _log(store, wanted, 1, rank) for rank in (0, 1)}
    assert "Current thread " in logs[0]
    assert "/trainers/train.py" in logs[0]  # where it waits
    assert "is stopped by a signal" in logs[1]
    assert first.status()["log_tail"][-1].endswith("is stopped by a signal (SIGSTOP)")
    held = contents(store).runs[wanted.run_id]
    assert [name for name in held if kind_in_run(name) == LOGS] == [
        "attempt-001/rank-0.log",
        "attempt-001/rank-1.log",
    ]

    second = attempt(wanted)
    second.trains()[1].kill()
    end = second.ended()
    assert end.reason.endswith("(rank 1 got SIGKILL from outside); try 3 of 3")
    assert (end.kind, end.tries) == (KILLED, 2)

    third = attempt(wanted)
    third.trains()
    wait_for(lambda: kinds(third.status()) == [HANG, KILLED], "the history")
    assert third.agent.news.reason == end.reason  # why this is the third try
    assert third.ended().status == records.COMPLETED
    assert len(losses(store, wanted.run_id)) == 700
    assert [failure["attempt"] for failure in third.status()["failures"]] == [1, 2]
    found = contents(store)
    assert list(problems_of(store, found)) == []
    assert not [item for item in garbage(store, found) if "log" in item.what]


def _log(store: RunStore, job: Job, number: int, rank: int) -> str:
    return store.objects.get(f"runs/{job.run_id}/attempt-{number:03d}/rank-{rank}.log").decode()


def test_a_lost_attempt_is_in_the_history_and_leaves_nothing_behind(
    job, store, agent_for, tmp_path, monkeypatch
):
    """Its worker is paused, as while the store is away, when the agent is killed.

    The next agent on the machine removes the folder that it worked in, and no other.
    """
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "mmsweep-of-an-older-version").mkdir()
    wanted = job()
    first = agent_for(wanted)
    process_until(first, lambda news: news.step > 5)
    wait_for(lambda: (store.status(wanted.run_id) or {}).get("step"), "a status")
    agent = psutil.Process(agent_pid(store, wanted))
    (worker,) = (one for one in agent.children() if "trainers.train" in one.cmdline())
    worker.suspend()
    wait_for(lambda: worker.status() == psutil.STATUS_STOPPED, "the worker to be paused")
    agent.kill()
    assert process_until(first, lambda news: news.done).kind == LOST
    psutil.wait_procs([worker], timeout=DEADLINE_S)
    assert not worker.is_running()
    (left,) = tmp_path.glob(f"mmsweep-{wanted.run_id}-*")
    assert (left / "run.yaml").is_file()

    with scratch("alive") as alive:
        assert not left.exists()
        left = Path(shutil.copytree(alive, left))  # as it was: a mark, and nobody who holds it
        news = process_until(agent_for(wanted), lambda news: news.attempt == 2)
        assert alive.is_dir()
    assert not left.exists()
    assert (tmp_path / "mmsweep-of-an-older-version").is_dir()
    wait_for(lambda: store.status(wanted.run_id)["attempt"] == 2, "its status")
    status = store.status(wanted.run_id)
    (lost,) = status["failures"]
    assert (lost["kind"], lost["attempt"], lost["launch"]) == (LOST, 1, "first launch")
    assert (news.attempt, news.tries, news.reason) == (2, 2, "")
    assert status["device_seconds"] > 0


def test_workers_without_a_checkout_name_the_launch_s(job, store, agent_for, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    git = {"commit": "0123abcd" * 5, "dirty": True}
    wanted = replace(job(steps=4), checkout={"code": code_digest(), **git})
    assert process_until(agent_for(wanted), lambda news: news.done).status == records.COMPLETED
    assert store.config(wanted.run_id)["provenance"]["git"] == git


class Stub(Workers):
    """Workers of a trainer that is `code`."""

    code = ""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.command = [sys.executable, "-c", self.code, *self.command[1:]]


@pytest.fixture
def trainer(monkeypatch) -> Callable[[str], None]:
    monkeypatch.setattr(agents, "Workers", Stub)
    return lambda code: monkeypatch.setattr(Stub, "code", code)


def test_poison_is_quarantined_after_two_tries(job, store, attempt, trainer):
    trainer(
        "import os\n"
        "file = f'/tmp/mmsweep-{os.getpid()}/x'\n"
        "raise ValueError(f'no {object()} in process {os.getpid()} at {file}')"
    )
    wanted = job(max_failures=5)
    first = attempt(wanted).ended()
    assert (first.status, first.retry, first.kind) == (records.PENDING, True, CRASH)
    assert first.reason.startswith("crashed at step 0 (ValueError: no <object")
    assert first.reason.endswith("); try 2 of 6")
    second = attempt(wanted).ended()
    assert (second.status, second.retry) == (records.QUARANTINED, False)
    assert second.reason.startswith("twice the same error: ValueError: no <object")
    status = store.status(wanted.run_id)
    assert (status["status"], kinds(status)) == (records.QUARANTINED, [CRASH, CRASH])
    assert status["log_tail"][0] == "Traceback (most recent call last):"
    assert "ValueError" in _log(store, wanted, 2, 0)

    third = attempt(wanted).ended()  # nobody should ask, and nothing is tried
    assert (third.status, third.reason, third.attempt) == (second.status, second.reason, 2)
    again = attempt(replace(wanted, launch="another launch")).ended()
    assert (again.status, again.tries, again.attempt) == (records.PENDING, 1, 3)
    assert len(store.status(wanted.run_id)["failures"]) == 3


def test_after_many_crashes_a_run_waits_and_a_notice_ends_the_wait(job, store, attempt):
    wanted = job(max_failures=99)
    crashes = [
        failures.Failure(number, CRASH, "x" * number, 0, wanted.launch, "here", time.time())
        for number in range(1, 8)
    ]
    before = {"status": records.PENDING, "attempt": 7, "failures": failures.to_json(crashes)}
    store.put_status(wanted.run_id, before)
    one = attempt(wanted)  # to begin in a minute
    wait_for(lambda: one.agent.news.attempt == 8, "the attempt")
    time.sleep(1)
    one.machine_goes.set()
    assert one.ended().reason == "machine taken away; nothing was begun"
    assert kinds(one.status()) == [CRASH] * 7 + [PREEMPTED]


def test_a_run_that_needs_too_much_memory_is_tried_once_more(job, store, attempt, trainer):
    trainer("print('torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB'); exit(1)")
    wanted = job(max_failures=0)
    first, second = attempt(wanted).ended(), attempt(wanted).ended()
    assert (first.status, first.retry, first.kind) == (records.PENDING, True, OOM)
    assert (second.status, second.retry, second.kind) == (records.OOM, False, OOM)
    assert "CUDA out of memory. Tried to allocate 9 GiB" in second.reason


def test_workers_that_end_without_a_result_have_failed(job, attempt, trainer):
    trainer("pass")
    end = attempt(job(max_failures=0)).ended()
    assert (end.status, end.kind, end.retry) == (records.FAILED, CRASH, False)
    said = "crashed at step 0 (its workers ended well and without a result); that was try 1 of 1"
    assert end.reason == said


def test_bad_input_is_never_tried_again(job, attempt):
    wanted = job()
    wanted.run["data"]["path"] = "/nowhere/*.txt"
    end = attempt(wanted).ended()
    assert (end.status, end.retry, end.kind) == (records.FAILED, False, BAD_INPUT)
    assert "/nowhere/*.txt" in end.reason


def test_a_gpu_that_is_not_there_keeps_its_place_for_a_while_and_costs_no_failure(
    job, store, attempt, monkeypatch
):
    """As after a driver has failed. Without the pause the place would be free at once for the next run,
    which would fail there too."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")  # Ray gives it; no machine of these tests has as many
    monkeypatch.setattr(agents, "HOLD_S", 2.0)
    wanted = job(max_failures=0, max_preemptions=1)
    first = attempt(wanted)
    wait_for(lambda: first.agent.news.kind == DEVICE, "the failure")
    begun = time.monotonic()
    assert store.status(wanted.run_id)["status"] == records.PENDING
    end = first.ended()
    assert time.monotonic() - begun > 1.5
    assert (end.status, end.retry, end.preempted) == (records.PENDING, True, False)
    assert "CUDA_VISIBLE_DEVICES names 1 GPU and torch finds none; mend that machine" in end.reason
    second = attempt(wanted).ended()
    assert (second.status, second.retry) == (records.FAILED, False)
    assert second.reason.endswith("; 2 losses of a machine, and resources.max_preemptions is 1")
    assert kinds(store.status(wanted.run_id)) == [DEVICE, DEVICE]
    monkeypatch.setattr(agents, "HOLD_S", 10 * DEADLINE_S)
    third = attempt(replace(wanted, launch="another launch"))
    wait_for(lambda: third.agent.news.kind == DEVICE, "the failure")
    third.launcher_gone.set()  # nobody is left to try it again: the place is free
    assert third.ended().retry


def test_losses_of_machines_have_a_budget_of_their_own(job, store, attempt, trainer):
    trainer("import time; time.sleep(600)")
    wanted = job(max_failures=0, max_preemptions=2)
    ends = []
    for _ in range(3):
        one = attempt(wanted)
        wait_for(lambda one=one: one.agent.trained_since is not None, "workers")
        one.machine_goes.set()
        ends.append(one.ended())
    assert [(end.status, end.retry) for end in ends] == [
        (records.PENDING, True),
        (records.PENDING, True),
        (records.FAILED, False),
    ]
    assert ends[0].reason == "machine taken away; nothing was saved yet"
    assert ends[2].reason.endswith("; 3 losses of a machine, and resources.max_preemptions is 2")


DEAF = """
import signal, sys, time
from pathlib import Path
from trainers.records import EvalRecord, PartWriter
signal.signal(signal.SIGTERM, signal.SIG_IGN)
record = EvalRecord("a-run", 1, step=0, tokens_seen=0, train_loss=5.5, val_loss=5.5, time=0.0)
PartWriter(Path(sys.argv[sys.argv.index("--run-dir") + 1]), attempt=1).append(record)
time.sleep(600)
"""


@pytest.mark.parametrize("preempted", [False, True])
def test_a_worker_that_does_not_stop_in_time_is_killed(job, store, attempt, trainer, monkeypatch, preempted):
    monkeypatch.setattr("mmsweep.workers.STOP_GRACE_S", 1.0)
    trainer(DEAF)
    one = attempt(job())
    wait_for(lambda: one.agent.news.val_loss is not None, "a record")
    (worker,) = one.workers()
    (one.machine_goes if preempted else one.launcher_gone).set()
    end = one.ended()
    said = "asked to stop, a worker had not ended after 1 s and was killed"
    if preempted:
        assert (end.status, end.kind, end.retry) == (records.PENDING, PREEMPTED, True)
        assert end.reason == f"machine taken away; nothing was saved yet ({said})"
    else:
        assert (end.status, end.kind, end.retry) == (records.FAILED, HANG, False)
        assert end.reason == said
    assert one.status()["status"] == end.status
    assert not worker.is_running()


# --- requests, and a store with no room -----------------------------------------------------------


def test_a_request_stops_a_run_and_keeps_it_from_beginning(job, store, attempt, monkeypatch):
    monkeypatch.setattr("mmsweep.shipper.STATUS_S", 0.2)
    wanted = job()
    one = attempt(wanted)
    one.trains()
    store.request_stop(run_id=wanted.run_id)
    end = one.ended()
    assert (end.status, end.reason, end.retry) == (records.PENDING, "stopped by request", False)
    assert store.saved_step(wanted.run_id) == end.step > 5
    assert store.status(wanted.run_id)["failures"] == []

    again = attempt(wanted).ended()
    assert (again.status, again.reason, again.attempt) == (records.PENDING, "stopped by request", 1)
    assert store.status(wanted.run_id)["reason"] == "stopped by request"


def test_workers_pause_while_too_much_waits_for_the_store(job, store, attempt):
    root, room = store.objects.root, 1e-6
    wanted = job(every=20, spool_gb=room)
    one = attempt(wanted)
    (worker,) = one.trains()

    def paused() -> bool:
        """For good, that is: so little room is full now and then with the store there, too."""
        waiting = store.waiting(wanted.run_id, one.agent.run_dir)
        return waiting > 1e9 * room and worker.status() == psutil.STATUS_STOPPED

    def still() -> bool:
        before = one.agent.silence, one.agent.news.step
        time.sleep(1)
        return (one.agent.silence, one.agent.news.step) == before

    def away() -> None:
        root.rename(root.with_name("away"))
        root.write_text("a file where the store should be")
        wait_for(paused, "the worker to be paused")

    def back() -> None:
        root.unlink()
        root.with_name("away").rename(root)

    away()
    wait_for(lambda: one.agent.news.reason.startswith("paused: no more room"), "the reason")
    wait_for(still, "no step, and no silence that would be called a hang")
    step = one.agent.news.step
    back()
    wait_for(lambda: one.agent.news.step > step, "it to go on")
    wait_for(lambda: one.agent.news.reason == "", "it to be well")

    away()
    one.launcher_gone.set()  # it wakes its workers, so that they can save
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "the worker to end")
    back()
    end = one.ended()
    assert (end.status, end.reason) == (records.PENDING, "stopped; its state is saved")
    assert store.saved_step(wanted.run_id) == end.step


def test_paused_workers_get_their_breath(monkeypatch):
    """Else a collective that was under way would time out."""
    now = 1000.0
    monkeypatch.setattr(agents.time, "monotonic", lambda: now)
    said: list[tuple[str, float]] = []

    class Watched:
        def pause(self) -> None:
            said.append(("pause", now))

        def resume(self) -> None:
            said.append(("resume", now))

    pauses = agents._Pauses(Watched())
    for _ in range(1000):
        pauses.look(full=1010 < now < 1700)
        now += 1
    spans = [(what, at) for what, at in said]
    assert [what for what, _ in spans] == ["pause", "resume"] * (len(spans) // 2)
    asleep = [end - begin for (_, begin), (_, end) in zip(spans[::2], spans[1::2], strict=True)]
    assert max(asleep) <= agents.PAUSE_S + 1
    assert sum(asleep) > 0.9 * 690
    assert spans[-1] == ("resume", 1700)


# --- stacks ---------------------------------------------------------------------------------------

STUCK = """
import faulthandler, signal, sys, threading, time
if "deaf" not in sys.argv:
    faulthandler.register(signal.SIGUSR1, file=2)
def wait_for_the_others():
    print("ready", flush=True)
    time.sleep(600)
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
wait_for_the_others()
"""


def test_stacks_of_workers_that_answer_and_of_those_that_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "ANSWER_S", 3.0)
    (tmp_path / evidence.LOGS).mkdir()
    started: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for rank, words in enumerate(([], [], ["deaf"])):
            with evidence.log_path(tmp_path, rank).open("wb") as log:
                command = [sys.executable, "-c", STUCK, *words]
                started[rank] = subprocess.Popen(command, stdout=log, stderr=log)
        for rank in started:
            wait_for(lambda rank=rank: "ready" in evidence.read_logs(tmp_path)[rank], "a worker")
        stopped = psutil.Process(started[1].pid)
        stopped.suspend()
        wait_for(lambda: stopped.status() == psutil.STATUS_STOPPED, "it to stop")
        sights = evidence.stacks(started, tmp_path)
    finally:
        for one in started.values():
            one.kill()
            one.wait()
    assert [str(sight) for sight in sights[:2]] == [
        "in wait_for_the_others (<string>:7)",
        "stopped by a signal (SIGSTOP)",
    ]
    assert sights[0].dump.count("most recent call first") == 2  # of both threads
    assert failures.hung(sights).rank == 1
    logs = evidence.read_logs(tmp_path)
    assert "wait_for_the_others" in logs[0]
    assert f"rank 1 (pid {started[1].pid}) is stopped by a signal (SIGSTOP)" in logs[1]
    assert "is silent: no answer to SIGUSR1" in logs[2]


def test_of_a_long_log_the_end_is_kept(tmp_path, store):
    (tmp_path / evidence.LOGS).mkdir()
    evidence.log_path(tmp_path, 0).write_text("first\n" + "x" * (2 * evidence.LOG_BYTES) + "\nlast\n")
    evidence.keep_logs(store, "plain-s1-00000000", 12, evidence.read_logs(tmp_path))
    (entry,) = store.objects.entries("runs")
    assert (entry.key, entry.bytes) == ("runs/plain-s1-00000000/attempt-012/rank-0.log", evidence.LOG_BYTES)
    assert store.objects.get(entry.key).endswith(b"x\nlast\n")
    assert store.next_attempt("plain-s1-00000000") == 13
