"""`python -m mmsweep.doctor`: is this machine, this store, this cluster fit for a sweep?

Every finding is one line: ok, warning or problem, what was seen, and for the last two what to do.
Nothing is assumed that can be tried: workers exchange a number, files and objects are written,
read and removed again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from rich.console import Console

from mmsweep.cluster import asks_for_token, connect, is_loopback, jobs_status, usable_cpus
from mmsweep.objects import DirectoryStore, NotFound, ObjectStore, StoreError
from mmsweep.store import open_store
from trainers.corpus import cache_root
from trainers.errors import InputError
from trainers.yamlfile import printable

Level = Literal["ok", "warning", "problem"]

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
OLDEST_PYTHON = (3, 11)
RANKS = 2
RANKS_TIMEOUT_S = 180.0
NODES_TIMEOUT_S = 300.0
"""For all nodes together: each starts torch, and one that cannot reach the store tries for a while."""
PROBE_BYTES = 32 * 2**20
"""Written and synced to time a disk: enough that a cache in the disk itself does not hide it."""
SLOW_DISK = 50e6
"""Bytes a second; a checkpoint of GPT-2 small with its optimizer is about 1.5 GB."""
LITTLE_SPACE, NO_SPACE = 20 * 2**30, 2**30
"""Tokens of OpenWebText take 18 GB; less than the second has no room for one checkpoint."""
CLOCK_WARNING_S, CLOCK_PROBLEM_S = 30.0, 600.0
"""S3 refuses requests signed more than 15 minutes off."""
PROBES = ".doctor"
"""Folder of the store where objects are tried; nothing stays there."""
NOT_NEEDED = "nothing to do: no sweep depends on it"
CHECKED_ANYWAY = "nothing to do: mmsweep compares what has arrived"
RACERS, RACE = 8, "-race"
CREATED, REFUSED = 200, 412
WRONG_CRC32 = "AAAAAA=="
DIGEST = "sha256"  # mmsweep.s3.DIGEST; importing it would load boto3
STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    subject: str
    what: str
    fix: str = ""

    def line(self) -> str:
        what = f"{self.what}; {self.fix}" if self.fix else self.what
        return f"{self.level:8} {self.subject:8} {printable(' '.join(what.split()))}"


Findings = Iterator[Finding]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings. Exit status 0: no problem; 1: problems; 2: bad arguments."""
    arguments = _parser().parse_args(argv)
    checks: list[tuple[str, Callable[[], Findings]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("devices", check_devices),
        ("workers", check_workers),
        ("disk", check_disks),
    ]
    objects: ObjectStore | None = None
    try:
        if arguments.store is not None:
            objects = store = open_store(arguments.store).objects
            checks.append(("store", lambda: check_store(store)))
    except (InputError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.address is not None:
        checks.append(("cluster", lambda: check_cluster(arguments.address, objects)))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    problems = warnings = 0
    for subject, check in checks:
        for finding in _guarded(subject, check):
            console.print(finding.line(), style=STYLES[finding.level] if finding.level != "ok" else None)
            problems += finding.level == "problem"
            warnings += finding.level == "warning"
    console.print(f"{_count(problems, 'problem')}, {_count(warnings, 'warning')}")
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmsweep doctor", description="Check this machine, a store and a cluster, and say what to mend."
    )
    parser.add_argument("--store", help='folder or "s3://bucket/prefix" to try reading and writing in')
    parser.add_argument("--address", help='Ray cluster to look at: "auto" or host:port')
    return parser


def _guarded(subject: str, check: Callable[[], Findings]) -> Findings:
    """The findings of a check; one that breaks is a finding, and the others go on."""
    try:
        yield from check()
    except Exception as error:
        yield Finding("problem", subject, f"this check broke: {type(error).__name__}: {error}", "report it")


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


# --- this machine --------------------------------------------------------------------------------


def check_python() -> Findings:
    version = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        yield Finding("problem", "python", version, f"Python {wanted} or newer is needed")
    else:
        yield Finding("ok", "python", f"{version} on {platform.system()} {platform.machine()}")


def check_packages(constraints: Path = CONSTRAINTS) -> Findings:
    """Versions against what mmsweep requires, and against constraints.txt where that is there."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(line) for line in metadata.requires("mmsweep") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("problem", "packages", "mmsweep is not installed", "pip install -e . in its folder")
        return
    bad = []
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            bad.append(f"{requirement.name} {version or 'is missing'} (needs {requirement.specifier})")
    if bad:
        fix = "make .venv/.run, or pip install -c constraints.txt -e ."
        yield Finding("problem", "packages", ", ".join(bad), fix)
    if not constraints.is_file():
        if not bad:
            yield Finding("ok", "packages", f"ray {_version('ray')}, torch {_version('torch')}")
        return
    lines = (line.partition("#")[0].strip() for line in constraints.read_text().splitlines())
    differing = []
    for requirement in (Requirement(line) for line in lines if line):
        version = _version(requirement.name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            differing.append(f"{requirement.name} {version} ({requirement.specifier})")
    if differing:
        what = f"other versions than the tested ones: {', '.join(differing)}"
        yield Finding("warning", "packages", what, f"pip install -c {constraints} -e .")
    elif not bad:
        yield Finding(
            "ok", "packages", f"as in {constraints.name}: ray {_version('ray')}, torch {_version('torch')}"
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_devices() -> Findings:
    """GPUs as the driver sees them and as torch does, bfloat16, and NCCL."""
    driver = _driver()
    # A broken driver can end the process that asks torch about it.
    done = _python("from mmsweep.doctor import print_torch; print_torch()", timeout=RANKS_TIMEOUT_S)
    if done.returncode != 0:
        yield Finding("problem", "devices", f"torch does not start: {_last(done.stderr)}", "reinstall torch")
        return
    seen = json.loads(done.stdout.splitlines()[-1])
    if not seen["gpus"]:
        if driver is None:
            yield Finding("ok", "devices", f"no GPU; runs train on {usable_cpus()} CPU cores")
        elif seen["cuda"] is None:
            fix = "install a CUDA build: pip install --force-reinstall torch, from PyPI"
            yield Finding("problem", "devices", f"{driver}, and torch is built without CUDA", fix)
        else:
            fix = "install a driver that is new enough for that, or unset CUDA_VISIBLE_DEVICES"
            yield Finding("problem", "devices", f"{driver}, and torch (CUDA {seen['cuda']}) sees none", fix)
        return
    for name, gib, bfloat16 in seen["gpus"]:
        what = f"{name}, {gib:.0f} GiB, CUDA {seen['cuda']}, {driver or 'no nvidia-smi'}"
        if bfloat16:
            yield Finding("ok", "devices", what)
        else:
            fix = "set precision: float32 in the grid"
            yield Finding("warning", "devices", f"{what}: no bfloat16", fix)
    if not seen["nccl"]:
        fix = "install torch from PyPI; runs of several GPUs need NCCL"
        yield Finding("problem", "devices", "torch is built without NCCL", fix)


def print_torch() -> None:
    """In a child process: what torch sees, as one line of JSON."""
    import torch
    import torch.distributed

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        of = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            gpus.append((of.name, of.total_memory / 2**30, torch.cuda.is_bf16_supported()))
    nccl = torch.distributed.is_nccl_available()
    print(json.dumps({"cuda": torch.version.cuda, "gpus": gpus, "nccl": nccl}))


def _driver() -> str | None:
    """`driver 550.54 with 2 GPUs` as nvidia-smi tells it, None without a driver."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    versions = done.stdout.split()
    return f"driver {versions[0]} with {_count(len(versions), 'GPU')}" if versions else None


def check_workers() -> Findings:
    """Two processes sum a number, joined as the workers of a run: NCCL with a GPU for each, or gloo."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "from mmsweep.doctor import print_sum; print_sum()"
    begun = time.monotonic()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            | {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for rank in range(RANKS)
    ]
    answers = []
    try:
        for worker in workers:
            left = max(0.1, begun + RANKS_TIMEOUT_S - time.monotonic())
            output, errors = worker.communicate(timeout=left)
            answers.append((worker.returncode, output.strip(), _last(errors)))
    except subprocess.TimeoutExpired:
        fix = "check the firewall of 127.0.0.1, and NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
        yield Finding("problem", "workers", f"{RANKS} processes did not find each other", fix)
        return
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    bad = [error for status, _, error in answers if status != 0]
    if bad:
        fix = "run again with NCCL_DEBUG=INFO" if _driver() else "check that 127.0.0.1 is reachable"
        yield Finding("problem", "workers", f"an all-reduce of {RANKS} processes failed: {bad[0]}", fix)
        return
    backend, total = answers[0][1].split()
    expected = RANKS * (RANKS + 1) / 2
    if float(total) != expected:
        yield Finding("problem", "workers", f"{backend} sums to {total}, not {expected:g}", "reinstall torch")
    else:
        yield Finding("ok", "workers", f"{RANKS} processes exchange tensors through {backend}")


def print_sum() -> None:
    """In a child process with a rank: the back end, and the sum of 1, 2, … over the ranks."""
    import torch
    import torch.distributed

    from trainers.distributed import join

    with join("auto") as group:
        value = torch.full((1,), float(group.rank + 1), device=group.device)
        print(torch.distributed.get_backend(), float(group.sum_(value)))


def _python(code: str, timeout: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess([], 1, "", f"no answer in {timeout:g} s")


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


# --- disks ---------------------------------------------------------------------------------------


def check_disks() -> Findings:
    """Where tokens are cached and where running runs keep their files."""
    yield from check_folder(cache_root(), "cache", "point MMSWEEP_CACHE to")
    yield from check_folder(Path(tempfile.gettempdir()), "runs", "point TMPDIR to")


def check_folder(folder: Path, subject: str, elsewhere: str) -> Findings:
    """Writable, with room, and how fast; `elsewhere` begins the advice to take another folder."""
    probe = folder / f".doctor-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        speed = _write_speed(probe, PROBE_BYTES if free > 4 * PROBE_BYTES else 4096)
    except OSError as error:
        what = f"{folder}: {error.strerror or error}"
        yield Finding("problem", subject, what, f"{elsewhere} a folder that can be written")
        return
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    what = f"{folder}: {free / 2**30:.1f} GiB free"
    if free < NO_SPACE:
        yield Finding("problem", subject, what, f"make room, or {elsewhere} a larger disk")
    elif free < LITTLE_SPACE:
        fix = f"large corpora and checkpoints need more: make room, or {elsewhere} a larger disk"
        yield Finding("warning", subject, what, fix)
    elif speed is not None and speed < SLOW_DISK:
        what = f"{folder}: writes {speed / 1e6:.0f} MB/s"
        yield Finding("warning", subject, what, f"checkpoints will take long: {elsewhere} a local disk")
    else:
        yield Finding("ok", subject, what + (f", writes {speed / 1e6:.0f} MB/s" if speed else ""))


def _write_speed(path: Path, size: int) -> float | None:
    """Bytes a second of writing and syncing a file; None if it is too small to tell."""
    block = os.urandom(min(size, 2**20))
    begun = time.monotonic()
    with path.open("xb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    return size / (time.monotonic() - begun) if size == PROBE_BYTES else None


# --- the store -----------------------------------------------------------------------------------


def check_store(objects: ObjectStore, *, service: bool = True) -> Findings:
    """Each right that a sweep needs, tried on one object; then what is good to know, and the clock.

    `service`: also what the service does, which is the same wherever it is asked from.
    """
    key = f"{PROBES}/{uuid.uuid4().hex}"
    first, second = uuid.uuid4().bytes, uuid.uuid4().bytes
    try:
        objects.put(key, first)
    except (StoreError, NotFound) as error:
        yield Finding("problem", "store", f"writing: {error}")
        return

    def overwrites() -> bool:
        objects.put(key, second)
        return objects.get(key) == second

    rights: dict[str, Callable[[], bool]] = {
        "reading": lambda: objects.get(key) == first,
        "listing": lambda: key in objects.list(PROBES),
        "overwriting": overwrites,
    }
    good = ["writing"]
    for right, works in rights.items():
        try:
            if works():
                good.append(right)
            else:
                fix = "this is no store for a sweep: what was written must be there at once"
                yield Finding("problem", "store", f"{objects.url}: {right}: not what was just written", fix)
        except (StoreError, NotFound) as error:
            yield Finding("problem", "store", f"{right}: {error}")
    more = list(_guarded("clock", lambda: _clock(objects, key)))
    if service:
        more[:0] = [
            *_guarded("store", lambda: _conditional(objects, key)),
            *_guarded("store", lambda: _integrity(objects, key)),
            *_guarded("store", lambda: _encryption(objects)),
        ]
    try:
        for probe in (key, key + RACE):
            objects.delete(probe)
        if objects.exists(key):
            fix = f"remove {PROBES}/ yourself, and give these credentials the right to delete"
            yield Finding("problem", "store", f"{objects.url}: deleting: the object is still there", fix)
        else:
            good.append("deleting")
    except StoreError as error:
        yield Finding("problem", "store", f"deleting ({key} stays there): {error}")
    if len(good) == 1 + len(rights) + 1:
        yield Finding("ok", "store", f"{objects.url}: {', '.join(good)}")
    yield from more


def _conditional(objects: ObjectStore, key: str) -> Findings:
    """Whether "write unless it is there" refuses where it is there, also when several try at once.

    Nothing depends on it: leases are made for stores that have no such thing.
    """
    fresh = key + RACE
    create = _create_file if isinstance(objects, DirectoryStore) else _create_object
    again = create(objects, key)
    with ThreadPoolExecutor(RACERS) as pool:
        answers = list(pool.map(lambda _: create(objects, fresh), range(RACERS)))
    won = answers.count(CREATED)
    if again not in (CREATED, REFUSED):
        yield Finding("warning", "store", f"answers If-None-Match with {again}", NOT_NEEDED)
    elif again == CREATED:
        yield Finding("warning", "store", "ignores If-None-Match: creates an object twice", NOT_NEEDED)
    elif won != 1:
        what = f"honours If-None-Match, and yet of {RACERS} at once {won} create the same object"
        yield Finding("warning", "store", what, NOT_NEEDED)
    else:
        what = f"creates an object once (If-None-Match), also when {RACERS} try at once"
        yield Finding("ok", "store", what)


def _create_file(objects: Any, key: str) -> int:
    try:
        (objects.root / key).open("xb").close()
    except FileExistsError:
        return REFUSED
    return CREATED


def _create_object(objects: Any, key: str) -> int:
    return _s3_put(objects, key, IfNoneMatch="*")[0]


def _integrity(objects: ObjectStore, key: str) -> Findings:
    """What the service does against damage on the way, beside what mmsweep does itself."""
    if isinstance(objects, DirectoryStore):
        return
    status, _ = _s3_put(objects, key, ChecksumCRC32=WRONG_CRC32)
    objects.put(key, b"with a digest")
    answer = objects.client.get_object(Bucket=objects.bucket, Key=objects.prefix + key)  # type: ignore[attr-defined]
    if DIGEST not in answer["Metadata"]:
        what = "drops the metadata of objects, and with it their digests"
        yield Finding("warning", "store", what, "use https, so that nothing is damaged on the way")
    elif status == 200:
        yield Finding("warning", "store", "takes a write whose checksum is wrong", CHECKED_ANYWAY)
    else:
        yield Finding("ok", "store", "keeps digests, and refuses a write whose checksum is wrong")
    try:
        objects.unfinished()
    except StoreError as error:
        fix = "without it `mmsweep store gc` leaves them, and they are paid for"
        yield Finding("warning", "store", f"uploads that were cut off: {error}", fix)


def _encryption(objects: ObjectStore) -> Findings:
    """Whether others on the way can read what is stored."""
    if isinstance(objects, DirectoryStore):
        return
    endpoint = objects.client.meta.endpoint_url  # type: ignore[attr-defined]
    parts = urlsplit(endpoint)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        what = f"{endpoint}: requests are signed, but all that is stored can be read on the way"
        yield Finding("warning", "store", what, "use https, or keep it in a private network")


def _clock(objects: ObjectStore, key: str) -> Findings:
    """This machine's clock against the store's: the Date of an answer, or the time of a file."""
    before = time.time()
    if isinstance(objects, DirectoryStore):
        objects.put(key, b"clock")
        stored, resolution = (objects.root / key).stat().st_mtime, 0.1
    else:
        _, date = _s3_put(objects, key)
        if date is None:
            yield Finding("warning", "clock", "the store's answers carry no date", "check the clock by hand")
            return
        stored, resolution = parsedate_to_datetime(date).timestamp(), 1.0
    after = time.time()
    skew = max(before - stored - resolution, stored - after, 0.0) * (1 if stored > after else -1)
    what = f"this machine's clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the store's"
    if abs(skew) > CLOCK_PROBLEM_S:
        yield Finding("problem", "clock", what, "set it: timedatectl set-ntp true")
    elif abs(skew) > CLOCK_WARNING_S:
        yield Finding("warning", "clock", what, "set it: timedatectl set-ntp true")
    else:
        yield Finding("ok", "clock", "agrees with the store's")


def _s3_put(objects: Any, key: str, **conditions: str) -> tuple[int, str | None]:
    """Status and Date header of one PUT, which `ObjectStore` does not show."""
    from botocore.exceptions import ClientError

    try:
        answer = objects.client.put_object(
            Bucket=objects.bucket, Key=objects.prefix + key, Body=b"probe", **conditions
        )
    except ClientError as error:
        answer = error.response
    facts = answer["ResponseMetadata"]
    return int(facts["HTTPStatusCode"]), facts["HTTPHeaders"].get("date")


# --- a cluster -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mark:
    """An object that was written into the store here, for every node to read."""

    store: str
    key: str
    data: bytes


def check_cluster(address: str, objects: ObjectStore | None = None) -> Findings:
    """Who may use it, what it has, and whether every node is as fit as this machine, also for the store."""
    try:
        with connect(address) as capacity:
            what = f"{_count(capacity.nodes, 'node')}, {capacity.cpus:g} CPUs, {capacity.gpus:g} GPUs"
            yield Finding("ok", "cluster", f"{address}: {what}")
            yield from _doors()
            yield from _nodes(objects)
    except InputError as error:
        yield Finding("problem", "cluster", str(error))


def _doors() -> Findings:
    """Whether Ray itself and its jobs API turn away who brings no token."""
    import ray
    from ray._private.worker import get_dashboard_url

    head = ray.get_runtime_context().gcs_address
    here_alone = is_loopback(urlsplit(f"//{head}").hostname or "")
    asks = asks_for_token(head)
    yield _ray_itself(head, asks, here_alone=here_alone)
    yield _jobs_api(get_dashboard_url(), safe=asks is True or here_alone)


TOKENS = "start every node with RAY_AUTH_MODE=token; see cluster/README.md"


def _ray_itself(head: str, asks: bool | None, *, here_alone: bool) -> Finding:
    if asks:
        return Finding("ok", "cluster", f"Ray at {head} wants a token")
    if asks is None:
        fix = "see that every node is started with RAY_AUTH_MODE=token"
        return Finding("warning", "cluster", f"Ray at {head} does not tell whether it wants a token", fix)
    what = f"Ray at {head} runs code for anyone who reaches it"
    return Finding("warning" if here_alone else "problem", "cluster", what, TOKENS)


def _jobs_api(url: str | None, *, safe: bool) -> Finding:
    """`safe`: Ray itself is closed to other machines."""
    if not url:
        return Finding("ok", "cluster", "no dashboard, and so no jobs API")
    try:
        status = jobs_status(f"http://{url}")
    except OSError:
        return Finding("ok", "cluster", f"the jobs API at {url} cannot be reached from here")
    if status in (401, 403):
        return Finding("ok", "cluster", f"the jobs API at {url} wants a token")
    what = f"the jobs API at {url} runs code for anyone who reaches it (HTTP {status})"
    here_alone = safe and is_loopback(urlsplit(f"//{url}").hostname or "")
    return Finding("warning" if here_alone else "problem", "cluster", what, TOKENS)


def _nodes(objects: ObjectStore | None) -> Findings:
    """What every node says of itself: versions, devices, disks, and the store that was opened here."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from mmsweep import doctor  # by its own name, also where this file is __main__

    nodes = [node for node in ray.nodes() if node["Alive"]]
    deadline = time.monotonic() + NODES_TIMEOUT_S
    with doctor.marked(objects) as mark:
        asked = []
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, scheduling_strategy=there)(doctor.examine)
            asked.append(task.remote(mark))
        sound = 0
        for node, answer in zip(nodes, asked, strict=True):
            name = f"node {node['NodeManagerAddress']}"
            try:
                found = ray.get(answer, timeout=max(0.1, deadline - time.monotonic()))
            except ray.exceptions.GetTimeoutError:
                what = f"{name} has not answered in {NODES_TIMEOUT_S:g} s"
                yield Finding("problem", "cluster", what, "see whether it is overloaded, or its store away")
                continue
            except ray.exceptions.RayError as error:
                what = f"{name} does not run mmsweep: {_last(str(error))}"
                fix = "install the same mmsweep there; see cluster/README.md"
                yield Finding("problem", "cluster", what, fix)
                continue
            bad = list(_of_node(name, *found))
            yield from bad
            sound += not bad
    if sound == len(nodes):
        versions = ", ".join(f"{package} {version}" for package, version in doctor.facts().items())
        what = "devices, disks, store and clock" if mark else "devices and disks"
        yield Finding("ok", "cluster", f"every node has {versions}, and sound {what}")


