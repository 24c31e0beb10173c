"""`python -m mmsweep.plan grid.yaml`: what a grid would take, before any of it is spent.

Tokens, FLOPs, hours, money, bytes and wall time, by arm and in all, less what the store has. Time follows
from the FLOPs that `trainers.flops` counts and a rate: a share of a GPU's peak (`--gpu`, `--mfu`), or what
runs of the same model were seen to reach (`--measured`). With `--gap`, how many seeds would show it.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError
from rich.console import Console
from rich.table import Table

from mmsweep.budget import Budget, concurrent_runs, device_seconds, devices, of_budget, unit
from mmsweep.contents import size
from mmsweep.grid import Grid, load_grid
from mmsweep.launch import amount, finished_runs, grid_path
from mmsweep.placement import Need
from mmsweep.progress import duration
from mmsweep.resources import Resources
from mmsweep.store import RunStore, StoreError, open_store
from mmsweep.stored import stored_bytes
from trainers.config import Positive, RunConfig, Section
from trainers.corpus import identify
from trainers.devices import PEAKS, peak
from trainers.errors import InputError, did_you_mean
from trainers.flops import cost
from trainers.records import COMPLETED
from trainers.yamlfile import Layer, explain, parse, raise_if

MFU = 0.35
GPUS = 8
_THREADS = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan. Exit status 0: printed; 2: bad input."""
    arguments = _parser().parse_args(argv)
    try:
        grid = load_grid(grid_path(arguments.grid), identify=identify)
        rate, lanes, price = _rate(arguments, grid), _lanes(arguments, grid), _price(arguments)
        _print(plan(grid, rate, lanes, _finished(arguments, grid)), price)
        print(f"at {_speed(arguments)}")
        if grid.budget is not None and not arguments.fresh:
            print(_budget(open_store(arguments.store or grid.store), grid, grid.budget))
        if arguments.gap is not None:
            _print_seeds(grid, rate, arguments)
    except (InputError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmsweep plan", description="What a grid would take.")
    parser.add_argument("grid", help="grid file, or the name of one that ships")
    parser.add_argument("--gpu", help='such as "H100": its peak is in trainers/devices.py')
    parser.add_argument("--gpus", type=int, default=GPUS, help=f"how many there are (default: {GPUS})")
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="for runs without GPUs")
    parser.add_argument(
        "--nodes", type=int, help="machines that have as many of them each (default: resources.nodes)"
    )
    parser.add_argument(
        "--mfu", type=float, default=MFU, help=f"share of the peak that is reached (default: {MFU})"
    )
    parser.add_argument("--measured", metavar="STORE", help="take the speed from the runs of this store")
    money = parser.add_mutually_exclusive_group()
    money.add_argument("--price", type=float, help="money for an hour of one GPU")
    money.add_argument("--prices", type=Path, help="YAML: {H100: {price_per_hour: 2.5}}")
    done = parser.add_mutually_exclusive_group()
    done.add_argument("--store", help="whose finished runs are not counted, instead of the grid's own")
    done.add_argument("--fresh", action="store_true", help="count all runs; look into no store")
    parser.add_argument("--gap", type=float, help="difference of two arms' losses that is to be found")
    parser.add_argument("--sigma", type=float, help="standard deviation of the loss between seeds")
    parser.add_argument("--pilot", metavar="STORE", help="take sigma from the seeds of this store's runs")
    return parser


# --- from the command line -----------------------------------------------------------------------


Rate = Callable[[RunConfig], float]
"""FLOP/s of what `trainers.flops` counts, that one worker of a run reaches on its own GPU, or CPU."""


def _rate(arguments: argparse.Namespace, grid: Grid) -> Rate:
    if arguments.measured is not None:
        return measured_rate(open_store(arguments.measured), grid)
    if not grid.resources.gpus_per_worker:
        raise InputError(
            f"{grid.name}: its runs use no GPU, and no table has the speed of a CPU; "
            "give --measured STORE with runs of the same models"
        )
    if arguments.gpu is None:
        raise InputError("--gpu is missing: name the GPU, as in --gpu H100, or give --measured STORE")
    return peak_rate(arguments.gpu, arguments.mfu)


