"""Where a run's numbers come from: code, versions, machine. By allow-list, and one environment variable."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config import RunConfig
from trainers.devices import device_name, peak
from trainers.flops import cost

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "numpy", "ray", "safetensors", "tiktoken", "datasets", "pydantic")
CHECKOUT = "MMSWEEP_CHECKOUT"
"""The variable with the launch's `checkout` as JSON, for machines whose code came without its `.git`."""
_SOURCE = Path(__file__).parent


def provenance(
    run: RunConfig, device: torch.device, *, world_size: int, attempt: int, tokens: str
) -> dict[str, Any]:
    """Facts for a run's `config.json`. `tokens` is the digest of what was really read."""
    import torch

    on_gpu = device.type == "cuda"
    price = cost(run)
    known = peak(device_name(device))
    return {
        "attempt": attempt,
        "tokens": tokens,
        "code": code_digest(),
        "git": _git() or _git_elsewhere(),
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


def checkout() -> dict[str, Any] | None:
    """What other machines are to say of their code, if it is the same: digest, commit and dirtiness.

    None: neither is this a checkout, nor is one known of the same code.
    """
    git = _git() or _git_elsewhere()
    return None if git is None else {"code": code_digest(), **git}


def _git_elsewhere() -> dict[str, Any] | None:
    """Commit and dirtiness of the launch's checkout, where its trainer is this one to the byte."""
    try:
        told = json.loads(os.environ.get(CHECKOUT, "null")) or {}
        git = {"commit": str(told["commit"]), "dirty": bool(told["dirty"])}
        return git if told["code"] == code_digest() else None
    except (ValueError, KeyError, TypeError):
        return None


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
