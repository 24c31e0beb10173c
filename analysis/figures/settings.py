"""Final loss against what was set: learning rate (F6), learning rate and decay (F7), size (F12)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter, NullLocator

from analysis.figures.drawing import (
    WIDTH,
    NoDataError,
    axis_called,
    colour_bar,
    counted,
    described,
    labelled,
    plain,
    say,
    short_name,
    without,
)
from analysis.load import Frames
from analysis.stats import clopper_pearson, lr_sensitivity, median, paired_t
from analysis.tables import REFERENCES
from analysis.theme import HEAT, INK, VARIANTS, Style, arm_styles, direct_labels, ink_on, look

RATES = ("lr", "lr_multiplier")
DECAYS = ("weight_decay",)
SENSITIVITIES = 6
"""Lines of F6 whose sensitivity its caption tells."""


def f6_data(frames: Frames) -> pd.DataFrame:
    """One row per finished run of a grid with a learning rate among its axes: `line` (arm and the other
    axes), `lr`, `loss` (final, nats per token, +inf where it diverged) and `unstable`.

    Raises:
        NoDataError: no axis is a learning rate, or no run has finished.
    """
    axis = axis_called(frames, *RATES)
    if axis is None:
        raise NoDataError("F6 needs a grid with a learning rate among its axes")
    done = frames.runs[frames.runs["final_val_loss"].notna() & frames.runs[axis].notna()]
    if done.empty:
        raise NoDataError("F6 needs finished runs: none yet")
    lines = {label: without(frames, label, axis) for label in done["label"].unique()}
    return pd.DataFrame(
        {
            "run_id": done["run_id"],
            "arm": done["arm"],
            "line": done["label"].map(lines),
            "lr": done[axis].astype(float),
            "loss": done["final_val_loss"],
            "unstable": done["unstable"].fillna(True).astype(bool) | ~np.isfinite(done["final_val_loss"]),
        }
    ).reset_index(drop=True)


def f6(frames: Frames) -> Figure:
    """Final loss against the learning rate, and the share of unstable runs.

    Raises:
        NoDataError: see `f6_data`.
    """
    data = f6_data(frames)
    axis = axis_called(frames, *RATES)
    with look():
        styles = _line_styles(frames, data)
        figure, left, right = _pair([short_name(str(line)) for line in styles])
        limits = _finite_limits(data["loss"])
        _rate_losses(left, data, styles, limits)
        _rate_failures(right, data, styles)
        for ax in (left, right):
            _rate_axis(ax, data["lr"], str(axis))
        by_label = labelled(frames, data["run_id"])
        lines = list(data.groupby("line", sort=False))[:SENSITIVITIES]
        told = "; ".join(_sensitivity(str(line), own) for line, own in lines)
        caption = (
            f"F6. Final validation loss (nats per token) against {axis}: one mark per run, line: median "
            "over seeds with a diverged run as +∞, × at the edge: diverged. Right: unstable runs, the "
            "share with its 95% Clopper–Pearson interval. Range of the median within a factor of 4 of the "
            f"best rate: {told}. {counted(frames, by_label)}."
        )
        return described(figure, "F6. Learning rates", caption, data["run_id"])


def _sensitivity(line: str, own: pd.DataFrame) -> str:
    found = lr_sensitivity(zip(own["lr"], own["loss"], strict=True))
    if math.isnan(found.best_lr):
        return f"{line} diverges everywhere"
    edge = ", the edge of those tried" if found.at_edge else ""
    spread = (
        "∞" if math.isinf(found.spread) else "unknown" if math.isnan(found.spread) else f"{found.spread:.4f}"
    )
    return f"{line} {spread} (best {plain(found.best_lr)}{edge})"


def _line_styles(frames: Frames, data: pd.DataFrame) -> dict[str, Style]:
    base, seen, styles = arm_styles(frames.arms), dict[str, int](), dict[str, Style]()
    for line, arm in dict(zip(data["line"], data["arm"], strict=True)).items():
        variant = seen[arm] = seen.get(arm, -1) + 1
        own = base[arm]
        styles[str(line)] = Style(
            own.colour, own.marker, VARIANTS[variant % len(VARIANTS)] if variant else own.line
        )
    return styles


def _pair(names: list[str], height: float = 4.1) -> tuple[Figure, Any, Any]:
    """Two panels with a strip for names at the right of each."""
    before, top, bottom = 0.75, 0.4, 0.6
    strip = 0.75 + 0.076 * max([len(name) for name in names], default=8)
    height = max(height, top + bottom + 0.172 * len(names))
    width = 2 * (before + 3.3 + strip)
    figure = Figure(figsize=(width, height))
    size = (3.3 / width, 1 - (top + bottom) / height)
    left, right = (figure.add_axes((x + before / width, bottom / height, *size)) for x in (0, 0.5))
    return figure, left, right


def _finite_limits(values: pd.Series[float]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if finite.empty:
        return 0.0, 1.0
    pad = 0.08 * (finite.max() - finite.min()) or 0.05
    return float(finite.min()) - pad, float(finite.max()) + pad


def _rate_axis(ax: Any, rates: pd.Series[float], name: str) -> None:
    tried = sorted(rates.unique())
    ax.set_xlabel(name)
    if tried[0] > 0:
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlim(tried[0] / 1.3, tried[-1] * 1.3)
    ax.set_xticks(tried, [plain(float(t)) for t in tried])


def _rate_losses(ax: Any, data: pd.DataFrame, styles: dict[str, Style], limits: tuple[float, float]) -> None:
    low, high = limits
    ax.set_title("Final loss")
    ax.set_ylabel("final validation loss (nats per token)")
    ax.set_ylim(low, high)
    labels = []
    for line, style in styles.items():
        own = data[data["line"] == line]
        middle = own.groupby("lr")["loss"].agg(lambda values: median(values.tolist()))
        ax.plot(own["lr"], own["loss"].where(np.isfinite(own["loss"])), ls="", marker=style.marker, ms=4.5,
                color=style.colour, alpha=0.7)  # fmt: skip
        ax.plot(middle.index, middle.where(np.isfinite(middle)), color=style.colour, lw=1.9, ls=style.line)
        lost = own.loc[~np.isfinite(own["loss"]), "lr"]
        ax.plot(lost, [high] * len(lost), ls="", marker="x", ms=7, mew=2, color=style.colour, clip_on=False)
        end = float(middle.iloc[-1]) if math.isfinite(middle.iloc[-1]) else high
        labels.append((end, short_name(line), style.colour))
    direct_labels(ax, labels)


def _rate_failures(ax: Any, data: pd.DataFrame, styles: dict[str, Style]) -> None:
    ax.set_title("Unstable runs")
    ax.set_ylabel("share of finished runs")
    ax.set_ylim(-0.03, 1.03)
    labels = []
    for i, (line, style) in enumerate(styles.items()):
        shares = data[data["line"] == line].groupby("lr")["unstable"].agg(["sum", "count"])
        shift = 1.035 ** (i - (len(styles) - 1) / 2)  # side by side
        for lr, hit, n in shares.itertuples():
            found = clopper_pearson(int(hit), int(n))
            ax.plot([lr * shift] * 2, [found.low, found.high], color=style.colour, lw=1.2, alpha=0.6)
        share = shares["sum"] / shares["count"]
        look = {"color": style.colour, "ls": style.line, "marker": style.marker, "clip_on": False}
        ax.plot(share.index * shift, share, lw=1.2, ms=5, **look)
        hit, n = int(shares["sum"].sum()), int(shares["count"].sum())
        labels.append((float(share.iloc[-1]), f"{short_name(line)} {hit}/{n}", style.colour))
    direct_labels(ax, labels)


def f7_data(frames: Frames) -> pd.DataFrame:
    """One row per cell of learning rate x decay: `panel` (arm and the other axes), `lr`, `decay`, `loss`
    (median over seeds, a diverged run as +inf), `k` of `n` finished runs unstable, `run_ids`.

    Raises:
        NoDataError: the grid has no learning rate and decay among its axes, or no run has finished.
    """
    rate, decay = axis_called(frames, *RATES), axis_called(frames, *DECAYS)
    if rate is None or decay is None:
        raise NoDataError("F7 needs a grid with a learning rate and a weight decay among its axes")
    done = frames.runs[frames.runs["final_val_loss"].notna()].dropna(subset=[rate, decay])
    if done.empty:
        raise NoDataError("F7 needs finished runs: none yet")
    rows = []
    for label, runs in done.groupby("label", sort=False):
        bad = runs["unstable"].fillna(True).astype(bool) | ~np.isfinite(runs["final_val_loss"])
        rows.append(
            {
                "panel": without(frames, str(label), rate, decay),
                "lr": float(runs[rate].iloc[0]),
                "decay": float(runs[decay].iloc[0]),
                "loss": median(runs["final_val_loss"].tolist()),
                "k": int(bad.sum()),
                "n": len(runs),
                "run_ids": " ".join(runs["run_id"]),
            }
        )
    return pd.DataFrame(rows)


def f7(frames: Frames) -> Figure:
    """Heat maps of the final loss over learning rate and decay, one per arm, hatched where runs are unstable.

    Raises:
        NoDataError: see `f7_data`.
    """
    data = f7_data(frames)
    panels = list(dict.fromkeys(data["panel"]))
    rates, decays = sorted(data["lr"].unique()), sorted(data["decay"].unique())
    finite = data.loc[np.isfinite(data["loss"]), "loss"]
    scale = Normalize(*((finite.min(), finite.max()) if len(finite) else (0.0, 1.0)))
    with look():
        figure, axes, bar = _map_canvas(len(panels), len(decays))
        for ax, panel in zip(axes, panels, strict=True):
            ax.set_title(short_name(panel))
            _map(ax, data[data["panel"] == panel], rates, decays, scale)
            ax.set_xlabel(str(axis_called(frames, *RATES)).rpartition(".")[2])
            ax.set_ylabel(str(axis_called(frames, *DECAYS)).rpartition(".")[2])
        mappable = ScalarMappable(scale, colormaps[HEAT].reversed())
        colour_bar(bar, mappable, "final loss (nats)")
        by_label = labelled(frames, [i for ids in data["run_ids"] for i in ids.split()])
        by = f"{axis_called(frames, *RATES)} and {axis_called(frames, *DECAYS)}"
        caption = (
            f"F7. Final validation loss (nats per token), median over seeds, by {by}; one colour scale for "
            "all panels. Hatched: unstable runs, k of n finished ones; grey: the median run diverged. "
            f"Outlined: lowest of its panel. {counted(frames, by_label)}."
        )
        return described(
            figure, "F7. Learning rate and decay", caption, [r for v in by_label.values() for r in v]
        )


def _map_canvas(panels: int, rows: int) -> tuple[Figure, list[Any], Any]:
    """Two panels a row, and a colour bar at the right."""
    lines = math.ceil(panels / 2)
    tall = max(1.6, 0.42 * rows)
    pitch = tall + 1.05
    height = lines * pitch + 0.1
    figure = Figure(figsize=(WIDTH, height))
    wide = (WIDTH - 1.15 - 2 * 0.95) / 2
    axes = []
    for i in range(panels):
        row, column = divmod(i, 2)
        x, y = 0.8 + column * (wide + 0.95), height - (row + 1) * pitch + 0.6
        axes.append(figure.add_axes((x / WIDTH, y / height, wide / WIDTH, tall / height)))
    bar = figure.add_axes(((WIDTH - 1.0) / WIDTH, 1 - (pitch - 0.6) / height, 0.14 / WIDTH, tall / height))
    return figure, axes, bar


def _map(ax: Any, cells: pd.DataFrame, rates: list[float], decays: list[float], scale: Normalize) -> None:
    heat = colormaps[HEAT].reversed()
    ax.set_xlim(0, len(rates))
    ax.set_ylim(0, len(decays))
    ax.set_xticks([i + 0.5 for i in range(len(rates))], [plain(r) for r in rates])
    ax.set_yticks([i + 0.5 for i in range(len(decays))], [plain(d) for d in decays])
    ax.tick_params(length=0)
    ax.grid(visible=False)
    best = cells["loss"].min()
    for cell in cells.to_dict("records"):
        x, y = rates.index(cell["lr"]), decays.index(cell["decay"])
        lost = not math.isfinite(cell["loss"])
        colour = "#8a8f98" if lost else heat(scale(cell["loss"]))
        ink = ink_on(colour)
        box = Rectangle((x + 0.02, y + 0.03), 0.96, 0.94, facecolor=colour, lw=0)
        if cell["k"]:
            box.set(hatch="////", edgecolor=ink)
        ax.add_patch(box)
        if cell["loss"] == best and not lost:
            ax.add_patch(Rectangle((x + 0.05, y + 0.07), 0.9, 0.86, fc="none", ec=ink, lw=1.6))
        text = "diverged" if lost else f"{cell['loss']:.3f}"
        text += f"\n{cell['k']}/{cell['n']}" if cell["k"] else ""
        behind = {"boxstyle": "square,pad=0.15", "fc": colour, "ec": "none"}
        ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize="small", color=ink, bbox=behind)


def f12_data(frames: Frames) -> pd.DataFrame:
    """One row per finished run: `line` (arm and the axes that say nothing about size), `parameters`, `loss`
    (final, nats per token, +inf where it diverged), and `minus_reference`, the difference to the reference
    arm's run of the same seed and cell (not finite where one of the two diverged, NaN without a partner).

    Raises:
        NoDataError: the finished runs are of one size.
    """
    sizes = {r: (c.get("provenance") or {}).get("parameters") for r, c in frames.configs.items()}
    done = frames.runs[frames.runs["final_val_loss"].notna()].copy()
    done["parameters"] = done["run_id"].map(sizes)
    done = done[done["parameters"].notna()]
    if done["parameters"].nunique() < 2:
        raise NoDataError("F12 needs finished runs of two sizes of model")
    sized = [p for p in frames.axes if (done.groupby(p)["parameters"].nunique() == 1).all()]
    lines = {label: without(frames, label, *sized) for label in done["label"].unique()}
    reference = _reference(frames)
    own = done.loc[done["arm"] == reference, ["family", "seed", "final_val_loss"]]
    pairs = done[["run_id", "family", "seed"]].merge(own, on=["family", "seed"]).drop_duplicates("run_id")
    partner = pairs.set_index("run_id")["final_val_loss"].reindex(done["run_id"]).to_numpy()
    with np.errstate(invalid="ignore"):
        difference = done["final_val_loss"].to_numpy() - partner
    return pd.DataFrame(
        {
            "run_id": done["run_id"],
            "arm": done["arm"],
            "line": done["label"].map(lines),
            "parameters": done["parameters"].astype(float),
            "loss": done["final_val_loss"],
            "minus_reference": difference,
        }
    ).reset_index(drop=True)


def _reference(frames: Frames) -> str:
    return next((arm for arm in REFERENCES if arm in frames.arms), frames.arms[0])


def f12(frames: Frames) -> Figure:
    """Final loss, and its difference to the reference arm, against the number of parameters.

    Raises:
        NoDataError: see `f12_data`.
    """
    data = f12_data(frames)
    reference = _reference(frames)
    with look():
        styles = _line_styles(frames, data)
        figure, left, right = _pair([short_name(line) for line in styles])
        _size_losses(left, data, styles)
        _size_differences(right, data[data["arm"] != reference], styles, reference)
        for ax in (left, right):
            low, high = data["parameters"].min(), data["parameters"].max()
            ax.set_xscale("log")
            ax.set_xlabel("parameters")
            ax.set_xlim(low / 1.25, high * 1.25)
            sizes = sorted(data["parameters"].unique())
            ax.set_xticks(sizes, [_size(size) for size in sizes])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_minor_formatter(NullFormatter())
        by_label = labelled(frames, data["run_id"])
        caption = (
            "F12. Final validation loss (nats per token) against the number of parameters (embeddings "
            "count): one mark per run, line: median over seeds, × at the edge: diverged. Right: difference "
            f"to {reference}, paired by seed: mean with its 95% t interval over the finite pairs, side by "
            f"side. {counted(frames, by_label)}."
        )
        return described(figure, "F12. Sizes", caption, data["run_id"])


def _size(parameters: float) -> str:
    """`168 k`, `124 M`."""
    power, unit = next((p, u) for p, u in ((1e9, " G"), (1e6, " M"), (1e3, " k"), (1, "")) if parameters >= p)
    return f"{parameters / power:.3g}{unit}"


def _size_losses(ax: Any, data: pd.DataFrame, styles: dict[str, Style]) -> None:
    _rate_losses(ax, data.rename(columns={"parameters": "lr"}), styles, _finite_limits(data["loss"]))


def _size_differences(ax: Any, data: pd.DataFrame, styles: dict[str, Style], reference: str) -> None:
    ax.set_title(f"Final loss, arm − {reference}")
    ax.set_ylabel("paired difference (nats per token)")
    finite = data[np.isfinite(data["minus_reference"])]
    if finite.empty:
        return say(ax, "no finite pairs")
    ax.axhline(0, color=INK, lw=0.9, zorder=1)
    labels = []
    shown = [line for line in styles if (finite["line"] == line).any()]
    for i, line in enumerate(shown):
        style, shift = styles[line], 1.03 ** (i - (len(shown) - 1) / 2)
        means = []
        for size, own in finite[finite["line"] == line].groupby("parameters"):
            found = paired_t(own["minus_reference"].tolist())
            means.append((size * shift, found.estimate))
            if not math.isnan(found.low):
                ax.plot([size * shift] * 2, [found.low, found.high], color=style.colour, lw=1.4, alpha=0.7)
        ax.plot(
            *zip(*means, strict=True), color=style.colour, lw=1.4, ls=style.line, marker=style.marker, ms=5.5
        )
        labels.append(
            (means[-1][1], f"{short_name(line)} {means[-1][1]:+.3f}".replace("-", "−"), style.colour)
        )
    ends = finite["minus_reference"]
    pad = 0.25 * (ends.max() - ends.min()) or 0.05
    ax.set_ylim(min(ends.min(), 0) - pad, max(ends.max(), 0) + pad)
    return direct_labels(ax, labels)
