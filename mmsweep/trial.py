"""The Ray adapter: every run is a Tune trial, and a trial is an agent that Ray places.

Ray Tune executes and schedules. What is done and what is not is decided by the store alone, so no
state of Tune's is ever restored. A run of several machines is one placement group: it gets all of them
or none. Its agent is on the first, a follower (see `mmsweep.follower`) on each of the others.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import ray
from ray import tune
from ray.util import get_current_placement_group, get_node_ip_address
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mmsweep import cluster
from mmsweep.agent import AgentProcess, Job, News
from mmsweep.failures import LOST
from mmsweep.follower import FollowerProcess, Invitation
from mmsweep.placement import Need, Watch
from mmsweep.progress import Board
from mmsweep.resources import Resources
from mmsweep.scratch import scratch
from mmsweep.workers import Span
from trainers import records
from trainers.provenance import checkout

REPORT_S = 1.0
FOLLOWERS_S = 120.0
"""How long the further machines of a run may take to start their followers."""
SPARE_RETRIES = 5
"""What Tune may add to the retries that the agents decide on. It counts what no agent hears of."""
WORDLESS = 5
"""Trials of one run that may die in a row before their agents have said anything."""


class TrialFailedError(RuntimeError):
    """A run failed in a way that another attempt might not."""


def trial(config: dict[str, Any]) -> None:
    """One run under Tune. A failure worth another try raises, which makes Tune try again."""
    job = Job(**config["job"])
    _show_the_given_gpus()
    with _span(job.limits) as span:
        agent = AgentProcess(replace(job, span=None if span is None else asdict(span)))
        try:
            news = _relay(agent)
        finally:
            agent.close()
    if news.status not in records.FINISHED and news.retry:
        raise TrialFailedError(news.reason)


def _show_the_given_gpus() -> None:
    """Workers see the GPUs that Ray gave their trial and no others: none where none were asked for."""
    given = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(given)


@contextlib.contextmanager
def _span(limits: Resources) -> Iterator[Span | None]:
    """Followers on the further machines of this trial's placement group, for the length of the block."""
    if limits.nodes == 1:
        yield None
        return
    need, token = Need.of(limits), secrets.token_hex(16)
    actors = [
        _FollowerActor.options(  # type: ignore[attr-defined]
            num_cpus=need.cpus,
            num_gpus=need.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(get_current_placement_group(), index),
        ).remote(token)
        for index in range(1, limits.nodes)
    ]
    try:
        try:
            addresses = ray.get([actor.address.remote() for actor in actors], timeout=FOLLOWERS_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise TrialFailedError(f"a further machine of this run does not start: {reason}") from None
        yield Span(get_node_ip_address(), addresses, token)
    finally:
        for actor in actors:
            ray.kill(actor)  # which closes the standard input of its follower


@ray.remote(max_restarts=0)
class _FollowerActor:
    """Holds a follower's place in the placement group, and its standard input."""

    def __init__(self, token: str) -> None:
        _show_the_given_gpus()
        self.host = get_node_ip_address()
        self.follower = FollowerProcess(Invitation(self.host, token))

    def address(self) -> tuple[str, int]:
        return self.host, self.follower.port


def _relay(agent: AgentProcess) -> News:
    """Report the newest news to Tune every REPORT_S; returns the last.

    Also where there are none: between two reports Tune cannot stop a trial, and kills it ten seconds later.
    """
    reported, pending = time.monotonic(), None
    while True:
        pending = agent.news(timeout=REPORT_S) or pending
        if (pending and pending.done) or time.monotonic() - reported > REPORT_S:
            # Nested: `done` at the top has a meaning to Tune.
            tune.report({"news": asdict(pending)} if pending else {})
            reported = time.monotonic()
            if pending and pending.done:
                return pending
            pending = None


class _Callback(tune.Callback):  # type: ignore[misc]
    """Shows on the board what Tune hears, and looks after trials that wait. Tune passes all by keyword."""

    def __init__(self, board: Board, watch: Watch) -> None:
        self.board = board
        self.watch = watch
        self.wordless: Counter[str] = Counter()
        """Deaths since the last news, by run."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks for a restore that never comes; a terminal cannot be pickled

    def on_trial_start(self, *, trial: Any, **_: Any) -> None:
        self.board.started(_run_id(trial))

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "news" in result:
            news = News(**result["news"])
            if not (news.done and news.kind == LOST):
                self.wordless.pop(_run_id(trial), None)
            self.board.heard(_run_id(trial), news)

    def on_trial_recover(self, *, trial: Any, **_: Any) -> None:
        run_id = _run_id(trial)
        self.wordless[run_id] += 1
        if self.wordless[run_id] == WORDLESS - 1:
            trial.max_failures = trial.run_metadata.num_failures  # the next one is the last
        row = self.board.rows[run_id]
        if not row.news.done:
            row.news = replace(row.news, reason="its node, or the trial's process, died")
        self.board.retrying(run_id)

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:
        run_id = _run_id(trial)
        news = self.board.rows[run_id].news
        if not news.done:  # its agent could not say why
            why = (str(trial.get_error()).strip().splitlines() or [""])[-1]
            reason = f"the trial's process died: {why}"
            self.board.heard(run_id, replace(news, status=records.FAILED, reason=reason, done=True))
        self.board.failed(run_id)

    def on_step_end(self, *, trials: list[Any], **_: Any) -> None:
        running = frozenset(_run_id(trial) for trial in trials if trial.status == "RUNNING")
        waiting = sum(trial.status == "PENDING" for trial in trials)
        self.watch.look(running, waiting, time.monotonic())


class _WhenOver(tune.Stopper):  # type: ignore[misc]
    """Ends the sweep when its watch has given up."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as above

    def __call__(self, *_: Any) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.watch.over


def run_all(jobs: Sequence[Job], resources: Resources, board: Board) -> None:
    """Run every job, in order of the list as resources allow.

    Returns when all have ended, when the cluster has had no room for any of them for
    `resources.placement_timeout_s`, or on Ctrl-C. Outcomes are in the store and on the board. Ray must
    be connected.
    """
    need = Need.of(resources)
    watch = Watch(
        need,
        resources.placement_timeout_s,
        at_once=resources.max_concurrent,
        say=lambda text: board.log.say(f"[{board.counts()}] {text}"),
        nodes=cluster.nodes,
        to_come=cluster.to_come,
    )
    place = tune.PlacementGroupFactory(
        [need.bundle()] * need.nodes, strategy="PACK" if need.nodes == 1 else "STRICT_SPREAD"
    )
    retries = resources.max_failures + resources.max_preemptions + SPARE_RETRIES
    here = checkout()
    with scratch("tune") as folder:
        tuner = tune.Tuner(
            tune.with_resources(trial, place),
            # One list of plain dicts keeps our order; several keys would be sorted by name.
            param_space={"job": tune.grid_search([asdict(replace(job, checkout=here)) for job in jobs])},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=resources.max_concurrent,
                trial_name_creator=_run_id,
                trial_dirname_creator=_run_id,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=str(folder),
                verbose=0,
                stop=_WhenOver(watch),
                callbacks=[_Callback(board, watch)],
                failure_config=tune.FailureConfig(max_failures=retries),
            ),
        )
        tuner.fit()


def _run_id(trial: Any) -> str:
    return str(trial.config["job"]["run_id"])
