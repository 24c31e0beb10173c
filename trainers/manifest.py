"""Digests of a folder of files, so that no half-written or damaged state is ever used.

A folder counts as complete when it holds `manifest.json`, which is written last and lists the
size and SHA-256 of every other file.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from trainers.records import MANIFEST

MANIFEST_VERSION = 1


class CorruptError(Exception):
    """Files do not match their manifest; the message names the first one that does not."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, **facts: Any) -> dict[str, Any]:
    """Describe every file of `folder` in `manifest.json`, flushed to disk. `facts` are added to it."""
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.name != MANIFEST):
        _flush(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = {"version": MANIFEST_VERSION, **facts, "files": files}
    temporary = folder / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    _flush(temporary)
    temporary.rename(folder / MANIFEST)
    _flush(folder)
    return manifest


def parse_manifest(data: bytes, *, name: str) -> dict[str, Any]:
    """The manifest in `data`.

    Raises:
        CorruptError: not a manifest of this version, or one that names files outside its folder.
    """
    try:
        manifest = json.loads(data)
        files = manifest["files"]
        version = manifest["version"]
        names_are_plain = all(Path(n).name == n and n not in ("", ".", "..") for n in files)
        entries_are_whole = all({"bytes", "sha256"} <= set(entry) for entry in files.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{name}: not a manifest ({error})") from None
    if version != MANIFEST_VERSION or not names_are_plain or not entries_are_whole:
        raise CorruptError(f"{name}: not a manifest of version {MANIFEST_VERSION}")
    return dict(manifest)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, after reading and checking every file it names.

    Raises:
        CorruptError: no manifest, or a missing, truncated or altered file.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CorruptError(f"{folder}: no {MANIFEST}")
    manifest = parse_manifest(path.read_bytes(), name=str(path))
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CorruptError(f"{file}: missing")
        if file.stat().st_size != entry["bytes"]:
            raise CorruptError(f"{file}: {file.stat().st_size} bytes, expected {entry['bytes']}")
        if sha256(file) != entry["sha256"]:
            raise CorruptError(f"{file}: SHA-256 does not match the manifest")
    return manifest


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"{step:08d}"


def checkpoint_steps(names: list[str]) -> list[int]:
    """Steps of the names that are checkpoint folders, newest first."""
    return sorted((int(n) for n in names if len(n) >= 8 and n.isascii() and n.isdigit()), reverse=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
