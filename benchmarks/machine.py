"""What the benchmarks share: the machine they run on, and how they write results down."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from trainers.provenance import code_digest

RESULTS = Path(__file__).parent / "results"


def prepare(device: str, threads: int | None) -> torch.device:
    """The device to use (`auto` is CUDA if there is one), after fixing the number of threads."""
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def describe(device: torch.device) -> dict[str, Any]:
    """Facts of the machine that figures depend on."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "gpu_clock": _gpu_clock(),
        }
    return facts


def slug(device: torch.device) -> str:
    """The device in a file's name."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_model()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def _cpu_model() -> str:
    if sys.platform == "linux":
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def _gpu_clock() -> str | None:
    """SM clock now, and its limit."""
    return _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, to the end of what it started on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def peak_gflops(dtype: torch.dtype, width: int, batch: int, device: torch.device) -> float:
    """Rate of a 4 width x width x width product, the best of three layouts (median of five each)."""
    m, n = 4 * width, width
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(batch, m, n, generator=generator).to(device, dtype)
    B = torch.randn(batch, n, n, generator=generator).to(device, dtype)
    if batch == 1:  # bmm is another routine on a CPU
        A, B = A[0], B[0]
    products: tuple[Callable[[], object], ...] = (lambda: A @ B, lambda: A @ B.mT, lambda: A.mT @ A)
    fastest = min(statistics.median([seconds(product, device) for _ in range(6)][1:]) for product in products)
    return 2e-9 * batch * m * n * n / fastest


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also aligned as plain text; all but the first column to the right."""
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if k == 0 else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join((first, *rest)) + " |"

    rule = (
        "|" + "|".join("-" * (w + 2) if k == 0 else "-" * (w + 1) + ":" for k, w in enumerate(widths)) + "|"
    )
    return "\n".join((line(header), rule, *(line(row) for row in rows)))


def heading(name: str, device: torch.device) -> dict[str, Any]:
    """What every result begins with."""
    return {
        "benchmark": name,
        "command": shlex.join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_digest()[:12],
        "machine": describe(device),
    }


def write(options: argparse.Namespace, device: torch.device, result: dict[str, Any], text: str) -> Path:
    """A .json and a .md in `options.out`, named after the benchmark, the device and `options.quick`; returns
    their path without the ending. Strict JSON: a NaN is an error."""
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"{result['benchmark']}-{slug(device)}" + ("-quick" if options.quick else "")
    path: Path = options.out / stem
    path.with_name(f"{stem}.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    path.with_name(f"{stem}.md").write_text(text + "\n")
    return path


def publish(options: argparse.Namespace, device: torch.device, result: dict[str, Any], text: str) -> None:
    """`write`, and print the text and where it is."""
    path = write(options, device, result, text)
    print(text)
    progress(f"written to {path}.md and .json")


def introduction(result: dict[str, Any]) -> str:
    """The heading as Markdown."""
    facts = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    run = f"`{result['command']}`, {result['date']}, code {result['code']}"
    return f"# {result['benchmark']}\n\n{run}\n\n{facts}"


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
