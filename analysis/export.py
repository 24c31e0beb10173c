"""Frames as files for other programs: CSV and Parquet, a card for every run, and what to cite.

Records are read and written a few runs at a time, so that memory does not grow with the number of runs.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from analysis.load import ENVELOPES, LISTS, READERS, Frames, load, long_dtypes
from analysis.sources import BIBTEX
from mmsweep.store import RunStore
from trainers.config import RunConfig
from trainers.records import CONFIG, FINISHED, KINDS, SUMMARY

CSV, PARQUET = "csv", "parquet"
FORMATS = (CSV, PARQUET)
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters of text that a spreadsheet would run."""
RULE_DTYPES = {
    "run_id": "string",
    "rule": "string",
    "last_good": "Int64",
    "first_bad": "Int64",
    "value": "float64",
    "threshold": "float64",
}


@dataclass(frozen=True)
class Exported:
    """What `write_export` has written."""

    rows: dict[str, int]
    """By file name."""
    cards: int
    notes: tuple[str, ...]
    """What could not be read or does not agree, one line each."""


def write_export(
    stores: Sequence[RunStore | str],
    out: Path,
    *,
    grid: str | None = None,
    formats: Sequence[str] = FORMATS,
) -> Exported:
    """Write `runs`, `rules` and a file for each kind of record, `cards/<run_id>.md` and `sources.bib`.

    In Parquet spectra are whole, in list columns; CSV has no lists. Every file appears when it is whole,
    and replaces an older one. The same store gives the same bytes.

    Raises:
        InputError: as `analysis.load.load`.
    """
    told = load(stores, grid=grid, kinds=())
    run_ids = list(dict.fromkeys(told.runs["run_id"]))
    (out / "cards").mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    notes = list(told.notes)
    rows: dict[str, dict[str, int]] = {run_id: {} for run_id in run_ids}
    with ExitStack() as stack:
        files = {
            (kind, how): stack.enter_context(_FILES[how](out / f"{kind}.{how}", _columns(kind, how)))
            for kind in KINDS
            for how in formats
        }
        for start in range(0, len(run_ids), READERS):
            batch = load(stores, grid=grid, runs=run_ids[start : start + READERS], lists=PARQUET in formats)
            notes += batch.notes
            for kind in KINDS:
                frame: pd.DataFrame = getattr(batch, kind)
                for run_id, n in frame["run_id"].value_counts().items():
                    rows[str(run_id)][kind] = int(n)
                for how in formats:
                    files[kind, how].write(frame)
                    counts[f"{kind}.{how}"] = counts.get(f"{kind}.{how}", 0) + len(frame)
    for name, frame in (("runs", told.runs), ("rules", rules(told))):
        for how in formats:
            with _FILES[how](out / f"{name}.{how}", _schema(frame)) as file:
                file.write(frame)
            counts[f"{name}.{how}"] = len(frame)
    for run in told.runs.drop_duplicates("run_id").to_dict("records"):
        _write(out / "cards" / f"{run['run_id']}.md", card(told, run, rows[run["run_id"]]))
    _write(out / "sources.bib", BIBTEX)
    return Exported(dict(sorted(counts.items())), len(run_ids), tuple(dict.fromkeys(notes)))


def rules(frames: Frames) -> pd.DataFrame:
    """One row for every stability rule that fired in a run, in the order of the runs."""
    found = [
        (run_id, rule.rule, rule.last_good, rule.step, rule.value, rule.threshold)
        for run_id, verdict in frames.verdicts.items()
        for rule in verdict.rules
    ]
    return pd.DataFrame(found, columns=list(RULE_DTYPES)).astype(RULE_DTYPES)


# Files


class _File(Protocol):
    def write(self, frame: pd.DataFrame) -> None: ...

    def __enter__(self) -> _File: ...

    def __exit__(self, *error: object) -> None: ...


