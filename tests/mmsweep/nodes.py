"""A Ray cluster on this machine, whose nodes come and go; and sweeps on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny import processes

from mmsweep.cluster import ENVIRONMENT
from mmsweep.store import RunStore

GRID = """
name: nodes
resources: RESOURCES
seeds: SEEDS
arms:
  hetero: {attn: stiefel, mlp: dgram}
  plain: {attn: none, mlp: none}
base:
  data: {source: text, path: TEXTS}
  model: {n_layer: 1, n_head: 2, d_model: 16, context: 16, vocab_size: 256}
  optimizer: {muon: {lr: 0.1, solver: projected}}
  schedule: {steps: STEPS, warmup_steps: 2, batch_size: 8}
  evaluation: {every: STEPS, batches: 1}
  runtime: {device: cpu, threads: 1, checkpoint_every: EVERY, part_seconds: 1}
"""
MEMORY = 80 * 2**20
"""Of each node's object store, the least that Ray takes."""


class Nodes:
    """A head without CPUs, and the nodes that are added. Launches reach it at `address`."""

    def __init__(self) -> None:
        os.environ.update(ENVIRONMENT)
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": MEMORY}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = f"127.0.0.1:{self.cluster.address.rpartition(':')[2]}"
        self.members: list[Any] = []

    def add(self, *, cpus: float = 2, gpus: int = 0) -> None:
        self.members.append(
            self.cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=MEMORY, wait=False)
        )

    def remove(self, index: int = 0) -> None:
        """As a machine does that loses its power, as far as one process can: Ray's part of it is killed."""
        self.cluster.remove_node(self.members.pop(index), allow_graceful=False)

    def stop(self) -> None:
        self.cluster.shutdown()


@contextmanager
def running_nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.stop()


def write_grid(path: Path, texts: str, *, resources: str, seeds: list[int], steps: int, every: int) -> Path:
    values = {"RESOURCES": resources, "SEEDS": seeds, "STEPS": steps, "EVERY": every, "TEXTS": texts}
    text = GRID
    for name, value in values.items():
        text = text.replace(name, str(value))
    path.write_text(text)
    return path


def launch(grid: Path, store: Path, log: Path, address: str | None = None) -> subprocess.Popen[str]:
    """A launch under way, which prints to `log`."""
    command = [sys.executable, "-m", "mmsweep.launch", str(grid), "--store", str(store)]
    command += ["--address", address] if address else []
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True, cwd=grid.parent)


def left_over() -> list[str]:
    """Command lines of agents, followers and workers that still run."""
    modules = ("mmsweep.agent", "mmsweep.follower", "trainers.train")
    return [" ".join(one.cmdline()[:6]) for module in modules for one in processes(module)]


def losses(store: RunStore, steps: int) -> dict[str, list[float]]:
    """Losses by run; every step is there once, in order, and no two attempts differ in one."""
    found = {}
    for run_id in store.run_ids():
        table = store.table(run_id, "steps").to_pydict()
        assert table["step"] == list(range(1, steps + 1)), run_id
        assert store.conflicts(run_id) == [], run_id
        found[run_id] = table["loss"]
    return found
