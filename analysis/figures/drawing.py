"""What the figures share: groups of runs, their curves, axes, and the words about them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from analysis.load import Frames
from analysis.tables import three_digits
from analysis.theme import AFTER_BAD, INK, MUTED, VARIANTS, About, Style, arm_styles, direct_labels
from trainers.records import COMPLETED, DIVERGED, FINISHED, PENDING, RUNNING

MOST_POINTS = 600
"""Of a drawn curve; of longer ones the lowest and the highest point of each stretch are kept."""
LEGEND = 6
"""Arms in a row of a legend."""
WIDTH = 10.8
"""Inches, of figures that choose no width of their own: the report shows all at the width of its page."""

LOG_FROM = 8.0
"""A panel turns to a log scale when its values span more than this factor."""

TRAINING = "training"
LOST = "lost"


class NoDataError(Exception):
    """There is nothing to draw; the message says in one line what is missing."""


@dataclass(frozen=True)
class Group:
    """The seeds of one arm (and axis cell): one column of `values` per run, indexed by step."""

    label: str
    style: Style
    runs: pd.DataFrame
    values: pd.DataFrame

    @property
    def median(self) -> pd.Series[float]:
        """Over the seeds that have a value at a step. One that diverged counts as +inf after its end, one
        that the machine lost counts up to its end.

        Once a run has completed, those that still train count as far as they have come. Before, the median
        goes no further than all of these have come: beyond, diverged runs would outweigh those under way.
        """
        counted = self.values.copy()
        for run in self._in(DIVERGED):
            last = counted[run].last_valid_index()
            counted.loc[counted.index > (-1 if last is None else last), run] = math.inf
        goes_on = counted.bfill().notna()
        if not self._in(COMPLETED):
            goes_on[self._in(TRAINING)] = True
        return counted[(counted.notna() | ~goes_on).all(axis=1)].median(axis=1).dropna()

    @property
    def result(self) -> pd.Series[float]:
        """The median of the finished runs alone. That of all, where none has finished, and while none has
        completed and some still train."""
        finished = self._in(COMPLETED, DIVERGED)
        if not finished or (self._in(TRAINING) and not self._in(COMPLETED)):
            return self.median
        return replace(self, values=self.values[finished]).median

    @property
    def diverged(self) -> bool:
        """The result ends at +inf."""
        return len(self.result) > 0 and math.isinf(self.result.iloc[-1])

    @property
    def end(self) -> float:
        """Last finite value of the result, else of any run."""
        for frame in (self.result.to_frame(), self.values):
            finite = finite_values([frame])
            if len(finite):
                return float(finite[-1])
        return math.nan

    @property
    def first_bad(self) -> dict[str, int | None]:
        """By run; None where it is stable."""
        steps = dict(zip(self.runs["run_id"], self.runs["first_bad"].tolist(), strict=True))
        return {str(run): None if pd.isna(steps[run]) else int(steps[run]) for run in self.values}

    @property
    def turned(self) -> int | None:
        """Step by which half of the runs, of those that the machine has not lost, had a bad evaluation."""
        bad = self.first_bad
        counted = [bad[run] for run in self._in(COMPLETED, DIVERGED, TRAINING)]
        steps = sorted(step for step in counted if step is not None)
        half = math.ceil(len(counted) / 2)
        return steps[half - 1] if 0 < half <= len(steps) else None

    @property
    def unstable(self) -> int:
        return int(self.runs["unstable"].fillna(False).sum())

    def _in(self, *states: str) -> list[str]:
        """Ids of the runs in these states (`state_of`), of those with a column."""
        own = self.runs[["run_id", "status", "final_val_loss"]].itertuples(index=False)
        return [run for run, *facts in own if run in self.values and state_of(*facts) in states]


def state_of(status: str, final: float) -> str:
    """COMPLETED, or DIVERGED where a finished run has no finite final loss, as in T1; TRAINING, which is to
    say that it may still finish; or LOST by the machine."""
    if status in FINISHED:
        return DIVERGED if final == math.inf else COMPLETED
    return TRAINING if status in (PENDING, RUNNING) else LOST


def groups_of(frames: Frames, long: pd.DataFrame, column: str) -> list[Group]:
    styles = arm_styles(frames.arms)
    groups = []
    variants: dict[str, int] = {}
    wide = long.pivot_table(index="step", columns="run_id", values=column, aggfunc="max", dropna=False)
    for label, runs in frames.runs.groupby("label", sort=False):
        arm = str(runs["arm"].iloc[0])
        variant = variants.setdefault(arm, 0)
        variants[arm] += 1
        values = wide[[r for r in runs["run_id"] if r in wide]]
        values = values[np.isfinite(values.to_numpy(dtype=float)).any(axis=1)]
        if not values.empty:
            base = styles[arm]
            dashes = VARIANTS[variant % len(VARIANTS)] if variant else base.line
            groups.append(Group(str(label), replace(base, line=dashes), runs, values))
    return groups


def canvas(groups: Sequence[Group], rows: int = 1) -> tuple[Figure, *tuple[Any, ...]]:
    """Rows of two panels, each with a strip at its right for the names of its lines."""
    names = {named(group) for group in groups}
    strip = 0.72 + 0.076 * max([len(name) for name in names], default=8)  # inches; a number may follow
    before, panel, top, bottom = 0.72, 3.3, 0.36, 0.52
    width = 2 * (before + panel + strip)
    height = rows * max(4.1, top + bottom + 0.172 * len(names))
    figure = Figure(figsize=(width, height))
    size = (panel / width, 1 / rows - (top + bottom) / height)
    at = [(x + before / width, y / rows + bottom / height) for y in reversed(range(rows)) for x in (0, 0.5)]
    return figure, *[figure.add_axes((*corner, *size)) for corner in at]


def shared_limits(groups: Sequence[Group]) -> tuple[float, float, bool]:
    """Limits that panels share, so that they can be compared, and whether they are for a log scale."""
    values = finite_values([group.values for group in groups])
    values = values[values > 0]
    if not len(values):
        return 0.0, 1.0, False
    low, high = float(values.min()), float(values.max())
    if high > LOG_FROM * low:
        pad = (high / low) ** 0.05
        return low / pad, high * pad, True
    return 0.0, 1.08 * high, False


def trends(ax: Any, groups: Sequence[Group], frames: Frames, limits: tuple[float, float, bool]) -> None:
    """Each run, and the median over seeds."""
    low, high, logarithmic = limits
    if logarithmic:
        ax.set_yscale("log")
        plain_decades(ax.yaxis, low, high)
    ax.set_ylim(low, high)
    for group in groups:
        for run_id in group.values:
            line(ax, group.values[run_id].dropna(), group.style, None, width=0.8, alpha=0.55)
        line(ax, group.median, group.style, None, width=1.9)
    to_horizon(ax, frames)
    direct_labels(ax, [(g.end, f"{named(g)} {three_digits(g.end)}", g.style.colour) for g in groups])


def plain_decades(axis: Any, low: float, high: float) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    axis.set_major_formatter(lambda x, _: f"{x:,g}" if x < 1e6 else f"{x:.0e}")
    axis.set_minor_formatter(NullFormatter())


def line(
    ax: Any, series: pd.Series[float], style: Style, bad: int | None, *, marker: bool = False, **look: Any
) -> None:
    """One curve, dashed from its first bad evaluation on; values that are not finite leave a gap."""
    width = look.pop("width")
    series = thinned(series.where(np.isfinite(series.to_numpy(dtype=float))))
    options = {
        "color": style.colour,
        "lw": width,
        "marker": style.marker if marker else None,
        "ms": 4,
        **look,
    }
    good = series if bad is None else series[series.index <= bad]
    ax.plot(good.index.to_numpy(), good.to_numpy(), ls=style.line, **options)
    if bad is not None and len(series):
        after = series[series.index >= (good.index[-1] if len(good) else 0)]
        ax.plot(after.index.to_numpy(), after.to_numpy(), ls=AFTER_BAD, **options)


def thinned(series: pd.Series[float]) -> pd.Series[float]:
    """The series itself, or of a long one the lowest and highest value of each stretch, first and last."""
    if len(series) <= MOST_POINTS:
        return series
    values = series.to_numpy(dtype=float)
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), MOST_POINTS // 2):
        known = part[~np.isnan(values[part])]
        kept |= (
            {int(known[values[known].argmin()]), int(known[values[known].argmax()])}
            if len(known)
            else {int(part[0])}
        )
    return series.iloc[sorted(kept)]


def cross(ax: Any, series: pd.Series[float], bad: int | None, top: float, colour: str) -> None:
    """× at the first bad evaluation; at the frame's edge where its loss is beyond it or not finite."""
    if bad is None:
        return
    at = series[series.index <= bad]
    at = at[np.isfinite(at.to_numpy(dtype=float))]
    exact = len(at) > 0 and at.index[-1] == bad
    y = min(float(at.iloc[-1]), top) if exact else top
    ax.plot([bad], [y], marker="x", ms=7, mew=2, color=colour, clip_on=False, zorder=5)


