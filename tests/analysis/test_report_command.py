from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import Run, curve, grid_index, write_store

from mmsweep.report import main


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
    assert (tmp_path / "elsewhere" / "index.html").read_text() == (
        Path(store.url) / "report" / "index.html"
    ).read_text()


@pytest.mark.parametrize("arguments", [[], ["--grid", "quickstart"]])
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, arguments):
    assert main([str(tmp_path / "nowhere"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert str(tmp_path / "nowhere") in captured.err


def test_of_several_grids_one_must_be_chosen(tmp_path, capsys):
    run = Run("hetero", 0, curve(2.4))
    store = write_store(tmp_path, [run])
    store.put_grid("again", "", grid_index([run], name="again"))
    assert main([store.url]) == 2
    assert capsys.readouterr().err.endswith("choose one with --grid: again, quickstart\n")
    assert main([store.url, "--grid", "again"]) == 0


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
