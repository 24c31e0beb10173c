"""What is in a store: one listing, with sizes and times, of everything below its root, sorted out."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmsweep.objects import Entry, check_key
from mmsweep.store import QUARANTINE, STOP, RunStore
from trainers.config import NAME_PATTERN, RUN_ID
from trainers.records import CHECKPOINTS, CONFIG, KINDS, PART, STATUS, SUMMARY

CHECKPOINT_FILE = re.compile(rf"{CHECKPOINTS}/([0-9]{{8}}|[1-9][0-9]{{8,17}})/[^/]+")
QUARANTINED_FILE = re.compile(rf"{QUARANTINE}/([0-9]{{8,18}}-[0-9]+)/[^/]+")
_LOG = re.compile(r"attempt-\d{3,}/rank-\d+\.log")
_PARQUET = re.compile(rf"({'|'.join(KINDS)})\.parquet")
_GRID = re.compile(r"grids/([^/]+)\.(yaml|json)")
_BESIDE = re.compile(r"grids/[^/]+\.(lease/|launches/|stop$)|report/")
"""Owners of grids, what launches said, requests to stop; reports."""

FACTS, PARTS, TABLES, STATES = "facts", "parts", "tables", "checkpoints"
BAD, LOGS, LEASES = "quarantined", "logs", "leases"
COLUMNS = (FACTS, PARTS, TABLES, STATES, BAD, LOGS, LEASES)
"""Kinds of a run's objects: config, status, summary and a request to stop; records; Parquet; checkpoints;
bad ones; what workers of failed attempts said; owners."""


def kind_in_run(name: str) -> str | None:
    """What an object of a run is by its key below the run; None for one that mmsweep does not write."""
    if not _is_plain(name):
        return None
    if name in (CONFIG, STATUS, SUMMARY, STOP):
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
    if _LOG.fullmatch(name):
        return LOGS
    return LEASES if name.startswith("leases/") else None


Held = dict[str, Entry]
"""Objects of one run by their keys below it."""


def held_by(store: RunStore, run_id: str) -> Held:
    """What mmsweep has written of one run, by a fresh listing."""
    base = f"runs/{run_id}/"
    found = {entry.key.removeprefix(base): entry for entry in store.objects.entries(base)}
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
    for entry in store.objects.entries(""):
        top, _, rest = entry.key.partition("/")
        run_id, _, name = rest.partition("/")
        if top == "runs" and _is_run_id(run_id) and kind_in_run(name):
            found.runs.setdefault(run_id, {})[name] = entry
        elif (match := _GRID.fullmatch(entry.key)) and _is_name(match[1]):
            if match[1] not in found.grids:
                found.grids.append(match[1])
        elif not _BESIDE.match(entry.key):
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
