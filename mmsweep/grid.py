"""A grid file becomes runs: ordered, paired by seed, each once, every error found beforehand.

    base:   what all runs share (part of a RunConfig)
    arms:   name → what the arm changes, most of all `attn` and `mlp`
    axes:   dotted path → values, or name → bundles; their cross product
    seeds:  every arm sees every seed

Later ones override earlier ones, mapping by mapping.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from mmsweep.budget import Budget, devices, unit
from mmsweep.resources import Resources
from trainers.config import (
    DataConfig,
    Flag,
    RunConfig,
    SafeName,
    Section,
    Seed,
    run_id,
)
from trainers.errors import InputError, did_you_mean
from trainers.yamlfile import (
    SHORTHAND,
    Document,
    Layer,
    Place,
    Problem,
    dotted,
    explain,
    merge,
    node_at,
    parse,
    place_of,
    places,
    plain_layer,
    raise_if,
    run_layer,
    set_value,
    show,
    twice,
)

INDEX_SCHEMA = 1
MAX_CELLS = 100_000

COLUMNS = frozenset(
    ("run_id", "grid", "arm", "seed", "attn", "mlp", "group", "family", "label", "status", "reason", "step",
     "horizon", "final_val_loss", "last_val_loss", "best_val_loss", "unstable", "first_bad", "rules",
     "attempts", "d_model", "host")
)  # fmt: skip
"""Columns of the table of runs, which an axis of bundles would hide."""

Identify = Callable[[DataConfig], str]


def _nothing_is_empty(value: Any) -> Any:
    return {} if value is None else value


Part = Annotated[
    dict[str, Any], BeforeValidator(_nothing_is_empty), Field(examples=["{attn: {manifold: dgram}}"])
]
Values = Annotated[list[Any], Field(min_length=1, examples=["[0.5, 1, 2]"])]
Bundles = Annotated[
    dict[SafeName, Part], Field(min_length=1, examples=["{small: {model: {n_layer: 4}}, large: {}}"])
]
"""Name → a part of a run: keys that change together."""


class GridSpec(Section):
    """The keys of a grid file."""

    name: SafeName
    description: str = ""
    store: Annotated[str, Field(min_length=1)] = "./results"
    base: Part = Field(default_factory=dict)
    arms: Annotated[dict[SafeName, Part], Field(min_length=1, examples=["{dgram: {attn: dgram}}"])]
    axes: (
        Annotated[dict[str, Values], Field(min_length=1, examples=["{attn.lr_multiplier: [0.5, 1]}"])] | None
    ) = None
    """Those that are lists; `BundleSpec` has the others."""
    seeds: Annotated[list[Seed], Field(min_length=1, examples=["[1337, 1338]"])]
    resources: Resources = Resources()
    budget: Budget | None = None
    stop: Flag = False
    """Stands for `stability.stop`: end a run at its first hard spike."""


class BundleSpec(Section):
    """The axes of a grid file that are bundles."""

    axes: dict[SafeName, Bundles]


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid. Cells that differ only in what their run never reads share a run."""

    run_id: str
    arm: str
    seed: int
    axes: dict[str, Any]
    """Dotted path in RunConfig → the value as given; name of an axis of bundles → the bundle's name."""


@dataclass(frozen=True)
class Grid:
    """An expanded grid file. Cells: seeds outermost, then axes (the first slowest), arms innermost."""

    name: str
    description: str
    text: str
    """The file as given."""
    arms: dict[str, dict[str, str]]
    """Arm → module kind → manifold. Kinds whose manifold is an axis are left out."""
    axes: dict[str, list[Any]]
    seeds: list[int]
    resources: Resources
    store: str
    cells: list[Cell]
    runs: dict[str, RunConfig]
    """run_id → run, in the order of their first cells."""
    budget: Budget | None = None

    def index(self) -> dict[str, Any]:
        """What the store keeps beside the grid's file: plain JSON."""
        return {
            "schema": INDEX_SCHEMA,
            "name": self.name,
            "description": self.description,
            "arms": self.arms,
            "axes": list(self.axes),
            "seeds": self.seeds,
            "cells": [
                {"run_id": cell.run_id, "arm": cell.arm, "seed": cell.seed, "axes": cell.axes}
                for cell in self.cells
            ],
            **self._limit(),
        }

    def _limit(self) -> dict[str, Any]:
        """What `mmsweep status` needs to tell what is left of the budget."""
        if self.budget is None:
            return {}
        what = {"unit": unit(self.resources), "devices": devices(self.resources)}
        return {"budget": {"hours": self.budget.hours, **what}}


