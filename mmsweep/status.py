"""`python -m mmsweep.status STORE`: where every run stands, from the store alone, once or with `--watch`."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mmsweep.budget import device_seconds, of_budget
from mmsweep.progress import COLOURS, TROUBLE, duration
from mmsweep.store import DamagedError, NotFound, RunStore, StoreError, open_store
from trainers import records
from trainers.errors import InputError, did_you_mean
from trainers.yamlfile import printable

SILENT_S = 60.0
"""A running run that has not written its status for so long is called silent."""
STALLED_S = 300.0
"""A running run that has written no record for so long is called stalled."""
WATCH_S = 10.0
"""Pause between two looks of `--watch`."""
FINE = (records.PENDING, records.RUNNING, *records.FINISHED)
ENDED = (*records.FINISHED, *TROUBLE)
UNREADABLE = "unreadable"
LOST = "lost"
"""It says that it is running, and whoever worked on it is gone."""
LAST_LINES = 20
"""Of the log of a run that failed."""
_THREADS = 32

Row: TypeAlias = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Exit status 0: nothing failed; 1: some runs failed; 2: bad input."""
    parser = argparse.ArgumentParser(prog="mmsweep status", description="Where every run of a store stands.")
    parser.add_argument("store", help='folder or "s3://bucket/prefix"')
    parser.add_argument("--grid", help="only the runs of this grid")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=WATCH_S, metavar="SECONDS",
        help=f"look again every so many seconds (default: {WATCH_S:g}) until nothing runs any more",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    try:
        if arguments.watch is not None and not 0.1 <= arguments.watch <= 86_400:
            raise InputError(f"--watch {arguments.watch:g}: give seconds from 0.1 to 86400")
        survey = Survey(open_store(arguments.store), arguments.grid)
        if arguments.watch is not None:
            return _watch(survey, arguments.watch)
        return _show(survey.look())
    except (InputError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2


# --- what the store says -------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A store at one moment."""

    rows: list[Row]
    """One dict a run: its summary or its status.json; `pending` where nothing is."""
    notes: list[str]
    """Who launches what, and budgets."""
    launched: bool
    """Somebody is at work on a grid."""

    def counts(self) -> str:
        states = [row["status"] for row in self.rows]
        known = [*records.STATUSES, LOST, UNREADABLE]
        others = sorted(set(states) - set(known))
        return printable(", ".join(f"{states.count(s)} {s}" for s in [*known, *others] if s in states))

    def exit_status(self) -> int:
        return 0 if all(row["status"] in FINE for row in self.rows) else 1

    def over(self) -> bool:
        """Whether every run has ended."""
        return all(row["status"] in ENDED for row in self.rows)

    def still(self) -> bool:
        """Whether nothing will change before somebody launches: none runs and none is launched."""
        return not self.launched and not any(row.get("held") for row in self.rows)


class Survey:
    """Looks at the runs of a store, or of one grid in it. What cannot change any more is read once."""

    def __init__(self, store: RunStore, grid: str | None = None) -> None:
        self.store = store
        self.grid = grid
        self._finished: dict[str, Row] = {}

    def look(self) -> View:
        """
        Raises:
            InputError: no such grid, or a store with neither grids nor runs.
            StoreError: the store cannot be read.
        """
        store, grid = self.store, self.grid
        grids = store.grids()
        if grid is not None and grid not in grids:
            raise InputError(f'{store.url} has no grid "{grid}"{did_you_mean(grid, grids)}')
        grids = [grid] if grid else grids
        with ThreadPoolExecutor(_THREADS) as pool:
            indices = {
                n: index for n, index in zip(grids, pool.map(self._index, grids), strict=True) if index
            }
            present = set(store.run_ids())
            planned = [cell["run_id"] for index in indices.values() for cell in index["cells"]]
            run_ids = list(dict.fromkeys(planned if grid else [*planned, *present]))
            if not run_ids:
                raise InputError(f"{store.url} holds no grid and no run; is this the store of a launch?")
            # A listing of all that runs hold would tell which have a summary, and costs more than asking.
            found = pool.map(
                lambda run_id: self._one(run_id) if run_id in present else _nothing(run_id), run_ids
            )
            rows = dict(zip(run_ids, found, strict=True))
            launches = dict(zip(grids, pool.map(self._launches, grids), strict=True))
        launched = {n: index for n, index in indices.items() if launches[n].alive}
        for cell in (cell for index in launched.values() for cell in index["cells"]):
            if rows[cell["run_id"]]["status"] == records.PENDING and cell["run_id"] not in present:
                rows[cell["run_id"]]["reason"] = "waits for its turn"
        notes = [line for known in launches.values() for line in known.lines]
        alive = any(known.alive for known in launches.values())
        return View(list(rows.values()), [*notes, *_budgets(indices, rows)], alive)

    def _index(self, grid: str) -> dict[str, Any] | None:
        try:
            return self.store.grid_index(grid)
        except NotFound:  # the YAML is there, the index not yet
            return None
        except DamagedError as error:
            print(printable(str(error)), file=sys.stderr)
            return None

    def _one(self, run_id: str) -> Row:
        if run_id in self._finished:
            return self._finished[run_id]
        try:
            if summary := self.store.summary(run_id):
                self._finished[run_id] = {"run_id": run_id, **_outcome(summary)}
                return self._finished[run_id]
            status = self.store.status(run_id)
            if status is None:
                return _nothing(run_id)
            if status["status"] == records.RUNNING:
                status = self._running(run_id, status)
        except StoreError as error:
            return {"run_id": run_id, "status": UNREADABLE, "reason": str(error)}
        return {"run_id": run_id, **status}

    def _running(self, run_id: str, status: Row) -> Row:
        """The status of a run that says it is running, with `held`: whether somebody works on it.

        It is lost where that is known: nobody holds its lease, or a process of this machine that is gone.
        """
        owners = self.store.workers(run_id)
        if not all(owner.process_is_gone() for owner in owners):
            return {**status, "held": any(not owner.why_dead() for owner in owners)}
        status = self.store.status(run_id) or status  # it says how it ended before it lets go
        if status["status"] == records.RUNNING:
            status |= {"status": LOST, "reason": "the process that worked on it is gone"}
        return status

    def _launches(self, grid: str) -> _Launches:
        lines, alive = [], False
        for claim in self.store.launches(grid):
            dead = claim.why_dead()
            alive = alive or not dead
            again = f"{claim.who()}, {dead}: to go on, launch the same command again"
            lines.append(f"{grid}: launched by {again if dead else claim}")
            if said := self.store.launch_log(grid, claim.launch).splitlines()[-1:]:
                lines.append(f"{grid}: {printable(said[0])}")
        return _Launches(lines, alive)


@dataclass(frozen=True, slots=True)
class _Launches:
    """Who launches a grid."""

    lines: list[str]
    """What is known of it, for people."""
    alive: bool
    """One of them is at work."""


def standing(store: RunStore, grid: str | None = None) -> list[Row]:
    """One dict a run; see `Survey.look`."""
    return Survey(store, grid).look().rows


def _nothing(run_id: str) -> Row:
    return {"run_id": run_id, "status": records.PENDING}


def _outcome(summary: dict[str, Any]) -> Row:
    return {
        **{key: summary[key] for key in ("status", "device_seconds", "train_seconds") if key in summary},
        **{key: summary[key] for key in ("started", "finished") if key in summary},
        "step": summary["steps"],
        "steps": summary["horizon"],
        "attempt": summary.get("attempts", 1),
        "val_loss": summary["final_val_loss"],
        "reason": summary.get("reason", ""),
        **({"updated": summary["finished"]} if summary.get("finished") else {}),
    }


def _budgets(indices: dict[str, dict[str, Any]], rows: dict[str, Row]) -> Iterator[str]:
    for grid, index in indices.items():
        if limit := index.get("budget"):
            run_ids = {cell["run_id"] for cell in index["cells"]}
            spent = sum(device_seconds(rows[run_id], limit["devices"]) for run_id in run_ids) / 3600
            left = max(0.0, limit["hours"] - spent)
            of = printable(of_budget(limit["hours"], spent, limit["unit"]))
            yield f"{grid}: {of} spent, {left:.3g} left"


# --- what is printed -----------------------------------------------------------------------------


def _show(view: View) -> int:
    # Run ids and reasons come from files: no markup in them.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    with console.capture() as table:  # rich would answer a closed pipe in its own way
        console.print(_table(view.rows))
    print(table.get(), end="")
    for line in (view.counts(), *view.notes, *_evidence(view.rows)):
        print(line)
    return view.exit_status()


def _evidence(rows: list[Row]) -> Iterator[str]:
    """What is known of runs that failed: every try, then the end of the last one's log."""
    for row in rows:
        if row["status"] not in TROUBLE:
            continue
        for failure in row.get("failures", []):
            host = f" on {failure['host']}" if failure.get("host") else ""
            what = f"{failure.get('kind', 'failure')} at step {failure.get('step', 0)}{host}"
            tried = f"try {failure.get('attempt', '?')}: {what}: {failure.get('reason', '')}"
            yield f"  {row['run_id']} | {printable(tried)}"
        for line in row.get("log_tail", [])[-LAST_LINES:]:
            yield f"  {row['run_id']} | {printable(line)}"


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name, justify in (("run", "left"), ("status", "left"), ("step", "right"), ("val loss", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("tokens/s", "try", "news"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for row in rows:
        status, val, rate = row["status"], row.get("val_loss"), row.get("tokens_per_s")
        table.add_row(
            row["run_id"],
            printable(status),
            _step(row),
            "–" if val is None else f"{val:.4f}",
            "–" if rate is None or status != records.RUNNING else f"{rate:,.0f}",
            str(row.get("attempt") or "–"),
            f"{duration(time.time() - row['updated'])} ago" if row.get("updated") else "–",
            _reason(row),
            style=COLOURS.get(status, "dim"),
        )
    return table


def _step(row: Row) -> str:
    return f"{row.get('step', 0)}/{row['steps']}" if "steps" in row else "–"


def _reason(row: Row) -> str:
    now = time.time()
    age, idle = now - (row.get("updated") or now), now - (row.get("progressed") or now)
    reason = printable(row.get("reason") or "")
    if row["status"] == records.RUNNING and age > SILENT_S:
        return f"silent: no news for {duration(age)}; {reason}".rstrip("; ")
    if row["status"] == records.RUNNING and idle > STALLED_S:
        return f"stalled: no step for {duration(idle)}; {reason}".rstrip("; ")
    return reason


# --- looking again and again ---------------------------------------------------------------------


def _watch(survey: Survey, seconds: float) -> int:
    """Look until nothing runs any more; exit status as of one look. Ctrl-C: 0."""
    with suppress(KeyboardInterrupt):
        view = _watch_table(survey, seconds) if sys.stdout.isatty() else _watch_lines(survey, seconds)
        if not view.over():
            print("nothing runs and nobody launches: not watching any more")
        return view.exit_status()
    return 0


def _watch_table(survey: Survey, seconds: float) -> View:
    with Live(console=Console(highlight=False, markup=False), auto_refresh=False) as live:
        for view, trouble in _views(survey, seconds):
            above = [view.counts(), *view.notes, *([trouble] if trouble else [])]
            live.update(Group(*map(Text, above), _table(view.rows)), refresh=True)
    for line in _evidence(view.rows):
        print(line)
    return view


def _watch_lines(survey: Survey, seconds: float) -> View:
    """A line for every run at first, then for every change of status, loss or reason."""
    said: dict[str, tuple[Any, ...]] = {}
    silence = ""
    for view, trouble in _views(survey, seconds):
        if trouble != silence:
            print(trouble or "the store is back", flush=True)
            silence = trouble
        for row in view.rows:
            now = (row["status"], row.get("val_loss"), row.get("reason"), row.get("attempt"))
            if said.get(row["run_id"]) != now:
                said[row["run_id"]] = now
                val = "" if row.get("val_loss") is None else f"  val {row['val_loss']:.4f}"
                line = f"{row['run_id']}  {row['status']}  {_step(row)}{val}  {_reason(row)}"
                print(printable(line).rstrip(), flush=True)
    for line in (view.counts(), *view.notes, *_evidence(view.rows)):
        print(line)
    return view


def _views(survey: Survey, seconds: float) -> Iterator[tuple[View, str]]:
    """One view after another until nothing runs any more, and why the store could not be read just now.

    The first look may raise; afterwards the last view stands while the store is away.
    """
    view, away = survey.look(), -math.inf
    yield view, ""
    # After an outage all are silent: they get time to come back.
    while not view.over() and not (view.still() and time.monotonic() - away > SILENT_S):
        time.sleep(seconds)
        trouble = ""
        try:
            view = survey.look()
        except StoreError as error:
            trouble, away = printable(str(error)), time.monotonic()
        yield view, trouble


if __name__ == "__main__":
    from mmsweep.__main__ import quietly

    sys.exit(quietly(main))
