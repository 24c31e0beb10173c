"""One look for every figure: colours, markers, line styles, and deterministic SVG and PNG.

Colours are from Okabe and Ito (2008), so that the five arms of the paper stay apart under colour
blindness. Names stand in ink beside the lines, and markers say the same again for print in grey.
"""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

_log = logging.getLogger(__name__)

PAPER = "#ffffff"
INK = "#1b1e23"
MUTED = "#757b85"
RULE = "#dcdfe4"
"""Grid lines. The report turns INK and RULE into the colour of its text, and PAPER into none."""

PAPER_ARMS = {
    "unconstrained": ("#5f5f5f", "s"),
    "all_stiefel": ("#009e73", "^"),
    "all_dgram": ("#d55e00", "D"),
    "hetero": ("#0072b2", "o"),
    "hetero_inv": ("#cc79a7", "v"),
}
OTHER_ARMS = (("#3a8fb7", "P"), ("#a6761d", "X"), ("#5e4fa2", "<"), ("#66842a", ">"), ("#c2475a", "h"))
VARIANTS: tuple[Any, ...] = ("-", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
"""Line styles of one arm's axis cells. Dashes are kept for what follows a bad evaluation."""
AFTER_BAD = (0, (3, 1.6))
MANIFOLDS = {
    "none": "#757b85",
    "stiefel": "#009e73",
    "dgram": "#d55e00",
    "oblique": "#a6761d",
    "spectral": "#0072b2",
}
"""Tints of the cells that name a manifold."""
DARK = {"#0072b2": "#56b4e9", "#5f5f5f": "#c8c8c8", "#5e4fa2": "#a79be0", "#a6761d": "#c9973a"}
"""Colours that a dark page replaces, because they are too dark to stand on it."""
HEAT = "cividis"
"""Colour map of heat maps: the same order in grey and under colour blindness."""
ON_DARK, ON_LIGHT = "#fcfcfc", "#101010"
"""Text on a coloured cell, which keeps its colour on a dark page; so does this text."""

FONTS = (
    "DejaVu Sans",
    *(f"Noto Sans CJK {region}" for region in ("SC", "TC", "JP", "KR")),
    *("WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
    *("Noto Emoji", "Symbola", "Apple Symbols", "Segoe UI Symbol"),
)
"""The first comes with matplotlib; the others, where they are installed, draw what it has no glyphs for."""

_RC = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # names come from people: "$" is a dollar sign
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",
    "svg.hashsalt": "mmsweep",
    "path.simplify": False,
}


@dataclass(frozen=True, slots=True)
class About:
    """What a figure shows, in words, and the runs it was made from; written into its files."""

    title: str
    caption: str
    run_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Style:
    colour: str
    marker: str
    line: Any = "-"


_ALL, _ATTENTION, _FFN, _OTHER = VARIANTS
_PLAIN, _STIEFEL, _SPECTRAL, _MUON, _BOTH = (
    PAPER_ARMS[arm] for arm in ("unconstrained", "all_stiefel", "all_dgram", "hetero", "hetero_inv")
)
MODULAR_ARMS = {
    "baseline": Style(*_PLAIN, _ALL),
    "muon_all": Style(*_MUON, _ALL),
    "muon_attention": Style(*_MUON, _ATTENTION),
    "muon_ffn": Style(*_MUON, _FFN),
    "stiefel_all": Style(*_STIEFEL, _ALL),
    "stiefel_attention": Style(*_STIEFEL, _ATTENTION),
    "stiefel_ffn": Style(*_STIEFEL, _FFN),
    "spectral_all": Style(*_SPECTRAL, _ALL),
    "manifold_muon": Style(*_BOTH, _ALL),
    "stiefel_all_decay": Style(*_STIEFEL, _OTHER),
    "baseline_no_decay": Style(*_PLAIN, _OTHER),
}
"""Colour says which method, the line which matrices it is on; five colours are as many as stay apart."""


def look() -> Any:
    """Context in which figures are built and written."""
    return mpl.rc_context({**_RC, "font.family": _fonts()})


@cache
def _fonts() -> list[str]:
    installed = font_manager.get_font_names()
    return [font for font in FONTS if font in installed]


def arm_styles(arms: Sequence[str]) -> dict[str, Style]:
    """The paper's arms keep their colour everywhere, and so do those of the modular-manifolds plan where
    there are no others; the rest take the next of a fixed cycle."""
    if set(arms) <= set(MODULAR_ARMS):
        return {arm: MODULAR_ARMS[arm] for arm in arms}
    others = [arm for arm in arms if arm not in PAPER_ARMS]
    cycle = {arm: OTHER_ARMS[i % len(OTHER_ARMS)] for i, arm in enumerate(others)}
    return {arm: Style(*(PAPER_ARMS.get(arm) or cycle[arm])) for arm in arms}


MOST_LEADERS = 12
"""Lines from curves to their names; more would cross the names."""


def direct_labels(ax: Any, labels: Sequence[tuple[float, str, str]]) -> None:
    """Name lines at the right edge: `(y in data units, text, colour)`, pushed apart where they are close.

    Beyond `MOST_LEADERS` names no lines lead to them; they stand in the order of their values. Call it
    last: it needs the final limits and scale of `ax`.
    """
    figure = ax.get_figure()
    height = ax.get_position().height * figure.get_figheight() * 72  # points
    gap = 1.35 * mpl.rcParams["font.size"] / height
    wanted = sorted((_fraction(ax, y), text, colour) for y, text, colour in labels)
    crowded = len(wanted) > MOST_LEADERS
    for (at, text, colour), place in zip(wanted, spread([w[0] for w in wanted], gap), strict=True):
        ax.annotate(
            text,
            xy=(1.02, place) if crowded else (1.0, at),
            xytext=(1.05, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize="small",
            fontweight="bold",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 1.8,
                "shrinkA": 2,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def _fraction(ax: Any, y: float) -> float:
    low, high = ax.get_ylim()
    if ax.get_yscale() == "log":
        low, high, y = (math.log10(max(v, 1e-300)) for v in (low, high, y))
    return min(max(float((y - low) / (high - low)), 0.0), 1.0)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved as little as needed to be `gap` apart: least squares, then kept in view."""
    blocks: list[list[float]] = []  # [sum of (place - offset), count]
    for i, place in enumerate(places):
        blocks.append([place - i * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    level = [total / count for total, count in blocks for _ in range(int(count))]
    top = 1.0 - (len(places) - 1) * gap
    return [min(max(base, 0.0), max(top, 0.0)) + i * gap for i, base in enumerate(level)]


def ink_on(colour: Any) -> str:
    """Text colour that can be read on a cell of this colour (relative luminance of WCAG 2)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return ON_LIGHT if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else ON_DARK


def svg(figure: Figure) -> bytes:
    """The figure as SVG: the same figure gives the same bytes."""
    return _saved(figure, "svg", {"Date": None, "Creator": None})


def png(figure: Figure, *, dpi: int = 144) -> bytes:
    """The figure as PNG: the same figure and libraries give the same bytes."""
    return _saved(figure, "png", {"Software": None}, dpi=dpi)


def _saved(figure: Figure, kind: str, metadata: dict[str, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    about = getattr(figure, "about", None)
    if about is not None:
        runs = f" Runs: {' '.join(about.run_ids)}" if about.run_ids else ""
        metadata = {**metadata, "Title": about.title, "Description": about.caption + runs}
    with look(), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        figure.savefig(buffer, format=kind, metadata=metadata, **options)
    missing = set()
    for warning in heard:
        if glyph := re.match(r"Glyph (\d+) ", str(warning.message)):
            missing.add(chr(int(glyph[1])))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    _say(missing - _said)
    return buffer.getvalue()


_said: set[str] = set()


def _say(missing: set[str]) -> None:
    """Tell once of characters that figures show as boxes."""
    if missing:
        _said.update(missing)
        found = " ".join(sorted(missing))
        _log.warning(
            f"figures: no font here has {found}; boxes stand for them. Noto Sans CJK has most scripts"
        )
