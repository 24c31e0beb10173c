"""What came out: paired differences (F4), runs still stable (F5), effects of each setting (F11)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import survival
from analysis.contrasts import trained
from analysis.figures.drawing import (
    NoDataError,
    beside,
    counted,
    described,
    labelled,
    plain,
    rows_canvas,
    short_name,
    step_axis,
)
from analysis.load import Frames
from analysis.stats import Interval, paired_t
from analysis.tables import EXPLORATORY, PREDECLARED, PRIMARY, REFERENCES, bounds, signed
from analysis.theme import INK, VARIANTS, Style, arm_styles, look

FAR = 6.0
"""A difference this many times the median one is drawn as an arrow at the edge, and so is a far one of an
unstable arm, so that one arm that fails does not hide the others."""
MODULE_FACTOR = re.compile(r"assignment\.(\w+)\.(manifold|optimizer)")
"""Keys of a config that F11 takes for factors, beside the axes."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a forest plot."""

    name: str
    style: Style
    values: tuple[float, ...]
    """Differences by pair (F4) or by seed (F11), the finite ones."""
    interval: Interval
    note: str
    """Why there are fewer pairs than there might be."""
    bold: bool
    stable: bool
    """No run behind it is unstable: such rows choose the axis, where there are any."""


def f4_data(frames: Frames) -> pd.DataFrame:
    """One row per label, reference arm and seed that both finished: `difference` of final validation
    losses (nats per token), not finite where one of the two diverged; `unstable` where one of them is; `role`
    as in T1. The references are
    `tables.REFERENCES`; in a grid without them its first arm."""
    arms = set(frames.runs["arm"])
    references = [arm for arm in REFERENCES if arm in arms] or list(frames.arms[:1])
    done = frames.runs[frames.runs["final_val_loss"].notna()]
    done = done.assign(unstable=done["unstable"].fillna(True).astype(bool))
    columns = ["label", "arm", "family", "seed", "run_id", "final_val_loss", "unstable"]
    parts = []
    for reference in references:
        own = done.loc[done["arm"] == reference, columns]
        pairs = done.loc[done["arm"] != reference, columns].merge(own, on=["family", "seed"])
        pairs = pairs.rename(columns=lambda c: c.removesuffix("_x").replace("_y", "_reference"))
        with np.errstate(invalid="ignore"):
            pairs["difference"] = pairs["final_val_loss"] - pairs["final_val_loss_reference"]
        pairs["unstable"] |= pairs.pop("unstable_reference")
        pairs["reference"] = reference
        primary = pairs["arm"].isin([a for a, r in PREDECLARED if r == reference])
        pairs["role"] = np.where(primary, PRIMARY, EXPLORATORY)
        parts.append(pairs)
    keep = ["reference", "label", "arm", "seed", "role", "difference", "unstable"]
    return pd.concat(parts, ignore_index=True)[[*keep, "run_id", "run_id_reference"]]


def f4(frames: Frames) -> Figure:
    """Forest plot of the paired differences of final loss.

    Raises:
        NoDataError: no two arms have finished runs of one seed.
    """
    data = f4_data(frames)
    if data.empty:
        raise NoDataError("F4 needs two arms that have finished a run with the same seed")
    styles = arm_styles(frames.arms)
    rows = []
    for (reference, label), pairs in data.groupby(["reference", "label"], sort=False):
        primary = pairs["role"].iloc[0] == PRIMARY
        name = f"{short_name(str(label))} − {reference}" + ("*" if primary else "")
        rows.append(_row(name, styles[pairs["arm"].iloc[0]], pairs, bold=primary))
    by_label = labelled(frames, [*data["run_id"], *data["run_id_reference"]])
    caption = (
        "F4. Final validation loss (nats per token), arm minus reference, paired by seed: mean with its "
        "95% t interval, not adjusted for the number of comparisons; small marks: one pair each. Filled "
        "and marked *: declared before any run; hollow: exploratory. Pairs in which a run diverged have no "
        f"difference and are counted at the right. {counted(frames, by_label)}."
    )
    with look():
        figure = _forest(rows, "Final loss, arm − reference")
        return described(figure, "F4. Paired differences", caption, [r for v in by_label.values() for r in v])


def _row(name: str, style: Style, pairs: pd.DataFrame, *, bold: bool) -> Row:
    finite = [d for d in pairs["difference"] if math.isfinite(d)]
    lost = len(pairs) - len(finite)
    note = f"{lost} of {len(pairs)} pairs diverged" if lost else ""
    return Row(name, style, tuple(finite), paired_t(finite), note, bold, not pairs["unstable"].any())


