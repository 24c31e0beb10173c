"""Stores as typed data frames: one row per run of a grid, and its records in long form.

Running and half-written sweeps load too. The verdict on a run is recomputed from its evaluations
by the code that judges online; what the run said of itself is only compared with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import ValidationError

from analysis.stepwise import stepwise, stepwise_frame
from analysis.versions import TooNewError, migrated
from mmsweep.rows import Steps, read
from mmsweep.store import DamagedError, NotFound, RunStore, StoreError, open_store
from trainers.config import RUN_ID, RunConfig
from trainers.errors import InputError, did_you_mean
from trainers.records import (
    COMPLETED,
    CONFIG,
    DIVERGED,
    FINISHED,
    KINDS,
    PENDING,
    RECORD_TYPES,
    STATUS,
    SUMMARY,
)
from trainers.stability import Verdict, judge

RUN_DTYPES = {
    "run_id": "string",
    "grid": "string",  # "" where the run is in no grid
    "arm": "string",
    "seed": "int64",
    "attn": "string",
    "mlp": "string",
    "group": "string",  # runs that differ in nothing but the seed
    "family": "string",  # runs that differ in nothing but the arm and the seed: these are paired
    "label": "string",
    "status": "string",
    "reason": "string",
    "step": "int64",
    "horizon": "Int64",
    "final_val_loss": "float64",  # of a finished run: +inf where it diverged or ended early
    "last_val_loss": "float64",
    "best_val_loss": "float64",
    "unstable": "boolean",  # missing before the first evaluation
    "first_bad": "Int64",
    "rules": "string",
    "attempts": "int64",
    "d_model": "Int64",
    "host": "string",
}
LISTS = pd.ArrowDtype(pa.list_(pa.float64()))
_DTYPES = {"str": "category", "int": "int64", "float": "float64"}
ENVELOPES = {f"{name}_{end}": name for name in ("loss", "grad_norm") for end in ("min", "max")}
"""Columns of `steps` beside the record's, by the field they bound; see `load`."""
READERS = 8
"""Runs that are read at a time."""


@dataclass(frozen=True)
class Frames:
    """All that tables and figures are made from.

    `runs` has the columns of `RUN_DTYPES` and one per path in `axes`; the frames of records, `steps`
    to `costs`, are long, with `run_id`, `arm`, `seed` and the record's fields (`long_dtypes`), ordered
    by run, as in `runs`, and by key.
    """

    store: str
    grid: str | None
    """None where several grids were read, or none at all."""
    description: str
    arms: tuple[str, ...]
    """In the order of the grid file."""
    axes: tuple[str, ...]
    runs: pd.DataFrame
    steps: pd.DataFrame
    evals: pd.DataFrame
    spectra: pd.DataFrame
    updates: pd.DataFrame
    heads: pd.DataFrame
    attention: pd.DataFrame
    flow: pd.DataFrame
    costs: pd.DataFrame
    stepwise: pd.DataFrame
    """Two rows per run with records of steps, taken from all of them, whatever of `steps` was asked for:
    see `analysis.stepwise`."""
    verdicts: Mapping[str, Verdict]
    configs: Mapping[str, Mapping[str, Any]]
    """The `config.json` of each run that has one."""
    states: Mapping[str, Mapping[str, Any]]
    """The `summary.json` of each run, or its `status.json` where it has not ended."""
    urls: Mapping[str, str]
    """Where the objects of each run are."""
    stride: int
    """Every how many steps `steps` has a row; 1 is all of them."""
    notes: tuple[str, ...]
    """What could not be read or does not agree, one line each."""


