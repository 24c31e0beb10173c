"""The page in a real browser: MMSWEEP_CHROMIUM, or a Chromium on the path. None is downloaded."""

from __future__ import annotations

import math
import os
import re
import shutil

import pytest
from synthetic import Run, curve, grid_index, paper_like, write_run, write_store

from analysis.load import load
from analysis.report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = os.environ.get("MMSWEEP_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: install one, or name it in MMSWEEP_CHROMIUM"
)
EVIL = '<img src=x onerror="alert(1)"></script><script>alert(2)</script>'
EVIL_ARM = "</script><img src=x onerror=alert(3)>"
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield found
        found.close()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Four arms, two seeds; at a second rate, one run failed with a long story and one is pending."""
    folder = tmp_path_factory.mktemp("browser")
    axis = "optimizer.muon.lr"
    runs = [run for run in paper_like() if run.arm != "unconstrained"]
    for run in runs:
        run.axes = {axis: 0.02}
    fast = {"optimizer": {"muon": {"lr": 0.05}}}
    runs.append(Run("hetero", 0, curve(2.4)[:4], status="failed", overrides=fast, axes={axis: 0.05}))
    runs.append(Run("hetero", 1, [], status="pending", overrides=fast, axes={axis: 0.05}))
    store = write_store(folder, runs, index=grid_index(runs, axes=[axis]))
    store.put_status(
        runs[-2].run_id, {"status": "failed", "reason": "a worker ended: " + "no space left " * 9}
    )
    frames = load(store)
    return write_report(frames, folder / "out"), frames


class Visit:
    """A page in a fresh window, and all that went wrong in it."""

    def __init__(self, browser, path, **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.wrong, self.requests = [], []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))
        self.page.route(re.compile(r"^(?!file:|data:)"), self._refuse)
        self.page.goto(path.as_uri())

    def _refuse(self, route):
        self.requests.append(route.request.url)
        route.abort()

    def shown(self):
        """Ids of the runs in the table, from the top."""
        return self.page.locator("#run-table tbody:not([hidden]) .more").all_inner_texts()

    def column(self, head):
        heads = self.page.locator("#run-table thead th").all_inner_texts()
        place = next(i for i, text in enumerate(heads) if text.strip() == head)
        return self.page.locator(
            f"#run-table tbody:not([hidden]) > tr:first-child > :nth-child({place + 1})"
        ).all_inner_texts()

    def head(self, name):
        return self.page.locator(f'#run-table th[data-key="{name}"]')


@pytest.fixture
def visit(browser, sweep):
    opened = []

    def go(path=None, **options):
        opened.append(Visit(browser, path or sweep[0], **options))
        return opened[-1]

    yield go
    for one in opened:
        one.context.close()
        assert one.wrong == []
        assert one.requests == []


def test_the_table_of_runs_sorts_by_any_column_by_mouse_and_keyboard(visit, sweep):
    seen = visit()
    planned = sweep[1].runs["run_id"].tolist()
    assert seen.shown() == planned
    loss, seed = seen.head("final loss"), seen.head("seed")
    loss.locator("button").click()
    numbers = [text.removesuffix(" so far") for text in seen.column("final loss")]
    known = [float(text) for text in numbers if text != "–"]
    assert known == sorted(known)
    assert numbers[-1] == "–"  # what is missing stands last
    assert loss.get_attribute("aria-sort") == "ascending"
    loss.locator("button").press("Enter")
    numbers = [text.removesuffix(" so far") for text in seen.column("final loss")]
    assert [float(text) for text in numbers[:-1]] == sorted(known, reverse=True)
    assert numbers[-1] == "–"
    assert (loss.get_attribute("aria-sort"), seed.get_attribute("aria-sort")) == ("descending", "none")
    assert "sort=final+loss&down=1" in seen.page.url
    seen.page.reload()
    assert seen.head("final loss").get_attribute("aria-sort") == "descending"
    loss.locator("button").press("Space")
    assert seen.shown() == planned
    assert "#" not in seen.page.url


def test_the_table_filters_by_text_arm_status_and_axis_and_counts(visit):
    seen = visit()
    count = seen.page.locator("#count")
    assert count.inner_text() == "10 runs"
    seen.page.fill("#text", "SPACE LEFT")
    assert count.inner_text() == "1 of 10 runs"
    assert seen.column("status")[0].startswith("failed")
    seen.page.fill("#text", "")
    seen.page.select_option('[data-key="arm"]', "hetero")
    assert count.inner_text() == "4 of 10 runs"
    seen.page.select_option('[data-key="optimizer.muon.lr"]', "0.05")
    assert count.inner_text() == "2 of 10 runs"
    seen.page.select_option('[data-key="status"]', "pending")
    assert count.inner_text() == "1 of 10 runs"
    assert "arm=hetero" in seen.page.url
    seen.page.reload()
    assert count.inner_text() == "1 of 10 runs"
    seen.page.click("#all")
    assert count.inner_text() == "10 runs"
    seen.page.click('.standing a[data-status="failed"]')
    assert set(seen.column("status")[0].split("\n")[:1]) == {"failed"}


def test_a_row_opens_to_its_details(visit):
    seen = visit()
    button = seen.page.locator("#run-table .more").first
    details = seen.page.locator("#run-table .details").first
    assert not details.is_visible()
    button.press("Enter")
    assert details.is_visible()
    assert button.get_attribute("aria-expanded") == "true"
    assert "schedule.steps = 300" in details.inner_text()
    seen.page.reload()
    assert details.is_visible()
    button.click()
    assert not details.is_visible()


def test_a_number_leads_to_the_runs_behind_it_and_back(visit, sweep):
    seen = visit()
    runs = sweep[1].runs
    slow = runs[runs["optimizer.muon.lr"] == 0.02]
    expected = slow.loc[slow["arm"].isin(["hetero", "all_stiefel"]), "run_id"].tolist()
    number = seen.page.locator(".summary a.of", has_text="−0.0252").first
    before = seen.page.evaluate("scrollY")
    number.click()
    assert seen.shown() == expected
    assert seen.page.locator("#count").inner_text() == "4 of 10 runs: those behind the number"
    assert seen.page.locator("#run-table tbody.hit").count() == 4
    assert seen.page.locator("#runs h2").evaluate("head => head === document.activeElement")
    assert seen.page.evaluate("scrollY") > before
    seen.page.go_back()
    assert seen.page.locator("#count").inner_text() == "10 runs"


def test_the_chart_shows_the_values_of_all_arms_at_a_step(visit, sweep):
    seen = visit()
    plot, tip = seen.page.locator("#plot"), seen.page.locator("#tip")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    seen.page.mouse.move(box["x"] + 60 + (box["width"] - 74) * 2 / 3, box["y"] + box["height"] / 2)
    assert tip.locator("b").inner_text() == "step 200"
    told = {
        row.split("\t")[0].strip(): row.split("\t")[1] for row in tip.inner_text().splitlines() if "\t" in row
    }
    evals = sweep[1].evals.merge(sweep[1].runs[["run_id", "label"]], on="run_id")
    medians = evals[evals["step"] == 200].groupby("label")["val_loss"].median()
    assert {label: float(value) for label, value in told.items()} == pytest.approx(dict(medians), abs=6e-5)
    run_id, _, value = tip.locator("p").inner_text().partition(": ")
    nearest = evals[(evals["run_id"] == run_id) & (evals["step"] == 200)]["val_loss"].item()
    assert value == f"{nearest:.4f}"
    seen.page.mouse.move(5, 5)
    assert tip.is_hidden()


def test_the_chart_s_medians_are_those_of_the_figures(browser, tmp_path):
    """A run that the machine lost cuts no median, and the legend tells what finished runs say."""
    late = curve(2.5)[:9]
    runs = [Run("hetero", 0, curve(2.4)), Run("hetero", 1, curve(2.4)[:3], status="failed")]
    runs += [Run("all_dgram", s, curve(2.6)[:6], status="failed") for s in (0, 1)]
    runs += [Run("all_dgram", 2, [5.5, 4.0, math.nan], status="diverged")]
    runs += [Run("all_stiefel", s, late[: 9 - 4 * s], status="running") for s in (0, 1)]
    frames = load(write_store(tmp_path, runs), kinds=("evals",))
    seen = Visit(browser, write_report(frames, tmp_path / "out"))
    legend = [text.split() for text in seen.page.locator("#legend button").all_inner_texts()]
    ends = {"hetero": "2.4000", "all_dgram": "not finite", "all_stiefel": f"{late[4]:.4f}"}
    assert {name: " ".join(value) for name, *value in legend} == ends
    lines = seen.page.locator("#plot .median").evaluate_all("paths => paths.map((p) => p.getAttribute('d'))")
    reached = [max(float(x) for x in re.findall(r"[ML]([\d.]+)", line)) for line in lines]
    left, width = 60, seen.page.locator("#plot").evaluate("plot => plot.viewBox.baseVal.width - 74")
    steps = {name: round((x - left) / width * 300) for (name, *_), x in zip(legend, reached, strict=True)}
    assert steps == {"hetero": 300, "all_dgram": 125, "all_stiefel": 100}
    seen.context.close()
    assert seen.wrong == []


def highest_tick(page):
    """Of the losses, which have decimals as the steps do not."""
    texts = page.locator("#plot text.axis").all_text_contents()
    return max(float(text) for text in texts if re.fullmatch(r"\d+\.\d+", text))


def test_the_chart_works_by_keyboard_hides_arms_and_changes_its_metric(visit):
    seen = visit()
    tip = seen.page.locator("#tip")
    seen.page.focus("#plot")
    for key, step in (("End", "300"), ("ArrowLeft", "275"), ("Home", "0"), ("ArrowRight", "25")):
        seen.page.keyboard.press(key)
        assert tip.locator("b").inner_text() == f"step {step}"
    rows = tip.locator("tr").count()
    seen.page.keyboard.press("Escape")
    assert tip.is_hidden()
    lines = seen.page.locator("#plot .median").count()
    top = highest_tick(seen.page)
    name = seen.page.locator("#legend button", has_text="hetero_inv")
    name.click()
    assert name.get_attribute("aria-pressed") == "false"
    assert seen.page.locator("#plot .median").count() == lines - 1
    seen.page.focus("#plot")
    seen.page.keyboard.press("ArrowRight")
    assert tip.locator("tr").count() == rows - 1
    seen.page.select_option("#span", "0.5")
    assert highest_tick(seen.page) < top
    seen.page.select_option("#metric", "attn_sigma")
    assert "singular value" in seen.page.locator("#plot").get_attribute("aria-label")


def test_the_chart_works_by_touch(visit):
    seen = visit(viewport=PHONE, has_touch=True, is_mobile=True)
    plot = seen.page.locator("#plot")
    plot.scroll_into_view_if_needed()
    plot.tap(position={"x": 200, "y": 150})
    assert re.fullmatch(r"step \d+", seen.page.locator("#tip b").inner_text())
    assert seen.page.locator("#tip").is_visible()


def test_colours_follow_the_system_and_the_switch(visit):
    def background(page):
        return page.evaluate("getComputedStyle(document.documentElement).backgroundColor")

    light, dark = visit(color_scheme="light"), visit(color_scheme="dark")
    assert background(light.page) == "rgb(255, 255, 255)"
    night = background(dark.page)
    assert night != "rgb(255, 255, 255)"
    light.page.click("#theme")
    assert background(light.page) == night
    light.page.reload()
    assert background(light.page) == night
    assert light.page.locator("#theme").inner_text() == "Light"
    dark.page.click("#theme")
    assert background(dark.page) == "rgb(255, 255, 255)"


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_body_never_scrolls_sideways(visit, width):
    seen = visit(viewport={"width": width, "height": 844})
    seen.page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    for button in seen.page.locator("#run-table .more").all():
        button.evaluate("button => button.click()")
    assert seen.page.evaluate("document.documentElement.scrollWidth") == width


def test_folds_open_by_button_by_address_and_for_print(visit):
    seen = visit()
    t5 = seen.page.locator("#t5")
    assert t5.get_attribute("open") is None
    seen.page.evaluate("location.hash = 't5'")
    sync_api.expect(t5).to_have_attribute("open", "")
    folds = seen.page.locator("#figures details")
    assert seen.page.locator("#figures details:not([open])").count() > 0
    seen.page.click('[data-folds="figures"]')
    assert seen.page.locator("#figures details[open]").count() == folds.count()
    seen.page.click('[data-folds="figures"]')
    assert seen.page.locator("#figures details[open]").count() == 0
    seen.page.emulate_media(media="print")
    for hidden in ("header", "#curves", "#text", "#theme"):
        assert not seen.page.locator(hidden).is_visible()
    pages = seen.page.pdf(prefer_css_page_size=True)
    assert pages.startswith(b"%PDF")
    assert seen.page.locator("#figures details[open]").count() == 0  # as it was before


def test_without_scripts_all_is_there_but_the_controls(visit):
    seen = visit(java_script_enabled=False)
    assert seen.page.locator("#f1 svg").is_visible()
    assert seen.page.locator("#run-table .details").first.is_visible()
    for hidden in ("#curves", "#text", "#theme"):
        assert not seen.page.locator(hidden).is_visible()
    seen.page.locator(".summary a.of").nth(1).click()
    assert seen.page.url.partition("#")[2].startswith("run-")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Arms, descriptions, reasons and provenance that want to be markup; two grids side by side."""
    folder = tmp_path_factory.mktemp("hostile")
    runs = [
        Run("hetero", 0, curve(2.4)),
        Run("all_stiefel", 0, curve(2.5)),
        Run("hetero", 1, [], status="pending"),
    ]
    index = grid_index(runs, description=EVIL)
    for cell in index["cells"]:
        cell["arm"] = EVIL_ARM if cell["arm"] == "hetero" else cell["arm"]
    index["arms"] = {cell["arm"]: {"attn": EVIL, "mlp": EVIL} for cell in index["cells"]}
    store = write_store(folder, runs, index=index)
    store.put_config(runs[0].run_id, store.config(runs[0].run_id) | {"provenance": {EVIL: {"git": EVIL}}})
    store.put_status(runs[2].run_id, {"status": EVIL, "reason": EVIL, "log_tail": [EVIL]})
    other = Run("hetero", 0, curve(2.3), overrides={"optimizer": {"muon": {"lr": 0.05}}})
    write_run(store, other, folder / "scratch" / "other")
    store.put_grid("other", "", grid_index([other], name="other"))
    parts = [load(store, grid=name) for name in ("quickstart", "other")]
    return write_report(parts, folder / "out", compared=True)


def test_hostile_names_stay_text(visit, hostile):
    seen = visit(hostile)
    page = seen.page
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert EVIL_ARM in page.locator("#legend").inner_text()
    assert EVIL in page.locator("#run-table").inner_text()
    page.focus("#plot")
    page.keyboard.press("End")
    assert EVIL_ARM in page.locator("#tip").inner_text()
    page.select_option('[data-key="status"]', EVIL)
    assert page.locator("#count").inner_text() == "1 of 4 runs"
    page.reload()
    assert page.locator("#count").inner_text() == "1 of 4 runs"
    assert page.locator("img").count() == 0


def test_two_grids_stand_side_by_side(visit, hostile):
    seen = visit(hostile, viewport={"width": 1440, "height": 900})
    left, right = (column.bounding_box() for column in seen.page.locator("#summary > div").all())
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    assert seen.page.locator("#differences table").is_visible()
    narrow = visit(hostile, viewport=PHONE)
    assert narrow.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
