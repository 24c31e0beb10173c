"""The agent of one run: starts its workers, ships what they write, and reports how it goes.

It holds the run's lease while it works, so that two sweeps which share a run train it once.

It knows nothing of Ray. It reads one line of JSON (`Job`) from standard input, and then treats the
end of standard input as "whoever launched me is gone": the workers save, the last files are
shipped, and it ends. So neither a Ctrl-C nor a killed driver loses more than the step under way.
SIGTERM means "this machine goes away" and has the same effect, but the run is to go on elsewhere.
It writes one line of JSON to standard output for every piece of news.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mmsweep import evidence, failures
from mmsweep import workers as worker_processes
from mmsweep.budget import devices
from mmsweep.detached import Detached, answer
from mmsweep.failures import BAD_INPUT, CRASH, DEVICE, HANG, LOST, PREEMPTED, Cause, Failure, Sight
from mmsweep.lease import POLL_S as LEASE_POLL_S
from mmsweep.lease import Lease
from mmsweep.resources import Resources
from mmsweep.scratch import scratch
from mmsweep.shipper import Shipper
from mmsweep.store import DamagedError, RunStore, StoreError, open_store
from mmsweep.workers import EXIT_BAD_INPUT, EXIT_STOPPED, Span, Workers
from trainers import records
from trainers.farewell import leave
from trainers.manifest import checkpoint_steps
from trainers.provenance import CHECKOUT
from trainers.records import EvalRecord, PartReader, StepRecord

POLL_S = 0.1
WAIT_S = 1.0
"""Pause between two looks at a run that somebody else works on."""
ASK_S = 5.0
"""Pause between two looks for a request to stop, where no status is published."""
HOLD_S = 60.0
"""How long an agent keeps the place of a GPU that is gone or broken, before its run is tried elsewhere."""
LAST_SHIP_S = 120.0
"""How long an agent without a launcher tries to reach the store before it gives up."""
SETTLE_S = 3.0
"""When one worker has failed, how long the others may take to say what they know."""
GAP_S = 5.0
"""No longer than this counts between two looks at a silent run: this process may have been stopped too."""
PAUSE_S, BREATH_S = 240.0, 5.0
"""Paused workers go on for a moment now and then: a collective that is under way as they are paused fails
once `trainers.distributed.COLLECTIVE_TIMEOUT` of wall-clock time has passed."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """One run to do."""

    run_id: str
    run: dict[str, Any]
    store: str
    launch: str = "by hand"
    """The name of the launch, for people who wait for the run."""
    resources: dict[str, Any] = field(default_factory=dict)
    """`resources` of the grid."""
    span: dict[str, Any] | None = None
    """A `mmsweep.workers.Span`, for a run of several machines."""
    checkout: dict[str, Any] | None = None
    """Of the launch's machine: see `trainers.provenance.checkout`."""

    @property
    def limits(self) -> Resources:
        return Resources.model_validate(self.resources)

    @staticmethod
    def parse(line: str) -> Job:
        return Job(**json.loads(line))


@dataclass(frozen=True, slots=True)
class News:
    """Progress, or with `done` the end: what a launcher shows and decides on."""

    status: str
    step: int = 0
    steps: int = 0
    attempt: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    tokens_per_s: float | None = None
    reason: str = ""
    done: bool = False
    retry: bool = False
    """The run is to be tried again, here or elsewhere."""
    preempted: bool = False
    """The machine goes away; nothing is wrong with the run."""
    kind: str = ""
    """Of the failure that ended this attempt: one of `mmsweep.failures`."""
    tries: int = 0
    """Attempts of this launch, this one included."""

    def line(self) -> str:
        return records.dumps(asdict(self))