def load_grid(path: Path | str, *, identify: Identify) -> Grid:
    """Read and expand a grid file.

    Args:
        path: YAML; see the module's docstring.
        identify: digest of the tokens that a DataConfig stands for. Called once for each distinct
            one; its InputErrors are reported at the line of `data`.

    Raises:
        InputError: every problem of the file, one line each.
    """
    document = parse(path)
    spec, problems = _read_spec(document)
    draft = _Draft(document, identify, problems=document.problems + problems)
    _read_layers(draft, spec)
    _check_overlaps(draft)
    cells = len(draft.arms) * len(spec.seeds if spec else ()) * math.prod(len(a.values) for a in draft.axes)
    if cells > MAX_CELLS:
        text = f"{cells:,} cells (arms x axes x seeds); the limit is {MAX_CELLS:,}: split the grid"
        draft.problems.append(document.problem(("axes",) if draft.axes else ("seeds",), text))
        raise_if(draft.problems)
    if document.dropped:  # what is left may go together badly for the lack of it
        raise_if(draft.problems)
    runs = {(point, arm): _run(draft, point, arm) for point in draft.points() for arm in draft.arms}
    raise_if(draft.problems)
    assert spec is not None
    expanded = {key: run for key, run in runs.items() if run is not None}
    _check_shares(draft, spec.resources.workers, expanded)
    for arm in spec.resources.priority.keys() - draft.arms.keys():
        text = f"there is no such arm{did_you_mean(arm, draft.arms)}"
        draft.note(("resources", "priority", arm), text)
    raise_if(draft.problems)
    return _expand(draft, spec, expanded)


# --- reading the parts -------------------------------------------------------------------------

Point = tuple[int, ...]
"""Position of a value on each axis."""


@dataclass
class _Part:
    """A layer without its bad values, and the sections that had some.

    What such a section would say about its fields together is not reported: the bad value may be
    the reason.
    """

    layer: Layer
    bad: frozenset[str]


@dataclass
class _Axis:
    key: str
    """As written in the file."""
    name: str
    """In full: the dotted path that it sets, or the name of its bundles."""
    values: list[Any]
    parts: list[_Part]
    """What each value sets."""


@dataclass
class _Draft:
    """A grid file on its way, with its problems so far."""

    document: Document
    identify: Identify
    problems: list[Problem]
    shared: list[_Part] = field(default_factory=list)
    """What the resources and `stop` imply, and `base`."""
    arms: dict[str, _Part] = field(default_factory=dict)
    axes: list[_Axis] = field(default_factory=list)
    digests: dict[DataConfig, str | None] = field(default_factory=dict)

    def note(self, place: Place, text: str) -> None:
        self.problems.append(self.document.problem(place, text))

    def points(self) -> Iterator[Point]:
        """Cells of the axes, the first axis slowest."""
        return itertools.product(*(range(len(axis.values)) for axis in self.axes))


def _read_spec(document: Document) -> tuple[GridSpec | None, list[Problem]]:
    """The checked top-level keys (None where they have problems)."""
    problems: list[Problem] = []
    data = dict(document.data)
    for key in [key for key in data if key in {*RunConfig.model_fields, *SHORTHAND}]:
        fix = f'write "{key}s:"' if key in ("arm", "seed") else 'move it below "base:"'
        problems.append(document.problem((key,), f"unknown key here: {fix}"))
        del data[key]
    if "name" not in data:
        data["name"] = document.path.stem
        try:
            TypeAdapter(SafeName).validate_python(data["name"])
        except ValidationError:
            text = f'{show(data["name"])} of the file\'s name cannot name the grid: add a "name:" key'
            problems.append(document.problem((), text))
            data["name"] = "grid"
    problems += _repeated_seeds(document, data.get("seeds"))
    axes = _mapping(data.get("axes"))
    bundles = {key: value for key, value in axes.items() if _is_bundles(key, value)}
    if bundles:
        data["axes"] = {key: value for key, value in axes.items() if key not in bundles} or None
        try:
            BundleSpec.model_validate({"axes": bundles})
        except ValidationError as error:
            problems += explain(error, document, [plain_layer({"axes": bundles})], schema=BundleSpec)
    try:
        return GridSpec.model_validate(data), problems
    except ValidationError as error:
        problems += explain(error, document, [plain_layer(data)], schema=GridSpec)
        return None, problems


