from __future__ import annotations

import math
import re
import statistics
from dataclasses import replace
from itertools import combinations, pairwise, product
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from paper_size import BAD, many_arms, paper_size
from synthetic import ARMS, Run, curve, grid_index, planted, write_store

from analysis import figures, mechanism, theme
from analysis.figures import FIGURES
from analysis.figures.drawing import MOST_POINTS, Group, thinned
from analysis.load import load
from analysis.tables import t1
from analysis.theme import (
    DARK,
    MODULAR_ARMS,
    ON_DARK,
    ON_LIGHT,
    OTHER_ARMS,
    PAPER_ARMS,
    arm_styles,
    png,
    spread,
    svg,
)
from trainers.records import KINDS

OVERVIEWS = (figures.f1, figures.f2, figures.overview, figures.modular)
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


@pytest.mark.parametrize("draw", OVERVIEWS)
def test_the_same_frames_give_the_same_bytes(sweep, draw):
    assert svg(draw(sweep)) == svg(draw(sweep))


def test_the_same_frames_give_the_same_pixels(sweep):
    assert png(figures.f1(sweep)) == png(figures.f1(sweep))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", LITTLE)
def test_little_or_bad_data_still_makes_figures(tmp_path, name):
    frames = load(write_store(tmp_path, LITTLE[name]))
    for draw in OVERVIEWS:
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
    seen = {(style.colour, str(style.line)) for style in MODULAR_ARMS.values()}
    assert len(seen) == len(MODULAR_ARMS) == 11
    assert {colour for colour, _ in seen} == {colour for colour, _ in PAPER_ARMS.values()}
    assert set(modular_frames.arms) == set(MODULAR_ARMS)


def test_the_plan_s_panels_show_norms_and_gradients_by_module(modular_frames):
    loss, sigma, attn_norm, mlp_norm, attn_grad, mlp_grad = figures.modular(modular_frames).axes
    held, free = MODULAR_ARMS["stiefel_attention"], MODULAR_ARMS["muon_ffn"]
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
    colour = MODULAR_ARMS["muon_all"].colour
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


BESIDE_A_LOST_RUN = {
    "completed": ([3.1, 2.6, 2.4, 2.3], "2.300"),
    "completed, behind": ([3.0, 2.5, 2.4, 2.3], "2.300"),
    "completed, diverged": ([3.0, 2.7], "diverged"),
    "diverged": ([3.1], "diverged"),
    "diverged, ahead, ahead": ([3.0, 2.6, 2.4], "diverged"),
    "running": ([3.1, 2.6, 2.4], "2.400"),
    "running, behind": ([3.0, 2.5], "2.500"),
    "running, running, diverged": ([3.0, 2.6, 2.4], "2.400"),
}


@pytest.mark.parametrize("others", BESIDE_A_LOST_RUN)
def test_the_machine_s_losses_do_not_cut_the_median_and_the_label_is_a_result(tmp_path, others):
    """One run failed at step 25 of 75. Of the others, `behind` has come as far and still trains, and `ahead`
    failed at step 50."""
    losses = {"completed": [3.0, 2.5, 2.4, 2.3], "running": [3.0, 2.5, 2.4], "behind": [3.0, 2.5]}
    losses |= {"ahead": [3.0, 2.5, 2.4], "diverged": [3.0, math.nan]}
    states = {"behind": "running", "ahead": "failed"}
    runs = [Run("hetero", 9, [3.2, 2.7], status="failed", steps=75)]
    for seed, status in enumerate(others.split(", ")):
        runs.append(Run("hetero", seed, losses[status], status=states.get(status, status), steps=75))
    left, right = figures.f1(load(write_store(tmp_path, runs))).axes
    thick = [line for line in left.lines if line.get_linewidth() > 1.5 and line.get_marker() != "x"]
    drawn = dict(xy for line in thick for xy in zip(*line.get_data(), strict=True) if math.isfinite(xy[1]))
    medians, said = BESIDE_A_LOST_RUN[others]
    assert drawn == pytest.approx({25 * i: loss for i, loss in enumerate(medians)})
    assert [text.get_text() for text in left.texts] == [f"hetero {said}"]
    assert (right.get_title(loc="left") == "Lowest 0 (none is stable), late steps") == (said == "diverged")


