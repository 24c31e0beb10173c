"""Where a sweep's results live: one layout of keys over a folder or an S3 bucket.

`ObjectStore` is the little that is asked of storage; `DirectoryStore` and `mmsweep.s3.S3Store`
provide it. `RunStore` knows the layout: grids, and for every run its config, status, records,
checkpoints and summary. Every object is written whole or not at all, and what makes others valid
(a checkpoint's manifest, a run's summary) is written after them, so a crash at any point leaves a
store that still reads right.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmsweep.lease import BEAT_S, Claim, Lease, claims
from mmsweep.objects import DamagedError, DirectoryStore, NotFound, ObjectStore, StoreError, check_key
from mmsweep.rows import Rows, read, to_parquet
from trainers.config import NAME_PATTERN, RUN_ID
from trainers.errors import InputError, did_you_mean
from trainers.manifest import CorruptError, checkpoint_name, parse_manifest, verify
from trainers.records import (
    CHECKPOINTS,
    CONFIG,
    KINDS,
    MANIFEST,
    PART,
    RECORD_TYPES,
    STATUS,
    SUMMARY,
    dumps,
    with_floats,
)
from trainers.yamlfile import printable

__all__ = [
    "DamagedError",
    "DirectoryStore",
    "NotFound",
    "ObjectStore",
    "RunStore",
    "StoreError",
    "check_key",
    "open_store",
]

log = logging.getLogger(__name__)

T = TypeVar("T")

QUARANTINE = "checkpoints-bad"
LEASES = "leases"
STOP = "stop.json"
HELD = ".shipping"
"""Folder of a local run folder: links to the files of the checkpoint that is on its way."""
KEPT_CHECKPOINTS = 2
"""Of each run, unless somebody asks for another number."""
GRID_BEAT_S = 2.0
"""Heartbeats of launches: few, and somebody waits for one who launches a grid a second time."""


def open_store(url: str, *, keep: int = KEPT_CHECKPOINTS) -> RunStore:
    """The store at `url`: a folder (`./results`, `/abs`, `file:///abs`) or `s3://bucket/prefix`.

    Nothing is contacted or created yet. `keep` is the number of checkpoints kept for every run.

    Raises:
        InputError: not a URL of these forms.
    """
    scheme, separator, _ = url.partition("://")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InputError(f'store "{url}": {error}') from None
    if "\0" in unquote(url):
        raise InputError("the store's name holds a NUL character")
    if not url.strip():
        raise InputError("the store has no name; write a folder, as in ./results, or s3://bucket/prefix")
    if not separator:
        return RunStore(DirectoryStore(Path(url)), keep=keep)
    if scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return RunStore(DirectoryStore(Path(unquote(parts.path))), keep=keep)
    if scheme == "file":
        raise InputError(f'store "{url}": a file URL has three slashes, as in file:///data/results')
    if scheme == "s3":
        from mmsweep.s3 import S3Store  # boto3 only where it is needed

        return RunStore(S3Store(*_bucket_and_prefix(url)), keep=keep)
    raise InputError(
        f'store "{url}": {scheme}:// is not supported; use a folder or s3://bucket/prefix '
        "(with AWS_ENDPOINT_URL for other services that speak S3)"
    )


def _bucket_and_prefix(url: str) -> tuple[str, str]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    prefix = prefix.strip("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
        raise InputError(f'store "{url}": "{bucket}" is not a bucket name; write s3://bucket/prefix')
    try:
        return bucket, check_key(prefix) if prefix else ""
    except ValueError:
        fix = "remove empty, . and .. parts"
        raise InputError(f'store "{url}": "{prefix}" is not a plain prefix; {fix}') from None


class _Shape(BaseModel):
    """What is relied on in a JSON object; the rest is passed on as it is."""

    model_config = ConfigDict(extra="allow")

    @staticmethod
    def restore(value: Any) -> Any:
        return value


class _Measured(_Shape):
    """Holds floats that may not be finite."""

    @staticmethod
    def restore(value: Any) -> Any:
        return with_floats(value)


class _Cell(_Shape):
    run_id: Annotated[str, Field(pattern=RUN_ID.pattern)]
    arm: str
    seed: int
    axes: dict[str, Any] = {}


class _Limit(_Shape):
    hours: float
    unit: str
    devices: float


class _Index(_Shape):
    name: str
    budget: _Limit | None = None
    arms: dict[str, dict[str, Any]] = {}
    axes: list[str] = []
    cells: list[_Cell]


class _Config(_Shape):
    config: dict[str, Any]
    provenance: dict[str, Any] = {}


class _Status(_Measured):
    status: str
    reason: str | None = None
    attempt: int = 0
    step: int = 0
    steps: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    tokens_per_s: float | None = None
    updated: float | None = None
    progressed: float | None = None
    log_tail: list[str] = []
    failures: list[dict[str, Any]] = []
    device_seconds: float | None = None


class _Summary(_Measured):
    status: str
    reason: str = ""
    steps: int
    horizon: int
    final_val_loss: float | None
    attempts: int = 1
    started: float = 0.0
    finished: float = 0.0
    train_seconds: float = 0.0
    device_seconds: float | None = None


@dataclass
class _Shipped:
    """What is known of one run's objects in the store, so that nothing is sent or verified twice."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    listed: bool = False
    parts: set[str] = field(default_factory=set)
    checkpoints: dict[str, bytes] = field(default_factory=dict)
    """Manifests of those in the store, by name."""
    refused: dict[str, bytes] = field(default_factory=dict)
    """Manifests of damaged local ones."""


