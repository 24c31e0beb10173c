"""Figures as functions of frames. Each has a caption that says what it shows and from how many runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from analysis.load import Frames
from analysis.tables import three_digits
from analysis.theme import (
    AFTER_BAD,
    INK,
    MODULAR_ARMS,
    MUTED,
    VARIANTS,
    Style,
    arm_styles,
    direct_labels,
    look,
)
from trainers.records import DIVERGED, FINISHED

ZOOM_FROM = 0.6
"""The right panel of F1 shows the steps after this share of the horizon."""
ZOOMED = 3
"""As many arms as it shows, so that those far above do not flatten them."""
LOG_FROM = 8.0
"""A panel turns to a log scale when its values span more than this factor."""


@dataclass(frozen=True)
class _Group:
    """The seeds of one arm (and axis cell): one column of `values` per run, indexed by step."""

    label: str
    style: Style
    runs: pd.DataFrame
    values: pd.DataFrame

    @property
    def median(self) -> pd.Series[float]:
        """Over the seeds, where all that still train have a value; a run that ended early counts as +inf."""
        filled = self.values.copy()
        for run in self.runs.itertuples():
            if run.run_id in filled and run.status in FINISHED:
                last = filled[run.run_id].last_valid_index()
                filled.loc[filled.index > (-1 if last is None else last), run.run_id] = math.inf
        return filled.dropna().median(axis=1)

    @property
    def end(self) -> float:
        """Last finite value of the median, else of any run."""
        for frame in (self.median.to_frame(), self.values):
            finite = _finite([frame])
            if len(finite):
                return float(finite[-1])
        return math.nan

    @property
    def first_bad(self) -> dict[str, int | None]:
        """By run; None where it is stable."""
        steps = dict(zip(self.runs["run_id"], self.runs["first_bad"].tolist(), strict=True))
        return {str(run): None if pd.isna(steps[run]) else int(steps[run]) for run in self.values}

    @property
    def unstable(self) -> int:
        return int(self.runs["unstable"].fillna(False).sum())


def _groups(frames: Frames, long: pd.DataFrame, column: str) -> list[_Group]:
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
            line = VARIANTS[variant % len(VARIANTS)] if variant else base.line
            groups.append(_Group(str(label), replace(base, line=line), runs, values))
    return groups


def f1(frames: Frames) -> Figure:
    """Validation curves: all arms on the left, the stable ones near the end on the right."""
    with look():
        groups = _groups(frames, frames.evals, "val_loss")
        figure, left, right = _canvas(groups)
        _loss_panel(left, groups, frames)
        _zoom_panel(right, groups)
        return figure


def f1_caption(frames: Frames) -> str:
    groups = _groups(frames, frames.evals, "val_loss")
    if not groups:
        return "F1. Validation loss. No evaluations yet."
    bad = sum(group.unstable for group in groups)
    marked = (
        f"{bad} of them unstable: × first bad evaluation, dashed after it" if bad else "none of them unstable"
    )
    _, chosen = _zoomed(groups)
    return (
        "F1. Validation loss (nats per token) against optimizer steps. "
        f"{_sample(frames, groups)}, {marked}. Thin lines: one run each; thick: median over seeds. "
        f"Right: {chosen}, after {ZOOM_FROM:.0%} of the horizon; band: lowest to highest seed."
    )


def f2(frames: Frames) -> Figure:
    """The largest singular value of any attention matrix, and of any MLP matrix."""
    with look():
        attention, mlp = _sigma(frames, "attn"), _sigma(frames, "mlp")
        figure, left, right = _canvas([*attention, *mlp])
        limits = _sigma_limits([*attention, *mlp])
        _sigma_panel(left, attention, frames, limits, "Attention: largest singular value")
        _sigma_panel(right, mlp, frames, limits, "MLP: largest singular value")
        return figure


def f2_caption(frames: Frames) -> str:
    groups = _sigma(frames, "attn") or _sigma(frames, "mlp")
    if not groups:
        return "F2. Largest singular values. No spectra yet."
    matrices = frames.spectra.groupby("module")["matrix"].nunique()
    return (
        "F2. Largest singular value σ_max against optimizer steps: the maximum over the "
        f"{matrices.get('attn', 0)} attention matrices (left) and the {matrices.get('mlp', 0)} MLP matrices "
        f"(right) of each run. {_sample(frames, groups)}. Thin lines: one run each; thick: median over seeds."
    )


def overview(frames: Frames) -> Figure:
    """Loss and attention spectrum side by side: the picture for a README."""
    with look():
        groups, attention = _groups(frames, frames.evals, "val_loss"), _sigma(frames, "attn")
        figure, left, right = _canvas(groups)
        _loss_panel(left, groups, frames)
        _sigma_panel(right, attention, frames, _sigma_limits(attention), "Attention: largest singular value")
        return figure


SMOOTHED = 0.05
"""Gradient norms are drawn as running medians over this share of their records."""


def modular(frames: Frames) -> Figure:
    """The modular-manifolds plan: loss, σ_max at the end, norms of weights and of gradients by module."""
    with look():
        losses, norms, gradients = _modular_groups(frames)
        figure, loss, sigma, *rest = _canvas(losses, rows=3)
        _loss_panel(loss, losses, frames)
        _end_panel(sigma, losses, frames)
        for what, by_kind, axes in (
            ("Frobenius norm ‖W‖_F, largest matrix", norms, rest[:2]),
            ("gradient norm, median over matrices", gradients, rest[2:]),
        ):
            limits = _sigma_limits([group for groups in by_kind for group in groups])
            for ax, groups, kind in zip(axes, by_kind, ("Attention", "MLP"), strict=True):
                ax.set_title(f"{kind}: {what.partition(',')[0]}")
                ax.set_ylabel(what)
                if groups:
                    _trends(ax, groups, frames, limits)
                    _ends_of_diverged(ax, groups)
                else:
                    _say(ax, "not recorded yet")
        return figure


def modular_caption(frames: Frames) -> str:
    groups, *_ = _modular_groups(frames)
    if not groups:
        return "Modular manifolds. No evaluations yet."
    lost = sum(int((group.runs["status"] == DIVERGED).sum()) for group in groups)
    bad = sum(group.unstable for group in groups)
    marked = f"{lost} of them diverged (×)" if lost else "none of them diverged"
    marked += f", {bad} unstable (on the loss, × is the first bad evaluation)" if bad else ""
    return (
        "Modular manifolds. Validation loss; largest singular value of any matrix at the end, one mark per "
        "run; over steps, the largest Frobenius norm of any matrix and the median gradient norm (before the "
        f"clip; running median over {SMOOTHED:.0%} of the records). {_sample(frames, groups)}, {marked}. "
        "Thin lines: one run each; thick: median over seeds. Colour: method. Dash-dotted: on attention "
        "alone; dotted: on the MLP alone; dash-dot-dotted: decay switched; dashed: after the first bad "
        "evaluation."
    )


def _modular_groups(frames: Frames) -> tuple[list[_Group], list[list[_Group]], list[list[_Group]]]:
    """Of losses, of norms by module kind, and of gradients by module kind."""

    def styled(long: pd.DataFrame, column: str) -> list[_Group]:
        found = [g for g in _groups(frames, long, column) if g.runs["arm"].iloc[0] in MODULAR_ARMS]
        return [replace(group, style=MODULAR_ARMS[group.runs["arm"].iloc[0]]) for group in found]

    norms, gradients = [], []
    for kind in ("attn", "mlp"):
        flow = frames.flow[frames.flow["module"] == kind]
        grads = flow.groupby(["run_id", "step"])["grad_norm"].median().reset_index()
        norms.append(styled(flow, "weight_norm"))
        gradients.append([_smoothed(group) for group in styled(grads, "grad_norm")])
    return styled(frames.evals, "val_loss"), norms, gradients


def _smoothed(group: _Group) -> _Group:
    window = max(1, round(SMOOTHED * len(group.values)))
    median = group.values.rolling(window, min_periods=1).median()
    return replace(group, values=median.where(group.values.notna()))


def _ends_of_diverged(ax: Any, groups: Sequence[_Group]) -> None:
    for group in groups:
        for run_id in group.runs.loc[group.runs["status"] == DIVERGED, "run_id"]:
            series = group.values[run_id] if run_id in group.values else pd.Series(dtype=float)
            series = series[np.isfinite(series.to_numpy(dtype=float))]
            if len(series):
                _cross(ax, series, int(series.index[-1]), ax.get_ylim()[1], group.style.colour)


def _end_panel(ax: Any, groups: Sequence[_Group], frames: Frames) -> None:
    """σ_max at the last spectra of each run: one row of marks per arm, attention above the MLP."""
    ax.set_title("Largest singular value at the end")
    ax.set_xlabel("σ_max  (● attention, □ MLP, × diverged)")
    last = frames.spectra[frames.spectra["step"] == frames.spectra.groupby("run_id")["step"].transform("max")]
    ends = last.groupby(["run_id", "module"])["sigma_max"].max().unstack()
    low, high, logarithmic = _sigma_limits([_Group("", Style(INK, ""), frames.runs, ends)])
    if ends.empty or not groups:
        return _say(ax, "no spectra yet")
    if logarithmic:
        ax.set_xscale("log")
        _plain_decades(ax.xaxis, low, high)
    ax.set_xlim(low, high)
    for row, group in enumerate(groups):
        for kind, marker, face, rise in (
            ("attn", "o", group.style.colour, 0.16),
            ("mlp", "s", "none", -0.16),
        ):
            for run in group.runs.itertuples():
                value = ends[kind].get(run.run_id, math.nan) if kind in ends else math.nan
                shape = {"marker": "x" if run.status == DIVERGED else marker, "ms": 5.5, "mfc": face}
                if not math.isnan(value):
                    ax.plot(
                        [min(value, high)], [rise - row], color=group.style.colour, clip_on=False, **shape
                    )
    ax.set_ylim(0.6 - len(groups), 0.6)
    ax.yaxis.tick_right()
    ax.set_yticks([-row for row in range(len(groups))], [_named(group) for group in groups])
    ax.tick_params(axis="y", length=0)
    return None


def _canvas(groups: Sequence[_Group], rows: int = 1) -> tuple[Figure, *tuple[Any, ...]]:
    """Rows of two panels, each with a strip at its right for the names of its lines."""
    names = {_named(group) for group in groups}
    strip = 0.72 + 0.076 * max([len(name) for name in names], default=8)  # inches; a number may follow
    before, panel, top, bottom = 0.72, 3.3, 0.36, 0.52
    width = 2 * (before + panel + strip)
    height = rows * max(4.1, top + bottom + 0.172 * len(names))
    figure = Figure(figsize=(width, height))
    size = (panel / width, 1 / rows - (top + bottom) / height)
    at = [(x + before / width, y / rows + bottom / height) for y in reversed(range(rows)) for x in (0, 0.5)]
    return figure, *[figure.add_axes((*corner, *size)) for corner in at]


def _loss_panel(ax: Any, groups: Sequence[_Group], frames: Frames) -> None:
    ax.set_title("Validation loss, all arms")
    ax.set_ylabel("validation loss (nats per token)")
    if not groups:
        return _say(ax, "no evaluations yet")
    low, high = _loss_limits(groups)
    ax.set_ylim(low, high)
    for group in groups:
        firsts = sorted(step for step in group.first_bad.values() if step is not None)
        half = math.ceil(len(group.first_bad) / 2)
        turned = firsts[half - 1] if len(firsts) >= half else None
        for run_id, bad in group.first_bad.items():
            series = group.values[run_id].dropna()
            _line(ax, series, group.style, bad, width=0.8, alpha=0.55)
            _cross(ax, series, bad, high, group.style.colour)
        _line(ax, group.median, group.style, turned, width=1.9)
    _to_horizon(ax, frames)
    direct_labels(ax, [(g.end, f"{_named(g)} {g.end:.3f}", g.style.colour) for g in groups])
    return None


def _zoom_panel(ax: Any, groups: Sequence[_Group]) -> None:
    shown, chosen = _zoomed(groups)
    ax.set_title(f"{chosen[0].upper()}{chosen[1:]}, late steps")
    ax.set_ylabel("validation loss (nats per token)")
    if not shown:
        return _say(ax, "no finite loss yet")
    reach = max(group.median.index.max() for group in shown)
    late = [group.values[group.values.index >= ZOOM_FROM * reach] for group in shown]
    finite = _finite(late)
    pad = 0.08 * (finite.max() - finite.min()) or 0.01 * max(abs(finite.max()), 1.0)
    ax.set_ylim(finite.min() - pad, finite.max() + pad)
    for group, values in zip(shown, late, strict=True):
        colour = group.style.colour
        if values.shape[1] > 1:
            ax.fill_between(
                values.index, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.18, lw=0
            )
        median = group.median
        _line(ax, median[median.index >= ZOOM_FROM * reach], group.style, None, width=1.9, marker=True)
    ax.set_xlim(ZOOM_FROM * reach, max(reach, 1))
    _step_axis(ax)
    direct_labels(ax, [(g.end, f"{_named(g)} {g.end:.4f}", g.style.colour) for g in shown])
    return None


def _zoomed(groups: Sequence[_Group]) -> tuple[list[_Group], str]:
    """The groups of the zoomed panel, and what they are in words. Some may not have come so far yet."""
    finite = [
        group for group in groups if math.isfinite(group.median.iloc[-1] if len(group.median) else math.inf)
    ]
    reach = ZOOM_FROM * max((group.median.index.max() for group in finite), default=0)
    finite = [group for group in finite if group.median.index.max() >= reach]
    stable = [group for group in finite if not group.unstable]
    pool = stable or finite
    lowest = sorted(pool, key=lambda group: group.end)[:ZOOMED]
    kept = [group for group in groups if any(group is one for one in lowest)]
    if not stable:
        return kept, f"lowest {len(kept)} (none is stable)"
    if len(stable) == len(groups):
        return kept, f"lowest {len(kept)} (none is unstable)"
    return kept, "stable arms" if kept == stable else f"lowest {len(kept)} of {len(stable)} stable arms"


def _sigma(frames: Frames, module: str) -> list[_Group]:
    spectra = frames.spectra[frames.spectra["module"] == module]
    return _groups(frames, spectra, "sigma_max")


def _sigma_limits(groups: Sequence[_Group]) -> tuple[float, float, bool]:
    """Limits that panels share, so that they can be compared, and whether they are for a log scale."""
    values = _finite([group.values for group in groups])
    values = values[values > 0]
    if not len(values):
        return 0.0, 1.0, False
    low, high = float(values.min()), float(values.max())
    if high > LOG_FROM * low:
        pad = (high / low) ** 0.05
        return low / pad, high * pad, True
    return 0.0, 1.08 * high, False


def _sigma_panel(
    ax: Any, groups: Sequence[_Group], frames: Frames, limits: tuple[float, float, bool], title: str
) -> None:
    ax.set_title(title)
    ax.set_ylabel("σ_max, maximum over matrices")
    if not groups:
        return _say(ax, "no spectra yet")
    return _trends(ax, groups, frames, limits)


def _trends(ax: Any, groups: Sequence[_Group], frames: Frames, limits: tuple[float, float, bool]) -> None:
    """Each run, and the median over seeds."""
    low, high, logarithmic = limits
    if logarithmic:
        ax.set_yscale("log")
        _plain_decades(ax.yaxis, low, high)
    ax.set_ylim(low, high)
    for group in groups:
        for run_id in group.values:
            _line(ax, group.values[run_id].dropna(), group.style, None, width=0.8, alpha=0.55)
        _line(ax, group.median, group.style, None, width=1.9)
    _to_horizon(ax, frames)
    direct_labels(ax, [(g.end, f"{_named(g)} {three_digits(g.end)}", g.style.colour) for g in groups])


def _plain_decades(axis: Any, low: float, high: float) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    axis.set_major_formatter(lambda x, _: f"{x:,g}" if x < 1e6 else f"{x:.0e}")
    axis.set_minor_formatter(NullFormatter())


def _line(
    ax: Any, series: pd.Series[float], style: Style, bad: int | None, *, marker: bool = False, **look: Any
) -> None:
    """One curve, dashed from its first bad evaluation on; values that are not finite leave a gap."""
    width = look.pop("width")
    series = series.where(np.isfinite(series.to_numpy(dtype=float)))
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


def _cross(ax: Any, series: pd.Series[float], bad: int | None, top: float, colour: str) -> None:
    """× at the first bad evaluation; at the frame's edge where its loss is beyond it or not finite."""
    if bad is None:
        return
    at = series[series.index <= bad]
    at = at[np.isfinite(at.to_numpy(dtype=float))]
    exact = len(at) > 0 and at.index[-1] == bad
    y = min(float(at.iloc[-1]), top) if exact else top
    ax.plot([bad], [y], marker="x", ms=7, mew=2, color=colour, clip_on=False, zorder=5)


