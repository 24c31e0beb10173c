"""What a run leaves behind: record types, statuses and file names, defined once.

A record is one JSON object per line with the keys `run, attempt, kind, step` and its own fields.
JSON has no NaN, so non-finite floats are written as the strings "NaN", "Infinity", "-Infinity"
(the convention of proto3 JSON) and read back as floats.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

RECORD_VERSION = 1

# Statuses of a run.
PENDING = "pending"
RUNNING = "running"
COMPLETED = "completed"
DIVERGED = "diverged"
OOM = "oom"
FAILED = "failed"
QUARANTINED = "quarantined"
STATUSES = (PENDING, RUNNING, COMPLETED, DIVERGED, OOM, FAILED, QUARANTINED)
FINISHED = (COMPLETED, DIVERGED)
"""Statuses that are results: a relaunch leaves these runs alone."""

# Files of a run's folder, here and in the store.
CONFIG = "config.json"
STATUS = "status.json"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Record:
    """Common part of every record. `step` counts optimizer steps done when it was taken."""

    run: str
    attempt: int
    step: int

    kind: ClassVar[str]
    key: ClassVar[tuple[str, ...]] = ("run", "step")
    """Fields that make a row unique; of two rows the higher attempt counts."""
    exact: ClassVar[tuple[str, ...]] = ()
    """Fields that must agree between attempts where exact resume is promised."""


@dataclass(frozen=True, slots=True)
class StepRecord(Record):
    """One optimizer step."""

    kind: ClassVar[str] = "steps"
    exact: ClassVar[tuple[str, ...]] = ("loss", "grad_norm", "lr", "muon_lr")

    tokens_seen: int
    loss: float
    """Mean cross-entropy of the step's batch, in nats, before the update."""
    grad_norm: float
    """Global norm before the clip."""
    lr: float
    muon_lr: float
    step_ms: float
    tokens_per_s: float
    time: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class EvalRecord(Record):
    """Losses on the fixed evaluation sets, in nats per token."""

    kind: ClassVar[str] = "evals"
    exact: ClassVar[tuple[str, ...]] = ("train_loss", "val_loss")

    tokens_seen: int
    train_loss: float
    val_loss: float
    time: float


@dataclass(frozen=True, slots=True)
class SpectrumRecord(Record):
    """Singular values and Gram statistics of one matrix (paper, Appendix A, 'Spectral diagnostics')."""

    kind: ClassVar[str] = "spectra"
    key: ClassVar[tuple[str, ...]] = ("run", "step", "matrix")
    exact: ClassVar[tuple[str, ...]] = ("sigma_max", "sigma_min")

    matrix: str
    """Parameter name, e.g. "h.0.attn.c_attn"."""
    layer: int
    module: str
    """"attn" or "mlp"."""
    manifold: str
    sigma: list[float]
    """All singular values, descending."""
    sigma_max: float
    sigma_min: float
    gram_diag: list[float]
    """Diagonal of WᵀW (W tall)."""
    gram_off_norm: float
    """Frobenius norm of the off-diagonal part of WᵀW."""
    gram_norm: float
    """Frobenius norm of WᵀW."""


@dataclass(frozen=True, slots=True)
class UpdateRecord(Record):
    """What Muon did to one matrix in one step, measured inside the optimizer."""

    kind: ClassVar[str] = "updates"
    key: ClassVar[tuple[str, ...]] = ("run", "step", "matrix")
    exact: ClassVar[tuple[str, ...]] = ("residual", "update_ratio")

    matrix: str
    """Parameter name; with a block number, as in "h.0.attn.c_attn.2", where `qkv` is not fused."""
    layer: int
    module: str
    """"attn" or "mlp"."""
    manifold: str
    residual: float
    """Root mean square of P(WᵀA + AᵀW), 0 for a tangent direction A."""
    distance: float
    """Frobenius norm of what P selects of WᵀW - I, after the step: how far W is from its manifold."""
    direction_norm: float
    """‖A‖₂, 1 for a converged direction."""
    update_ratio: float
    """‖W' - W‖_F / ‖W‖_F."""


@dataclass(frozen=True, slots=True)
class HeadRecord(Record):
    """Singular values of one part of attention's input weight, whole or of one head."""

    kind: ClassVar[str] = "heads"
    key: ClassVar[tuple[str, ...]] = ("run", "step", "layer", "part", "head")
    exact: ClassVar[tuple[str, ...]] = ("sigma_max",)

    layer: int
    part: str
    """"q", "k", "v", or "qk": the form `W_Qᵀ W_K / √d_head` that makes scores of token features."""
    head: int
    """From 0; -1 is all rows of the part ("qk" has heads alone)."""
    sigma_max: float
    sigma_min: float
    """Of as many singular values as the rank can be: for "qk" of the d_head largest."""
    fro_norm: float
    effective_rank: float
    """exp(H(σ / Σσ)): how many equal singular values would have this entropy."""


