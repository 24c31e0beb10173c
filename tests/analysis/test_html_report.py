from __future__ import annotations

import base64
import hashlib
import math
import re
from html.parser import HTMLParser

import pytest
from synthetic import Run, curve, grid_index, planted, write_store

from analysis.load import load
from analysis.report import summary, write_report
from analysis.tables import t1

EVIL = '<img src=x onerror="alert(1)"></script><script>alert(2)</script>{{ 7 * 7 }}'


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory, paper_frames):
    return write_report(paper_frames, tmp_path_factory.mktemp("report")), paper_frames


def test_the_report_and_its_files_are_written(report):
    page, _ = report
    names = {path.relative_to(page.parent).as_posix() for path in page.parent.rglob("*") if path.is_file()}
    figures = {f"figures/{name}.{kind}" for name in ("f1", "f2", "overview") for kind in ("svg", "png")}
    tables = {f"tables/{name}.csv" for name in ("t1", "t4", "divergence", "survival", "log_rank")}
    assert names == {"index.html", *tables, *figures}
    links = {attrs["href"] for tag, attrs in Page(page.read_text()).tags if tag == "a"}
    assert links <= names


def test_the_same_frames_give_the_same_files(report, tmp_path):
    page, frames = report
    again = write_report(frames, tmp_path)
    for path in page.parent.rglob("*.*"):
        assert path.read_bytes() == (again.parent / path.relative_to(page.parent)).read_bytes(), path.name


def test_the_page_obeys_its_own_strict_policy_and_loads_nothing(report):
    page, _ = report
    source = page.read_text()
    parsed = Page(source)
    policy = next(a["content"] for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert source.count("<style") == 1
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "iframe", "object", "link", "img", "base")
        assert not any(name.startswith("on") or name in ("style", "src", "srcdoc") for name in attributes)
        assert not attributes.get("href", "").startswith(("http", "//", "javascript", "data"))


def test_ids_are_unique_and_references_resolve(report):
    page, _ = report
    source = page.read_text()
    ids = [attributes["id"] for _, attributes in Page(source).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", source)) <= set(ids)
    assert {attributes["href"][1:] for tag, attributes in Page(source).tags if tag == "use"} <= set(ids)


def test_figures_follow_the_colour_of_the_page(report):
    page, _ = report
    source = page.read_text()
    assert "currentColor" in source
    body = source[source.index("<body") :]
    assert 'fill="#ffffff"' not in body.lower()


def test_names_and_texts_from_people_are_escaped(tmp_path):
    runs = [Run("hetero", 0, curve(2.4)), Run("unconstrained", 0, [], status="pending")]
    index = grid_index(runs, description=EVIL)
    index["cells"][0]["arm"] = EVIL
    index["arms"] = {EVIL: {"attn": EVIL, "mlp": "none"}, "unconstrained": {"attn": EVIL, "mlp": EVIL}}
    store = write_store(tmp_path, runs, index=index)
    store.put_config(runs[0].run_id, store.config(runs[0].run_id) | {"provenance": {EVIL: {"git": EVIL}}})
    store.put_status(runs[1].run_id, {"status": EVIL, "reason": EVIL})
    parsed = Page(write_report(load(store), tmp_path / "out").read_text())
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "img")]
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert parsed.text.count(EVIL) >= 5
    assert "49" not in re.findall(r"\{\{.*?\}\}|\b49\b", parsed.text)


def test_the_page_holds_every_run_the_provenance_and_the_warnings(report, tmp_path):
    page, frames = report
    text = Page(page.read_text()).text
    assert all(run_id in text for run_id in frames.runs["run_id"])
    for fact in ("sha256:5f3c0d6e", "laptop", "2.13.0", "6dd3698", "persistent_drift (225, 250]"):
        assert fact in text
    assert "Warnings" not in text
    run = Run("hetero", 0, curve(2.4))
    store = write_store(tmp_path, [run])
    store.objects.put(f"runs/{run.run_id}/evals.parquet", b"no parquet")
    assert "Warnings" in Page(write_report(load(store), tmp_path / "out").read_text()).text


