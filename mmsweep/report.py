"""`python -m mmsweep.report STORE`: the tables and figures of a sweep, finished or not."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmsweep.store import DirectoryStore, RunStore, StoreError, open_store
from trainers.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from analysis.tables import Text


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report, print T1 and the page's path. Exit status 2 on bad input."""
    arguments = _parser().parse_args(argv)
    try:
        page = _report(arguments.store, arguments.grid, arguments.out)
    except BrokenPipeError:
        raise  # nobody reads the output: not the folder's fault
    except OSError as error:
        print(f"mmsweep report: {error}; choose another folder with --out", file=sys.stderr)
        return 2
    except (InputError, StoreError) as error:
        print(f"mmsweep report: {error}", file=sys.stderr)
        return 2
    if arguments.open and _on_a_desktop():
        webbrowser.open(page.absolute().as_uri())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmsweep report", description="Tables and figures of a sweep.")
    parser.add_argument("store", help='folder or "s3://bucket/prefix" that holds the runs')
    parser.add_argument("--grid", help="which grid, where the store holds several")
    parser.add_argument(
        "--out", type=Path, help="folder to write to (default: STORE/report; ./report for s3)"
    )
    parser.add_argument("--open", action="store_true", help="open the page, on a machine with a desktop")
    return parser


def _on_a_desktop() -> bool:
    """Somebody is looking: a terminal, and a screen that is not at the far end of it."""
    screen = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    return sys.stdout.isatty() and screen and "SSH_CONNECTION" not in os.environ


def _report(url: str, grid: str | None, out: Path | None) -> Path:
    # The one call upward: analysis reads stores, so nothing else here may import it.
    from analysis.load import load
    from analysis.report import write_report
    from analysis.tables import t1, t1_text

    store = open_store(url)
    names = store.grids()
    if grid is None and len(names) > 1:
        raise InputError(f"{store.url}: holds several grids, choose one with --grid: {', '.join(names)}")
    frames = load(store, grid=grid)
    page = write_report(frames, out or _default_out(store))
    _print(t1_text(frames, t1(frames), compact=True))
    print(page)
    return page


def _default_out(store: RunStore) -> Path:
    objects = store.objects
    return objects.root / "report" if isinstance(objects, DirectoryStore) else Path("report")


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
