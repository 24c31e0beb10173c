from __future__ import annotations

import math
import re
import statistics
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from synthetic import Run, curve, grid_index, planted, write_store

from analysis import figures
from analysis.load import load
from analysis.theme import OTHER_ARMS, PAPER_ARMS, arm_styles, png, spread, svg

FIGURES = (figures.f1, figures.f2, figures.overview, figures.modular)
LITTLE = {
    "nothing yet": [Run("hetero", 0, [], status="pending")],
    "one evaluation": [Run("hetero", 0, [5.5], status="running")],
    "one run": [Run("hetero", 0, curve(2.4))],
    "one seed": [Run(arm, 0, curve(2.4)) for arm in PAPER_ARMS],
    "all diverged": [Run("all_dgram", s, [5.5, 4.0, math.nan], status="diverged") for s in (0, 1)],
    "nothing finite": [Run("all_dgram", 0, [math.nan], status="diverged")],
    "exploded": [Run("all_dgram", 0, [5.5, 4.0, 1e30, math.inf], attn_sigma=math.inf, status="diverged")],
    "constant": [Run("hetero", 0, [2.0] * 13)],
}


@pytest.fixture
def sweep(paper_frames):
    return paper_frames


def curves(ax, colour, style="-"):
    return [line for line in ax.lines if line.get_color() == colour and line.get_linestyle() == style]


@pytest.mark.parametrize("draw", FIGURES)
def test_the_same_frames_give_the_same_bytes(sweep, draw):
    assert svg(draw(sweep)) == svg(draw(sweep))


def test_the_same_frames_give_the_same_pixels(sweep):
    assert png(figures.f1(sweep)) == png(figures.f1(sweep))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", LITTLE)
def test_little_or_bad_data_still_makes_figures(tmp_path, name):
    frames = load(write_store(tmp_path, LITTLE[name]))
    for draw in FIGURES:
        ElementTree.fromstring(svg(draw(frames)))
    assert "nan" not in figures.f1_caption(frames) + figures.f2_caption(frames)


def test_f1_marks_the_first_bad_evaluation_and_is_dashed_after_it(sweep):
    left, _ = figures.f1(sweep).axes
    crosses = [line for line in left.lines if line.get_marker() == "x"]
    assert [line.get_xdata().tolist() for line in crosses] == [[225], [225]]
    colour = PAPER_ARMS["hetero_inv"][0]
    assert all(line.get_xdata().max() == 225 for line in curves(left, colour) if len(line.get_xdata()) > 1)
    dashed = curves(left, colour, "--")
    assert [(line.get_xdata().min(), line.get_xdata().max()) for line in dashed] == [(225, 300)] * 3
    assert not curves(left, PAPER_ARMS["hetero"][0], "--")


def test_f1_draws_the_median_and_each_seed_and_zooms_to_the_lowest_stable_arms(sweep):
    left, right = figures.f1(sweep).axes
    values = [line.get_ydata()[-1] for line in curves(left, PAPER_ARMS["hetero"][0])]
    runs = sweep.runs[sweep.runs["arm"] == "hetero"]["final_val_loss"]
    assert values == pytest.approx([*runs.tolist(), runs.median()])
    assert right.get_title(loc="left") == "Lowest 3 of 4 stable arms, late steps"
    shown = {line.get_color() for line in right.lines}
    assert shown == {PAPER_ARMS[arm][0] for arm in ("unconstrained", "all_stiefel", "hetero")}
    assert min(line.get_xdata().min() for line in right.lines) >= 180


def test_f1_says_when_no_arm_is_unstable(tmp_path):
    runs = [Run(arm, 0, curve(2.4 + i / 10)) for i, arm in enumerate(PAPER_ARMS)]
    frames = load(write_store(tmp_path, runs))
    assert figures.f1(frames).axes[1].get_title(loc="left") == "Lowest 3 (none is unstable), late steps"
    assert "none of them unstable" in figures.f1_caption(frames)