def test_the_summary_is_computed(report):
    _, frames = report
    assert summary(frames, t1(frames)) == [
        "10 of 10 runs finished: 5 arms, 2 seeds.",
        "Lowest median final validation loss: hetero, 2.4233 nats per token (n = 2).",
        "Highest finite median: hetero_inv, 3.1275 (n = 2).",
        "hetero − all_stiefel: −0.0252, 95% interval −0.0284 to −0.0221 (paired by seed, n = 2).",
        "hetero − unconstrained: −0.0133, 95% interval −0.0178 to −0.0089 (paired by seed, n = 2).",
        "Unstable runs: hetero_inv 2 of 2; none in the other 4.",
        "Largest singular value that attention reached, by its manifold: dgram 44.0 to 176 (n = 4); "
        "none 6.50 to 7.50 (n = 2); stiefel 1.00 (n = 4).",
    ]


def test_the_summary_says_the_opposite_of_opposite_data(tmp_path):
    runs = [Run("hetero", s, curve(2.9 + s / 100), attn_sigma=90.0) for s in (0, 1)]
    runs += [Run("all_stiefel", s, curve(2.4), attn_sigma=2.0) for s in (0, 1)]
    frames = load(write_store(tmp_path, runs))
    text = " ".join(summary(frames, t1(frames)))
    assert "Lowest median final validation loss: all_stiefel" in text
    assert "hetero − all_stiefel: +0.5050" in text
    assert "No finished run counts as unstable (n = 4)." in text
    assert "stiefel 2.00 to 90.0" in text


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([Run("hetero", 0, [], status="pending")], "0 of 1 runs finished (1 pending): 1 arm, 1 seed."),
        ([Run("hetero", 0, curve(2.4)[:4], status="running")], "0 of 1 runs finished (1 running)"),
        ([Run("all_dgram", 0, [5.5, math.nan], status="diverged")], "Unstable runs: all_dgram 1 of 1."),
    ],
    ids=["nothing yet", "running", "all diverged"],
)
def test_a_report_of_little_is_whole(tmp_path, runs, expected):
    page = write_report(load(write_store(tmp_path, runs)), tmp_path / "out")
    text = Page(page.read_text()).text
    assert expected in text
    assert "nan" not in re.findall(r"\bnan\b", text)


@pytest.fixture(scope="module")
def modular_report(tmp_path_factory):
    """Two arms of the plan, and a third whose name is hostile."""
    quick = {"steps": 100, "every": 50}
    runs = [planted(arm, seed, 4.0, **quick) for arm in ("baseline", "muon_all") for seed in (0, 1)]
    runs.append(planted("muon_ffn", 0, 4.0, **quick))
    index = grid_index(runs)
    index["cells"][4]["arm"] = EVIL
    folder = tmp_path_factory.mktemp("modular")
    frames = load(write_store(folder, runs, index=index))
    return write_report(frames, folder / "out"), frames


def test_the_plan_s_section_stands_where_its_arms_are(modular_report, report):
    page, _ = modular_report
    parsed = Page(page.read_text())
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert {"modular-manifolds", "comparisons", "metrics", "modular"} <= set(ids)
    assert len(ids) == len(set(ids))
    for text in (
        "Stiefel prevents weight explosion",
        "Exploratory",
        "(baseline − muon_ffn)",
        "Unstable runs",
    ):
        assert text in parsed.text
    links = {attributes["href"] for tag, attributes in parsed.tags if tag == "a"}
    for link in ("tables/hypotheses.csv", "tables/modular.csv", "figures/modular.svg", "figures/modular.png"):
        assert link in links
        assert (page.parent / link).stat().st_size > 500
    assert "modular" not in report[0].read_text()


def test_the_plan_s_section_is_the_same_bytes_again(modular_report, tmp_path):
    page, frames = modular_report
    again = write_report(frames, tmp_path)
    for name in ("index.html", "tables/hypotheses.csv", "tables/modular.csv", "figures/modular.svg"):
        assert (again.parent / name).read_bytes() == (page.parent / name).read_bytes()


def test_a_stranger_among_the_plan_s_arms_is_escaped(modular_report):
    parsed = Page(modular_report[0].read_text())
    assert parsed.text.count(EVIL) >= 3  # in T1, in the metrics and in the list of runs
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "img")]
    assert "no finished run: muon_ffn" in parsed.text
    assert "49" not in re.findall(r"\b49\b", parsed.text)
