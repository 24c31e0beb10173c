"""`mmsweep store ls|verify|gc STORE`: what a store holds, whether it reads, and what it can lose.

    ls      runs, attempts, bytes by kind
    verify  read everything again: every object by its digest, checkpoints, every line and row of records
    gc      what can go; `--delete` lets it go

None of them changes an object that a run still needs, and none touches what mmsweep did not write.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from mmsweep.contents import (
    CHECKPOINT_FILE,
    COLUMNS,
    QUARANTINED_FILE,
    Contents,
    Held,
    contents,
    held_by,
    kind_in_run,
    size,
)
from mmsweep.objects import TEMPORARY, DamagedError, Entry, NotFound, ObjectStore, StoreError, Upload
from mmsweep.rows import from_parquet, to_parquet
from mmsweep.status import standing
from mmsweep.store import (
    KEPT_CHECKPOINTS,
    QUARANTINE,
    RunStore,
    fetch_checkpoint,
    open_store,
    stored_name,
)
from trainers.config import RUN_ID
from trainers.errors import InputError
from trainers.manifest import CorruptError, parse_manifest
from trainers.records import CHECKPOINTS, CONFIG, KINDS, MANIFEST, PART, SUMMARY, parse_part, part_name
from trainers.yamlfile import printable

LIVE_S = 600.0
"""An unfinished run into which anything was written so recently may be training: gc leaves it alone."""
ABANDONED_S = 86_400.0
"""A checkpoint without a manifest is on its way until nothing was added to it for so long; so is a
file that is being sent, from when it was begun, and one that no manifest names yet."""
_THREADS = 4
"""Runs looked at together: a checkpoint of each may be on this machine's disk at one time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: done, and all is whole; 1: `verify` found damage; 2: bad input or no store."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except (InputError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmsweep store", description="What a store holds, whether it reads, and what it can lose."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("ls", help="runs, attempts, bytes by kind")
    listing.set_defaults(run=_ls)
    check = commands.add_parser("verify", help="read every object again; a line for each problem")
    check.set_defaults(run=_verify)
    collect = commands.add_parser("gc", help="print what no run needs any more, and its bytes")
    collect.add_argument("--delete", action="store_true", help="delete it")
    collect.add_argument(
        "--keep",
        type=int,
        default=KEPT_CHECKPOINTS,
        help=f"checkpoints to keep of a finished run (default: {KEPT_CHECKPOINTS})",
    )
    collect.set_defaults(run=_gc)
    for command in (listing, check, collect):
        command.add_argument("store", help='folder or "s3://bucket/prefix"')
    return parser


def _opened(url: str) -> tuple[RunStore, Contents]:
    store = open_store(url)
    found = contents(store)
    if not found.grids and not found.runs:
        raise InputError(f"{store.url} holds no grid and no run; is this the store of a launch?")
    return store, found


# --- ls ------------------------------------------------------------------------------------------


