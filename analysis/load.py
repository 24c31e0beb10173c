"""A store as typed data frames: one row per run of a grid, and its records in long form.

Running and half-written sweeps load too. The verdict on a run is recomputed from its evaluations
by the code that judges online; what the run said of itself is only compared with it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import pandas as pd
from pydantic import ValidationError

from mmsweep.store import DamagedError, NotFound, RunStore, StoreError, open_store
from trainers.config import RUN_ID, RunConfig
from trainers.errors import InputError, did_you_mean
from trainers.records import COMPLETED, DIVERGED, FINISHED, PENDING, RECORD_TYPES
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
_SCALARS = {"str": "string", "int": "int64", "float": "float64"}


@dataclass(frozen=True)
class Frames:
    """All that tables and figures are made from.

    `runs` has the columns of `RUN_DTYPES` and one per path in `axes`; the frames of records, `steps`
    to `costs`, are long, with `run_id`, `arm`, `seed` and the record's scalar fields (`long_dtypes`).
    """

    store: str
    grid: str | None
    """None where the store holds several grids and none was asked for, or no grid at all."""
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
    verdicts: Mapping[str, Verdict]
    configs: Mapping[str, Mapping[str, Any]]
    """The `config.json` of each run that has one."""
    notes: tuple[str, ...]
    """What could not be read or does not agree, one line each."""


def load(store: RunStore | str, *, grid: str | None = None) -> Frames:
    """Read the runs of `grid`; of the whole store, runs outside any grid included, where it is None.

    Raises:
        InputError: the store holds nothing, there is no such grid, or a grid's index is broken.
    """
    store = open_store(store) if isinstance(store, str) else store
    names = store.grids()
    if grid is not None and grid not in names:
        hint = did_you_mean(grid, names) or f"; the store holds no grid at all: check the path {store.url}"
        raise InputError(f'{store.url}: no grid "{grid}"{hint}')
    run_ids = [name for name in store.run_ids() if RUN_ID.match(name)]
    if not names and not run_ids:
        raise InputError(f"{store.url}: no runs here; launch a grid into this store or check its path")
    indexes = {name: _index(store, name) for name in ([grid] if grid is not None else names)}
    cells = [cell for name, index in indexes.items() for cell in _cells(name, index)]
    if grid is None:
        listed = {cell["run_id"] for cell in cells}
        cells += [{"run_id": r, "grid": "", "axes": {}} for r in run_ids if r not in listed]
    only = next(iter(indexes)) if len(indexes) == 1 else None
    return _frames(store, only, indexes, cells)


def long_dtypes(kind: str) -> dict[str, str]:
    """Columns of a long frame: the record's scalar fields. Lists (whole spectra) stay in the store."""
    columns = {"run_id": "string", "arm": "string", "seed": "int64"}
    for field in fields(RECORD_TYPES[kind]):
        if field.name != "run" and str(field.type) in _SCALARS:
            columns[field.name] = _SCALARS[str(field.type)]
    return columns


def _index(store: RunStore, name: str) -> dict[str, Any]:
    try:
        index = store.grid_index(name)
    except (NotFound, DamagedError) as error:
        raise InputError(f"{error}; launch the grid again to rewrite it") from None
    return {"arms": {}, "axes": [], **index}


