"""A launch is killed again and again, at seeded moments of its life, and launched anew until it is done.

The tables of its store must then be those of a sweep that nothing happened to: every CSV of the report that
holds no times, byte for byte, and all columns of all records that are no wall-clock time.

    python tests/soak/driver.py [--kills 20] [--seed 0]

Prints what it did; exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from mmsweep.store import RunStore, open_store  # noqa: E402
from trainers.records import FINISHED, KINDS  # noqa: E402

GRID = """
name: tiny
seeds: [1]
arms:
  hetero: {attn: stiefel, mlp: dgram}
  plain: {attn: none, mlp: none}
  all_dgram: {attn: dgram, mlp: dgram}
base:
  data: {source: text, path: TEXTS}
  model: {n_layer: 1, n_head: 2, d_model: 16, context: 16, vocab_size: 256}
  optimizer: {muon: {lr: 0.1, solver: projected}}
  schedule: {steps: STEPS, warmup_steps: 2, batch_size: 8}
  evaluation: {every: 200, batches: 2}
  runtime: {checkpoint_every: 100, threads: 1}
resources: {max_concurrent: 2, cpus_per_worker: 0.5}
"""
WALL_CLOCK = {"attempt", "time", "tokens_per_s", "flop_utilisation", "peak_memory"}
"""Columns that differ between any two runs; so do those that end in _ms."""
PATIENCE_S = 900.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mmsweep-soak-"))
    os.environ |= {"MMSWEEP_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; seed {options.seed}")
    try:
        soak = Soak(folder, options.steps, random.Random(options.seed))
        differences = soak.run(options.kills)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if differences else 0


class Soak:
    """Sweeps of one grid, each into a store of its own, killed as often as it takes to come to an end."""

    def __init__(self, folder: Path, steps: int, chance: random.Random) -> None:
        self.folder = folder
        self.chance = chance
        self.counts: Counter[str] = Counter()
        texts = folder / "texts"
        texts.mkdir()
        for number in range(20):
            (texts / f"{number}.txt").write_text(f"line {number} of a small corpus\n" * 40)
        self.grid = folder / "tiny.yaml"
        self.grid.write_text(GRID.replace("TEXTS", f"{texts}/*.txt").replace("STEPS", str(steps)))

    def run(self, kills: int) -> list[str]:
        """Differences from the undisturbed sweep, a line each."""
        begun = time.monotonic()
        expected = self.folder / "undisturbed"
        if code := self.launch(expected).wait(PATIENCE_S):
            return [f"the undisturbed launch ended with {code}"]
        life = time.monotonic() - begun
        print(f"undisturbed: {life:.0f} s")
        wanted, differences, sweeps = contents(expected, self.folder), [], 0
        while sum(self.counts.values()) < kills:
            sweeps += 1
            store = self.folder / f"sweep-{sweeps}"
            self.disturb(store, kills, life)
            found = contents(store, self.folder)
            differences += [f"sweep {sweeps}: {line}" for line in different(wanted, found)]
        left = processes(self.folder)
        differences += [f"left over: {process}" for process in left]
        print(
            f"{sum(self.counts.values())} kills in {sweeps} sweeps, {time.monotonic() - begun:.0f} s: "
            + ", ".join(f"{count} {where}" for where, count in sorted(self.counts.items()))
        )
        print("\n".join(differences) or f"no difference in {len(wanted)} tables of each sweep")
        return differences

    def disturb(self, where: Path, kills: int, life: float) -> None:
        """Launch and kill until a launch has come to its end, or there have been enough kills."""
        store = open_store(str(where))
        while True:
            process = self.launch(where)
            left = kills - sum(self.counts.values())
            if left > 0:
                self.kill(process, store, life)
            if process.wait(PATIENCE_S) == 0:
                return
            if process.returncode != -signal.SIGKILL:
                raise RuntimeError(f"a launch ended with {process.returncode}")

    def kill(self, process: subprocess.Popen[bytes], store: RunStore, life: float) -> None:
        """SIGKILL at a moment of one of three kinds, unless the launch has ended by then."""
        kind = self.chance.choice(["in its first second", "on its way", "while a run ends"])
        if kind == "in its first second":
            moment = self.chance.uniform(0, 1)
        elif kind == "on its way":
            moment = self.chance.uniform(1, life)
        else:  # one more run says that it has ended; its summary is written soon after
            before, moment = ended(store), self.chance.uniform(0, 1.5)
            wait_for(lambda: ended(store) > before or process.poll() is not None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        if process.poll() is None:
            process.kill()
            self.counts[kind] += 1
            print(f"  killed {kind}, {ended(store)} of 3 runs had ended", flush=True)

    def launch(self, store: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mmsweep.launch", str(self.grid), "--store", str(store)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=self.folder)


def ended(store: RunStore) -> int:
    """Runs that say that they have ended."""
    return sum((store.status(run_id) or {}).get("status") in FINISHED for run_id in store.run_ids())


def contents(where: Path, folder: Path) -> dict[str, str]:
    """Digests of a store's tables, by name: the report's, and of every run's records what is no time."""
    store = open_store(str(where))
    report = folder / f"{where.name}-report"
    subprocess.run(
        [sys.executable, "-m", "mmsweep.report", str(where), "--out", str(report)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    tables = [path for path in (report / "tables").glob("t*.csv") if path.stem != "t2"]  # T2: what runs cost
    found = {path.name: path.read_bytes() for path in tables}
    for run_id in store.run_ids():
        found[f"{run_id}: conflicts"] = "\n".join(store.conflicts(run_id)).encode()
        for kind in KINDS:
            table = store.table(run_id, kind)
            columns = [name for name in table.column_names if not is_time(name)]
            found[f"{run_id}: {kind}"] = repr(table.select(columns).to_pydict()).encode()
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def is_time(column: str) -> bool:
    return column in WALL_CLOCK or column.endswith("_ms")


def different(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    names = sorted({*wanted, *found})
    return [f"{name} differs" for name in names if wanted.get(name) != found.get(name)]


def processes(folder: Path) -> list[str]:
    """Agents and workers of these sweeps that are still there a while after their launch."""
    deadline = time.monotonic() + 60
    while True:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                ours = process.environ().get("MMSWEEP_CACHE") == str(folder / "cache")
                if (
                    ours
                    and process.pid != os.getpid()
                    and ("mmsweep.agent" in line or "trainers.train" in line)
                ):
                    found.append(f"{process.pid} {line}")
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(1)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_S:.0f} s")
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
