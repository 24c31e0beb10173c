"""F3: which matrices of the model each arm keeps on which manifold, drawn from the configs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from analysis.figures.drawing import WIDTH, NoDataError, counted, described, labelled, plain
from analysis.load import Frames
from analysis.theme import INK, MANIFOLDS, MUTED, RULE, arm_styles, look

KINDS = {"attn": "attention", "mlp": "MLP"}
VARIES = "varies"
BLOCKS = 3.6
"""Inches that the drawing of the model is high at most."""


def f3_data(frames: Frames) -> pd.DataFrame:
    """One row per arm and kind of module: `manifold`, `optimizer`, `lr_multiplier` and `weight_decay` of
    its matrices (`varies` where the cells of the grid differ in it) and the `run_ids` that say so."""
    rows = []
    for arm, runs in frames.runs.groupby("arm", sort=False):
        configs = {r: frames.configs[r].get("config") or {} for r in runs["run_id"] if r in frames.configs}
        kinds = dict.fromkeys(k for config in configs.values() for k in config.get("assignment") or {})
        for kind in kinds:
            found = [config["assignment"][kind] for config in configs.values() if config.get("assignment")]
            row = {
                key: _one(found, key) for key in ("manifold", "optimizer", "lr_multiplier", "weight_decay")
            }
            rows.append({"arm": str(arm), "module": kind, **row, "run_ids": " ".join(configs)})
    columns = ["arm", "module", "manifold", "optimizer", "lr_multiplier", "weight_decay", "run_ids"]
    return pd.DataFrame(rows, columns=columns)


def _one(assignments: list[Mapping[str, Any]], key: str) -> Any:
    values = list(dict.fromkeys(a.get(key) for a in assignments))
    return values[0] if len(values) == 1 else VARIES


def f3(frames: Frames) -> Figure:
    """The model as blocks, and beside it a row of cells per arm.

    Raises:
        NoDataError: no run has its config yet.
    """
    data = f3_data(frames)
    if data.empty:
        raise NoDataError("F3 needs the config of a run: none has begun")
    models = [_model(frames.configs[r]) for r in dict.fromkeys(" ".join(data["run_ids"]).split())]
    arms = data["arm"].nunique()
    with look():
        height = max(4.3, 0.75 + 0.42 * arms)
        figure = Figure(figsize=(WIDTH, height))
        blocks = figure.add_axes((0.0, 0.0, 3.5 / WIDTH, 1.0))
        _blocks(blocks, models, data, height)
        cells = figure.add_axes((3.6 / WIDTH, 0.0, 1 - 3.6 / WIDTH, 1.0))
        _cells(cells, frames, data, height)
        by_label = labelled(frames, [i for ids in data["run_ids"] for i in ids.split()])
        caption = (
            "F3. What each arm is: the manifold on which it keeps the attention and the MLP matrices of "
            "every block, and the optimizer that moves them. All other parameters go to AdamW. From the "
            f"configs of {counted(frames, by_label)}."
        )
        return described(figure, "F3. Assignments", caption, [r for ids in by_label.values() for r in ids])


def _model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return (config.get("config") or {}).get("model") or {}


def _sizes(models: list[Mapping[str, Any]], key: str) -> str:
    """`12`, or `4 to 24` where the runs differ."""
    values = sorted({m[key] for m in models if m.get(key) is not None})
    return " to ".join(f"{v:,}" for v in dict.fromkeys((values[0], values[-1]))) if values else "?"


def _blocks(ax: Any, models: list[Mapping[str, Any]], data: pd.DataFrame, height: float) -> None:
    """Bottom to top: embedding, a block (repeated), head. In inches."""
    ax.set_axis_off()
    ax.set_xlim(0, 3.5)
    ax.set_ylim(0, height)
    family = " or ".join(dict.fromkeys(str(m.get("family", "gpt2")) for m in models))
    llama = "llama" in family
    norm, act = ("RMSNorm", "SwiGLU") if llama else ("LayerNorm", "GELU")
    into = "w1, w3" if llama else "c_fc"
    parts = [
        ("tokens and positions → embedding", None),
        (norm, None),
        ("attention: c_attn (Q, K, V), c_proj", "attn"),
        (norm, None),
        (f"MLP: {into}, {act}, {'w2' if llama else 'c_proj'}", "mlp"),
        (f"{norm}, head → loss", None),
    ]
    top, x, width = height - 0.55, 0.55, 2.75
    bottom = max(0.35, top - BLOCKS)
    pitch = (top - bottom) / len(parts)
    box = min(0.42, 0.72 * pitch)
    centres = [bottom + (i + 0.5) * pitch for i in range(len(parts))]
    _round(ax, x - 0.16, centres[1] - 0.57 * pitch, width + 0.32, 4.14 * pitch, MUTED, dashed=True)
    ax.text(
        0.2, (centres[1] + centres[4]) / 2, f"× {_sizes(models, 'n_layer')} blocks", rotation=90, va="center",
        ha="center", fontsize="small",
    )  # fmt: skip
    for y, above in itertools.pairwise(centres):
        ax.annotate(
            "", xy=(x + width / 2, above - box / 2), xytext=(x + width / 2, y + box / 2),
            arrowprops={"arrowstyle": "-|>", "color": MUTED, "lw": 0.9, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
    for i in (1, 3):  # what a norm and its module add to
        start, end, side = centres[i] - pitch / 2, centres[i + 1] + pitch / 2, x + width + 0.07
        ax.plot([x + width / 2, side, side, x + width / 2], [start, start, end, end], color=MUTED, lw=0.9)
    for y, (text, kind) in zip(centres, parts, strict=True):
        manifold = kind in set(data["module"])
        _round(ax, x, y - box / 2, width, box, INK if manifold else RULE)
        ax.text(
            x + width / 2, y, text, ha="center", va="center", fontsize="small",
            fontweight="bold" if manifold else "normal", color=INK,
        )  # fmt: skip
    size = f"width {_sizes(models, 'd_model')}, {_sizes(models, 'n_head')} heads, context "
    ax.text(x + width / 2, height - 0.28, f"{family}: {size}{_sizes(models, 'context')}", ha="center",
            va="center", fontsize="small")  # fmt: skip


def _round(
    ax: Any, x: float, y: float, width: float, height: float, colour: str, *, dashed: bool = False
) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.06",
            fc="none",
            ec=colour,
            lw=1.0,
            ls="--" if dashed else "-",
        )
    )


def _cells(ax: Any, frames: Frames, data: pd.DataFrame, height: float) -> None:
    """A row per arm, a column per kind of module. In inches."""
    width = WIDTH - 3.6
    ax.set_axis_off()
    ax.set_xlim(0, width)
    ax.set_ylim(0, height)
    arms = list(dict.fromkeys(data["arm"]))
    kinds = list(dict.fromkeys(data["module"]))
    styles = arm_styles(frames.arms)
    names = 0.45 + 0.085 * max(len(arm) for arm in arms)
    column = (width - names - 0.1) / len(kinds)
    pitch = min(0.62, (height - 0.75) / len(arms))
    top = height - 0.55 - max(0.0, (height - 0.9 - pitch * len(arms)) / 2)
    for j, kind in enumerate(kinds):
        head = f"{KINDS.get(kind, kind)} matrices"
        ax.text(names + j * column, top + 0.14, head, fontsize="medium", fontweight="bold", va="center")
    for i, arm in enumerate(arms):
        y = top - (i + 1) * pitch
        style = styles[arm]
        ax.plot([0.12], [y + pitch / 2], marker=style.marker, color=style.colour, ms=6)
        ax.text(0.28, y + pitch / 2, arm, va="center", fontweight="bold")
        for j, kind in enumerate(kinds):
            own = data[(data["arm"] == arm) & (data["module"] == kind)]
            if len(own):
                _cell(ax, own.iloc[0], names + j * column, y, column, pitch)


def _cell(ax: Any, row: pd.Series[Any], x: float, y: float, width: float, pitch: float) -> None:
    colour = MANIFOLDS.get(row["manifold"], MUTED)
    ax.add_patch(Rectangle((x, y + 0.04), width - 0.1, pitch - 0.08, fc=colour, ec="none", alpha=0.18))
    ax.add_patch(Rectangle((x, y + 0.04), 0.07, pitch - 0.08, fc=colour, ec="none"))
    words = {"none": "no manifold", VARIES: "manifold varies"}.get(row["manifold"], row["manifold"])
    optimizer = {"muon": "Muon", "adamw": "AdamW"}.get(row["optimizer"], row["optimizer"])
    if row["manifold"] not in ("none", VARIES) and row["optimizer"] == "muon":
        optimizer = "Manifold Muon"
    multiplier, decay = row["lr_multiplier"], row["weight_decay"]
    extra = [] if pd.isna(multiplier) or multiplier == 1 else [f"lr × {plain(multiplier)}"]
    extra += [] if pd.isna(decay) else [f"decay {plain(decay)}"]
    ax.text(x + 0.16, y + pitch / 2, words, va="center", fontweight="bold", fontsize="small")
    ax.text(x + width - 0.2, y + pitch / 2, ", ".join([optimizer, *extra]), va="center", ha="right",
            fontsize="small")  # fmt: skip
