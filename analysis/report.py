"""The report: one self-contained HTML page, with its tables and figures beside it as files."""

from __future__ import annotations

import base64
import hashlib
import math
import platform
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from analysis import figures, hypotheses, survival, tables, theme
from analysis.load import Frames
from trainers.records import FINISHED

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"


def write_report(frames: Frames, out_dir: Path) -> Path:
    """Write `index.html`, `tables/*.csv` and `figures/*.{svg,png}` into `out_dir`; returns the page's path.

    The same frames give the same bytes. Files of an earlier report are overwritten, others left alone.
    The arms of the modular-manifolds plan get a section of their own (see `hypotheses.applies`).
    """
    (out_dir / "tables").mkdir(parents=True, exist_ok=True)
    (out_dir / "figures").mkdir(exist_ok=True)
    table = tables.t1(frames)
    _write_table(out_dir, "t1", table)
    stability = _stability(frames, out_dir)
    drawn = [
        _drawn(out_dir, "f1", figures.f1(frames), figures.f1_caption(frames)),
        _drawn(out_dir, "f2", figures.f2(frames), figures.f2_caption(frames)),
    ]
    _write_figure(out_dir, "overview", figures.overview(frames))
    modular = _modular(frames, out_dir) if hypotheses.applies(frames) else None
    page = out_dir / "index.html"
    page.write_text(_render(frames, table, stability, drawn, modular), encoding="utf-8", newline="")
    return page


def _stability(frames: Frames, out_dir: Path) -> dict[str, Any]:
    """The files about divergence, and what the page shows of them."""
    rules, compared = tables.t4(frames), survival.comparisons(frames)
    _write_table(out_dir, "t4", rules)
    _write_table(out_dir, "divergence", survival.times(frames))
    _write_table(out_dir, "survival", survival.curves(frames))
    _write_table(out_dir, "log_rank", compared)
    return {"t4": tables.t4_text(frames, rules), "log_rank": tables.log_rank_text(compared)}


def _modular(frames: Frames, out_dir: Path) -> dict[str, Any]:
    """The files of the section on the modular-manifolds plan, and what the page shows of it."""
    found, metrics = hypotheses.answers(frames), tables.modular(frames)
    _write_table(out_dir, "hypotheses", hypotheses.frame(found))
    _write_table(out_dir, "modular", metrics)
    return {
        "answers": hypotheses.answers_text(found),
        "comparisons": hypotheses.comparisons_text(found),
        "metrics": tables.modular_text(frames, metrics),
        "figure": _drawn(out_dir, "modular", figures.modular(frames), figures.modular_caption(frames)),
    }


def _write_table(out_dir: Path, name: str, table: pd.DataFrame) -> None:
    (out_dir / "tables" / f"{name}.csv").write_text(tables.to_csv(table), encoding="utf-8", newline="")


def _write_figure(out_dir: Path, name: str, figure: Figure) -> bytes:
    """Write both files; returns the SVG."""
    svg = theme.svg(figure)
    (out_dir / "figures" / f"{name}.svg").write_bytes(svg)
    (out_dir / "figures" / f"{name}.png").write_bytes(theme.png(figure))
    return svg


def _drawn(out_dir: Path, name: str, figure: Figure, caption: str) -> dict[str, Any]:
    """Write the figure; returns what the page needs to show it."""
    svg = _write_figure(out_dir, name, figure)
    return {"name": name, "caption": caption, "svg": _inline(svg, name, caption)}


def summary(frames: Frames, table: pd.DataFrame) -> list[str]:
    """What these runs say, sentence by sentence, each with its n."""
    return [*_progress(frames), *_lowest(table), *_contrasts(frames), *_instability(table), *_spectra(frames)]


def _progress(frames: Frames) -> Iterator[str]:
    runs = frames.runs.drop_duplicates("run_id")
    counts = runs["status"].value_counts()
    done = int(counts.reindex(FINISHED).fillna(0).sum())
    others = [f"{n} {status}" for status, n in sorted(counts.items()) if status not in FINISHED]
    rest = f" ({', '.join(others)})" if others else ""
    arms, seeds = frames.runs["arm"].nunique(), frames.runs["seed"].nunique()
    yield f"{done} of {len(runs)} runs finished{rest}: {_count(arms, 'arm')}, {_count(seeds, 'seed')}."


def _lowest(table: pd.DataFrame) -> Iterator[str]:
    finite = table[table["final_median"].map(math.isfinite)].sort_values("final_median", kind="stable")
    if len(finite):
        best = finite.iloc[0]
        yield (
            f"Lowest median final validation loss: {best['label']}, {best['final_median']:.4f} "
            f"nats per token (n = {best['n_finished']})."
        )
    if len(finite) > 1:
        worst = finite.iloc[-1]
        n = worst["n_finished"]
        yield f"Highest finite median: {worst['label']}, {worst['final_median']:.4f} (n = {n})."


def _contrasts(frames: Frames) -> Iterator[str]:
    for arm, reference in tables.PREDECLARED:
        for label, runs in frames.runs[frames.runs["arm"] == arm].groupby("label", sort=False):
            found = tables.paired(frames, runs, reference)
            if not found.n:
                continue
            bounds = f", 95% interval {found.low:+.4f} to {found.high:+.4f}" if found.n > 1 else ""
            text = f"{label} − {reference}: {found.estimate:+.4f}{bounds} (paired by seed, n = {found.n})."
            yield text.replace("-0.", "−0.")


