"""`mmsweep diff`: what is the same, what is not, and where losses part."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mmsweep.__main__ import main as mmsweep
from mmsweep.diff import differences, find
from mmsweep.store import RunStore, open_store
from trainers.errors import InputError
from trainers.records import EvalRecord, PartWriter, StepRecord

LEFT, RIGHT = "hetero-s1-0123abcd", "hetero-s2-4567abcd"
CONFIG = {
    "config": {"seed": 1, "model": {"n_layer": 2, "d_ff": None}, "optimizer": {"muon": {"lr": 0.3}}},
    "provenance": {"code": "aa", "packages": {"torch": "2.13.0"}, "device": "cpu", "git": None},
}
SUMMARY = {"status": "completed", "steps": 3, "horizon": 3, "final_val_loss": 2.0, "best_val_loss": 2.0}


def write(store: RunStore, folder: Path, run_id: str, losses: list[float]) -> None:
    writer = PartWriter(folder / run_id, 1)
    for step, loss in enumerate(losses, start=1):
        writer.append(StepRecord(run_id, 1, step, 64, loss, 0.5, 1e-3, 2e-2, 12.5, 5e3, 1.7e9))
        writer.append(EvalRecord(run_id, 1, step, 64, loss, 2 * loss, 1.7e9))
    writer.roll()
    store.ship(run_id, folder / run_id)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """Two runs that are alike."""
    made = open_store(str(tmp_path / "store"))
    for run_id in (LEFT, RIGHT):
        made.put_config(run_id, CONFIG)
        made.put_summary(run_id, SUMMARY)
        write(made, tmp_path / "local", run_id, [3.0, math.nan, 1.0])
    return made


def said(store: RunStore) -> list[tuple[str, str, object, object]]:
    return [(d.section, d.name, d.left, d.right) for d in differences(store, LEFT, RIGHT)]


def test_the_same(store, capsys):
    assert said(store) == []
    assert mmsweep(["diff", store.url, LEFT, RIGHT]) == 0
    assert capsys.readouterr().out == f"same: {LEFT} and {RIGHT}\n"


def test_config_and_provenance_by_dotted_path(store):
    other = {
        "config": {
            "seed": 2,
            "model": {"n_layer": 2, "d_ff": 64},
            "optimizer": {"muon": {"lr": 0.3, "new": True}},
        },
        "provenance": {
            "code": "aa",
            "packages": {"torch": "2.14.0"},
            "device": "cpu",
            "git": {"dirty": True},
        },
    }
    store.put_config(RIGHT, other)
    assert said(store) == [
        ("config", "seed", 1, 2),
        ("config", "model.d_ff", None, 64),
        ("config", "optimizer.muon.new", None, 1),
        ("provenance", "packages.torch", "2.13.0", "2.14.0"),
        ("provenance", "git.dirty", None, True),
    ]


def test_one_and_true_are_not_the_same(store):
    store.put_config(RIGHT, {**CONFIG, "config": {**CONFIG["config"], "seed": True}})
    assert said(store) == [("config", "seed", 1, True)]


def test_outcomes_and_losses(store):
    store.put_summary(
        RIGHT, {**SUMMARY, "status": "diverged", "final_val_loss": math.inf, "reason": "spiked"}
    )
    assert said(store) == [
        ("outcome", "status", "completed", "diverged"),
        ("outcome", "reason", None, "spiked"),
        ("losses", "final_val_loss", 2.0, math.inf),
    ]


def test_an_unfinished_run_is_compared_by_its_status(store):
    store.objects.delete(f"runs/{RIGHT}/summary.json")
    store.put_status(RIGHT, {"status": "running", "step": 2, "steps": 3})
    assert ("outcome", "status", "completed", "running") in said(store)
    assert ("outcome", "steps", 3, 2) in said(store)
    assert not [line for line in said(store) if line[1] == "horizon"]


@pytest.mark.parametrize(("losses", "step"), [([3.0, math.nan, 1.0 + 2**-52], 3), ([3.0, 2.0, 5.0], 2)])
def test_the_first_step_whose_loss_differs(store, tmp_path, losses, step):
    store.objects.delete(f"runs/{RIGHT}/attempt-001/steps-000000.jsonl")
    store.objects.delete(f"runs/{RIGHT}/attempt-001/evals-000000.jsonl")
    write(open_store(store.url), tmp_path / "again", RIGHT, losses)
    first, second = said(store)
    assert first[1] == f"loss of steps parts at step {step}"
    assert first[3] == losses[step - 1]
    assert second[1] == f"val_loss of evals parts at step {step}"


def test_a_shorter_run_is_the_same_as_far_as_it_goes(store, tmp_path):
    for kind in ("steps", "evals"):
        store.objects.delete(f"runs/{RIGHT}/attempt-001/{kind}-000000.jsonl")
    write(open_store(store.url), tmp_path / "again", RIGHT, [3.0])
    assert said(store) == [("curves", "rows of steps", 3, 1), ("curves", "rows of evals", 3, 1)]


def test_the_command_shows_both_values(store, capsys):
    store.put_config(RIGHT, {**CONFIG, "config": {"seed": 2, "note": "[red]\x1b[31m"}})
    assert mmsweep(["diff", store.url, "hetero-s1", "hetero-s2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [LEFT, RIGHT]
    assert lines[1] == "config"
    assert lines[2].split() == ["seed", "1", "2"]
    assert "[red]\\x1b[31m" in lines[-1]


def test_a_beginning_of_an_id_is_enough():
    run_ids = [LEFT, RIGHT, LEFT + "0"]
    assert find(run_ids, "hetero-s2", "here") == RIGHT
    assert find(run_ids, LEFT, "here") == LEFT  # though another begins so
    with pytest.raises(InputError, match=r'^3 runs of here begin with "het": .*; write more of the id$'):
        find(run_ids, "het", "here")
    with pytest.raises(InputError, match=f'no run "hetro-s2-4567abcd" .did you mean "{RIGHT}"'):
        find(run_ids, "hetro-s2-4567abcd", "here")


def test_bad_input_is_one_line(store, capsys):
    assert mmsweep(["diff", store.url, "nobody", LEFT]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    store.objects.put(f"runs/{RIGHT}/summary.json", b"{")
    assert mmsweep(["diff", store.url, LEFT, RIGHT]) == 2
    assert "summary.json: not an object written by mmsweep" in capsys.readouterr().err