def test_a_run_with_a_gap_leaves_one_in_the_median():
    """A record at a step of one run alone, as the last of a run that diverged, is no median of the seeds."""
    runs = pd.DataFrame({"run_id": ["a", "b"], "status": "completed", "final_val_loss": 2.0})
    values = pd.DataFrame({"a": [3.0, math.nan, 2.0], "b": [3.2, 99.0, 2.2]}, index=[0, 7, 25])
    group = Group("hetero", arm_styles(["hetero"])["hetero"], runs, values)
    assert group.median.to_dict() == pytest.approx({0: 3.1, 25: 2.1})


def test_lost_runs_do_not_tell_when_an_arm_turned(tmp_path):
    """Two runs of three turn at 100 and 200; four stable ones were lost early."""
    bad = [[4.0] * n + [9.0] * (13 - n) for n in (4, 8)]
    runs = [Run("hetero", s, losses) for s, losses in enumerate([*bad, curve(2.4)])]
    runs += [Run("hetero", 10 + s, curve(2.4)[:3], status="failed") for s in range(4)]
    frames = load(write_store(tmp_path, runs))
    left = figures.f1(frames).axes[0]
    thick = [line for line in left.lines if line.get_linestyle() == "--" and line.get_linewidth() > 1.5]
    assert [line.get_xdata().min() for line in thick] == [200]
    attention = figures.f8(frames).axes[0]
    assert [line.get_xdata()[0] for line in attention.lines if line.get_marker() == "x"] == [200]


def test_names_are_drawn_as_they_are_and_never_parsed(tmp_path):
    runs = [Run("hetero", 0, curve(2.4)), Run("unconstrained", 0, curve(2.5))]
    index = grid_index(runs)
    for cell, name in zip(index["cells"], ("$\\frac{1$", "--><script>alert(1)</script>"), strict=True):
        cell["arm"] = name
    frames = load(write_store(tmp_path, runs, index=index))
    for draw in OVERVIEWS:
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
    changed = DARK if dark else {}
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


# F3 to F12.

PAPER = [spec.id for spec in FIGURES if spec.id not in ("f6", "f7", "f12")]
DRAW = {spec.id: spec.draw for spec in FIGURES}


@pytest.fixture(scope="module")
def paper():
    return paper_size(seeds=3, step_every=100, flow_every=1000, attention_every=1000)


@pytest.fixture(scope="module")
def drawn(paper):
    """Every figure that the paper's sweep has data for, each drawn once."""
    return {name: DRAW[name](paper) for name in PAPER}


RATE, DECAY = "optimizer.muon.lr", "assignment.attn.weight_decay"
RATES, DECAYS = (0.1, 0.3, 1.0), (0.0, 0.1)


def cell(arm, seed, lr, decay, losses, **changes):
    attn, mlp = ARMS[arm]
    overrides = {
        "optimizer": {"muon": {"lr": lr}},
        "assignment": {"attn": {"manifold": attn, "weight_decay": decay}, "mlp": mlp},
    }
    return Run(arm, seed, losses, overrides=overrides, axes={RATE: lr, DECAY: decay}, **changes)


def cell_loss(arm, seed, lr, decay):
    return 2.4 + 0.1 * (arm != "hetero") + 0.01 * seed + 0.2 * abs(math.log10(lr / 0.3)) - decay / 2


@pytest.fixture(scope="module")
def retune(tmp_path_factory):
    """Learning rate x decay, two arms, two seeds; hetero_inv diverges at 1.0, at decay 0 in both seeds."""
    runs = []
    for arm, seed, lr, decay in product(("hetero", "hetero_inv"), (0, 1), RATES, DECAYS):
        lost = arm == "hetero_inv" and lr == 1.0 and (decay == 0 or seed == 1)
        losses = [5.5, 4.0, math.nan] if lost else curve(cell_loss(arm, seed, lr, decay))
        runs.append(cell(arm, seed, lr, decay, losses, status="diverged" if lost else "completed"))
    index = grid_index(runs, name="retune", axes=[RATE, DECAY])
    return load(write_store(tmp_path_factory.mktemp("retune"), runs, index=index))


