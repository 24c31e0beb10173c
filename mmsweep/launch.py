"""`python -m mmsweep.launch grid.yaml`: run what a grid asks for and its store does not have yet.

The launch keeps no state of its own: after a crash, a Ctrl-C or a grown grid, the same command
reads the store and goes on. While it works it holds the grid's lease; a second launch leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mmsweep.agent import Job, News
from mmsweep.cluster import Capacity, connect
from mmsweep.grid import Cell, Grid, load_grid
from mmsweep.lease import Lease
from mmsweep.progress import Board, duration
from mmsweep.store import RunStore, StoreError, open_store
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


def main(argv: Sequence[str] | None = None) -> int:
    """Launch a grid. Exit status 0: all done; 1: some runs failed or were stopped; 2: bad input, or
    somebody else works on the grid; 130: Ctrl-C before it began."""
    arguments = _parser().parse_args(argv)
    try:
        grid = load_grid(grid_path(arguments.grid), identify=identify)
        store = open_store(grid.store if arguments.store is None else arguments.store)
        if arguments.dry_run:
            return _dry_run(grid, store)
        return _launch(grid, store, arguments.address, show=arguments.open)
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
    parser.add_argument("--address", help='Ray cluster: "auto" or host:port (default: this machine alone)')
    parser.add_argument("--dry-run", action="store_true", help="print the runs and what they cost, and stop")
    parser.add_argument("--open", action="store_true", help="open the report, on a machine with a desktop")
    return parser


def grid_path(given: str) -> Path:
    shipped = SHIPPED / f"{given}.yaml"
    try:
        return shipped if not Path(given).exists() and shipped.is_file() else Path(given)
    except OSError as error:
        raise InputError(f"{given[:60]}…: {error.strerror}") from None


def _launch(grid: Grid, store: RunStore, address: str | None, *, show: bool) -> int:
    launch = f"{grid.name}-{time.strftime('%m%d-%H%M%S')}"
    with _sigterm_unwinds(), store.grid_lease(grid.name, launch, on_lost=_stop_this_launch) as lease:
        if not _take(lease, grid):
            return 2
        return _train(grid, store, address, launch, show=show)


def _take(lease: Lease, grid: Grid) -> bool:
    """Take the grid's lease, or name who has it."""
    owner = lease.acquire(
        on_silence=lambda silent: print(
            f"{grid.name}: no heartbeat from {silent}; taking over when it has been silent "
            f"for {silent.ttl:.0f} s",
            flush=True,
        )
    )
    if owner is not None:
        print(f"{grid.name} is being launched by {owner}; nothing done", file=sys.stderr)
        return False
    for dead, cause in lease.taken_from:
        print(f"{grid.name}: taken over from {dead}: {cause}", flush=True)
    return True


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """SIGTERM ends the process as an exception does, so that what it holds is released."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop_this_launch() -> None:
    print("this launch was silent for so long that another has taken over; stopping", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C: runs save their state


def _train(grid: Grid, store: RunStore, address: str | None, launch: str, *, show: bool) -> int:
    finished = _finished(store, grid)
    missing = {run_id: run for run_id, run in grid.runs.items() if run_id not in finished}
    store.put_grid(grid.name, grid.text, grid.index())
    if not missing:
        print(f"{grid.name}: all {len(grid.runs)} runs are in {store.url}; nothing to train")
        return _report(store, grid, show=show)
    price = _total(cost(run) for run in missing.values())
    print(
        f"{grid.name}: {len(grid.runs)} runs, {len(finished)} done, {len(missing)} to train "
        f"({price}) into {store.url}",
        flush=True,
    )
    begun = time.monotonic()
    board = Board(missing, done_before=len(finished))
    with connect(address) as capacity:
        _check_capacity(grid, capacity, address)
        from mmsweep.trial import run_all  # imports ray, which must see the settings of connect()

        with board.show():
            run_all(
                [_job(run_id, run, store, grid, launch) for run_id, run in missing.items()],
                grid.resources,
                board,
            )
    return _end(grid, store, board, begun, show=show)


def _job(run_id: str, run: RunConfig, store: RunStore, grid: Grid, launch: str) -> Job:
    data = run.data
    if data.path is not None:  # agents may start in another folder
        run = run.model_copy(update={"data": data.model_copy(update={"path": str(expanded(data.path))})})
    resources = grid.resources.model_dump(mode="json")
    return Job(run_id, run.model_dump(mode="json"), store.url, launch, resources)


def _check_capacity(grid: Grid, capacity: Capacity, address: str | None) -> None:
    """A run that can never be placed would wait for ever without a word."""
    from mmsweep.trial import request

    wanted = request(grid.resources)
    have = {"CPU": capacity.cpus, "GPU": capacity.gpus}
    for kind, amount in wanted.items():
        if amount > have[kind] and address is None:
            raise InputError(
                f"a run of this grid needs {amount:g} {kind}s and this machine has {have[kind]:g}; "
                "change resources in the grid, or name a cluster with --address"
            )
        if amount > have[kind]:
            print(
                f"waiting: a run needs {amount:g} {kind}s, the cluster has {have[kind]:g} so far", flush=True
            )


def _end(grid: Grid, store: RunStore, board: Board, begun: float, *, show: bool) -> int:
    stopping = [run_id for run_id, row in board.rows.items() if row.news.status == records.RUNNING]
    if stopping:
        print(f"stopping: {len(stopping)} runs save their state", flush=True)
        _wait_until_saved(store, stopping)
    finished = _finished(store, grid)
    trouble = {
        run_id: row.news
        for run_id, row in board.rows.items()
        if row.news.status in (records.FAILED, records.OOM)
    }
    print(f"{len(finished)} of {len(grid.runs)} runs done in {duration(time.monotonic() - begun)}")
    for run_id, news in trouble.items():
        _publish_failure(store, run_id, news)
        print(f"{run_id}: {news.status} at step {news.step}: {news.reason}")
    if finished:
        _report(store, grid, show=show)
    if len(finished) == len(grid.runs):
        return 0
    print("the same command goes on from here")
    return 1


def _publish_failure(store: RunStore, run_id: str, news: News) -> None:
    """Say in the store what an agent that died could not."""
    with contextlib.suppress(StoreError):
        status = store.status(run_id) or {}
        if status.get("status") == records.RUNNING and status.get("attempt") == news.attempt:
            store.put_status(run_id, {**status, "status": news.status, "reason": news.reason})


def _wait_until_saved(store: RunStore, run_ids: list[str]) -> None:
    """Agents save and ship after their launcher has let go; give them time to say so."""
    deadline = time.monotonic() + STOP_GRACE_S
    while time.monotonic() < deadline:
        try:
            run_ids = [r for r in run_ids if (store.status(r) or {}).get("status") == records.RUNNING]
        except StoreError as error:
            print(error, file=sys.stderr)
            return
        if not run_ids:
            return
        time.sleep(0.5)
    print(f"still saving after {STOP_GRACE_S:.0f} s: {', '.join(run_ids)}", file=sys.stderr)


def _report(store: RunStore, grid: Grid, *, show: bool) -> int:
    from mmsweep.report import main as report

    return report([store.url, "--grid", grid.name, *(["--open"] if show else [])])


def _finished(store: RunStore, grid: Grid) -> set[str]:
    stored = set(store.run_ids())
    return {run_id for run_id in grid.runs if run_id in stored and store.summary(run_id) is not None}


# --- what it costs -------------------------------------------------------------------------------


def _total(costs: Iterable[Cost]) -> str:
    """`3.28 G tokens, 5.1 E FLOP`"""
    costs = list(costs)
    tokens, flops = sum(price.tokens for price in costs), sum(price.total for price in costs)
    return f"{amount(tokens)} tokens, {amount(flops)}FLOP"


def _dry_run(grid: Grid, store: RunStore) -> int:
    finished = _finished(store, grid)
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
    _print_table(rows, left=("run", "arm", "store"))
    missing = _total(price for run_id, price in costs.items() if run_id not in finished)
    print(
        f"{grid.name}: {len(grid.runs)} runs ({len(grid.cells)} cells), {len(finished)} done in {store.url}, "
        f"{len(grid.runs) - len(finished)} to train: {missing}"
    )
    for line in (*_per_step(grid, costs), _memory(grid)):
        print(line)
    return 0


def _print_table(rows: list[list[str]], left: Sequence[str]) -> None:
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