class _Growing:
    """A file that takes its name when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")

    def close(self) -> None:
        raise NotImplementedError

    def __exit__(self, error: object, *rest: object) -> None:
        self.close()
        if error is None:
            self.partial.replace(self.path)
        else:
            self.partial.unlink(missing_ok=True)


class _CsvFile(_Growing):
    """Floats with as many digits as tell them apart, NaN as `NaN`, missing cells empty."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        super().__init__(path)
        self.names = schema.names

    def __enter__(self) -> _CsvFile:
        self.file = self.partial.open("w", encoding="utf-8", newline="")
        csv.writer(self.file, lineterminator="\n").writerow([quoted(name) for name in self.names])
        return self

    def write(self, frame: pd.DataFrame) -> None:
        plain = {name: _quoted_column(frame[name]) for name in self.names}
        pd.DataFrame(plain).to_csv(
            self.file, header=False, index=False, lineterminator="\n", quoting=csv.QUOTE_MINIMAL
        )

    def close(self) -> None:
        self.file.close()


class _ParquetFile(_Growing):
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        super().__init__(path)
        self.schema = schema

    def __enter__(self) -> _ParquetFile:
        self.file = pq.ParquetWriter(self.partial, self.schema, compression="zstd")
        return self

    def write(self, frame: pd.DataFrame) -> None:
        if len(frame):
            columns = [pa.array(_plain(frame[f.name]), f.type, from_pandas=False) for f in self.schema]
            self.file.write_table(pa.table(columns, schema=self.schema))

    def close(self) -> None:
        self.file.close()


_FILES: Mapping[str, Any] = {CSV: _CsvFile, PARQUET: _ParquetFile}
_ARROW = {
    "category": pa.string(),
    "string": pa.string(),
    "int64": pa.int64(),
    "Int64": pa.int64(),
    "float64": pa.float64(),
    "boolean": pa.bool_(),
}


def _columns(kind: str, how: str) -> pa.Schema:
    dtypes = long_dtypes(kind, lists=how == PARQUET)
    return pa.schema(
        [
            (n, LISTS.pyarrow_dtype if d is LISTS else _ARROW[d])
            for n, d in dtypes.items()
            if n not in ENVELOPES
        ]
    )


def _schema(frame: pd.DataFrame) -> pa.Schema:
    return pa.schema([(str(name), _ARROW[str(dtype)]) for name, dtype in frame.dtypes.items()])


def _plain(column: pd.Series[Any]) -> Any:
    """What Arrow makes a column of: NaN stays a number, and a missing cell is null."""
    if column.dtype == "float64":
        return column.to_numpy()
    if isinstance(column.dtype, pd.ArrowDtype):
        return column.array.__arrow_array__().combine_chunks()
    return column.astype("string") if column.dtype == "category" else column


def quoted(text: str) -> str:
    """The text with a quote before it, where a spreadsheet would run it as a formula; line ends are LF."""
    text = f"'{text}" if text.startswith(FORMULA) else text
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _quoted_column(column: pd.Series[Any]) -> Any:
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.rename_categories([quoted(str(name)) for name in column.cat.categories])
    if column.dtype == "string":
        return column.map(quoted, na_action="ignore")
    if column.dtype == "float64":  # pandas would leave the cell of a NaN empty, and losses are NaN
        return column if column.notna().all() else column.map(_float)
    return column


def _float(value: float) -> str:
    return "NaN" if math.isnan(value) else repr(value)


# Cards


def card(frames: Frames, run: Mapping[Any, Any], rows: Mapping[str, int]) -> str:
    """One run on a page of Markdown. `run` is its row of `frames.runs`, `rows` its records by kind."""
    run_id = str(run["run_id"])
    lines = [f"# {run_id}", "", *_result(frames, run), "", "## Verdict", "", *_verdict(frames, run_id)]
    lines += ["", "## Failures", "", *_failures(frames.states.get(run_id) or {})]
    config = frames.configs.get(run_id) or {}
    lines += ["", "## Config", "", "What differs from the defaults; `config.json` holds all of it.", ""]
    lines += _facts(_science(config)) or ["none"]
    lines += ["", "## Provenance", "", *(_facts(config.get("provenance") or {}) or ["none"])]
    url = frames.urls[run_id]
    lines += ["", "## Records", "", f"In {code(url)}:", ""]
    lines += [f"- `{kind}`: {n:,} rows" for kind, n in rows.items()]
    lines += [f"- {code(name)}" for name in (CONFIG, SUMMARY) if _has(frames, run_id, name)]
    return "\n".join(lines).rstrip() + "\n"