SIZES = {"2l-64": (2, 64, 120_000), "4l-128": (4, 128, 900_000), "8l-256": (8, 256, 7_000_000)}


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """Three sizes, three arms, two seeds; hetero_inv diverges at the largest."""
    runs = []
    for i, (size, (layers, width, _)) in enumerate(SIZES.items()):
        model = {"n_layer": layers, "n_head": 4, "d_model": width, "context": 128, "vocab_size": 256}
        for arm, gap in (("unconstrained", 0.0), ("hetero", -0.02), ("hetero_inv", 0.05)):
            for seed in (0, 1):
                lost = arm == "hetero_inv" and size == "8l-256"
                losses = [5.5, math.nan] if lost else curve(4.0 - 0.5 * i + gap * (1 + i) + 0.01 * seed)
                state = "diverged" if lost else "completed"
                runs.append(
                    Run(arm, seed, losses, overrides={"model": model}, axes={"size": size}, status=state)
                )
    index = grid_index(runs, name="ladder", axes=["size"])
    frames = load(write_store(tmp_path_factory.mktemp("ladder"), runs, index=index))
    sizes = dict(zip(frames.runs["run_id"], frames.runs["size"], strict=True))
    configs = {
        run: {**config, "provenance": {"parameters": SIZES[sizes[run]][2]}}
        for run, config in frames.configs.items()
    }
    return replace(frames, configs=configs)


def texts_of(figure):
    """All text that a reader sees, with its box in pixels."""
    FigureCanvasAgg(figure).draw()
    found = list(figure.texts)
    for ax in figure.axes:
        found += [*ax.texts, ax.title, ax._left_title]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            shown = [label for tick in ticks for label in (tick.label1, tick.label2) if label.get_visible()]
            found += [*shown, axis.label]
    return [
        (t.get_text(), Text.get_window_extent(t)) for t in found if t.get_visible() and t.get_text().strip()
    ]


def assert_legible(figure):
    """No text lies on other text or beyond the edge of the figure."""
    texts = texts_of(figure)
    page = figure.bbox
    for text, box in texts:
        assert box.x0 >= -1, text
        assert box.x1 <= page.width + 1, text
        assert box.y0 >= -1, text
        assert box.y1 <= page.height + 1, text
    for (a, one), (b, other) in combinations(texts, 2):
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        height = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert min(width, height) < 2, (a, b)


@pytest.mark.parametrize("name", PAPER)
def test_figures_of_the_paper_s_sweep_are_legible_and_name_their_runs(paper, drawn, name):
    figure = drawn[name]
    assert_legible(figure)
    number = "F2b" if name == "f2_qkv" else name.upper()
    assert figure.about.title.startswith(f"{number}. ")
    assert figure.about.caption.startswith(f"{number}. ")
    assert set(figure.about.run_ids) <= set(paper.runs["run_id"])
    assert f"n = {len(figure.about.run_ids)} runs" in figure.about.caption
    assert 'of grid "paper"' in figure.about.caption
    assert 10 <= figure.get_figwidth() <= 12  # the report shows all at one width: letters of one size
    root = ElementTree.fromstring(svg(figure))
    assert all(run in "".join(root.itertext()) for run in figure.about.run_ids)
    assert not list(root.iter("{http://www.w3.org/2000/svg}image"))  # the report may show no bitmaps


@pytest.mark.parametrize("name", ["f4", "f5", "f6", "f7", "f8", "f11", "f12"])
def test_figures_of_grids_with_axes_are_legible(retune, ladder, name):
    figure = DRAW[name](ladder if name == "f12" else retune)
    assert_legible(figure)
    assert "labelled by arm" in figure.about.caption


