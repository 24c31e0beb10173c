"""The agent of one run: starts its workers, ships what they write, and reports how it goes.

It holds the run's lease while it works, so that two sweeps which share a run train it once.

It knows nothing of Ray. It reads one line of JSON (`Job`) from standard input, and then treats the
end of standard input as "whoever launched me is gone": the workers save, the last files are
shipped, and it ends. So neither a Ctrl-C nor a killed driver loses more than the step under way.
It writes one line of JSON to standard output for every piece of news.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmsweep.lease import POLL_S as LEASE_POLL_S
from mmsweep.lease import Lease
from mmsweep.resources import Resources
from mmsweep.shipper import Shipper
from mmsweep.store import DamagedError, RunStore, StoreError, open_store
from mmsweep.workers import EXIT_BAD_INPUT, EXIT_STOPPED, Workers, explain, log_tail
from trainers import records
from trainers.records import EvalRecord, PartReader, StepRecord

POLL_S = 0.25
WAIT_S = 1.0
"""Pause between two looks at a run that somebody else works on."""
LAST_SHIP_S = 120.0
"""How long an agent without a launcher tries to reach the store before it gives up."""


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
    """A failure that another attempt might not meet."""

    def line(self) -> str:
        return records.dumps(asdict(self))


class Agent:
    def __init__(self, job: Job, launcher_gone: threading.Event) -> None:
        self.job = job
        self.launcher_gone = launcher_gone
        self.store: RunStore = open_store(job.store)
        self.lease: Lease
        self.run_dir: Path
        self.started = time.time()
        self.attempt = 0
        self.config_shipped = False
        self.progressed = self.started
        """When the last record was written: a worker that hangs stops this clock."""
        self.news = News(records.RUNNING, steps=job.run["schedule"]["steps"])

    def run(self) -> News:
        """Do the job; returns the last news. By then the run's lease and local folder are gone."""
        retry = False
        try:
            retry = self._work()
        except _GaveUpError as error:
            self._tell(status=records.FAILED, reason=str(error))
        return self._tell(done=True, retry=retry)

    def _work(self) -> bool:
        """Take the run's result, or make it; True if another attempt might do better."""
        while not self._take_result():
            prefix = f"mmsweep-{self.job.run_id}-"
            with (
                self.store.run_lease(self.job.run_id, self.job.launch) as self.lease,
                tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder,
            ):
                if not self._wait_for_lease():
                    return False
                self.run_dir = Path(folder)
                with contextlib.suppress(_FencedError):
                    if self._take_result():  # whoever had the lease has finished
                        return False
                    return self._attempt()
            self._tell(status=records.PENDING, reason="somebody else has taken the run over; workers stopped")
        return False

    def _take_result(self) -> bool:
        summary = self._patiently(lambda: self.store.summary(self.job.run_id))
        if summary is not None:
            self._tell(status=summary["status"], step=summary["steps"], reason="")
        return summary is not None

    def _wait_for_lease(self) -> bool:
        """True once it is held; False if nobody waits for the run any more."""
        while not self._patiently(self.lease.advance):
            holder = self.lease.holder
            if holder is not None and self.news.reason != (reason := f"waits for {holder.who()}"):
                self._tell(status=records.PENDING, reason=reason)
            if self.launcher_gone.wait(WAIT_S if holder is not None else LEASE_POLL_S):
                self._tell(status=records.PENDING, reason="stopped before it began")
                return False
        if self.news.status != records.RUNNING:
            self._tell(status=records.RUNNING, reason="")
        return True

    def _attempt(self) -> bool:
        self.attempt = self._patiently(lambda: self.store.next_attempt(self.job.run_id))
        self.config_shipped = False
        self._tell(attempt=self.attempt)
        self._patiently(self.publish)
        restored = self._patiently(lambda: self.store.restore(self.job.run_id, self.run_dir))
        self._tell(step=restored or 0)
        return self._train()

    def _train(self) -> bool:
        job = self.job
        shipper = Shipper(self.store, job.run_id, self.run_dir, self.publish, self.lease.lost)
        try:
            with Workers(job.run, self.run_dir, self.attempt, job.limits.workers) as workers:
                shipper.start()
                code = self._watch(workers, shipper)
        finally:
            shipper.stop()
        self._check_lease()
        records.close_parts(self.run_dir, self.attempt)
        if code != 0 and code != EXIT_STOPPED:
            self._tell(**explain(code, self.run_dir, overdue=workers.overdue))
        self._patiently(lambda: self.store.ship(self.job.run_id, self.run_dir))
        summary_path = self.run_dir / records.SUMMARY
        if code == 0 and summary_path.is_file():
            self._complete(json.loads(summary_path.read_text()))
            return False
        if code == EXIT_STOPPED:
            self._tell(status=records.PENDING, reason="stopped; its state is saved")
        self._patiently(self.publish)
        return code not in (EXIT_STOPPED, EXIT_BAD_INPUT)

    def _watch(self, workers: Workers, shipper: Shipper) -> int:
        """Follow the records until the workers end; returns the first exit code that is not 0."""
        reader = PartReader(self.run_dir, self.attempt)
        while (code := workers.poll()) is None:
            self._check_lease()
            self._follow(reader, shipper.trouble)
            if self.launcher_gone.wait(POLL_S):
                code = workers.stop()
                break
        self._follow(reader, shipper.trouble)
        return code

    def _check_lease(self) -> None:
        if self.lease.lost.is_set():
            raise _FencedError

    def _follow(self, reader: PartReader, trouble: str) -> None:
        fresh = reader.poll()
        changes: dict[str, Any] = {}
        for record in fresh:
            if isinstance(record, StepRecord):
                changes |= {
                    "step": record.step,
                    "train_loss": record.loss,
                    "tokens_per_s": record.tokens_per_s,
                }
            elif isinstance(record, EvalRecord):
                changes |= {"val_loss": record.val_loss}
        if changes:
            self.progressed = time.time()
        if trouble != self.news.reason:
            changes["reason"] = trouble
        if changes:
            self._tell(**changes)

    def _complete(self, summary: dict[str, Any]) -> None:
        """Compact the records, then write the summary: its presence means that all else is there."""
        rows = self._patiently(lambda: self.store.compact(self.job.run_id))
        self._tell(status=summary["status"], reason=summary["reason"], step=summary["steps"])
        self._patiently(self.publish)
        # A newer attempt may have begun meanwhile; its rows are these rows.
        attempts = self._patiently(lambda: self.store.next_attempt(self.job.run_id)) - 1
        summary |= {"rows": rows, "attempts": max(attempts, self.attempt)}
        self._patiently(lambda: self.store.put_summary(self.job.run_id, summary))

    def _tell(self, **changes: Any) -> News:
        self.news = News(**{**asdict(self.news), **changes})
        _say(self.news.line())
        return self.news

    def publish(self) -> None:
        """Write `status.json`, and once there is one `config.json`.

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
        }
        if self.news.status in (records.FAILED, records.OOM):
            news["log_tail"] = log_tail(self.run_dir)
        self.store.put_status(self.job.run_id, news)

    def _patiently(self, action: Any) -> Any:
        """Repeat `action` until the store answers: for as long as it takes while someone waits for
        the run, for LAST_SHIP_S once nobody does. A damaged object is no outage: it ends the run."""
        pause, gone_since = 0.5, None
        while True:
            try:
                answer = action()
            except DamagedError as error:
                raise _GaveUpError(str(error)) from None
            except StoreError as error:
                if self.launcher_gone.is_set():
                    gone_since = gone_since or time.monotonic()
                    if time.monotonic() - gone_since > LAST_SHIP_S:
                        raise _GaveUpError(str(error)) from None
                self._tell(reason=f"waiting for the store: {error}")
            else:
                if self.news.reason.startswith("waiting for the store"):
                    self._tell(reason="")
                return answer
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


class _GaveUpError(Exception):
    """The store stayed away after the launcher was gone."""


class _FencedError(Exception):
    """Somebody else has taken the run over."""


def _tokens_per_step(run: dict[str, Any]) -> int:
    return int(run["schedule"]["batch_size"] * run["model"]["context"])


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        print(line, flush=True)


# --- the process, and its launcher's side ---------------------------------------------------------


class AgentProcess:
    """An agent in a process of its own, as its launcher sees it.

    The process is detached: Ray kills the direct children of a worker that ends, and this one
    still has a checkpoint to ship then. `close` (or the launcher's death) makes it stop.
    """

    def __init__(self, job: Job) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mmsweep.agent", "--detach"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        self._last = News(records.RUNNING)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
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
            died = {"status": records.FAILED, "reason": "the agent died", "done": True, "retry": True}
            return News(**{**asdict(self._last), **died})
        self._last = News(**records.with_floats(json.loads(line)))
        return self._last

    def close(self) -> None:
        """Tell the agent that nobody waits for it any more."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()  # the process that detached has long ended


def main(argv: list[str] | None = None) -> int:
    """`python -m mmsweep.agent`: a Job on the first line of standard input."""
    parser = argparse.ArgumentParser(prog="python -m mmsweep.agent")
    parser.add_argument("--detach", action="store_true", help="go on in a process of its own")
    if parser.parse_args(argv).detach and os.fork():
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the end of standard input is the one way to stop
    # Unbuffered reads, so that the line is all that is taken before the watcher reads on.
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return EXIT_BAD_INPUT
        line += byte
    launcher_gone = threading.Event()
    threading.Thread(target=_watch_stdin, args=(launcher_gone,), daemon=True).start()
    news = Agent(Job.parse(line.decode()), launcher_gone).run()
    return 0 if news.status in records.FINISHED else 1


def _watch_stdin(launcher_gone: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    launcher_gone.set()


if __name__ == "__main__":
    sys.exit(main())
