"""Stores as they should not be, through the report's command: a page that says what is wrong, or one line.

A page takes seconds, so a store holds what can go wrong side by side.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from synthetic import ARMS, Run, curve, grid_index, write_store

from analysis.load import load
from mmsweep.report import main
from mmsweep.store import RunStore
from trainers.records import CONFIG, STATUS, SUMMARY, EvalRecord, PartWriter, SpectrumRecord, StepRecord


@pytest.fixture
def report(tmp_path, capsys):
    """Report a store: exit status, the page's text, and what went to stderr."""

    def run(store: RunStore, *arguments: str) -> tuple[int, str, str]:
        out = tmp_path / "report"
        status = main([store.url, "--out", str(out), *arguments])
        page = out / "index.html"
        told = capsys.readouterr().err
        assert "Traceback" not in told
        return status, re.sub(r"\s+", " ", page.read_text()) if page.is_file() else "", told

    return run


def refused(outcome: tuple[int, str, str]) -> str:
    """The one line of a store that cannot be reported."""
    status, page, told = outcome
    assert (status, page) == (2, "")
    assert told.count("\n") == 1
    return told


def shown(outcome: tuple[int, str, str]) -> str:
    """The page of one that can."""
    status, page, told = outcome
    assert (status, told) == (0, "")
    assert page.rstrip().endswith("</html>")
    return page


def seeds(n: int, losses: Sequence[float] = ()) -> list[Run]:
    return [Run("hetero", seed, losses or curve(2.4 + 0.01 * seed)) for seed in range(n)]


def test_an_empty_store_is_refused(tmp_path, report):
    (tmp_path / "store").mkdir()
    assert "no runs here" in refused(report(write_store(tmp_path, [], index={})))


def test_a_grid_whose_runs_have_not_begun(tmp_path, report):
    runs = [Run(arm, seed, []) for arm in ARMS for seed in (0, 1)]
    assert "0 of 10 runs finished" in shown(report(write_store(tmp_path, [], index=grid_index(runs))))


def test_one_run(tmp_path, report):
    assert "1 of 1 runs finished" in shown(report(write_store(tmp_path, seeds(1))))


def test_one_seed_of_each_arm(tmp_path, report):
    page = shown(report(write_store(tmp_path, [Run(arm, 0, curve(2.4)) for arm in ARMS])))
    assert "5 of 5 runs finished" in page


def test_all_runs_diverged(tmp_path, report):
    """With a finite loss before, and without any."""
    ends = {"hetero": [5.5, 4.0, math.nan], "all_stiefel": [math.nan], "unconstrained": [math.inf]}
    runs = [Run(arm, seed, losses, status="diverged") for arm, losses in ends.items() for seed in (0, 1)]
    assert "6 of 6 runs finished" in shown(report(write_store(tmp_path, runs)))


def test_a_run_of_a_later_version_is_left_out_and_named(tmp_path, report):
    old, new = seeds(2)
    store = write_store(tmp_path, [old, new])
    config = store.config(old.run_id)
    del config["schema"]
    store.put_config(old.run_id, config)
    store.put_config(new.run_id, {**store.config(new.run_id), "schema": 2})
    page = shown(report(store))
    assert f"{new.run_id}: config.json is of schema 2" in page
    assert "2.4000" in page
    assert "2.4100" not in page


def test_a_store_of_a_later_version_is_refused(tmp_path, report):
    (run,) = seeds(1)
    store = write_store(tmp_path, [run])
    store.put_config(run.run_id, {**store.config(run.run_id), "schema": 2})
    assert "config.json is of schema 2, and this version of mmsweep reads up to 1" in refused(report(store))
    store.put_grid("quickstart", "name: quickstart\n", {**grid_index([run]), "schema": 7})
    assert "grids/quickstart.json: is of schema 7" in refused(report(store))


def test_half_written_runs(tmp_path, report):
    """A last line that is torn, facts that are missing or no JSON, a run that never evaluated."""
    torn, *broken, silent = runs = seeds(5)
    torn.losses, torn.status = torn.losses[:5], "running"
    store = write_store(tmp_path, runs)
    base = f"runs/{torn.run_id}"
    for name in (CONFIG, STATUS):
        store.objects.delete(f"{base}/{name}")
    part = f"{base}/attempt-001/evals-000000.jsonl"
    store.objects.put(part, store.objects.get(part)[:-20])
    for run, name in zip(broken, (CONFIG, SUMMARY, STATUS), strict=True):
        store.objects.put(f"runs/{run.run_id}/{name}", b'{"status": ')
    store.objects.delete(f"runs/{silent.run_id}/evals.parquet")
    page = shown(report(store))
    assert f"{torn.run_id}: has records and no config.json" in page
    for run, name in zip(broken, (CONFIG, SUMMARY), strict=False):
        assert f"{run.run_id}: {name} cannot be read" in page
    assert "4 of 5 runs finished" in page  # the status of one that has a summary is not needed


