"""Grid files: merging, expansion, and the grids that ship."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmsweep.grids
from analysis.load import RUN_DTYPES
from analysis.load import load as load_frames
from mmsweep.grid import COLUMNS, load_grid
from mmsweep.launch import main as launch
from mmsweep.store import open_store
from trainers.config import RUN_ID, RunConfig, run_id
from trainers.errors import InputError
from trainers.flops import parameter_count

DIGEST = "sha256:" + "0" * 64
SHIPPED = Path(mmsweep.grids.__file__).parent


@pytest.fixture
def load(tmp_path):
    def load(content, *, identify=lambda data: DIGEST):
        path = tmp_path / "grid.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return load_grid(path, identify=identify)

    return load


# --- expansion ----------------------------------------------------------------------------------

MANIFOLDS = st.sampled_from(["none", "stiefel", "dgram", "oblique"])
AXES = {
    "attn.lr_multiplier": st.floats(0.1, 10),
    "optimizer.muon.solver": st.sampled_from(["projected", "dual_ascent"]),
    "optimizer.muon.retraction": st.sampled_from(["svd_sorted", "column_norm"]),
    "mlp.weight_decay": st.none() | st.floats(0, 1),
    "schedule.steps": st.integers(2_000, 9_000),
}
GRIDS = st.fixed_dictionaries(
    {
        "arms": st.dictionaries(
            st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True),
            st.fixed_dictionaries({"attn": MANIFOLDS, "mlp": MANIFOLDS}),
            min_size=1,
            max_size=4,
        ),
        "seeds": st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4, unique=True),
    },
    optional={
        "axes": st.lists(st.sampled_from(list(AXES)), min_size=1, max_size=3, unique=True).flatmap(
            lambda names: st.fixed_dictionaries(
                {name: st.lists(AXES[name], min_size=1, max_size=3, unique=True) for name in names}
            )
        )
    },
)


def full_path(path):
    return f"assignment.{path}" if path.startswith(("attn", "mlp")) else path


def at(run, path):
    for key in path.split("."):
        run = getattr(run, key)
    return run


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=GRIDS)
def test_expansion(load, spec):
    grid = load(spec)
    axes = {full_path(path): values for path, values in spec.get("axes", {}).items()}
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]

    # Order and count: seeds outermost, axes in the file's order, arms innermost.
    expected = list(itertools.product(spec["seeds"], points, spec["arms"]))
    assert [(cell.seed, cell.axes, cell.arm) for cell in grid.cells] == expected

    # Every cell's run is the run that the cell says.
    for cell in grid.cells:
        run = grid.runs[cell.run_id]
        assert (run.arm, run.seed) == (cell.arm, cell.seed)
        assert run.assignment.attn.manifold == spec["arms"][cell.arm]["attn"]
        assert run.assignment.mlp.manifold == spec["arms"][cell.arm]["mlp"]
        assert run_id(run) == cell.run_id
        own = run.model_dump(mode="json") | {"arm": cell.arm}
        for path, value in cell.axes.items():
            *parents, last = path.split(".")
            inner = own
            for key in parents:
                inner = inner[key]
            inner[last] = value
        assert run_id(RunConfig.model_validate(own)) == cell.run_id

    # Pairing: at every point each arm sees each seed. Runs: each once, in the order of the cells.
    for point in points:
        pairs = [(cell.arm, cell.seed) for cell in grid.cells if cell.axes == point]
        assert sorted(pairs) == sorted(itertools.product(spec["arms"], spec["seeds"]))
    assert list(grid.runs) == list(dict.fromkeys(cell.run_id for cell in grid.cells))


def test_expansion_is_the_same_each_time(load):
    spec = {
        "arms": {"b": {"attn": "dgram"}, "a": {}},
        "seeds": [2, 1],
        "axes": {"attn.lr_multiplier": [2, 1]},
    }
    assert load(spec) == load(spec)
    path = "assignment.attn.lr_multiplier"
    assert [(cell.seed, cell.axes[path], cell.arm) for cell in load(spec).cells] == [
        (2, 2, "b"), (2, 2, "a"), (2, 1, "b"), (2, 1, "a"),
        (1, 2, "b"), (1, 2, "a"), (1, 1, "b"), (1, 1, "a"),
    ]  # fmt: skip


def test_an_axis_that_an_arm_never_reads_makes_no_twin_runs(load):
    solvers = {"optimizer.muon.solver": ["projected", "dual_ascent"]}
    grid = load({"arms": {"plain": {}, "dgram": {"attn": "dgram"}}, "seeds": [1, 2], "axes": solvers})
    assert (len(grid.cells), len(grid.runs)) == (8, 6)
    assert len({cell.run_id for cell in grid.cells if cell.arm == "plain"}) == 2


def test_the_same_run_in_two_grids_is_one_run(load):
    small = load({"arms": {"a": {"attn": "dgram"}}, "seeds": [1], "base": {"model": {"n_layer": 2}}})
    large = load(
        {
            "arms": {"b": {}, "a": {"attn": "dgram", "model": {"n_layer": 2}}},
            "seeds": [2, 1],
            "store": "elsewhere",
            "resources": {"workers": 2, "max_failures": 0},
            "axes": {"attn.lr_multiplier": [1.0, 2.0]},
        }
    )
    assert set(small.runs) <= set(large.runs)


def test_arms_of_the_same_science_stay_apart(load):
    assert len(load({"arms": {"a": {}, "b": {}}, "seeds": [1]}).runs) == 2


# --- bundles ------------------------------------------------------------------------------------

SIZES = {
    "small": {"model": {"n_layer": 4, "d_model": 96}, "schedule": {"steps": 2200}},
    "large": {"model": {"n_layer": 6}, "attn": {"lr_multiplier": 0.5}, "runtime": {"micro_batch": 8}},
}


def test_a_bundle_sets_several_keys_at_once(load):
    grid = load({"base": {"model": {"n_head": 6}}, "arms": {"a": {}}, "axes": {"size": SIZES}, "seeds": [1]})
    small, large = grid.runs.values()
    assert (small.model.n_layer, small.model.d_model, small.schedule.steps) == (4, 96, 2200)
    assert (large.model.n_layer, large.model.d_model, large.schedule.steps) == (6, 768, 50_000)
    assert (large.assignment.attn.lr_multiplier, large.runtime.micro_batch) == (0.5, 8)
    assert small.model.n_head == large.model.n_head == 6


def test_bundles_are_an_axis_of_names(load):
    axes = {"size": SIZES, "optimizer.muon.lr": [0.1, 0.2]}
    grid = load({"arms": {"b": {}, "a": {"mlp": "dgram"}}, "axes": axes, "seeds": [2, 1]})
    order = list(itertools.product([2, 1], ["small", "large"], [0.1, 0.2], ["b", "a"]))
    assert [(c.seed, c.axes["size"], c.axes["optimizer.muon.lr"], c.arm) for c in grid.cells] == order
    assert grid.axes == {"size": ["small", "large"], "optimizer.muon.lr": [0.1, 0.2]}
    assert grid.index()["axes"] == ["size", "optimizer.muon.lr"]


def test_a_run_is_the_same_with_and_without_bundles(load):
    bundled = load({"arms": {"a": {}}, "axes": {"size": SIZES}, "seeds": [1]})
    renamed = load({"arms": {"a": {}}, "axes": {"scale": {"x": SIZES["small"]}}, "seeds": [1]})
    plain = load({"arms": {"a": {}}, "base": SIZES["large"], "seeds": [1]})
    assert list(bundled.runs) == [*renamed.runs, *plain.runs]


def test_a_bundle_may_be_left_empty(load):
    grid = load("arms: {a: {}}\nseeds: [1]\naxes: {size: {default: , deep: {model: {n_layer: 20}}}}\n")
    assert [run.model.n_layer for run in grid.runs.values()] == [12, 20]


def test_bundles_that_assign_manifolds_leave_them_out_of_the_arms(load):
    axes = {"where": {"attention": {"attn": "stiefel"}, "both": {"attn": "stiefel", "mlp": "dgram"}}}
    grid = load({"arms": {"a": {}}, "axes": axes, "seeds": [1]})
    assert grid.arms == {"a": {}}
    kinds = [(r.assignment.attn.manifold, r.assignment.mlp.manifold) for r in grid.runs.values()]
    assert kinds == [("stiefel", "none"), ("stiefel", "dgram")]


def test_bundles_become_a_column_of_the_results_in_their_order(load, tmp_path):
    grid = load({"arms": {"a": {}}, "axes": {"size": SIZES}, "seeds": [1]})
    store = open_store(str(tmp_path / "store"))
    store.put_grid(grid.name, grid.text, grid.index())
    frames = load_frames(store)
    assert frames.axes == ("size",)
    assert list(frames.runs["size"]) == ["small", "large"]
    assert list(frames.runs["label"]) == ["a · size=small", "a · size=large"]


def test_no_bundle_hides_a_column_of_the_results():
    assert set(RUN_DTYPES) <= COLUMNS


# --- merging ------------------------------------------------------------------------------------


def only_run(grid):
    (run,) = grid.runs.values()
    return run


def test_a_bare_manifold_keeps_what_lies_below(load):
    grid = load({"base": {"attn": {"lr_multiplier": 0.5}}, "arms": {"a": {"attn": "dgram"}}, "seeds": [1]})
    attn = only_run(grid).assignment.attn
    assert (attn.manifold, attn.lr_multiplier) == ("dgram", 0.5)


def test_an_axis_adds_to_a_bare_manifold(load):
    grid = load({"arms": {"a": {"attn": "dgram"}}, "axes": {"attn.lr_multiplier": [0.5]}, "seeds": [1]})
    attn = only_run(grid).assignment.attn
    assert (attn.manifold, attn.lr_multiplier) == ("dgram", 0.5)


def test_arms_and_axes_override_base_and_only_what_they_name(load):
    grid = load(
        {
            "base": {"model": {"n_layer": 2, "n_head": 4, "d_model": 64}, "optimizer": {"muon": {"lr": 0.1}}},
            "arms": {"a": {"model": {"n_head": 2}}},
            "axes": {"optimizer.muon.lr": [0.7], "schedule": [{"steps": 9, "warmup_steps": 1}]},
            "seeds": [1],
        }
    )
    run = only_run(grid)
    assert (run.model.n_layer, run.model.n_head, run.model.d_model) == (2, 2, 64)
    assert (run.optimizer.muon.lr, run.schedule.steps, run.schedule.batch_size) == (0.7, 9, 64)


def test_lists_are_replaced(load):
    spec = {"base": {"optimizer": {"adamw": {"betas": [0.5, 0.6]}}}, "seeds": [1]}
    grid = load({**spec, "arms": {"a": {"optimizer": {"adamw": {"betas": [0.7, 0.8]}}}}})
    assert only_run(grid).optimizer.adamw.betas == (0.7, 0.8)


def test_an_arm_may_repair_what_base_alone_could_not_be(load):
    grid = load({"base": {"model": {"n_head": 5}}, "arms": {"a": {"model": {"d_model": 100}}}, "seeds": [1]})
    assert only_run(grid).model.d_model == 100


def test_arms_without_changes_may_be_left_empty(load):
    assert only_run(load("arms:\n  plain:\nseeds: [1]\nbase:\naxes:\n")).arm == "plain"


@pytest.mark.parametrize(("gpus", "precision"), [(0, "float32"), (0.5, "bfloat16"), (1, "bfloat16")])
def test_precision_follows_the_device(load, gpus, precision):
    spec = {"arms": {"a": {}}, "seeds": [1], "resources": {"gpus_per_worker": gpus}}
    assert only_run(load(spec)).precision == precision
    other = {"float32": "bfloat16", "bfloat16": "float32"}[precision]
    assert only_run(load({**spec, "base": {"precision": other}})).precision == other


@pytest.mark.parametrize(("given", "stop"), [({}, False), ({"stop": True}, True), ({"stop": False}, False)])
def test_stop(load, given, stop):
    assert only_run(load({"arms": {"a": {}}, "seeds": [1], **given})).stability.stop is stop


def test_stability_inside_base(load):
    grid = load({"arms": {"a": {}}, "seeds": [1], "base": {"stability": {"stop": True, "style": "paper"}}})
    assert (only_run(grid).stability.stop, only_run(grid).stability.style) == (True, "paper")


def test_defaults(load):
    grid = load({"arms": {"a": {}}, "seeds": [1]})
    assert (grid.name, grid.description, grid.store) == ("grid", "", "./results")
    assert grid.resources.model_dump() == {
        "workers": 1, "nodes": 1, "cpus_per_worker": 1, "gpus_per_worker": 0, "max_concurrent": None,
        "priority": {}, "max_failures": 2, "max_preemptions": 20, "hang_after_s": 900, "spool_gb": 20,
        "placement_timeout_s": 1800,
    }  # fmt: skip


# --- data ---------------------------------------------------------------------------------------


def test_data_is_identified_once_for_each_kind(load):
    asked = []

    def identify(data):
        asked.append(data)
        return f"sha256:{len(asked)}"

    arms = {"a": {}, "b": {"attn": "dgram"}, "c": {"data": {"val_fraction": 0.2}}}
    grid = load({"arms": arms, "seeds": [1, 2], "axes": {"mlp.lr_multiplier": [1, 2]}}, identify=identify)
    assert [data.val_fraction for data in asked] == [0.1, 0.2]
    assert all(data.digest is None for data in asked)
    digests = {run.arm: run.data.digest for run in grid.runs.values()}
    assert digests == {"a": "sha256:1", "b": "sha256:1", "c": "sha256:2"}


def test_every_line_of_a_data_problem_has_its_place(load):
    def identify(data):
        raise InputError("no such files\nand no network")

    with pytest.raises(InputError) as caught:
        load({"base": {"data": {"val_fraction": 0.2}}, "arms": {"a": {}}, "seeds": [1]}, identify=identify)
    assert [line.split("grid.yaml")[1] for line in str(caught.value).splitlines()] == [
        ":2: base.data: and no network",
        ":2: base.data: no such files",
    ]


# --- the index ----------------------------------------------------------------------------------


def test_index(load):
    text = (
        "name: mine\ndescription: two arms\nseeds: [5]\n"
        "arms: {a: {attn: stiefel, mlp: dgram}, b: {}}\naxes: {attn.lr_multiplier: [0.5]}\n"
    )
    grid = load(text)
    assert grid.text == text
    assert json.loads(json.dumps(grid.index())) == {
        "schema": 1,
        "name": "mine",
        "description": "two arms",
        "arms": {"a": {"attn": "stiefel", "mlp": "dgram"}, "b": {"attn": "none", "mlp": "none"}},
        "axes": ["assignment.attn.lr_multiplier"],
        "seeds": [5],
        "cells": [
            {"run_id": id_, "arm": arm, "seed": 5, "axes": {"assignment.attn.lr_multiplier": 0.5}}
            for id_, arm in zip(grid.runs, ["a", "b"], strict=True)
        ],
    }


def test_a_swept_manifold_is_not_the_arms(load):
    grid = load({"arms": {"a": {"mlp": "dgram"}}, "axes": {"attn": ["stiefel", "dgram"]}, "seeds": [1]})
    assert grid.arms == {"a": {"mlp": "dgram"}}
    assert [run.assignment.attn.manifold for run in grid.runs.values()] == ["stiefel", "dgram"]


# --- grids that ship ----------------------------------------------------------------------------

PAPER_ARMS = ["unconstrained", "all_stiefel", "all_dgram", "hetero", "hetero_inv"]


def shipped(name):
    return load_grid(SHIPPED / f"{name}.yaml", identify=lambda data: DIGEST)


SHIPPED_RUNS = {
    "quickstart": 10,
    "paper": 25,
    "retune_dgram_attention": 120,
    "confounds": 108,
    "modular_manifolds": 55,
    "scale": 60,
    "gpt2_family": 9,
    "search": 150,
}


@pytest.mark.parametrize(("name", "runs"), SHIPPED_RUNS.items())
def test_shipped_grids(name, runs):
    grid = shipped(name)
    assert grid.name == name
    assert grid.description
    assert len(grid.runs) == len(grid.cells) == runs
    assert all(RUN_ID.match(id_) for id_ in grid.runs)


def test_every_shipped_grid_is_tested():
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == set(SHIPPED_RUNS)


def test_quickstart_is_the_five_arms_with_two_seeds():
    grid = shipped("quickstart")
    assert list(grid.arms) == PAPER_ARMS
    assert grid.seeds == [1337, 1338]


def test_paper_is_the_default_preset():
    grid = shipped("paper")
    assert list(grid.arms) == PAPER_ARMS
    assert len(grid.seeds) == 5
    assert grid.seeds[0] == 1337
    run = next(iter(grid.runs.values()))
    default = RunConfig()
    for section in ("model", "optimizer", "assignment", "schedule", "evaluation", "runtime"):
        assert getattr(run, section) == getattr(default, section)
    assert (run.precision, run.stability.style, run.stability.stop) == ("bfloat16", "paper", False)
    assert (run.data.dataset, run.data.tokenizer) == ("Skylion007/openwebtext", "gpt2")
    assert run.data.val_fraction == 0.0005
    assert grid.resources.gpus_per_worker == 1


def test_confounds_hold_the_papers_own_runs():
    paper, confounds = shipped("paper"), shipped("confounds")
    shared = set(paper.runs) & set(confounds.runs)
    assert len(shared) == len(confounds.arms) * len(confounds.seeds) == 6


def test_retune_holds_the_papers_own_runs():
    """Multiplier 1 and decay 0 are the paper's setting, so those runs are shared, not trained again."""
    paper, retune = shipped("paper"), shipped("retune_dgram_attention")
    shared = set(paper.runs) & set(retune.runs)
    assert {id_.rsplit("-", 1)[0] for id_ in shared} == {
        "all_dgram-s1337", "all_dgram-s1338", "hetero_inv-s1337", "hetero_inv-s1338",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["scale", "gpt2_family"])