def _ls(arguments: argparse.Namespace) -> int:
    store, found = _opened(arguments.store)
    states = {row["run_id"]: row for row in standing(store)}
    table = Table(box=None, pad_edge=False)
    for name in ("run", "status"):
        table.add_column(name, no_wrap=True)
    for name in ("attempts", "objects", *COLUMNS, "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    total = dict.fromkeys(COLUMNS, 0)
    for run_id in [*states, *sorted(set(found.runs) - set(states))]:
        held = found.runs.get(run_id, {})
        parts = dict.fromkeys(COLUMNS, 0)
        for name, entry in held.items():
            parts[str(kind_in_run(name))] += entry.bytes
        total = {kind: total[kind] + parts[kind] for kind in COLUMNS}
        state = states.get(run_id, {})
        amounts = [size(parts[kind]) if parts[kind] else "–" for kind in COLUMNS]
        table.add_row(
            run_id,
            printable(str(state.get("status", "–"))),
            str(_attempts(held, state) or "–"),
            str(len(held)),
            *amounts,
            size(sum(parts.values())),
        )
    # Names come from the store: no markup in them.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    with console.capture() as text:  # rich would answer a closed pipe in its own way
        console.print(table)
    print(text.get(), end="")
    by_kind = ", ".join(f"{kind} {size(amount)}" for kind, amount in total.items() if amount)
    amount = size(sum(total.values()))
    print(f"{store.url}: {len(found.grids)} grids, {len(found.runs)} runs, {amount} ({by_kind})")
    _name_foreign(found)
    return 0


def _attempts(held: Held, state: dict[str, object]) -> int:
    """Parts tell of attempts until they are compacted, the status after that."""
    numbers = [int(match[1]) for name in held if (match := PART.fullmatch(name))]
    said = state.get("attempt")
    return max([*numbers, said if isinstance(said, int) else 0])


def _name_foreign(found: Contents) -> None:
    for entry in found.foreign:
        print(f"left alone: {printable(entry.key)} ({size(entry.bytes)}) was not written by mmsweep")


# --- verify --------------------------------------------------------------------------------------


def _verify(arguments: argparse.Namespace) -> int:
    store, found = _opened(arguments.store)
    reads = _Reads(store.objects)
    problems = 0
    for line in problems_of(store, found, reads):
        problems += 1
        print(printable(line), flush=True)
    _name_foreign(found)
    print(
        f"{store.url}: {len(found.grids)} grids and {len(found.runs)} runs, {len(reads.keys)} objects read, "
        + (f"{problems} problem{'s' if problems > 1 else ''}" if problems else "all whole")
    )
    return 1 if problems else 0


class _Reads:
    """Passes everything on to a store, and knows which objects have been read from end to end."""

    def __init__(self, objects: ObjectStore) -> None:
        self.keys: set[str] = set()
        self._objects = objects

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def get(self, key: str) -> bytes:
        with self._noted(key):
            return self._objects.get(key)

    def get_file(self, key: str, path: Path) -> None:
        with self._noted(key):
            self._objects.get_file(key, path)

    @contextmanager
    def _noted(self, key: str) -> Iterator[None]:
        try:
            yield
        except DamagedError:
            self.keys.add(key)
            raise
        self.keys.add(key)


def problems_of(store: RunStore, found: Contents, reads: _Reads | None = None) -> Iterator[str]:
    """Read every object; one line for each that is not what it should be.

    Args:
        reads: the store's objects, to know afterwards which were read.

    Raises:
        StoreError: the store cannot be read.
    """
    reads = reads or _Reads(store.objects)
    read_by = RunStore(cast("ObjectStore", reads))
    for grid in found.grids:
        yield from _said(read_by.grid_index, grid)
    with ThreadPoolExecutor(_THREADS) as pool:
        each = pool.map(
            lambda run_id: [*_run_problems(read_by, reads, run_id, found.runs[run_id])], found.runs
        )
        for lines in each:
            yield from lines
    foreign = {entry.key for entry in found.foreign}
    beside = [key for top in ("grids", "report") for key in store.objects.list(top) if key not in foreign]
    yield from _rest_problems(reads, beside)


def _said(read: Callable[[str], object], name: str) -> Iterator[str]:
    """The error of a damaged object. One that is gone was deleted since the listing."""
    try:
        read(name)
    except NotFound:
        return
    except DamagedError as error:
        yield str(error)


def _run_problems(store: RunStore, reads: _Reads, run_id: str, names: Held) -> Iterator[str]:
    for read in (store.config, store.status, store.summary):
        yield from _said(read, run_id)
    if SUMMARY in names and CONFIG not in names:
        yield f"{store.url}/runs/{run_id}: finished, and its {CONFIG} is missing"
    for kind in KINDS:
        broken = [
            line
            for name in names
            if (match := PART.fullmatch(name)) and match[2] == kind
            for line in _part_problems(store, run_id, name, int(match[1]), kind)
        ]
        yield from [*broken, *_gaps(store, run_id, kind, names)]
        yield from _table_problems(store, run_id, kind, names, parts_are_whole=not broken)
    for name in names:
        if (match := CHECKPOINT_FILE.fullmatch(name)) and name.endswith(f"/{MANIFEST}"):
            yield from _checkpoint_problems(store.objects, f"runs/{run_id}/{CHECKPOINTS}/{match[1]}")
    yield from _rest_problems(reads, [f"runs/{run_id}/{name}" for name in names])


def _part_problems(store: RunStore, run_id: str, name: str, attempt: int, kind: str) -> Iterator[str]:
    key = f"runs/{run_id}/{name}"
    try:
        data = store.objects.get(key)
    except NotFound:  # compacted since it was listed
        return
    except DamagedError as error:
        yield str(error)
        return
    try:
        for number, record in enumerate(parse_part(data, name=f"{store.url}/{key}"), start=1):
            if (record.run, record.attempt, record.kind) != (run_id, attempt, kind):
                yield f"{store.url}/{key}:{number}: a record of another run, attempt or kind"
                return
    except ValueError as error:
        yield str(error)
        return
    if data and not data.endswith(b"\n"):  # parts are closed after a whole line
        yield f"{store.url}/{key}: cut short after {len(data)} bytes"


def _gaps(store: RunStore, run_id: str, kind: str, names: Held) -> Iterator[str]:
    """Parts are numbered from 0 and arrive in order. Beside a table of their kind some may be gone."""
    if f"{kind}.parquet" in names:
        return
    numbers: dict[str, set[int]] = {}
    for name in names:
        if (match := PART.fullmatch(name)) and match[2] == kind:
            numbers.setdefault(match[1], set()).add(int(match[3]))
    for attempt, seen in numbers.items():
        missing = sorted(set(range(max(seen))) - seen)
        if missing:
            yield f"{store.url}/runs/{run_id}/attempt-{attempt}/{part_name(kind, missing[0])}: missing"


def _table_problems(
    store: RunStore, run_id: str, kind: str, names: Held, *, parts_are_whole: bool
) -> Iterator[str]:
    """The table of a kind is readable and, once the run is finished, holds the rows its summary counts."""
    try:
        counted = (store.summary(run_id) or {}).get("rows") or {}
    except DamagedError:
        counted = {}  # said already
    if f"{kind}.parquet" not in names and kind not in counted:
        return
    try:
        rows = store.table(run_id, kind).num_rows
    except DamagedError as error:
        if parts_are_whole or f"{kind}.parquet" in str(error):  # else said already
            yield str(error)
        return
    if parts_are_whole and counted and rows != counted.get(kind, 0):
        yield f"{store.url}/runs/{run_id}: {rows} rows of {kind}, its summary counts {counted.get(kind, 0)}"


def _checkpoint_problems(objects: ObjectStore, base: str) -> Iterator[str]:
    """Fetch a checkpoint into a folder that goes away, and compare sizes and digests."""
    try:
        with tempfile.TemporaryDirectory(prefix="mmsweep-verify-") as folder:
            target = Path(folder)
            facts = fetch_checkpoint(objects, base, objects.get(f"{base}/{MANIFEST}"), target)
            if facts.get("step") != int(base.rsplit("/", 1)[1]):
                yield f"{objects.url}/{base}: its manifest is that of step {facts.get('step')}"
    except DamagedError as error:
        yield str(error)
    except CorruptError as error:
        yield f"{objects.url}/{base}: {str(error).replace(f'{target}/', '')}"
    except NotFound as error:
        if objects.exists(f"{base}/{MANIFEST}"):  # else it was replaced by newer ones
            yield f"{error.args[0]}: missing, and the manifest names it"


def _rest_problems(reads: _Reads, keys: list[str]) -> Iterator[str]:
    """Read what no other check has read whole: logs, claims, requests, files that no manifest names."""
    with tempfile.TemporaryDirectory(prefix="mmsweep-verify-") as folder:
        file = Path(folder) / "object"
        for key in keys:
            if key in reads.keys:
                continue
            try:
                reads.get_file(key, file)
                if key.endswith(".json") and f"/{QUARANTINE}/" not in key:
                    json.loads(file.read_bytes())
            except NotFound:
                continue  # deleted since it was listed
            except DamagedError as error:
                yield str(error)
            except (ValueError, RecursionError):
                yield f"{reads.url}/{key}: not JSON"


# --- gc ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Garbage:
    """Objects of one run that go together, and why they can."""

    run_id: str
    what: str
    why: str
    entries: tuple[Entry, ...]
    """In the order in which they must go: a manifest before what it names."""

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)


