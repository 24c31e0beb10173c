from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import Run, curve, grid_index, write_run, write_store

from mmsweep.report import Report, main


def test_it_prints_t1_and_the_path_of_the_report(tmp_path, capsys, paper_store):
    page = tmp_path / "out" / "index.html"
    assert main([paper_store.url, "--out", str(page.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(page)
    assert page.is_file()
    assert lines[0].split()[:3] == ["arm", "attention", "MLP"]
    assert lines[4].startswith("hetero         stiefel    dgram")
    assert "2.4233 ± 0.0033" in lines[4]


def test_the_report_does_not_disturb_the_store(tmp_path, capsys):
    store = write_store(tmp_path, [Run("hetero", 0, curve(2.4))])
    assert main([store.url]) == main([store.url, "--out", str(tmp_path / "elsewhere")]) == 0
    tables = [folder / "tables" / "t1.csv" for folder in (tmp_path / "elsewhere", Path(store.url) / "report")]
    assert tables[0].read_bytes() == tables[1].read_bytes()


@pytest.mark.parametrize("arguments", [[], ["--grid", "quickstart"]])
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, arguments):
    assert main([str(tmp_path / "nowhere"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert str(tmp_path / "nowhere") in captured.err


@pytest.fixture(scope="module")
def two_grids(tmp_path_factory):
    """One run, in two grids."""
    run = Run("hetero", 0, curve(2.4))
    store = write_store(tmp_path_factory.mktemp("two"), [run])
    store.put_grid("again", "", grid_index([run], name="again"))
    return store.url


def test_of_several_grids_some_must_be_chosen(two_grids, tmp_path, capsys):
    assert main([two_grids]) == 2
    assert capsys.readouterr().err.endswith("choose with --grid: again, quickstart\n")
    assert main([two_grids, "--out", str(tmp_path), "--grid", "again", "quickstart"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines.count("quickstart")) == ("again", 1)
    for grid in ("again", "quickstart"):
        assert (tmp_path / grid / "tables" / "t1.csv").is_file()
    assert "<h1>again and quickstart</h1>" in (tmp_path / "index.html").read_text()
    assert 'id="differences"' not in (tmp_path / "index.html").read_text()


def test_two_grids_are_compared_in_a_page_of_their_own(two_grids, capsys):
    assert main([two_grids, "--compare", "quickstart", "again"]) == 0
    page = Path(capsys.readouterr().out.splitlines()[-1])
    assert page == Path(two_grids) / "report" / "quickstart-vs-again" / "index.html"
    text = page.read_text()
    assert 'id="differences"' in text
    assert text.count("<tbody id=") == 1  # the run is in both grids, and stands once
    row = (page.parent / "tables" / "compare.csv").read_text().splitlines()[1].split(",")
    assert float(row[-6]) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--compare", "again", "again"], "name two different grids"),
        (["--compare", "again", "quickstarts"], "quickstart"),
        (["--grid", "quick"], 'no grid "quick"'),
        (["--watch", "0"], "give seconds from 0.1 to 86400"),
        (["--watch", "nan"], "give seconds from 0.1 to 86400"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(two_grids, capsys, arguments, reason):
    assert main([two_grids, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert reason in captured.err


def test_watching_writes_the_page_again_when_runs_move_on_and_ends_with_them(tmp_path):
    """A real process. It may see the files of the last step one after the other, so lines are not counted."""
    half, whole = Run("hetero", 0, curve(2.4)[:4], status="running"), Run("hetero", 0, curve(2.4))
    store = write_store(tmp_path, [half])
    page = tmp_path / "out" / "index.html"
    command = [sys.executable, "-u", "-m", "mmsweep.report", store.url, "--out", str(page.parent)]
    with subprocess.Popen([*command, "--watch", "0.2"], stdout=subprocess.PIPE, text=True) as process:
        assert "  0 of 1 runs finished, 1 running  " in process.stdout.readline()
        assert 'data-refresh="2"' in page.read_text()
        store.put_status(half.run_id, store.status(half.run_id) | {"step": 80})
        assert "  0 of 1 runs finished, 1 running  " in process.stdout.readline()
        write_run(store, whole, tmp_path / "scratch" / "again")
        rest = process.stdout.read().splitlines()  # to the end: it ends by itself
    assert process.returncode == 0
    assert f"  1 of 1 runs finished  {page}" in rest[-1]
    assert "data-refresh" not in page.read_text()


def test_heartbeats_checkpoints_and_other_grids_do_not_make_a_page_old(tmp_path):
    run, other = (Run("hetero", seed, curve(2.4)[:4], status="running") for seed in (0, 1))
    store = write_store(tmp_path, [run])
    report = Report(store, ["quickstart"], tmp_path / "out", compared=False, refresh=10)
    report.write()
    store.objects.put(f"runs/{run.run_id}/leases/1.json", b"{}")
    store.objects.put(f"runs/{run.run_id}/checkpoints/00000075/model.safetensors", b"weights")
    store.objects.put("report/index.html", b"a page")
    write_run(store, other, tmp_path / "scratch" / "other")
    store.put_grid("other", "", grid_index([other], name="other"))
    assert not report.has_changed()
    store.put_status(run.run_id, store.status(run.run_id) | {"step": 80})
    assert report.has_changed()
    report.write()
    assert not report.has_changed()
    assert not report.has_ended()
    store.put_grid("quickstart", "", grid_index([run, other]))
    assert report.has_changed()
    for one in (run, other):
        store.put_status(one.run_id, {"status": "failed", "reason": "no space left"})
    report.write()
    assert report.has_ended()


def test_a_folder_that_cannot_be_written_is_an_error_and_no_traceback(tmp_path, capsys):
    store = write_store(tmp_path, [Run("hetero", 0, curve(2.4))])
    (tmp_path / "file").write_text("")
    assert main([store.url, "--out", str(tmp_path / "file" / "report")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("columns", [80, 130])
def test_on_a_terminal_no_line_is_cut_or_wrapped(tmp_path, paper_store, columns):
    command = [sys.executable, "-m", "mmsweep.report", paper_store.url, "--out", str(tmp_path)]
    reader, terminal = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    subprocess.run(command, stdout=terminal, check=True, env=environment)
    os.close(terminal)
    text = re.sub(r"\x1b\[[0-9;]*m", "", os.read(reader, 1 << 16).decode())
    os.close(reader)
    table = text.splitlines()[:7]
    assert all(len(line) <= columns for line in table)
    assert "hetero " in text
    for cell in ("2.4233 ± 0.0033", "−0.0252", "2/2", "168", "46.2"):
        assert cell in text
    assert ("[−0.0284, −0.0221] (2)*" in text) == (columns == 130)
