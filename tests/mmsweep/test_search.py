"""A search over settings, on a stand-in for the launch, and once for real."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import mmsweep.search as search_module
from mmsweep.grid import Grid, load_grid
from mmsweep.halving import best, survivors
from mmsweep.regrid import arm_name, flat, nested
from mmsweep.search import final_loss, main, settings_of
from mmsweep.store import RunStore, StoreError, open_store
from trainers import records
from trainers.corpus import identify

TINY = """
name: tiny
description: four of them
seeds: [1, 2]
arms:
  a: {attn: none, mlp: none}
  b: {attn: stiefel, mlp: dgram}
  c: {attn: dgram, mlp: stiefel}
  d: {attn: oblique, mlp: spectral}
base:
  data: {source: text, path: TEXTS}
  model: {n_layer: 1, n_head: 2, d_model: 16, context: 16, vocab_size: 256}
  optimizer: {muon: {lr: 0.1, solver: projected}}
  schedule: {steps: 16, warmup_steps: 3, batch_size: 8}
  evaluation: {every: 8, batches: 2}
  runtime: {checkpoint_every: 4}
resources: {cpus_per_worker: 0.5, priority: {b: 3}}
"""

pytestmark = pytest.mark.usefixtures("texts")


@pytest.fixture
def grid(write_grid) -> Callable[..., Path]:
    return functools.partial(write_grid, TINY)


class Launches:
    """Instead of launches: every run is finished in no time, with the loss that its setting has."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.losses: dict[str, float] = {"a": 2.0, "b": 1.0, "c": 3.0, "d": 4.0}
        self.seeds: Callable[[str, int], float] = lambda arm, seed: 0.0
        """What a seed adds."""
        self.grids: list[Grid] = []
        self.given_up: set[str] = set()
        self.stop_after = math.inf
        """Runs until somebody stops the launch."""
        self.stop_at_the_end_of = ""
        """Grid whose launch somebody stops when all is done."""

    def __call__(
        self, grid: Grid, store: RunStore, address: str | None, hook: object, *, show: bool
    ) -> tuple[int, str]:
        self.grids.append(grid)
        store.put_grid(grid.name, grid.text, grid.index())
        whole = True
        for run_id, run in grid.runs.items():
            if store.summary(run_id):
                continue
            status = {"status": records.PENDING, "steps": run.schedule.steps, "step": 0}
            if run.arm in self.given_up:
                status["status"] = records.FAILED
            elif self.stop_after > 0:
                self.stop_after -= 1
                loss = self.losses[run.arm] + self.seeds(run.arm, run.seed)
                store.put_summary(run_id, summary(loss, run.schedule.steps))
                continue
            store.put_status(run_id, status)
            whole = False
        late = "stopped by SIGTERM" if grid.name == self.stop_at_the_end_of else ""
        return (0, late) if whole else (1, "" if self.stop_after else "stopped by Ctrl-C")

    def arms(self) -> list[list[str]]:
        return [list(grid.arms) for grid in self.grids]


def summary(loss: float, steps: int) -> dict[str, Any]:
    status = records.COMPLETED if math.isfinite(loss) else records.DIVERGED
    shown = loss if math.isfinite(loss) else None
    return {
        "status": status, "steps": steps, "horizon": steps, "final_val_loss": shown, "device_seconds": 1800.0
    }  # fmt: skip


@pytest.fixture
def launches(tmp_path, monkeypatch) -> Launches:
    stand_in = Launches(open_store(str(tmp_path / "store")))
    monkeypatch.setattr(search_module, "run_launch", stand_in)
    monkeypatch.setattr(search_module, "make_report", lambda *_, **__: 0)
    return stand_in


def search(grid: Path, launches: Launches, *options: str) -> int:
    return main([str(grid), "--store", launches.store.url, *options])


# --- the rounds ------------------------------------------------------------------------------------