def test_f2_takes_the_largest_matrix_of_each_module_and_turns_logarithmic(sweep):
    attention, mlp = figures.f2(sweep).axes
    inverse = [line.get_ydata()[-1] for line in curves(attention, PAPER_ARMS["hetero_inv"][0])]
    assert inverse == pytest.approx([160.0, 176.0, 168.0])
    assert attention.get_yscale() == mlp.get_yscale() == "log"
    assert attention.get_ylim() == mlp.get_ylim()
    assert [line.get_ydata()[-1] for line in curves(mlp, PAPER_ARMS["hetero"][0])] == pytest.approx(
        [21, 24, 22.5]
    )


def test_f2_stays_linear_over_a_small_range(tmp_path):
    frames = load(write_store(tmp_path, [Run("unconstrained", 0, curve(2.4), attn_sigma=3.0, mlp_sigma=2.0)]))
    assert figures.f2(frames).axes[0].get_yscale() == "linear"


def test_the_arms_of_the_plan_have_lines_of_their_own(modular_frames):
    seen = {(style.colour, str(style.line)) for style in figures.MODULAR_ARMS.values()}
    assert len(seen) == len(figures.MODULAR_ARMS) == 11
    assert {colour for colour, _ in seen} == {colour for colour, _ in PAPER_ARMS.values()}
    assert set(modular_frames.arms) == set(figures.MODULAR_ARMS)


def test_the_plan_s_panels_show_norms_and_gradients_by_module(modular_frames):
    loss, sigma, attn_norm, mlp_norm, attn_grad, mlp_grad = figures.modular(modular_frames).axes
    held, free = figures.MODULAR_ARMS["stiefel_attention"], figures.MODULAR_ARMS["muon_ffn"]
    for ax, arm, end in ((attn_norm, held, 16.0), (mlp_norm, held, 51.2), (attn_norm, free, 56.0)):
        line = curves(ax, arm.colour, arm.line)[-1]  # the median is drawn last
        assert line.get_ydata()[-1] == pytest.approx(end)
    assert attn_norm.get_ylim() == mlp_norm.get_ylim()
    assert attn_grad.get_ylim() == mlp_grad.get_ylim()
    names = [label.get_text() for label in sigma.get_yticklabels()]
    assert names == list(modular_frames.arms)
    marks = {
        (round(float(line.get_xdata()[0]), 6), line.get_marker())
        for line in sigma.lines
        if line.get_color() == held.colour
    }
    assert {(1.0, "o"), (3.2, "s")} <= marks
    texts = [text.get_text() for text in loss.texts]
    assert len(texts) == 11
    caption = figures.modular_caption(modular_frames)
    assert 'n = 33 runs (3 of each of 11; seeds 0, 1, 2) of grid "modular_manifolds"' in caption
    assert "none of them diverged" in caption


def test_labels_of_the_plan_s_figure_do_not_overlap(modular_frames):
    figure = figures.modular(modular_frames)
    FigureCanvasAgg(figure).draw()
    for ax in figure.axes:
        boxes = [Text.get_window_extent(text) for text in ax.texts]  # without its arrow
        assert not [1 for a, b in combinations(boxes, 2) if a.overlaps(b)]
        assert all(box.x1 <= figure.bbox.width for box in boxes)


def test_a_diverged_run_is_crossed_where_it_ended(tmp_path):
    quick = {"steps": 100, "every": 50}
    runs = [planted("baseline", s, 4.0, **quick) for s in range(2)]
    runs += [planted("muon_all", 0, 4.0, losses=[5.0, math.nan], status="diverged", **quick)]
    frames = load(write_store(tmp_path, runs))
    loss, sigma, attn_norm, *_ = figures.modular(frames).axes
    colour = figures.MODULAR_ARMS["muon_all"].colour
    for ax, steps in ((loss, [50]), (attn_norm, [50]), (sigma, [pytest.approx(1 + 2.3 * 0.5**1.5)] * 2)):
        crosses = [line for line in ax.lines if line.get_marker() == "x"]
        assert {line.get_color() for line in crosses} == {colour}
        assert [line.get_xdata()[0] for line in crosses] == steps
    assert "1 of them diverged (×)" in figures.modular_caption(frames)


def test_captions_say_how_many_runs_of_what(sweep):
    for caption in (figures.f1_caption(sweep), figures.f2_caption(sweep)):
        assert 'n = 10 runs (2 of each of 5; seeds 0, 1) of grid "quickstart"' in caption


