"""The Ray adapter: every run is a Tune trial, and a trial is an agent that Ray places.

Ray Tune executes and schedules. What is done and what is not is decided by the store alone, so no
state of Tune's is ever restored.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ray import tune

from mmsweep.agent import AgentProcess, Job, News
from mmsweep.progress import Board
from mmsweep.resources import Resources
from trainers import records

REPORT_S = 0.5


class TrialFailedError(RuntimeError):
    """A run failed in a way that another attempt might not."""


def trial(config: dict[str, Any]) -> None:
    """One run under Tune. A failure worth another try raises, which makes Tune try again."""
    agent = AgentProcess(Job(**config["job"]))
    try:
        news = _relay(agent)
    finally:
        agent.close()
    if news.status not in records.FINISHED and news.retry:
        raise TrialFailedError(news.reason)


def _relay(agent: AgentProcess) -> News:
    """Report the newest news to Tune, at most every REPORT_S; returns the last."""
    reported, pending = 0.0, None
    while True:
        pending = agent.news(timeout=REPORT_S) or pending
        if pending and (pending.done or time.monotonic() - reported > REPORT_S):
            tune.report({"news": asdict(pending)})  # nested: `done` at the top has a meaning to Tune
            reported = time.monotonic()
            if pending.done:
                return pending
            pending = None


class _BoardCallback(tune.Callback):  # type: ignore[misc]
    """Shows on the board what Tune hears. Tune passes everything by keyword."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks for a restore that never comes; a terminal cannot be pickled

    def on_trial_start(self, *, trial: Any, **_: Any) -> None:
        self.board.started(trial.config["job"]["run_id"])

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "news" in result:
            self.board.heard(trial.config["job"]["run_id"], News(**result["news"]))

    def on_trial_recover(self, *, trial: Any, **_: Any) -> None:
        self.board.retrying(trial.config["job"]["run_id"])

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:
        self.board.failed(trial.config["job"]["run_id"])


def run_all(jobs: Sequence[Job], resources: Resources, board: Board) -> None:
    """Run every job, in order of the list as resources allow; returns when all have ended, or on Ctrl-C.

    Outcomes are in the store and on the board. Ray must be connected.
    """
    with tempfile.TemporaryDirectory(prefix="mmsweep-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trial, request(resources)),
            # One list of plain dicts keeps our order; several keys would be sorted by name.
            param_space={"job": tune.grid_search([asdict(job) for job in jobs])},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=resources.max_concurrent,
                trial_name_creator=_run_id,
                trial_dirname_creator=_run_id,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                callbacks=[_BoardCallback(board)],
                failure_config=tune.FailureConfig(max_failures=resources.max_failures),
            ),
        )
        tuner.fit()


def request(resources: Resources) -> dict[str, float]:
    """What Ray reserves for one trial, on one node."""
    wanted = {"CPU": resources.workers * resources.cpus_per_worker}
    if resources.gpus_per_worker:
        wanted["GPU"] = resources.workers * resources.gpus_per_worker
    return wanted


def _run_id(trial: Any) -> str:
    return str(trial.config["job"]["run_id"])