def finite_values(frames: Sequence[pd.DataFrame]) -> np.ndarray[Any, np.dtype[np.float64]]:
    values = np.concatenate([frame.to_numpy(dtype=float).ravel() for frame in frames] or [np.empty(0)])
    finite: np.ndarray[Any, np.dtype[np.float64]] = values[np.isfinite(values)]
    return finite


def to_horizon(ax: Any, frames: Frames) -> None:
    horizon = frames.runs["horizon"].max()
    ax.set_xlim(0, None if pd.isna(horizon) else int(horizon))
    step_axis(ax)


def step_axis(ax: Any) -> None:
    ax.set_xlabel("optimizer step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.xaxis.set_major_formatter("{x:,.0f}")


def named(group: Group) -> str:
    return short_name(group.label)


def short_name(label: str) -> str:
    """`arm · lr=0.5 · decay=0` as `arm (0.5, 0)`: the caption names the axes once."""
    arm, *rest = label.split(" · ")
    values = ", ".join(part.partition("=")[2] or part for part in rest)
    name = f"{arm} ({values})" if values else arm
    return name if len(name) <= 34 else name[:33] + "…"


def sample(frames: Frames, groups: Sequence[Group]) -> str:
    """`n = 10 runs (2 of each of 5; seeds 0, 1) of grid "quickstart"`."""
    return counted(frames, {g.label: [str(run) for run in g.values] for g in groups})


def counted(frames: Frames, by_label: dict[str, list[str]]) -> str:
    """The same, for the ids of runs by label."""
    ids = {run for runs in by_label.values() for run in runs}
    sizes = sorted({len(runs) for runs in by_label.values()})
    if len(sizes) > 1 and len(by_label) <= 8:
        each = ", ".join(f"{label} {len(runs)}" for label, runs in by_label.items())
    else:
        each = " to ".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
        each += f" of each of {len(by_label)}"
    seeds = sorted(frames.runs.loc[frames.runs["run_id"].isin(ids), "seed"].unique().tolist())
    listed = ", ".join(str(seed) for seed in seeds[:8]) + (", …" if len(seeds) > 8 else "")
    whose = f' of grid "{frames.grid}"' if frames.grid else ""
    axes = f", labelled by arm ({', '.join(frames.axes)})" if frames.axes else ""
    return f"n = {len(ids)} run{'s' if len(ids) > 1 else ''} ({each}; seeds {listed}){whose}{axes}"


def labelled(frames: Frames, run_ids: Iterable[str]) -> dict[str, list[str]]:
    """The ids of these runs by label, in the order of the grid."""
    wanted = set(run_ids)
    runs = frames.runs[frames.runs["run_id"].isin(wanted)]
    return {str(label): own["run_id"].tolist() for label, own in runs.groupby("label", sort=False)}


def described(figure: Figure, title: str, caption: str, run_ids: Iterable[str]) -> Figure:
    """The figure, knowing what it shows and the runs it was made from (`figure.about`)."""
    figure.about = About(title, caption, tuple(dict.fromkeys(run_ids)))  # type: ignore[attr-defined]
    return figure


def ids_of(groups: Iterable[Group]) -> list[str]:
    return [str(run) for group in groups for run in group.values]


def axis_called(frames: Frames, *names: str) -> str | None:
    """The first axis of the grid whose last part is one of `names`."""
    return next((path for path in frames.axes if path.rpartition(".")[2] in names), None)


def without(frames: Frames, label: str, *paths: str | None) -> str:
    """A label without its values of these axes: what runs that differ in nothing else have in common."""
    runs = frames.runs[frames.runs["label"] == label]
    others = [p for p in frames.axes if p not in paths]
    cell = [f"{p.rpartition('.')[2]}={plain(runs[p].iloc[0])}" for p in others]
    return " · ".join([str(runs["arm"].iloc[0]), *cell])


def plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def rows_canvas(names: Sequence[str], *, after: float = 3.0, row: float = 0.26) -> tuple[Figure, Any]:
    """One panel with a row per name: names at its left, `after` inches of text (`beside`) at its right."""
    most = int((WIDTH - after - 2.35) / 0.078)  # two inches are the panel's
    names = [name if len(name) <= most else name[: most - 1] + "…" for name in names]
    before = 0.35 + 0.078 * max([len(name) for name in names], default=8)
    top, bottom = 0.42, 0.55
    height = top + bottom + max(row * len(names), 1.0)
    figure = Figure(figsize=(WIDTH, height))
    size = ((WIDTH - before - after) / WIDTH, 1 - (top + bottom) / height)
    ax = figure.add_axes((before / WIDTH, bottom / height, *size))
    ax.set_ylim(0.6 - len(names), 0.6)
    ax.set_yticks([-i for i in range(len(names))], names)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    return figure, ax


def beside(ax: Any, row: float, text: str, *, bold: bool = False, at: float = 1.02) -> None:
    """Text at the right of a panel, in line with a row."""
    ax.text(
        at, row, text, transform=ax.get_yaxis_transform(), va="center", fontsize="small",
        fontweight="bold" if bold else "normal",
    )  # fmt: skip


def colour_bar(ax: Any, mappable: ScalarMappable, words: str) -> None:
    """As separate cells: a smooth bar would be a bitmap, which the report may not show."""
    low, high = (float(end) for end in mappable.get_clim() if end is not None)
    logarithmic = isinstance(mappable.norm, LogNorm)
    edges = (np.geomspace if logarithmic else np.linspace)(low, high, 33)
    centres = (edges[:-1] + edges[1:]) / 2
    shown = {"cmap": mappable.cmap, "norm": mappable.norm, "edgecolors": "face", "lw": 0.3}
    ax.pcolormesh([0, 1], edges, centres[:, None], **shown)
    if logarithmic:
        ax.set_yscale("log")
        plain_decades(ax.yaxis, low, high)
    ax.set_ylim(low, high)
    ax.set_xticks([])
    ax.yaxis.tick_right()
    ax.yaxis.set_label_position("right")
    ax.set_ylabel(words, fontsize="small")
    ax.tick_params(labelsize="small")
    ax.grid(visible=False)


def arm_legend(figure: Figure, arms: Sequence[str], styles: Mapping[str, Style], *, y: float) -> None:
    """Marker and name of each arm, in rows of `LEGEND` from `y` inches down."""
    height = figure.get_figheight()
    for i, arm in enumerate(arms):
        row, column = divmod(i, LEGEND)
        x, at = (0.3 + column * (WIDTH - 0.4) / LEGEND) / WIDTH, (y - 0.22 * row) / height
        figure.add_artist(
            Line2D([x], [at], marker=styles[arm].marker, color=styles[arm].colour, ms=5.5, ls="")
        )
        figure.text(
            x + 0.1 / WIDTH, at, arm if len(arm) <= 20 else arm[:19] + "…", va="center", fontsize="small"
        )


def legend_height(arms: Sequence[str]) -> float:
    """Inches that `arm_legend` takes."""
    return 0.22 * math.ceil(len(arms) / LEGEND) + 0.1


def say(ax: Any, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=MUTED)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.title.set_color(INK)
