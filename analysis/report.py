"""The report: one self-contained HTML page, with its tables and figures beside it as files."""

from __future__ import annotations

import base64
import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from analysis import (
    chart,
    compare,
    contrasts,
    figures,
    hypotheses,
    mechanism,
    runtable,
    survival,
    tables,
    theme,
    typeset,
    verdict,
)
from analysis.contrasts import count
from analysis.inline import inline
from analysis.load import Frames
from analysis.tables import Text
from mmsweep.regrid import flat
from trainers.records import PENDING, RUNNING

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Cell:
    """A table's cell on the page: a value, smaller lines below it, and the runs behind them."""

    value: str
    small: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    id: str
    title: str
    columns: tuple[str, ...]
    words: tuple[bool, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]
    files: tuple[str, ...]
    """Links, from the page."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure on the page."""

    id: str
    title: str
    caption: str
    svg: Markup
    files: tuple[str, ...]
    runs: tuple[str, ...] = ()


@dataclass
class Part:
    """What the page shows of one grid."""

    frames: Frames
    name: str
    summary: list[verdict.Sentence]
    tables: list[Table] = field(default_factory=list)
    figures: list[Drawn] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Why the other figures could not be drawn."""
    modular: list[Table] = field(default_factory=list)


def write_report(
    frames: Frames | Sequence[Frames], out_dir: Path, *, compared: bool = False, refresh: int | None = None
) -> Path:
    """Write `index.html`, `tables/` and `figures/` into `out_dir`; returns the page's path.

    The same frames give the same bytes. Files of an earlier report are overwritten, others left alone.
    The page of several grids shows one after the other, `compared`: two side by side with their
    differences; the files of each are in a folder of its name. `refresh`: seconds after which the page
    loads itself again while runs have not ended.
    """
    several = [frames] if isinstance(frames, Frames) else list(frames)
    parts = [
        _part(one, _Folder(out_dir, one.grid or "all" if len(several) > 1 else ""), several)
        for one in several
    ]
    differences = _differences(several, _Folder(out_dir, "")) if compared else None
    page = out_dir / "index.html"
    text = _render(parts, page, differences, refresh)
    fresh = page.with_name(".index.html.new")  # who looks at it meanwhile sees the old one, whole
    fresh.write_text(text, encoding="utf-8", newline="")
    return fresh.replace(page)


@dataclass(frozen=True, slots=True)
class _Folder:
    """Where the files of one grid go, and how the page links to them."""

    root: Path
    name: str

    def write(self, kind: str, name: str, data: bytes) -> str:
        """Write a file; returns the link."""
        link = "/".join(filter(None, (self.name, kind, name)))
        path = self.root / link
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return link

    def csv(self, name: str, table: pd.DataFrame) -> str:
        return self.write("tables", f"{name}.csv", tables.to_csv(table).encode())

    def forms(self, name: str, title: str, table: pd.DataFrame, text: Text) -> tuple[str, ...]:
        """Write a table as CSV, for a paper and for a README."""
        latex = typeset.to_latex(text, caption=title, label=f"tab:{name}")
        return (
            self.csv(name, table),
            self.write("tables", f"{name}.tex", latex.encode()),
            self.write("tables", f"{name}.md", typeset.to_markdown(text).encode()),
        )

    def drawn(self, figure: Figure, name: str) -> Drawn:
        """Write both files of a figure; returns what the page needs to show it."""
        svg = theme.svg(figure)
        files = (
            self.write("figures", f"{name}.svg", svg),
            self.write("figures", f"{name}.png", theme.png(figure)),
        )
        about: theme.About = figure.about  # type: ignore[attr-defined]
        own = self.id(name)
        return Drawn(own, about.title, about.caption, inline(svg, own, about.caption), files, about.run_ids)

    def id(self, name: str) -> str:
        """An id that is the page's alone."""
        return "-".join(filter(None, (self.name, name)))