def test_the_best_go_on_over_longer_schedules_and_win_on_fresh_seeds(grid, launches, capsys):
    launches.losses["d"] = math.inf
    assert (
        search(grid(), launches, "--keep", "1/2", "--winners", "1", "--fresh-seeds", "3", "--against", "c")
        == 0
    )
    assert [g.name for g in launches.grids] == ["tiny-r1", "tiny-r2", "tiny-r3", "tiny-fresh"]
    assert launches.arms() == [["a", "b", "c", "d"], ["a", "b"], ["b"], ["b", "c"]]
    assert [g.seeds for g in launches.grids] == [[1, 2], [1, 2], [1, 2], [3, 4, 5]]
    schedules = [next(iter(g.runs.values())) for g in launches.grids]
    assert [run.schedule.steps for run in schedules] == [4, 8, 16, 16]
    assert [run.schedule.warmup_steps for run in schedules] == [0, 1, 3, 3]
    assert [run.evaluation.every for run in schedules] == [2, 4, 8, 8]
    first = launches.grids[0]
    assert first.resources.cpus_per_worker == 0.5
    assert [g.resources.priority for g in launches.grids] == [{"b": 3}] * 4
    assert first.description == "round 1 of 4 of a search: four of them"
    assert {run.runtime.checkpoint_every for run in first.runs.values()} == {4}
    printed = capsys.readouterr().out
    assert "tiny: round 2 of 4, 8 steps: a, b" in printed
    rows = [line.split() for line in printed.splitlines() if line[:2] in ("b ", "c ")]
    assert rows == [["b", "1.0000", "1.0000", "−2.0000", "(3)"], ["c", "–", "3.0000"]]
    assert "best on fresh seeds: b;" in printed


def test_a_round_s_runs_are_the_grid_s_own_where_they_are_as_long(grid, launches):
    path = grid()
    assert search(path, launches) == 0
    own = load_grid(path, identify=identify)
    assert set(launches.grids[2].runs) <= set(own.runs)


def test_as_many_as_are_to_win_go_on(grid, launches):
    launches.losses |= {"a": 2.0, "b": 2.5, "c": math.inf, "d": 3.0}
    assert search(grid(), launches, "--winners", "3", "--keep", "1/4") == 0
    assert launches.arms()[1:] == [["a", "b", "d"]] * 3


def test_the_same_command_trains_nothing_twice(grid, launches, capsys):
    path = grid()
    assert search(path, launches) == 0
    said = capsys.readouterr().out.splitlines()
    launches.grids.clear()
    assert search(path, launches) == 0
    assert launches.grids == []
    assert capsys.readouterr().out.splitlines() == said


def test_a_round_that_another_grid_has_trained_is_in_the_store_under_its_own_name(grid, launches):
    path = grid()
    assert search(path, launches) == 0
    path.write_text(path.read_text().replace("name: tiny", "name: other"))
    assert search(path, launches) == 0
    assert {"other-r1", "other-r2", "other-r3", "other-fresh"} <= set(launches.store.grids())
    assert [g.name for g in launches.grids if g.name.startswith("other")] == []


def test_fewer_winners_make_the_last_round_anew(grid, launches):
    path = grid()
    assert search(path, launches) == 0
    assert search(path, launches, "--winners", "1", "--fresh-seeds", "2") == 0
    index = launches.store.grid_index("tiny-fresh")
    assert (list(index["arms"]), index["seeds"]) == (["b"], [3, 4])


def test_differences_on_fresh_seeds_are_paired_and_from_the_first_choice(grid, launches, capsys):
    by_seed = {1: 0.0, 2: 0.0, 3: 0.5, 4: -0.2, 5: math.inf}
    launches.seeds = lambda arm, seed: by_seed[seed] + (0.01 * seed if arm == "a" else 0.0)
    assert search(grid(), launches, "--fresh-seeds", "3") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("a  "))
    # 2.03 and 2.04 against 1: t of one degree of freedom
    assert line.split("  ")[-1].strip() == "+1.0350 [+0.9715, +1.0985] (2)"


@pytest.mark.parametrize("runs", [0, 3, 8, 11, 17])
def test_a_search_that_was_stopped_goes_on_where_it_was(grid, launches, runs, capsys):
    path = grid()
    launches.stop_after = runs
    assert search(path, launches, "--fresh-seeds", "2") == 1
    assert "tiny: stopped by Ctrl-C in round " in capsys.readouterr().err
    launches.stop_after = math.inf
    assert search(path, launches, "--fresh-seeds", "2") == 0
    assert "best on fresh seeds: b;" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tiny-r1", "tiny-fresh"])
def test_a_stop_that_comes_when_a_round_is_done_ends_the_search_too(grid, launches, name, capsys):
    launches.stop_at_the_end_of = name
    assert search(grid(), launches) == 1
    assert launches.grids[-1].name == name
    number = 1 if name == "tiny-r1" else 4
    assert capsys.readouterr().err == (
        f"tiny: stopped by SIGTERM in round {number} of 4; the same command goes on from there\n"
    )


