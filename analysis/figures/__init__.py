"""Figures as functions of frames: each says what it shows, and of how many runs (`figure.about`).

The numbers of a figure come from its data function (`f4_data` and so on, or a table), so that they can be
read and tested without drawing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from analysis.figures.curves import (
    f1,
    f1_caption,
    f2,
    f2_caption,
    f2_qkv,
    f9,
    f9_data,
    modular,
    modular_caption,
    overview,
)
from analysis.figures.drawing import NoDataError
from analysis.figures.inside import f8, f8_data, f10
from analysis.figures.outcomes import f4, f4_data, f5, f5_data, f11, f11_data
from analysis.figures.schematic import f3, f3_data
from analysis.figures.settings import f6, f6_data, f7, f7_data, f12, f12_data
from analysis.load import Frames

__all__ = [
    "FIGURES",
    "NoDataError",
    "Spec",
    "f1",
    "f1_caption",
    "f2",
    "f2_caption",
    "f2_qkv",
    "f3",
    "f3_data",
    "f4",
    "f4_data",
    "f5",
    "f5_data",
    "f6",
    "f6_data",
    "f7",
    "f7_data",
    "f8",
    "f8_data",
    "f9",
    "f9_data",
    "f10",
    "f11",
    "f11_data",
    "f12",
    "f12_data",
    "modular",
    "modular_caption",
    "overview",
]


@dataclass(frozen=True, slots=True)
class Spec:
    """A figure that a report can show."""

    id: str
    title: str
    caption: str
    """What it shows, in one sentence. The figure's own caption adds n, seeds and grid."""
    draw: Callable[[Frames], Figure]
    """Raises `NoDataError` where the frames lack what it needs."""
    records: tuple[str, ...]
    """Kinds of records that it is made from; "config" and "axes" are those of the runs."""


FIGURES = (
    Spec("f1", "Validation loss", "Validation loss over steps.", f1, ("evals",)),
    Spec("f2", "Singular values", "σ_max of attention and of MLP matrices over steps.", f2, ("spectra",)),
    Spec("f2_qkv", "Q, K and V", "σ_max of W_Q, W_K, W_V and their product.", f2_qkv, ("heads",)),
    Spec("f3", "Assignments", "Which matrices each arm keeps on which manifold.", f3, ("config",)),
    Spec("f4", "Paired differences", "Final loss of each arm minus a reference, by seed.", f4, ("evals",)),
    Spec("f5", "Runs still stable", "Share of runs still stable over steps.", f5, ("evals",)),
    Spec("f6", "Learning rates", "Final loss and unstable runs by learning rate.", f6, ("evals", "axes")),
    Spec("f7", "Rate and decay", "Final loss by learning rate and weight decay.", f7, ("evals", "axes")),
    Spec("f8", "Spectra by layer", "σ_max by layer and step.", f8, ("spectra",)),
    Spec("f9", "Attention", "Logits, entropy, ‖J‖ and largest weight over steps.", f9, ("attention",)),
    Spec(
        "f10",
        "What moved first",
        "First threshold crossings, their lead on the loss, and false alarms.",
        f10,
        ("spectra", "attention", "steps", "flow", "evals"),
    ),
    Spec("f11", "Effects of settings", "What one setting does to the final loss.", f11, ("evals", "config")),
    Spec("f12", "Sizes", "Final loss, and differences, by parameters.", f12, ("evals", "config")),
)
"""In the order in which a report shows them."""