def test_forty_arms_are_legible():
    frames = many_arms(seeds=1)
    for name in ("f3", "f5", "f10"):
        assert_legible(DRAW[name](frames))
    assert "The 8 that grow largest; 32 others not shown" in DRAW["f8"](frames).about.caption


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", LITTLE)
def test_little_data_is_drawn_or_said_in_a_line(tmp_path, name):
    frames = load(write_store(tmp_path, LITTLE[name]))
    for spec in FIGURES:
        try:
            figure = spec.draw(frames)
        except figures.NoDataError as missing:
            said = str(missing)
        else:
            ElementTree.fromstring(svg(figure))
            assert "nan" not in figure.about.caption
            continue
        assert re.fullmatch(r"F\d+b? needs .+", said)


def test_the_list_of_figures_is_whole():
    assert [spec.id for spec in FIGURES] == ["f1", "f2", "f2_qkv", *(f"f{i}" for i in range(3, 13))]
    assert {kind for spec in FIGURES for kind in spec.records} <= {*KINDS, "config", "axes"}
    for spec in FIGURES:
        assert spec.caption.endswith(".")
        assert "\n" not in spec.caption


def test_f3_shows_what_the_configs_say(paper, drawn, retune):
    data = figures.f3_data(paper).set_index(["arm", "module"])
    assert {key: row["manifold"] for key, row in data.iterrows()} == {
        (arm, kind): manifold
        for arm, manifolds in ARMS.items()
        for kind, manifold in zip(("attn", "mlp"), manifolds, strict=True)
    }
    _, cells = drawn["f3"].axes
    words = [t.get_text() for t in cells.texts]
    assert (words.count("stiefel"), words.count("dgram"), words.count("no manifold")) == (4, 4, 2)
    blocks = [t.get_text() for t in drawn["f3"].axes[0].texts]
    assert "× 12 blocks" in blocks
    assert "gpt2: width 768, 12 heads, context 1,024" in blocks
    varied = figures.f3_data(retune).set_index(["arm", "module"])
    assert varied.loc[("hetero", "attn"), "weight_decay"] == "varies"
    assert pd.isna(varied.loc[("hetero", "mlp"), "weight_decay"])
    words = {text.get_text() for text in DRAW["f3"](retune).axes[1].texts}
    assert {"Manifold Muon", "Manifold Muon, decay varies"} <= words


def test_f4_is_the_paired_differences_of_t1(paper, drawn):
    data, table = figures.f4_data(paper), t1(paper).set_index("arm")
    for (reference, arm), pairs in data.groupby(["reference", "arm"]):
        assert pairs["difference"].mean() == pytest.approx(table.loc[arm, f"minus_{reference}"])
        assert set(pairs["role"]) == {table.loc[arm, f"minus_{reference}_role"]}
    (ax,) = drawn["f4"].axes
    names = [label.get_text() for label in ax.get_yticklabels()]
    row = -names.index("hetero − all_stiefel*")
    middle = [line for line in ax.lines if line.get_marker() == "o" and line.get_ydata()[0] == row]
    assert middle[0].get_xdata()[0] == pytest.approx(table.loc["hetero", "minus_all_stiefel"])
    bar = next(line for line in ax.lines if list(line.get_ydata()) == [row, row])
    bounds = table.loc["hetero", ["minus_all_stiefel_low", "minus_all_stiefel_high"]].tolist()
    assert bar.get_xdata() == pytest.approx(bounds)
    # The arms that fail, 2 to 3.4 nats off, do not squeeze differences of hundredths.
    assert ax.get_xlim()[1] < 0.2
    assert sum(line.get_marker() == ">" for line in ax.lines) == 4


def test_f4_counts_pairs_that_diverged(retune):
    figure = DRAW["f4"](retune)
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words.count("2 of 2 pairs diverged") == 1
    assert sum(text.endswith("n = 1; 1 of 2 pairs diverged") for text in words) == 1
    data = figures.f4_data(retune)
    assert set(data["reference"]) == {"hetero"}  # the first arm, where the references of T1 are not there
    assert (~data["difference"].map(math.isfinite)).sum() == 3


