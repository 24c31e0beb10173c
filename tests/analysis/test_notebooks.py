"""The notebooks, executed as Jupyter would on a small sweep, and as scripts on stores that lack most."""

from __future__ import annotations

import base64
import itertools
import math
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from scipy import stats
from synthetic import Run, curve, grid_index, paper_like, write_run, write_store
from traitlets.config import Config

from analysis import notebooks
from analysis.load import load
from analysis.notebooks import assignments, search
from mmsweep.grid import load_grid
from trainers.errors import InputError
from trainers.records import AttentionRecord, PartWriter

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "analysis" / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
NAMES = [path.stem for path in SCRIPTS]
GRIDS = {"04_retune": "retune", "05_search": "search"}
"""The grid that a notebook is executed on; the others read `quickstart`."""
MOST_CELLS = 12


# A store with three grids


def retune_like() -> list[Run]:
    """Two arms with DGram attention, 2 rates x 2 decays, 2 seeds; the larger rate diverges without decay."""
    runs = []
    for arm in ("all_dgram", "hetero_inv"):
        for rate in (0.25, 1.0):
            for decay in (0.0, 0.1):
                for seed in (0, 1):
                    lost = rate == 1.0 and decay == 0.0
                    losses = [5.5, 4.0, float("nan")] if lost else curve(2.6 - 0.1 * rate + decay, n=5)
                    status = "diverged" if lost else "completed"
                    own = {"manifold": "dgram", "lr_multiplier": rate, "weight_decay": decay}
                    mlp = "dgram" if arm == "all_dgram" else "stiefel"
                    axes = {"assignment.attn.lr_multiplier": rate, "assignment.attn.weight_decay": decay}
                    changes = {"assignment": {"attn": own, "mlp": mlp}}
                    runs.append(Run(arm, seed, losses, status=status, every=75, overrides=changes, axes=axes))
    return runs


