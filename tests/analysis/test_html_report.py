from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest
from synthetic import Run, curve, grid_index, planted, write_store

from analysis import figures
from analysis.load import load
from analysis.report import embedded, write_report

EVIL = '<img src=x onerror="alert(1)"></script><script>alert(2)</script><!--{{ 7 * 7 }}\u2028'


class Page(HTMLParser):
    """Tags with their attributes, and the text; scripts and styles apart."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self._inside = [], "", [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def links(self):
        return {attrs["href"] for tag, attrs in self.tags if tag == "a"}

    def ids(self):
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]


def assert_nothing_foreign(page):
    """Our two scripts, no other element that loads or runs anything, and no handler in an attribute."""
    assert [tag for tag, _ in page.tags].count("script") == 2
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "img", "image", "base", "form")
        assert not any(name.startswith("on") or name in ("style", "src", "srcdoc") for name in attributes)
        assert not attributes.get("href", "").startswith(("http", "//", "javascript", "data:text"))


@pytest.fixture(scope="module")
def report(tmp_path_factory, paper_frames):
    return write_report(paper_frames, tmp_path_factory.mktemp("report")), paper_frames


def test_every_link_of_the_page_leads_somewhere(report):
    page, _ = report
    parsed = Page(page.read_text())
    files = {link for link in parsed.links() if not link.startswith("#") and "runs/" not in link}
    for name in files:
        assert (page.parent / name).stat().st_size > 50, name
    assert {f"tables/{t}.{kind}" for t in ("t1", "t4", "t5") for kind in ("csv", "tex", "md")} <= files
    assert {"tables/survival.csv", "tables/modules.csv", "figures/f1.svg", "figures/f4.png"} <= files
    assert {link[1:] for link in parsed.links() if link.startswith("#")} <= set(parsed.ids())
    assert (page.parent / "figures" / "overview.svg").is_file()


def test_the_same_frames_give_the_same_files(report, tmp_path):
    page, frames = report
    again = write_report(frames, tmp_path / "a" / "b")
    for path in page.parent.rglob("*.*"):
        before = path.read_bytes()
        after = (again.parent / path.relative_to(page.parent)).read_bytes()
        if path == page:  # but for the links to the records
            before, after = (re.sub(rb'href="[^"]*/runs/', b'href="', text) for text in (before, after))
        assert before == after, path.name


def test_the_page_obeys_its_own_strict_policy_and_loads_nothing(report):
    page, _ = report
    source = page.read_text()
    parsed = Page(source)
    policy = next(a["content"] for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)[1]
    style_hash, script_hash = (
        "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, parsed.scripts[0])
    )
    assert policy == (
        f"default-src 'none'; style-src '{style_hash}'; script-src '{script_hash}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    assert source.count("<style") == 1
    assert "innerHTML" not in parsed.scripts[0]
    assert_nothing_foreign(parsed)


def test_ids_are_unique_and_references_resolve(report):
    page, _ = report
    source = page.read_text()
    parsed = Page(source)
    ids = parsed.ids()
    assert len(ids) == len(set(ids))
    body = source[source.index("<body") :]
    assert set(re.findall(r"url\(#([^)]+)\)", body)) <= set(ids)
    assert {attributes["href"][1:] for tag, attributes in parsed.tags if tag == "use"} <= set(ids)


def test_figures_follow_the_colour_of_the_page(report):
    page, _ = report
    source = page.read_text()
    body = source[source.index("<body") :]
    assert "currentColor" in body
    assert 'fill="#ffffff"' not in body.lower()


def test_every_figure_is_drawn_or_said_to_lack_its_records(report):
    parsed = Page(report[0].read_text())
    drawn = set(parsed.ids()) & {spec.id for spec in figures.FIGURES}
    assert {"f1", "f2", "f3", "f4", "f5"} <= drawn
    missing = parsed.text[parsed.text.index("Not drawn: ") :].partition("\n")[0]
    assert missing.count(" needs ") == len(figures.FIGURES) - len(drawn)
    assert "F6 needs a grid with a learning rate among its axes" in missing


def test_every_number_names_the_runs_behind_it(report):
    page, frames = report
    linked = [
        attributes["data-of"].split()
        for tag, attributes in Page(page.read_text()).tags
        if "data-of" in attributes
    ]
    digests = {run_id[-8:]: run_id for run_id in frames.runs["run_id"]}
    assert set().union(*linked) == set(digests)
    pairs = {frozenset(digests[d].rpartition("-s")[0] for d in one) for one in linked if len(one) == 4}
    assert {"hetero", "all_stiefel"} in pairs


def test_names_and_texts_from_people_are_escaped(tmp_path):
    runs = [Run("hetero", 0, curve(2.4)), Run("unconstrained", 0, [], status="pending")]
    index = grid_index(runs, description=EVIL)
    index["cells"][0]["arm"] = EVIL
    index["arms"] = {EVIL: {"attn": EVIL, "mlp": "none"}, "unconstrained": {"attn": EVIL, "mlp": EVIL}}
    store = write_store(tmp_path, runs, index=index)
    store.put_config(runs[0].run_id, store.config(runs[0].run_id) | {"provenance": {EVIL: {"git": EVIL}}})
    status = {
        "status": EVIL,
        "reason": EVIL,
        "log_tail": [EVIL],
        "failures": [{"kind": EVIL, "reason": EVIL}],
    }
    store.put_status(runs[1].run_id, status)
    parsed = Page(write_report(load(store), tmp_path / "out").read_text())
    assert_nothing_foreign(parsed)
    assert parsed.text.count(EVIL) >= 8
    assert EVIL in {label["name"] for label in json.loads(parsed.scripts[1])["labels"]}
    assert "49" not in re.findall(r"\{\{.*?\}\}|\b49\b", parsed.text)


def test_embedded_data_cannot_end_its_element():
    text = str(embedded({EVIL: [EVIL, 1.5, None]}))
    assert json.loads(text) == {EVIL: [EVIL, 1.5, None]}
    assert not set("<>&\u2028") & set(text)
    with pytest.raises(ValueError, match="JSON"):
        embedded([math.nan])


def test_the_page_holds_every_run_and_the_provenance(report):
    page, frames = report
    text = Page(page.read_text()).text
    assert all(run_id in text for run_id in frames.runs["run_id"])
    for fact in ("sha256:5f3c0d6e", "laptop", "2.13.0", "6dd3698", "persistent_drift (225, 250]"):
        assert fact in text
    assert "Warnings" not in text
    assert 'http-equiv="refresh"' not in page.read_text()


@pytest.fixture(scope="module")
def partial_report(tmp_path_factory):
    """A sweep that goes on, far from its store: one run done, one running, one failed, one damaged."""
    folder = tmp_path_factory.mktemp("partial")
    fast = {"optimizer": {"muon": {"lr": 0.05}}}
    runs = [
        Run("hetero", 0, curve(2.4), overrides=fast),
        Run("hetero", 1, curve(2.4)[:4], status="running"),
        Run("hetero", 2, curve(2.4)[:4], status="failed"),
        Run("hetero", 3, curve(2.4)),
    ]
    store = write_store(folder, runs)
    store.objects.put(f"runs/{runs[3].run_id}/evals.parquet", b"no parquet")
    config = store.config(runs[2].run_id)
    store.put_config(runs[2].run_id, config | {"provenance": config["provenance"] | {"host": "other"}})
    failure = {"attempt": 1, "kind": "crash", "reason": "no space", "step": 50}
    state = {"status": "failed", "reason": "gave up", "attempt": 2}
    store.put_status(runs[2].run_id, state | {"log_tail": ["OSError"], "failures": [failure]})
    return write_report(load(store), folder / "far" / "away", refresh=7), runs


def test_a_run_s_details_say_what_is_unusual_about_it(partial_report):
    text = Page(partial_report[0].read_text()).text
    details = text[text.index("rules that fired: (last") : text.index("report made with")]
    assert details.count("optimizer.muon.lr = 0.05") == 1
    assert "optimizer.adamw.lr" not in details
    for fact in (
        "gave up",
        "OSError",
        "host = other",
        "host = laptop",
        "attempt 1, step 50: crash (no space)",
    ):
        assert fact in details
    assert "git.commit = 6dd3698" not in details  # all runs have it, so it stands under Provenance alone


def test_runs_link_to_their_records_from_where_the_page_is(partial_report):
    page, runs = partial_report
    folder = next(link for link in Page(page.read_text()).links() if f"runs/{runs[0].run_id}" in link)
    assert (page.parent / folder / "config.json").is_file()


def test_a_running_sweep_says_how_far_it_is_and_loads_itself_again(partial_report):
    source = partial_report[0].read_text()
    text = Page(source).text
    assert "2 of 4 runs finished (1 running, 1 failed): 1 arm, 4 seeds." in text
    assert "newest record 2001-09-09" in text
    assert "Warnings" in text
    assert f"{partial_report[1][3].run_id}: evals cannot be read" in text
    assert re.findall(r'http-equiv="refresh" content="(\d+)"', source) == ["7"]
    assert re.findall(r'data-refresh="(\d+)"', source) == ["7"]


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([Run("hetero", 0, [], status="pending")], "0 of 1 runs finished (1 pending): 1 arm, 1 seed."),
        ([Run("all_dgram", 0, [5.5, math.nan], status="diverged")], "all_dgram 1 of 1 [0.03, 1.00]"),
    ],
    ids=["nothing yet", "all diverged"],
)
def test_a_report_of_little_is_whole(tmp_path, runs, expected):
    page = write_report(load(write_store(tmp_path, runs)), tmp_path / "out", refresh=7)
    parsed = Page(page.read_text())
    assert expected in parsed.text
    assert not re.findall(r"\b(nan|None|inf)\b", parsed.text)
    assert [run["id"] for run in json.loads(parsed.scripts[1])["runs"]] == [runs[0].run_id]
    assert ('http-equiv="refresh"' in page.read_text()) == (runs[0].status == "pending")


@pytest.fixture(scope="module")
def modular_report(tmp_path_factory):
    """Two arms of the plan, and a third whose name is hostile."""
    quick = {"steps": 100, "every": 50}
    runs = [planted(arm, seed, 4.0, **quick) for arm in ("baseline", "muon_all") for seed in (0, 1)]
    runs.append(planted("muon_ffn", 0, 4.0, **quick))
    index = grid_index(runs)
    index["cells"][4]["arm"] = EVIL
    folder = tmp_path_factory.mktemp("modular")
    return write_report(load(write_store(folder, runs, index=index)), folder / "out")


def test_the_plan_s_section_stands_where_its_arms_are(modular_report, report):
    parsed = Page(modular_report.read_text())
    ids = parsed.ids()
    assert {"modular-manifolds", "answers", "hypotheses", "modular"} <= set(ids)
    assert len(ids) == len(set(ids))
    for text in (
        "Stiefel prevents weight explosion",
        "Exploratory",
        "(baseline − muon_ffn)",
        "Unstable runs",
    ):
        assert text in parsed.text
    names = ("tables/hypotheses.csv", "tables/metrics.csv", "figures/modular.svg", "figures/modular.png")
    for link in names:
        assert link in parsed.links()
        assert (modular_report.parent / link).stat().st_size > 500
    assert 'id="modular-manifolds"' not in report[0].read_text()


def test_the_plan_s_comparisons_name_their_runs(modular_report):
    table = modular_report.read_text().partition('id="hypotheses"')[2].partition("</table>")[0]
    (behind,) = {attributes["data-of"] for _, attributes in Page(table).tags if "data-of" in attributes}
    assert len(behind.split()) == 4  # two seeds of baseline and of muon_all


def test_a_stranger_among_the_plan_s_arms_is_escaped(modular_report):
    parsed = Page(modular_report.read_text())
    assert parsed.text.count(EVIL) >= 3  # in T1, in the metrics and in the list of runs
    assert_nothing_foreign(parsed)
    assert "no finished run: muon_ffn" in parsed.text
    assert "49" not in re.findall(r"\b49\b", parsed.text)