def _cells(name: str, index: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for cell in index["cells"]:
        note = index["arms"].get(cell["arm"])
        note = note if isinstance(note, dict) else {}
        kinds = {kind: str(note.get(kind, "")) for kind in ("attn", "mlp")}
        yield {"axes": {}, **cell, **kinds, "grid": name}


def _frames(
    store: RunStore, grid: str | None, indexes: Mapping[str, Mapping[str, Any]], cells: list[dict[str, Any]]
) -> Frames:
    readings = {run_id: _Reading(store, run_id) for run_id in dict.fromkeys(c["run_id"] for c in cells)}
    axes = tuple(dict.fromkeys(str(path) for index in indexes.values() for path in index["axes"]))
    rows = [_row(cell, readings[cell["run_id"]]) for cell in cells]
    _label(rows, axes)
    arms = dict.fromkeys([str(arm) for index in indexes.values() for arm in index["arms"]])
    arms |= dict.fromkeys(row["arm"] for row in rows)
    owners = {row["run_id"]: row for row in rows}
    return Frames(
        store=store.url,
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
        verdicts={r: reading.verdict for r, reading in readings.items() if reading.verdict},
        configs={r: reading.config for r, reading in readings.items() if reading.config},
        notes=tuple(note for reading in readings.values() for note in reading.notes),
    )


class _Reading:
    """What the store holds of one run."""

    def __init__(self, store: RunStore, run_id: str) -> None:
        self.notes: list[str] = []
        self.run_id = run_id
        self.config = self._json("config.json", store.config)
        self.summary = self._json("summary.json", store.summary)
        self.state = self.summary or self._json("status.json", store.status)
        self.run = self._parse()
        known = bool(self.config or self.state)
        self.records = {kind: self._table(store, kind, known=known) for kind in RECORD_TYPES}
        self.status = str(self.state.get("status") or PENDING)
        self.verdict = self._judge()
        if known and not self.notes:
            self.notes += [f"{run_id}: {line}" for line in store.conflicts(run_id)]

    def _json(self, name: str, read: Any) -> dict[str, Any]:
        try:
            value = read(self.run_id) or {}
        except (StoreError, ValueError) as error:
            self.notes.append(f"{self.run_id}: {name} cannot be read ({error})")
            return {}
        return value if isinstance(value, dict) else {}

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

    def _table(self, store: RunStore, kind: str, *, known: bool) -> pd.DataFrame:
        """Rows of one kind, in the order of their keys, scalar fields alone."""
        wanted = {name: dtype for name, dtype in long_dtypes(kind).items() if name not in _OWNER}
        empty = pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in wanted.items()})
        if not known:
            return empty
        try:
            table = store.table(self.run_id, kind)
        except (StoreError, ValueError) as error:
            self.notes.append(f"{self.run_id}: {kind} cannot be read ({error})")
            return empty
        frame: pd.DataFrame = table.select(list(wanted)).to_pandas()
        return frame.astype(wanted)

    @property
    def horizon(self) -> int | None:
        if self.run is not None:
            return self.run.schedule.steps
        horizon = self.state.get("horizon", self.state.get("steps"))
        return horizon if isinstance(horizon, int) else None

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as the store knows."""
        said = self.state.get("steps" if self.summary else "step")
        seen = [int(frame["step"].max()) for frame in self.records.values() if len(frame)]
        return max([*seen, said if isinstance(said, int) else 0])

    def _judge(self) -> Verdict | None:
        evals, steps = self.records["evals"], self.records["steps"]
        if self.run is None or evals.empty:
            return None
        finite = steps["loss"].map(math.isfinite) & steps["grad_norm"].map(math.isfinite)
        bad = steps.loc[~finite, "step"]
        verdict = judge(
            list(zip(evals["step"].astype(int).tolist(), evals["val_loss"].tolist(), strict=True)),
            self.run.schedule.steps,
            self.run.stability,
            nonfinite_at=int(bad.min()) if len(bad) else None,
        )
        said = self.summary.get("verdict")
        if isinstance(said, dict) and bool(said.get("unstable")) != verdict.unstable:
            was = "unstable" if said.get("unstable") else "stable"
            now = "unstable" if verdict.unstable else "stable"
            self.notes.append(f"{self.run_id}: its summary says {was}, its evaluations say {now}")
        return verdict


_OWNER = ("run_id", "arm", "seed")


def _row(cell: Mapping[str, Any], reading: _Reading) -> dict[str, Any]:
    run = reading.run
    arm, _, seed = reading.run_id.rpartition("-")[0].rpartition("-s")
    losses = reading.records["evals"]["val_loss"]
    finite = losses[losses.map(math.isfinite)]
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
        "status": reading.status,
        "reason": str(reading.state.get("reason") or ""),
        "step": reading.step,
        "horizon": reading.horizon,
        "final_val_loss": _final(reading),
        "last_val_loss": losses.iloc[-1] if len(losses) else math.nan,
        "best_val_loss": finite.min() if len(finite) else math.nan,
        "unstable": verdict.unstable if verdict else None,
        "first_bad": verdict.first_bad if verdict else None,
        "rules": "; ".join(_bracket(r.rule, r.last_good, r.step) for r in verdict.rules) if verdict else "",
        "attempts": int(reading.state.get("attempts", reading.state.get("attempt")) or 0),
        "d_model": run.model.d_model if run else None,
        "host": str((reading.config.get("provenance") or {}).get("host") or reading.state.get("host") or ""),
    }


def _final(reading: _Reading) -> float:
    """Loss at the end of the schedule; +inf where a finished run has none, NaN before the end."""
    evals = reading.records["evals"]
    if reading.status not in FINISHED or (reading.status == COMPLETED and evals.empty):
        return math.nan
    last = float(evals["val_loss"].iloc[-1]) if len(evals) else math.nan
    evaluated = int(evals["step"].iloc[-1]) if len(evals) else 0
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
    _tell_twins_apart(rows)


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
    """The records of every run, ordered by run and by key."""
    dtypes = long_dtypes(kind)
    parts = []
    for run_id, reading in readings.items():
        frame = reading.records[kind]
        if len(frame):
            owner = owners[run_id]
            parts.append(frame.assign(run_id=run_id, arm=owner["arm"], seed=owner["seed"]))
    if not parts:
        return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in dtypes.items()})
    return pd.concat(parts, ignore_index=True)[list(dtypes)].astype(dtypes)