def _of_node(name: str, versions: dict[str, str], findings: list[Finding]) -> Findings:
    """How a node differs from this machine, and what it has found wrong with itself."""
    here = facts()
    differing = [f"{key} {versions[key]} (here {here[key]})" for key in here if versions[key] != here[key]]
    if differing:
        fix = "install from one constraints.txt on every node"
        yield Finding("problem", "cluster", f"{name} differs: {', '.join(differing)}", fix)
    for finding in findings:
        if finding.level != "ok":
            yield replace(finding, what=f"{name}: {finding.what}")


@contextmanager
def marked(objects: ObjectStore | None) -> Iterator[Mark | None]:
    """A mark in the store for the length of the block; None without a store, or without one to write in."""
    if objects is None:
        yield None
        return
    mark = Mark(objects.url, f"{PROBES}/{uuid.uuid4().hex}", uuid.uuid4().bytes)
    try:
        objects.put(mark.key, mark.data)
    except StoreError:  # `check_store` has said so
        yield None
        return
    try:
        yield mark
    finally:
        with suppress(StoreError):
            objects.delete(mark.key)


def examine(mark: Mark | None) -> tuple[dict[str, str], list[Finding]]:
    """In a task on a node of a cluster: its versions, and what the checks find there."""
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides the GPUs from a task that asks for none
    checks: list[tuple[str, Callable[[], Findings]]] = [("devices", check_devices), ("disk", check_disks)]
    if mark is not None:
        checks.append(("store", lambda: _from_here(mark)))
    return facts(), [finding for subject, check in checks for finding in _guarded(subject, check)]


def _from_here(mark: Mark) -> Findings:
    """Whether this node reaches the store that has the mark, with every right, and what its clock says."""
    try:
        objects = open_store(mark.store).objects
        same = objects.get(mark.key) == mark.data
    except NotFound:
        same = False
    except (InputError, StoreError) as error:
        yield Finding("problem", "store", f"reading: {error}")
        return
    if same:
        yield from check_store(objects, service=False)
    else:
        what = f"{mark.store} is not the store of the machine that asks: what was written there is not here"
        yield Finding("problem", "store", what, "mount the same folder at this place, or take s3://")


def facts() -> dict[str, str]:
    """What must be the same on every node of a cluster."""
    python = re.sub(r"\.\d+$", "", platform.python_version())
    packages = {name: _version(name) or "none" for name in ("mmsweep", "ray", "torch", "numpy")}
    return {"python": python, **packages}


if __name__ == "__main__":
    from mmsweep.__main__ import quietly

    sys.exit(quietly(main))