def search_like(losses=None) -> list[Run]:
    """Four arms at 100, 200 and 400 steps, one seed; `losses`: by arm, the final one at each horizon."""
    losses = losses or {
        "unconstrained": (3.0, 2.8, 2.6),
        "all_stiefel": (3.2, 2.7, 2.5),
        "hetero": (3.1, 2.9, 2.4),
        "all_dgram": (3.3, 3.2, 3.1),
    }
    runs = []
    for arm, finals in losses.items():
        for steps, final in zip((100, 200, 400), finals, strict=True):
            status = "completed" if np.isfinite(final) else "diverged"
            last = curve(final, n=5) if np.isfinite(final) else [5.5, 4.0, final]
            axes = {"schedule.steps": steps}
            runs.append(Run(arm, 0, last, steps=steps, every=steps // 4, axes=axes, status=status))
    return runs


def add_attention(store, run, folder):
    """Attention of one layer and two heads: flat, or growing sharp where the run's σ_max grows."""
    writer = PartWriter(folder, 1)
    for step, _ in run.evaluations:
        share = step / run.steps if run.attn_sigma > 10 else 0.0
        sharp = (4 + 200 * share, 0.8 - 0.75 * share, 0.2 + 0.75 * share, 0.25 - 0.22 * share)
        for head in (0, 1):
            writer.append(AttentionRecord(run.run_id, 1, step, 0, head, *sharp))
    writer.roll()
    store.ship(run.run_id, folder)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The URL of a store with the grids quickstart, retune and search."""
    root = tmp_path_factory.mktemp("sweep")
    runs = paper_like()
    store = write_store(root, runs)
    for run in runs:
        add_attention(store, run, root / "attention" / run.run_id)
    for name, own in (("retune", retune_like()), ("search", search_like())):
        index = grid_index(own, name=name, axes=list(own[0].axes))
        store.put_grid(name, f"name: {name}\n", index)
        for run in own:
            write_run(store, run, root / "scratch" / run.run_id)
    return store.url.removeprefix("file://")


# Executed by Jupyter's own client


@pytest.fixture(scope="module")
def executed(sweep, tmp_path_factory):
    """By name, the notebook with its outputs, or the error of its first cell that failed; two at a time."""
    scratch = tmp_path_factory.mktemp("jupyter")
    private = {name: str(scratch) for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")}

    def execute(name):
        book = nbformat.read(FOLDER / f"{name}.ipynb", 4) if name in NAMES else LOST
        chosen = {"MMSWEEP_STORE": sweep, "MMSWEEP_GRID": GRIDS.get(name, "quickstart")}
        with tempfile.TemporaryDirectory(prefix="nb-") as short:  # a socket's path has some 100 characters
            transport = {"transport": "ipc", "ip": f"{short}/kernel"}
            client = NotebookClient(
                book,
                kernel_name="python3",
                startup_timeout=120,
                timeout=240,
                resources={"metadata": {"path": str(FOLDER)}},
                config=Config({"ConnectionFileMixin": transport}),
            )
            environment = {**os.environ, **chosen, "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)}
            try:
                return client.execute(env={**environment, "OMP_NUM_THREADS": "1"})
            except CellExecutionError as error:
                return error

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        for name, folder in private.items():
            patch.setenv(name, folder)
        names = [*NAMES, "lost"]
        return dict(zip(names, pool.map(execute, names), strict=True))


LOST = nbformat.v4.new_notebook(
    cells=[nbformat.v4.new_code_cell('from analysis.notebooks import read\n\nread("no/such/store")')]
)


def outputs(book):
    return [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]


def shown(book, kind):
    return [output["data"][kind] for output in outputs(book) if kind in output.get("data", {})]


def printed(book):
    return "".join(output["text"] for output in outputs(book) if output["output_type"] == "stream")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_tables_and_figures_and_nothing_goes_wrong(executed, name):
    book = executed[name]
    assert not isinstance(book, CellExecutionError), book
    assert not [o for o in outputs(book) if o.get("name") == "stderr"]
    tables = [text for text in shown(book, "text/markdown") if text.startswith("| ")]
    assert len(tables) >= 1
    assert all(len(text.splitlines()) < 40 for text in tables)
    assert all(base64.b64decode(png).startswith(b"\x89PNG") for png in shown(book, "image/png"))
    assert len(shown(book, "image/png")) >= 1
    assert f"Grid {GRIDS.get(name, 'quickstart')} of " in printed(book)
    assert "Missing" not in printed(book)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("01_first_look", r"Lowest median final validation loss: hetero, 2\.4233 \(n = 2\)"),
        ("02_assignments", r"\| dgram − stiefel \| dgram − stiefel \| −0\.2698 "),
        ("03_instability_mechanism", r"\| attention σ\\_max \| \\> 10 \| 2/2 "),
        ("04_retune", r"\| all\\_dgram \| 4 \| 3 \| 8 \| 2 \|"),
        ("05_search", r"Halving picks unconstrained, for 75% of the steps"),
        ("06_own_analysis", r"\| hetero \| 2\.\d+ \| −0\.01323 \\\[−0\.01764, −0\.008825\\\] \| 2 \|"),
    ],
)
def test_a_notebook_says_what_was_planted(executed, name, found):
    assert re.search(found, "\n".join(shown(executed[name], "text/markdown")))


def test_a_store_that_is_not_there_is_told_in_one_line(executed):
    cell, told = re.fullmatch(r".*?-{18}\n(.*)\n-{18}\n+(.*?)\n*", str(executed["lost"]), re.DOTALL).groups()
    assert cell == LOST.cells[0].source
    assert re.fullmatch(r"\S+/no/such/store: no runs here; .*MMSWEEP_STORE.*", told)


# What is in the repository


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_has_one_content_without_outputs(name):
    book = nbformat.read(FOLDER / f"{name}.ipynb", 4)
    script = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    nbformat.validate(book)
    assert [(c.cell_type, c.source) for c in book.cells] == [(c.cell_type, c.source) for c in script.cells]
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert len(book.cells) <= MOST_CELLS
    assert "MMSWEEP_STORE" in book.cells[0].source
    text = "\n".join(cell.source for cell in book.cells)
    assert not re.findall(r"""(?:^|["'(\s])(?:/|~/|[A-Z]:\\)\w\S*""", text)


def test_every_notebook_is_in_the_readme():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES
    assert re.findall(r"^\| `(\d\d_\w+)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE) == NAMES


# Stores that lack most of it


def run_all(store, monkeypatch, capsys):
    """Run every notebook as a script; what each has printed."""
    monkeypatch.setenv("MMSWEEP_STORE", store.url.removeprefix("file://"))
    monkeypatch.delenv("MMSWEEP_GRID", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(Path(store.url.removeprefix("file://")).parent))
    said = {}
    for path in SCRIPTS:
        exec(compile(path.read_text(), str(path), "exec"), {"__name__": "__main__"})
        said[path.stem] = capsys.readouterr().out
    return said


def test_one_run(tmp_path, monkeypatch, capsys):
    said = run_all(write_store(tmp_path, [Run("hetero", 0, curve(2.4))]), monkeypatch, capsys)
    assert all("1 run of 1 arm, seeds 0; 1 completed." in text for text in said.values())
    assert (
        "Missing: F4 needs two arms that have finished a run with the same seed.\n" in said["02_assignments"]
    )
    assert "No rule fired in any judged run.\n" in said["03_instability_mechanism"]
    assert "Missing: no axis of these runs is a learning rate.\n" in said["04_retune"]
    assert "Missing: halving needs runs of several horizons, and of these all have 300" in said["05_search"]
    assert "schedule: {steps: 75, warmup_steps: 5}" in said["05_search"]
    assert "No arm beside hetero has finished runs.\n" in said["06_own_analysis"]


def test_runs_under_way(tmp_path, monkeypatch, capsys):
    runs = [Run("hetero", s, curve(2.4, n=5), status="running") for s in (0, 1)]
    runs += [Run("all_dgram", s, [], status="pending") for s in (0, 1)]
    said = run_all(write_store(tmp_path, runs), monkeypatch, capsys)
    assert all("4 runs of 2 arms, seeds 0, 1; 2 running, 2 pending." in text for text in said.values())
    assert "No run has finished.\n" in said["02_assignments"]
    assert "Missing: F11 needs finished runs" in said["05_search"]
    assert "Missing: no setting has a finite median final loss.\n" in said["05_search"]


def test_all_runs_diverged(tmp_path, monkeypatch, capsys):
    lost = [5.5, 4.0, float("nan")]
    runs = [Run(arm, s, lost, status="diverged") for arm in ("hetero", "all_stiefel") for s in (0, 1)]
    said = run_all(write_store(tmp_path, runs), monkeypatch, capsys)
    assert "Missing: no setting has a finite median final loss.\n" in said["05_search"]


# What the notebooks share


def test_a_folder_is_relative_to_the_repository(sweep, capsys, monkeypatch, tmp_path):
    relative = os.path.relpath(sweep, ROOT)
    monkeypatch.chdir(tmp_path)
    frames = notebooks.read(relative, "search", kinds=("evals",))
    assert len(frames.runs) == 12
    assert capsys.readouterr().out.startswith("Grid search of ")


def test_several_grids_are_named_and_what_is_wrong_is_noted(sweep, capsys):
    notebooks.read(sweep, kinds=())
    assert capsys.readouterr().out.startswith("Grids quickstart, retune, search of ")
    with pytest.raises(notebooks.StoreError, match=r'no grid "serch" \(did you mean "search"\?\)'):
        notebooks.read(sweep, "serch")


def test_a_long_table_is_cut_and_says_so(monkeypatch):
    seen = []
    monkeypatch.setattr(notebooks, "display", lambda shown: seen.append(shown.data))
    notebooks.show(pd.DataFrame({"n": range(notebooks.MOST_ROWS + 3)}))
    lines = seen[0].splitlines()
    assert lines[-1] == "3 more rows not shown."
    assert f"| {notebooks.MOST_ROWS - 1} |" in lines
    assert f"| {notebooks.MOST_ROWS} |" not in lines


def test_the_medians_of_every_pair_of_assignments(sweep):
    table = assignments.crossed(load(sweep, grid="quickstart", kinds=())).set_index("attention")
    assert table.loc["stiefel", "MLP dgram"] == "2.4233 (2)"
    assert table.loc["dgram", "MLP unconstrained"] == "–"
    lost = assignments.crossed(load(sweep, grid="retune", kinds=())).set_index("attention")
    assert lost.loc["dgram", "MLP dgram"] == "2.6375 (8)"  # 2.575, 2.6, 2.675, ∞, each twice


def test_an_interaction_is_the_difference_of_differences(tmp_path):
    finals = {"all_stiefel": 2.5, "hetero": 2.4, "hetero_inv": 3.0, "all_dgram": 2.8}
    runs = [
        Run(arm, seed, curve(final + 0.01 * seed * (arm == "hetero")))
        for arm, final in finals.items()
        for seed in (0, 1, 2)
    ]
    runs += [Run(arm, 3, [5.5, 4.0, float("nan")], status="diverged") for arm in finals if arm == "hetero"]
    runs += [Run(arm, 3, curve(final)) for arm, final in finals.items() if arm != "hetero"]
    (row,) = assignments.interactions(load(write_store(tmp_path, runs))).to_dict("records")
    assert (row["attention"], row["MLP"], row["n"], row["lost"]) == (
        "dgram − stiefel",
        "dgram − stiefel",
        3,
        1,
    )
    by_seed = [(2.8 - (2.4 + 0.01 * seed)) - (3.0 - 2.5) for seed in (0, 1, 2)]
    assert row["interaction"] == pytest.approx(np.mean(by_seed))
    half = 4.302652729911275 * np.std(by_seed, ddof=1) / 3**0.5  # t at .975 with 2 degrees of freedom
    assert row["interaction_high"] == pytest.approx(np.mean(by_seed) + half)


def test_cells_of_an_interaction_are_no_seeds(tmp_path):
    """Two rates of three seeds, where the interaction depends on the seed alone, and one run diverges."""
    arms, by_seed = ("all_stiefel", "hetero", "hetero_inv", "all_dgram"), (0.02, 0.1, 0.0)
    runs = []
    for arm, rate, seed in itertools.product(arms, (0.1, 0.3), (0, 1, 2)):
        lost = (arm, rate, seed) == ("hetero", 0.3, 2)
        losses = [5.5, math.nan] if lost else curve(2.5 + rate + by_seed[seed] * (arm == "all_dgram"), n=5)
        changes = {"optimizer": {"muon": {"lr": rate}}}
        status = "diverged" if lost else "completed"
        axes = {"optimizer.muon.lr": rate}
        runs.append(Run(arm, seed, losses, status=status, every=75, overrides=changes, axes=axes))
    store = write_store(tmp_path, runs, index=grid_index(runs, axes=["optimizer.muon.lr"]))
    (row,) = assignments.interactions(load(store)).to_dict("records")
    assert (row["n"], row["lost"], row["interaction"]) == (2, 1, pytest.approx(0.06))
    assert row["interaction_high"] == pytest.approx(
        0.06 + 12.7062047 * 0.04
    )  # t at .975, 1 degree of freedom


def test_arms_that_differ_in_more_than_the_assignment_make_no_interaction(tmp_path):
    runs = [Run(arm, 0, curve(2.4)) for arm in ("all_stiefel", "hetero", "hetero_inv", "all_dgram")]
    twin = {"assignment": {"attn": "stiefel", "mlp": "dgram"}, "optimizer": {"muon": {"lr": 0.1}}}
    runs.append(Run("hetero_fast", 0, curve(2.3), overrides=twin))
    table = assignments.interactions(load(write_store(tmp_path, runs)))
    assert table.empty or table["n"].tolist() == [0]


def test_diverged_settings_are_last_within_each_horizon(tmp_path):
    losses = {"hetero": (3.0, 2.5, float("nan")), "all_stiefel": (3.1, float("nan"), 2.4)}
    losses |= {"unconstrained": (3.2, 2.6, 2.3), "all_dgram": (3.3, float("nan"), float("nan"))}
    runs = search_like(losses)
    store = write_store(tmp_path, runs, index=grid_index(runs, name="search", axes=["schedule.steps"]))
    table = search.ranking(load(store))
    arms = [(row["label"].split(" ")[0], row["horizon"], row["rank"]) for row in table.to_dict("records")]
    assert arms[:4] == [
        ("unconstrained", 400, 1), ("all_stiefel", 400, 2), ("hetero", 400, 3), ("all_dgram", 400, 3)
    ]  # fmt: skip
    assert [arm for arm, steps, _ in arms if steps == 200] == [
        "hetero", "unconstrained", "all_stiefel", "all_dgram"
    ]  # fmt: skip
    assert "| 3 | hetero" not in search.ranking_text(table).rows[0]
    assert search.ranking_text(table).rows[2][3] == "diverged"


def naive_halving(losses, horizons):
    """Settings kept after each horizon, by counting: at least half of them, and all that equal the last; but
    not those that diverged, unless all did."""
    alive, kept = list(losses), []
    for i, _ in enumerate(horizons):
        wanted = 1 if i == len(horizons) - 1 else (len(alive) + 1) // 2
        better = {s: sum(losses[o][i] < losses[s][i] for o in alive) for s in alive}
        dead = {s for s in alive if losses[s][i] == math.inf}
        alive = [s for s in alive if better[s] < wanted and (s not in dead or len(dead) == len(alive))]
        kept.append(set(alive))
    return kept


LOSSES = st.one_of(st.floats(2, 4), st.just(math.inf), st.sampled_from([2.5, 3.0]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(LOSSES, LOSSES, LOSSES), min_size=2, max_size=9))
def test_halving_keeps_what_counting_keeps(rows):
    losses = {f"s{i}": row for i, row in enumerate(rows)}
    horizons = [100, 200, 400]
    found = search.halved(pd.DataFrame.from_dict(losses, orient="index", columns=horizons), horizons)
    kept = naive_halving(losses, horizons)
    for horizon, names in zip(horizons, kept, strict=True):
        flags = found.table.set_index("setting")[f"kept_{horizon}"]
        assert {str(s) for s in flags[flags].index} == names
    assert set(found.picks) == kept[-1]
    steps = 100 * len(rows) + 200 * len(kept[0]) + 400 * len(kept[1])
    assert found.steps_share == pytest.approx(steps / (400 * len(rows)))


def test_halving_agrees_with_scipy_on_the_ranks(sweep):
    found = search.halving(load(sweep, grid="search", kinds=()))
    rho = stats.spearmanr([3.0, 3.2, 3.1, 3.3], [2.8, 2.7, 2.9, 3.2]).statistic
    assert found.agreement["spearman"].tolist() == pytest.approx([rho, 0.4])
    assert (found.picks, found.best) == (("unconstrained",), ("hetero",))


def test_halving_needs_several_horizons(sweep):
    with pytest.raises(InputError, match="all have 300 steps"):
        search.halving(load(sweep, grid="retune", kinds=()))


@pytest.mark.parametrize("grid", ["quickstart", "retune", "search"])
def test_the_grid_of_the_best_settings_trains_what_they_trained(sweep, tmp_path, grid):
    frames = load(sweep, grid=grid, kinds=())
    labels = [str(label) for label in search.ranking(frames)["label"][:3]]
    seeds = sorted(frames.runs["seed"].unique().tolist())
    path = tmp_path / "again.yaml"
    path.write_text(search.rerun_grid(frames, labels, seeds=seeds, name="again"))
    again = load_grid(path, identify=lambda data: "sha256:5f3c0d6e")
    old = frames.runs[frames.runs["label"].isin(labels)]
    digests = {run_id.rpartition("-")[2] for run_id in old["run_id"]}  # of all that changes the numbers
    assert {run_id.rpartition("-")[2] for run_id in again.runs} == digests
    assert search.fresh_seeds(frames, 2) == [seeds[-1] + 1, seeds[-1] + 2]


def test_arms_keep_their_names_in_that_grid_where_these_differ(sweep):
    frames = load(sweep, grid="search", kinds=())
    labels = ["hetero · steps=400", "all_dgram · steps=200"]
    text = search.rerun_grid(frames, labels, seeds=[7], name="again")
    assert list(yaml.safe_load(text)["arms"]) == ["hetero", "all_dgram"]
    frames = load(sweep, grid="retune", kinds=())
    cells = frames.runs["label"].unique()[:2].tolist()
    text = search.rerun_grid(frames, cells, seeds=[7], name="again")
    assert next(iter(yaml.safe_load(text)["arms"])) == "all_dgram-lr_multiplier-0.25-weight_decay-0"


def test_what_the_search_has_run_again_is_what_its_table_of_winners_says(tmp_path, monkeypatch, capsys):
    """The whole way: notebook 05 on a search, the grid that it prints, its runs, notebook 05 again."""
    runs = retune_like()
    store = write_store(tmp_path, runs, index=grid_index(runs, name="retune", axes=list(runs[0].axes)))
    seen = []
    monkeypatch.setenv("MMSWEEP_STORE", store.url.removeprefix("file://"))
    monkeypatch.setenv("MMSWEEP_GRID", "retune")
    monkeypatch.setattr(notebooks, "show", lambda what, *of, empty="": seen.append(what))
    source = compile((FOLDER / "05_search.py").read_text(), "05_search.py", "exec")

    exec(source, {})
    cells = [row[-1] for row in seen[-1].rows]
    assert cells == ["none read", "none read"]
    printed = re.search(r"^name: rerun$.*?(?=^Grid )", capsys.readouterr().out, re.DOTALL | re.MULTILINE)[0]
    path = tmp_path / "rerun.yaml"
    path.write_text(printed)
    grid = load_grid(path, identify=lambda data: "sha256:5f3c0d6e")
    store.put_grid("rerun", grid.text, grid.index())
    for config in grid.runs.values():
        fields = config.model_dump(mode="json", exclude={"arm", "seed"})
        run = Run(config.arm, config.seed, curve(2.66 + 0.01 * config.seed, n=5), every=75, overrides=fields)
        write_run(store, run, tmp_path / "scratch" / run.run_id)

    exec(source, {})
    assert [row[-1] for row in seen[-1].rows] == ["2.7000 [2.6804, 2.7196] (n = 5)"] * 2  # seeds 2 to 6
    assert [row[seen[-1].columns.index("cells")] for row in seen[-1].rows] == ["4", "4"]


def test_an_own_statistic_is_of_runs_that_have_ended(tmp_path, monkeypatch):
    """Half-way is half of the planned steps, and a run that diverged is infinitely bad."""
    runs = [Run("unconstrained", seed, curve(2.5)) for seed in range(5)]
    good = curve(2.4)
    runs += [Run("hetero", seed, good) for seed in (0, 1)]
    runs.append(Run("hetero", 2, good[:10], status="running"))
    runs.append(Run("hetero", 3, [*good[:3], math.nan], status="diverged"))
    runs.append(Run("hetero", 4, [*good[:8], math.nan, *good[9:]]))
    store = write_store(tmp_path, runs)
    monkeypatch.setenv("MMSWEEP_STORE", store.url.removeprefix("file://"))
    monkeypatch.delenv("MMSWEEP_GRID", raising=False)
    monkeypatch.setattr(notebooks, "show", lambda *shown, empty="": None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = {}
    exec((FOLDER / "06_own_analysis.py").read_text(), names)
    late = dict(zip(names["runs"]["run_id"], names["runs"]["late"], strict=True))
    high, low = np.mean(curve(2.5)[6:]), np.mean(good[6:])
    wanted = [high] * 5 + [low] * 2 + [math.nan, math.inf, math.inf]
    assert [late[run.run_id] for run in runs] == pytest.approx(wanted, nan_ok=True)
    (row,) = names["compared"].to_dict("records")
    assert (row["pairs"], row["lost"], row["median"]) == (2, 2, math.inf)
    assert row["difference"] == pytest.approx(low - high)


def test_an_arm_with_one_unstable_run_is_not_calm(tmp_path):
    runs = [Run("hetero", 0, curve(2.4)), Run("hetero", 1, [5.5, 4.0, float("nan")], status="diverged")]
    runs += [Run("all_stiefel", seed, curve(2.5)) for seed in (0, 1)]
    table = search.calm_settings(load(write_store(tmp_path, runs))).set_index("arm")
    assert table.loc["hetero", ["settings", "without an unstable run", "unstable runs"]].tolist() == [1, 0, 1]
    assert table.loc["all_stiefel", "without an unstable run"] == 1
