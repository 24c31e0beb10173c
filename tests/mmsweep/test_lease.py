"""Leases: one works, the others know who; and what dead, stopped, slow and cut-off owners leave."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tiny import job_of, tiny_run

from mmsweep import lease as leases
from mmsweep.agent import Agent, AgentProcess, Job, News
from mmsweep.lease import Claim, Lease, claims
from mmsweep.objects import DirectoryStore, NotFound, StoreError
from mmsweep.store import RunStore, open_store
from trainers import records

FOLDER = "grids/g.lease"

CLAIMANT = """
import os, sys, time
skew = float(sys.argv[2])
if skew:
    now = time.time
    time.time = lambda: now() + skew
from mmsweep.lease import Lease
from mmsweep.store import open_store
objects = open_store(sys.argv[1]).objects
print("ready", flush=True)
for line in sys.stdin:
    folder, ttl = line.split()
    lost = lambda: print("lost", flush=True)
    with Lease(objects, folder, "test", ttl=float(ttl), beat_s=0.1, on_lost=lost) as lease:
        owner = lease.acquire()
        print(os.getpid() if owner is None else owner.pid, flush=True)
        sys.stdin.readline()
    print("released", flush=True)
"""


class Claimant:
    """A process that claims leases on command, by a clock that may be wrong."""

    def __init__(self, url: str, skew: float = 0.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLAIMANT, url, str(skew)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def tell(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        return self.process.stdout.readline().strip()


@pytest.fixture
def claimant(store_url: str) -> Iterator[Callable[..., Claimant]]:
    started: list[Claimant] = []

    def start(skew: float = 0.0) -> Claimant:
        started.append(Claimant(store_url, skew))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        one.process.stdin.close()
        one.process.stdout.close()


def holding(one: Claimant, ttl: float = 30.0) -> Claimant:
    """Wait until a claimant has the lease."""
    assert one.hear() == "ready"
    one.tell(f"{FOLDER} {ttl}")
    assert int(one.hear()) == one.pid
    return one


# --- who wins -------------------------------------------------------------------------------------


def test_of_eight_claimants_exactly_one_works_and_seven_name_it(claimant, store_url):
    everybody = [claimant() for _ in range(8)]
    assert {one.hear() for one in everybody} == {"ready"}
    winners = []
    for turn in range(15 if "://" not in store_url else 5):
        for one in everybody:
            one.tell(f"grids/g{turn}.lease 30")
        named = {int(one.hear()) for one in everybody}
        assert len(named) == 1
        winners += named
        for one in everybody:
            one.tell("")
        assert {one.hear() for one in everybody} == {"released"}
    assert set(winners) <= {one.pid for one in everybody}
    assert open_store(store_url).objects.list("grids") == []


class Turns:
    """Lets one thread at a time do one store operation, in an order drawn by `draw`."""

    def __init__(self, threads: int, draw: random.Random) -> None:
        self.running = threads
        self.draw = draw
        self.waiting: list[str] = []
        self.chosen: str | None = None
        self.changed = threading.Condition()

    def take(self) -> None:
        me = threading.current_thread().name
        with self.changed:
            self.waiting.append(me)
            self.choose()
            assert self.changed.wait_for(lambda: self.chosen == me, timeout=30)
            self.waiting.remove(me)
            self.chosen = None

    def leave(self) -> None:
        with self.changed:
            self.running -= 1
            self.choose()

    def choose(self) -> None:
        if self.chosen is None and self.waiting and len(self.waiting) == self.running:
            self.chosen = self.draw.choice(sorted(self.waiting))
            self.changed.notify_all()


class InTurns:
    """Objects in memory, as far as leases need them; every operation waits for its turn."""

    url = "memory"

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.objects: dict[str, bytes] = {}
        self.marks: set[str] = set()
        """Keys of all marks of death, also of those that are gone."""
        self.last: dict[str, str] = {}
        """The newest claim of every claimant."""

    def children(self, prefix: str) -> list[str]:
        self.turns.take()
        return sorted(key.removeprefix(f"{prefix}/") for key in self.objects)

    def get(self, key: str) -> bytes:
        self.turns.take()
        if key not in self.objects:
            raise NotFound(key)
        return self.objects[key]

    def put(self, key: str, data: bytes) -> None:
        self.turns.take()
        self.objects[key] = data
        if data:
            claim = Claim.model_validate_json(data)
            self.last[claim.launch] = claim.nonce
        else:
            self.marks.add(key)

    def delete(self, key: str) -> None:
        self.turns.take()
        self.objects.pop(key, None)


class Contest:
    """Three claimants in one order of their operations; with `deaths`, some are declared dead by mistake."""

    def __init__(self, seed: int, deaths: int) -> None:
        self.draw = random.Random(seed)
        self.objects = InTurns(Turns(3 + (deaths > 0), self.draw))
        self.deaths = deaths
        self.holders: list[str] = []
        self.most: list[int] = []
        """Holders that nobody has declared dead, each time that one is added."""
        threads = [threading.Thread(target=self.claim, name=name) for name in "abc"]
        if deaths:
            threads.append(threading.Thread(target=self.declare_dead, name="d"))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def claim(self) -> None:
        name = threading.current_thread().name
        try:
            with Lease(self.objects, FOLDER, name, ttl=3600, beat_s=3600) as lease:
                assert any(lease.advance() for _ in range(1000)), "nobody gets on"
                self.holders.append(name)
                self.most.append(len([holder for holder in self.holders if holder not in self.dead()]))
                assert all(lease.renew() for _ in range(3)) or self.deaths  # hold it for a while
                self.holders.remove(name)
        finally:
            self.objects.turns.leave()

    def dead(self) -> set[str]:
        """Claimants whose last claim has been declared dead."""
        return {
            name
            for name, nonce in self.objects.last.items()
            if f"{FOLDER}/{nonce}.dead" in self.objects.marks
        }

    def declare_dead(self) -> None:
        try:
            for _ in range(self.deaths):
                for _ in range(self.draw.randrange(20)):
                    self.objects.turns.take()
                if found := [name for name in self.objects.children(FOLDER) if name.endswith(".json")]:
                    mark = self.draw.choice(found).replace(".json", ".dead")
                    self.objects.put(f"{FOLDER}/{mark}", b"")
        finally:
            self.objects.turns.leave()


@pytest.mark.parametrize("deaths", [0, 3])
def test_in_no_order_of_their_operations_two_hold_it_or_nobody_gets_it(deaths):
    for seed in range(200):
        contest = Contest(seed, deaths)
        assert len(contest.most) == 3, f"seed {seed}"  # all got it
        assert max(contest.most) == 1, f"seed {seed}"  # one after the other
        left = [key for key in contest.objects.objects if deaths == 0 or not key.endswith(".dead")]
        assert left == [], f"seed {seed}"


# --- owners that are gone -------------------------------------------------------------------------


def test_the_lease_of_a_killed_process_is_free_at_once(claimant, store_url):
    owner = holding(claimant())
    owner.process.kill()  # and not waited for: a zombie holds nothing
    begun = time.monotonic()
    with Lease(open_store(store_url).objects, FOLDER, "next") as lease:
        assert lease.acquire() is None
        assert time.monotonic() - begun < 10 < lease.ttl
        ((dead, cause),) = lease.taken_from
    assert (dead.pid, cause) == (owner.pid, "its process is gone")
    assert open_store(store_url).objects.list("grids") == []


def test_the_lease_of_a_machine_that_died_is_free_after_its_ttl(claimant, store_url):
    owner = holding(claimant(), ttl=1.0)
    owner.process.kill()
    objects = open_store(store_url).objects
    (claim,) = claims(objects, FOLDER)
    elsewhere = claim.model_copy(update={"machine": "elsewhere"})
    objects.put(f"{FOLDER}/{claim.nonce}.json", elsewhere.model_dump_json().encode())
    begun = time.monotonic()
    with Lease(objects, FOLDER, "next") as lease:
        assert lease.acquire() is None
        assert time.monotonic() - begun > 1.0
        assert lease.taken_from == [(elsewhere, "no heartbeat for 1 s")]


def test_a_stopped_owner_is_taken_over_after_its_ttl_and_finds_out(claimant, store_url):
    owner = holding(claimant(), ttl=1.0)
    os.kill(owner.pid, signal.SIGSTOP)
    objects = open_store(store_url).objects
    told: list[Claim] = []
    with Lease(objects, FOLDER, "next", beat_s=0.1) as lease:
        assert lease.acquire(on_silence=told.append) is None
        assert [(dead.pid, cause) for dead, cause in lease.taken_from] == [
            (owner.pid, "no heartbeat for 1 s")
        ]
        assert [claim.pid for claim in told] == [owner.pid]
        os.kill(owner.pid, signal.SIGCONT)
        assert owner.hear() == "lost"
        assert [claim.pid for claim in claims(objects, FOLDER)] == [os.getpid()]
        assert lease.renew()
    owner.tell("")
    assert owner.hear() == "released"
    assert objects.list("grids") == []


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_a_wrong_clock_neither_ends_an_owner_nor_keeps_it(claimant, store_url, skew):
    owner = holding(claimant(skew), ttl=2.0)
    with Lease(open_store(store_url).objects, FOLDER, "next", ttl=2.0) as lease:
        other = lease.acquire()
        assert other is not None
        assert other.pid == owner.pid
        assert abs(time.time() + skew - other.heartbeat) < 60
        assert lease.taken_from == []
        os.kill(owner.pid, signal.SIGSTOP)
        assert lease.acquire() is None


def test_a_lease_is_released_by_ctrl_c(claimant, store_url):
    owner = holding(claimant())
    owner.process.send_signal(signal.SIGINT)
    owner.process.wait()
    assert open_store(store_url).objects.list("grids") == []


def test_a_process_of_another_machine_is_not_looked_for_here(tmp_path):
    objects = DirectoryStore(tmp_path)
    with Lease(objects, FOLDER, "here") as lease:
        assert lease.acquire() is None
        (mine,) = claims(objects, FOLDER)
    dead = psutil.Process().pid  # any id; what is looked at is where
    gone = mine.model_copy(update={"pid": dead, "process_start": mine.process_start + 1})
    assert gone.process_is_gone()  # the id has come again
    assert not gone.model_copy(update={"machine": "elsewhere"}).process_is_gone()
    assert not mine.process_is_gone()


# --- stores that fail -----------------------------------------------------------------------------


class LosesAnswers(DirectoryStore):
    """Writes, and then fails, as when the answer of a store is lost."""

    def __init__(self, root: Path, losses: int) -> None:
        super().__init__(root)
        self.losses = losses

    def put(self, key: str, data: bytes) -> None:
        super().put(key, data)
        if self.losses:
            self.losses -= 1
            raise StoreError("no answer")


def test_a_lost_answer_to_one_s_own_write_is_no_rival(tmp_path):
    objects = LosesAnswers(tmp_path, losses=3)
    failures = 0
    with Lease(objects, FOLDER, "one") as lease:
        held = False
        while not held:
            try:
                held = lease.advance()
            except StoreError:
                failures += 1
        assert failures == 3
        assert len(claims(objects, FOLDER)) == 1
    assert objects.list("grids") == []


class Slow(DirectoryStore):
    """Holds one operation up, from when it is asked to: a `put`, one whose answer is lost, or a listing."""

    def __init__(self, root: Path, which: str) -> None:
        super().__init__(root)
        self.which = which
        self.slow, self.under_way, self.go_on = threading.Event(), threading.Event(), threading.Event()

    def hold_up(self) -> None:
        if self.slow.is_set():
            self.under_way.set()
            assert self.go_on.wait(60)

    def put(self, key: str, data: bytes) -> None:
        if self.which != "list":
            self.hold_up()
        super().put(key, data)
        if self.which == "lost" and self.slow.is_set():
            raise StoreError("no answer")

    def children(self, prefix: str) -> list[str]:
        if self.which == "list" and threading.current_thread().name.startswith("lease "):
            self.hold_up()
        return super().children(prefix)


@pytest.mark.parametrize("which", ["put", "lost", "list"])
def test_a_heartbeat_that_comes_after_the_release_brings_nothing_back(tmp_path, monkeypatch, which):
    monkeypatch.setattr(leases, "GAP_S", 0.05)
    objects = Slow(tmp_path, which)
    fenced = threading.Event()
    before = set(threading.enumerate())
    with Lease(objects, FOLDER, "one", beat_s=0.01, on_lost=fenced.set) as lease:
        assert lease.acquire() is None
        (keeper,) = set(threading.enumerate()) - before
        objects.slow.set()
        assert objects.under_way.wait(60)
    assert claims(objects, FOLDER) == []
    objects.go_on.set()
    keeper.join(60)
    assert not keeper.is_alive()
    assert objects.list("grids") == []
    assert not fenced.is_set()


def test_an_outage_is_not_taken_for_an_owner_s_silence(tmp_path, monkeypatch):
    """Between two looks the store may have been away for the owner too."""
    monkeypatch.setattr(leases, "GAP_S", 0.05)
    objects = DirectoryStore(tmp_path)
    with Lease(objects, FOLDER, "owner", ttl=0.12, beat_s=3600) as owner:
        assert owner.acquire() is None
        with Lease(objects, FOLDER, "observer") as observer:
            looks = 0
            while (observer.holder is not None or looks == 0) and looks < 10:
                observer.advance()
                looks += 1
                time.sleep(0.2)  # longer than the ttl
            assert looks == 4  # the first begins the clock, two count .05 s each, the next is too many


def test_a_damaged_claim_is_named(tmp_path):
    objects = DirectoryStore(tmp_path)
    objects.put(f"{FOLDER}/{'0' * 32}.json", b"{}")
    with (
        Lease(objects, FOLDER, "one") as lease,
        pytest.raises(StoreError, match=rf"{FOLDER}/0+\.json: not a claim written by mmsweep; remove it"),
    ):
        lease.acquire()


# --- agents ---------------------------------------------------------------------------------------


def job(store: RunStore, texts: str, steps: int) -> Job:
    return job_of(tiny_run(texts, steps=steps, every=200), store)


def news_until(agent: AgentProcess, wanted: Callable[[News], bool]) -> list[News]:
    heard: list[News] = []
    deadline = time.monotonic() + 60
    while not heard or not wanted(heard[-1]):
        assert time.monotonic() < deadline, heard
        if (news := agent.news(timeout=1.0)) is not None:
            heard.append(news)
    return heard


def workers_of(agent_run: str) -> list[psutil.Process]:
    """Of these tests, known by their cache: others may train the same run on this machine."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get("MMSWEEP_CACHE") == os.environ["MMSWEEP_CACHE"]
            line = " ".join(process.cmdline())
            if ours and "trainers.train" in line and agent_run in line:
                found.append(process)
    return found


