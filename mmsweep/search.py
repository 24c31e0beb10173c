"""`python -m mmsweep.search grid.yaml`: find the best setting of a grid, and train it on fresh seeds.

Settings (arms, with the values of axes) are compared over whole schedules: a quarter of the steps, a half,
all of them, each decayed to its end, because losses in the middle of a schedule hardly predict its end. After
each round the best third goes on; a setting that diverged does not. The winners are trained again on seeds
that had no part in the choice.

Every round is a grid of its own in the store, and what goes on follows from the store alone: the same command
goes on wherever it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from mmsweep.budget import Budget, device_seconds, devices, of_budget, unit
from mmsweep.grid import MAX_CELLS, Cell, Grid, load_grid
from mmsweep.halving import best, survivors
from mmsweep.launch import (
    amount,
    exceptions_told,
    finished_runs,
    grid_path,
    make_report,
    patiently,
    print_table,
    run_launch,
)
from mmsweep.notify import VARIABLE, Webhook, webhook
from mmsweep.progress import TROUBLE
from mmsweep.regrid import arm_name, grid_text
from mmsweep.store import RunStore, StoreError, open_store
from trainers.config import RunConfig
from trainers.corpus import identify
from trainers.errors import InputError, did_you_mean
from trainers.flops import cost
from trainers.records import DIVERGED
from trainers.yamlfile import printable

HORIZONS = "1/4,1/2,1"
KEEP = "1/3"
WINNERS, FRESH_SEEDS = 2, 5
FRESH = "fresh"
GOES_ON = "the same command goes on from there"
_THREADS = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Search. Exit status 0: the winners are trained on fresh seeds; 1: stopped, or some runs failed;
    2: bad input, or somebody else works on a round."""
    arguments = _parser().parse_args(argv)
    try:
        search = _read(arguments)
        if arguments.dry_run:
            return _dry_run(search)
        hook = webhook(arguments.webhook)
        search.store.facts()  # an error now, and a wait later
        with hook, exceptions_told(hook, f"the search over {arguments.grid}"):
            return _run(search, arguments.address, hook, show=arguments.open)
    except (InputError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmsweep search", description="Find the best setting of a grid, and train it on fresh seeds."
    )
    parser.add_argument("grid", help='grid file, or the name of one that ships, such as "search"')
    parser.add_argument("--store", help='folder or "s3://bucket/prefix", instead of the grid\'s own')
    parser.add_argument("--address", help='Ray cluster: "auto" or host:port (default: this machine alone)')
    parser.add_argument(
        "--horizons", default=HORIZONS, metavar="SHARES",
        help=f"of the grid's steps, shortest first, the last of them 1 (default: {HORIZONS})",
    )  # fmt: skip
    parser.add_argument(
        "--keep",
        default=KEEP,
        metavar="SHARE",
        help=f"of the settings goes on after a round (default: {KEEP})",
    )
    parser.add_argument(
        "--winners", type=int, default=WINNERS, metavar="N",
        help=f"how many settings are trained on fresh seeds (default: {WINNERS})",
    )  # fmt: skip
    parser.add_argument(
        "--fresh-seeds", type=int, default=FRESH_SEEDS, metavar="N", help=f"default: {FRESH_SEEDS}"
    )
    parser.add_argument(
        "--against", metavar="SETTING", help="a setting that is trained on the fresh seeds in any case"
    )
    parser.add_argument(
        "--without-failed", action="store_true", help="leave out settings with a run that was given up"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the rounds and their cost, and stop")
    parser.add_argument(
        "--webhook", metavar="URL", help=f"as in `mmsweep launch` (or the variable {VARIABLE})"
    )
    parser.add_argument("--open", action="store_true", help="open the last report")
    return parser


@dataclass(frozen=True)
class Search:
    """What is asked for."""

    grid: Grid
    store: RunStore
    settings: dict[str, RunConfig]
    """By name, in the order of the grid; of any seed, and with the name of their arm."""
    horizons: tuple[Fraction, ...]
    keep: Fraction
    winners: int
    fresh_seeds: range
    against: str | None
    without_failed: bool

    def round_name(self, number: int) -> str:
        """Of the grid of a round; the one on fresh seeds comes after those of the horizons."""
        return f"{self.grid.name}-{FRESH if number > len(self.horizons) else f'r{number}'}"

    def round_title(self, number: int) -> str:
        return f"round {number} of {len(self.horizons) + 1}"


def _read(arguments: argparse.Namespace) -> Search:
    grid = load_grid(grid_path(arguments.grid), identify=identify)
    store = open_store(grid.store if arguments.store is None else arguments.store)
    settings = settings_of(grid)
    for option in ("winners", "fresh_seeds"):
        if getattr(arguments, option) < 1:
            raise InputError(f"--{option.replace('_', '-')} {getattr(arguments, option)}: give at least 1")
    if arguments.against is not None and arguments.against not in settings:
        near = did_you_mean(arguments.against, settings)
        raise InputError(f'--against "{printable(arguments.against)}": no such setting{near}')
    if len(settings) < 2:
        raise InputError(f"{arguments.grid}: one setting alone leaves nothing to search: add arms or axes")
    lengths = sorted({run.schedule.steps for run in settings.values()})
    if len(lengths) > 1:
        raise InputError(
            f"{arguments.grid}: settings of {lengths[0]:,} to {lengths[-1]:,} steps: a search shortens all "
            "alike, so set schedule.steps in base alone"
        )
    if len(grid.name) > 58:  # a name has 64 characters at most, and the rounds' are longer
        raise InputError(f"{arguments.grid}: name: longer than 58 characters; the rounds add to it")
    first = max(grid.seeds) + 1
    fresh = arguments.fresh_seeds
    if first + fresh > 2**31 or fresh * (arguments.winners + 1) > MAX_CELLS:
        raise InputError(f"--fresh-seeds {fresh}: too many above the grid's {first - 1}; give fewer")
    search = Search(
        grid, store, settings, _horizons(arguments.horizons), _keep(arguments.keep), arguments.winners,
        range(first, first + fresh), arguments.against, arguments.without_failed,
    )  # fmt: skip
    for run in settings.values():
        shortened(run, search.horizons[0])
    return search


def _horizons(given: str) -> tuple[Fraction, ...]:
    shares = [_share(text) for text in given.split(",")]
    horizons = tuple(share for share in shares if share is not None)
    if len(horizons) < len(shares):
        raise InputError(f"--horizons {printable(given)}: give shares such as {HORIZONS}")
    if horizons != tuple(sorted(set(horizons))) or horizons[0] <= 0 or horizons[-1] != 1:
        raise InputError(f"--horizons {given}: shares rise from above 0 to 1, as in {HORIZONS}")
    return horizons


def _keep(given: str) -> Fraction:
    keep = _share(given)
    if keep is None or not 0 < keep < 1:
        raise InputError(f"--keep {printable(given)}: give a share between 0 and 1, such as {KEEP}")
    return keep


def _share(text: str) -> Fraction | None:
    """`1/4`, `.25`; None for anything else."""
    if not re.fullmatch(r"\d{1,6}(/0*[1-9]\d{0,5})?|\d{0,6}\.\d{1,6}", text, re.ASCII):
        return None
    return Fraction(text)


# --- settings ------------------------------------------------------------------------------------


def settings_of(grid: Grid) -> dict[str, RunConfig]:
    """Name → config of every setting of a grid; of those that make the same run the first."""
    short = _short(list(grid.axes))
    found: dict[str, RunConfig] = {}
    seen: set[str] = set()
    for cell in grid.cells:
        if cell.seed == grid.seeds[0] and cell.run_id not in seen:
            seen.add(cell.run_id)
            found[_name(cell, short, found)] = grid.runs[cell.run_id]
    return found


def _short(paths: Sequence[str]) -> dict[str, str]:
    """The least of each path's end that no other one has: `lr`, or `muon.lr` and `adamw.lr`."""
    ends = {path: [path.split(".", n)[n] for n in range(path.count(".") + 1)] for path in paths}
    every = [end for path in paths for end in ends[path]]
    return {
        path: next((end for end in reversed(own) if every.count(end) == 1), path)
        for path, own in ends.items()
    }


def _name(cell: Cell, short: Mapping[str, str], taken: Mapping[str, Any]) -> str:
    """`stiefel-dgram`, `hetero-lr-0.02`"""
    words = (word for path, value in cell.axes.items() for word in (short[path], str(value)))
    return cell.arm if not cell.axes else arm_name("-".join([cell.arm, *words]), taken)


def shortened(run: RunConfig, horizon: Fraction) -> RunConfig:
    """The run with a share of its steps, warm-up and evaluations in proportion.

    Raises:
        InputError: nothing is left of it.
    """
    steps, warmup = (int(n * horizon) for n in (run.schedule.steps, run.schedule.warmup_steps))
    if steps <= warmup:
        raise InputError(
            f"--horizons {horizon}: leaves {steps} of {run.schedule.steps} steps; give larger shares"
        )
    every = max(1, int(run.evaluation.every * horizon))
    return run.model_copy(
        update={
            "schedule": run.schedule.model_copy(update={"steps": steps, "warmup_steps": warmup}),
            "evaluation": run.evaluation.model_copy(update={"every": every}),
        }
    )


def final_loss(summary: Mapping[str, Any]) -> float:
    """Validation loss (nats per token) at the end of the schedule; +inf where a run has none."""
    loss = summary["final_val_loss"]
    short = summary["status"] == DIVERGED and summary["steps"] < summary["horizon"]
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) and not short else math.inf


