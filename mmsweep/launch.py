"""`python -m mmsweep.launch grid.yaml`: run what a grid asks for and its store does not have yet.

The launch keeps no state of its own: after a crash, a Ctrl-C or a grown grid, the same command
reads the store and goes on. While it works it holds the grid's lease; a second launch leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mmsweep.agent import Job, News
from mmsweep.attendant import Attendant, in_a_line
from mmsweep.budget import (
    Taken,
    admitted,
    concurrent_runs,
    devices,
    of_budget,
    spent,
    taken,
    unit,
)
from mmsweep.cluster import connect, nodes, to_come
from mmsweep.detach import submit
from mmsweep.grid import Cell, Grid, load_grid
from mmsweep.lease import Lease
from mmsweep.notify import VARIABLE, GivenUp, Webhook, webhook
from mmsweep.placement import check_room, in_order
from mmsweep.progress import TROUBLE, Board, Log, duration
from mmsweep.store import STOP, DamagedError, RunStore, StoreError, open_store
from mmsweep.workers import STOP_GRACE_S
from trainers import records
from trainers.config import RunConfig
from trainers.corpus import identify
from trainers.documents import expanded
from trainers.errors import InputError
from trainers.flops import Cost, cost
from trainers.footprint import footprint, largest_micro_batch, micro_batch_of, usable
from trainers.yamlfile import printable

SHIPPED = Path(__file__).parent / "grids"
LONGEST_PAUSE_S = 30.0
"""Between two questions to a store that does not answer."""
LAST_S = 60.0
"""How long a launch that was asked to stop waits for such a store."""
_THREADS = 32

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Launch a grid. Exit status 0: all done; 1: some runs failed or were stopped; 2: bad input, or
    somebody else works on the grid; 130, 143: Ctrl-C or SIGTERM before it began."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.detach:
            return _detach(arguments)
        hook = webhook(arguments.webhook)
        if arguments.dry_run:
            return _dry_run(*_grid_and_store(arguments))
        with hook, exceptions_told(hook, f"the launch of {arguments.grid}"):
            grid, store = _grid_and_store(arguments)
            return run_launch(grid, store, arguments.address, hook, show=arguments.open)[0]
    except (InputError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmsweep launch", description="Run what a grid asks for and its store does not have yet."
    )
    shipped = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
    parser.add_argument("grid", help=f"grid file, or the name of one that ships: {shipped}")
    parser.add_argument("--store", help='folder or "s3://bucket/prefix", instead of the grid\'s own')
    parser.add_argument(
        "--address",
        help='Ray cluster: "auto" or host:port (default: this machine alone); with --detach its dashboard',
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs and what they cost, and stop")
    parser.add_argument(
        "--detach", action="store_true", help="let the head of the cluster at --address launch it"
    )
    parser.add_argument(
        "--webhook", metavar="URL",
        help=f"tell a chat room of the end, of failures and outages (default: the variable {VARIABLE})",
    )  # fmt: skip
    parser.add_argument("--open", action="store_true", help="open the report, on a machine with a desktop")
    return parser


def _grid_and_store(arguments: argparse.Namespace) -> tuple[Grid, RunStore]:
    grid = load_grid(grid_path(arguments.grid), identify=identify)
    return grid, open_store(grid.store if arguments.store is None else arguments.store)


@contextlib.contextmanager
def exceptions_told(hook: Webhook, what: str) -> Iterator[None]:
    """Tell the chat room of an exception that ends this; nobody may look at the process."""
    try:
        yield
    except BaseException as error:
        hook.end(f"{what} has ended: {in_a_line(error)}")
        raise


def grid_path(given: str) -> Path:
    shipped = SHIPPED / f"{given}.yaml"
    try:
        return shipped if not Path(given).exists() and shipped.is_file() else Path(given)
    except OSError as error:
        raise InputError(f"{given[:60]}…: {error.strerror}") from None


def _detach(arguments: argparse.Namespace) -> int:
    if arguments.webhook is not None:
        raise InputError(
            f"--webhook would be stored with the job: set {VARIABLE} in the environment of the cluster's head"
        )
    if arguments.dry_run or arguments.open:
        raise InputError("--detach goes with neither --dry-run nor --open: leave one out")
    if os.environ.get(VARIABLE):
        print(f"{VARIABLE} is not sent along: the one of the cluster's head counts", file=sys.stderr)
    for line in submit(grid_path(arguments.grid), arguments.store, arguments.address):
        print(line)
    return 0


@dataclass(frozen=True)
class _Launch:
    """One launch: what everything below is about."""

    grid: Grid
    store: RunStore
    name: str
    hook: Webhook
    log: Log = field(default_factory=Log)

    def say(self, text: str) -> None:
        self.log.say(text)


def run_launch(
    grid: Grid, store: RunStore, address: str | None, hook: Webhook, *, show: bool
) -> tuple[int, str]:
    """Launch a grid into a store; `show` opens its report. Returns the status of `main`, and what stopped the
    launch, if anything did, be it when all was done."""
    this = _Launch(grid, store, f"{grid.name}-{time.strftime('%m%d-%H%M%S')}", hook)
    attendant = Attendant(store, grid.name, this.name, this.log, hook)
    taken_over = "silent for so long that another launch has taken over; stopping"
    with (
        _signals_unwind(),
        store.grid_lease(grid.name, this.name, on_lost=lambda: attendant.stop(taken_over)) as lease,
    ):
        if not _take(lease, this):
            return 2, ""
        _withdraw_requests(this)
        with attendant:
            try:
                return _train(this, address, attendant, show=show), attendant.stopping
            except KeyboardInterrupt:  # before there was anything to stop
                if not attendant.stopping:
                    raise
                this.say(f"{grid.name}: {attendant.stopping}")
                hook.end(f"{grid.name}: {attendant.stopping}")
                return 1, attendant.stopping


def _take(lease: Lease, this: _Launch) -> bool:
    """Take the grid's lease, or name who has it."""
    name = this.grid.name
    owner = lease.acquire(
        on_silence=lambda silent: this.say(
            f"{name}: no heartbeat from {silent}; taking over when it has been silent for {silent.ttl:.0f} s"
        )
    )
    if owner is not None:
        print(f"{name} is being launched by {owner}; nothing done", file=sys.stderr)
        return False
    for dead, cause in lease.taken_from:
        this.say(f"{name}: taken over from {dead}: {cause}")
    return True


