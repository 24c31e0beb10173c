"""`python -m mmsweep.report STORE`: tables and figures of a sweep, finished or not, and kept fresh."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
import time
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmsweep.contents import FACTS, PARTS, TABLES, kind_in_run
from mmsweep.objects import Entry
from mmsweep.store import DirectoryStore, RunStore, StoreError, open_store
from trainers.errors import InputError
from trainers.records import FINISHED, PENDING, RUNNING

if TYPE_CHECKING:
    from rich.table import Table

    from analysis.load import Frames
    from analysis.tables import Text

WATCH_S = 10.0
"""Pause between two looks of `--watch`."""
STEP_ROWS = 2_000_000
"""Rows of `steps` that are loaded whole: 40 runs of 50,000 steps. Longer sweeps are thinned."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report, print T1 and the page's path. Exit status 2 on bad input."""
    arguments = _parser().parse_args(argv)
    try:
        wanted = _wanted(arguments)
        page = wanted.write()
        if arguments.open and _on_a_desktop():
            webbrowser.open(page.absolute().as_uri())
        if arguments.watch is not None:
            _watch(wanted, arguments.watch)
    except BrokenPipeError:
        raise  # nobody reads the output: not the folder's fault
    except OSError as error:
        print(f"mmsweep report: {error}; choose another folder with --out", file=sys.stderr)
        return 2
    except (InputError, StoreError) as error:
        print(f"mmsweep report: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmsweep report", description="Tables and figures of a sweep.")
    parser.add_argument("store", help='folder or "s3://bucket/prefix" that holds the runs')
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--grid",
        nargs="+",
        action="extend",
        metavar="GRID",
        help="which grids, where the store holds several",
    )
    which.add_argument(
        "--compare", nargs=2, metavar="GRID", help="two grids side by side, and how they differ"
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write to (default: STORE/report; ./report for s3)"
    )
    parser.add_argument(
        "--into-store", action="store_true", help="keep it in the store too, below report/, as launches do"
    )
    parser.add_argument("--open", action="store_true", help="open the page, on a machine with a desktop")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=WATCH_S, metavar="SECONDS",
        help=f"look every so many seconds (default: {WATCH_S:g}) and write the report again when runs have "
        "moved on, until all have ended",
    )  # fmt: skip
    return parser


def _on_a_desktop() -> bool:
    """Somebody is looking: a terminal, and a screen that is not at the far end of it."""
    screen = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    return sys.stdout.isatty() and screen and "SSH_CONNECTION" not in os.environ


@dataclass
class Report:
    """A page, and what it was made from."""

    store: RunStore
    grids: list[str] | None
    """None is the whole store, which has at most one."""
    out: Path
    compared: bool
    into_store: str = ""
    """Key of the folder in the store that gets the files too; empty where none does, or `out` is that."""
    refresh: int | None = None
    """Seconds after which the page loads itself again; None where nobody writes it again."""
    frames: list[Frames] = field(default_factory=list)
    seen: frozenset[Entry] = frozenset()
    """What the page was made from."""

    def write(self) -> Path:
        """Write the page, and print T1 and its path; where it is watched, a line."""
        from analysis.tables import t1, t1_text

        found = self._listed() if self.refresh else []
        page = self._write()
        self.seen = self._ours(found)
        if self.refresh is None:
            for frames in self.frames:
                if len(self.frames) > 1:
                    print(frames.grid)
                _print(t1_text(frames, t1(frames), compact=True))
            print(page)
            if self.into_store:
                print(f"{self.store.url}/{self.into_store}/{page.name}")
        else:
            print(self._line(page), flush=True)
        return page

    def _write(self) -> Path:
        # The one call upward: analysis reads stores, so nothing else here may import it.
        from analysis.load import load
        from analysis.report import write_report

        grids = [None] if self.grids is None else self.grids
        self.frames = [load(self.store, grid=grid, step_rows=STEP_ROWS) for grid in grids]
        if not self.into_store:
            return write_report(self.frames, self.out, compared=self.compared, refresh=self.refresh)
        with tempfile.TemporaryDirectory(prefix="mmsweep-report-") as folder:  # of other reports no file
            fresh = Path(folder)
            page = write_report(self.frames, fresh, compared=self.compared, refresh=self.refresh)
            shutil.copytree(fresh, self.out, dirs_exist_ok=True)
            for path in sorted(fresh.rglob("*"), key=lambda path: path == page):  # the page comes last
                if path.is_file():
                    key = f"{self.into_store}/{path.relative_to(fresh).as_posix()}"
                    self.store.objects.put_file(key, path)
        return self.out / page.name

    def _statuses(self) -> list[str]:
        by_run = {
            str(run): str(status)
            for frames in self.frames
            for run, status in zip(frames.runs["run_id"], frames.runs["status"], strict=True)
        }
        return list(by_run.values())

    def has_ended(self) -> bool:
        return not {PENDING, RUNNING} & set(self._statuses())

    def _line(self, page: Path) -> str:
        states = self._statuses()
        done = sum(state in FINISHED for state in states)
        rest = [f"{states.count(s)} {s}" for s in sorted(set(states)) if s not in FINISHED]
        told = ", ".join([f"{done} of {len(states)} runs finished", *rest])
        return f"{time.strftime('%H:%M:%S')}  {told}  {page}"

    def has_changed(self) -> bool:
        """Whether the page is out of date, by one listing of the store."""
        return self._ours(self._listed()) != self.seen

    def _listed(self) -> list[Entry]:
        return list(self.store.objects.entries(""))

    def _ours(self, entries: Sequence[Entry]) -> frozenset[Entry]:
        """The grids, and what the shown runs have said and recorded; no checkpoints, no heartbeats."""
        shown = {str(run) for frames in self.frames for run in frames.runs["run_id"]}
        grids = {f"grids/{frames.grid}.json" for frames in self.frames}

        def is_ours(key: str) -> bool:
            top, _, rest = key.partition("/")
            run_id, _, name = rest.partition("/")
            of_a_run = top == "runs" and run_id in shown and kind_in_run(name) in (FACTS, PARTS, TABLES)
            return of_a_run or key in grids

        return frozenset(entry for entry in entries if is_ours(entry.key))