def test_settings_with_runs_that_were_given_up_are_named_and_can_be_left_out(grid, launches, capsys):
    launches.given_up = {"b"}
    assert search(grid(), launches) == 1
    assert capsys.readouterr().err == (
        "tiny: runs of b were given up; --without-failed goes on without these settings\n"
    )
    assert search(grid(), launches, "--without-failed") == 0
    printed = capsys.readouterr().out
    assert "tiny: left out, with runs that were given up: b\n" in printed
    assert "best on fresh seeds: a;" in printed


def test_nothing_goes_on_where_all_diverge(grid, launches, capsys):
    launches.losses = dict.fromkeys("abcd", math.inf)
    assert search(grid(), launches) == 1
    assert capsys.readouterr().err == "tiny: every setting has diverged\n"
    assert len(launches.grids) == 1


def test_winners_that_diverge_on_fresh_seeds_are_said_to(grid, launches, capsys):
    launches.stop_after = 16  # all rounds but the last
    assert search(grid(), launches) == 1
    launches.losses = dict.fromkeys("abcd", math.inf)
    launches.stop_after = math.inf
    assert search(grid(), launches) == 0
    printed = capsys.readouterr().out
    assert "best on fresh seeds: none, all diverged;" in printed
    assert ["a", "2.0000", "diverged", "–"] in [line.split() for line in printed.splitlines()]


def test_the_rounds_share_a_budget(grid, launches, capsys):
    path = grid(**{"name: tiny": "name: tiny\nbudget: {cost: 20, price_per_hour: 4}"})  # 5 hours
    assert search(path, launches) == 1
    assert [g.budget.hours for g in launches.grids if g.budget] == [5.0, 1.0]
    error = capsys.readouterr().err
    assert error.startswith("tiny: budget spent: 6 of 5 worker-hours; raise it, and the same command goes")
    path.write_text(path.read_text().replace("cost: 20", "cost: 60"))
    assert search(path, launches) == 0
    path.write_text(path.read_text().replace("cost: 60", "cost: 20"))
    assert search(path, launches) == 0  # nothing is left to train


def test_a_budget_that_ends_within_a_round_is_said_to(grid, launches, monkeypatch, capsys):
    def launch(grid: Grid, store: RunStore, *_: object, **__: object) -> tuple[int, str]:
        for run_id in grid.runs:
            store.put_status(
                run_id, {"status": records.PENDING, "steps": 4, "reason": "budget spent: 1 of 1"}
            )
        return 1, ""

    monkeypatch.setattr(search_module, "run_launch", launch)
    assert search(grid(), launches) == 1
    error = capsys.readouterr().err
    assert error == "tiny: budget spent in round 1 of 4; raise it, and the same command goes on from there\n"


def test_somebody_else_s_launch_ends_the_search_with_2(grid, launches, monkeypatch):
    monkeypatch.setattr(search_module, "run_launch", lambda *_, **__: (2, ""))
    assert search(grid(), launches) == 2


def test_a_store_that_is_away_between_rounds_is_waited_for(grid, launches, monkeypatch, capsys):
    asked = []
    facts = RunStore.facts

    def away(store: RunStore) -> dict[str, set[str]]:
        asked.append(len(launches.grids))
        if asked.count(1) == 1 and asked[-1] == 1:  # once, after the first round
            raise StoreError("s3://b: the service is failing or overloaded; try again later (SlowDown)")
        return facts(store)

    monkeypatch.setattr(RunStore, "facts", away)
    assert search(grid(), launches) == 0
    printed = capsys.readouterr().out
    assert "tiny: waiting for the store: s3://b: the service" in printed
    assert "tiny: the store is back" in printed


def test_a_store_that_does_not_answer_at_first_is_an_error(grid, launches, monkeypatch, capsys):
    def away(_: RunStore) -> dict[str, set[str]]:
        raise StoreError("s3://b: no such bucket; make it")

    monkeypatch.setattr(RunStore, "facts", away)
    assert search(grid(), launches) == 2
    assert capsys.readouterr().err == "s3://b: no such bucket; make it\n"
    assert launches.grids == []


# --- what is asked for -----------------------------------------------------------------------------