def garbage(store: RunStore, found: Contents, *, keep: int = KEPT_CHECKPOINTS) -> list[Garbage]:
    """What no run needs any more.

    Nothing of an unfinished run into which anything was written in the last LIVE_S seconds.

    Args:
        keep: checkpoints that a finished run keeps.
    """
    now = store.objects.time()
    with ThreadPoolExecutor(_THREADS) as pool:
        each = pool.map(
            lambda run_id: _run_garbage(store, run_id, found.runs[run_id], now=now, keep=keep), found.runs
        )
        return [item for items in each for item in items]


def _run_garbage(store: RunStore, run_id: str, names: Held, *, now: float, keep: int) -> list[Garbage]:
    try:
        finished = store.summary(run_id) is not None
    except StoreError:
        return []  # verify says so
    if not finished and now - max(entry.modified for entry in names.values()) < LIVE_S:
        return []
    return [
        *_tabled_parts(store, run_id, names),
        *_needless_checkpoints(store, run_id, names, finished=finished, now=now, keep=keep),
        *_quarantined(run_id, names),
    ]


def _tabled_parts(store: RunStore, run_id: str, names: Held) -> Iterator[Garbage]:
    """Parts all of whose rows are in the table of their kind: a compaction that was killed left them."""
    parts: dict[str, list[Entry]] = {}
    for name, entry in names.items():
        if (match := PART.fullmatch(name)) and f"{match[2]}.parquet" in names:
            parts.setdefault(match[2], []).append(entry)
    for kind, held in parts.items():
        if _adds_nothing(store, run_id, kind):
            yield Garbage(run_id, f"{len(held)} parts of {kind}", f"in {kind}.parquet already", tuple(held))


