"""Everything a run needs to go on as if it had never stopped, in files that hold no code.

`checkpoints/<step>/`: `model.safetensors`, `optimizer.safetensors`, `state.json`, and
`manifest.json` with sizes and digests, written last. There is no generator state in it: batches and
dropout are functions of (seed, step, rank).

Rank 0 alone writes and reads these folders. What it has read it sends to the others, so all ranks
go on from one state, also on nodes that share no folder.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainers.distributed import Group
from trainers.manifest import (
    CorruptError,
    checkpoint_name,
    checkpoint_steps,
    flush,
    verify,
    write_manifest,
)
from trainers.records import CHECKPOINTS, dumps

CHECKPOINT_VERSION = 1

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
SAVING = ".saving-"
"""Prefix of a folder that is being written or deleted; what a killed process leaves of it is nothing."""

Tensors = dict[str, Tensor]


class SaveError(Exception):
    """A checkpoint could not be written, as on a full disk: one line with the path and the cause."""


@dataclass
class Progress:
    """The scalars of a run's state."""

    step: int = 0
    tokens_seen: int = 0
    train_seconds: float = 0.0
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, train loss, validation loss)."""


@dataclass
class TrainState:
    model: nn.Module
    optimizers: dict[str, torch.optim.Optimizer]
    progress: Progress


# --- saving --------------------------------------------------------------------------------------


class Saver:
    """Writes the checkpoints of one run while it trains on.

    `save` copies the state to host memory; a thread writes the copy, flushes it, reads it back, and
    only then gives the folder its name. One copy exists at a time: a `save` that finds the last one
    still being written waits for it. So a process that is killed loses the steps since the newest
    complete checkpoint, at most two intervals, and never a checkpoint that it had.

    Every rank has one and calls it alike; the others than rank 0 do nothing. Leaving the `with` block
    waits for the writing to end.

    Args:
        run_dir: the run's folder; checkpoints are in `checkpoints/`.
        identity: `run_id`, `data` and `code`, stored for `load_newest` to compare.
        keep: how many checkpoints stay. An older one is deleted when this many newer ones have been
            read back.

    Raises:
        SaveError: from the next `save`, `wait` or the end of the block after a failed writing.
    """

    def __init__(self, run_dir: Path, group: Group, *, identity: dict[str, Any], keep: int) -> None:
        self.root = run_dir / CHECKPOINTS
        self.group = group
        self.identity = identity
        self.keep = keep
        self._host: Tensors = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, state: TrainState) -> None:
        """Copy the state, and begin to write it as the checkpoint of `state.progress.step`."""
        if not self.group.is_main:
            return
        self.wait()
        self._writing = self._thread.submit(_write, self.root, self._copy(state), self.keep)

    def wait(self) -> None:
        """Return when the last `save` is complete on disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error that is under way already says more than one about the checkpoint.
        with contextlib.suppress(SaveError) if error else contextlib.nullcontext():
            self.wait()
        self._thread.shutdown()

    def _copy(self, state: TrainState) -> _Copy:
        scalars = {
            "version": CHECKPOINT_VERSION,
            "world_size": self.group.world_size,
            "identity": self.identity,
            "progress": asdict(state.progress),
        }
        tensors = {MODEL: _model_tensors(state.model), OPTIMIZER: _optimizer_tensors(state)}
        files = {
            file: {name: self._to_host(f"{file}/{name}", tensor) for name, tensor in named.items()}
            for file, named in tensors.items()
        }
        if self.group.device.type == "cuda":
            torch.cuda.synchronize(self.group.device)
        return _Copy(state.progress.step, files, scalars)

    def _to_host(self, key: str, tensor: Tensor) -> Tensor:
        """Copy into memory that stays from one save to the next: fresh pages would cost most of the time."""
        host = self._host.get(key)
        if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._host[key] = host
        return host.copy_(tensor, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Copy:
    """A state in host memory, as its files will hold it."""

    step: int
    files: dict[str, Tensors]
    scalars: dict[str, Any]


def _write(root: Path, copy: _Copy, keep: int) -> None:
    folder = root / checkpoint_name(copy.step)
    temporary = root / f"{SAVING}{folder.name}"
    try:
        for leftover in root.glob(f"{SAVING}*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        for name, tensors in copy.files.items():
            save_file(tensors, temporary / name)
        (temporary / STATE).write_text(dumps(copy.scalars) + "\n")
        write_manifest(temporary, step=copy.step)
        _read_back(temporary, copy)
        _delete(folder)
        temporary.rename(folder)
        flush(root)
        for step in _steps(root)[keep:]:
            _delete(root / checkpoint_name(step))
    except (OSError, SafetensorError, CorruptError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise SaveError(
            f"{folder}: the checkpoint could not be written ({reason}); the one before it is untouched"
        ) from error


def _read_back(folder: Path, copy: _Copy) -> None:
    """Compare files with the memory they came from: older checkpoints are deleted on the strength of
    these, and the digests in the manifest are of the files, whatever went wrong in writing them."""
    for file, tensors in copy.files.items():
        written = load_file(folder / file)
        for name, tensor in tensors.items():
            if name not in written or not torch.equal(_bits(written[name]), _bits(tensor)):
                raise CorruptError(f"{file}: {name} is not what was written")


def _bits(tensor: Tensor) -> Tensor:  # any shape and dtype -> (bytes,), on the same memory
    return tensor.reshape(-1).view(torch.uint8)


def _delete(folder: Path) -> None:
    """Delete a checkpoint so that nobody ever sees a part of it."""
    if folder.is_dir():
        doomed = folder.rename(folder.with_name(f"{SAVING}{folder.name}-old"))
        shutil.rmtree(doomed)


# --- loading -------------------------------------------------------------------------------------


def load_newest(
    run_dir: Path, state: TrainState, group: Group, *, identity: dict[str, Any]
) -> tuple[bool, list[str]]:
    """Restore the newest checkpoint that verifies into `state`; every rank calls it.

    Rank 0 decides, and sends what it has read: the folders of other ranks play no part.

    Returns whether one was found, and remarks: a line for each that was refused, how many steps that
    cost, and what makes the rest of the run differ from an uninterrupted one. A refused folder is
    renamed to `bad-<step>-<n>`, never deleted.
    """
    found = _find(run_dir / CHECKPOINTS, state, identity, group) if group.is_main else _Found()
    shared = [(found.progress, found.remarks, found.layout())]
    if group.world_size > 1:
        dist.broadcast_object_list(shared)
    progress, remarks, layout = shared[0]
    if progress is None:
        return False, remarks
    named = dict(state.model.named_parameters())
    with torch.no_grad():
        for name, tensor in _from_main(found.files.get(MODEL, {}), layout[MODEL], group):
            named[name].copy_(tensor)
    members = _optimizer_members(state)
    for optimizer in state.optimizers.values():
        optimizer.state.clear()
    for key, tensor in _from_main(found.files.get(OPTIMIZER, {}), layout[OPTIMIZER], group):
        label, name, entry = key.split("/")
        state.optimizers[label].state[members[label, name]][entry] = tensor
    state.progress = progress
    return True, remarks


@dataclass
class _Found:
    """What rank 0 has read, and what it has to say about it."""

    progress: Progress | None = None
    files: dict[str, Tensors] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def layout(self) -> _Layout:
        return {
            file: [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
            for file, tensors in self.files.items()
        }


_Layout = dict[str, list[tuple[str, torch.dtype, torch.Size]]]


def _find(root: Path, state: TrainState, identity: dict[str, Any], group: Group) -> _Found:
    """Read the newest good checkpoint, and set the bad ones before it aside."""
    found = _Found()
    steps = _steps(root)
    for step in steps:
        folder = root / checkpoint_name(step)
        try:
            facts = _read_facts(folder, step, identity)
            found.progress = _progress(facts)
            found.files = _read_tensors(folder, state)
        except (CorruptError, SafetensorError, ValueError, KeyError, TypeError) as error:
            found.progress = None
            aside = _set_aside(folder)
            found.remarks.append(f"checkpoint of step {step} refused: {error}; it is kept as {aside.name}")
            continue
        whose = f"the checkpoint of step {step} was written by"
        if facts["identity"].get("code") != identity["code"]:
            found.remarks.append(f"{whose} another version of the trainer")
        if facts["world_size"] != group.world_size:
            found.remarks.append(
                f"{whose} {facts['world_size']} workers, now there are {group.world_size}: the batches stay "
                "the same, their sums may be rounded differently"
            )
        break
    reached = found.progress.step if found.progress else 0
    if steps and steps[0] > reached:
        found.remarks.append(f"{steps[0] - reached} steps are lost; the run goes on from step {reached}")
    return found


def _read_facts(folder: Path, step: int, identity: dict[str, Any]) -> dict[str, Any]:
    """`state.json` of a folder whose files are all as they were written, for this run and step."""
    if (named := verify(folder).get("step")) != step:
        raise CorruptError(f"{folder}: its manifest is that of step {named}")
    facts: dict[str, Any] = json.loads((folder / STATE).read_text())
    if facts["version"] != CHECKPOINT_VERSION:
        raise CorruptError(f"{folder}: checkpoint version {facts['version']}, expected {CHECKPOINT_VERSION}")
    for key in ("run_id", "data"):
        if facts["identity"].get(key) != identity[key]:
            raise CorruptError(
                f"{folder}: {key} is {facts['identity'].get(key)!r}, this run's is {identity[key]!r}"
            )
    return facts


def _progress(facts: dict[str, Any]) -> Progress:
    progress = facts["progress"]
    return Progress(
        step=int(progress["step"]),
        tokens_seen=int(progress["tokens_seen"]),
        train_seconds=float(progress["train_seconds"]),
        evaluations=[(int(s), float(a), float(b)) for s, a, b in progress["evaluations"]],
    )


def _read_tensors(folder: Path, state: TrainState) -> dict[str, Tensors]:
    """Both tensor files, which must be those of `state`'s model and optimizers."""
    files = {file: load_file(folder / file) for file in (MODEL, OPTIMIZER)}
    named = {name: p.shape for name, p in state.model.named_parameters()}
    if named != {name: tensor.shape for name, tensor in files[MODEL].items()}:
        raise CorruptError(f"{folder / MODEL}: its parameters are not this model's")
    members = _optimizer_members(state)
    if any(tuple(key.split("/")[:2]) not in members for key in files[OPTIMIZER]):
        raise CorruptError(f"{folder / OPTIMIZER}: its parameters are not those of this run's optimizers")
    return files


def _from_main(
    tensors: Tensors, layout: list[tuple[str, torch.dtype, torch.Size]], group: Group
) -> Iterator[tuple[str, Tensor]]:
    """Rank 0's tensors, one after another, in memory of their own on the device of every rank."""
    for name, dtype, shape in layout:
        if group.is_main:
            tensor = tensors[name].to(group.device, copy=True)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=group.device)
        if group.world_size > 1 and tensor.numel():
            dist.broadcast(_bits(tensor), 0)
        yield name, tensor


def _set_aside(folder: Path) -> Path:
    names = (folder.with_name(f"bad-{folder.name}-{n}") for n in itertools.count(1))
    return folder.rename(next(path for path in names if not path.exists()))


# --- the state as named tensors ------------------------------------------------------------------


def _model_tensors(model: nn.Module) -> Tensors:
    return {name: p.detach() for name, p in model.named_parameters()}


def _optimizer_tensors(state: TrainState) -> Tensors:
    return {
        f"{label}/{name}/{key}": value.detach()
        for (label, name), parameter in _optimizer_members(state).items()
        for key, value in state.optimizers[label].state[parameter].items()
    }


def _optimizer_members(state: TrainState) -> dict[tuple[str, str], nn.Parameter]:
    """Parameters by (label of their optimizer, name)."""
    return {
        (label, name): p
        for label, optimizer in state.optimizers.items()
        for members in [{id(p) for group in optimizer.param_groups for p in group["params"]}]
        for name, p in state.model.named_parameters()
        if id(p) in members
    }


def _steps(root: Path) -> list[int]:
    return checkpoint_steps([p.name for p in root.iterdir() if p.is_dir()]) if root.is_dir() else []