def test_a_setting_is_an_arm_with_the_values_of_its_axes(grid):
    path = grid(**{"base:\n": "axes: {optimizer.muon.lr: [0.1, 0.3]}\nbase:\n"})
    names = list(settings_of(load_grid(path, identify=identify)))
    assert names == [f"{arm}-lr-{lr}" for lr in (0.1, 0.3) for arm in "abcd"]


def test_axes_that_end_alike_are_told_apart_and_twins_are_one_setting(grid):
    rates = "optimizer.muon.lr: [0.1], optimizer.adamw.lr: [0.1]"
    axes = f"axes: {{{rates}, optimizer.muon.retraction: [column_norm, svd_sorted]}}"
    path = grid(**{"base:\n": f"{axes}\nbase:\n"})
    names = list(settings_of(load_grid(path, identify=identify)))
    ends = [
        "muon.lr-0.1-adamw.lr-0.1-retraction-column_norm",
        "muon.lr-0.1-adamw.lr-0.1-retraction-svd_sorted",
    ]
    assert [name for name in names if name.startswith("b-")] == [f"b-{end}" for end in ends]
    assert [name for name in names if name.startswith("a-")] == [f"a-{ends[0]}"]  # has no DGram matrix
    assert len(names) == 6


def test_arms_keep_their_rank_in_every_setting(grid, launches):
    path = grid(**{"base:\n": "axes: {optimizer.muon.lr: [0.1, 0.3]}\nbase:\n"})
    launches.losses = {f"{arm}-lr-{lr}": ord(arm) + lr for arm in "abcd" for lr in (0.1, 0.3)}
    assert search(path, launches) == 0
    assert launches.grids[0].resources.priority == {"b-lr-0.1": 3, "b-lr-0.3": 3}


def test_no_two_labels_get_one_name_and_a_long_one_keeps_its_own():
    taken: dict[str, object] = {}
    for label in ("a x", "a-x-2", "A x", "a.x", "a x"):
        taken[arm_name(label, taken)] = label
    assert list(taken) == ["a-x", "a-x-2", "a-x-3", "a.x", "a-x-4"]
    long = "x" * 60
    assert arm_name(long, {}) == arm_name(long, {"other": 1})
    assert arm_name(long, {}) != arm_name(f"{long}y", {})
    assert len(arm_name(long, {})) <= 56


def test_the_dry_run_prints_every_round(grid, launches, capsys):
    assert search(grid(), launches, "--dry-run", "--fresh-seeds", "4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 settings: a, b, c, d"
    assert [line.split()[:5] for line in lines[2:6]] == [
        ["1", "tiny-r1", "4", "4", "8"],
        ["2", "tiny-r2", "2", "8", "4"],
        ["3", "tiny-r3", "2", "16", "4"],
        ["4", "tiny-fresh", "2", "16", "8"],
    ]
    assert launches.grids == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--horizons", "1/2,1/4,1"], "shares rise from above 0 to 1"),
        (["--horizons", "1/2"], "shares rise from above 0 to 1"),
        (["--horizons", "0,1"], "shares rise from above 0 to 1"),
        (["--horizons", "half,1"], "give shares such as 1/4,1/2,1"),
        (["--horizons", "1/0,1"], "give shares such as 1/4,1/2,1"),
        (["--horizons", "1e-999999999,1"], "give shares such as 1/4,1/2,1"),
        (["--horizons", "1/32,1"], "leaves 0 of 16 steps; give larger shares"),
        (["--keep", "1"], "--keep 1: give a share between 0 and 1"),
        (["--keep", "x"], "--keep x: give a share between 0 and 1"),
        (["--winners", "0"], "--winners 0: give at least 1"),
        (["--fresh-seeds", "-1"], "--fresh-seeds -1: give at least 1"),
        (["--against", "aa"], '--against "aa": no such setting (did you mean "a"?)'),
        (["--against", "a\nb"], '--against "a\\nb": no such setting'),
        (["--fresh-seeds", "2000000000"], "--fresh-seeds 2000000000: too many above the grid's 2"),
        (["--fresh-seeds", "60000"], "--fresh-seeds 60000: too many"),
        (["--store", "ftp://x"], "ftp://x"),
    ],
)
def test_bad_options_are_one_line(grid, launches, capsys, options, message):
    assert main([str(grid()), "--store", launches.store.url, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert launches.grids == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "base:\n",
            "axes: {schedule.steps: [16, 32]}\nbase:\n",
            "settings of 16 to 32 steps: a search shortens",
        ),
        ("name: tiny", f"name: {'x' * 60}", "name: longer than 58 characters"),
        ("seeds: [1, 2]", "seeds: [2147483647]", "--fresh-seeds 5: too many above the grid's 2147483647"),
        ("attn: none", "attn: non", 'unknown manifold "non"'),
    ],
)
def test_grids_that_cannot_be_searched_are_one_line(grid, launches, capsys, old, new, message):
    assert search(grid(**{old: new}), launches) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_one_setting_is_nothing_to_search(grid, launches, capsys):
    path = grid()
    data = yaml.safe_load(path.read_text())
    data["arms"] = {"b": data["arms"]["b"]}
    path.write_text(yaml.safe_dump(data))
    assert search(path, launches) == 2
    assert "one setting alone leaves nothing to search: add arms or axes" in capsys.readouterr().err


