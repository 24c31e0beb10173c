"""Time of one `mmsweep status` over many runs on an S3 server.

The store is that of a sweep near its end: most runs are finished, some train, the others wait, and each has
the objects that such a run leaves. The server is a `moto_server` process on this machine, which shares its
cores with the command. Time is that of the whole process, from start to end.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import RESULTS, heading, introduction, prepare, progress, publish, table

from mmsweep.store import RunStore, open_store
from trainers.records import KINDS, dumps

RUNNING, WAITING = 0.02, 0.08
"""Shares of the runs that train and that have not begun."""


def main() -> None:
    options = _parser().parse_args()
    device = prepare("cpu", 1)
    runs = 30 if options.quick else options.runs
    with _server() as url:
        store = open_store(url)
        progress(f"writing {runs} runs")
        objects = _fill(store, runs)
        progress("timing")
        times = [_status(url) for _ in range(1 if options.quick else options.repeats)]
    result = heading("status", device) | {
        "runs": runs,
        "objects": objects,
        "seconds": times,
        "median_s": statistics.median(times),
    }
    rows = [
        (f"{runs:,}", f"{objects:,}", f"{result['median_s']:.2f}", f"{min(times):.2f}", f"{max(times):.2f}")
    ]
    text = table(("runs", "objects", "median s", "min s", "max s"), rows)
    publish(options, device, result, f"{introduction(result)}\n\n{text}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="30 runs, once: a smoke test")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


@contextmanager
def _server() -> Iterator[str]:
    """URL of an empty bucket on a server of our own; the AWS_* variables name it for good."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing")
    os.environ.update(keys, AWS_REGION="us-east-1", AWS_ENDPOINT_URL=endpoint)
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _create_bucket(endpoint)
            yield "s3://bucket/sweeps"
        finally:
            server.kill()
            server.wait()


def _create_bucket(endpoint: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(
                urllib.request.Request(f"{endpoint}/bucket", method="PUT"), timeout=5
            ).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _fill(store: RunStore, runs: int) -> int:
    """Write the sweep; returns the number of objects."""
    ids = [f"arm{number % 5}-s{number}-{number:08x}" for number in range(runs)]
    cells = [{"run_id": run_id, "arm": run_id[:4], "seed": n, "axes": {}} for n, run_id in enumerate(ids)]
    store.put_grid("big", "name: big\n", {"name": "big", "cells": cells})
    training, begun = int(runs * RUNNING), int(runs * (1 - WAITING))
    with ThreadPoolExecutor(8) as pool:
        finished = pool.map(lambda run_id: _finished(store, run_id), ids[training:begun])
        working = pool.map(lambda run_id: _training(store, run_id), ids[:training])
        return 2 + sum(finished) + sum(working)


def _status_of(step: int) -> dict[str, Any]:
    now = time.time()
    facts = {
        "attempt": 1,
        "train_loss": 3.1,
        "val_loss": 3.2,
        "tokens_per_s": 1e5,
        "reason": "",
        "host": "n1",
    }
    return {"status": "running", "step": step, "steps": 9000, "updated": now, "progressed": now, **facts}


def _finished(store: RunStore, run_id: str) -> int:
    store.put_config(run_id, {"config": {"model": "x" * 2000}})
    store.put_status(run_id, {**_status_of(9000), "status": "completed"})
    names = [f"{kind}.parquet" for kind in KINDS]
    names += [
        f"checkpoints/{step:08d}/{file}" for step in (8000, 9000) for file in ("manifest.json", "model")
    ]
    for name in names:
        store.objects.put(f"runs/{run_id}/{name}", b"x" * 100)
    ends = {"status": "completed", "steps": 9000, "horizon": 9000, "final_val_loss": 3.0}
    store.put_summary(run_id, {**ends, "attempts": 1, "started": 1.7e9, "finished": 1.7e9 + 5000})
    return len(names) + 3


def _training(store: RunStore, run_id: str) -> int:
    """A run under way, whose worker holds its lease for as long as this process lives."""
    store.put_status(run_id, _status_of(4000))
    lease = store.run_lease(run_id, "big-1")
    while not lease.advance():
        time.sleep(0.05)
    _LEASES.append(lease)
    for number in range(40):
        part = dumps({"kind": "steps", "step": number})
        store.objects.put(f"runs/{run_id}/attempt-001/steps-{number:06d}.jsonl", part.encode())
    return 42


_LEASES: list[Any] = []


def _status(url: str) -> float:
    """Seconds of the command."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "mmsweep.status", url]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