def load(
    stores: RunStore | str | Sequence[RunStore | str],
    *,
    grid: str | Sequence[str] | None = None,
    runs: Collection[str] | None = None,
    kinds: Collection[str] = KINDS,
    lists: bool = False,
    between: Steps | None = None,
    step_rows: int | None = None,
) -> Frames:
    """Read the runs of `grid`, or of several; of whole stores, runs outside any grid included, where None.

    A run that is in several stores is taken from the first where it has ended, else from the first.

    Args:
        runs: ids of the runs wanted, of those.
        kinds: the records wanted; the other frames are empty.
        lists: whole spectra too (`sigma`, `gram_diag`), as columns of Arrow lists.
        between: first and last step of the records wanted. Evaluations, which judge a run, come whole.
        step_rows: the most rows of `steps`, and one a run. Where the runs have more, the frame has every
            k-th step (steps divisible by k, and the last), k the least that is enough, which is `stride`.
            `loss_min` to `grad_norm_max` are the extremes of the steps after the row before and up to the
            row, so that no spike is lost: of the finite values for `_min`; for `_max` NaN counts as +inf.

    Raises:
        InputError: a store holds nothing, there is no such grid, a grid's index is broken, or all that is
            there was written by a later version.
    """
    opened = [open_store(s) if isinstance(s, str) else s for s in _listed(stores)]
    names = {store.url: store.grids() for store in opened}
    run_ids = {store.url: [r for r in store.run_ids() if RUN_ID.match(r)] for store in opened}
    for store in opened:
        if not names[store.url] and not run_ids[store.url] and grid is None:
            raise InputError(f"{store.url}: no runs here; launch a grid into this store or check its path")
    wanted = None if grid is None else list(_listed(grid))
    for name in wanted or ():
        _check_grid(name, opened, names)
    cells, indexes = _planned(opened, names, run_ids, wanted)
    cells = [cell for cell in cells if runs is None or cell["run_id"] in runs]
    held = {url: set(ids) for url, ids in run_ids.items()}
    homes = {
        run_id: [store for store in opened if run_id in held[store.url]] or opened[:1]
        for run_id in dict.fromkeys(cell["run_id"] for cell in cells)
    }
    readings = _read_all(homes, frozenset(kinds), lists=lists, between=between, step_rows=step_rows)
    if runs is None and readings and all(reading.too_new for reading in readings.values()):
        first = next(iter(readings.values()))
        raise InputError(f"{first.store.url}: {first.notes[0]}")
    return _frames(", ".join(store.url for store in opened), indexes, cells, readings)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def long_dtypes(kind: str, *, lists: bool = False) -> dict[str, Any]:
    """Columns of a long frame: the record's fields, lists only where asked for."""
    columns: dict[str, Any] = {"run_id": "category", "arm": "category", "seed": "int64"}
    columns |= _fields(kind, lists=lists)
    if kind == "steps":
        columns |= dict.fromkeys(ENVELOPES, "float64")
    return columns


