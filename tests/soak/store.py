"""A sweep whose store goes away four times: `python tests/soak/store.py [--outage 60] [--steps 22000]`.

Two runs are launched into an S3 server behind a proxy. While they train, the server is stopped for a
minute, answers 503 for a minute, cannot be reached for a minute, and says for half a minute that the
credentials have expired, until there are new ones. The same grid goes into a folder at the same time.

Exit status 1 if a step is lost or there twice, if the records of the two differ in anything but
clock readings, if an outage was over before training was, or if training paused in one.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "mmsweep")]

from chaos import Chaos  # noqa: E402

from mmsweep.contents import contents  # noqa: E402
from mmsweep.keep import problems_of  # noqa: E402
from mmsweep.objects import StoreError  # noqa: E402
from mmsweep.store import RunStore, open_store  # noqa: E402
from trainers import records  # noqa: E402

GRID = """
name: soak
seeds: [1]
arms:
  hetero: {attn: stiefel, mlp: dgram}
  hetero_inv: {attn: dgram, mlp: stiefel}  # of the same speed, so that both outlast the outages
base:
  data: {source: text, path: TEXTS}
  model: {n_layer: 2, n_head: 2, d_model: 32, context: 32, vocab_size: 256}
  optimizer: {muon: {lr: 0.1, solver: projected}}
  schedule: {steps: STEPS, warmup_steps: 2, batch_size: 8}
  evaluation: {every: 500, batches: 2}
  runtime: {checkpoint_every: 250, threads: 1}