def _adds_nothing(store: RunStore, run_id: str, kind: str) -> bool:
    """Whether the table of a kind is the same with its parts and without."""
    try:
        alone, alarms = from_parquet(store.objects.get(f"runs/{run_id}/{kind}.parquet"), kind)
        merged = store._read(run_id, kind)
    except (StoreError, NotFound, ValueError, KeyError, OSError, pa.ArrowException):
        return False  # verify says so
    return to_parquet(alone, alarms) == to_parquet(merged.table, merged.alarms)


def _needless_checkpoints(
    store: RunStore, run_id: str, names: Held, *, finished: bool, now: float, keep: int
) -> Iterator[Garbage]:
    found = _by_first_group(names, CHECKPOINT_FILE)
    complete = [step for step in found if f"{CHECKPOINTS}/{step}/{MANIFEST}" in names]
    surplus = sorted(complete, key=int, reverse=True)[keep:] if finished else []
    for step, held in sorted(found.items(), key=lambda item: int(item[0])):
        age = now - max(entry.modified for entry in held)
        held = sorted(held, key=lambda entry: not entry.key.endswith(f"/{MANIFEST}"))
        if step in surplus:
            why = f"the run is finished, and {keep} newer are kept" if keep else "the run is finished"
            yield Garbage(run_id, f"checkpoint {step}", why, tuple(held))
        elif step not in complete and age > ABANDONED_S:
            why = f"without a manifest for {age / 3600:.0f} hours"
            yield Garbage(run_id, f"checkpoint {step}", why, tuple(held))
        elif step in complete and (left := _unnamed(store, held, now=now)):
            yield Garbage(run_id, f"{len(left)} files of checkpoint {step}", "not in its manifest", left)


def _unnamed(store: RunStore, held: list[Entry], *, now: float) -> tuple[Entry, ...]:
    """Files beside a manifest, the first of `held`, of an attempt that shipped the same step in vain."""
    folder = held[0].key.removesuffix(MANIFEST)
    try:
        files = parse_manifest(store.objects.get(held[0].key), name=MANIFEST)["files"]
    except (StoreError, NotFound, CorruptError):
        return ()  # verify says so
    named = {MANIFEST, *files, *(stored_name(file, entry) for file, entry in files.items())}
    others = (entry for entry in held if entry.key.removeprefix(folder) not in named)
    return tuple(entry for entry in others if now - entry.modified > ABANDONED_S)


