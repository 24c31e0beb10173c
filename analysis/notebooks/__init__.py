"""What the notebooks share: a store's frames with a line that says what they hold, and how tables and
figures are shown. The notebooks beside this file are pairs of `.py` and `.ipynb`; see README.md."""

from __future__ import annotations

import html
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML, Image, Markdown, display
from matplotlib.figure import Figure

from analysis import contrasts, mechanism, tables, theme, verdict
from analysis.contrasts import count
from analysis.figures import NoDataError
from analysis.load import Frames, load
from analysis.tables import Text
from analysis.typeset import as_text, to_markdown
from trainers.errors import InputError
from trainers.records import KINDS

REPOSITORY = Path(__file__).resolve().parents[2]
STEP_ROWS = 200_000
"""Rows of `steps` that a notebook loads at most: of longer sweeps every k-th, see `analysis.load`."""
MOST_ROWS = 20
"""Rows of a table that are shown; the frame has all of them."""


class StoreError(InputError):
    """A store that cannot be read, told by Jupyter in one line and not as a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def read(
    store: str,
    grid: str | None = None,
    *,
    kinds: Collection[str] = KINDS,
    step_rows: int | None = STEP_ROWS,
) -> Frames:
    """The runs of a store, of one of its grids or of all; says in a line what they are, and what is wrong.

    Args:
        store: a folder, relative to the repository's root (without one, to the working folder), or
            `s3://bucket/prefix`.
        kinds: the records wanted; see docs/export.md.

    Raises:
        StoreError: there is no such store or grid, or nothing in it can be read.
    """
    root = REPOSITORY if (REPOSITORY / "pyproject.toml").is_file() else Path.cwd()
    place = store if "://" in store or not store.strip() else str(root / store)
    try:
        frames = load(place, grid=grid, kinds=kinds, step_rows=step_rows)
    except InputError as error:
        raise StoreError(f"{error} (the store is set by MMSWEEP_STORE, the grid by MMSWEEP_GRID)") from None
    print(_held(frames))
    for note in frames.notes:
        print(f"Note: {note}")
    return frames


def _held(frames: Frames) -> str:
    """`Grid quickstart of …/results: 10 runs of 5 arms, seeds 0, 1; 8 completed, 2 running.`"""
    names = [name for name in frames.runs["grid"].unique() if name]
    whose = f"Grid{'s' if len(names) > 1 else ''} {', '.join(names)} of " if names else ""
    statuses = ", ".join(f"{len(runs)} {status}" for status, runs in verdict.standing(frames).items())
    arms = count(frames.runs["arm"].nunique(), "arm")
    seeds = ", ".join(str(seed) for seed in sorted(frames.runs["seed"].unique()))
    runs = count(frames.runs["run_id"].nunique(), "run")
    return f"{whose}{frames.store}: {runs} of {arms}, seeds {seeds}; {statuses}."


def show(what: Any, *of: Any, empty: str = "no run has what this table needs") -> None:
    """Show a table (`Text` or any frame) or a figure; where `what` is a function, what it makes `of` these.

    What these runs do not allow is said in one line: `empty` where a table has no rows.
    """
    if callable(what):
        try:
            what = what(*of)
        except (NoDataError, InputError) as error:
            return missing(str(error))
    if isinstance(what, Figure):
        return _show_figure(what)
    text: Text = as_text(what) if isinstance(what, pd.DataFrame) else what
    if not text.rows:
        return print(f"{empty[0].upper()}{empty[1:].rstrip('.')}.")
    cut = len(text.rows) - MOST_ROWS
    if cut > 0:
        notes = (*text.notes, f"{count(cut, 'more row')} not shown.")
        text = replace(text, rows=text.rows[:MOST_ROWS], notes=notes)
    display(Markdown(to_markdown(text)))  # type: ignore[no-untyped-call]
    return None


def missing(why: str) -> None:
    """One line on what cannot be said of these runs."""
    print(f"Missing: {' '.join(why.split()).rstrip('.')}.")


def _show_figure(figure: Any) -> None:
    """At half its pixels, with its caption below."""
    about = getattr(figure, "about", None)
    display(Image(theme.png(figure), retina=True))  # type: ignore[no-untyped-call]
    if about is not None:
        style = "max-width: 60em; font-size: 90%"
        display(HTML(f'<p style="{style}">{html.escape(about.caption)}</p>'))  # type: ignore[no-untyped-call]


def conclusions(frames: Frames, *topics: str) -> Text:
    """What the runs say about these topics: the sentences of `analysis.verdict`, computed from the frames."""
    table, crossed = tables.t1(frames), mechanism.crossings(frames)
    told = verdict.summary(frames, table, contrasts.swaps(frames, table), crossed)
    rows = tuple((one.topic, one.text, one.verdict) for one in told if one.topic in topics)
    return Text(("about", "what the runs say", "verdict"), rows, (True, True, True), ())