def _fields(kind: str, *, lists: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in fields(RECORD_TYPES[kind]):
        if str(field.type) in _DTYPES:
            found[field.name] = _DTYPES[str(field.type)]
        elif lists:
            found[field.name] = LISTS
    del found["run"]
    return found


# What there is


def _check_grid(name: str, stores: Sequence[RunStore], names: Mapping[str, Sequence[str]]) -> None:
    known = sorted({grid for found in names.values() for grid in found})
    if name not in known:
        urls = ", ".join(store.url for store in stores)
        hint = did_you_mean(name, known) or f"; the store holds no grid at all: check the path {urls}"
        raise InputError(f'{urls}: no grid "{name}"{hint}')


def _planned(
    stores: Sequence[RunStore],
    names: Mapping[str, Sequence[str]],
    run_ids: Mapping[str, Sequence[str]],
    wanted: Sequence[str] | None,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The cells of all grids and the runs outside them, each once, and the index of every grid."""
    cells: dict[str, dict[str, Any]] = {}
    indexes: dict[str, dict[str, Any]] = {}
    for store in stores:
        for name in names[store.url] if wanted is None else wanted:
            if name not in names[store.url]:
                continue
            index = _index(store, name)
            known = indexes.setdefault(name, index)
            known["arms"] = {**index["arms"], **known["arms"]}
            known["axes"] = list(dict.fromkeys([*known["axes"], *index["axes"]]))
            for cell in _cells(name, index):
                cells.setdefault(json.dumps([name, cell["run_id"], cell["axes"]], default=str), cell)
    listed = {cell["run_id"] for cell in cells.values()}
    if wanted is None:
        for run_id in dict.fromkeys(r for store in stores for r in run_ids[store.url]):
            if run_id not in listed:
                cells[run_id] = {"run_id": run_id, "grid": "", "axes": {}}
    return list(cells.values()), indexes


def _index(store: RunStore, name: str) -> dict[str, Any]:
    try:
        index = migrated(store.grid_index(name), "index")
    except TooNewError as error:
        raise InputError(f"{store.url}/grids/{name}.json: {error}") from None
    except (NotFound, DamagedError, ValueError) as error:
        raise InputError(f"{error}; launch the grid again to rewrite it") from None
    return {"arms": {}, "axes": [], **index}


def _cells(name: str, index: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for cell in index["cells"]:
        note = index["arms"].get(cell["arm"])
        note = note if isinstance(note, dict) else {}
        kinds = {kind: str(note.get(kind, "")) for kind in ("attn", "mlp")}
        yield {"axes": {}, **cell, **kinds, "grid": name}


# What is read of it


def _read_all(
    homes: Mapping[str, Sequence[RunStore]],
    kinds: Collection[str],
    *,
    lists: bool,
    between: Steps | None,
    step_rows: int | None,
) -> dict[str, _Reading]:
    with ThreadPoolExecutor(READERS) as pool:
        readings = dict(zip(homes, pool.map(lambda r: _Reading(_home(r, homes[r]), r), homes), strict=True))
        total = sum(reading.step for reading in readings.values())
        stride = -(-total // step_rows) if step_rows and total else 1
        work = [
            pool.submit(reading.read, kinds, lists=lists, between=between, stride=stride)
            for reading in readings.values()
        ]
        for done in work:
            done.result()
    return readings


def _home(run_id: str, stores: Sequence[RunStore]) -> RunStore:
    """The store to read a run from, of those that have it."""
    if len(stores) > 1:
        for store in stores:
            if store.objects.exists(f"runs/{run_id}/{SUMMARY}"):
                return store
    return stores[0]


class _Reading:
    """What the store holds of one run: its facts at once, its records by `read`."""

    def __init__(self, store: RunStore, run_id: str) -> None:
        self.notes: list[str] = []
        self.run_id = run_id
        self.store = store
        self.stride = 1
        self.too_new = False
        self.entries = store.objects.entries(f"runs/{run_id}")
        self.config = self._json(CONFIG, store.config)
        self.summary = self._json(SUMMARY, store.summary)
        self.state = self.summary or self._json(STATUS, store.status)
        self.run = self._parse()
        self.status = str(self.state.get("status") or PENDING)
        self.tables: dict[str, pa.Table] = {}
        self.evals: list[tuple[int, float]] = []
        self.stepwise: tuple[dict[str, Any], ...] = ()
        self.verdict: Verdict | None = None
        self._seen = 0
        self._nonfinite_at: int | None = None

    def _json(self, name: str, get: Callable[[str], dict[str, Any] | None]) -> dict[str, Any]:
        if not any(entry.key.endswith(f"{self.run_id}/{name}") for entry in self.entries):
            return {}
        try:
            value = get(self.run_id) or {}
            return migrated(value, name) if name != STATUS else value
        except TooNewError as error:
            self.too_new = True
            self.notes.append(f"{self.run_id}: {name} {error}")
        except (StoreError, ValueError) as error:
            self.notes.append(f"{self.run_id}: {name} cannot be read ({error})")
        return {}

    def _parse(self) -> RunConfig | None:
        if not self.config:
            return None
        try:
            return RunConfig.model_validate(self.config.get("config"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            self.notes.append(f"{self.run_id}: config.json is not of this version ({where}: {first['msg']})")
            return None

    def read(self, kinds: Collection[str], *, lists: bool, between: Steps | None, stride: int) -> None:
        """Fill `tables` with the records of `kinds`, and judge the run."""
        if self.too_new:
            return
        self.stride = stride
        facts = len(self.notes)
        alarms: list[str] = []
        for kind in KINDS:
            if kind not in kinds and kind not in ("steps", "evals"):
                continue
            columns = list(_fields(kind, lists=lists))
            if kind not in kinds:
                columns = ["step", "val_loss"] if kind == "evals" else ["step", "loss", "grad_norm"]
            whole = kind in ("steps", "evals")
            table = self._table(kind, columns, None if whole else between, alarms)
            if table is not None and table.num_rows:
                self._take(kind, table, wanted=kind in kinds, between=between)
        if self.tables and not self.config and len(self.notes) == facts:
            self.notes.append(f"{self.run_id}: has records and no config.json, so it cannot be judged")
        self.verdict = self._judge()
        if len(self.notes) == facts:
            self.notes += [f"{self.run_id}: {line}" for line in alarms]

    def _take(self, kind: str, table: pa.Table, *, wanted: bool, between: Steps | None) -> None:
        self._seen = max(self._seen, table["step"][-1].as_py())
        if kind == "evals":
            self.evals = list(zip(table["step"].to_pylist(), table["val_loss"].to_pylist(), strict=True))
        if kind == "steps":
            step, loss, norm = (table[name].to_numpy() for name in ("step", "loss", "grad_norm"))
            finite = np.isfinite(loss) & np.isfinite(norm)
            self._nonfinite_at = None if finite.all() else int(step[~finite][0])
            self.stepwise = stepwise(step, loss, norm, self.horizon or int(step[-1]))
            if wanted:
                table = thinned(table, self.stride)
                if between:
                    step = table["step"].to_numpy()
                    table = table.filter(pa.array((step >= between[0]) & (step <= between[1])))
        if wanted:
            self.tables[kind] = table

    def _table(
        self, kind: str, columns: list[str], steps: Steps | None, alarms: list[str]
    ) -> pa.Table | None:
        try:
            for _ in range(3):
                try:
                    rows = read(self.store.objects, self.entries, kind, columns=columns, steps=steps)
                except (
                    NotFound,
                    DamagedError,
                ) as error:  # or compacted by another process since it was listed
                    before, self.entries = self.entries, self.store.objects.entries(f"runs/{self.run_id}")
                    if self.entries == before:
                        raise StoreError(str(error)) from None
                else:
                    alarms += rows.alarms.values()
                    return rows.table
            raise StoreError("it is rewritten all the time")
        except (StoreError, ValueError) as error:
            self.notes.append(f"{self.run_id}: {kind} cannot be read ({error})")
            return None

    @property
    def horizon(self) -> int | None:
        if self.run is not None:
            return self.run.schedule.steps
        horizon = self.state.get("horizon", self.state.get("steps"))
        return horizon if isinstance(horizon, int) else None

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as is known."""
        said = self.state.get("steps" if self.summary else "step")
        return max(self._seen, said if isinstance(said, int) else 0)

    def _judge(self) -> Verdict | None:
        if self.run is None or not self.evals:
            return None
        verdict = judge(
            self.evals, self.run.schedule.steps, self.run.stability, nonfinite_at=self._nonfinite_at
        )
        said = self.summary.get("verdict")
        if isinstance(said, dict) and bool(said.get("unstable")) != verdict.unstable:
            was = "unstable" if said.get("unstable") else "stable"
            now = "unstable" if verdict.unstable else "stable"
            self.notes.append(f"{self.run_id}: its summary says {was}, its evaluations say {now}")
        if self.status == DIVERGED and not verdict.unstable:
            self.notes.append(f"{self.run_id}: it ended as diverged and its evaluations do not say so")
        return verdict


def thinned(table: pa.Table, stride: int) -> pa.Table:
    """Every `stride`-th step and the last, with the extremes of the steps up to each; see `load`."""
    step = table["step"].to_numpy()
    kept = np.flatnonzero(step % stride == 0) if stride > 1 else np.arange(len(step))
    if not len(kept) or kept[-1] != len(step) - 1:
        kept = np.append(kept, len(step) - 1)
    starts = np.append(0, kept[:-1] + 1)
    kept_rows = table.take(pa.array(kept)) if len(kept) < len(step) else table
    for name, source in ENVELOPES.items():
        values = table[source].to_numpy()
        if name.endswith("_max"):
            extremes = np.maximum.reduceat(np.where(np.isnan(values), np.inf, values), starts)
        else:
            extremes = np.fmin.reduceat(np.where(np.isinf(values), np.nan, values), starts)
        kept_rows = kept_rows.append_column(name, pa.array(extremes))
    return kept_rows


# Frames


def _frames(
    store: str,
    indexes: Mapping[str, Mapping[str, Any]],
    cells: list[dict[str, Any]],
    readings: Mapping[str, _Reading],
) -> Frames:
    grid = next(iter(indexes)) if len(indexes) == 1 else None
    axes = tuple(dict.fromkeys(str(path) for index in indexes.values() for path in index["axes"]))
    rows = [_row(cell, readings[cell["run_id"]]) for cell in cells]
    _label(rows, axes)
    arms = dict.fromkeys([str(arm) for index in indexes.values() for arm in index["arms"]])
    arms |= dict.fromkeys(row["arm"] for row in rows)
    owners = {row["run_id"]: row for row in rows}
    notes = [note for reading in readings.values() for note in reading.notes]
    stride = max((reading.stride for reading in readings.values()), default=1)
    if stride > 1:
        notes.append(
            f"steps: every {stride}th of each run, with the extremes of loss and gradient norm between"
        )
    return Frames(
        store=store,
        grid=grid,
        description=str(indexes[grid].get("description") or "") if grid else "",
        arms=tuple(arms),
        axes=axes,
        runs=_runs_frame(rows, axes),
        steps=_long("steps", readings, owners),
        evals=_long("evals", readings, owners),
        spectra=_long("spectra", readings, owners),
        updates=_long("updates", readings, owners),
        heads=_long("heads", readings, owners),
        attention=_long("attention", readings, owners),
        flow=_long("flow", readings, owners),
        costs=_long("costs", readings, owners),
        stepwise=stepwise_frame({r: reading.stepwise for r, reading in readings.items()}),
        verdicts={r: reading.verdict for r, reading in readings.items() if reading.verdict},
        configs={r: reading.config for r, reading in readings.items() if reading.config},
        states={r: reading.state for r, reading in readings.items() if reading.state},
        urls={r: f"{reading.store.url}/runs/{r}" for r, reading in readings.items()},
        stride=stride,
        notes=tuple(notes),
    )


def _row(cell: Mapping[str, Any], reading: _Reading) -> dict[str, Any]:
    run = reading.run
    arm, _, seed = reading.run_id.rpartition("-")[0].rpartition("-s")
    losses = [loss for _, loss in reading.evals]
    verdict = reading.verdict
    return {
        "run_id": reading.run_id,
        "grid": cell["grid"],
        "arm": str(cell.get("arm") or arm),
        "seed": int(cell.get("seed", seed)),
        "attn": run.assignment.attn.manifold if run else cell.get("attn", ""),
        "mlp": run.assignment.mlp.manifold if run else cell.get("mlp", ""),
        "axes": dict(cell["axes"]),
        "config": reading.config.get("config") or {},
        "store": reading.store.url,
        "status": reading.status,
        "reason": str(reading.state.get("reason") or ""),
        "step": reading.step,
        "horizon": reading.horizon,
        "final_val_loss": _final(reading),
        "last_val_loss": losses[-1] if losses else math.nan,
        "best_val_loss": min(filter(math.isfinite, losses), default=math.nan),
        "unstable": True if reading.status == DIVERGED else verdict.unstable if verdict else None,
        "first_bad": verdict.first_bad if verdict else None,
        "rules": "; ".join(_bracket(r.rule, r.last_good, r.step) for r in verdict.rules) if verdict else "",
        "attempts": int(reading.state.get("attempts", reading.state.get("attempt")) or 0),
        "d_model": run.model.d_model if run else None,
        "host": str((reading.config.get("provenance") or {}).get("host") or reading.state.get("host") or ""),
    }


def _final(reading: _Reading) -> float:
    """Loss at the end of the schedule; +inf where a finished run has none, NaN before the end."""
    if reading.status not in FINISHED or (reading.status == COMPLETED and not reading.evals):
        return math.nan
    evaluated, last = reading.evals[-1] if reading.evals else (0, math.nan)
    cut_short = reading.horizon is not None and evaluated < reading.horizon
    if (reading.status == DIVERGED and cut_short) or not math.isfinite(last):
        return math.inf
    return last


def _bracket(rule: str, last_good: int | None, step: int) -> str:
    return f"{rule} ({'start' if last_good is None else last_good}, {step}]"


def _label(rows: list[dict[str, Any]], axes: tuple[str, ...]) -> None:
    """Add group, family and label: which runs are seeds of one thing, and which are paired."""
    short = {path: path.rpartition(".")[2] for path in axes}
    short = {path: name if list(short.values()).count(name) == 1 else path for path, name in short.items()}
    several = len({row["grid"] for row in rows}) > 1
    for row in rows:
        config = row.pop("config")
        if row["grid"]:
            row["family"] = f"{row['grid']} {_digest(row['axes'])}"
            row["group"] = f"{row['family']} {row['arm']}"
            cell = [f"{short.get(path, path)}={_plain(value)}" for path, value in row["axes"].items()]
            parts = [row["arm"], *cell]
            if several:
                parts.append(row["grid"])
        else:
            science = {k: v for k, v in config.items() if k not in ("seed", "runtime", "probes")}
            row["group"] = _digest(science or row["run_id"])
            shared = {k: v for k, v in science.items() if k not in ("arm", "assignment")}
            row["family"] = _digest(shared or row["run_id"])
            parts = [row["arm"], f"no grid, {row['group'][:4]}"] if several else [row["arm"]]
        row["label"] = " · ".join(parts)
    _pair_within_stores(rows)
    _tell_twins_apart(rows)


def _pair_within_stores(rows: list[dict[str, Any]]) -> None:
    """Two stores may hold a seed of one arm twice, of other data, say: pairs are of one store then."""
    ids: dict[tuple[str, str, int], set[str]] = {}
    for row in rows:
        ids.setdefault((row["family"], row["arm"], row["seed"]), set()).add(row["run_id"])
    twice = {family for (family, _, _), found in ids.items() if len(found) > 1}
    for row in rows:
        store = row.pop("store")
        if row["family"] in twice:
            row["family"] += f" {store}"


def _tell_twins_apart(rows: list[dict[str, Any]]) -> None:
    groups: dict[str, set[str]] = {}
    for row in rows:
        groups.setdefault(row["label"], set()).add(row["group"])
    for row in rows:
        if len(groups[row["label"]]) > 1:
            row["label"] += f" · {_digest(row['group'])[:4]}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _runs_frame(rows: list[dict[str, Any]], axes: tuple[str, ...]) -> pd.DataFrame:
    columns: dict[str, pd.Series[Any]] = {}
    for name, dtype in RUN_DTYPES.items():
        columns[name] = pd.Series([row[name] for row in rows], dtype=dtype)
    for path in axes:
        values = [row["axes"].get(path) for row in rows]
        numbers = all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in values)
        if numbers:
            columns[path] = pd.Series([math.nan if v is None else float(v) for v in values], dtype="float64")
        else:
            columns[path] = pd.Series(["" if v is None else str(v) for v in values], dtype="string")
    return pd.DataFrame(columns)


def _long(kind: str, readings: Mapping[str, _Reading], owners: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """The records of every run, ordered by run and by key. The readings lose them."""
    found = {r: table for r, reading in readings.items() if (table := reading.tables.pop(kind, None))}
    lists = any(pa.types.is_list(field.type) for table in found.values() for field in table.schema)
    dtypes = long_dtypes(kind, lists=lists)
    if not found:
        return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in dtypes.items()})
    lengths = [table.num_rows for table in found.values()]
    arms = [owners[run_id]["arm"] for run_id in found]
    columns: dict[str, Any] = {
        "run_id": _repeated(list(found), lengths),
        "arm": _repeated(arms, lengths),
        "seed": np.repeat(np.array([owners[run_id]["seed"] for run_id in found], dtype=np.int64), lengths),
    }
    whole = pa.concat_tables(found.values())
    del found
    for name, dtype in dtypes.items():
        if name not in columns:
            columns[name] = _column(whole[name], dtype)
            whole = whole.drop_columns([name])
    return pd.DataFrame(columns, copy=False)[list(dtypes)]