resources: {cpus_per_worker: 0.5}
"""
SLACK_S = 1.0
"""What a busy machine may add to the longest pause between two steps."""


@dataclass
class Outage:
    name: str
    begun: float
    over: float
    back: float
    """When the store held news again of every run; Unix seconds, as the others."""
    faults: dict[str, int]

    def line(self) -> str:
        away, late = self.over - self.begun, self.back - self.over
        faults = ", ".join(f"{n} x {kind}" for kind, n in self.faults.items() if n) or "no answers"
        return f"{self.name:28} {away:5.0f} s away, news {late:4.1f} s later; {faults}"


def main() -> int:
    parser = argparse.ArgumentParser(description="A sweep whose store goes away four times.")
    parser.add_argument("--outage", type=float, default=60.0, help="seconds of each of the first three")
    parser.add_argument("--steps", type=int, default=22_000, help="of a run; it must outlast the outages")
    arguments = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mmsweep-soak-") as folder:
        problems = soak(Path(folder), arguments.outage, arguments.steps)
    for problem in problems:
        print(f"PROBLEM {problem}")
    print(f"{'FAILED' if problems else 'passed'} in {time.monotonic() - begun:.0f} s")
    return 1 if problems else 0


def soak(folder: Path, outage_s: float, steps: int) -> list[str]:
    grid = write_grid(folder, steps)
    credentials = folder / "credentials"
    write_credentials(credentials, "FIRST")
    os.environ |= {
        "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REGION": "us-east-1",
        "MMSWEEP_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        os.environ.pop(name, None)
    with s3_server(folder) as (server, url), Chaos(url) as chaos:
        os.environ["AWS_ENDPOINT_URL"] = chaos.url
        away, calm = open_store("s3://soak-bucket/sweeps"), open_store(str(folder / "calm"))
        away.objects.client.create_bucket(Bucket="soak-bucket")  # type: ignore[attr-defined]
        launches = [
            launch(grid, store.url, folder / f"{name}.log")
            for name, store in (("away", away), ("calm", calm))
        ]
        try:
            outages = [*strike_all(away, launches, chaos, server, credentials, outage_s)]
            begun = time.monotonic()
            codes = [one.wait(timeout=900) for one in launches]
        except (ChildProcessError, TimeoutError) as error:
            return [f"{error}:\n{(folder / 'away.log').read_text()[-2000:]}"]
        finally:
            for one in launches:
                if one.poll() is None:
                    one.send_signal(signal.SIGINT)
                    one.wait()
        print(f"both sweeps ended {time.monotonic() - begun:.0f} s after the last outage")
        output = (folder / "away.log").read_text()[-2000:]
        problems = [f"a launch ended with {code}; the end of its output:\n{output}" for code in codes if code]
        return [*problems, *compare(away, calm, steps), *pauses(away, outages)]


def strike_all(
    store: RunStore,
    launches: list[subprocess.Popen[bytes]],
    chaos: Chaos,
    server: subprocess.Popen[bytes],
    credentials: Path,
    seconds: float,
) -> Iterator[Outage]:
    """The four outages, one after the other, each printed."""

    def stopped() -> None:
        server.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        server.send_signal(signal.SIGCONT)

    def busy() -> None:
        chaos.do("answer", status=503, code="SlowDown", seconds=seconds)
        time.sleep(seconds)

    def unreachable() -> None:
        chaos.do("refuse", seconds=seconds)
        time.sleep(seconds)

    def expired() -> None:
        chaos.do("expire", key="FIRST")
        time.sleep(seconds / 2)
        write_credentials(credentials, "SECOND")

    def trains() -> bool:
        if any(one.poll() is not None for one in launches):
            raise ChildProcessError("a launch has ended already; raise --steps, or see its output")
        return len(steps_done(store)) == 2 and min(steps_done(store)) > 0

    wait_for(trains, "both runs to train")
    for name, strike in (
        ("the server is stopped", stopped),
        ("503 SlowDown", busy),
        ("the port is closed", unreachable),
        ("expired credentials, renewed", expired),
    ):
        before, begun = chaos.counts(), time.time()
        strike()
        over = time.time()
        wait_for(lambda over=over: fresh(store, over), f"news after: {name}")
        counts = {kind: n - before.get(kind, 0) for kind, n in chaos.counts().items()}
        outage = Outage(name, begun, over, time.time(), counts)
        print(outage.line() + f"; steps {steps_done(store)}", flush=True)
        yield outage
        time.sleep(8)  # calm, to compare with


def fresh(store: RunStore, since: float) -> bool:
    """Whether the store holds news of every run from after `since`, or its result."""
    states = ((store.summary(run_id), store.status(run_id) or {}) for run_id in store.run_ids())
    return all(summary or (status.get("updated") or 0) > since for summary, status in states)


def steps_done(store: RunStore) -> list[int]:
    return [(store.status(run_id) or {}).get("step", 0) for run_id in store.run_ids()]


def compare(away: RunStore, calm: RunStore, steps: int) -> Iterator[str]:
    """The same records in both stores, every step once, and nothing damaged."""
    if sorted(away.run_ids()) != sorted(calm.run_ids()):
        yield "the stores hold different runs"
        return
    rows = 0
    for run_id in away.run_ids():
        if away.table(run_id, "steps")["step"].to_pylist() != list(range(1, steps + 1)):
            yield f"{run_id}: not every step is there once"
        for kind, record_type in records.RECORD_TYPES.items():
            exact = [*record_type.key, *record_type.exact]
            tables = [store.table(run_id, kind).select(exact) for store in (away, calm)]
            rows += tables[0].num_rows
            if repr(tables[0].to_pylist()) != repr(tables[1].to_pylist()):
                yield f"{run_id}: {kind} differ from those of the undisturbed sweep"
        yield from away.conflicts(run_id)
        if (attempts := (away.summary(run_id) or {}).get("attempts")) != 1:
            yield f"{run_id}: {attempts} attempts"
    yield from problems_of(away, contents(away))
    print(f"{len(away.run_ids())} runs, {rows} rows compared with those of the undisturbed sweep")


def pauses(store: RunStore, outages: list[Outage]) -> Iterator[str]:
    """Time between two steps, in the outages and outside."""
    inside: list[float] = []
    outside: list[float] = []
    for run_id in store.run_ids():
        times = store.table(run_id, "steps")["time"].to_pylist()
        if times[-1] < outages[-1].over:
            yield f"{run_id}: was over before the outages; raise --steps"
        for before, after in itertools.pairwise(times):
            away = any(before < one.over and after > one.begun for one in outages)
            (inside if away else outside).append(after - before)
    for name, gaps in (("in outages", inside), ("outside", outside)):
        cuts = statistics.quantiles(gaps, n=1000)
        print(
            f"seconds between steps {name:10}: median {statistics.median(gaps):.4f}, "
            f"99% {cuts[989]:.4f}, 99.9% {cuts[998]:.4f}, longest {max(gaps):.2f} ({len(gaps)} steps)"
        )
    if max(inside) > max(outside) + SLACK_S:
        yield f"training paused for {max(inside):.1f} s in an outage, at most {max(outside):.1f} s outside"


def write_grid(folder: Path, steps: int) -> Path:
    texts = folder / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(f"line {number} of a small corpus\n" * 40)
    path = folder / "soak.yaml"
    path.write_text(GRID.replace("TEXTS", f"{texts}/*.txt").replace("STEPS", str(steps)))
    return path


def write_credentials(path: Path, key: str) -> None:
    lines = ("[default]", f"aws_access_key_id={key}", "aws_secret_access_key=x", "aws_session_token=y")
    temporary = path.with_suffix(".new")
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(path)


def launch(grid: Path, store: str, output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        command = [sys.executable, "-m", "mmsweep.launch", str(grid), "--store", store]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=grid.parent)


@contextmanager
def s3_server(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "server.log").open("wb") as file:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: _listens(port), "the S3 server")
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except StoreError:
            pass  # it is what this is about
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