def _wanted(arguments: argparse.Namespace) -> Report:
    """
    Raises:
        InputError: the arguments do not say which grids, or ask for what cannot be.
        StoreError: the store cannot be read.
    """
    store = open_store(arguments.store)
    seconds = arguments.watch
    if seconds is not None and not 0.1 <= seconds <= 86_400:
        raise InputError(f"--watch {seconds:g}: give seconds from 0.1 to 86400")
    compared: list[str] | None = arguments.compare
    if compared and compared[0] == compared[1]:
        raise InputError(f"--compare {compared[0]} {compared[1]}: name two different grids")
    grids = compared or list(dict.fromkeys(arguments.grid or [])) or None
    names = store.grids()
    if grids is None and len(names) > 1:
        raise InputError(f"{store.url}: holds several grids, choose with --grid: {', '.join(names)}")
    refresh = None if seconds is None else max(2, math.ceil(seconds))
    place = "/".join(["report", *(["-vs-".join(compared)] if compared else [])])
    out = arguments.out or _default_out(store, place)
    into_store = place if arguments.into_store and str(out) != f"{store.url}/{place}" else ""
    return Report(store, grids, out, bool(compared), into_store, refresh)


def _watch(report: Report, seconds: float) -> None:
    """Write again whenever something has changed, until every run has ended or Ctrl-C.

    A store that cannot be read for a while is told once, and asked again.
    """
    trouble = ""
    with suppress(KeyboardInterrupt):
        while not report.has_ended():
            time.sleep(seconds)
            try:
                if report.has_changed():
                    report.write()
                trouble = ""
            except (InputError, StoreError) as error:
                if str(error) != trouble:
                    trouble = str(error)
                    print(f"mmsweep report: {trouble}", file=sys.stderr, flush=True)


def _default_out(store: RunStore, place: str) -> Path:
    return store.objects.root / place if isinstance(store.objects, DirectoryStore) else Path(place)


def _print(text: Text) -> None:
    if sys.stdout.isatty() and _print_rich(text):
        return
    widths = [max(len(row[i]) for row in (text.columns, *text.rows)) for i in range(len(text.columns))]
    for row in (text.columns, *text.rows):
        cells = zip(row, widths, text.words, strict=True)
        print("  ".join(c.ljust(w) if word else c.rjust(w) for c, w, word in cells).rstrip())
    print(*text.notes, sep="\n")


def _print_rich(text: Text) -> bool:
    """Print for a terminal: whole, else without the intervals; False where neither fits its width."""
    from rich.console import Console
    from rich.text import Text as Plain  # never markup: names come from people

    console = Console()
    for wide, notes in ((True, text.notes), (False, ("Intervals and notes are in the report.",))):
        table, width = _rich_table(text, wide=wide)
        if width <= console.width:
            console.print(table)
            for note in notes:
                console.print(Plain(note, style="dim"))
            return True
    return False


def _rich_table(text: Text, *, wide: bool) -> tuple[Table, int]:
    """The table and its width in characters."""
    from rich.table import Table
    from rich.text import Text as Plain

    shown = [i for i, name in enumerate(text.columns) if wide or name not in ("attention", "MLP", "rank")]
    rows = [[_cell(row[i], wide=wide) for i in shown] for row in text.rows]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 0, 0, 1))
    total = len(shown) - 1
    for place, i in enumerate(shown):
        lines = [line for row in rows for line in row[place].split("\n")]
        width = max(len(part) for part in (*text.columns[i].split(), *lines))
        justify: Literal["left", "right"] = "left" if text.words[i] else "right"
        table.add_column(Plain(text.columns[i]), justify=justify, width=width, vertical="top")
        total += width
    for row in rows:
        table.add_row(*(Plain(cell) for cell in row))
    return table, total


def _cell(cell: str, *, wide: bool) -> str:
    """A value over its interval, or the value alone."""
    value, bracket, bounds = cell.partition(" [")
    if not bracket:
        return cell
    return f"{value}\n[{bounds}" if wide else value + "*" * cell.endswith("*")


if __name__ == "__main__":
    from mmsweep.__main__ import quietly

    sys.exit(quietly(main))