# --- rounds --------------------------------------------------------------------------------------


class _EndedError(Exception):
    """The search goes no further now; the status to exit with."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass
class _Trainer:
    """Trains rounds, one after the other."""

    search: Search
    address: str | None
    hook: Webhook
    hours: float = 0.0
    """Device-hours of the rounds so far."""

    def losses(
        self, number: int, runs: Mapping[str, RunConfig], seeds: Sequence[int], *, show: bool = False
    ) -> dict[str, list[float]]:
        """Final losses by setting, in the order of the seeds; +inf where a run diverged.

        Raises:
            _EndedError: the round was stopped, or runs of it were given up.
        """
        grid, store = self._grid(number, runs, seeds), self.search.store
        summaries = self._summaries(grid)
        if len(summaries) < len(grid.runs):
            status, stopped = run_launch(self._within_budget(grid), store, self.address, self.hook, show=show)
            if status == 2:
                raise _EndedError(2, "")  # it has said why
            if stopped:
                raise _EndedError(1, f"{stopped} in {self.search.round_title(number)}; {GOES_ON}")
            summaries = self._summaries(grid)
        else:  # by another grid, or by an earlier search
            store.put_grid(grid.name, grid.text, grid.index())
            if number > len(self.search.horizons):
                make_report(store, grid, show=show)
        spent = [device_seconds(summary, devices(grid.resources)) for summary in summaries.values()]
        self.hours += sum(spent) / 3600
        by_setting: dict[str, list[float]] = {name: [] for name in runs}
        for run_id, run in grid.runs.items():
            if run_id in summaries:
                by_setting[run.arm].append(final_loss(summaries[run_id]))
        whole = {name: found for name, found in by_setting.items() if len(found) == len(seeds)}
        if len(whole) < len(by_setting):
            self._explain(number, grid, summaries, set(by_setting) - set(whole))
        if not whole:
            raise _EndedError(1, "no setting has all its runs")
        return whole

    def _grid(self, number: int, runs: Mapping[str, RunConfig], seeds: Sequence[int]) -> Grid:
        """The round as a grid file, read as any other."""
        of, keys = self.search.grid, dict[str, Any]()
        ranks = {name: of.resources.priority.get(self.search.settings[name].arm, 0) for name in runs}
        ranks = {name: rank for name, rank in ranks.items() if rank}
        resources = of.resources.model_copy(update={"priority": ranks})
        keys["description"] = f"{self.search.round_title(number)} of a search: {of.description}".rstrip(": ")
        keys["resources"] = resources.model_dump(mode="json", exclude_defaults=True)
        if of.budget is not None:
            keys["budget"] = of.budget.model_dump(mode="json", exclude_none=True)
        name = self.search.round_name(number)
        known = {run.data.model_copy(update={"digest": None}): str(run.data.digest) for run in runs.values()}
        with tempfile.TemporaryDirectory(prefix="mmsweep-search-") as folder:
            file = Path(folder) / f"{name}.yaml"
            file.write_text(grid_text(name, runs, seeds, **keys))
            return load_grid(file, identify=known.__getitem__)

    def _within_budget(self, grid: Grid) -> Grid:
        """With what earlier rounds have left of the budget."""
        if grid.budget is None:
            return grid
        left = grid.budget.hours - self.hours
        if left <= 0:
            hours = of_budget(grid.budget.hours, self.hours, unit(grid.resources))
            raise _EndedError(1, f"budget spent: {hours}; raise it, and {GOES_ON}")
        return replace(grid, budget=Budget(gpu_hours=left))

    def _summaries(self, grid: Grid) -> dict[str, dict[str, Any]]:
        """Of the grid's runs that are complete."""
        store, name = self.search.store, self.search.grid.name

        def look() -> dict[str, dict[str, Any]]:
            complete = finished_runs(store, grid)
            with ThreadPoolExecutor(_THREADS) as pool:
                found = dict(zip(complete, pool.map(store.summary, complete), strict=True))
            return {run_id: summary for run_id, summary in found.items() if summary is not None}

        return patiently(name, look, functools.partial(print, flush=True))

    def _explain(self, number: int, grid: Grid, summaries: Mapping[str, Any], settings: set[str]) -> None:
        """Say why settings have not all their runs; raises `_EndedError` where that ends the search."""
        missing = [run_id for run_id in grid.runs if run_id not in summaries]
        with ThreadPoolExecutor(_THREADS) as pool:
            states = [status or {} for status in pool.map(self.search.store.status, missing)]
        self.hours += sum(device_seconds(state, devices(grid.resources)) for state in states) / 3600
        where = self.search.round_title(number)
        if any(str(state.get("reason", "")).startswith("budget spent") for state in states):
            raise _EndedError(1, f"budget spent in {where}; raise it, and {GOES_ON}")
        if any(state.get("status") not in TROUBLE for state in states):
            raise _EndedError(1, f"stopped in {where}; {GOES_ON}")
        names = ", ".join(name for name in self.search.settings if name in settings)
        if not self.search.without_failed:
            raise _EndedError(
                1, f"runs of {names} were given up; --without-failed goes on without these settings"
            )
        print(f"{self.search.grid.name}: left out, with runs that were given up: {names}", flush=True)