def _loss_limits(groups: Sequence[_Group]) -> tuple[float, float]:
    """From the lowest loss to the highest after a tenth of the steps, so that the start does not
    flatten the rest; an explosion is cut at the loss of the start."""
    reach = max(group.values.index.max() for group in groups)
    every = _finite([g.values for g in groups])
    late = _finite([g.values[g.values.index > 0.1 * reach] for g in groups])
    start = _finite([g.values.iloc[:1] for g in groups])
    low = float(every.min())
    high = float(late.max()) if len(late) else float(every.max())
    if len(start):
        high = min(high, float(start.max()))
    pad = 0.06 * (high - low) or 0.05
    return low - pad, high + pad


def _finite(frames: Sequence[pd.DataFrame]) -> np.ndarray[Any, np.dtype[np.float64]]:
    values = np.concatenate([frame.to_numpy(dtype=float).ravel() for frame in frames] or [np.empty(0)])
    finite: np.ndarray[Any, np.dtype[np.float64]] = values[np.isfinite(values)]
    return finite


def _to_horizon(ax: Any, frames: Frames) -> None:
    horizon = frames.runs["horizon"].max()
    ax.set_xlim(0, None if pd.isna(horizon) else int(horizon))
    _step_axis(ax)


def _step_axis(ax: Any) -> None:
    ax.set_xlabel("optimizer step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.xaxis.set_major_formatter("{x:,.0f}")


def _named(group: _Group) -> str:
    """`arm · lr=0.5 · decay=0` as `arm (0.5, 0)`: the caption names the axes once."""
    arm, *rest = group.label.split(" · ")
    values = ", ".join(part.partition("=")[2] or part for part in rest)
    name = f"{arm} ({values})" if values else arm
    return name if len(name) <= 34 else name[:33] + "…"


def _sample(frames: Frames, groups: Sequence[_Group]) -> str:
    """`n = 10 runs (2 of each of 5 arms; seeds 0, 1) of grid "quickstart"`."""
    n = len({run for group in groups for run in group.values})
    sizes = {group.values.shape[1] for group in groups}
    if len(sizes) == 1:
        each = f"{sizes.pop()} of each of {len(groups)}"
    else:
        each = ", ".join(f"{group.label} {group.values.shape[1]}" for group in groups)
    ids = {run for group in groups for run in group.values}
    seeds = sorted(frames.runs.loc[frames.runs["run_id"].isin(ids), "seed"].unique().tolist())
    listed = ", ".join(str(seed) for seed in seeds[:8]) + (", …" if len(seeds) > 8 else "")
    whose = f' of grid "{frames.grid}"' if frames.grid else ""
    axes = f", labelled by arm ({', '.join(frames.axes)})" if frames.axes else ""
    return f"n = {n} run{'s' if n > 1 else ''} ({each}; seeds {listed}){whose}{axes}"


def _say(ax: Any, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=MUTED)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.title.set_color(INK)
