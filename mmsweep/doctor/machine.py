"""Checks of the machine they run on: Python, packages, devices, processes, disks."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from mmsweep.cluster import usable_cpus
from mmsweep.doctor.findings import Finding, Findings, count
from mmsweep.workers import LISTENER, LOOPBACK
from trainers.corpus import cache_root
from trainers.farewell import leave

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
OLDEST_PYTHON = (3, 11)
RANKS = 2
RANKS_TIMEOUT_S = 180.0
PROBE_BYTES = 32 * 2**20
"""Written and synced to time a disk: enough that a cache in the disk itself does not hide it."""
SLOW_DISK = 50e6
"""Bytes a second; a checkpoint of GPT-2 small with its optimizer is about 1.5 GB."""
LITTLE_SPACE, NO_SPACE = 20 * 2**30, 2**30
"""Tokens of OpenWebText take 18 GB; less than the second has no room for one checkpoint."""


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
        version = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            bad.append(f"{requirement.name} {version or 'is missing'} (needs {requirement.specifier})")
    if bad:
        fix = "make .venv/.run, or pip install -c constraints.txt -e ."
        yield Finding("problem", "packages", ", ".join(bad), fix)
    if not constraints.is_file():
        if not bad:
            yield Finding("ok", "packages", f"ray {installed('ray')}, torch {installed('torch')}")
        return
    lines = (line.partition("#")[0].strip() for line in constraints.read_text().splitlines())
    differing = []
    for requirement in (Requirement(line) for line in lines if line):
        version = installed(requirement.name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            differing.append(f"{requirement.name} {version} ({requirement.specifier})")
    if differing:
        what = f"other versions than the tested ones: {', '.join(differing)}"
        yield Finding("warning", "packages", what, f"pip install -c {constraints} -e .")
    elif not bad:
        yield Finding(
            "ok", "packages", f"as in {constraints.name}: ray {installed('ray')}, torch {installed('torch')}"
        )


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_devices(declared: float = 0) -> Findings:
    """GPUs as the driver sees them and as torch does, bfloat16, and NCCL.

    Args:
        declared: GPUs that Ray hands out on this machine.
    """
    driver = _driver()
    # A broken driver can end the process that asks torch about it.
    done = _python("from mmsweep.doctor.machine import print_torch; print_torch()", timeout=RANKS_TIMEOUT_S)
    if done.returncode != 0:
        yield Finding(
            "problem", "devices", f"torch does not start: {last_line(done.stderr)}", "reinstall torch"
        )
        return
    seen = json.loads(done.stdout.splitlines()[-1])
    if len(seen["gpus"]) < declared:
        what = f"Ray hands out {count(round(declared), 'GPU')} here, and torch finds {len(seen['gpus'])}"
        fix = "mend the driver there, or start Ray with --num-gpus of what works"
        yield Finding("problem", "devices", what, fix)
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
    return f"driver {versions[0]} with {count(len(versions), 'GPU')}" if versions else None


def check_workers() -> Findings:
    """Two processes sum a number, joined as the workers of a run: NCCL with a GPU for each, or gloo."""
    code = "from mmsweep.doctor.machine import print_sum; print_sum()"
    begun = time.monotonic()
    with socket.create_server((LOOPBACK, 0)) as meeting:
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
                | {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
                | {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(meeting.getsockname()[1])}
                | {LISTENER: "" if rank else str(meeting.fileno())},
                pass_fds=[] if rank else [meeting.fileno()],
            )
            for rank in range(RANKS)
        ]
    answers = []
    try:
        for worker in workers:
            left = max(0.1, begun + RANKS_TIMEOUT_S - time.monotonic())
            output, errors = worker.communicate(timeout=left)
            answers.append((worker.returncode, output.strip(), last_line(errors)))
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
    """In a child process with a rank, which it ends: the back end, and the sum of 1, 2, … over the ranks."""
    try:
        import torch
        import torch.distributed

        from trainers.distributed import join

        with join("auto") as group:
            value = torch.full((1,), float(group.rank + 1), device=group.device)
            print(torch.distributed.get_backend(), float(group.sum_(value)))
    except Exception:
        traceback.print_exc()
        leave(1)
    leave(0)


def _python(code: str, timeout: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess([], 1, "", f"no answer in {timeout:g} s")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


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