def test_the_grid_that_ships_is_every_assignment_at_three_rates(tmp_path, capsys):
    assert main(["search", "--store", str(tmp_path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("75 settings: none-none-lr-0.01, none-stiefel-lr-0.01,")
    assert [line.split()[2] for line in printed.splitlines()[2:6]] == ["75", "25", "9", "2"]


# --- parts -------------------------------------------------------------------------------------------

LOSSES = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3), st.one_of(st.floats(1, 9), st.just(math.inf)), min_size=1
)


@given(LOSSES, st.fractions(Fraction(1, 10), Fraction(9, 10)))
def test_survivors_are_the_best_share_and_their_equals(losses, keep):
    on = survivors(losses, keep)
    out = [name for name in losses if name not in on]
    finite = [name for name in losses if math.isfinite(losses[name])]
    assert on
    if not finite:
        assert on == list(losses)
        return
    assert all(losses[name] < math.inf for name in on)
    assert all(losses[a] < losses[b] for a in on for b in out)
    assert len(on) >= min(math.ceil(keep * len(losses)), len(finite))
    worst = max(losses[name] for name in on)
    assert sum(losses[name] < worst for name in on) < math.ceil(keep * len(losses))


def test_the_best_come_first_and_diverged_ones_not_at_all():
    losses = {"a": 2.0, "b": math.inf, "c": 1.0, "d": 2.0}
    assert best(losses, 2) == ["c", "a"]
    assert best(losses, 9) == ["c", "a", "d"]


@pytest.mark.parametrize(
    ("changes", "loss"),
    [
        ({}, 2.5),
        ({"status": records.DIVERGED}, 2.5),  # a spike from which it came back
        ({"status": records.DIVERGED, "steps": 7}, math.inf),
        ({"final_val_loss": None}, math.inf),
        ({"final_val_loss": "NaN"}, math.inf),
        ({"final_val_loss": math.inf}, math.inf),
    ],
)
def test_the_final_loss_is_that_of_the_tables(changes, loss):
    whole = {"status": records.COMPLETED, "steps": 9, "horizon": 9, "final_val_loss": 2.5}
    assert final_loss(whole | changes) == loss


@given(
    st.recursive(
        st.integers() | st.lists(st.integers(), max_size=2),
        lambda inner: st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, min_size=1, max_size=3),
    ).filter(lambda value: isinstance(value, dict))
)
def test_nested_undoes_flat(tree):
    assert nested(flat(tree)) == tree


# --- for real ------------------------------------------------------------------------------------------


def test_a_search_trains_its_rounds_and_reports_the_winner(grid, tmp_path):
    two = {"  c: {attn: dgram, mlp: stiefel}\n": "", "  d: {attn: oblique, mlp: spectral}\n": ""}
    path = grid(**{"seeds: [1, 2]": "seeds: [1]", **two})
    store = tmp_path / "store"
    options = ["--horizons", "1", "--winners", "1", "--fresh-seeds", "1"]
    command = [sys.executable, "-m", "mmsweep.search", str(path), "--store", str(store), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = open_store(str(store))
    assert set(runs.grids()) == {"tiny-r1", "tiny-fresh"}
    first, fresh = (runs.grid_index(name)["cells"] for name in ("tiny-r1", "tiny-fresh"))
    losses = {cell["arm"]: final_loss(runs.summary(cell["run_id"])) for cell in first}
    winner = min(losses, key=losses.__getitem__)
    assert [(cell["arm"], cell["seed"]) for cell in fresh] == [(winner, 2)]
    assert (store / "report" / "index.html").is_file()
    assert f"tiny: best on fresh seeds: {winner}; " in done.stdout.splitlines()[-1]
