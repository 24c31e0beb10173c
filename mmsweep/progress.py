"""What a launch shows while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Console
from rich.live import Live
from rich.table import Table

from mmsweep.agent import News
from trainers import records
from trainers.config import RunConfig
from trainers.yamlfile import printable

LINE_S = 15.0
"""Without a terminal, a running run gets a line at most this often."""
MOST_ROWS = 30

COLOURS = {
    records.RUNNING: "cyan",
    records.COMPLETED: "green",
    records.DIVERGED: "yellow",
    records.FAILED: "red",
    records.OOM: "red",
    records.QUARANTINED: "magenta",
}
TROUBLE = (records.FAILED, records.OOM, records.QUARANTINED)
"""Statuses of runs that were given up."""

LOG_BYTES = 2**20
"""Of a launch's log the end is kept."""


class Log:
    """What a launch says: printed as it comes, and kept with the time. Safe to use from several threads."""

    def __init__(self, most: int = LOG_BYTES) -> None:
        self._most = most
        self._lines: deque[str] = deque()
        self._bytes = 0
        self._lock = threading.Lock()

    def say(self, text: str, *, error: bool = False) -> None:
        print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)
        self.keep(text)

    def keep(self, text: str) -> None:
        """As `say`, for what is shown in another way."""
        line = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {printable(text)}\n"
        with self._lock:
            self._lines.append(line)
            self._bytes += len(line.encode())
            while self._bytes > self._most:
                self._bytes -= len(self._lines.popleft().encode())

    def text(self) -> str:
        """The lines, oldest first; times are UTC."""
        with self._lock:
            return "".join(self._lines)


@dataclass
class Row:
    """One run of this launch."""

    arm: str
    seed: int
    steps: int
    news: News
    begun: tuple[float, int] | None = None
    """Time and step of the first progress of this attempt."""
    printed: float = 0.0
    said: str = ""
    """The last reason that got a line."""
    given_up: bool = False
    """It is known that this run has failed for good."""

    def seconds_left(self) -> float | None:
        if self.begun is None or self.news.step <= self.begun[1]:
            return None
        pace = (time.monotonic() - self.begun[0]) / (self.news.step - self.begun[1])
        return pace * (self.steps - self.news.step)