def test_every_size_sees_20_tokens_a_parameter(name):
    for run in shipped(name).runs.values():
        tokens = run.schedule.steps * run.tokens_per_step
        assert tokens / parameter_count(run.model) == pytest.approx(20, rel=0.02)
        assert run.schedule.warmup_steps / run.schedule.steps == pytest.approx(1 / 50, rel=0.02)
        assert run.schedule.steps / run.evaluation.every == pytest.approx(40, rel=0.02)
        assert run.model.d_model // run.model.n_head == 64


def test_scale_has_the_papers_arms_and_learning_rates():
    scale, paper = shipped("scale"), shipped("paper")
    assert scale.arms == paper.arms
    assert list(scale.axes["size"]) == ["4l-256", "6l-384", "12l-768", "24l-1024"]
    published = next(iter(paper.runs.values())).optimizer
    for run in scale.runs.values():
        assert (run.optimizer.adamw, run.optimizer.muon.lr) == (published.adamw, published.muon.lr)


# --- planning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED_RUNS)
def test_shipped_grids_are_planned_without_data(name, tmp_path, capsys):
    assert launch([name, "--dry-run", "--store", str(tmp_path / "store")]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("memory a worker: ")
    assert (" of a GPU of " in last or " fits a GPU of " in last) is (name != "quickstart")


XL = {"precision": "bfloat16", "model": {"n_layer": 48, "n_head": 25, "d_model": 1600}}
GPU = {"gpus_per_worker": 1}
THRIFTY = {"activation_checkpointing": True, "micro_batch": 8}


@pytest.mark.parametrize(
    ("runtime", "resources", "ending"),
    [
        (THRIFTY, GPU, " with activation checkpointing (a-s1-RUN): fits a GPU of 40 GB"),
        (THRIFTY, {**GPU, "workers": 8}, "checkpointing (a-s1-RUN): fits a GPU of 40 GB"),
        ({}, GPU, "at micro batch 64 (a-s1-RUN): too much for a GPU of 80 GB; runtime.micro_batch 8 fits"),
        ({"micro_batch": 8}, GPU, "at micro batch 8 (a-s1-RUN): fits a GPU of 80 GB"),
        (THRIFTY, {"gpus_per_worker": 0.5}, "(a-s1-RUN): fits 0.5 of a GPU of 80 GB"),
        ({}, {"gpus_per_worker": 0.25}, "too much for 0.25 of a GPU of 80 GB, whatever the micro batch"),
        (THRIFTY, {}, " at micro batch 8 with activation checkpointing (a-s1-RUN)"),
    ],
)
def test_memory_of_gpt2_xl(runtime, resources, ending, tmp_path, capsys):
    spec = {"arms": {"a": {}}, "seeds": [1], "base": {**XL, "runtime": runtime}, "resources": resources}
    path = tmp_path / "xl.yaml"
    path.write_text(yaml.safe_dump(spec))
    assert launch([str(path), "--dry-run", "--store", str(tmp_path / "store")]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert re.sub(r"a-s1-[0-9a-f]{8}", "a-s1-RUN", last).endswith(ending)


def test_checkpointing_is_proposed_where_no_micro_batch_is_small_enough(tmp_path, capsys):
    base = {**XL, "model": {**XL["model"], "context": 32_768}}
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump({"arms": {"a": {}}, "seeds": [1], "base": base, "resources": GPU}))
    assert launch([str(path), "--dry-run", "--store", str(tmp_path / "store")]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.endswith("80 GB; runtime.micro_batch 1 with runtime.activation_checkpointing fits")


def test_memory_is_that_of_the_largest_run(tmp_path, capsys):
    axes = {"size": {"xl": {"model": XL["model"]}, "small": {}}}
    path = tmp_path / "sizes.yaml"
    path.write_text(yaml.safe_dump({"arms": {"a": {}}, "seeds": [1], "axes": axes}, sort_keys=False))
    assert launch([str(path), "--dry-run", "--store", str(tmp_path / "store")]) == 0
    printed = capsys.readouterr().out.splitlines()
    xl = next(line.split()[0] for line in printed if " xl " in line)
    assert printed[-1].endswith(f"({xl})")


# --- whatever is in the file ---------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31 - 1))
def test_a_damaged_grid_expands_or_is_refused(load, seed):
    """Lines dropped, swapped or cut short: never another exception, and each line names its place."""
    draw = random.Random(seed)
    lines = (SHIPPED / "quickstart.yaml").read_text().split("\n")
    for _ in range(draw.randint(1, 4)):
        at, to = draw.randrange(len(lines)), draw.randrange(len(lines))
        cut = draw.randint(0, len(lines[at]))
        lines[at : at + 1] = draw.choice(
            [[], [lines[at], lines[to]], [lines[to]], [lines[at][:cut]], [lines[at][:cut] + lines[to][cut:]]]
        )
    try:
        cells, message = len(load("\n".join(lines)).cells), ""
    except InputError as error:
        cells, message = 0, str(error)
    assert bool(cells) != bool(message)
    assert all("grid.yaml:" in line for line in message.splitlines())