def _is_bundles(key: str, value: Any) -> bool:
    """A mapping whose key is a part of a run is no axis of bundles but a list forgotten."""
    return isinstance(value, dict) and node_at(RunConfig, _config_place(key)) is None


def _repeated_seeds(document: Document, seeds: Any) -> list[Problem]:
    if not isinstance(seeds, list):
        return []
    again = [n for n, seed in enumerate(seeds) if type(seed) is int and seed in seeds[:n]]
    return [document.problem(("seeds", n), f"{seeds[n]} is given twice: remove one") for n in again]


def _read_layers(draft: _Draft, spec: GridSpec | None) -> None:
    data = draft.document.data
    on_gpu = spec is not None and spec.resources.gpus_per_worker > 0
    implied = Layer({"precision": "bfloat16" if on_gpu else "float32"}, {})
    if "stop" in data:
        set_value(implied, ("stability", "stop"), spec.stop if spec else False, ("stop",))
    base = _mapping(data.get("base"))
    draft.shared = [_Part(implied, frozenset()), _run_part(draft, base, ("base",))]
    if ("stability", "stop") in implied.origin and ("stability", "stop") in draft.shared[1].layer.origin:
        draft.note(("base", "stability", "stop"), '"stop:" at the top level sets this too: remove one')
    for name, value in _mapping(data.get("arms")).items():
        draft.arms[name] = _run_part(draft, _mapping(value), ("arms", name))
    for key, values in _mapping(data.get("axes")).items():
        if _is_bundles(key, values):
            draft.axes.append(_read_bundles(draft, key, values))
        elif isinstance(values, list) and (config := _axis_place(draft, key)):
            draft.axes.append(_read_axis(draft, key, config, values))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _run_part(draft: _Draft, value: dict[str, Any], place: Place) -> _Part:
    draft.problems += twice(draft.document, value, place)
    return _checked(draft, run_layer(value, place))


def _read_axis(draft: _Draft, key: str, config: Place, values: list[Any]) -> _Axis:
    axis = _Axis(key, dotted(config), values, [])
    seen: set[str] = set()
    for number, value in enumerate(values):
        layer = Layer({}, {})
        set_value(layer, config, value, ("axes", key, number))
        same = json.dumps(_as_floats(layer.data), sort_keys=True)
        if same in seen:
            draft.note(("axes", key, number), f"{show(value)} is given twice: remove one")
        seen.add(same)
        axis.parts.append(_checked(draft, layer))
    return axis


def _read_bundles(draft: _Draft, key: str, bundles: dict[str, Any]) -> _Axis:
    if key in COLUMNS:
        draft.note(("axes", key), "results have a column of this name: choose another")
    axis = _Axis(key, key, list(bundles), [])
    seen: dict[str, str] = {}
    for name, value in bundles.items():
        part = _mapping(value)
        axis.parts.append(_run_part(draft, part, ("axes", key, name)))
        same = json.dumps(_as_floats(run_layer(part, ()).data), sort_keys=True)
        if seen.setdefault(same, name) != name and isinstance(value, dict | None):
            draft.note(("axes", key, name), f'sets the same as "{seen[same]}": remove one')
    return axis


