"""A sweep on a cluster whose nodes are killed and replaced, against the same sweep undisturbed.

    python tests/soak/cluster.py [--seeds 20] [--removals 12] [--seed 1] [--nodes 1]

Two arms by so many seeds, two workers a run, three nodes with two CPUs each, all on this machine.
Prints what was done and exits with 1 on any difference: a run that is not complete, a step that is
missing or there twice, a loss that differs by a bit from the undisturbed run's, a process left over.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "mmsweep"))

from nodes import Nodes, launch, left_over, losses, running_nodes, write_grid
from tiny import wait_for, write_texts

from mmsweep.store import RunStore, open_store
from trainers import records

STEPS, EVERY = 150, 15
NODES = 3
UNDISTURBED_SEEDS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--removals", type=int, default=12, help="at the least; more while the sweep goes on")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of chaos")
    parser.add_argument("--nodes", type=int, default=1, help="machines a run (1 or 2)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmsweep-soak-") as folder:
        where = Path(folder)
        os.environ["MMSWEEP_CACHE"] = str(where / "cache")
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
        return _soak(where, arguments)


def _soak(where: Path, arguments: argparse.Namespace) -> int:
    print(f"{platform.node()}: {os.cpu_count()} CPUs, Python {platform.python_version()}", flush=True)
    texts = write_texts(where / "texts")
    seeds = list(range(1, arguments.seeds + 1))
    expected = _undisturbed(where, texts, seeds[:UNDISTURBED_SEEDS])
    grid = write_grid(
        where / "grid.yaml",
        texts,
        resources=f"{{workers: 2, nodes: {arguments.nodes}}}",
        seeds=seeds,
        steps=STEPS,
        every=EVERY,
    )
    log, store = where / "log", open_store(str(where / "store"))
    begun = time.monotonic()
    with running_nodes() as nodes:
        for _ in range(NODES):
            nodes.add()
        sweep = launch(grid, where / "store", log, nodes.address)
        removals = _chaos(nodes, sweep, random.Random(arguments.seed), arguments.removals)
        code = sweep.wait()
    seconds = time.monotonic() - begun
    problems = _problems(store, expected, 2 * arguments.seeds)
    if code:
        problems.append(f"the launch ended with status {code}:\n{log.read_text()[-4000:]}")
    if removals < arguments.removals:
        problems.append(f"it was over after {removals} removals; give it more seeds")
    attempts = Counter(
        store.summary(run_id)["attempts"] for run_id in store.run_ids() if store.summary(run_id)
    )
    rows = sum(store.table(run_id, "steps").num_rows for run_id in store.run_ids())
    print(
        f"{len(store.run_ids())} runs of {STEPS} steps, {removals} nodes killed and replaced "
        f"in {seconds:.0f} s\n"
        f"attempts: {', '.join(f'{n} runs took {k}' for k, n in sorted(attempts.items()))}\n"
        f"{rows} rows of steps, {len(expected)} runs compared bit for bit with undisturbed ones"
    )
    print("\n".join(problems) or "no difference, nothing lost, nothing twice, nothing left over")
    return 1 if problems else 0


def _undisturbed(where: Path, texts: str, seeds: list[int]) -> dict[str, list[float]]:
    """Losses of the first runs of the grid, from a launch on this machine alone."""
    resources = "{workers: 2, cpus_per_worker: 0.5}"
    grid = write_grid(
        where / "undisturbed.yaml", texts, resources=resources, seeds=seeds, steps=STEPS, every=EVERY
    )
    begun = time.monotonic()
    launch(grid, where / "undisturbed", where / "log").wait()  # `losses` finds out what is missing
    print(f"{2 * len(seeds)} runs undisturbed in {time.monotonic() - begun:.0f} s", flush=True)
    return losses(open_store(str(where / "undisturbed")), STEPS)


def _chaos(nodes: Nodes, sweep: subprocess.Popen[str], draw: random.Random, removals: int) -> int:
    """Kill nodes at random moments and add others, until the sweep is over. Returns how many."""
    done = 0
    while sweep.poll() is None:
        if _ends_in(sweep, draw.uniform(5, 20) if done < removals else 30):
            break
        nodes.remove(draw.randrange(len(nodes.members)))
        done += 1
        print(f"node killed ({done})", flush=True)
        _ends_in(sweep, draw.uniform(0, 6))
        nodes.add()
    return done


def _ends_in(sweep: subprocess.Popen[str], seconds: float) -> bool:
    try:
        sweep.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _problems(store: RunStore, expected: dict[str, list[float]], runs: int) -> list[str]:
    found = []
    try:
        wait_for(lambda: not left_over(), "processes to end")
    except AssertionError:
        found.append(f"left over: {left_over()}")
    completed = [run_id for run_id in store.run_ids() if (store.summary(run_id) or {}).get("status")]
    if len(completed) != runs or any(store.summary(r)["status"] != records.COMPLETED for r in completed):
        found.append(f"{len(completed)} of {runs} runs are complete")
    try:
        measured = losses(store, STEPS)
    except AssertionError as error:
        return [*found, f"steps are missing or there twice: {error}"]
    return found + [
        f"{run_id}: losses differ" for run_id in expected if measured.get(run_id) != expected[run_id]
    ]


if __name__ == "__main__":
    sys.exit(main())