def _part(frames: Frames, folder: _Folder, several: Sequence[Frames]) -> Part:
    """Write the files of one grid; returns what the page of `several` shows of them."""
    table = tables.t1(frames)
    swaps = contrasts.swaps(frames, table)
    crossed = mechanism.crossings(frames)
    part = Part(frames, frames.grid or "All runs", verdict.summary(frames, table, swaps, crossed))
    part.tables += [_t1(frames, table, folder), *_modules(swaps, folder), *_costs(frames, folder, several)]
    part.tables += [*_stability(frames, folder), *_mechanism(frames, crossed, folder)]
    _figures(part, folder)
    overview = figures.overview(frames)
    folder.write("figures", "overview.svg", theme.svg(overview))
    folder.write("figures", "overview.png", theme.png(overview))
    if hypotheses.applies(frames):
        part.modular += _modular(frames, folder)
        part.figures.append(folder.drawn(figures.modular(frames), "modular"))
    return part


Behind = Callable[[int, int, str], tuple[str, ...]]
"""The runs behind a cell, by its row, its column, and the column's head."""


def _column(by_place: Mapping[int, Callable[[int], tuple[str, ...]]]) -> Behind:
    return lambda row, place, _: by_place[place](row) if place in by_place else ()


def _table(
    folder: _Folder, name: str, title: str, table: pd.DataFrame, text: Text, behind: Behind | None = None
) -> Table:
    """Write a table's files; returns what the page shows. Its numbers link to the runs that `behind` names,
    else to those in its column `run_ids`."""
    if behind is None:
        ids = [str(row).split() for row in table["run_ids"]] if "run_ids" in table else []
        behind = lambda row, place, _: tuple(ids[row]) if ids and not text.words[place] else ()  # noqa: E731
    rows = []
    for i, row in enumerate(text.rows):
        cells = []
        for place, (head, cell) in enumerate(zip(text.columns, row, strict=True)):
            value, bracket, rest = cell.partition(" [")
            small = (bracket.strip() + rest,) if bracket else ()
            cells.append(Cell(value, small, behind(i, place, head) if value not in ("–", "") else ()))
        rows.append(tuple(cells))
    files = folder.forms(name, title, table, text)
    return Table(folder.id(name), title, text.columns, text.words, tuple(rows), text.notes, files)


def _t1(frames: Frames, table: pd.DataFrame, folder: _Folder) -> Table:
    """T1, with the p-values under the differences they belong to."""
    labels = [str(label) for label in table["label"]]
    own = [verdict.finished(frames, label) for label in labels]
    names = ("arm", "attention", "MLP", "rank", "published", *frames.axes)

    def behind(row: int, _: int, head: str) -> tuple[str, ...]:
        if head in names:
            return ()
        return _paired(frames, labels[row], head.removeprefix("− ")) if head.startswith("− ") else own[row]

    text = tables.t1_text(frames, table)
    whole = _table(folder, "t1", "T1. Assignments", table, text, behind)
    return _with_p_below(whole)


def _paired(frames: Frames, label: str, reference: str) -> tuple[str, ...]:
    runs, others = frames.runs[frames.runs["label"] == label], frames.runs[frames.runs["arm"] == reference]
    return contrasts.contrast(runs, others).runs if len(others) else ()


def _with_p_below(table: Table) -> Table:
    """Columns `… p, − arm` as smaller lines in the column `− arm`."""
    below: dict[str, list[tuple[int, str]]] = {}
    for place, head in enumerate(table.columns):
        words, comma, column = head.partition(", ")
        if comma and column in table.columns and words.endswith(" p"):
            below.setdefault(column, []).append((place, words))
    gone = {place for places in below.values() for place, _ in places}
    kept = [place for place in range(len(table.columns)) if place not in gone]
    rows = []
    for row in table.rows:
        cells = []
        for place in kept:
            lines = [
                f"{words} {row[p].value}"
                for p, words in below.get(table.columns[place], ())
                if row[p].value not in ("–", "", tables.EXPLORATORY) and row[place].value != "–"
            ]
            cells.append(Cell(row[place].value, (*row[place].small, *lines), row[place].runs))
        rows.append(tuple(cells))
    columns = tuple(table.columns[place] for place in kept)
    is_word = tuple(table.words[place] for place in kept)
    return Table(table.id, table.title, columns, is_word, tuple(rows), table.notes, table.files)


def _modules(swaps: Sequence[contrasts.Swap], folder: _Folder) -> Iterator[Table]:
    if swaps:
        table, text = contrasts.swaps_frame(swaps), contrasts.swaps_text(swaps)
        shown = {4: lambda i: swaps[i].contrast.runs, 5: lambda i: swaps[i].contrast.runs}
        yield _table(folder, "modules", "Which assignment for which module", table, text, _column(shown))


