"""Inside the runs: spectra by layer (F8), and what crossed its threshold first (F10)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from analysis import mechanism, survival
from analysis.figures.drawing import (
    WIDTH,
    NoDataError,
    arm_legend,
    beside,
    colour_bar,
    counted,
    described,
    labelled,
    legend_height,
    say,
    short_name,
    step_axis,
)
from analysis.load import Frames
from analysis.theme import HEAT, INK, MUTED, ON_DARK, Style, arm_styles, look
from trainers.records import FINISHED

SHOWN = 8
"""Arms (and cells) that F8 has room for: those whose σ_max grows largest."""
COLUMNS = 60
"""Steps that a map of F8 shows at most, evenly chosen."""
LEVELS = 64
"""Colours of a map."""
MODULES = {"attn": "attention", "mlp": "MLP"}


def f8_data(frames: Frames) -> pd.DataFrame:
    """One row per label, kind of module, layer and step: `sigma_max`, the maximum over the matrices of the
    layer, the median over the seeds that still train; and `runs`, how many those are."""
    largest = frames.spectra.groupby(["run_id", "module", "layer", "step"])["sigma_max"].max().reset_index()
    owners = frames.runs[["run_id", "label"]]
    cells = owners.merge(largest, on="run_id").groupby(["label", "module", "layer", "step"], sort=False)
    return cells["sigma_max"].agg(sigma_max="median", runs="count").reset_index()


def f8(frames: Frames) -> Figure:
    """Maps of the largest singular value by layer and step.

    Raises:
        NoDataError: no run recorded `spectra`.
    """
    data = f8_data(frames)
    data = data[np.isfinite(data["sigma_max"]) & (data["sigma_max"] > 0)]
    if data.empty:
        raise NoDataError("F8 needs spectra records: switch probes.spectra on")
    labels = _largest(frames, data)
    shown = data[data["label"].isin(labels)]
    low, high = float(shown["sigma_max"].min()), float(shown["sigma_max"].max())
    scale = LogNorm(low, max(high, 1.01 * low))
    with look():
        figure, axes, bar = _grid_canvas(len(labels))
        for (ax_attn, ax_mlp), label in zip(axes, labels, strict=True):
            for ax, kind in ((ax_attn, "attn"), (ax_mlp, "mlp")):
                ax.set_title(f"{short_name(label)}: {MODULES[kind]}")
                own = shown[(shown["label"] == label) & (shown["module"] == kind)]
                _layers(ax, own, scale, _first_bad(frames, label), _horizon(frames))
        colour_bar(bar, ScalarMappable(scale, HEAT), "σ_max")
        by_label = {
            k: v for k, v in labelled(frames, frames.spectra["run_id"].unique()).items() if k in labels
        }
        rest = data["label"].nunique() - len(labels)
        caption = (
            "F8. Largest singular value σ_max by layer (0 is next to the embedding) and optimizer step: the "
            "maximum over the matrices of the layer, the median over the seeds that still train. "
            "× and line: median first bad evaluation of the finished runs. "
            + (f"The {len(labels)} that grow largest; {rest} others not shown. " if rest else "")
            + f"{counted(frames, by_label)}."
        )
        return described(figure, "F8. Spectra by layer", caption, [r for v in by_label.values() for r in v])


def _largest(frames: Frames, data: pd.DataFrame) -> list[str]:
    """In the order of the grid."""
    peaks = data.groupby("label")["sigma_max"].max().sort_values(ascending=False, kind="stable")
    kept = set(peaks.index[:SHOWN])
    return [str(label) for label in dict.fromkeys(frames.runs["label"]) if label in kept]


def _first_bad(frames: Frames, label: str) -> float:
    """Median over the finished runs of a label, a stable one as +inf; +inf before one has finished."""
    finished = frames.runs[(frames.runs["label"] == label) & frames.runs["status"].isin(FINISHED)]
    firsts = [math.inf if pd.isna(first) else float(first) for first in finished["first_bad"]]
    return float(np.median(firsts)) if firsts else math.inf


def _horizon(frames: Frames) -> int:
    horizon = frames.runs["horizon"].max()
    return int(frames.runs["step"].max() if pd.isna(horizon) else horizon)


def _grid_canvas(rows: int) -> tuple[Figure, list[tuple[Any, Any]], Any]:
    """Two maps a row, and a colour bar at the right."""
    tall, between = 1.05, 0.42
    height = rows * (tall + between) + 0.45
    figure = Figure(figsize=(WIDTH, height))
    wide = (WIDTH - 0.65 - 0.55 - 1.15) / 2
    axes: list[tuple[Any, Any]] = []
    for row in range(rows):
        y = height - (row + 1) * (tall + between) + 0.05
        size = (wide / WIDTH, tall / height)
        left, right = (figure.add_axes((x / WIDTH, y / height, *size)) for x in (0.65, 1.2 + wide))
        axes.append((left, right))
    for pair in axes:
        for ax in pair:
            ax.set_ylabel("layer" if ax is pair[0] else "")
            if pair is not axes[-1]:
                ax.tick_params(labelbottom=False)
    long = min(3.2, height - 0.8)
    bar = figure.add_axes(((WIDTH - 0.95) / WIDTH, 1 - (long + 0.37) / height, 0.14 / WIDTH, long / height))
    return figure, axes, bar


def _layers(ax: Any, cells: pd.DataFrame, scale: LogNorm, bad: float, horizon: int) -> None:
    ax.grid(visible=False)
    if cells.empty:
        return say(ax, "no spectra")
    table = cells.pivot(index="layer", columns="step", values="sigma_max").sort_index()
    if table.shape[1] > COLUMNS:
        table = table.iloc[:, np.linspace(0, table.shape[1] - 1, COLUMNS).round().astype(int)]
    steps = table.columns.to_numpy(dtype=float)
    middles = (steps[1:] + steps[:-1]) / 2
    last = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else max(horizon / 50, 1)) / 2
    edges = np.concatenate([[steps[0]], middles, [min(last, max(horizon, steps[-1] + 1e-9))]])
    _paint(ax, edges, table.to_numpy(), scale)
    ax.set_ylim(-0.5, len(table) - 0.5)
    ax.set_yticks(_few(range(len(table))), [str(table.index[i]) for i in _few(range(len(table)))])
    ax.set_xlim(0, horizon)
    step_axis(ax)
    if not ax.xaxis.get_tick_params().get("labelbottom", True):
        ax.set_xlabel("")
    if bad <= horizon:
        ax.axvline(bad, color=ON_DARK, lw=1.2)
        ax.plot(
            [bad],
            [1.0],
            marker="x",
            ms=7,
            mew=2,
            color=INK,
            transform=ax.get_xaxis_transform(),
            clip_on=False,
        )
    return None


def _paint(ax: Any, edges: Any, table: Any, scale: LogNorm) -> None:
    """The cells of a map, row 0 at the bottom, in `LEVELS` colours: of each colour one patch, neighbours
    of one colour as one rectangle. That is a fifth of the bytes of a patch per cell."""
    heat = colormaps[HEAT]
    level = np.full(table.shape, -1)
    known = np.isfinite(table)
    level[known] = np.clip((np.asarray(scale(table[known])) * LEVELS).astype(int), 0, LEVELS - 1)
    corners: dict[int, list[Path]] = {}
    for row, cells in enumerate(level):
        cuts = [0, *(np.flatnonzero(np.diff(cells)) + 1), len(cells)]
        for first, after in itertools.pairwise(cuts):
            left, right = edges[first], edges[after]
            box = [(left, row - 0.5), (right, row - 0.5), (right, row + 0.5), (left, row + 0.5)]
            corners.setdefault(int(cells[first]), []).append(Path([*box, box[0]], closed=True))
    for found, boxes in sorted(corners.items()):
        if found >= 0:
            colour = heat((found + 0.5) / LEVELS)
            # The edge, of the same colour, closes the seams that viewers show.
            ax.add_patch(PathPatch(Path.make_compound_path(*boxes), fc=colour, ec=colour, lw=0.3))


def _few(layers: range) -> list[int]:
    """At most five of them, evenly."""
    return sorted({round(i) for i in np.linspace(0, len(layers) - 1, min(5, len(layers)))})


def f10(frames: Frames) -> Figure:
    """When each quantity first crossed its threshold, how long before the loss, and how often in vain.

    Its numbers are those of `mechanism.crossings`, `lead_times` and `alarms`.

    Raises:
        NoDataError: no run recorded anything that has a threshold.
    """
    crossed = mechanism.crossings(frames)
    if crossed.empty:
        raise NoDataError("F10 needs records of steps, spectra, flow or attention: none yet")
    alarms, leads = mechanism.alarms(frames, crossed), mechanism.lead_times(frames, crossed)
    with look():
        arms = [arm for arm in frames.arms if (crossed["arm"] == arm).any()]
        figure, left, right = _timeline_canvas(legend_height(arms))
        arm_legend(figure, arms, arm_styles(frames.arms), y=legend_height(arms) - 0.1)
        _timeline(left, frames, crossed)
        _leads(right, frames, leads, alarms)
        chain = mechanism.chain(frames, crossed)
        by_label = labelled(frames, crossed["run_id"].unique())
        caption = (
            "F10. Left: first crossing of each threshold, one mark per run, from the last record within "
            "bounds (thin line); filled: a run that became unstable, × its first bad evaluation. Right: "
            "steps from the alarm to the first bad evaluation in unstable runs, hollow at the left edge: "
            "no alarm; thick: median, from six runs on with its exact 95% interval. Warned: unstable runs "
            "with an alarm before the first bad evaluation. False: runs of stable arms with an alarm. "
            f"Thresholds were fixed beforehand; no order is assumed. {_order(chain)} "
            f"{counted(frames, by_label)}."
        )
        return described(figure, "F10. What moved first", caption, crossed["run_id"])


def _order(chain: mechanism.Chain) -> str:
    if not chain.n:
        return "No unstable run recorded all of σ, logits and ‖J‖."
    return (
        f"The order σ, logit, ‖J‖, loss shows in {chain.k} of {chain.n} unstable runs (95% interval "
        f"{chain.low:.2f} to {chain.high:.2f}; known otherwise in {chain.against}): {chain.verdict}."
    )


def _timeline_canvas(legend: float) -> tuple[Figure, Any, Any]:
    before, panel, gap, after, top, bottom, tall = 2.35, 3.6, 0.35, 1.95, 0.42, 0.58 + legend, 3.9
    height = top + tall + bottom
    figure = Figure(figsize=(WIDTH, height))
    other = WIDTH - before - panel - gap - after
    rise, size = bottom / height, tall / height
    left = figure.add_axes((before / WIDTH, rise, panel / WIDTH, size))
    right = figure.add_axes(((before + panel + gap) / WIDTH, rise, other / WIDTH, size))
    return figure, left, right


def _rows(ax: Any, named: bool) -> None:
    names = [f"{q.words}\n{q.bound}" for q in mechanism.QUANTITIES]
    ax.set_ylim(0.6 - len(names), 0.6)
    ax.set_yticks([-i for i in range(len(names))], names if named else [""] * len(names), fontsize="small")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)


def _timeline(ax: Any, frames: Frames, crossed: pd.DataFrame) -> None:
    ax.set_title("First crossing")
    _rows(ax, named=True)
    styles = arm_styles(frames.arms)
    seen = survival.times(frames).drop_duplicates("run_id")
    events = dict(zip(seen.loc[seen["event"], "run_id"], seen.loc[seen["event"], "step"], strict=True))
    places = _places(crossed)
    for i, quantity in enumerate(mechanism.QUANTITIES):
        own = crossed[(crossed["quantity"] == quantity.name) & crossed["crossed"]]
        for row in own.to_dict("records"):
            y, style = places[row["run_id"]] - i, styles[row["arm"]]
            face = style.colour if row["run_id"] in events else "none"
            ax.plot([row["after"], row["step"]], [y, y], color=style.colour, lw=0.9, alpha=0.7)
            ax.plot(
                [row["step"]],
                [y],
                marker=style.marker,
                ms=4.5,
                mfc=face,
                mec=style.colour,
                ls="",
                clip_on=False,
            )
        if own.empty:
            ax.text(0.99, -i, "no crossing", transform=ax.get_yaxis_transform(), ha="right", va="center",
                    fontsize="small", color=MUTED)  # fmt: skip
    arms = dict(zip(crossed["run_id"], crossed["arm"], strict=True))
    for run_id, step in events.items():
        if run_id in arms:
            for i in range(len(mechanism.QUANTITIES)):
                y, colour = places[run_id] - i, styles[arms[run_id]].colour
                ax.plot([step], [y], marker="x", ms=4, mew=1.2, color=colour, alpha=0.8, clip_on=False)
    ax.set_xlim(0, _horizon(frames))
    step_axis(ax)


def _places(crossed: pd.DataFrame) -> dict[str, float]:
    """Runs side by side within a row, arm by arm."""
    ids = list(dict.fromkeys(crossed.sort_values(["arm", "seed"], kind="stable")["run_id"]))
    return {str(r): float(y) for r, y in zip(ids, np.linspace(0.36, -0.36, len(ids)), strict=True)}


def _leads(ax: Any, frames: Frames, leads: pd.DataFrame, alarms: pd.DataFrame) -> None:
    ax.set_title("Lead on the loss")
    _rows(ax, named=False)
    styles = arm_styles(frames.arms)
    finite = leads.loc[np.isfinite(leads["lead"]), "lead"]
    most = max(1.0, float(finite.abs().max())) if len(finite) else 1.0
    least = -1.12 * most if (finite < 0).any() else -0.12 * most
    ax.set_xlim(least, 1.08 * most)
    ax.axvline(0, color=INK, lw=0.9, zorder=1)
    for i, row in enumerate(alarms.to_dict("records")):
        own = leads[leads["quantity"] == row["quantity"]]
        for place, run in zip(np.linspace(0.3, 0.0, max(len(own), 1)), own.to_dict("records"), strict=False):
            _lead(ax, place - i, run["lead"], styles[run["arm"]], least)
        _median(ax, -0.2 - i, row, least)
        beside(ax, -i, _shares(row), at=1.03)
    ax.set_xlabel("steps before the first bad evaluation")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.xaxis.get_major_locator().set_params(nbins=4, integer=True)


def _lead(ax: Any, y: float, lead: float, style: Style, least: float) -> None:
    silent = not math.isfinite(lead)
    face = "none" if silent else style.colour
    ax.plot(
        [max(lead, least)], [y], marker=style.marker, ms=4, mfc=face, mec=style.colour, ls="", clip_on=False
    )


def _median(ax: Any, y: float, row: dict[Any, Any], least: float) -> None:
    low, middle, high = (row[f"lead_{name}_steps"] for name in ("low", "median", "high"))
    if math.isnan(middle):
        return
    if not math.isnan(low):
        ax.plot([max(low, least), max(high, least)], [y, y], color=INK, lw=1.8, solid_capstyle="butt")
    ax.plot([max(middle, least)], [y], marker="|", ms=9, mew=2.4, color=INK, ls="")


def _shares(row: dict[Any, Any]) -> str:
    """`warned 5/10 [0.19, 0.81]` over `false 0/15 [0.00, 0.22]`."""
    parts = []
    for n, k, what in (("n_unstable", "n_before", "before"), ("n_stable", "n_false", "false")):
        share = f"{row[k]}/{row[n]} [{row[f'{what}_low']:.2f}, {row[f'{what}_high']:.2f}]" if row[n] else "–"
        parts.append(f"{'warned' if what == 'before' else 'false'} {share}")
    return "\n".join(parts)