def _as_floats(value: Any) -> Any:
    """Makes 1 and 1.0 alike, and true and 1 not."""
    if isinstance(value, dict):
        return {key: _as_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_floats(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


_NOT_HERE: dict[Place, str] = {
    ("arm",): 'arms are the names below "arms:": remove it',
    ("seed",): 'seeds are set for all arms by "seeds:" at the top level: move it there',
    ("data", "digest"): "the digest is computed from the data: remove it",
}


def _checked(draft: _Draft, layer: Layer) -> _Part:
    """Note the problems of single values, and take those values out."""
    bad: set[Place] = set()
    for config, text in _NOT_HERE.items():
        if config in layer.origin:
            draft.note(layer.origin[config], text)
            bad.add(config)
    _remove(layer, bad)

    def single(config: Place, joint: bool) -> bool:
        if not joint:
            bad.add(config)
        return not joint

    try:
        RunConfig.model_validate(layer.data)
    except ValidationError as error:
        draft.problems += explain(error, draft.document, [layer], keep=single)
    _remove(layer, bad)
    return _Part(layer, frozenset(str(config[0]) for config in bad if config))


def _remove(layer: Layer, bad: set[Place]) -> None:
    for config in bad:
        inner: Any = layer.data
        for depth, key in enumerate(config, start=1):
            if depth == len(config) or not isinstance(inner.get(key), dict):
                inner.pop(key, None)
                break
            inner = inner[key]


def _axis_place(draft: _Draft, key: str) -> Place | None:
    """The place in RunConfig that an axis sets; None, and a problem, where there is none."""
    config = _config_place(key)
    if config in _NOT_HERE:
        draft.note(("axes", key), _NOT_HERE[config])
        return None
    if node_at(RunConfig, config) is None:
        draft.note(("axes", key), f"unknown path{_nearest_path(key)}")
        return None
    return config


def _config_place(key: str) -> Place:
    place = tuple(key.split("."))
    return ("assignment", *place) if place[0] in SHORTHAND else place


def _nearest_path(key: str) -> str:
    full = [dotted(place) for place in places(RunConfig) if place not in _NOT_HERE]
    short = [name.removeprefix("assignment.") for name in full if name.startswith("assignment.")]
    names = short + [name for name in full if not name.startswith("assignment.")]
    ends = [name for name in names if name.endswith("." + key)]
    if not ends and did_you_mean(key, names).startswith(" (did"):
        return did_you_mean(key, names)
    ends = ends or [name for name in names if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    if ends:
        return " (did you mean " + " or ".join(f'"{name}"' for name in ends) + "?)"
    return f" (paths start with {', '.join(name for name in names if '.' not in name)})"


def _check_overlaps(draft: _Draft) -> None:
    """No axis may hide what another axis or an arm sets."""
    owner: dict[Place, _Axis] = {}
    for axis in draft.axes:
        first: dict[Place, Place] = {}
        for part in axis.parts:
            first = {leaf: part.layer.origin[leaf] for leaf in part.layer.leaves()} | first
        for leaf, place in first.items():
            other = owner.setdefault(leaf, axis)
            if other is not axis:
                draft.note(place, f'the axis "{other.key}" sets {dotted(leaf)} too: remove one')
    for part in draft.arms.values():
        for leaf in part.layer.leaves():
            if leaf in owner:
                text = f'the axis "{owner[leaf].key}" sets this too, for every arm: remove one'
                draft.note(part.layer.origin[leaf], text)


# --- putting them together ---------------------------------------------------------------------


def _parts(draft: _Draft, point: Point, arm: str) -> list[_Part]:
    """What a run is made of; later ones override earlier ones."""
    chosen = [axis.parts[number] for axis, number in zip(draft.axes, point, strict=True)]
    return [*draft.shared, draft.arms[arm], *chosen]


def _run(draft: _Draft, point: Point, arm: str) -> RunConfig | None:
    """The run of one arm at one point, with the digest of its data; None if it has problems."""
    parts = _parts(draft, point, arm)
    data: dict[str, Any] = {"arm": arm}
    for part in parts:
        data = merge(data, part.layer.data)
    layers = [part.layer for part in parts]
    bad = frozenset().union(*(part.bad for part in parts))

    def explained(config: Place, joint: bool) -> bool:
        return joint and (config[0] not in bad if config else not bad)

    try:
        run = RunConfig.model_validate(data)
    except ValidationError as error:
        draft.problems += explain(error, draft.document, layers, keep=explained)
        return None
    if bad:
        return None
    digest = _digest(draft, run.data, layers)
    return run.model_copy(update={"data": run.data.model_copy(update={"digest": digest})})


def _digest(draft: _Draft, data: DataConfig, layers: Sequence[Layer]) -> str | None:
    if data not in draft.digests:
        try:
            draft.digests[data] = draft.identify(data)
        except InputError as error:
            draft.digests[data] = None
            for line in str(error).splitlines():
                draft.note(_data_place(layers), line)
    return draft.digests[data]


def _data_place(layers: Sequence[Layer]) -> Place:
    """Where the data is set: in the last layer that does."""
    for layer in reversed(layers):
        for config, place in layer.origin.items():
            if config[:1] == ("data",):
                return place
    return ("base", "data")


def _check_shares(draft: _Draft, workers: int, runs: dict[tuple[Point, str], RunConfig]) -> None:
    """Batches that the workers, or a worker's forward passes, cannot share."""
    for (point, arm), run in runs.items():
        size, micro = run.schedule.batch_size, run.runtime.micro_batch
        share = size // workers
        if size % workers:
            draft.note(("resources", "workers"), f"{workers} workers cannot share a batch of {size}")
        elif micro and share % min(micro, share):
            layers = [part.layer for part in _parts(draft, point, arm)]
            text = f"runtime.micro_batch {micro} does not divide the {share} sequences of a worker"
            draft.note(place_of(("runtime", "micro_batch"), layers), text)
        slots = run.runtime.slots
        if slots and (size % slots or slots % workers):
            layers = [part.layer for part in _parts(draft, point, arm)]
            text = f"{slots} slots must divide the batch of {size} and be a multiple of the {workers} workers"
            draft.note(place_of(("runtime", "slots"), layers), text)


def _expand(draft: _Draft, spec: GridSpec, runs: dict[tuple[Point, str], RunConfig]) -> Grid:
    cells: list[Cell] = []
    unique: dict[str, RunConfig] = {}
    first: dict[str, Point] = {}
    names = [axis.name for axis in draft.axes]
    points = list(draft.points())
    for seed, point, arm in itertools.product(spec.seeds, points, draft.arms):
        run = runs[point, arm].model_copy(update={"seed": seed})
        identity = run_id(run)
        values = [axis.values[number] for axis, number in zip(draft.axes, point, strict=True)]
        cells.append(Cell(identity, arm, seed, dict(zip(names, values, strict=True))))
        _check_twin(draft, run, unique.setdefault(identity, run), point, first.setdefault(identity, point))
    raise_if(draft.problems)
    return Grid(
        name=spec.name,
        description=spec.description,
        text=draft.document.text,
        arms={arm: _manifolds(draft, runs[points[0], arm]) for arm in draft.arms},
        axes={name: axis.values for name, axis in zip(names, draft.axes, strict=True)},
        seeds=spec.seeds,
        resources=spec.resources,
        store=spec.store,
        cells=cells,
        runs=unique,
        budget=spec.budget,
    )


_UNSEEN = ("stability", "runtime", "probes")
"""Sections that (without `stop`) leave the numbers alone, so that an axis on them makes no new runs."""


def _check_twin(draft: _Draft, run: RunConfig, first: RunConfig, point: Point, first_point: Point) -> None:
    """Two cells of one run must agree on what leaves the numbers alone, or it would be the first cell's."""
    if all(getattr(run, section) == getattr(first, section) for section in _UNSEEN):
        return
    for axis, number, other in zip(draft.axes, point, first_point, strict=True):
        sections = {leaf[0] for n in (number, other) for leaf in axis.parts[n].layer.leaves()}
        if number != other and sections & set(_UNSEEN):
            if sections <= set(_UNSEEN):
                text = "changes no numbers, so its values would all be one run: set it in base"
                draft.note(("axes", axis.key), text)
                continue
            text = f'differs from "{axis.values[other]}" in no numbers, so both would be one run: remove one'
            draft.note(("axes", axis.key, str(axis.values[number])), text)


def _manifolds(draft: _Draft, run: RunConfig) -> dict[str, str]:
    swept = {leaf for axis in draft.axes for part in axis.parts for leaf in part.layer.leaves()}
    return {
        kind: getattr(run.assignment, kind).manifold
        for kind in SHORTHAND
        if ("assignment", kind, "manifold") not in swept
    }