def _costs(frames: Frames, folder: _Folder, several: Sequence[Frames]) -> Iterator[Table]:
    """T2 where costs were recorded; T3 where the grid has axes, with fresh seeds from `several`."""
    costs, winners = tables.t2(frames), tables.t3(frames, *several)
    if len(frames.costs):
        yield _table(folder, "t2", "T2. Cost", costs, tables.t2_text(frames, costs))
    if len(winners):
        text = tables.t3_text(frames, winners)
        ids, fresh = ([str(runs).split() for runs in winners[c]] for c in ("run_ids", "fresh_run_ids"))

        def behind(row: int, place: int, head: str) -> tuple[str, ...]:
            return () if text.words[place] else tuple((fresh if head == "on fresh seeds" else ids)[row])

        yield _table(folder, "t3", "T3. Winners of the search", winners, text, behind)


def _stability(frames: Frames, folder: _Folder) -> Iterator[Table]:
    """The files about divergence, and the tables with something in them."""
    rules, compared = tables.t4(frames), survival.comparisons(frames)
    more = (folder.csv("survival", survival.curves(frames)), folder.csv("divergence", survival.times(frames)))
    runs = rules["run_id"].astype(str).tolist()
    fired = tables.t4_text(frames, rules)
    t4 = _table(folder, "t4", "T4. Which rule fired when", rules, fired, _column({2: lambda i: (runs[i],)}))
    told = tables.log_rank_text(compared)
    arms = [[verdict.finished(frames, label) for label in row[:2]] for row in told.rows]
    behind = _column({2: lambda i: arms[i][0], 3: lambda i: arms[i][1]})
    log_rank = _table(folder, "log_rank", "Time to divergence", compared, told, behind)
    log_rank = replace(log_rank, files=(*log_rank.files, *more))
    yield from (table for table in (t4, log_rank) if table.rows)


def _mechanism(frames: Frames, crossed: pd.DataFrame, folder: _Folder) -> Iterator[Table]:
    """What moved first, where some run is unstable."""
    leads = mechanism.lead_times(frames, crossed)
    more = (folder.csv("crossings", crossed), folder.csv("lead_times", leads))
    orders = mechanism.orders(frames, crossed)
    if len(orders):
        alarms, pairs = mechanism.alarms(frames, crossed), mechanism.precedence(frames, crossed)
        t5 = _table(folder, "t5", "T5. Alarms before the loss", alarms, mechanism.alarms_text(alarms))
        yield replace(t5, files=(*t5.files, *more))
        seen = mechanism.orders_text(orders, mechanism.chain(frames, crossed))
        yield _table(folder, "orders", "Order of first crossings", orders, seen)
        told = [runs.split() for runs in pairs.loc[pairs["first"] + pairs["second"] > 0, "run_ids"]]
        text, behind = mechanism.precedence_text(pairs), _column({2: lambda i: tuple(told[i])})
        yield _table(folder, "precedence", "Which of two came first", pairs, text, behind)


def _figures(part: Part, folder: _Folder) -> None:
    """Draw what the runs have records for; of the rest, say what is missing."""
    for spec in figures.FIGURES:
        try:
            figure = spec.draw(part.frames)
        except figures.NoDataError as error:
            part.missing.append(str(error).rstrip("."))
        else:
            part.figures.append(folder.drawn(figure, spec.id))


def _modular(frames: Frames, folder: _Folder) -> Iterator[Table]:
    """The section on the modular-manifolds plan."""
    found, metrics = hypotheses.answers(frames), tables.modular(frames)
    answers, compared = hypotheses.answers_text(found), hypotheses.comparisons_text(found)
    shown = pd.DataFrame(answers.rows, columns=["name", *answers.columns[1:]])
    yield _table(folder, "answers", "H1 to H5", shown, answers)
    yield _table(folder, "hypotheses", "Comparisons", hypotheses.frame(found), compared)
    text = tables.modular_text(frames, metrics)
    yield _table(folder, "metrics", "Metrics", metrics, text)