class Agent:
    def __init__(
        self, job: Job, launcher_gone: threading.Event, machine_goes: threading.Event | None = None
    ) -> None:
        """Either event, once set, ends the work; `machine_goes` asks for another attempt elsewhere."""
        self.job = job
        self.launcher_gone = launcher_gone
        self.machine_goes = machine_goes or threading.Event()
        self.stop_asked = threading.Event()
        """Somebody has asked in the store for this run to stop."""
        self.store: RunStore = open_store(job.store)
        self.lease: Lease
        self.run_dir: Path
        self.started = time.time()
        self.attempt = 0
        self.config_shipped = False
        self.recorded = False
        """The workers of this attempt have written something."""
        self.progressed = self.started
        """When the last record was written: a worker that hangs stops this clock."""
        self.silence = 0.0
        """Seconds without a record in which the workers could have written one."""
        self.failures: list[Failure] = []
        """What went wrong so far, also in other launches."""
        self.log_tail: list[str] = []
        """Last words of the worker that tells why this attempt failed."""
        self.note = ""
        """Why this is not the first try."""
        self.device_seconds = 0.0
        """Of the attempts before this one."""
        self.trained_since: float | None = None
        self.trained_until: float | None = None
        """When the workers of this attempt began and ended, by the monotonic clock."""
        self.news = News(records.RUNNING, steps=job.run["schedule"]["steps"])

    def run(self) -> News:
        """Do the job; returns the last news. By then the run's lease and local folder are gone."""
        try:
            self._work()
        except _ToldToEndError:
            self._tell(**self._told())
        except (_GaveUpError, DamagedError) as error:
            taken = self.machine_goes.is_set() and isinstance(error, _GaveUpError)
            status = records.PENDING if taken else records.FAILED
            self._tell(status=status, reason=str(error), retry=taken, preempted=taken)
        if self.news.retry and self.news.kind == DEVICE:
            # Its place is free for the next run the moment this process ends, which would fail there too.
            with contextlib.suppress(_ToldToEndError):
                self._rest(HOLD_S)
        return self._tell(done=True)

    # --- before and after an attempt --------------------------------------------------------------

    def _work(self) -> None:
        """Take the run's result, or make it."""
        while not self._take_result():
            with (
                self.store.run_lease(self.job.run_id, self.job.launch) as self.lease,
                scratch(self.job.run_id) as self.run_dir,
            ):
                self._wait_for_lease()
                with contextlib.suppress(_FencedError):
                    if not self._take_result():  # whoever had the lease has not finished
                        self._attempt()
                    return
            self._tell(status=records.PENDING, reason="somebody else has taken the run over; workers stopped")

    def _take_result(self) -> bool:
        summary = self._read(lambda: self.store.summary(self.job.run_id))
        if summary is not None:
            self._tell(status=summary["status"], step=summary["steps"], reason="")
        return summary is not None

    def _wait_for_lease(self) -> None:
        asked = 0.0
        while not self._patiently(self.lease.advance):
            holder = self.lease.holder
            if holder is not None and self.news.reason != (reason := f"waits for {holder.who()}"):
                self._tell(status=records.PENDING, reason=reason)
            if holder is not None and time.monotonic() - asked > ASK_S:
                self._look_for_a_request()
                asked = time.monotonic()
            self._rest(WAIT_S if holder is not None else LEASE_POLL_S)
        if self.news.status != records.RUNNING:
            self._tell(status=records.RUNNING, reason="")

    def _look_for_a_request(self) -> None:
        if self._read(lambda: self.store.stop_requested(run_id=self.job.run_id)):
            self.stop_asked.set()

    def _attempt(self) -> None:
        """One try at the run; how it went is in its status."""
        wait = self._begin()
        if wait is None:
            return
        try:
            self._patiently(self.publish)
            self._rest(wait)
            restored = self._read(lambda: self.store.restore(self.job.run_id, self.run_dir))
            self._tell(step=restored or 0)
            cause = self._train()
        except _ToldToEndError:
            cause = None
        except DamagedError as error:
            cause = Cause(BAD_INPUT, str(error))
        except OSError as error:  # a full disk, say
            cause = Cause(CRASH, f"agent: {error}")
        if self.news.status == records.RUNNING:
            self._end(cause)

    def _begin(self) -> float | None:
        """Read what went wrong before. Seconds to wait before the next try; None: there is none."""
        before = self._read(self._status_before)
        self.failures = failures.history(before)
        self.device_seconds = before.get("device_seconds") or 0.0
        if (lost := failures.lost(before, now=time.time())) is not None:
            self.failures.append(lost)
        self.attempt = self._read(lambda: self.store.next_attempt(self.job.run_id)) - 1
        ours = self._of_this_launch()
        self._tell(attempt=self.attempt, tries=len(ours), step=before.get("step", 0))
        decision = self._decide(ours) if ours else None
        self._look_for_a_request()
        if decision is not None and not decision.retry:
            self._tell(status=decision.status, reason=decision.reason, kind=ours[-1].kind)
        elif self.stop_asked.is_set():
            self._tell(**self._told())
        if self.news.status != records.RUNNING:
            self._patiently(self.publish)
            return None
        self.attempt += 1
        if decision is not None and ours[-1].kind not in failures.OF_THE_MACHINE:
            self.note = decision.reason
        self._tell(attempt=self.attempt, tries=1 + len(ours), reason=self.note)
        return 0.0 if decision is None else decision.wait_s - max(0.0, time.time() - ours[-1].at)

    def _status_before(self) -> dict[str, Any]:
        try:
            return self.store.status(self.job.run_id) or {}
        except DamagedError:
            return {}  # it will be rewritten

    def _of_this_launch(self) -> list[Failure]:
        return [failure for failure in self.failures if failure.launch == self.job.launch]

    def _decide(self, ours: list[Failure]) -> failures.Decision:
        limits = self.job.limits
        return failures.decide(ours, max_failures=limits.max_failures, max_preemptions=limits.max_preemptions)

    def _end(self, cause: Cause | None) -> None:
        """Say how an attempt ended that did not finish the run; None: it did as it was told."""
        if self.machine_goes.is_set():
            cause = Cause(PREEMPTED, f"machine taken away; {self._saved(cause)}")
        elif cause is not None and cause.kind == PREEMPTED:
            cause = Cause(PREEMPTED, f"{cause.reason}; {self._saved(None)}")
        changes = self._told() if cause is None else self._failed(cause)
        self._tell(**changes)
        self._patiently(self.publish)

    def _saved(self, cause: Cause | None) -> str:
        if self.trained_since is None:
            return "nothing was begun"
        complete = (self.run_dir / records.CHECKPOINTS).glob(f"*/{records.MANIFEST}")
        steps = checkpoint_steps([path.parent.name for path in complete])
        where = f"its state is saved at step {steps[0]}" if steps else "nothing was saved yet"
        return where if cause is None else f"{where} ({cause.reason})"

    def _told(self) -> dict[str, Any]:
        """Status and reason of a run that was told to end, and did."""
        if self.machine_goes.is_set():
            taken = {"reason": "machine taken away", "retry": True, "preempted": True}
            return {"status": records.PENDING, **taken}
        if self.stop_asked.is_set():
            return {"status": records.PENDING, "reason": "stopped by request"}
        begun = self.trained_since is not None
        reason = "stopped; its state is saved" if begun else "stopped before it began"
        return {"status": records.PENDING, "reason": reason}

    def _failed(self, cause: Cause) -> dict[str, Any]:
        """Status and reason of a failed attempt, which enters the run's history."""
        launch, host, now = self.job.launch, platform.node(), time.time()
        failure = Failure(self.attempt, cause.kind, cause.reason, self.news.step, launch, host, now)
        self.failures.append(failure)
        decision = self._decide(self._of_this_launch())
        changes = {"status": decision.status, "reason": decision.reason, "retry": decision.retry}
        if decision.retry and self._told_to_end() and not self.machine_goes.is_set():
            # Nobody tries it again.
            changes = {"status": records.FAILED, "reason": failures.what_happened(failure)}
        return {**changes, "kind": cause.kind, "preempted": cause.kind == PREEMPTED}

    # --- training ---------------------------------------------------------------------------------

    def _train(self) -> Cause | None:
        """Run the workers and ship what they write. None if they did as they were told."""
        limits = self.job.limits
        shipper = Shipper(
            self.store,
            self.job.run_id,
            self.run_dir,
            self.publish,
            self.lease.lost,
            cap_bytes=round(limits.spool_gb * 1e9),
        )
        try:
            span = Span(**self.job.span) if self.job.span else None
            with Workers(self.job.run, self.run_dir, self.attempt, limits.workers, span) as workers:
                self.trained_since = time.monotonic()
                shipper.start()
                cause = self._watch(workers, shipper)
        finally:
            self.trained_until = time.monotonic()
            shipper.stop()
        self._check_lease()
        records.close_parts(self.run_dir, self.attempt)
        if cause is not None:
            self._keep_evidence(cause)
        self._patiently(lambda: self.store.ship(self.job.run_id, self.run_dir))
        summary_path = self.run_dir / records.SUMMARY
        if cause is None and summary_path.is_file():
            self._complete(json.loads(summary_path.read_text()))
        return cause

    def _watch(self, workers: Workers, shipper: Shipper) -> Cause | None:
        """Follow the records until the workers end or must end; why, if that is a failure."""
        reader = PartReader(self.run_dir, self.attempt)
        pauses = _Pauses(workers)
        oom_kills = evidence.kernel_oom_kills()
        looked = time.monotonic()
        self.silence = 0.0
        while (code := workers.poll()) is None:
            self._check_lease()
            self._follow(reader, shipper, pauses)
            if self._told_to_end():
                pauses.end()
                return self._stop(workers, reader, shipper, pauses)
            if self.silence > self.job.limits.hang_after_s and not self._prepares():
                return self._hang(workers)
            pauses.look(full=shipper.full.is_set())
            oom_kills = evidence.kernel_oom_kills()
            self.launcher_gone.wait(POLL_S)
            now = time.monotonic()
            self.silence += 0.0 if pauses.paused else min(now - looked, GAP_S)
            looked = now
        self._follow(reader, shipper, pauses)
        if code != 0:
            return self._explain(workers, oom_kills)
        done = (self.run_dir / records.SUMMARY).is_file()
        return None if done else Cause(CRASH, "its workers ended well and without a result")

    def _prepares(self) -> bool:
        """Whether no record is due yet because the tokens of the run are still being made."""
        return not self.recorded and evidence.corpus_grows(self.job.limits.hang_after_s)

    def _stop(self, workers: Workers, reader: PartReader, shipper: Shipper, pauses: _Pauses) -> Cause | None:
        """Have the workers save and end. Those that have written nothing yet have nothing to save:
        they are killed, since some of them may wait for others that have not got so far."""
        self._follow(reader, shipper, pauses)
        if not self.recorded:
            return None
        code = workers.stop()
        self._follow(reader, shipper, pauses)
        if workers.overdue:
            grace = f"{worker_processes.STOP_GRACE_S:.0f} s"
            return Cause(HANG, f"asked to stop, a worker had not ended after {grace} and was killed")
        return None if code in (0, EXIT_STOPPED) else self._explain(workers, evidence.kernel_oom_kills())

    def _hang(self, workers: Workers) -> Cause:
        seconds = round(self.silence)
        silence = f"no record for {seconds // 60}:{seconds % 60:02d} after step {self.news.step}"
        cause = failures.hung(self._sights(workers))
        return Cause(HANG, f"{silence}; {cause.reason}", cause.rank)

    def _explain(self, workers: Workers, oom_kills: int) -> Cause:
        if workers.lost:
            return Cause(PREEMPTED, workers.lost)
        deadline = time.monotonic() + SETTLE_S
        while None in workers.codes().values() and time.monotonic() < deadline:
            time.sleep(POLL_S / 5)
        codes = workers.codes()
        oom_killed = evidence.kernel_oom_kills() > oom_kills
        cause = failures.explain(codes, evidence.read_logs(self.run_dir), oom_killed=oom_killed)
        if cause.kind == HANG and None in codes.values():  # a collective timed out: who is it that hangs?
            stuck = failures.hung(self._sights(workers))
            return Cause(HANG, f"{cause.reason}; {stuck.reason}", stuck.rank)
        return cause

    def _sights(self, workers: Workers) -> list[Sight]:
        """What is seen of the workers, here and on the other machines of the run."""
        here = evidence.stacks(workers.ranks.by_rank(), self.run_dir)
        return here + [Sight(**sight) for sight in workers.far_sights(2 * evidence.ANSWER_S)]

    def _keep_evidence(self, cause: Cause) -> None:
        logs = evidence.read_logs(self.run_dir)
        self.log_tail = failures.log_tail(logs.get(cause.rank, ""))
        if cause.kind != PREEMPTED:
            self._patiently(lambda: evidence.keep_logs(self.store, self.job.run_id, self.attempt, logs))

    def _check_lease(self) -> None:
        if self.lease.lost.is_set():
            raise _FencedError

    def _follow(self, reader: PartReader, shipper: Shipper, pauses: _Pauses) -> None:
        changes: dict[str, Any] = {}
        for record in reader.poll():
            if isinstance(record, StepRecord):
                changes |= {
                    "step": record.step,
                    "train_loss": record.loss,
                    "tokens_per_s": record.tokens_per_s,
                }
            elif isinstance(record, EvalRecord):
                changes |= {"val_loss": record.val_loss}
        if changes:
            self.recorded = True
            self.progressed = time.time()
            self.silence = 0.0
        reason = "; ".join(filter(None, [pauses.reason(), shipper.trouble])) or self.note
        if reason != self.news.reason:
            changes["reason"] = reason
        if changes:
            self._tell(**changes)

    def _complete(self, summary: dict[str, Any]) -> None:
        """Compact the records, then write the summary: its presence means that all else is there."""
        rows = self._read(lambda: self.store.compact(self.job.run_id), only_if_the_machine_goes=True)
        self._tell(status=summary["status"], reason=summary["reason"], step=summary["steps"])
        self._patiently(self.publish)
        # A newer attempt may have begun meanwhile; its rows are these rows.
        attempts = self._patiently(lambda: self.store.next_attempt(self.job.run_id)) - 1
        summary |= {"rows": rows, "attempts": max(attempts, self.attempt)}
        summary |= {"device_seconds": self._device_seconds()}
        self._patiently(lambda: self.store.put_summary(self.job.run_id, summary))

    # --- what is said -----------------------------------------------------------------------------

    def _tell(self, **changes: Any) -> News:
        self.news = News(**{**asdict(self.news), **changes})
        _say(self.news.line())
        return self.news

    def publish(self) -> None:
        """Write `status.json`, and once there is one `config.json`; look for a request to stop.

        A newer attempt means that the lease is lost, whatever the lease itself says.
        """
        if self.store.next_attempt(self.job.run_id) > self.attempt + 1:
            self.lease.lost.set()
        if self.lease.lost.is_set():
            return
        config = self.run_dir / records.CONFIG
        if not self.config_shipped and config.is_file():
            self.store.put_config(self.job.run_id, json.loads(config.read_text()))
            self.config_shipped = True
        news = asdict(self.news)
        for private in ("done", "retry"):
            del news[private]
        news |= {
            "tokens_seen": self.news.step * _tokens_per_step(self.job.run),
            "updated": time.time(),
            "progressed": self.progressed,
            "started": self.started,
            "host": platform.node(),
            "launch": self.job.launch,
            "device_seconds": self._device_seconds(),
            "failures": failures.to_json(self.failures),
        }
        if self.log_tail:
            news["log_tail"] = self.log_tail
        self.store.put_status(self.job.run_id, news)
        if self.store.stop_requested(run_id=self.job.run_id):
            self.stop_asked.set()

    def _device_seconds(self) -> float:
        """What all attempts have taken: seconds times GPUs, or workers that have none."""
        if self.trained_since is None:
            return self.device_seconds
        seconds = (self.trained_until or time.monotonic()) - self.trained_since
        return self.device_seconds + seconds * devices(self.job.limits)

    # --- patience ---------------------------------------------------------------------------------

    def _told_to_end(self) -> bool:
        return self.machine_goes.is_set() or self.stop_asked.is_set() or self.launcher_gone.is_set()

    def _rest(self, seconds: float) -> None:
        """Pause; raises `_ToldToEndError` as soon as this process is told to end."""
        deadline = time.monotonic() + seconds
        while True:
            if self._told_to_end():
                raise _ToldToEndError
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self.launcher_gone.wait(min(left, POLL_S))

    def _read(self, action: Callable[[], T], *, only_if_the_machine_goes: bool = False) -> T:
        """`_patiently`, for what can be dropped at any moment and has to be done again then.

        Raises:
            _ToldToEndError: this process is told to end; the action may still go on.
        """

        def droppable() -> T:
            answer: Future[T] = Future()
            threading.Thread(target=_answer, args=(answer, action), daemon=True).start()
            while not answer.done():
                if self.machine_goes.is_set() or (not only_if_the_machine_goes and self._told_to_end()):
                    raise _ToldToEndError
                futures.wait([answer], timeout=POLL_S)
            return answer.result()

        return self._patiently(droppable)

    def _patiently(self, action: Callable[[], T]) -> T:
        """Repeat `action` until the store answers: for as long as it takes while someone waits for
        the run, for LAST_SHIP_S once nobody does. A damaged object is no outage: `DamagedError`."""
        pause, gone_since = 0.5, None
        while True:
            try:
                answer = action()
            except DamagedError:
                raise
            except StoreError as error:
                if self._told_to_end():
                    gone_since = gone_since or time.monotonic()
                    if time.monotonic() - gone_since > LAST_SHIP_S:
                        raise _GaveUpError(str(error)) from None
                    pause = min(pause, 2.0)
                self._tell(reason=f"waiting for the store: {error}")
            else:
                if self.news.reason.startswith("waiting for the store"):
                    self._tell(reason=self.note)
                return answer
            self._pause(pause)
            pause = min(2 * pause, 30.0)

    def _pause(self, seconds: float) -> None:
        """Wait, but not for long after this process is told to end."""
        deadline = time.monotonic() + seconds
        told_before = self._told_to_end()
        while time.monotonic() < deadline and self._told_to_end() == told_before:
            time.sleep(min(POLL_S, seconds))