def test_f5_is_kaplan_and_meier_s_estimate(paper, drawn):
    data = figures.f5_data(paper).set_index("label")
    assert data["k"].to_dict() == {arm: 3 * (arm in BAD) for arm in ARMS}
    assert data.loc["hetero", ["survival", "high"]].tolist() == [1.0, 1.0]
    assert data.loc["hetero", "low"] == pytest.approx(0.025 ** (1 / 3))
    left, right = drawn["f5"].axes
    (line,) = [
        x for x in left.lines if x.get_color() == PAPER_ARMS["all_dgram"][0] and len(x.get_xdata()) > 1
    ]
    assert line.get_xdata().tolist() == [0, 16_000, 17_000, 18_000]
    assert line.get_ydata() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert [t.get_text() for t in right.texts] == [f"{3 * (arm in BAD)}/3 unstable" for arm in ARMS]
    assert paper.runs["final_val_loss"].map(math.isfinite).all()  # unstable, and none diverged
    assert "diverged" not in drawn["f5"].about.caption


def test_f6_shows_medians_and_marks_what_diverged(retune):
    data = figures.f6_data(retune)
    assert set(data["line"]) == {
        f"{arm} · weight_decay={d}" for arm in ("hetero", "hetero_inv") for d in ("0", "0.1")
    }
    left, right = DRAW["f6"](retune).axes
    medians = [line for line in left.lines if line.get_linewidth() > 1.5 and line.get_marker() == "None"]
    assert medians[0].get_ydata() == pytest.approx([cell_loss("hetero", 0.5, lr, 0.0) for lr in RATES])
    crosses = [line for line in left.lines if line.get_marker() == "x"]
    assert [x for line in crosses for x in line.get_xdata()] == [1.0, 1.0, 1.0]
    shares = [line for line in right.lines if line.get_marker() in "ov"]
    assert [list(line.get_ydata()) for line in shares] == [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0.5]]
    assert left.get_xscale() == "log"


def test_f7_hatches_what_diverged_and_outlines_the_best(retune):
    data = figures.f7_data(retune).set_index(["panel", "lr", "decay"])
    assert len(data) == 12
    assert data.loc[("hetero_inv", 1.0, 0.0), ["loss", "k", "n"]].tolist() == [math.inf, 2, 2]
    assert data.loc[("hetero_inv", 1.0, 0.1), ["loss", "k", "n"]].tolist() == [math.inf, 1, 2]
    assert data.loc[("hetero", 0.3, 0.1), "loss"] == pytest.approx(cell_loss("hetero", 0.5, 0.3, 0.1))
    hetero, inverse, _ = DRAW["f7"](retune).axes
    hatched = [patch.get_xy() for patch in inverse.patches if patch.get_hatch()]
    assert sorted((int(x), int(y)) for x, y in hatched) == [(2, 0), (2, 1)]
    assert not [patch for patch in hetero.patches if patch.get_hatch()]
    (best,) = [patch.get_xy() for patch in hetero.patches if patch.get_facecolor()[3] == 0]
    assert (int(best[0]), int(best[1])) == (1, 1)  # lr .3, decay .1
    assert "diverged\n2/2" in [text.get_text() for text in inverse.texts]
    inks = {text.get_color() for ax in (hetero, inverse) for text in ax.texts}
    assert inks <= {ON_DARK, ON_LIGHT}  # they keep their colour on a dark page, as the cells do


def test_f8_is_the_median_over_seeds_of_the_largest_matrix(paper, drawn):
    data = figures.f8_data(paper).set_index(["label", "module", "layer", "step"])["sigma_max"]
    own = paper.spectra[(paper.spectra["arm"] == "all_dgram") & (paper.spectra["module"] == "attn")]
    here = own[(own["layer"] == 3) & (own["step"] == 12_000)]
    assert data["all_dgram", "attn", 3, 12_000] == here.groupby("run_id")["sigma_max"].max().median()
    axes = drawn["f8"].axes[:-1]
    assert [ax.get_title(loc="left") for ax in axes][:2] == ["unconstrained: attention", "unconstrained: MLP"]
    marks = [line.get_xdata()[0] for line in axes[4].lines if line.get_marker() == "x"]
    assert marks == [17_000]  # of 16,000, 17,000 and 18,000
    assert not [line for line in axes[6].lines if line.get_marker() == "x"]
    assert len(axes[2].patches) < 12  # σ is 1: the cells of one colour are one patch