def _withdraw_requests(this: _Launch) -> None:
    """Whoever launches wants what was stopped before to go on."""
    this.store.withdraw_stop(grid=this.grid.name)
    for run_id, names in this.store.facts().items():
        if STOP in names and run_id in this.grid.runs:
            this.store.withdraw_stop(run_id=run_id)


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """SIGTERM ends the process as an exception does, so that what it holds is released.

    SIGINT too, which a script's background commands ignore: requests to stop arrive as one.
    """
    term = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, term)
        signal.signal(signal.SIGINT, interrupt)


@contextlib.contextmanager
def _sigterm_saves(attendant: Attendant) -> Iterator[None]:
    """SIGTERM stops the runs as Ctrl-C does. Ray's own handler would print a trace of the C stack first."""

    before = signal.signal(signal.SIGTERM, lambda *_: attendant.stop("stopped by SIGTERM"))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _train(this: _Launch, address: str | None, attendant: Attendant, *, show: bool) -> int:
    grid, store = this.grid, this.store
    finished = finished_runs(store, grid)
    missing = {run_id: run for run_id, run in grid.runs.items() if run_id not in finished}
    store.put_grid(grid.name, grid.text, grid.index())
    if not missing:
        this.say(f"{grid.name}: all {len(grid.runs)} runs are in {store.url}; nothing to train")
        return make_report(store, grid, show=show)
    price = _total(cost(run) for run in missing.values())
    this.say(
        f"{grid.name}: {len(grid.runs)} runs, {len(finished)} done, {len(missing)} to train "
        f"({price}) into {store.url}"
    )
    begun = time.monotonic()
    board = Board(
        missing, done_before=len(finished), log=this.log, on_trouble=functools.partial(_tell_trouble, this)
    )
    waiting = in_order(missing, grid.resources.priority)
    if grid.budget is not None:
        runs = _taken(this)
        if not admitted(grid.budget, runs, waiting, at_once=1):  # no cluster is needed to say so
            _hold_back(this, waiting, spent(runs), board)
            return _end(this, board, begun, "", show=show)
    with connect(address), _sigterm_saves(attendant):
        for line in check_room(grid.resources, nodes(), to_come(), local=address is None):
            this.say(line)
        with board.show():
            why = _run_waves(this, waiting, board, attendant)
    with _sigterm_saves(attendant):
        return _end(this, board, begun, why, show=show)


