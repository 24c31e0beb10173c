from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from synthetic import Run, curve, grid_index, paper_like, write_run, write_store

from analysis.export import quoted, write_export
from analysis.load import ENVELOPES, READERS, load
from mmsweep.export import main
from trainers.records import (
    KINDS,
    AttentionRecord,
    CostRecord,
    FlowRecord,
    HeadRecord,
    PartWriter,
    UpdateRecord,
)

DOCS = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """More runs than are read at a time; one diverged, one under way with every probe."""
    root = tmp_path_factory.mktemp("sweep")
    bad = Run("hetero", 7, [5.5, 4.0, math.nan], status="diverged")
    live = Run("hetero", 8, curve(2.4)[:4], status="running")
    runs = [*paper_like(), bad, live]
    store = write_store(root, runs)
    assert len(runs) > READERS
    writer = PartWriter(root / "more", 2)
    for record in (
        HeadRecord(live.run_id, 2, 25, 1, "qk", 3, 40.0, 0.5, 44.0, 7.5),
        AttentionRecord(live.run_id, 2, 50, 1, 3, 1e4, 0.01, 0.99, math.inf),
        FlowRecord(live.run_id, 2, 10, "h.1.mlp.c_fc", 1, "mlp", 2.0, 1.0, 0.02, 9.0, 1.5, 0.7),
        UpdateRecord(live.run_id, 2, 24, "h.1.mlp.c_fc", 1, "mlp", "dgram", 0.1, 0.2, 1.0, 0.01),
        CostRecord(live.run_id, 2, 10, 9e3, math.nan, 200.0, 150.0, 30.0, 15.0, 5.0, 2**30),
    ):
        writer.append(record)
    writer.roll()
    store.ship(live.run_id, root / "more")
    return store