def _instability(table: pd.DataFrame) -> Iterator[str]:
    judged = table[table["n_judged"] > 0]
    if judged.empty:
        return
    hit = [
        f"{r['label']} {r['n_unstable']} of {r['n_judged']}" for _, r in judged.iterrows() if r["n_unstable"]
    ]
    clean = int((judged["n_unstable"] == 0).sum())
    if not hit:
        yield f"No finished run counts as unstable (n = {judged['n_judged'].sum()})."
    elif clean:
        yield f"Unstable runs: {'; '.join(hit)}; none in the other {clean}."
    else:
        yield f"Unstable runs: {'; '.join(hit)}."


def _spectra(frames: Frames) -> Iterator[str]:
    attention = frames.spectra[frames.spectra["module"] == "attn"]
    if attention.empty:
        return
    peak = attention.groupby("run_id")["sigma_max"].max().rename("peak")
    by_manifold = frames.runs.drop_duplicates("run_id").merge(peak, on="run_id").groupby("attn")["peak"]
    parts = []
    for manifold, values in by_manifold:
        low, high = tables.three_digits(values.min()), tables.three_digits(values.max())
        parts.append(f"{manifold} {low if low == high else f'{low} to {high}'} (n = {len(values)})")
    yield f"Largest singular value that attention reached, by its manifold: {'; '.join(parts)}."


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _render(
    frames: Frames,
    table: pd.DataFrame,
    stability: dict[str, Any],
    drawn: list[dict[str, Any]],
    modular: dict[str, Any] | None,
) -> str:
    source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)
    assert style is not None
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        style_hash=base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode(),
        title=frames.grid or "All runs",
        frames=frames,
        summary=summary(frames, table),
        t1=tables.t1_text(frames, table),
        **stability,
        figures=drawn,
        modular=modular,
        runs=_run_rows(frames),
        provenance=_provenance(frames),
    )


def _run_rows(frames: Frames) -> list[dict[str, str]]:
    rows = []
    for run in frames.runs.drop_duplicates("run_id").to_dict("records"):
        finished = run["status"] in FINISHED
        loss = run["final_val_loss"] if finished else run["last_val_loss"]
        rows.append(
            {
                "run_id": str(run["run_id"]),
                "arm": str(run["arm"]),
                "seed": str(run["seed"]),
                "status": str(run["status"]),
                "reason": str(run["reason"]),
                "step": str(run["step"]) + ("" if pd.isna(run["horizon"]) else f" / {run['horizon']}"),
                "loss": "–" if pd.isna(loss) else "not finite" if loss == math.inf else f"{loss:.4f}",
                "so_far": "" if finished or pd.isna(loss) else " so far",
                "rules": "–" if pd.isna(run["unstable"]) else str(run["rules"]) or "none",
            }
        )
    return rows


def _provenance(frames: Frames) -> list[tuple[str, str]]:
    """Each recorded fact with its values over the runs; facts that differ say in how many runs."""
    seen: dict[str, dict[str, int]] = {}
    for config in frames.configs.values():
        data = (config.get("config") or {}).get("data") or {}
        facts = dict(_flat("", {"data digest": data.get("digest"), **(config.get("provenance") or {})}))
        for key, value in facts.items():
            counts = seen.setdefault(key, {})
            counts[value] = counts.get(value, 0) + 1
    rows = [("store", frames.store)]
    for key, counts in sorted(seen.items()):
        several = len(counts) > 1
        values = [
            f"{value} ({_count(n, 'run')})" if several else value for value, n in sorted(counts.items())
        ]
        rows.append((key, "; ".join(values[:6]) + ("; …" if len(values) > 6 else "")))
    packages = ("matplotlib", "pandas", "scipy")
    made = ", ".join(
        [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    )
    return [*rows, ("report made with", made)]


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, list):
        yield prefix, ", ".join(str(item) for item in value)
    elif value is not None and value != "":
        yield prefix, str(value)


def _inline(svg: bytes, name: str, label: str) -> Markup:
    """The SVG as part of a page: no style attributes (the page's security policy forbids them), ids of
    its own, and ink in the colour of the page's text, so that it follows dark mode."""
    root = ElementTree.fromstring(svg)  # noqa: S314  our own bytes, made a moment ago
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}style", f"{{{_SVG}}}metadata"):
                parent.remove(child)
    for element in root.iter():
        _declarations_to_attributes(element)
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.get('id')}")
        target = element.attrib.pop(_XLINK, None)
        if target:
            element.set("href", target.replace("#", f"#{name}-", 1))
        if "clip-path" in element.attrib:
            element.set("clip-path", element.attrib["clip-path"].replace("url(#", f"url(#{name}-"))
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": label, "stroke-linejoin": "round", "stroke-linecap": "butt"}
    ElementTree.register_namespace("", _SVG)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704  serialised XML is escaped


def _declarations_to_attributes(element: ElementTree.Element) -> None:
    for declaration in element.attrib.pop("style", "").split(";"):
        key, _, value = declaration.partition(":")
        if value:
            element.set(key.strip(), value.strip())
    for key in ("fill", "stroke"):
        colour = element.get(key)
        if colour == theme.PAPER:
            element.set(key, "none")
        elif colour == theme.INK:
            element.set(key, "currentColor")
        elif colour == theme.RULE:
            element.set(key, "currentColor")
            element.set(f"{key}-opacity", "0.16")