def _run_waves(this: _Launch, waiting: list[str], board: Board, attendant: Attendant) -> str:
    """Train what waits, as far as the budget goes; returns what stopped it, if anything did."""
    from mmsweep.trial import run_all  # imports ray, which must see the settings of connect()

    try:
        for wave in _waves(this, waiting, board):
            with _sigint_of_tune() as came:
                run_all([_job(run_id, this) for run_id in wave], this.grid.resources, board)
                if came():
                    raise KeyboardInterrupt
            if attendant.stopping:
                break
    except KeyboardInterrupt:
        attendant.stopping = attendant.stopping or "stopped by Ctrl-C"
    return attendant.stopping


@contextlib.contextmanager
def _sigint_of_tune() -> Iterator[Callable[[], bool]]:
    """Tune takes a Ctrl-C, ends its trials and says nothing of it, but puts the handler back that it found;
    where none came it leaves its own, which would swallow the next. Yields what tells whether one came."""
    os.environ.pop("TUNE_DISABLE_SIGINT_HANDLER", None)
    before = signal.getsignal(signal.SIGINT)

    def found(*arguments: Any) -> None:
        signal.default_int_handler(*arguments)

    signal.signal(signal.SIGINT, found)
    try:
        yield lambda: signal.getsignal(signal.SIGINT) is found
    finally:
        signal.signal(signal.SIGINT, before)


def _waves(this: _Launch, waiting: list[str], board: Board) -> Iterator[list[str]]:
    """Runs that may begin together: all of them, or, on a budget, what it has room for by then.

    Ends when all have had their turn, the budget has no room for the others, or a wave was stopped.
    """
    if this.grid.budget is None:
        yield waiting
        return
    while waiting:
        runs = patiently(this.grid.name, lambda: _taken(this), this.say)
        at_once = concurrent_runs(this.grid.resources, [node.total for node in nodes()])
        wave = admitted(this.grid.budget, runs, waiting, at_once=at_once)
        waiting = [run_id for run_id in waiting if run_id not in wave]
        if not wave:
            _hold_back(this, waiting, spent(runs), board)
            return
        yield wave
        if not all(board.rows[run_id].news.done for run_id in wave):
            return


def patiently(
    name: str, ask: Callable[[], T], say: Callable[[str], object], *, at_most_s: float = math.inf
) -> T:
    """What the store answers in the end. A request to stop ends the wait, as Ctrl-C does.

    Raises:
        StoreError: it has not answered in `at_most_s` seconds, or holds something damaged.
    """
    deadline, pause, away = time.monotonic() + at_most_s, 0.5, False
    while True:
        try:
            answer = ask()
        except DamagedError:
            raise
        except StoreError as error:
            if time.monotonic() > deadline:
                raise
            if not away:
                say(f"{name}: waiting for the store: {error}")
            away = True
        else:
            if away:
                say(f"{name}: the store is back")
            return answer
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _taken(this: _Launch) -> dict[str, Taken]:
    """How far every run of the grid is, and what it has taken, as the store says."""

    def look(run_id: str) -> Taken:
        names = present.get(run_id, set())
        summary = this.store.summary(run_id) if records.SUMMARY in names else None
        facts = summary or (this.store.status(run_id) if records.STATUS in names else None)
        return taken(cost(this.grid.runs[run_id]).total, facts, devices(this.grid.resources))

    present = this.store.facts()
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(this.grid.runs, pool.map(look, this.grid.runs), strict=True))


def _hold_back(this: _Launch, run_ids: list[str], hours: float, board: Board) -> None:
    """Say of runs that the budget has no room for why they do not begin: here and in the store."""
    assert this.grid.budget is not None
    of = of_budget(this.grid.budget.hours, hours, unit(this.grid.resources))
    this.say(f"{this.grid.name}: budget spent: {of}; {len(run_ids)} runs are not begun")

    def note(run_id: str) -> None:
        board.put_back(run_id, f"budget spent: {of}")
        fresh = {"status": records.PENDING, "steps": this.grid.runs[run_id].schedule.steps}
        with contextlib.suppress(StoreError):
            before = this.store.status(run_id) or fresh
            if before["status"] == records.PENDING:
                this.store.put_status(run_id, {**before, "reason": f"budget spent: {of}"})

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(note, run_ids))