@dataclass(frozen=True, slots=True)
class AttentionRecord(Record):
    """How sharp one head's attention is on the probe's sequences; see `trainers.probes.attention`."""

    kind: ClassVar[str] = "attention"
    key: ClassVar[tuple[str, ...]] = ("run", "step", "layer", "head")
    exact: ClassVar[tuple[str, ...]] = ("max_logit", "jacobian_norm")

    layer: int
    head: int
    max_logit: float
    """Largest score q·k / √d_head of a token that is seen."""
    entropy: float
    """Mean over rows of H(p) / log(tokens seen): 0 for one token, 1 for all alike."""
    p_max: float
    """Mean over rows of the largest weight."""
    jacobian_norm: float
    """Mean over rows of ‖diag(p) - ppᵀ‖_F."""


@dataclass(frozen=True, slots=True)
class FlowRecord(Record):
    """Gradient, update and activations of one matrix at one step, whatever its optimizer."""

    kind: ClassVar[str] = "flow"
    key: ClassVar[tuple[str, ...]] = ("run", "step", "matrix")
    exact: ClassVar[tuple[str, ...]] = ("grad_norm", "update_ratio")

    matrix: str
    """Parameter name, e.g. "h.0.attn.c_attn"."""
    layer: int
    module: str
    """"attn" or "mlp"."""
    grad_norm: float
    """Frobenius norm before the clip."""
    clipped_grad_norm: float
    update_ratio: float
    """‖W' - W‖_F / ‖W‖_F."""
    weight_norm: float
    """‖W'‖_F, after the step."""
    sigma_max: float
    """Of W', to the accuracy of `trainers.probes.flow.largest_singular_values`."""
    activation_rms: float
    """Root mean square of the matrix's outputs on the probe's sequences, after the step."""


@dataclass(frozen=True, slots=True)
class CostRecord(Record):
    """Where the time of one step went, on rank 0, and the speed of the steps since the record before."""

    kind: ClassVar[str] = "costs"

    tokens_per_s: float
    """Of all workers together, over the steps since the last such record; evaluation does not count."""
    flop_utilisation: float
    """Share of the devices' peak that the model's own FLOPs took in that time (MFU): forward and backward,
    without recomputation and without the optimizer. NaN where the peak of the device is not known."""
    step_ms: float
    """The one step that was timed, probes excluded; the next four are parts of it."""
    forward_backward_ms: float
    """With the exchange of gradients that goes on at the same time."""
    solver_ms: float
    """Directions of Muon."""
    retraction_ms: float
    """Inside Muon; what follows AdamW's steps is in none of the parts."""
    communication_ms: float
    """Waiting for the optimizer's exchange of new weights."""
    peak_memory: int
    """Bytes: of the GPU's memory, or of the process where there is none."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a run; its file is written last, so its presence means complete."""

    run_id: str
    arm: str
    seed: int
    status: str
    reason: str
    steps: int
    horizon: int
    tokens_seen: int
    final_val_loss: float | None
    final_train_loss: float | None
    best_val_loss: float | None
    best_step: int | None
    verdict: dict[str, Any]
    attempts: int
    started: float
    finished: float
    train_seconds: float
    """Time spent in optimizer steps, evaluation excluded, over all attempts."""
    rows: dict[str, int]
    schema: int = RECORD_VERSION


RECORD_TYPES: dict[str, type[Record]] = {
    t.kind: t
    for t in (
        StepRecord,
        EvalRecord,
        SpectrumRecord,
        UpdateRecord,
        HeadRecord,
        AttentionRecord,
        FlowRecord,
        CostRecord,
    )
}
KINDS = tuple(RECORD_TYPES)


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, (list, tuple)):
        return [_to_json(v) for v in value]
    if isinstance(value, dict):
        return {k: _to_json(v) for k, v in value.items()}
    return value