def test_f9_takes_the_most_extreme_layer(paper, drawn):
    by_layer = 1 + paper.attention["layer"] / 50
    columns = ["entropy", "p_max", "jacobian_norm"]
    attention = paper.attention.assign(**{c: paper.attention[c] * by_layer for c in columns})
    data = figures.f9_data(replace(paper, attention=attention)).set_index(["run_id", "step"])
    run = paper.runs.loc[paper.runs["arm"] == "hetero_inv", "run_id"].iloc[0]
    own = attention[(attention["run_id"] == run) & (attention["step"] == 30_000)]
    layers = own.groupby("layer")[columns].mean()
    found = data.loc[(run, 30_000)]
    assert found["logit"] == own["max_logit"].max()
    assert found["entropy"] == pytest.approx(layers["entropy"].min())
    assert found["jacobian_norm"] == pytest.approx(layers["jacobian_norm"].min())
    assert found["p_max"] == pytest.approx(layers["p_max"].max())
    assert [ax.get_ylim()[1] for ax in drawn["f9"].axes[1:]] == [1.0, 0.5, 1.0]


def test_f10_draws_the_crossings_and_the_shares(paper, drawn):
    crossed = mechanism.crossings(paper)
    left, right = drawn["f10"].axes
    row = [q.name for q in mechanism.QUANTITIES].index("logit")
    steps = crossed.loc[(crossed["quantity"] == "logit") & crossed["crossed"], "step"]
    marks = [
        line.get_xdata()[0]
        for line in left.lines
        if line.get_marker() in "Dv" and abs(line.get_ydata()[0] + row) < 0.5
    ]
    assert sorted(marks) == sorted(steps)
    table = mechanism.alarms(paper, crossed)
    words = [text.get_text() for text in right.texts]
    assert words[row].startswith(f"warned {table['n_before'][row]}/6 ")
    assert "false 0/9 [0.00, 0.34]" in words[row]
    assert "shows in 6 of 6 unstable runs" in drawn["f10"].about.caption
    assert [text.get_text() for text in drawn["f10"].texts] == list(ARMS)  # the legend


def test_f11_compares_runs_that_differ_in_one_setting(paper, retune):
    data = figures.f11_data(paper)
    losses = paper.runs.set_index(["arm", "seed"])["final_val_loss"]
    found = data[(data["factor"] == "attn manifold") & (data["seed"] == 1)].iloc[0]
    assert (found["level"], found["base"], found["pairs"]) == ("dgram", "stiefel", 2)
    by_hand = [
        losses["hetero_inv", 1] - losses["all_stiefel", 1],
        losses["all_dgram", 1] - losses["hetero", 1],
    ]
    assert found["difference"] == pytest.approx(statistics.mean(by_hand))
    assert set(data["factor"]) == {"attn manifold", "mlp manifold"}  # no pair has another optimizer
    rates = figures.f11_data(retune)
    rates = rates[(rates["factor"] == RATE) & (rates["level"] == "1") & (rates["seed"] == 1)].iloc[0]
    assert (rates["pairs"], rates["lost"]) == (2, 2)
    decays = figures.f11_data(retune)
    decays = decays[(decays["factor"] == DECAY) & (decays["seed"] == 0)].iloc[0]
    assert (decays["difference"], decays["pairs"], decays["lost"]) == (pytest.approx(-0.05), 5, 1)


