"""Everything a run needs to go on as if it had never stopped, in files that hold no code.

`checkpoints/<step>/`: `model.safetensors`, `optimizer.safetensors`, `state.json`, and
`manifest.json` with sizes and digests, written last. There is no generator state in it: batches and
dropout are functions of (seed, step, rank).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainers.distributed import Group
from trainers.manifest import CorruptError, checkpoint_name, checkpoint_steps, verify, write_manifest
from trainers.records import CHECKPOINTS, dumps

CHECKPOINT_VERSION = 1


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


def save(run_dir: Path, state: TrainState, group: Group, *, identity: dict[str, Any], keep: int) -> None:
    """Write the checkpoint of `state.progress.step`; every rank may call it.

    `identity` (run id, data digest, code version) is stored for `load` to compare. Older
    checkpoints beyond `keep` are deleted afterwards.
    """
    if not group.is_main:
        return
    root = run_dir / CHECKPOINTS
    folder = root / checkpoint_name(state.progress.step)
    temporary = root / f".saving-{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(_model_tensors(state.model), temporary / "model.safetensors")
    save_file(_optimizer_tensors(state), temporary / "optimizer.safetensors")
    scalars = {"version": CHECKPOINT_VERSION, "world_size": group.world_size, "identity": identity}
    (temporary / "state.json").write_text(dumps({**scalars, "progress": asdict(state.progress)}) + "\n")
    write_manifest(temporary, step=state.progress.step)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    for step in _steps(root)[keep:]:
        shutil.rmtree(root / checkpoint_name(step))


def load_newest(
    run_dir: Path, state: TrainState, group: Group, *, identity: dict[str, Any]
) -> tuple[bool, list[str]]:
    """Restore the newest checkpoint that verifies into `state`; every rank calls it.

    Returns whether one was found, and remarks: a line for each that was refused, and one if the
    code has changed since. A refused folder is renamed to `bad-<step>-<n>`, never deleted.
    """
    root = run_dir / CHECKPOINTS
    remarks: list[str] = []
    for step in _steps(root):
        folder = root / checkpoint_name(step)
        try:
            verify(folder)
            facts = json.loads((folder / "state.json").read_text())
            _check_identity(facts, identity, folder)
        except (CorruptError, ValueError, KeyError) as error:
            remarks.append(f"checkpoint of step {step} refused: {error}")
            continue
        _restore(folder, facts, state)
        break
    else:
        step = -1
    group.barrier()  # nobody renames what another rank still reads
    if group.is_main:
        for bad in (s for s in _steps(root) if s > step):
            taken = len(list(root.glob(f"bad-{checkpoint_name(bad)}*")))
            (root / checkpoint_name(bad)).rename(root / f"bad-{checkpoint_name(bad)}-{taken + 1}")
    group.barrier()
    if step >= 0 and facts["identity"].get("code") != identity["code"]:
        remarks.append(f"the checkpoint of step {step} was written by another version of the trainer")
    return step >= 0, remarks


def _check_identity(facts: dict[str, Any], identity: dict[str, Any], folder: Path) -> None:
    if facts["version"] != CHECKPOINT_VERSION:
        raise CorruptError(f"{folder}: checkpoint version {facts['version']}, expected {CHECKPOINT_VERSION}")
    for key in ("run_id", "data"):
        if facts["identity"].get(key) != identity[key]:
            raise CorruptError(
                f"{folder}: {key} is {facts['identity'].get(key)!r}, this run's is {identity[key]!r}"
            )


def _restore(folder: Path, facts: dict[str, Any], state: TrainState) -> None:
    model_tensors = load_file(folder / "model.safetensors")
    named = dict(state.model.named_parameters())
    if set(named) != set(model_tensors):
        raise CorruptError(f"{folder}: its parameters are not this model's")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(model_tensors[name])
    optimizer_tensors = load_file(folder / "optimizer.safetensors")
    for label, optimizer in state.optimizers.items():
        for name, parameter in _optimizer_parameters(state.model, optimizer):
            prefix = f"{label}/{name}/"
            optimizer.state[parameter] = {
                key.removeprefix(prefix): tensor.to(parameter.device)
                for key, tensor in optimizer_tensors.items()
                if key.startswith(prefix)
            }
    progress = facts["progress"]
    state.progress = Progress(
        step=int(progress["step"]),
        tokens_seen=int(progress["tokens_seen"]),
        train_seconds=float(progress["train_seconds"]),
        evaluations=[(int(s), float(a), float(b)) for s, a, b in progress["evaluations"]],
    )


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    return {
        f"{label}/{name}/{key}": value.detach().cpu().contiguous()
        for label, optimizer in state.optimizers.items()
        for name, parameter in _optimizer_parameters(state.model, optimizer)
        for key, value in optimizer.state[parameter].items()
    }


def _optimizer_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[tuple[str, nn.Parameter]]:
    members = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(name, p) for name, p in model.named_parameters() if id(p) in members]


def _steps(root: Path) -> list[int]:
    return checkpoint_steps([p.name for p in root.iterdir() if p.is_dir()]) if root.is_dir() else []