def _run(search: Search, address: str | None, hook: Webhook, *, show: bool) -> int:
    trainer = _Trainer(search, address, hook)
    try:
        found = _halve(search, trainer)
        _confirm(search, trainer, found, show=show)
    except _EndedError as ended:
        if str(ended):
            print(f"{search.grid.name}: {ended}", file=sys.stderr)
        return ended.status
    return 0


def _medians(losses: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """+inf for a setting that diverged in half of its runs or more."""
    return {name: statistics.median(found) for name, found in losses.items()}


def _halve(search: Search, trainer: _Trainer) -> dict[str, float]:
    """Median final losses of the settings that reach the last horizon."""
    name, names = search.grid.name, list(search.settings)
    for number, horizon in enumerate(search.horizons, start=1):
        runs = {setting: shortened(search.settings[setting], horizon) for setting in names}
        steps = next(iter(runs.values())).schedule.steps
        print(f"{name}: {search.round_title(number)}, {steps:,} steps: {_listed(names)}", flush=True)
        found = _medians(trainer.losses(number, runs, search.grid.seeds))
        if not any(map(math.isfinite, found.values())):
            raise _EndedError(1, "every setting has diverged")
        if horizon < 1:
            on = {*survivors(found, search.keep), *best(found, search.winners)}
            names = [setting for setting in names if setting in on]
    return found


def _confirm(search: Search, trainer: _Trainer, found: Mapping[str, float], *, show: bool) -> None:
    """Train the winners on fresh seeds, and say what came out."""
    name, winners = search.grid.name, best(found, search.winners)
    names = list(dict.fromkeys([*winners, *([search.against] if search.against else [])]))
    runs = {setting: search.settings[setting] for setting in names}
    number = len(search.horizons) + 1
    print(f"{name}: {search.round_title(number)}, fresh seeds: {_listed(names)}", flush=True)
    losses = trainer.losses(number, runs, search.fresh_seeds, show=show)
    fresh = _medians(losses)
    order = sorted(fresh, key=lambda setting: fresh[setting])
    reference = next(n for n in (search.against, *winners, *order) if n in fresh)
    rows = [["setting", "when chosen", "on fresh seeds", f"− {reference}"]]
    for setting in order:
        difference = "" if setting == reference else _difference(losses[setting], losses[reference])
        rows.append([setting, _loss(found.get(setting)), _loss(fresh[setting]), difference])
    print_table(rows, left=("setting",))
    print(
        "Losses: median final validation loss, nats per token, over the searched and over "
        f"{len(search.fresh_seeds)} fresh seeds. − {reference}: mean paired difference on the fresh seeds "
        "[95% t interval] (pairs of finite losses), exploratory."
    )
    winner = order[0] if math.isfinite(fresh[order[0]]) else "none, all diverged"
    page = f"python -m mmsweep.report {shlex.quote(search.store.url)} --grid {search.round_name(number)}"
    print(f"{name}: best on fresh seeds: {winner}; its figures: {page}")


def _difference(losses: Sequence[float], others: Sequence[float]) -> str:
    """`−0.0123 [−0.0150, −0.0096] (5)`"""
    from analysis.stats import paired_t  # scipy takes half a second
    from analysis.tables import bounds, signed

    found = paired_t([a - b for a, b in zip(losses, others, strict=True) if math.isfinite(a - b)])
    return f"{signed(found.estimate)}{bounds(found.low, found.high)} ({found.n})" if found.n else "–"


def _listed(names: Sequence[str]) -> str:
    most = 9
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if math.isfinite(value) else "diverged"


# --- what it costs -------------------------------------------------------------------------------


def _dry_run(search: Search) -> int:
    rows = [["round", "grid", "settings", "steps", "runs", "FLOP"]]
    left, total = len(search.settings), 0.0
    for number, horizon in enumerate([*search.horizons, None], start=1):
        seeds = len(search.grid.seeds)
        if horizon is None:  # on fresh seeds
            most = search.winners + (search.against is not None)
            left, seeds = min(len(search.settings), most), len(search.fresh_seeds)
        runs = [shortened(run, horizon or Fraction(1)) for run in search.settings.values()]
        price = statistics.fmean(cost(run).total for run in runs) * left * seeds
        steps = f"{runs[0].schedule.steps:,}"
        cells = [str(number), search.round_name(number), str(left), steps, str(left * seeds)]
        rows.append([*cells, amount(price)])
        total += price
        left = max(math.ceil(left * search.keep), min(left, search.winners))
    print(f"{len(search.settings)} settings: {printable(', '.join(search.settings))}")
    print_table(rows, left=("grid",))
    everything = sum(cost(run).total for run in search.settings.values()) * len(search.grid.seeds)
    print(
        f"{search.grid.name}: {amount(total)}FLOP at most, if settings cost alike; "
        f"{amount(everything)}FLOP with all settings at full length"
    )
    return 0


if __name__ == "__main__":
    from mmsweep.__main__ import quietly

    sys.exit(quietly(main))