class RunStore:
    """The runs of all sweeps that share a store. Safe to use from several threads.

    Methods that take a run id or a grid's name raise `InputError` where it is not one; all raise
    `StoreError`, one line with the fix, when the store fails or holds something unreadable.
    """

    def __init__(self, objects: ObjectStore, *, keep: int = KEPT_CHECKPOINTS) -> None:
        """`keep`: how many complete checkpoints of each run stay in the store."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.objects = objects
        self.keep = keep
        self._shipped: dict[str, _Shipped] = {}

    @property
    def url(self) -> str:
        return self.objects.url

    # Grids

    def put_grid(self, name: str, yaml_text: str, index: dict[str, Any]) -> None:
        """Keep a grid file as it was given, then its expansion. What is there already is left alone."""
        for key, text in (
            (f"grids/{_grid_name(name)}.yaml", yaml_text),
            (f"grids/{name}.json", dumps(index) + "\n"),
        ):
            if not self.objects.exists(key) or self.objects.get(key) != text.encode():
                self.objects.put(key, text.encode())

    def grids(self) -> list[str]:
        names = (n.removesuffix(".json") for n in self.objects.children("grids") if n.endswith(".json"))
        return [name for name in names if _is_name(name)]

    def grid_index(self, name: str) -> dict[str, Any]:
        """The expansion of a grid. Raises `NotFound`."""
        key = f"grids/{_grid_name(name)}.json"
        index = self._json(key, _Index)
        if index is None:
            raise NotFound(f"{self.url}/{key}")
        return index

    # Who works on what (see `mmsweep.lease`)

    def grid_lease(self, name: str, launch: str, *, on_lost: Callable[[], None] = lambda: None) -> Lease:
        """The right to launch a grid. `launch` names the claimant to people."""
        return Lease(self.objects, _grid_lease(name), launch, beat_s=GRID_BEAT_S, on_lost=on_lost)

    def run_lease(self, run_id: str, launch: str) -> Lease:
        """The right to work on a run."""
        return Lease(self.objects, _key(run_id, LEASES), launch, beat_s=BEAT_S)

    def launches(self, name: str) -> list[Claim]:
        """Who has the lease of a grid, dead or alive; seldom more than one."""
        return [claim for claim in claims(self.objects, _grid_lease(name)) if claim.held]

    def workers(self, run_id: str) -> list[Claim]:
        """Who has the lease of a run, dead or alive; seldom more than one."""
        return [claim for claim in claims(self.objects, _key(run_id, LEASES)) if claim.held]

    # What launches say

    def put_launch_log(self, grid: str, launch: str, text: str) -> None:
        self.objects.put(_launch_log(grid, launch), text.encode())

    def launch_log(self, grid: str, launch: str) -> str:
        """What a launch has said so far; empty where it has kept nothing."""
        try:
            return self.objects.get(_launch_log(grid, launch)).decode(errors="replace")
        except NotFound:
            return ""

    # Requests to stop, which a launch and its agents look for

    def request_stop(self, *, grid: str | None = None, run_id: str | None = None) -> None:
        """Ask the launch of a grid, or the agent of a run, to save and end."""
        self._put_json(_stop(grid, run_id), {"requested": time.time()})

    def stop_requested(self, *, grid: str | None = None, run_id: str | None = None) -> bool:
        return self.objects.exists(_stop(grid, run_id))

    def withdraw_stop(self, *, grid: str | None = None, run_id: str | None = None) -> None:
        """Forget a request: a launch does it for its grid and its runs before it begins."""
        self.objects.delete(_stop(grid, run_id))

    # What is known of a run

    def run_ids(self) -> list[str]:
        return [name for name in self.objects.children("runs") if _is_run_id(name)]

    def facts(self) -> dict[str, set[str]]:
        """For every run, which of its summary, status, request to stop and claims are there: one listing."""
        found: dict[str, set[str]] = {}
        for key in self.objects.list("runs"):
            _, run_id, name = key.split("/", 2) if key.count("/") > 1 else ("", "", "")
            if not _is_run_id(run_id):
                continue
            names = found.setdefault(run_id, set())
            if name in (SUMMARY, STATUS, STOP) or name.startswith(f"{LEASES}/"):
                names.add(name)
        return found

    def saved_step(self, run_id: str) -> int | None:
        """The step of the newest complete checkpoint; None: there is none."""
        return max(map(int, self._complete(run_id)), default=None)

    def config(self, run_id: str) -> dict[str, Any] | None:
        return self._json(_key(run_id, CONFIG), _Config)

    def put_config(self, run_id: str, config: dict[str, Any]) -> None:
        self._put_json(_key(run_id, CONFIG), config)

    def status(self, run_id: str) -> dict[str, Any] | None:
        return self._json(_key(run_id, STATUS), _Status)

    def put_status(self, run_id: str, status: dict[str, Any]) -> None:
        self._put_json(_key(run_id, STATUS), status)

    def summary(self, run_id: str) -> dict[str, Any] | None:
        """The result of a run that is complete, else None."""
        return self._json(_key(run_id, SUMMARY), _Summary)

    def put_summary(self, run_id: str, summary: dict[str, Any]) -> None:
        """Declare a run complete; to be called after everything else is in the store."""
        self._put_json(_key(run_id, SUMMARY), summary)

    def next_attempt(self, run_id: str) -> int:
        """1 + the highest attempt that has left a trace under the run."""
        folders = (re.fullmatch(r"attempt-(\d{3,})", name) for name in self.objects.children(_key(run_id)))
        seen = [int(match[1]) for match in folders if match]
        with suppress(DamagedError):  # it is rewritten; folders and the summary remember attempts too
            seen.append((self.status(run_id) or {}).get("attempt", 0))
        seen.append((self.summary(run_id) or {}).get("attempts", 0))
        return 1 + max(seen, default=0)

    def _json(self, key: str, shape: type[_Shape]) -> dict[str, Any] | None:
        try:
            value = json.loads(self.objects.get(key))
            return shape.model_validate(shape.restore(value)).model_dump(exclude_unset=True)
        except NotFound:
            return None
        except (ValueError, RecursionError) as error:
            what = "not JSON"
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                what = printable(f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg'].lower()}")
            raise DamagedError(
                f"{self.url}/{key}: not an object written by mmsweep ({what}); move it away"
            ) from None

    def _put_json(self, key: str, value: dict[str, Any]) -> None:
        self.objects.put(key, (dumps(value) + "\n").encode())

    # Local run folder → store

    def ship(self, run_id: str, run_dir: Path) -> int:
        """Send what is new in a local run folder, and return the number of objects written.

        Closed parts first, then complete checkpoints that verify (files, then manifest); a
        checkpoint never arrives before the records that led to it. Older checkpoints in the store
        are then removed. After a `StoreError` the next call carries on where this one stopped.
        """
        shipped = self._shipped.setdefault(_run_id(run_id), _Shipped())
        with shipped.lock:
            # Taken before the parts are listed: parts are closed before a checkpoint is complete.
            local = _local_checkpoints(run_dir)
            if not shipped.listed:
                self._list_shipped(run_id, local, shipped)
            written = self._ship_parts(run_id, run_dir, shipped)
            return written + self._ship_checkpoints(run_id, run_dir, local, shipped)

    def _list_shipped(self, run_id: str, local: dict[str, bytes], shipped: _Shipped) -> None:
        shipped.parts = {key for key in self.objects.list(_key(run_id)) if PART.search(key)}
        for name in self._complete(run_id):
            key = _key(run_id, CHECKPOINTS, name, MANIFEST)
            try:
                shipped.checkpoints[name] = self.objects.get(key) if name in local else b""
            except NotFound:
                continue  # pruned since it was listed
            except DamagedError:
                shipped.checkpoints[name] = b""  # so the local one takes its place
        shipped.listed = True

    def waiting(self, run_id: str, run_dir: Path) -> int:
        """Bytes of a local run folder that `ship` has still to send, as far as is known here.

        The store is not asked, and a `ship` that is under way is not waited for.
        """
        shipped = self._shipped.setdefault(_run_id(run_id), _Shipped())
        unsent = [path for key, path in _closed_parts(run_id, run_dir) if key not in shipped.parts]
        local, stored = _local_checkpoints(run_dir), dict(shipped.checkpoints)
        for name in sorted({*local, *stored}, key=int, reverse=True)[: self.keep]:
            if local.get(name) not in (None, stored.get(name), shipped.refused.get(name)):
                unsent += (run_dir / CHECKPOINTS / name).glob("*")
        return sum(map(_size, unsent))

    def _ship_parts(self, run_id: str, run_dir: Path, shipped: _Shipped) -> int:
        written = 0
        for key, path in _closed_parts(run_id, run_dir):
            if key not in shipped.parts:
                self.objects.put_file(key, path)
                shipped.parts.add(key)
                written += 1
        return written

    def _ship_checkpoints(
        self, run_id: str, run_dir: Path, local: dict[str, bytes], shipped: _Shipped
    ) -> int:
        written = kept = 0
        for name in sorted({*local, *shipped.checkpoints}, key=int, reverse=True):
            known = (None, shipped.checkpoints.get(name), shipped.refused.get(name))
            if local.get(name) not in known:
                with _held(run_dir / CHECKPOINTS / name) as folder:
                    written += self._ship_checkpoint(run_id, folder, local[name], shipped)
            kept += name in shipped.checkpoints
            if kept == self.keep:
                break  # the others are older than what the store keeps
        if written:
            self._prune(run_id)
        return written

    def _ship_checkpoint(self, run_id: str, folder: Path, manifest: bytes, shipped: _Shipped) -> int:
        base = _key(run_id, CHECKPOINTS, folder.name)
        try:
            files = verify(folder)["files"]
            if (folder / MANIFEST).read_bytes() != manifest:
                return 0  # of the same step, and newer: for the next call
            for file, entry in files.items():
                self.objects.put_file(f"{base}/{stored_name(file, entry)}", folder / file)
        except CorruptError as error:
            if not folder.is_dir():
                return 0  # as below
            log.warning("checkpoint not shipped: %s", error)
            shipped.refused[folder.name] = manifest
            return 0
        except FileNotFoundError:
            return 0  # the trainer has replaced it by newer ones
        self.objects.put(f"{base}/{MANIFEST}", manifest)
        shipped.checkpoints[folder.name] = manifest
        return len(files) + 1

    def _checkpoints(self, run_id: str) -> dict[str, list[str]]:
        """File names of every checkpoint in the store, manifest first; without one it is incomplete."""
        base = _key(run_id, CHECKPOINTS)
        found: dict[str, list[str]] = {}
        for key in self.objects.list(base):
            name, _, file = key.removeprefix(base + "/").partition("/")
            if _is_checkpoint(name) and file:
                found.setdefault(name, []).append(file)
        return {name: sorted(files, key=lambda file: file != MANIFEST) for name, files in found.items()}

    def _complete(self, run_id: str) -> set[str]:
        return {name for name, files in self._checkpoints(run_id).items() if MANIFEST in files}

    def _prune(self, run_id: str) -> None:
        """Remove all but the newest complete checkpoints; a newer incomplete one may be on its way."""
        found = self._checkpoints(run_id)
        kept = sorted((name for name, files in found.items() if MANIFEST in files), key=int)[-self.keep :]
        for name, files in found.items():
            if kept and name not in kept and int(name) < int(kept[-1]):
                for file in files:
                    self.objects.delete(_key(run_id, CHECKPOINTS, name, file))

    # Store → local run folder

    def restore(self, run_id: str, run_dir: Path) -> int | None:
        """Make `run_dir/checkpoints` hold the newest checkpoint that verifies, and return its step.

        A good local one is used as it is. A damaged one, here or in the store, is moved to
        `checkpoints-bad/` with the reason, and the one before is tried. None: there is none.
        """
        stored = self._complete(run_id)
        local = _local_checkpoints(run_dir)
        for name in sorted(stored | set(local), key=int, reverse=True):
            folder = run_dir / CHECKPOINTS / name
            good = name in local and _verified_or_set_aside(folder)
            if good or (name in stored and self._fetch(run_id, folder)):
                return int(name)
            self._forget(run_id, name)
        return None

    def _fetch(self, run_id: str, folder: Path) -> bool:
        """Fetch one checkpoint; False if it is damaged (and now quarantined) or gone."""
        base = _key(run_id, CHECKPOINTS, folder.name)
        partial = folder.with_name(f".{folder.name}.partial")
        reason = None
        try:
            for _ in range(2):  # the first time, the damage may have been done on the way
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                reason = self._download(base, partial)
                if reason is None:
                    shutil.rmtree(folder, ignore_errors=True)  # one without a manifest
                    partial.rename(folder)
                    return True
        except NotFound:
            return False  # pruned since it was listed
        except DamagedError as error:
            reason = str(error)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._quarantine(run_id, folder.name, str(reason))
        return False

    def _download(self, base: str, folder: Path) -> str | None:
        """Fetch one checkpoint and verify it; why it is none, or None. Raises `NotFound`: no manifest."""
        manifest = self.objects.get(f"{base}/{MANIFEST}")
        try:
            fetch_checkpoint(self.objects, base, manifest, folder)
        except (CorruptError, DamagedError, NotFound) as error:
            return str(error).replace(f"{folder}/", "")
        return None

    def _quarantine(self, run_id: str, name: str, reason: str) -> None:
        log.warning("%s/%s: quarantined: %s", self.url, _key(run_id, CHECKPOINTS, name), reason)
        before = [n for n in self.objects.children(_key(run_id, QUARANTINE)) if n.startswith(name)]
        target = _key(run_id, QUARANTINE, f"{name}-{len(before) + 1}")
        self._put_json(f"{target}/reason.json", {"step": int(name), "reason": reason})
        for file in self._checkpoints(run_id).get(name, []):
            with suppress(NotFound):
                self.objects.move(_key(run_id, CHECKPOINTS, name, file), f"{target}/{file}")

    def _forget(self, run_id: str, name: str) -> None:
        """Let a checkpoint be shipped again: a repeat of its step may have the very same manifest."""
        shipped = self._shipped.setdefault(run_id, _Shipped())
        with shipped.lock:
            shipped.checkpoints.pop(name, None)
            shipped.refused.pop(name, None)

    # Records

    def table(self, run_id: str, kind: str) -> pa.Table:
        """All records of a kind, each row once, ordered by its key; columns are the record's fields.

        Of rows with one key the highest attempt counts. Without records the table is empty but typed.
        """
        return self._read(run_id, kind).table

    def conflicts(self, run_id: str) -> list[str]:
        """One line for every pair of attempts whose rows differ where they must agree; none is good."""
        return [line for kind in KINDS for line in self._read(run_id, kind).alarms.values()]

    def compact(self, run_id: str) -> dict[str, int]:
        """Turn the parts of all attempts into one Parquet file per kind; rows by kind, where there are any.

        Every file is written before the first part is deleted. Where a crash leaves both, readers
        merge them, so calling it again (at any time) is safe.
        """
        rows: dict[str, int] = {}
        done: list[str] = []
        for kind in KINDS:
            read = self._read(run_id, kind)
            if read.table.num_rows:
                rows[kind] = read.table.num_rows
            if read.parts:
                self.objects.put(_key(run_id, f"{kind}.parquet"), to_parquet(read.table, read.alarms))
                done += read.parts
        for _ in _in_threads(self.objects.delete, done):
            pass
        return rows

    def _read(self, run_id: str, kind: str) -> Rows:
        if kind not in RECORD_TYPES:
            raise InputError(f'"{kind}" is not a kind of record{did_you_mean(kind, KINDS)}')
        for _ in range(3):
            with suppress(NotFound):  # compacted by another process since they were listed
                return read(self.objects, self.objects.entries(_key(run_id)), kind)
        return read(self.objects, self.objects.entries(_key(run_id)), kind)


def _in_threads(function: Callable[[str], T], keys: list[str]) -> Iterator[T]:
    """Results in the order of the keys; a bounded number of them is held at a time."""
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(keys), 64):
            yield from pool.map(function, keys[start : start + 64])


def _key(run_id: str, *names: str) -> str:
    return "/".join(("runs", _run_id(run_id), *names))


def _is_run_id(name: str) -> bool:
    return RUN_ID.fullmatch(name) is not None and ".." not in name


def _run_id(name: str) -> str:
    if not _is_run_id(name):
        raise InputError(f'"{name}" is not a run id; write it as in "hetero-s1-0123abcd"')
    return name


def _is_name(name: str) -> bool:
    return re.fullmatch(NAME_PATTERN, name) is not None and ".." not in name


def _grid_name(name: str) -> str:
    if not _is_name(name):
        allowed = "up to 64 of a-z 0-9 . _ -, beginning with a letter or digit, no '..'"
        raise InputError(f'"{name}" is not a name for a grid; use {allowed}')
    return name


def _stop(grid: str | None, run_id: str | None) -> str:
    """The key of a request to stop a grid or a run, one of which is given."""
    return _key(run_id, STOP) if run_id is not None else f"grids/{_grid_name(grid or '')}.stop"


def _grid_lease(name: str) -> str:
    return f"grids/{_grid_name(name)}.lease"


def _launch_log(grid: str, launch: str) -> str:
    return f"grids/{_grid_name(grid)}.launches/{launch}.log"


def _is_checkpoint(name: str) -> bool:
    return re.fullmatch(r"[0-9]{8,18}", name) is not None and checkpoint_name(int(name)) == name


def stored_name(file: str, entry: dict[str, Any]) -> str:
    """The name in the store of a checkpoint's file; `entry` is what the manifest says of it.

    It holds the file's digest: two attempts that ship the same step, one of which has lost the run and
    does not know yet, write no file of each other's. Either's manifest makes a whole checkpoint.
    """
    return f"{file}.{str(entry['sha256'])[:16]}"


def fetch_checkpoint(objects: ObjectStore, base: str, manifest: bytes, folder: Path) -> dict[str, Any]:
    """Fetch the files of a manifest, which is at the key `base`, and verify them; returns the manifest.

    Raises:
        NotFound: a file that the manifest names is not there.
        DamagedError, CorruptError: the checkpoint is not what was written.
    """
    try:
        for file, entry in parse_manifest(manifest, name=MANIFEST)["files"].items():
            _fetch_file(objects, base, file, entry, folder / file)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{MANIFEST}: not a manifest ({error})") from None
    (folder / MANIFEST).write_bytes(manifest)
    return verify(folder)


def _fetch_file(objects: ObjectStore, base: str, file: str, entry: dict[str, Any], path: Path) -> None:
    try:
        objects.get_file(f"{base}/{stored_name(file, entry)}", path)
    except NotFound as missing:
        try:
            objects.get_file(f"{base}/{file}", path)  # written before names had digests
        except NotFound:
            raise missing from None


def _local_checkpoints(run_dir: Path) -> dict[str, bytes]:
    """Manifests of the complete checkpoints of a local run folder, by name."""
    found = {}
    for path in (run_dir / CHECKPOINTS).glob(f"*/{MANIFEST}"):
        if _is_checkpoint(path.parent.name):
            with suppress(FileNotFoundError):
                found[path.parent.name] = path.read_bytes()
    return found


def _closed_parts(run_id: str, run_dir: Path) -> list[tuple[str, Path]]:
    """Keys and files of the closed parts of a local run folder, in the order in which they are sent."""
    found = ((_key(run_id, p.parent.name, p.name), p) for p in sorted(run_dir.glob("attempt-*/*.jsonl")))
    return [(key, path) for key, path in found if PART.search(key)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # replaced by newer ones
        return 0


@contextmanager
def _held(folder: Path) -> Iterator[Path]:
    """The files of a local checkpoint under second names, so that they stay when the trainer deletes it.

    Else a store that is slower than the trainer would never get a whole one.
    """
    held = folder.parents[1] / HELD / folder.name
    shutil.rmtree(held, ignore_errors=True)
    try:
        held.mkdir(parents=True)
        for path in folder.iterdir():
            (held / path.name).hardlink_to(path)
    except OSError:  # gone already, or a disk without links: ship what is there
        held, unused = folder, held
        shutil.rmtree(unused, ignore_errors=True)
    try:
        yield held
    finally:
        if held != folder:
            shutil.rmtree(held, ignore_errors=True)


def _verified_or_set_aside(folder: Path) -> bool:
    """Whether a local checkpoint is whole; a damaged one is moved out of the trainer's sight."""
    try:
        verify(folder)
    except CorruptError as error:
        bad = folder.parents[1] / QUARANTINE
        bad.mkdir(exist_ok=True)
        target = bad / f"{folder.name}-{len(list(bad.glob(folder.name + '-*'))) + 1}"
        log.warning("checkpoint moved to %s: %s", target, error)
        folder.rename(target)
        (target / "reason.json").write_text(dumps({"step": int(folder.name), "reason": str(error)}) + "\n")
        return False
    return True
