"""Curves over steps: validation loss, singular values, attention, and the modular-manifolds plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import mechanism
from analysis.figures.drawing import (
    Group,
    NoDataError,
    canvas,
    cross,
    described,
    finite_values,
    groups_of,
    ids_of,
    line,
    named,
    plain_decades,
    sample,
    say,
    shared_limits,
    step_axis,
    to_horizon,
    trends,
)
from analysis.load import Frames
from analysis.theme import INK, MODULAR_ARMS, MUTED, Style, direct_labels, look
from trainers.records import DIVERGED

ZOOM_FROM = 0.6
"""The right panel of F1 shows the steps after this share of the horizon."""


ZOOMED = 3
"""As many arms as it shows, so that those far above do not flatten them."""


def f1(frames: Frames) -> Figure:
    """Validation curves: all arms on the left, the stable ones near the end on the right."""
    with look():
        groups = groups_of(frames, frames.evals, "val_loss")
        figure, left, right = canvas(groups)
        _loss_panel(left, groups, frames)
        _zoom_panel(right, groups)
        return described(figure, "F1. Validation loss", f1_caption(frames), ids_of(groups))


def f1_caption(frames: Frames) -> str:
    groups = groups_of(frames, frames.evals, "val_loss")
    if not groups:
        return "F1. Validation loss. No evaluations yet."
    bad = sum(group.unstable for group in groups)
    marked = (
        f"{bad} of them unstable: × first bad evaluation, dashed after it" if bad else "none of them unstable"
    )
    _, chosen = _zoomed(groups)
    return (
        "F1. Validation loss (nats per token) against optimizer steps. "
        f"{sample(frames, groups)}, {marked}. Thin lines: one run each; thick: median over seeds. "
        f"Right: {chosen}, after {ZOOM_FROM:.0%} of the horizon; band: lowest to highest seed."
    )


def f2(frames: Frames) -> Figure:
    """The largest singular value of any attention matrix, and of any MLP matrix."""
    with look():
        attention, mlp = _sigma(frames, "attn"), _sigma(frames, "mlp")
        figure, left, right = canvas([*attention, *mlp])
        limits = shared_limits([*attention, *mlp])
        _sigma_panel(left, attention, frames, limits, "Attention: largest singular value")
        _sigma_panel(right, mlp, frames, limits, "MLP: largest singular value")
        ids = ids_of([*attention, *mlp])
        return described(figure, "F2. Largest singular values", f2_caption(frames), ids)


def f2_caption(frames: Frames) -> str:
    groups = _sigma(frames, "attn") or _sigma(frames, "mlp")
    if not groups:
        return "F2. Largest singular values. No spectra yet."
    matrices = frames.spectra.groupby("module")["matrix"].nunique()
    return (
        "F2. Largest singular value σ_max against optimizer steps: the maximum over the "
        f"{matrices.get('attn', 0)} attention matrices (left) and the {matrices.get('mlp', 0)} MLP matrices "
        f"(right) of each run. {sample(frames, groups)}. Thin lines: one run each; thick: median over seeds; "
        "× the last spectra of a run that diverged."
    )


PARTS = {"q": "W_Q", "k": "W_K", "v": "W_V", "qk": "W_QᵀW_K / √d_head, by head"}


def f2_qkv(frames: Frames) -> Figure:
    """The largest singular value of W_Q, W_K and W_V, and of the form that makes scores.

    Raises:
        NoDataError: no run recorded `heads`.
    """
    by_part = {part: _part(frames, part) for part in PARTS}
    every = [group for groups in by_part.values() for group in groups]
    if not every:
        raise NoDataError("F2b needs heads records: switch probes.heads on")
    with look():
        figure, *panels = canvas(every, rows=2)
        limits = shared_limits([group for part in "qkv" for group in by_part[part]])
        for ax, (part, words) in zip(panels, PARTS.items(), strict=True):
            groups = by_part[part]
            ax.set_title(words)
            ax.set_ylabel("σ_max, maximum over layers" + (" and heads" if part == "qk" else ""))
            if groups:
                trends(ax, groups, frames, shared_limits(groups) if part == "qk" else limits)
                _ends_of_diverged(ax, groups)
            else:
                say(ax, "no records")
        caption = (
            "F2b. Largest singular value σ_max of W_Q, W_K and W_V, the maximum over layers, and of "
            "W_QᵀW_K / √d_head, the maximum over layers and heads, against optimizer steps. "
            f"{sample(frames, every)}. Thin lines: one run each; thick: median over seeds; × diverged."
        )
        return described(figure, "F2b. Singular values of Q, K and V", caption, ids_of(every))


def _part(frames: Frames, part: str) -> list[Group]:
    """Of a whole part, all heads together; of "qk", which has heads alone, of each."""
    own = frames.heads[(frames.heads["part"] == part) & ((frames.heads["head"] == -1) | (part == "qk"))]
    return groups_of(frames, own, "sigma_max")


ATTENTION = {
    "logit": ("Largest attention logit", "q·k / √d_head, maximum over heads"),
    "entropy": ("Attention entropy, sharpest layer", "H / ln(tokens seen), mean over heads"),
    "jacobian_norm": ("Softmax Jacobian, smallest of any layer", "‖J‖_F, mean over heads"),
    "p_max": ("Largest attention weight, sharpest layer", "p_max, mean over heads"),
}


def f9_data(frames: Frames) -> pd.DataFrame:
    """One row per run and step: `logit` is the maximum over heads; the others are means over the heads of
    a layer, of the layer where entropy and ‖J‖_F are lowest and p_max is highest."""
    layers = mechanism.layer_means(frames).groupby(["run_id", "step"])
    values = pd.DataFrame(
        {
            "logit": frames.attention.groupby(["run_id", "step"])["max_logit"].max(),
            "entropy": layers["entropy"].min(),
            "jacobian_norm": layers["jacobian_norm"].min(),
            "p_max": layers["p_max"].max(),
        }
    )
    return values.reset_index()


def f9(frames: Frames) -> Figure:
    """How sharp attention is: logits, entropy, softmax Jacobian, largest weight.

    Raises:
        NoDataError: no run recorded `attention`.
    """
    data = f9_data(frames)
    if data.empty:
        raise NoDataError("F9 needs attention records: switch probes.attention on")
    bounds = {q.name: q.threshold for q in mechanism.QUANTITIES} | {"p_max": mechanism.SHARP}
    bounds["jacobian_norm"] = bounds["jacobian"]
    with look():
        by_column = {column: groups_of(frames, data, column) for column in ATTENTION}
        figure, *panels = canvas(by_column["logit"], rows=2)
        for ax, (column, (title, words)) in zip(panels, ATTENTION.items(), strict=True):
            ax.set_title(title)
            ax.set_ylabel(words)
            groups = by_column[column]
            top = {"entropy": 1.0, "p_max": 1.0, "jacobian_norm": 0.5}.get(column)
            trends(ax, groups, frames, (0.0, top, False) if top else shared_limits(groups))
            _ends_of_diverged(ax, groups)
            if ax.get_ylim()[0] < bounds[column] < ax.get_ylim()[1]:
                ax.axhline(bounds[column], color=MUTED, lw=0.9, ls=(0, (1, 2)), zorder=1)
        caption = (
            "F9. Attention on fixed sequences of the validation set, against optimizer steps: the largest "
            "logit of any head; entropy as a share of a uniform row's, ‖J‖_F of the softmax and its largest "
            "weight, each the mean over a layer's heads, of the layer where it is most extreme. ‖J‖_F is "
            "small for one-hot rows and for flat ones: read it beside p_max. Dotted: the bounds of F10. "
            f"{sample(frames, by_column['logit'])}. Thin lines: one run each; thick: median over seeds; × "
            "diverged."
        )
        return described(figure, "F9. Attention", caption, data["run_id"])


def overview(frames: Frames) -> Figure:
    """Loss and attention spectrum side by side: the picture for a README."""
    with look():
        groups, attention = groups_of(frames, frames.evals, "val_loss"), _sigma(frames, "attn")
        figure, left, right = canvas(groups)
        _loss_panel(left, groups, frames)
        limits = shared_limits(attention)
        _sigma_panel(right, attention, frames, limits, "Attention: largest singular value")
        ids = ids_of([*groups, *attention])
        return described(figure, "Overview", f1_caption(frames), ids)


SMOOTHED = 0.05
"""Gradient norms are drawn as running medians over this share of their records."""


def modular(frames: Frames) -> Figure:
    """The modular-manifolds plan: loss, σ_max at the end, norms of weights and of gradients by module."""
    with look():
        losses, norms, gradients = _modular_groups(frames)
        figure, loss, sigma, *rest = canvas(losses, rows=3)
        _loss_panel(loss, losses, frames)
        _end_panel(sigma, losses, frames)
        for what, by_kind, axes in (
            ("Frobenius norm ‖W‖_F, largest matrix", norms, rest[:2]),
            ("gradient norm, median over matrices", gradients, rest[2:]),
        ):
            limits = shared_limits([group for groups in by_kind for group in groups])
            for ax, groups, kind in zip(axes, by_kind, ("Attention", "MLP"), strict=True):
                ax.set_title(f"{kind}: {what.partition(',')[0]}")
                ax.set_ylabel(what)
                if groups:
                    trends(ax, groups, frames, limits)
                    _ends_of_diverged(ax, groups)
                else:
                    say(ax, "not recorded yet")
        ids = ids_of([group for groups in (losses, *norms, *gradients) for group in groups])
        return described(figure, "Modular manifolds", modular_caption(frames), ids)


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
        f"clip; running median over {SMOOTHED:.0%} of the records). {sample(frames, groups)}, {marked}. "
        "Thin lines: one run each; thick: median over seeds. Colour: method. Dash-dotted: on attention "
        "alone; dotted: on the MLP alone; dash-dot-dotted: decay switched; dashed: after the first bad "
        "evaluation."
    )


def _modular_groups(frames: Frames) -> tuple[list[Group], list[list[Group]], list[list[Group]]]:
    """Of losses, of norms by module kind, and of gradients by module kind."""

    def styled(long: pd.DataFrame, column: str) -> list[Group]:
        found = [g for g in groups_of(frames, long, column) if g.runs["arm"].iloc[0] in MODULAR_ARMS]
        return [replace(group, style=MODULAR_ARMS[group.runs["arm"].iloc[0]]) for group in found]

    norms, gradients = [], []
    for kind in ("attn", "mlp"):
        flow = frames.flow[frames.flow["module"] == kind]
        grads = flow.groupby(["run_id", "step"])["grad_norm"].median().reset_index()
        norms.append(styled(flow, "weight_norm"))
        gradients.append([_smoothed(group) for group in styled(grads, "grad_norm")])
    return styled(frames.evals, "val_loss"), norms, gradients


def _smoothed(group: Group) -> Group:
    window = max(1, round(SMOOTHED * len(group.values)))
    median = group.values.rolling(window, min_periods=1).median()
    return replace(group, values=median.where(group.values.notna()))


def _ends_of_diverged(ax: Any, groups: Sequence[Group]) -> None:
    for group in groups:
        for run_id in group.runs.loc[group.runs["status"] == DIVERGED, "run_id"]:
            series = group.values[run_id] if run_id in group.values else pd.Series(dtype=float)
            series = series[np.isfinite(series.to_numpy(dtype=float))]
            if len(series):
                cross(ax, series, int(series.index[-1]), ax.get_ylim()[1], group.style.colour)


def _end_panel(ax: Any, groups: Sequence[Group], frames: Frames) -> None:
    """σ_max at the last spectra of each run: one row of marks per arm, attention above the MLP."""
    ax.set_title("Largest singular value at the end")
    ax.set_xlabel("σ_max  (● attention, □ MLP, × diverged)")
    last = frames.spectra[frames.spectra["step"] == frames.spectra.groupby("run_id")["step"].transform("max")]
    ends = last.groupby(["run_id", "module"])["sigma_max"].max().unstack()
    low, high, logarithmic = shared_limits([Group("", Style(INK, ""), frames.runs, ends)])
    if ends.empty or not groups:
        return say(ax, "no spectra yet")
    if logarithmic:
        ax.set_xscale("log")
        plain_decades(ax.xaxis, low, high)
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
    ax.set_yticks([-row for row in range(len(groups))], [named(group) for group in groups])
    ax.tick_params(axis="y", length=0)
    return None


def _loss_panel(ax: Any, groups: Sequence[Group], frames: Frames) -> None:
    ax.set_title("Validation loss, all arms")
    ax.set_ylabel("validation loss (nats per token)")
    if not groups:
        return say(ax, "no evaluations yet")
    low, high = _loss_limits(groups)
    ax.set_ylim(low, high)
    for group in groups:
        for run_id, bad in group.first_bad.items():
            series = group.values[run_id].dropna()
            line(ax, series, group.style, bad, width=0.8, alpha=0.55)
            cross(ax, series, bad, high, group.style.colour)
        line(ax, group.median, group.style, group.turned, width=1.9)
    to_horizon(ax, frames)
    ends = [(group, "diverged" if group.diverged else f"{group.end:.3f}") for group in groups]
    direct_labels(ax, [(group.end, f"{named(group)} {said}", group.style.colour) for group, said in ends])
    return None


def _loss_limits(groups: Sequence[Group]) -> tuple[float, float]:
    """From the lowest loss to the highest after a tenth of the steps, so that the start does not
    flatten the rest; an explosion is cut at the loss of the start."""
    reach = max(group.values.index.max() for group in groups)
    every = finite_values([g.values for g in groups])
    late = finite_values([g.values[g.values.index > 0.1 * reach] for g in groups])
    start = finite_values([g.values.iloc[:1] for g in groups])
    low = float(every.min())
    high = float(late.max()) if len(late) else float(every.max())
    if len(start):
        high = min(high, float(start.max()))
    pad = 0.06 * (high - low) or 0.05
    return low - pad, high + pad


def _zoom_panel(ax: Any, groups: Sequence[Group]) -> None:
    shown, chosen = _zoomed(groups)
    ax.set_title(f"{chosen[0].upper()}{chosen[1:]}, late steps")
    ax.set_ylabel("validation loss (nats per token)")
    if not shown:
        return say(ax, "no finite loss yet")
    reach = max(group.median.index.max() for group in shown)
    late = [group.values[group.values.index >= ZOOM_FROM * reach] for group in shown]
    finite = finite_values(late)
    pad = 0.08 * (finite.max() - finite.min()) or 0.01 * max(abs(finite.max()), 1.0)
    ax.set_ylim(finite.min() - pad, finite.max() + pad)
    for group, values in zip(shown, late, strict=True):
        colour = group.style.colour
        if values.shape[1] > 1:
            ax.fill_between(
                values.index, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.18, lw=0
            )
        median = group.median
        line(ax, median[median.index >= ZOOM_FROM * reach], group.style, None, width=1.9, marker=True)
    ax.set_xlim(ZOOM_FROM * reach, max(reach, 1))
    step_axis(ax)
    direct_labels(ax, [(g.end, f"{named(g)} {g.end:.4f}", g.style.colour) for g in shown])
    return None


def _zoomed(groups: Sequence[Group]) -> tuple[list[Group], str]:
    """The groups of the zoomed panel, and what they are in words. Some may not have come so far yet."""
    finite = [group for group in groups if len(group.result) and not group.diverged]
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


def _sigma(frames: Frames, module: str) -> list[Group]:
    spectra = frames.spectra[frames.spectra["module"] == module]
    return groups_of(frames, spectra, "sigma_max")


def _sigma_panel(
    ax: Any, groups: Sequence[Group], frames: Frames, limits: tuple[float, float, bool], title: str
) -> None:
    ax.set_title(title)
    ax.set_ylabel("σ_max, maximum over matrices")
    if not groups:
        return say(ax, "no spectra yet")
    trends(ax, groups, frames, limits)
    return _ends_of_diverged(ax, groups)