def _forest(rows: Sequence[Row], title: str) -> Figure:
    figure, ax = rows_canvas([row.name for row in rows], after=3.4)
    for label, row in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.bold else "normal")
    low, high = _reach(rows)
    ax.set_xlim(low, high)
    ax.set_title(title)
    ax.axvline(0, color=INK, lw=0.9, zorder=1)
    for i, row in enumerate(rows):
        _mark(ax, -i, row, low, high)
        beside(ax, -i, _said(row), bold=row.bold)
    ax.text(1.02, 1.0, "mean [95% interval]", transform=ax.transAxes, va="bottom", fontsize="small")
    ax.set_xlabel("difference of final validation loss (nats per token); below 0 is better")
    return figure


def _reach(rows: Sequence[Row]) -> tuple[float, float]:
    """Limits of the axis: 0, the stable rows with their intervals, no further than `FAR` times the median
    difference, and what of the other rows lies as near."""
    rows = [row for row in rows if row.values]
    chosen = [row for row in rows if row.stable] or rows
    if not any(value for row in rows for value in row.values):
        return -1.0, 1.0
    far = FAR * float(np.median([max(map(abs, row.values)) for row in chosen]))
    far = far or max(abs(value) for row in rows for value in row.values)
    ends = [v for row in chosen for v in (*row.values, row.interval.low, row.interval.high)]
    near = [float(np.clip(v, -far, far)) for v in ends if math.isfinite(v)]
    near += [value for row in rows for value in row.values if abs(value) <= far]
    low, high = min(*near, 0.0), max(*near, 0.0)
    pad = 0.06 * (high - low)
    return low - pad, high + pad


def _mark(ax: Any, y: float, row: Row, least: float, most: float) -> None:
    colour, face = row.style.colour, row.style.colour if row.bold else "none"
    if not row.values:
        ax.plot([0.985], [y], marker="x", ms=7, mew=2, color=colour, transform=ax.get_yaxis_transform())
        return
    low, high, middle = row.interval.low, row.interval.high, row.interval.estimate
    inside = [v for v in row.values if least <= v <= most]
    ax.plot(inside, [y - 0.24] * len(inside), ls="", marker="|", ms=4, color=colour, alpha=0.8)
    if not math.isnan(low) and low < most and high > least:
        ax.plot([max(low, least), min(high, most)], [y, y], color=colour, lw=1.8, solid_capstyle="butt")
    look = {"mfc": face, "mec": colour, "mew": 1.4, "ls": "", "clip_on": False}
    if least <= middle <= most:
        ax.plot([middle], [y], marker=row.style.marker, ms=6.5, **look)
    else:
        ax.plot([most if middle > most else least], [y], marker=">" if middle > most else "<", ms=7, **look)


def _said(row: Row) -> str:
    found = row.interval
    if not found.n:
        return row.note or "no finite pair"
    text = signed(found.estimate) + bounds(found.low, found.high)
    return f"{text}  n = {found.n}" + (f"; {row.note}" if row.note else "")


def f5_data(frames: Frames) -> pd.DataFrame:
    """One row per label: `k` of `n` watched runs are unstable; `survival` at the end of its curve, with its
    interval; `run_ids`."""
    ends = survival.curves(frames)
    watched = survival.times(frames)
    rows = []
    for label, curve in ends.groupby("label", sort=False):
        own, last = watched[watched["label"] == label], curve.iloc[-1]
        rows.append(
            {
                "label": str(label),
                "arm": str(last["arm"]),
                "n": len(own),
                "k": int(own["event"].sum()),
                "survival": float(last["survival"]),
                "low": float(last["low"]),
                "high": float(last["high"]),
                "run_ids": " ".join(own["run_id"]),
            }
        )
    return pd.DataFrame(rows, columns=["label", "arm", "n", "k", "survival", "low", "high", "run_ids"])