def _quarantined(run_id: str, names: Held) -> Iterator[Garbage]:
    for name, held in _by_first_group(names, QUARANTINED_FILE).items():
        yield Garbage(run_id, f"{QUARANTINE}/{name}", "did not match its digests", tuple(held))


def _by_first_group(names: Held, pattern: re.Pattern[str]) -> dict[str, list[Entry]]:
    """The objects whose names match, by what the first group of the pattern takes: their folder."""
    found: dict[str, list[Entry]] = {}
    for name, entry in names.items():
        if match := pattern.fullmatch(name):
            found.setdefault(match[1], []).append(entry)
    return found


def cut_off(store: RunStore) -> list[Upload]:
    """What writers that were killed have left: it takes room, and no listing of objects shows it.

    Raises:
        StoreError: the service does not know of such uploads, or refuses to tell.
    """
    now = store.objects.time()
    uploads = store.objects.unfinished()
    return [one for one in uploads if _is_ours(one) and now - one.begun > ABANDONED_S]


def _is_ours(upload: Upload) -> bool:
    """Only files of runs are ever sent in parts; a temporary file has a name that nobody else gives."""
    top, run_id, name = (*upload.key.split("/", 2), "", "")[:3]
    of_a_run = top == "runs" and RUN_ID.fullmatch(run_id) is not None and kind_in_run(name) is not None
    return of_a_run or re.fullmatch(rf"{re.escape(TEMPORARY)}[0-9a-f]{{32}}", upload.id) is not None


def _collect_cut_off(store: RunStore, *, delete: bool) -> None:
    try:
        uploads = cut_off(store)
    except StoreError as error:
        print(f"uploads that were cut off are not known: {error}", file=sys.stderr)
        return
    for upload in uploads:
        begun = time.strftime("%Y-%m-%d %H:%M", time.gmtime(upload.begun))
        print(f"cut off: {printable(upload.key)}: an upload begun {begun} UTC and never finished")
        if delete:
            store.objects.discard(upload)
    if uploads:
        count = f"{len(uploads)} upload{'s' if len(uploads) > 1 else ''}"
        print(f"{count} discarded" if delete else f"{count}; --delete discards them")


def _gc(arguments: argparse.Namespace) -> int:
    if arguments.keep < 0:
        raise InputError(f"--keep {arguments.keep}: 0 or more")
    store, found = _opened(arguments.store)
    items = garbage(store, found, keep=arguments.keep)
    for item in items:
        print(f"{item.run_id}: {item.what}: {item.why} ({size(item.bytes)})")
    _name_foreign(found)
    _collect_cut_off(store, delete=arguments.delete)
    count, total = sum(len(item.entries) for item in items), sum(item.bytes for item in items)
    if not items:
        print(f"{store.url}: nothing to delete")
    elif not arguments.delete:
        print(f"{count} objects, {size(total)}; --delete deletes them")
    else:
        gone = delete(store, items, keep=arguments.keep)
        print(f"{len(gone)} objects deleted, {size(sum(entry.bytes for entry in gone))}")
    return 0


def delete(store: RunStore, items: list[Garbage], *, keep: int = KEPT_CHECKPOINTS) -> list[Entry]:
    """Delete what of `items` is still not needed just before; returns what went.

    A run may have been taken up since it was looked at.
    """
    gone: list[Entry] = []
    now = store.objects.time()
    for run_id in dict.fromkeys(item.run_id for item in items):
        names = held_by(store, run_id)
        if not names:
            continue
        wanted = {entry for item in items if item.run_id == run_id for entry in item.entries}
        for item in _run_garbage(store, run_id, names, now=now, keep=keep):
            for entry in item.entries:
                if entry in wanted:
                    store.objects.delete(entry.key)
                    gone.append(entry)
    return gone


if __name__ == "__main__":
    from mmsweep.__main__ import quietly

    sys.exit(quietly(main))