class Board:
    """State of every run of a launch. Tune's callbacks write it, `show` displays it."""

    def __init__(
        self,
        runs: dict[str, RunConfig],
        *,
        done_before: int = 0,
        console: Console | None = None,
        log: Log | None = None,
        on_trouble: Callable[[str, News], None] = lambda *_: None,
    ) -> None:
        """`on_trouble` is called once for every run that has failed for good."""
        self.console = console or Console(highlight=False)
        self.log = log or Log()
        self.on_trouble = on_trouble
        self.live = self.console.is_terminal
        self.done_before = done_before
        self.rows = {
            run_id: Row(run.arm, run.seed, run.schedule.steps, News(records.PENDING))
            for run_id, run in runs.items()
        }

    # --- what happens -----------------------------------------------------------------------------

    def started(self, run_id: str) -> None:
        row = self.rows[run_id]
        row.news = News(records.RUNNING, steps=row.steps)
        row.begun = None

    def heard(self, run_id: str, news: News) -> None:
        row = self.rows[run_id]
        row.news = news
        if row.begun is None and news.train_loss is not None:
            row.begun = (time.monotonic(), news.step)
        self._line_when_due(run_id, row)
        if news.done and not news.retry:
            self._check_trouble(run_id, row)

    def retrying(self, run_id: str) -> None:
        self._line(f"{run_id}  failed, trying again: {self.rows[run_id].news.reason}")

    def failed(self, run_id: str) -> None:
        """Tune does not try this run again."""
        row = self.rows[run_id]
        if row.news.status in (records.PENDING, records.RUNNING):  # it died without a last word
            row.news = News(records.FAILED, step=row.news.step, reason="the trial's process died", done=True)
        self._check_trouble(run_id, row)

    def _check_trouble(self, run_id: str, row: Row) -> None:
        if row.news.status in TROUBLE and not row.given_up:
            row.given_up = True
            self.on_trouble(run_id, row.news)

    def put_back(self, run_id: str, reason: str) -> None:
        """This launch does not begin the run."""
        self.rows[run_id].news = News(records.PENDING, steps=self.rows[run_id].steps, reason=reason)

    # --- what is seen -----------------------------------------------------------------------------

    @contextmanager
    def show(self) -> Iterator[None]:
        if not self.live:
            yield
            return
        with Live(console=self.console, get_renderable=self.table, refresh_per_second=2):
            yield

    def counts(self) -> str:
        states = [row.news.status for row in self.rows.values()]
        finished = self.done_before + sum(s in records.FINISHED for s in states)
        text = f"{finished}/{self.done_before + len(states)} done"
        if running := states.count(records.RUNNING):
            text += f", {running} running"
        for what in TROUBLE:
            if count := states.count(what):
                text += f", {count} {what}"
        return text

    def table(self) -> Table:
        table = Table(title=self.counts(), title_justify="left", box=None, pad_edge=False)
        for name, justify in (("arm", "left"), ("seed", "right"), ("step", "right"), ("loss", "right")):
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for name in ("val", "tokens/s", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("status", no_wrap=True, overflow="ellipsis")
        rows = self._most_interesting()
        for row in rows:
            news = row.news
            status = f"[{COLOURS.get(news.status, 'dim')}]{_escape(news.status)}[/]"
            if news.reason:
                status += f" [dim]{_escape(news.reason)}[/]"
            table.add_row(
                _escape(row.arm), str(row.seed), f"{news.step}/{row.steps}", _loss(news.train_loss),
                _loss(news.val_loss), _rate(news.tokens_per_s), _left(row), status,
            )  # fmt: skip
        if hidden := len(self.rows) - len(rows):
            table.caption = f"and {hidden} more"
        return table

    def _most_interesting(self) -> list[Row]:
        """All rows in order, or where they are too many: what runs, then what failed, then the rest."""
        rows = list(self.rows.values())
        room = min(MOST_ROWS, max(5, self.console.height - 4))
        if len(rows) <= room:
            return rows
        order = {records.RUNNING: 0, **dict.fromkeys(TROUBLE, 1), records.PENDING: 2}
        return sorted(rows, key=lambda row: order.get(row.news.status, 3))[:room]

    def _line_when_due(self, run_id: str, row: Row) -> None:
        news = row.news
        if news.done:
            what = f"{news.status}" + (f": {news.reason}" if news.reason else "")
            self._line(f"{run_id}  {what}  step {news.step}/{row.steps}  val {_loss(news.val_loss)}")
        elif news.reason != row.said and news.status not in TROUBLE:  # its end follows
            row.said = news.reason
            self._line(f"{run_id}  {news.reason or 'goes on'}")
        elif news.train_loss is not None and time.monotonic() - row.printed > LINE_S:
            row.printed = time.monotonic()
            self._line(
                f"{run_id}  step {news.step}/{row.steps}  loss {_loss(news.train_loss)}  "
                f"val {_loss(news.val_loss)}  {_rate(news.tokens_per_s)} tokens/s  {_left(row)} left"
            )

    def _line(self, text: str) -> None:
        """Said where there is no table, and kept in either case."""
        line = f"[{self.counts()}] {text}"
        if self.live:
            self.log.keep(line)
        else:
            self.log.say(line)


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if math.isfinite(value) else str(value)


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _left(row: Row) -> str:
    if row.news.done:
        return ""
    seconds = row.seconds_left()
    return "–" if seconds is None else duration(seconds)


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:00`."""
    minutes, rest = divmod(round(min(max(seconds, 0), 10**9)), 60)  # clocks differ
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _escape(text: str) -> str:
    """Text as it is: neither markup nor control characters count."""
    return printable(text).replace("[", "\\[")