def _differences(several: Sequence[Frames], folder: _Folder) -> Table:
    left, right = several
    found = compare.rows(left, right)
    names = (left.grid or "all", right.grid or "all")
    sides = [(row.left.runs, row.right.runs, row.difference.runs) for row in found]
    behind: Behind = lambda row, place, _: sides[row][(place - 1) // 3] if place else ()  # noqa: E731
    title = f"{names[1]} − {names[0]}"
    return _table(folder, "compare", title, compare.frame(found), compare.text(found, names), behind)


# --- the page -------------------------------------------------------------------------------------


def _render(parts: Sequence[Part], page: Path, differences: Table | None, refresh: int | None) -> str:
    several = [part.frames for part in parts]
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"short": short, "anchor": _anchor, "form": _form}
    style = _asset("report.css") + "".join(
        f'\nsvg [{kind}="{light}"] {{ {kind}: light-dark({light}, {dark}); }}'
        for light, dark in theme.DARK.items()
        for kind in ("fill", "stroke")
    )
    script = _asset("report.js")
    standing = verdict.standing(*several)
    runs = runtable.rows(several, page.parent)
    news = [time for one in several if (time := verdict.newest(one)) is not None]
    ended = not {RUNNING, PENDING} & set(standing)
    return environment.from_string(_asset("report.html")).render(
        style=Markup(style),  # noqa: S704  our own file
        script=Markup(script),  # noqa: S704
        style_hash=_digest(style),
        script_hash=_digest(script),
        title=" and ".join(part.name for part in parts),
        parts=parts,
        standing=[(status, runtable.paint(status), len(runs)) for status, runs in standing.items()],
        bars=_bars(standing),
        news=verdict.clock(max(news)) if news and not ended else "",
        refresh=None if ended else refresh,
        differences=differences,
        columns=runtable.columns(several),
        runs=runs,
        choices=runtable.choices(runs),
        data=embedded(chart.data(several)),
        provenance=[row for frames in several for row in _provenance(frames)],
        made=_made(),
    )


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """As a Content-Security-Policy names what it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embedded(value: Any) -> Markup:
    """JSON that can stand inside a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII, so no U+2028 either
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704  no < is left


def short(run_id: str) -> str:
    """The digest that ends a run's id: how links name a run."""
    return run_id.rpartition("-")[2]


def _anchor(run_id: str) -> str:
    return f"run-{run_id}"


def _form(file: str, own: str) -> str:
    """What a link to a file is called: its form, or its name where it is another table's."""
    stem, _, suffix = file.rpartition("/")[2].rpartition(".")
    forms = {"csv": "CSV", "tex": "LaTeX", "md": "Markdown", "svg": "SVG", "png": "PNG"}
    return forms[suffix] if own == stem or own.endswith(f"-{stem}") else f"{stem}.{suffix}"


def _bars(standing: Mapping[str, Sequence[str]]) -> list[tuple[str, float, float]]:
    """Colour, left end and width of every status in the bar of progress, which is 100 wide."""
    total, begin, bars = sum(map(len, standing.values())), 0.0, []
    for status, runs in standing.items():
        width = 100 * len(runs) / total
        bars.append((runtable.paint(status), round(begin, 3), round(width, 3)))
        begin += width
    return bars


def _provenance(frames: Frames) -> list[tuple[str, str]]:
    """Each recorded fact with its values over the runs; facts that differ say in how many runs."""
    seen: dict[str, dict[str, int]] = {}
    for config in frames.configs.values():
        data = (config.get("config") or {}).get("data") or {}
        for path, value in flat(
            {"data digest": data.get("digest"), **(config.get("provenance") or {})}
        ).items():
            if value not in (None, ""):
                counts = seen.setdefault(path, {})
                counts[runtable.plain(value)] = counts.get(runtable.plain(value), 0) + 1
    rows = [("store", frames.store)]
    for key, counts in sorted(seen.items()):
        several = len(counts) > 1
        values = [f"{value} ({count(n, 'run')})" if several else value for value, n in sorted(counts.items())]
        rows.append((key, "; ".join(values[:6]) + ("; …" if len(values) > 6 else "")))
    return rows


def _made() -> str:
    packages = ("matplotlib", "pandas", "scipy")
    return ", ".join(
        [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    )