def _speed(arguments: argparse.Namespace) -> str:
    """What the times rest on."""
    if arguments.measured is not None:
        return f"the speed of the runs in {arguments.measured}"
    return f"{arguments.mfu:.0%} of the peak of an {arguments.gpu}"


def _lanes(arguments: argparse.Namespace, grid: Grid) -> int:
    """Runs that go at once. Where they have GPUs, CPUs are taken for granted."""
    kind = "GPU" if grid.resources.gpus_per_worker else "CPU"
    count = arguments.gpus if kind == "GPU" else arguments.cpus or 1
    machines = grid.resources.nodes if arguments.nodes is None else arguments.nodes
    if machines < 1:
        raise InputError(f"--nodes {machines}: give a number above 0")
    room = {"CPU": math.inf, kind: count // machines}
    lanes = concurrent_runs(grid.resources, [room] * machines)
    if lanes < 1:
        raise InputError(f"--{kind.lower()}s: too few {kind}s; a run needs {Need.of(grid.resources)}")
    return lanes


def _finished(arguments: argparse.Namespace, grid: Grid) -> set[str]:
    if arguments.fresh:
        return set()
    return finished_runs(open_store(arguments.store or grid.store), grid)


def _budget(store: RunStore, grid: Grid, budget: Budget) -> str:
    """What all attempts of the grid's runs have taken so far, and what is left."""
    present = [run_id for run_id in store.facts() if run_id in grid.runs]
    with ThreadPoolExecutor(_THREADS) as pool:
        facts = pool.map(lambda run_id: store.summary(run_id) or store.status(run_id), present)
        spent = sum(device_seconds(each, devices(grid.resources)) for each in facts) / 3600
    what = unit(grid.resources)
    return (
        f"budget: {of_budget(budget.hours, spent, what)} spent, {_hours(max(0.0, budget.hours - spent))} left"
    )


# --- prices of GPUs ------------------------------------------------------------------------------


class Price(Section):
    """Money for an hour of one GPU."""

    price_per_hour: Positive
    spot_price_per_hour: Positive | None = None


class PriceList(Section):
    gpus: Annotated[dict[str, Price], Field(min_length=1)]


def read_prices(path: Path) -> dict[str, Price]:
    """Prices by the name of a GPU.

    Raises:
        InputError: a line for each problem, with the file's name and the line.
    """
    document = parse(path)
    raise_if(document.problems)
    layer = Layer({"gpus": document.data}, {("gpus",): ()})
    try:
        return PriceList.model_validate(layer.data).gpus
    except ValidationError as error:
        raise_if(explain(error, document, [layer], schema=PriceList))
        raise


def _price(arguments: argparse.Namespace) -> Price | None:
    if arguments.price is not None:
        if not 0 < arguments.price < math.inf:
            raise InputError(f"--price {arguments.price:g}: give a number above 0")
        return Price(price_per_hour=arguments.price)
    if arguments.prices is None:
        return None
    prices = read_prices(arguments.prices)
    if arguments.gpu is None:
        raise InputError("--prices needs --gpu: the name of a GPU in the file")
    if arguments.gpu not in prices:
        raise InputError(
            f'{arguments.prices}: no price of "{arguments.gpu}"{did_you_mean(arguments.gpu, prices)}'
        )
    return prices[arguments.gpu]


# --- speed ---------------------------------------------------------------------------------------


def peak_rate(gpu: str, mfu: float) -> Rate:
    """A share of what a GPU could do at most, in the run's precision.

    Raises:
        InputError: no such GPU in the table, or no share.
    """
    known = peak(gpu)
    if known is None:
        raise InputError(f'--gpu "{gpu}" is not in the table of peaks; it has {", ".join(sorted(PEAKS))}')
    if not 0 < mfu <= 1:
        raise InputError(f"--mfu {mfu:g}: give a share between 0 and 1")
    return lambda run: mfu * float(getattr(known, run.precision))


def measured_rate(store: RunStore, grid: Grid) -> Rate:
    """What the runs of a store reach: of the same model, precision and way of training; else of the same
    model and precision. The median over such runs of each run's median.

    Raises:
        InputError: a model of the grid has no run there that says how fast it was.
    """
    models = {_model(run) for run in grid.runs.values()}
    with ThreadPoolExecutor(_THREADS) as pool:
        seen = [
            found for found in pool.map(lambda run_id: _seen(store, run_id, models), store.run_ids()) if found
        ]
    rates: dict[str, list[float]] = {}
    for run, rate in seen:
        for key in (_model(run), _way(run)):
            rates.setdefault(key, []).append(rate)
    for run in grid.runs.values():
        if _model(run) not in rates:
            raise InputError(
                f"{store.url}: no run of arm {run.arm}'s model in {run.precision} says how fast it was; "
                "give --gpu and --mfu, or a store that has one"
            )
    medians = {key: statistics.median(values) for key, values in rates.items()}
    return lambda run: medians.get(_way(run), medians[_model(run)])


def _model(run: RunConfig) -> str:
    return json.dumps(["model", run.precision, run.model.model_dump(mode="json")])


def _way(run: RunConfig) -> str:
    """What decides the time of a step."""
    return json.dumps([
        _model(run), run.optimizer.muon.model_dump(mode="json", exclude={"lr", "momentum", "weight_decay"}),
        *((module.manifold, module.optimizer) for module in (run.assignment.attn, run.assignment.mlp)),
        run.schedule.batch_size,
    ])  # fmt: skip


def _seen(store: RunStore, run_id: str, models: set[str]) -> tuple[RunConfig, float] | None:
    """A run of one of the models, and the FLOP/s that each of its workers reached."""
    try:
        stored = store.config(run_id) or {}
        run = RunConfig.model_validate(stored.get("config", {}))
    except (StoreError, ValidationError):
        return None
    if _model(run) not in models or "config" not in stored:
        return None
    speeds: list[float] = []
    for kind in ("costs", "steps"):  # of all workers together; evaluation does not count
        speeds = speeds or store.table(run_id, kind)["tokens_per_s"].to_pylist()[1:]
    if not speeds:
        return None
    price = cost(run)
    per_token = (price.model_step + price.optimizer_step) / run.tokens_per_step
    workers = stored.get("provenance", {}).get("world_size", 1)
    return run, statistics.median(speeds) * per_token / workers


# --- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What one run takes."""

    run_id: str
    arm: str
    tokens: int
    flops: float
    seconds: float
    """From start to end."""
    gpu_hours: float
    """Worker-hours where a worker has no GPU."""
    stored: float
    """Bytes in the store once it has ended."""


@dataclass(frozen=True)
class Plan:
    """What a grid takes."""

    grid: Grid
    todo: list[RunPlan]
    finished: set[str]
    lanes: int
    """Runs that go at once."""
    wall_seconds: float


def plan(grid: Grid, rate: Rate, lanes: int, finished: set[str]) -> Plan:
    """The runs that are not `finished`, priced, and placed on `lanes` one after another."""
    price = functools.cache(lambda same: _prices(same.run, grid.resources, rate))
    todo = []
    for run_id, run in grid.runs.items():
        if run_id not in finished:
            todo.append(RunPlan(run_id, run.arm, *price(_ButSeed(run))))
    return Plan(grid, todo, finished, lanes, makespan([run.seconds for run in todo], lanes))


class _ButSeed:
    """A run as a key: runs that differ in their seed alone have one price."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.key = tuple((n, v) for n, v in run if n not in ("seed", "arm"))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ButSeed) and self.key == other.key


def _prices(run: RunConfig, resources: Resources, rate: Rate) -> tuple[int, float, float, float, float]:
    """The fields of a RunPlan after the names."""
    price = cost(run)
    share = resources.gpus_per_worker or 1.0
    seconds = price.total / rate(run) / resources.workers / share
    return price.tokens, price.total, seconds, seconds * devices(resources) / 3600, stored_bytes(run)


def makespan(seconds: Iterable[float], lanes: int) -> float:
    """End of the last of some jobs, the longest first, each on the lane that is free first.

    At most 4/3 of the best that any order reaches (Graham 1969).
    """
    ends = [0.0] * lanes
    for job in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + job)
    return max(ends)


# --- what is printed -----------------------------------------------------------------------------


def _print(made: Plan, price: Price | None) -> None:
    grid = made.grid
    table = Table(box=None, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for name in ("runs", "tokens", "FLOP", unit(grid.resources), *(["money"] if price else []), "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    arms: dict[str, list[RunPlan]] = {arm: [] for arm in grid.arms}
    for run in made.todo:
        arms[run.arm].append(run)
    for arm, runs in [*arms.items(), ("all", made.todo)]:
        gpu_hours = sum(run.gpu_hours for run in runs)
        table.add_row(
            arm, str(len(runs)),
            amount(sum(run.tokens for run in runs)), amount(sum(run.flops for run in runs)),
            _hours(gpu_hours), *([f"{gpu_hours * price.price_per_hour:,.2f}"] if price else []),
            size(sum(run.stored for run in runs)),
        )  # fmt: skip
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    with console.capture() as text:  # rich would answer a closed pipe in its own way
        console.print(table)
    print(text.get(), end="")
    total = sum(run.gpu_hours for run in made.todo)
    finished = len(made.finished)
    print(f"{grid.name}: {len(made.todo)} runs to train, {finished} finished; {made.lanes} at once, ", end="")
    print(f"the longest first: {duration(made.wall_seconds)}")
    if price and price.spot_price_per_hour is not None:
        print(f"at the spot price: {total * price.spot_price_per_hour:,.2f}")


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.3g}"


def _print_seeds(grid: Grid, rate: Rate, arguments: argparse.Namespace) -> None:
    from analysis.stats import runs_needed  # scipy takes half a second

    if (arguments.sigma is None) == (arguments.pilot is None):
        raise InputError("--gap needs --sigma, or --pilot STORE to take it from: give one of them")
    sigma, whence = arguments.sigma, ""
    if arguments.pilot is not None:
        sigma, whence = _sigma_of(open_store(arguments.pilot))
    if not (0 < arguments.gap < math.inf and 0 < sigma < math.inf):
        raise InputError(f"--gap {arguments.gap:g} at sigma {sigma:g}: give numbers above 0")
    try:
        seeds = runs_needed(arguments.gap, sigma)
    except ValueError as error:
        raise InputError(f"--gap: {error}; ask for a larger one") from None
    everything = plan(grid, rate, 1, set())
    hours = sum(run.gpu_hours for run in everything.todo) / len(grid.seeds) * seeds
    print(
        f"a gap of {arguments.gap:g} at sigma {sigma:.3g}{whence}: {seeds} seeds an arm find it with 90% "
        f"power (t test of two arms, two-sided 5%); {_hours(hours)} {unit(grid.resources)} for this grid"
    )


def _sigma_of(pilot: RunStore) -> tuple[float, str]:
    """The noise to plan with, and where it is from."""
    from analysis.stats import pilot_sigma

    found = pilot_sigma(pilot_losses(pilot))
    if not found.freedom:
        raise InputError(f"--pilot {pilot.url}: no two completed, stable runs differ in their seed alone")
    return found.upper, f" (upper 80% bound; {found.estimate:.3g} with {found.freedom} degrees of freedom)"


def pilot_losses(store: RunStore) -> list[list[float]]:
    """Final validation losses of runs that differ in their seed alone; completed, stable ones count."""
    groups: dict[str, list[float]] = {}
    for run_id in store.run_ids():
        summary, stored = store.summary(run_id), store.config(run_id)
        if summary is None or stored is None or summary["status"] != COMPLETED:
            continue
        loss = summary["final_val_loss"]
        if loss is None or not math.isfinite(loss) or summary.get("verdict", {}).get("unstable"):
            continue
        alike = {k: v for k, v in stored["config"].items() if k not in ("seed", "runtime", "probes")}
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(loss)
    return list(groups.values())


if __name__ == "__main__":
    from mmsweep.__main__ import quietly

    sys.exit(quietly(main))