def _job(run_id: str, this: _Launch) -> Job:
    run = this.grid.runs[run_id]
    data = run.data
    if data.path is not None:  # agents may start in another folder
        run = run.model_copy(update={"data": data.model_copy(update={"path": str(expanded(data.path))})})
    resources = this.grid.resources.model_dump(mode="json")
    return Job(run_id, run.model_dump(mode="json"), this.store.url, this.name, resources)


def _end(this: _Launch, board: Board, begun: float, why: str, *, show: bool) -> int:
    """Say how it ended, here, in the store and to the chat room; `why`: what stopped it, if anything did."""
    grid, store = this.grid, this.store
    if why:
        this.say(f"{grid.name}: {why}")
    stopping = [run_id for run_id, row in board.rows.items() if row.news.status == records.RUNNING]
    if stopping:
        this.say(f"stopping: {len(stopping)} runs save their state")
        _wait_until_saved(this, stopping)
    finished = _finished_at_last(this, at_most_s=LAST_S if why else math.inf)
    done = f"{len(finished or ())} of {len(grid.runs)} runs done"
    if finished is None:
        done = f"{board.counts()} (as known here: the store does not answer)"
    outcome = f"{done} in {duration(time.monotonic() - begun)}"
    this.say(outcome)
    trouble = {run_id: row.news for run_id, row in board.rows.items() if row.news.status in TROUBLE}
    states = [news.status for news in trouble.values()]
    others = [f"{states.count(what)} {what}" for what in TROUBLE if what in states]
    this.hook.end("; ".join([f"{grid.name}: {outcome}", *others, *([why] if why else [])]))
    for run_id, news in trouble.items():
        if finished is not None:
            _publish_failure(store, run_id, news)
        this.say(f"{run_id}: {news.status} at step {news.step}: {news.reason}")
    if finished:
        make_report(store, grid, show=show)
    if finished is not None and len(finished) == len(grid.runs):
        return 0
    this.say("the same command goes on from here")
    return 1


def _finished_at_last(this: _Launch, *, at_most_s: float) -> set[str] | None:
    """The runs that are finished by the end of a launch; None: the store does not say, and nobody waits."""
    try:
        name, store = this.grid.name, this.store
        return patiently(name, lambda: finished_runs(store, this.grid), this.say, at_most_s=at_most_s)
    except (StoreError, KeyboardInterrupt):
        return None


def _tell_trouble(this: _Launch, run_id: str, news: News) -> None:
    how = f"at step {news.step}: {news.reason}"
    this.hook.send_given_up(GivenUp(this.grid.name, run_id, news.status, how))


def _publish_failure(store: RunStore, run_id: str, news: News) -> None:
    """Say in the store what an agent that died could not."""
    with contextlib.suppress(StoreError):
        status = store.status(run_id) or {}
        if status.get("status") == records.RUNNING and status.get("attempt") == news.attempt:
            store.put_status(run_id, {**status, "status": news.status, "reason": news.reason})


def _wait_until_saved(this: _Launch, run_ids: list[str]) -> None:
    """Agents save and ship after their launcher has let go; give them time to say so."""
    deadline = time.monotonic() + STOP_GRACE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(StoreError):  # which may be back before the time is up
            run_ids = [r for r in run_ids if (this.store.status(r) or {}).get("status") == records.RUNNING]
        if not run_ids:
            return
        time.sleep(0.5)
    this.log.say(f"still saving after {STOP_GRACE_S:.0f} s: {', '.join(run_ids)}", error=True)


def make_report(store: RunStore, grid: Grid, *, show: bool) -> int:
    from mmsweep.report import main as report

    return report([store.url, "--grid", grid.name, "--into-store", *(["--open"] if show else [])])


def finished_runs(store: RunStore, grid: Grid) -> set[str]:
    return {
        run_id for run_id, names in store.facts().items() if records.SUMMARY in names and run_id in grid.runs
    }


# --- what it costs -------------------------------------------------------------------------------


def _total(costs: Iterable[Cost]) -> str:
    """`3.28 G tokens, 5.1 E FLOP`"""
    costs = list(costs)
    tokens, flops = sum(price.tokens for price in costs), sum(price.total for price in costs)
    return f"{amount(tokens)} tokens, {amount(flops)}FLOP"