def _has(frames: Frames, run_id: str, name: str) -> bool:
    return run_id in frames.configs if name == CONFIG else "horizon" in (frames.states.get(run_id) or {})


def _result(frames: Frames, run: Mapping[Any, Any]) -> Iterator[str]:
    grid = f" of grid {code(run['grid'])}" if run["grid"] else ""
    horizon = "" if pd.isna(run["horizon"]) else f" of {run['horizon']:,}"
    where = f"{run['status']} at step {run['step']:,}{horizon}"
    yield f"Arm {code(run['arm'])}, seed {run['seed']}{grid}: {where}."
    yield ""
    name = "Final" if run["status"] in FINISHED else "Last"
    loss = run["final_val_loss"] if run["status"] in FINISHED else run["last_val_loss"]
    said = "none" if pd.isna(loss) else "not finite" if math.isinf(loss) else f"{loss:.4f} nats per token"
    yield f"- {name} validation loss: {said}"
    if not pd.isna(run["best_val_loss"]):
        yield f"- Best validation loss: {run['best_val_loss']:.4f} nats per token"
    yield f"- Attention: {code(run['attn'] or '–')}; MLP: {code(run['mlp'] or '–')}"
    for path in frames.axes:
        yield f"- {code(path)}: {code('–' if pd.isna(run[path]) else run[path])}"
    data = (frames.configs.get(run["run_id"]) or {}).get("config") or {}
    yield f"- Data digest: {code((data.get('data') or {}).get('digest') or '–')}"


def _verdict(frames: Frames, run_id: str) -> Iterator[str]:
    verdict = frames.verdicts.get(run_id)
    if verdict is None:
        yield "Not judged: no evaluations, or no config."
        return
    yield "Unstable:" if verdict.unstable else "Stable: no rule fired."
    yield ""
    for rule in verdict.rules:
        begun = "the start" if rule.last_good is None else f"step {rule.last_good:,}"
        finite = math.isfinite(rule.value) and math.isfinite(rule.threshold)
        crossed = f": validation loss {rule.value:.4f}, threshold {rule.threshold:.4f}" if finite else ""
        yield f"- {code(rule.rule)} between {begun} and step {rule.step:,}{crossed}"


def _failures(state: Mapping[str, Any]) -> Iterator[str]:
    attempts = state.get("attempts", state.get("attempt")) or 0
    failures = state.get("failures") or ()
    reason = f" Reason: {code(state['reason'])}." if state.get("reason") else ""
    yield f"Attempts: {attempts}.{reason or ('' if failures else ' None recorded.')}"
    if failures:
        yield ""
    for failure in failures:
        yield "- " + ", ".join(f"{key}: {code(value)}" for key, value in _flat(failure))


def _science(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config without its defaults; as it stands where it is of another version."""
    try:
        run = RunConfig.model_validate(config.get("config"))
    except ValidationError:
        return config.get("config") or {}
    return run.model_dump(mode="json", exclude_defaults=True, exclude={"arm", "seed"})


def _facts(values: Mapping[str, Any]) -> list[str]:
    return [f"- {key}: {code(value)}" for key, value in _flat(values)]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key}.")
        elif inner is not None and inner not in ("", []):
            yield f"{prefix}{key}", ", ".join(map(str, inner)) if isinstance(inner, list) else inner


def code(value: Any) -> str:
    """The value as a code span of one line: nothing in it is Markdown or HTML."""
    text = " ".join(str(value).split()).replace("`", "'")
    return f"`{text}`" if text else "–"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")