def test_f11_leaves_out_runs_that_differ_in_more_and_those_of_another_grid(tmp_path, modular_frames):
    """Arms with another decay or rate have no partner, an axis has those of its own arm alone."""
    data = figures.f11_data(modular_frames)
    arms = modular_frames.runs.set_index("run_id")["arm"]
    found = {(row.factor, arms[run]) for row in data.itertuples() for run in row.run_ids.split()}
    assert {arm for factor, arm in found if factor == "attn optimizer"} == {
        *("baseline", "muon_all", "muon_attention", "muon_ffn")
    }
    assert not {"stiefel_all_decay", "baseline_no_decay"} & {arm for _, arm in found}
    assert set(data.loc[data["factor"] == "attn manifold", "pairs"]) == {2}

    both = [Run("hetero", 0, curve(2.4)), Run("hetero_inv", 0, curve(2.6))]
    slow = {"optimizer": {"muon": {"lr": 0.001}}}
    both.append(Run("all_stiefel", 0, curve(2.5), overrides=slow))
    assert figures.f11_data(load(write_store(tmp_path / "rate", both))).empty
    apart = [Run("hetero", 0, curve(2.4)), Run("all_stiefel", 0, curve(2.5))]
    store = write_store(tmp_path / "grids", apart, index=grid_index(apart[:1]))
    assert figures.f11_data(load(store)).empty
    store.put_grid("other", "", grid_index(apart, name="other"))
    assert len(figures.f11_data(load(store))) == 1


def test_f12_pairs_within_a_size(ladder):
    data = figures.f12_data(ladder)
    assert sorted(data["parameters"].unique()) == [size for _, _, size in SIZES.values()]
    assert set(data["line"]) == {"unconstrained", "hetero", "hetero_inv"}  # size is on the axis
    hetero = data[data["line"] == "hetero"].groupby("parameters")["minus_reference"].mean()
    assert hetero.tolist() == pytest.approx([-0.02, -0.04, -0.06])
    lost = data[(data["line"] == "hetero_inv") & (data["parameters"] == 7e6)]
    assert lost["minus_reference"].tolist() == [math.inf] * 2
    left, right = DRAW["f12"](ladder).axes
    assert [line.get_xdata().tolist() for line in left.lines if line.get_marker() == "x"][-1] == [7e6, 7e6]
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["120 k", "900 k", "7 M"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_colour_stands_out_from_the_page(dark):
    """WCAG 2 asks 3 : 1 of graphics; the palette of Okabe and Ito stays just below in one case."""

    def luminance(colour):
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(
            w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
            for w, c in zip((0.2126, 0.7152, 0.0722), rgb, strict=True)
        )

    page = luminance("#14171c" if dark else "#ffffff")
    for colour, _ in (*PAPER_ARMS.values(), *OTHER_ARMS):
        own = luminance(DARK.get(colour, colour) if dark else colour)
        assert (max(own, page) + 0.05) / (min(own, page) + 0.05) > 2.9, colour


def test_long_curves_keep_their_extremes():
    values = np.sin(np.arange(20_000) / 900.0)
    values[[7_001, 12_345]] = (9.0, -9.0)
    series = pd.Series(values, index=np.arange(20_000) * 10)
    thin = thinned(series)
    assert len(thin) <= MOST_POINTS + 2
    assert (thin.max(), thin.min()) == (9.0, -9.0)
    assert thin.equals(series[thin.index])
    assert (thin.index[0], thin.index[-1]) == (0, 199_990)
    assert thinned(series[:500]) is series[:500] or thinned(series[:500]).equals(series[:500])


def test_characters_without_a_glyph_are_told_of_once(caplog, recwarn):
    figure = Figure()
    figure.suptitle("\ue001 and \ue002")  # for private use: in no font
    for make in (svg, png, svg):
        make(figure)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("figures: no font here has \ue001 \ue002; boxes stand for them")
    assert not [str(w.message) for w in recwarn]


def test_fonts_that_are_installed_draw_what_the_first_has_not(monkeypatch):
    monkeypatch.setattr(theme, "FONTS", ("DejaVu Sans", "no such font", "STIXGeneral"))
    theme._fonts.cache_clear()
    try:
        assert theme._fonts() == ["DejaVu Sans", "STIXGeneral"]
    finally:
        theme._fonts.cache_clear()