def _dry_run(grid: Grid, store: RunStore) -> int:
    finished = finished_runs(store, grid)
    costs = {run_id: cost(run) for run_id, run in grid.runs.items()}
    axes = _axes(grid)
    rows = [["run", "arm", "seed", *grid.axes, "parameters", "steps x tokens", "FLOP", "store"]]
    for run_id, run in grid.runs.items():
        price = costs[run_id]
        rows.append([
            run_id, run.arm, str(run.seed), *axes[run_id], amount(price.parameters),
            f"{price.steps:,} x {run.tokens_per_step:,}", amount(price.total),
            "done" if run_id in finished else _state(store, run_id),
        ])  # fmt: skip
    print_table(rows, left=("run", "arm", "store"))
    missing = _total(price for run_id, price in costs.items() if run_id not in finished)
    print(
        f"{grid.name}: {len(grid.runs)} runs ({len(grid.cells)} cells), {len(finished)} done in {store.url}, "
        f"{len(grid.runs) - len(finished)} to train: {missing}"
    )
    for line in (*_per_step(grid, costs), _memory(grid)):
        print(line)
    return 0


def print_table(rows: list[list[str]], left: Sequence[str]) -> None:
    """Columns below their names in the first row; text is aligned to the left, numbers to the right."""
    rows = [[printable(cell).strip() for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if name in left else ">" for name in rows[0]]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    print("\n".join(form.format(*row).rstrip() for row in rows))


def _axes(grid: Grid) -> dict[str, list[str]]:
    """Axis values by run; several where cells share it."""
    cells: dict[str, list[Cell]] = {}
    for cell in grid.cells:
        cells.setdefault(cell.run_id, []).append(cell)
    return {
        run_id: ["/".join(dict.fromkeys(str(cell.axes[path]) for cell in shared)) for path in grid.axes]
        for run_id, shared in cells.items()
    }


def _state(store: RunStore, run_id: str) -> str:
    try:
        status = store.status(run_id)
    except StoreError:
        return "unreadable"
    return "–" if status is None else f"{status['status']} {status.get('step', 0)}/{status.get('steps', '?')}"


def _per_step(grid: Grid, costs: dict[str, Cost]) -> list[str]:
    """The price of geometry: optimizer against model, per arm, for its largest model."""
    largest: dict[str, Cost] = {}
    for run_id, run in grid.runs.items():
        price = costs[run_id]
        if price.model_step > largest.setdefault(run.arm, price).model_step:
            largest[run.arm] = price
    return [
        f"  {arm}: a step takes {amount(price.model_step)}FLOP for the model, "
        f"{amount(price.optimizer_step)}FLOP for the optimizer's matrix products "
        f"({price.optimizer_step / price.model_step:.0%})"
        for arm, price in largest.items()
    ]


GPU_GB = (24, 40, 80)


def _memory(grid: Grid) -> str:
    """What the largest run takes of a worker's device, and on which devices it fits."""
    workers, share = grid.resources.workers, grid.resources.gpus_per_worker
    sizes = {
        run_id: footprint(run, workers=workers, micro_batch=micro_batch_of(run, workers)).total
        for run_id, run in grid.runs.items()
    }
    largest = max(sizes, key=lambda run_id: sizes[run_id])
    run = grid.runs[largest]
    again = " with activation checkpointing" if run.runtime.activation_checkpointing else ""
    line = (
        f"memory a worker: {sizes[largest] / 2**30:.3g} GiB at micro batch "
        f"{micro_batch_of(run, workers)}{again} ({largest})"
    )
    if not share:
        return line
    where = "a GPU" if share == 1 else f"{share:g} of a GPU"
    fits = [gb for gb in GPU_GB if sizes[largest] <= usable(gb * share)]
    if fits:
        return f"{line}: fits {where} of {fits[0]} GB"
    return (
        f"{line}: too much for {where} of {GPU_GB[-1]} GB{_smaller(run, workers, usable(GPU_GB[-1] * share))}"
    )


def _smaller(run: RunConfig, workers: int, bytes_: int) -> str:
    """What of `runtime` makes a run fit, checkpointing last."""
    thrifty = run.model_copy(
        update={"runtime": run.runtime.model_copy(update={"activation_checkpointing": True})}
    )
    if micro := largest_micro_batch(run, workers, bytes_):
        return f"; runtime.micro_batch {micro} fits"
    if micro := largest_micro_batch(thrifty, workers, bytes_):
        return f"; runtime.micro_batch {micro} with runtime.activation_checkpointing fits"
    return ", whatever the micro batch"


def amount(value: float) -> str:
    """Three digits and a prefix: 124 M, 3.28 G, 1.2 E."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "


if __name__ == "__main__":
    from mmsweep.__main__ import quietly

    sys.exit(quietly(main))