@pytest.fixture(scope="module")
def out(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    write_export([store], folder)
    return folder


def rows(frame: pd.DataFrame) -> list[list[str]]:
    """Every cell as text, with all digits; missing cells empty."""
    columns = [
        [
            "" if value is pd.NA or value is None else repr(value) if isinstance(value, float) else str(value)
            for value in frame[name].astype(object)
        ]
        for name in frame.columns
        if name not in ENVELOPES
    ]
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("kind", ["runs", *KINDS])
def test_both_formats_hold_the_frame(store, out, kind):
    frame = getattr(load(store), kind)
    assert len(frame)
    expected = rows(frame)
    assert (
        rows(
            pd.read_parquet(out / f"{kind}.parquet", dtype_backend="pyarrow")[
                [name for name in frame.columns if name not in ENVELOPES]
            ].astype(object)
        )
        == expected
    )
    with (out / f"{kind}.csv").open(newline="") as file:
        header, *cells = csv.reader(file)
    assert header == [name for name in frame.columns if name not in ENVELOPES]
    plain = [[re.sub(r"^NaN$", "nan", cell) for cell in row] for row in cells]
    assert plain == expected


def test_spectra_are_whole_in_parquet(store, out):
    sigma = pq.read_table(out / "spectra.parquet")["sigma"].to_pylist()
    assert sigma == [list(values) for values in load(store, lists=True).spectra["sigma"]]
    assert "sigma," not in (out / "spectra.csv").read_text().splitlines()[0]


def test_csv_is_what_pandas_reads_back(out):
    evals = pd.read_csv(out / "evals.csv")
    expected = pd.read_parquet(out / "evals.parquet")
    assert evals["val_loss"].equals(expected["val_loss"])
    assert evals["val_loss"].isna().sum() == 1
    attention = pd.read_csv(out / "attention.csv")
    assert attention["jacobian_norm"].tolist() == [math.inf]


def test_every_column_is_in_the_docs(out):
    text = DOCS.read_text()
    for path in sorted(out.glob("*.parquet")):
        section = text.split(f"## `{path.stem}`")[1].split("\n## ")[0]
        for name in pq.read_schema(path).names:
            assert f"`{name}`" in section or name in ("run_id", "arm", "seed", "attempt", "step")


def test_rules_are_those_that_fired(store, out):
    frames = load(store)
    table = pd.read_csv(out / "rules.csv")
    expected = [(r, fired.rule, fired.step) for r, v in frames.verdicts.items() for fired in v.rules]
    assert list(zip(table["run_id"], table["rule"], table["first_bad"], strict=True)) == expected
    assert len(expected) > 2


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@sum", "\tx", "\rx"])
def test_text_that_a_spreadsheet_would_run_gets_a_quote(tmp_path, text):
    safe = "'" + text.replace("\r", "\n")
    assert quoted(text) == safe
    run = Run("hetero", 0, curve(2.4)[:2], status="running", axes={"data.path": text})
    store = write_store(tmp_path, [run], index=grid_index([run], axes=["data.path"]))
    store.put_status(run.run_id, {"status": "failed", "reason": text, "step": 1})
    write_export([store], tmp_path / "out", formats=["csv"])
    with (tmp_path / "out" / "runs.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["reason"] == row["data.path"] == safe
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_numbers_below_zero_stay_numbers(tmp_path):
    run = Run("hetero", 0, [-1.5, -2.5], status="running")
    write_export([write_store(tmp_path, [run])], tmp_path / "out", formats=["csv"])
    assert pd.read_csv(tmp_path / "out" / "evals.csv")["val_loss"].tolist() == [-1.5, -2.5]


def test_a_card_tells_a_run_on_one_page(store, out):
    cards = {path.stem: path.read_text() for path in (out / "cards").iterdir()}
    assert set(cards) == set(load(store, kinds=()).runs["run_id"])
    (name,) = (name for name in cards if name.startswith("hetero_inv-s0"))
    text = cards[name]
    for line in (
        f"# {name}",
        "Arm `hetero_inv`, seed 0 of grid `quickstart`: completed at step 300 of 300.",
        "- Final validation loss: 3.1250 nats per token",
        "- Data digest: `sha256:5f3c0d6e`",
        "- `persistent_drift` between step 225 and step 250: validation loss 3.1250, threshold 3.0291",
        "- assignment.attn.manifold: `dgram`",
        "- packages.torch: `2.13.0`",
        f"In `{store.url}/runs/{name}`:",
        "- `spectra`: 104 rows",
        "- `summary.json`",
    ):
        assert line in text.splitlines()
    assert "precision" not in text  # a default
    (diverged,) = (text for name, text in cards.items() if name.startswith("hetero-s7"))
    assert "- Final validation loss: not finite" in diverged
    assert not re.search(r"\bnan\b", diverged)
    (live,) = (text for name, text in cards.items() if name.startswith("hetero-s8"))
    assert "- Last validation loss: " in live
    assert "summary.json" not in live


def test_nothing_on_a_card_is_markup(tmp_path):
    run = Run("hetero", 0, curve(2.4)[:2], status="running")
    store = write_store(tmp_path, [run])
    nasty = "`<script>`\n# heading\n[x](http://x) | *b*"
    store.put_status(
        run.run_id, {"status": "failed", "reason": nasty, "step": 1, "failures": [{"error": nasty}]}
    )
    write_export([store], tmp_path / "out", formats=["csv"])
    text = (tmp_path / "out" / "cards" / f"{run.run_id}.md").read_text()
    assert text.count("`'<script>' # heading [x](http://x) | *b*`") == 2
    assert "\n# heading" not in text


def test_the_same_store_gives_the_same_bytes(store, out, tmp_path):
    write_export([store], tmp_path)
    names = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes()


def test_sources_are_whole_entries(out):
    text = (out / "sources.bib").read_text()
    entries = re.findall(r"^@misc\{(\w+),\n((?:  .*\n|            .*\n)+)\}$", text, re.MULTILINE)
    assert len(entries) == text.count("@") > 10
    assert len({key for key, _ in entries}) == len(entries)
    for _, body in entries:
        assert body.count("{") == body.count("}")
        for field in ("author", "title", "year"):
            assert f"  {field} = {{" in body
    cited = set(re.findall(r"[0-9]{4}\.[0-9]{5}", text))
    root = DOCS.parents[1]
    read = "".join(
        path.read_text()
        for folder in ("trainers", "analysis", "docs")
        for path in (root / folder).rglob("*.*")
        if path.suffix in (".py", ".md") and path.name != "sources.py"
    )
    assert cited <= set(re.findall(r"[0-9]{4}\.[0-9]{5}", read))


def test_an_export_that_fails_leaves_the_old_file(store, tmp_path):
    write_export([store], tmp_path, formats=["csv"])
    before = (tmp_path / "evals.csv").read_bytes()
    (tmp_path / ".spectra.csv.partial").mkdir()
    with pytest.raises(OSError, match=r"spectra\.csv"):
        write_export([store], tmp_path, formats=["csv"])
    assert (tmp_path / "evals.csv").read_bytes() == before
    assert not (tmp_path / ".evals.csv.partial").exists()


def test_the_command_names_what_it_has_written(store, tmp_path, capsys):
    assert main([store.url, "--out", str(tmp_path / "out"), "--format", "csv", "--grid", "quickstart"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert re.fullmatch(r"attention\.csv +1 rows", lines[0])
    assert lines[-2:] == ["12 cards", str(tmp_path / "out")]
    assert captured.err == ""


def test_the_command_says_what_it_could_not_read(tmp_path, capsys):
    run, other = Run("hetero", 0, curve(2.4)), Run("hetero", 1, curve(2.4))
    store = write_store(tmp_path, [run])
    write_run(store, other, tmp_path / "more")
    store.objects.put(f"runs/{other.run_id}/spectra.parquet", b"")
    assert main([store.url, "--out", str(tmp_path / "out"), "--format", "csv"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith(f"mmsweep export: {other.run_id}: spectra cannot be read")


@pytest.mark.parametrize("arguments", [[], ["--grid", "quickstart"]])
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, arguments):
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), *arguments]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert str(tmp_path / "nowhere") in told
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line(store, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([store.url, "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.endswith("choose another folder with --out\n")
