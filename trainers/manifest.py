"""Digests of a folder of files, so that no half-written or damaged state is ever used.

A folder counts as complete when it holds `manifest.json`, which is written last and lists the
size and SHA-256 of every other file.
"""

from __future__ import annotations

import errno
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
    """Describe every file of `folder` in `manifest.json`, flushed to disk. `facts` are added to it.

    The digests are of what the disk gives back, where the system lets us ask it.
    """
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.name != MANIFEST):
        flush(path, forget=True)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = {"version": MANIFEST_VERSION, **facts, "files": files}
    temporary = folder / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    flush(temporary)
    temporary.rename(folder / MANIFEST)
    flush(folder)
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
        try:
            digest = sha256(file)
        except OSError as error:
            if error.errno != errno.EIO:  # only a bad sector says anything about the bytes
                raise
            raise CorruptError(f"{file}: the disk cannot read it back") from None
        if digest != entry["sha256"]:
            raise CorruptError(f"{file}: SHA-256 does not match the manifest")
    return manifest


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"{step:08d}"


def checkpoint_steps(names: list[str]) -> list[int]:
    """Steps of the names that are checkpoint folders, newest first."""
    numbers = {int(name) for name in names if name.isascii() and name.isdigit()}
    return sorted((step for step in numbers if checkpoint_name(step) in names), reverse=True)


def flush(path: Path, *, forget: bool = False) -> None:
    """Wait until a file or folder is on disk. With `forget` the next read comes from there again."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if forget and hasattr(os, "posix_fadvise"):  # Linux
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