def test_a_run_of_two_sweeps_is_trained_once(tmp_path, texts, agent_for):
    store = open_store(str(tmp_path / "store"))
    shared = job(store, texts, steps=300)
    pair = [agent_for(shared), agent_for(shared)]
    heard = [news_until(agent, lambda news: news.done) for agent in pair]
    assert [news[-1].status for news in heard] == [records.COMPLETED] * 2
    waited = [any(n.reason.startswith("waits for pid") for n in news) for news in heard]
    assert sorted(waited) == [False, True]
    assert [any(n.train_loss is not None for n in news) for news in heard] == [not w for w in waited]
    assert store.summary(shared.run_id)["attempts"] == 1
    assert store.objects.list(f"runs/{shared.run_id}/leases") == []


def test_an_agent_that_lost_its_lease_stops_its_workers_and_waits_for_the_result(tmp_path, texts, agent_for):
    store = open_store(str(tmp_path / "store"))
    lost = job(store, texts, steps=100_000)
    agent = agent_for(lost)
    news_until(agent, lambda news: news.step > 0)
    assert len(workers_of(lost.run_id)) == 1
    folder = f"runs/{lost.run_id}/leases"
    (claim,) = claims(store.objects, folder)
    store.objects.put(f"{folder}/{claim.nonce}.dead", b"")  # as somebody who waited for its ttl does
    with store.run_lease(lost.run_id, "other") as lease:
        assert lease.acquire() is None
        heard = news_until(agent, lambda news: f"waits for pid {os.getpid()}" in news.reason)
        assert any("somebody else has taken the run over" in news.reason for news in heard)
        assert workers_of(lost.run_id) == []
        assert [one.pid for one in claims(store.objects, folder)] == [os.getpid()]
        store.put_summary(
            lost.run_id,
            {"status": "completed", "reason": "", "steps": 7, "horizon": 7, "final_val_loss": 1.0},
        )
    end = news_until(agent, lambda news: news.done)[-1]
    assert (end.status, end.step) == (records.COMPLETED, 7)


def test_a_newer_attempt_fences_an_agent(tmp_path, texts):
    store = open_store(str(tmp_path / "store"))
    older = Agent(job(store, texts, steps=10), threading.Event())
    older.lease = store.run_lease(older.job.run_id, "test")
    older.attempt, older.run_dir = 1, tmp_path
    newer = {"status": records.RUNNING, "attempt": 2}
    store.put_status(older.job.run_id, newer)
    older.publish()
    assert older.lease.lost.is_set()
    assert store.status(older.job.run_id) == newer