def f5(frames: Frames) -> Figure:
    """Kaplan–Meier curves of the share of runs still stable, and what is left at the end.

    Raises:
        NoDataError: no run has been watched long enough to say anything.
    """
    data, curves = f5_data(frames), survival.curves(frames)
    if data.empty:
        raise NoDataError("F5 needs a run with evaluations: none yet")
    by_label = labelled(frames, [i for ids in data["run_ids"] for i in ids.split()])
    caption = (
        "F5. Share of runs still stable (Kaplan–Meier) against optimizer steps; it falls at the first bad "
        "evaluation. + censored: the end of a stable run, or a run that the machine lost. Band: 95% "
        "interval, of arms with an unstable run; arms without lie on 1. Right: the share at "
        f"the end with its 95% interval, and unstable of watched runs. {counted(frames, by_label)}."
    )
    with look():
        figure, left, right = _survival_canvas(data)
        styles = _styles(frames, data)
        _survival_curves(left, curves, styles, frames)
        _survival_ends(right, data, styles)
        return described(figure, "F5. Runs still stable", caption, [r for v in by_label.values() for r in v])


def _styles(frames: Frames, data: pd.DataFrame) -> dict[str, Style]:
    """By label: its arm's colour, and the next line style for each further cell of that arm."""
    base, seen, styles = arm_styles(frames.arms), dict[str, int](), dict[str, Style]()
    for label, arm in zip(data["label"], data["arm"], strict=True):
        variant = seen[arm] = seen.get(arm, -1) + 1
        own = base[arm]
        dashes = VARIANTS[variant % len(VARIANTS)] if variant else own.line
        styles[label] = Style(own.colour, own.marker, dashes)
    return styles


def _survival_canvas(data: pd.DataFrame) -> tuple[Figure, Any, Any]:
    width, before, top, bottom = 10.8, 0.72, 0.42, 0.55
    names = 0.3 + 0.078 * max(len(short_name(label)) for label in data["label"])
    height = max(4.1, top + bottom + 0.26 * len(data))
    figure = Figure(figsize=(width, height))
    panel = 0.55 * (width - before - names - 1.2)
    other = width - before - panel - names - 1.3
    rise, size = bottom / height, 1 - (top + bottom) / height
    left = figure.add_axes((before / width, rise, panel / width, size))
    right = figure.add_axes(((before + panel + names + 0.3) / width, rise, other / width, size))
    return figure, left, right


def _survival_curves(ax: Any, curves: pd.DataFrame, styles: dict[str, Style], frames: Frames) -> None:
    ax.set_title("Runs still stable")
    ax.set_ylabel("share of runs")
    for label, curve in curves.groupby("label", sort=False):
        style = styles[str(label)]
        steps = np.concatenate([[0], curve["step"].to_numpy(dtype=float)])
        share = np.concatenate([[1.0], curve["survival"].to_numpy(dtype=float)])
        if curve["events"].sum():
            for bound, edge in (("low", 1.0), ("high", 1.0)):
                curve = curve.assign(**{bound: curve[bound].fillna(edge)})
            low, high = (np.concatenate([[1.0], curve[b].to_numpy(dtype=float)]) for b in ("low", "high"))
            ax.fill_between(steps, low, high, step="post", color=style.colour, alpha=0.12, lw=0)
        ax.step(steps, share, where="post", color=style.colour, lw=1.9, ls=style.line)
        held = curve[curve["censored"] > 0]
        ax.plot(held["step"], held["survival"], ls="", marker="+", ms=7, mew=1.4, color=style.colour)
    ax.set_ylim(-0.03, 1.04)
    reach = max(float(curves["step"].max()), 1.0)
    horizon = frames.runs["horizon"].max()
    ax.set_xlim(0, 1.02 * max(reach, 0 if pd.isna(horizon) else int(horizon)))
    step_axis(ax)


def _survival_ends(ax: Any, data: pd.DataFrame, styles: dict[str, Style]) -> None:
    ax.set_title("At the end")
    ax.set_xlim(-0.03, 1.03)
    ax.set_ylim(0.6 - len(data), 0.6)
    ax.set_xlabel("share of runs still stable")
    ax.set_yticks([-i for i in range(len(data))], [short_name(label) for label in data["label"]])
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    for i, row in enumerate(data.to_dict("records")):
        style = styles[row["label"]]
        ax.plot([row["low"], row["high"]], [-i, -i], color=style.colour, lw=1.8, solid_capstyle="butt")
        ax.plot([row["survival"]], [-i], marker=style.marker, ms=6.5, color=style.colour, clip_on=False)
        beside(ax, -i, f"{row['k']}/{row['n']} unstable", at=1.04)