def test_captions_count_what_is_there_and_not_what_was_planned(tmp_path):
    runs = [Run("hetero", 0, curve(2.4)), Run("hetero", 1, [], status="pending")]
    frames = load(write_store(tmp_path, runs))
    assert "n = 1 run (1 of each of 1; seeds 0)" in figures.f1_caption(frames)


@pytest.mark.parametrize(("good", "bad", "reach"), [(3, 1, 75), (2, 2, 25), (1, 2, 25)])
def test_the_median_counts_a_diverged_seed_as_infinite(tmp_path, good, bad, reach):
    runs = [Run("hetero", s, [3.0, 2.5, 2.4, 2.3]) for s in range(good)]
    runs += [Run("hetero", 9 + s, [3.0, 2.7, math.nan], status="diverged") for s in range(bad)]
    left = figures.f1(load(write_store(tmp_path, runs))).axes[0]
    thick = [line for line in left.lines if line.get_linewidth() > 1.5 and line.get_marker() != "x"]
    drawn = dict(xy for line in thick for xy in zip(*line.get_data(), strict=True) if math.isfinite(xy[1]))
    assert max(drawn) == reach
    assert drawn[25] == pytest.approx(statistics.median([2.5] * good + [2.7] * bad))


def test_names_are_drawn_as_they_are_and_never_parsed(tmp_path):
    runs = [Run("hetero", 0, curve(2.4)), Run("unconstrained", 0, curve(2.5))]
    index = grid_index(runs)
    for cell, name in zip(index["cells"], ("$\\frac{1$", "--><script>alert(1)</script>"), strict=True):
        cell["arm"] = name
    frames = load(write_store(tmp_path, runs, index=index))
    for draw in FIGURES:
        text = svg(draw(frames))
        ElementTree.fromstring(text)
        assert b"<script" not in text


def test_paper_arms_keep_their_colour_whatever_stands_beside_them():
    alone, beside = arm_styles(["hetero"]), arm_styles(["oblique", "hetero", "adamw"])
    assert alone["hetero"] == beside["hetero"]
    assert len({style.colour for style in beside.values()}) == 3


def lab(hex_colour, matrix):
    """CIE L*a*b* of a colour as seen through `matrix` (linear RGB)."""
    rgb = [int(hex_colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    seen = [min(max(sum(m * c for m, c in zip(row, linear, strict=True)), 0), 1) for row in matrix]
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.089)
    xyz = [
        sum(m * c for m, c in zip(row, seen, strict=True)) / w for row, w in zip(to_xyz, white, strict=True)
    ]
    f = [t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz]
    return 116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])


# Machado, Oliveira and Fernandes 2009, severity 1.
VISION = {
    "typical": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deutan": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritan": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_papers_arms_stay_apart_under_colour_blindness(vision, dark):
    template = Path(figures.__file__).with_name("report.html").read_text()
    changed = dict(re.findall(r'svg \[stroke="(#\w+)"\] \{ stroke: (#\w+); \}', template)) if dark else {}
    assert set(changed) <= {colour for colour, _ in PAPER_ARMS.values()}
    seen = {arm: lab(changed.get(colour, colour), VISION[vision]) for arm, (colour, _) in PAPER_ARMS.items()}
    pairs = [(a, b) for a in seen for b in seen if a < b]
    close = {pair: round(math.dist(seen[pair[0]], seen[pair[1]])) for pair in pairs}
    assert min(close.values()) >= 15, close


def test_markers_say_the_same_without_colour():
    markers = [marker for _, marker in (*PAPER_ARMS.values(), *OTHER_ARMS)]
    assert len(set(markers)) == len(markers)


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.01, 0.2))
def test_labels_never_overlap_and_keep_their_order_and_place(places, gap):
    places = sorted(places)
    moved = spread(places, gap)
    assert len(moved) == len(places)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(moved))
    if places and (len(places) - 1) * gap <= 1:
        assert moved[0] >= -1e-9
        assert moved[-1] <= 1 + 1e-9
    if all(b - a >= gap for a, b in pairwise(places)):
        assert moved == pytest.approx(places, abs=1e-9)