def _repeated(values: Sequence[str], lengths: Sequence[int]) -> pd.Categorical:
    """Each value as often as its length says; categories in the order of the values."""
    categories = list(dict.fromkeys(values))
    place = {value: i for i, value in enumerate(categories)}
    codes = np.repeat(np.array([place[value] for value in values], dtype=np.int32), lengths)
    return pd.Categorical.from_codes(codes, categories=pd.Index(categories, dtype="string"))


def _column(values: pa.ChunkedArray, dtype: Any) -> Any:
    if dtype is LISTS:
        return pd.arrays.ArrowExtensionArray(values)
    if dtype != "category":
        return values.to_numpy()
    coded = values.dictionary_encode().unify_dictionaries().combine_chunks()
    coded = coded.chunk(0) if isinstance(coded, pa.ChunkedArray) else coded
    found = coded.dictionary.to_pylist()
    order = sorted(range(len(found)), key=lambda i: _natural(found[i]))
    places = np.empty(len(found), dtype=np.int32)
    places[order] = np.arange(len(found))
    categories = pd.Index([found[i] for i in order], dtype="string")
    return pd.Categorical.from_codes(places[coded.indices.to_numpy()], categories=categories)


def _natural(name: str) -> list[Any]:
    """Sorts `h.2` before `h.10`."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]