def f11_data(frames: Frames) -> pd.DataFrame:
    """Effect of each setting: one row per factor, level and seed.

    A factor is the manifold or the optimizer of a kind of module, or an axis of the grid. Two runs of a grid
    are matched that share the seed and whose configs differ in the factor alone; `difference` is the loss
    at `level` minus the loss at `base`, the mean over a seed's matched pairs of which both are finite.
    `base` is the level with the most pairs, the first of the grid among equals. `pairs` and `lost` count
    the finite ones and those in which a run diverged.
    """
    columns = ["factor", "level", "base", "seed", "difference", "pairs", "lost", "run_ids"]
    done = frames.runs[frames.runs["final_val_loss"].notna()]
    rows = [row for factor, runs in _by_factor(frames, done).items() for row in _effects(factor, runs)]
    return pd.DataFrame(rows, columns=columns)


def _by_factor(frames: Frames, done: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By factor, these runs with its `level` as text, and `alike`: equal where all but the factor is."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for _, runs in done.groupby(["family", "label"], sort=False):
        cell, config = runs.iloc[0], trained(frames, runs)
        levels: list[tuple[str, str, object]] = []
        for path, level in config.items():
            if found := MODULE_FACTOR.fullmatch(path):
                rest = {other: value for other, value in config.items() if other != path}
                levels.append((" ".join(found.groups()), str(level), (cell["family"], sorted(rest.items()))))
        for path in frames.axes:  # which may set several keys: the arm stands for all that no axis sets
            others = [plain(cell[other]) for other in frames.axes if other != path]
            levels.append((path, plain(cell[path]), (cell["grid"], cell["arm"], others)))
        own = runs[["run_id", "seed", "final_val_loss"]]
        for factor, level, alike in levels:
            parts.setdefault(factor, []).append(own.assign(level=level, alike=repr(alike)))
    return {factor: pd.concat(own, ignore_index=True) for factor, own in parts.items()}


def _effects(factor: str, runs: pd.DataFrame) -> list[dict[str, Any]]:
    both = runs.merge(runs, on=["seed", "alike"], suffixes=("", "_base"))
    both = both[both["level"] != both["level_base"]].drop_duplicates(["run_id", "run_id_base"])
    if both.empty:
        return []
    order = list(dict.fromkeys(runs["level"]))
    counts = both["level_base"].value_counts()
    base = max(order, key=lambda level: (counts.get(level, 0), -order.index(level)))
    both = both[both["level_base"] == base]
    with np.errstate(invalid="ignore"):
        both = both.assign(difference=both["final_val_loss"] - both["final_val_loss_base"])
    rows = []
    for (level, seed), pairs in both.groupby(["level", "seed"], sort=False):
        finite = pairs.loc[np.isfinite(pairs["difference"]), "difference"]
        rows.append(
            {
                "factor": factor,
                "level": str(level),
                "base": base,
                "seed": seed,
                "difference": float(finite.mean()) if len(finite) else math.nan,
                "pairs": len(finite),
                "lost": len(pairs) - len(finite),
                "run_ids": " ".join(dict.fromkeys([*pairs["run_id"], *pairs["run_id_base"]])),
            }
        )
    return rows


def f11(frames: Frames) -> Figure:
    """Forest plot of what each level of each setting does to the final loss.

    Raises:
        NoDataError: no two finished runs differ in one setting alone.
    """
    data = f11_data(frames)
    if data.empty:
        raise NoDataError("F11 needs finished runs of one seed that differ in one setting alone")
    palette = arm_styles([f"factor {i}" for i in range(data["factor"].nunique())])
    rows = []
    for style, (factor, levels) in zip(palette.values(), data.groupby("factor", sort=False), strict=False):
        for level, seeds in levels.groupby("level", sort=False):
            finite = seeds["difference"].dropna().tolist()
            lost, pairs = int(seeds["lost"].sum()), int(seeds["lost"].sum() + seeds["pairs"].sum())
            note = f"{lost} of {pairs} pairs diverged" if lost else f"{pairs} pairs"
            name = f"{factor}: {level} − {seeds['base'].iloc[0]}"
            rows.append(Row(name, style, tuple(finite), paired_t(finite), note, False, not lost))
    by_label = labelled(frames, [i for ids in data["run_ids"] for i in ids.split()])
    caption = (
        "F11. What one setting does to the final validation loss (nats per token), all others alike: the "
        "mean over the matched pairs of a seed (small marks), then over seeds, with the 95% t interval. "
        "Pairs in which a run diverged have no difference and are counted. Exploratory, not adjusted for the "
        f"number of comparisons. {counted(frames, by_label)}."
    )
    with look():
        figure = _forest(rows, "Final loss, one setting changed")
        return described(
            figure, "F11. Effects of settings", caption, [r for v in by_label.values() for r in v]
        )