_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def with_floats(value: Any) -> Any:
    """What `json.loads` made of `dumps`, with its strings for non-finite floats turned back into floats."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [with_floats(item) for item in value]
    if isinstance(value, dict):
        return {name: with_floats(item) for name, item in value.items()}
    return value


def _to_float(value: Any) -> float:
    return _NON_FINITE[value] if isinstance(value, str) else float(value)


def dumps(value: Any) -> str:
    """Strict JSON of a dict of plain values; non-finite floats become strings."""
    return json.dumps(_to_json(value), allow_nan=False, separators=(",", ":"))


def encode(record: Record) -> bytes:
    """One line of a part file, newline included."""
    return (dumps({"kind": record.kind, **asdict(record)}) + "\n").encode()


def decode(line: str | bytes) -> Record:
    """The record of one line.

    Raises:
        ValueError: not JSON, an unknown kind, or a missing field. Unknown fields are ignored:
            a newer version may have added them.
    """
    row = json.loads(line)
    if not isinstance(row, dict) or row.get("kind") not in RECORD_TYPES:
        raise ValueError("not a record of a known kind")
    record_type = RECORD_TYPES[row["kind"]]
    values: dict[str, Any] = {}
    for field in fields(record_type):
        if field.name not in row:
            raise ValueError(f"field {field.name!r} is missing")
        value = row[field.name]
        if field.type == "float":
            value = _to_float(value)
        elif field.type == "list[float]":
            value = [_to_float(v) for v in value]
        values[field.name] = value
    return record_type(**values)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write strict JSON so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def attempt_dir(attempt: int) -> str:
    return f"attempt-{attempt:03d}"


def part_name(kind: str, sequence: int) -> str:
    return f"{kind}-{sequence:06d}.jsonl"


PART = re.compile(r"attempt-(\d{3,})/([a-z]+)-(\d{6,})\.jsonl$")


class PartWriter:
    """Appends records of one attempt to numbered part files.

    Every record is one `os.write`, so a killed process loses at most the line it was writing.
    The open part carries the suffix `.open`; `roll` renames it to its final name, after which it
    never changes and may be shipped.
    """

    def __init__(self, run_dir: Path, attempt: int) -> None:
        self.folder = run_dir / attempt_dir(attempt)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open: dict[str, tuple[int, Path]] = {}
        self._next = {kind: _parts_so_far(self.folder, kind) for kind in KINDS}
        self._rolled = time.monotonic()

    def append(self, record: Record) -> None:
        if record.kind not in self._open:
            path = self.folder / (part_name(record.kind, self._next[record.kind]) + ".open")
            self._open[record.kind] = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), path)
        os.write(self._open[record.kind][0], encode(record))

    def roll(self) -> None:
        """Close every open part and give it its final name."""
        for kind, (descriptor, path) in self._open.items():
            os.fsync(descriptor)
            os.close(descriptor)
            path.rename(path.with_suffix(""))
            self._next[kind] += 1
        self._open.clear()
        self._rolled = time.monotonic()

    def roll_if_older(self, seconds: float) -> None:
        if self._open and time.monotonic() - self._rolled >= seconds:
            self.roll()


def _parts_so_far(folder: Path, kind: str) -> int:
    """One more than the highest part of a kind, so that no part is ever written twice."""
    numbers = [int(m[3]) for p in folder.iterdir() if (m := PART.search(p.as_posix())) and m[2] == kind]
    return 1 + max(numbers, default=-1)


def close_parts(run_dir: Path, attempt: int) -> None:
    """Give the parts of a process that died their final names, without the line it was writing."""
    for path in (run_dir / attempt_dir(attempt)).glob("*.jsonl.open"):
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
        path.rename(path.with_suffix(""))


class PartReader:
    """Follows the parts of one attempt while another process writes them."""

    def __init__(self, run_dir: Path, attempt: int) -> None:
        self.folder = run_dir / attempt_dir(attempt)
        self._place = dict.fromkeys(("steps", "evals"), (0, 0))  # kind: (part, offset)

    def poll(self) -> list[Record]:
        """Steps and evaluations written since the last call, each kind in order."""
        return [record for kind in self._place for record in self._poll_kind(kind)]

    def _poll_kind(self, kind: str) -> Iterator[Record]:
        while True:
            part, offset = self._place[kind]
            path = self.folder / part_name(kind, part)
            closed = path.is_file()  # asked before reading: what a closed part holds is all there is
            try:
                with (path if closed else path.with_name(path.name + ".open")).open("rb") as file:
                    file.seek(offset)
                    data = file.read()
            except FileNotFoundError:
                return  # not begun, or renamed just now: the next poll finds it
            whole = data.rfind(b"\n") + 1
            yield from parse_part(data[:whole], name=str(path))
            self._place[kind] = (part + 1, 0) if closed else (part, offset + whole)
            if not closed:
                return


def read_part(path: Path) -> Iterator[Record]:
    """Records of one part file. A torn last line (a process killed while writing) is dropped.

    Raises:
        ValueError: a broken line that is not the last, with the file's name and the line's number.
    """
    yield from parse_part(path.read_bytes(), name=str(path))


def parse_part(data: bytes, *, name: str) -> Iterator[Record]:
    """Records of the bytes of a part; see `read_part`."""
    lines = data.split(b"\n")
    torn = lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            yield decode(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{name}:{number}: {error}") from None
    if torn:
        try:
            yield decode(torn)
        except (ValueError, KeyError, TypeError):
            return


def latest(records: Iterable[Record]) -> tuple[list[Record], list[tuple[Record, Record]]]:
    """Each row once: of rows with one key the highest attempt counts.

    Returns the rows ordered by key, and the pairs whose `exact` fields differ between attempts.
    """
    best: dict[tuple[Any, ...], Record] = {}
    conflicts: list[tuple[Record, Record]] = []
    for record in records:
        key = (record.kind, *(getattr(record, name) for name in record.key))
        seen = best.get(key)
        if seen is None:
            best[key] = record
            continue
        older, newer = sorted((seen, record), key=lambda r: r.attempt)
        if any(not _same(getattr(older, name), getattr(newer, name)) for name in record.exact):
            conflicts.append((older, newer))
        best[key] = newer
    return [best[key] for key in sorted(best)], conflicts


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))
