"""Where a run's numbers come from: code, versions, machine. By allow-list; no environment is read."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from trainers.config import RunConfig
from trainers.devices import device_name, peak
from trainers.flops import cost

PACKAGES = ("torch", "numpy", "ray", "safetensors", "tiktoken", "datasets", "pydantic")
_SOURCE = Path(__file__).parent


def provenance(
    run: RunConfig, device: torch.device, *, world_size: int, attempt: int, tokens: str
) -> dict[str, Any]:
    """Facts for a run's `config.json`. `tokens` is the digest of what was really read."""
    on_gpu = device.type == "cuda"
    price = cost(run)
    known = peak(device_name(device))
    return {
        "attempt": attempt,
        "tokens": tokens,
        "code": code_digest(),
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("mmsweep", *PACKAGES)},
        "cuda": torch.version.cuda if on_gpu else None,
        "host": platform.node(),
        "machine": platform.machine(),
        "device": device_name(device),
        "peak_flops": getattr(known, run.precision) if known else None,
        "peak_source": known.source if known else None,
        "world_size": world_size,
        "parameters": price.parameters,
        "model_flops_per_step": price.model_step,
        "optimizer_flops_per_step": price.optimizer_step,
    }


@cache
def code_digest() -> str:
    """SHA-256 over the trainer's own source files."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCE.rglob("*.py")):
        digest.update(str(path.relative_to(_SOURCE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _git() -> dict[str, Any] | None:
    """Commit and dirtiness, or None outside a checkout."""
    commit = _git_output("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git_output("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changed)}


def _git_output(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_SOURCE), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
