"""What is in a store: one listing, with sizes and times, of everything below its root, sorted out."""

from __future__ import annotations

import os
import re
import tempfile
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from mmsweep.objects import DirectoryStore, ObjectStore, StoreError, check_key
from mmsweep.store import QUARANTINE, RunStore
from trainers.config import NAME_PATTERN, RUN_ID
from trainers.records import CHECKPOINTS, CONFIG, KINDS, PART, STATUS, SUMMARY


@dataclass(frozen=True, slots=True)
class Entry:
    """One object as a listing shows it."""

    key: str
    bytes: int
    modified: float
    """Unix seconds, by the store's clock."""


def entries(objects: ObjectStore, prefix: str = "") -> list[Entry]:
    """All objects below the prefix, sorted by key."""
    if isinstance(objects, DirectoryStore):
        return [entry for key in objects.list(prefix) if (entry := _file(objects, key))]
    from mmsweep.s3 import S3Store  # boto3 only where it is needed

    if not isinstance(objects, S3Store):
        raise TypeError(f"cannot list sizes of {type(objects).__name__}")
    found = []
    with objects._guard(prefix):
        pages = objects._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=objects.bucket, Prefix=objects._folder(prefix)):
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # consoles make these to stand for folders
                    key = item["Key"].removeprefix(objects.prefix)
                    found.append(Entry(key, item["Size"], item["LastModified"].timestamp()))
    return sorted(found, key=lambda entry: entry.key)


def _file(objects: DirectoryStore, key: str) -> Entry | None:
    try:
        facts = (objects.root / key).stat()
    except FileNotFoundError:  # deleted since it was listed
        return None
    except OSError as error:
        raise StoreError(f"{objects.url}/{key}: {error.strerror}; check that you may read it") from None
    return Entry(key, facts.st_size, facts.st_mtime)


def store_time(objects: ObjectStore) -> float:
    """Unix seconds by the clock that dates the store's objects; nothing is left in the store."""
    if isinstance(objects, DirectoryStore):
        try:
            with tempfile.TemporaryFile(dir=objects.root) as file:  # a shared disk has its server's clock
                file.write(b"0")
                file.flush()
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            return time.time()
    from mmsweep.s3 import S3Store

    if not isinstance(objects, S3Store):
        raise TypeError(f"cannot ask {type(objects).__name__} for its time")
    with objects._guard(""):
        answer = objects._client.list_objects_v2(Bucket=objects.bucket, Prefix=objects.prefix, MaxKeys=1)
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(date).timestamp() if date else time.time()


CHECKPOINT_FILE = re.compile(rf"{CHECKPOINTS}/([0-9]{{8}}|[1-9][0-9]{{8,17}})/[^/]+")
QUARANTINED_FILE = re.compile(rf"{QUARANTINE}/([0-9]{{8,18}}-[0-9]+)/[^/]+")
_PARQUET = re.compile(rf"({'|'.join(KINDS)})\.parquet")
_GRID = re.compile(r"grids/([^/]+)\.(yaml|json)")

FACTS, PARTS, TABLES, STATES, BAD, LEASES = "facts", "parts", "tables", "checkpoints", "quarantined", "leases"
COLUMNS = (FACTS, PARTS, TABLES, STATES, BAD, LEASES)
"""Kinds of a run's objects: config, status and summary; records; Parquet; checkpoints; bad ones; owners."""


def kind_in_run(name: str) -> str | None:
    """What an object of a run is by its key below the run; None for one that mmsweep does not write."""
    if not _is_plain(name):
        return None
    if name in (CONFIG, STATUS, SUMMARY):
        return FACTS
    if _PARQUET.fullmatch(name):
        return TABLES
    match = PART.fullmatch(name)
    if match and match[2] in KINDS:
        return PARTS
    if CHECKPOINT_FILE.fullmatch(name):
        return STATES
    if QUARANTINED_FILE.fullmatch(name):
        return BAD
    return LEASES if name.startswith("leases/") else None


Held = dict[str, Entry]
"""Objects of one run by their keys below it."""


def held_by(store: RunStore, run_id: str) -> Held:
    """What mmsweep has written of one run, by a fresh listing."""
    base = f"runs/{run_id}/"
    found = {entry.key.removeprefix(base): entry for entry in entries(store.objects, base)}
    return {name: entry for name, entry in found.items() if kind_in_run(name)}


@dataclass(frozen=True)
class Contents:
    """A store's objects, sorted out."""

    grids: list[str]
    runs: dict[str, Held]
    foreign: list[Entry]
    """What mmsweep did not write."""


def contents(store: RunStore) -> Contents:
    """One listing of the whole store."""
    found = Contents([], {}, [])
    for entry in entries(store.objects):
        top, _, rest = entry.key.partition("/")
        run_id, _, name = rest.partition("/")
        if top == "runs" and _is_run_id(run_id) and kind_in_run(name):
            found.runs.setdefault(run_id, {})[name] = entry
        elif (match := _GRID.fullmatch(entry.key)) and _is_name(match[1]):
            if match[1] not in found.grids:
                found.grids.append(match[1])
        elif not re.match(r"grids/[^/]+\.lease/|report/", entry.key):
            found.foreign.append(entry)
    return found


def _is_run_id(name: str) -> bool:
    return RUN_ID.fullmatch(name) is not None and ".." not in name


def _is_name(name: str) -> bool:
    return re.fullmatch(NAME_PATTERN, name) is not None and ".." not in name


def _is_plain(key: str) -> bool:
    try:
        check_key(key)
    except ValueError:
        return False
    return True


def size(count: float) -> str:
    """`512 B`, `1.4 GB`: decimal, as stores bill."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count:.0f} B"
