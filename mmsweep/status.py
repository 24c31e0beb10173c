"""`python -m mmsweep.status STORE`: where every run stands, from the store alone."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.table import Table

from mmsweep.progress import COLOURS, duration
from mmsweep.store import DamagedError, NotFound, RunStore, StoreError, open_store
from trainers import records
from trainers.errors import InputError, did_you_mean

SILENT_S = 60.0
"""A running run that has not written its status for so long is called silent."""
STALLED_S = 300.0
"""A running run that has written no record for so long is called stalled."""
FINE = (records.PENDING, records.RUNNING, *records.FINISHED)
UNREADABLE = "unreadable"
_THREADS = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Exit status 0: nothing failed; 1: some runs failed; 2: bad input."""
    parser = argparse.ArgumentParser(prog="mmsweep status", description="Where every run of a store stands.")
    parser.add_argument("store", help='folder or "s3://bucket/prefix"')
    parser.add_argument("--grid", help="only the runs of this grid")
    arguments = parser.parse_args(argv)
    try:
        store = open_store(arguments.store)
        rows = standing(store, arguments.grid)
        launches = _launches(store, [arguments.grid] if arguments.grid else store.grids())
    except (InputError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    # Run ids and reasons come from files: no markup in them.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    with console.capture() as table:  # rich would answer a closed pipe in its own way
        console.print(_table(rows))
    print(table.get(), end="")
    states = [row["status"] for row in rows]
    known = [*records.STATUSES, UNREADABLE]
    others = sorted(set(states) - set(known))
    print(", ".join(f"{states.count(s)} {s}" for s in [*known, *others] if s in states))
    for line in launches:
        print(line)
    for row in rows:
        for line in row.get("log_tail", []):
            print(f"  {row['run_id']} | {line}")
    return 0 if all(state in FINE for state in states) else 1


def standing(store: RunStore, grid: str | None = None) -> list[dict[str, Any]]:
    """One dict a run: its status.json, under its summary where there is one; `pending` where nothing is.

    Raises:
        InputError: no such grid, or a store with neither grids nor runs.
        StoreError: the store cannot be read.
    """
    grids = store.grids()
    if grid is not None and grid not in grids:
        raise InputError(f'{store.url} has no grid "{grid}"{did_you_mean(grid, grids)}')
    planned = [cell["run_id"] for name in ([grid] if grid else grids) for cell in _cells(store, name)]
    run_ids = list(dict.fromkeys(planned if grid else [*planned, *store.run_ids()]))
    if not run_ids:
        raise InputError(f"{store.url} holds no grid and no run; is this the store of a launch?")
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda run_id: _one(store, run_id), run_ids))


def _launches(store: RunStore, grids: list[str]) -> list[str]:
    """A line for every grid that is being launched. Raises `StoreError`."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = zip(grids, pool.map(store.launches, grids), strict=True)
    return [
        f"{grid}: launched by {claim}" + "; its process is gone" * claim.process_is_gone()
        for grid, owners in found
        for claim in owners
    ]


def _cells(store: RunStore, grid: str) -> list[dict[str, Any]]:
    try:
        return list(store.grid_index(grid)["cells"])
    except NotFound:  # the YAML is there, the index not yet
        return []
    except DamagedError as error:
        print(error, file=sys.stderr)
        return []


def _one(store: RunStore, run_id: str) -> dict[str, Any]:
    try:
        status = store.status(run_id) or {"status": records.PENDING}
        summary = store.summary(run_id)
    except StoreError as error:
        return {"run_id": run_id, "status": UNREADABLE, "reason": str(error)}
    if summary:
        status |= {"status": summary["status"], "step": summary["steps"], "steps": summary["horizon"]}
        status |= {"val_loss": summary["final_val_loss"], "reason": summary.get("reason", "")}
    return {"run_id": run_id, **status}


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name, justify in (("run", "left"), ("status", "left"), ("step", "right"), ("val loss", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("tokens/s", justify="right", no_wrap=True)
    table.add_column("news", justify="right", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for row in rows:
        now = time.time()
        status, age = row["status"], now - (row.get("updated") or now)
        idle = now - (row.get("progressed") or now)
        reason = row.get("reason") or ""
        if status == records.RUNNING and age > SILENT_S:
            reason = f"silent: no news for {duration(age)}; {reason}".rstrip("; ")
        elif status == records.RUNNING and idle > STALLED_S:
            reason = f"stalled: no step for {duration(idle)}; {reason}".rstrip("; ")
        val, rate = row.get("val_loss"), row.get("tokens_per_s")
        table.add_row(
            row["run_id"],
            status,
            f"{row.get('step', 0)}/{row['steps']}" if "steps" in row else "–",
            "–" if val is None else f"{val:.4f}",
            "–" if rate is None or status != records.RUNNING else f"{rate:,.0f}",
            f"{duration(age)} ago" if "updated" in row else "–",
            reason,
            style=COLOURS.get(status, "dim"),
        )
    return table


if __name__ == "__main__":
    from mmsweep.__main__ import quietly

    sys.exit(quietly(main))