class _Pauses:
    """Keeps the workers still while too much waits for the store."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.paused = False
        self._changed = -BREATH_S

    def look(self, *, full: bool) -> None:
        now = time.monotonic()
        if self.paused and (not full or now - self._changed > PAUSE_S):
            self.end()
        elif not self.paused and full and now - self._changed > BREATH_S:
            self.workers.pause()
            self.paused, self._changed = True, now

    def end(self) -> None:
        if self.paused:
            self.workers.resume()
            self.paused, self._changed = False, time.monotonic()

    def reason(self) -> str:
        return "paused: no more room for what waits for the store (resources.spool_gb)" if self.paused else ""


class _GaveUpError(Exception):
    """The store stayed away after the launcher was gone."""


class _FencedError(Exception):
    """Somebody else has taken the run over."""


class _ToldToEndError(Exception):
    """There is nothing to save, and this process is told to end."""


def _answer(answer: Future[T], action: Callable[[], T]) -> None:
    try:
        answer.set_result(action())
    except Exception as error:
        answer.set_exception(error)


def _tokens_per_step(run: dict[str, Any]) -> int:
    return int(run["schedule"]["batch_size"] * run["model"]["context"])


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        print(line, flush=True)


# --- the process, and its launcher's side ---------------------------------------------------------


class AgentProcess:
    """An agent in a process of its own, as its launcher sees it."""

    def __init__(self, job: Job) -> None:
        self._process = Detached("mmsweep.agent", json.dumps(asdict(job)))
        self._last = News(records.RUNNING)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.output:
            self._lines.put(line)
        self._lines.put(None)

    def news(self, timeout: float) -> News | None:
        """The next piece of news; None if there was none in `timeout` seconds.

        An agent that dies without a last word is reported as a failure.
        """
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            return None
        if line is None:
            died = {"status": records.FAILED, "reason": "the agent died", "kind": LOST}
            return News(**{**asdict(self._last), **died, "done": True, "retry": True})
        self._last = News(**records.with_floats(json.loads(line)))
        return self._last

    def close(self) -> None:
        """Tell the agent that nobody waits for it any more."""
        self._process.close()


def main(argv: list[str] | None = None) -> int:
    """`python -m mmsweep.agent`: a Job on the first line of standard input."""
    call = answer("mmsweep.agent", argv)
    if call is None:
        return EXIT_BAD_INPUT
    job = Job.parse(call.line)
    if job.checkout is not None:
        os.environ[CHECKOUT] = json.dumps(job.checkout)  # for the workers
    news = Agent(job, call.launcher_gone, call.machine_goes).run()
    return 0 if news.status in records.FINISHED else 1


if __name__ == "__main__":
    leave(main())