def flipped(data: bytes) -> bytes:
    return data[:-6] + bytes([data[-6] ^ 64]) + data[-5:]


DAMAGES = {"cut": lambda data: data[: len(data) // 2], "flipped": flipped, "empty": lambda data: b""}


def test_damaged_tables_are_named(tmp_path, report):
    runs = seeds(4)
    broken = runs[1:]
    store = write_store(tmp_path, runs)
    kinds = ("steps", "evals", "spectra")
    for run, kind, damage in zip(broken, kinds, DAMAGES.values(), strict=True):
        key = f"runs/{run.run_id}/{kind}.parquet"
        store.objects.put(key, damage(store.objects.get(key)))
    page = shown(report(store))
    for run, kind in zip(broken, kinds, strict=True):
        assert f"{run.run_id}: {kind} cannot be read" in page
    assert page.count("damaged (") == 3
    assert "2.4000" in page


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["steps", "evals", "spectra"])
def test_what_is_whole_beside_a_damaged_table_is_read(tmp_path, kind, damage):
    (run,) = seeds(1)
    store = write_store(tmp_path, [run])
    before = load(store)
    key = f"runs/{run.run_id}/{kind}.parquet"
    store.objects.put(key, DAMAGES[damage](store.objects.get(key)))
    frames = load(store)
    (note,) = frames.notes
    assert note.startswith(f"{run.run_id}: {kind} cannot be read ({store.url}/{key}: damaged (")
    for name in ("steps", "evals", "spectra"):
        assert len(getattr(frames, name)) == (0 if name == kind else len(getattr(before, name)))


def test_measurements_that_are_not_finite(tmp_path, report):
    values = (math.nan, math.inf, -math.inf)
    good, *bad = [Run(arm, 0, curve(2.4)) for arm in tuple(ARMS)[:4]]
    for run in bad:
        run.status = "running"
    store = write_store(tmp_path, [good, *bad])
    for run, value in zip(bad, values, strict=True):
        writer = PartWriter(tmp_path / run.run_id, 2)
        for step in (25, 50):
            writer.append(StepRecord(run.run_id, 2, step, 1, *[value] * 7))
            writer.append(EvalRecord(run.run_id, 2, step, 1, value, value, value))
            sizes = ([value], value, value, [value], value, value)
            writer.append(SpectrumRecord(run.run_id, 2, step, "h.0.attn.c_attn", 0, "attn", "none", *sizes))
        writer.roll()
        store.ship(run.run_id, tmp_path / run.run_id)
    assert "1 of 4 runs finished" in shown(report(store))


def test_files_and_runs_of_others(tmp_path, report):
    ours, theirs = seeds(2)
    store = write_store(tmp_path, [ours, theirs], index=grid_index([ours]))
    base = f"runs/{ours.run_id}"
    for key in ("notes.txt", "runs/readme.md", f"{base}/steps.parquet.bak", f"{base}/x/y/steps.parquet"):
        store.objects.put(key, b"\0\xff mine")
    store.objects.put(f"{base}/attempt-001/steps-000000.jsonl~", b"mine")
    page = shown(report(store, "--grid", "quickstart"))
    assert "1 of 1 runs finished" in page
    assert ours.run_id in page
    assert theirs.run_id not in page


def test_an_arm_that_was_renamed(tmp_path, report):
    """The grid's name for a run's arm counts, not the one in its id."""
    (run,) = seeds(1)
    index = grid_index([run])
    index["arms"] = {"ours": index["arms"]["hetero"]}
    index["cells"][0]["arm"] = "ours"
    store = write_store(tmp_path, [run], index=index)
    page = shown(report(store))
    assert ">ours<" in page
    assert ">hetero<" not in page
    table = (tmp_path / "report" / "tables" / "t1.csv").read_text().splitlines()[1]
    assert table.startswith("ours,ours,")


def test_any_script_and_markup(tmp_path, report):
    path, words = "data.path", "Ελληνικά 日本語 עברית 🧪 </script><b>&amp;"
    run = Run("hetero", 0, curve(2.4), axes={path: words})
    index = grid_index([run], axes=[path], description=words)
    store = write_store(tmp_path / "größe 日本", [run], index=index)
    store.put_status(run.run_id, {"status": "failed", "reason": words, "step": 3})
    store.objects.delete(f"runs/{run.run_id}/{SUMMARY}")
    page = shown(report(store))
    assert "日本語" in page
    assert "</script><b>" not in page


def test_a_grid_whose_runs_were_deleted(tmp_path, report):
    """Beside a run of no grid. Then its index is broken."""
    gone, here = seeds(2)
    store = write_store(tmp_path, [here], index=grid_index([gone]))
    assert "0 of 1 runs finished" in shown(report(store, "--grid", "quickstart"))
    Path(tmp_path / "report" / "index.html").unlink()
    Path(store.url, "grids", "quickstart.json").write_text(json.dumps({"cells": [{"run_id": "../x"}]}))
    assert "launch the grid again" in refused(report(store))
