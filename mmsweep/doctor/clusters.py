"""Checks of a Ray cluster: who may use it, and whether every node of it is fit."""

from __future__ import annotations

import os
import platform
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from mmsweep.cluster import asks_for_token, connect, host_of, is_loopback, jobs_status
from mmsweep.doctor.findings import PROBES, Finding, Findings, count, guarded
from mmsweep.doctor.machine import check_devices, check_disks, installed, last_line
from mmsweep.doctor.stores import check_store
from mmsweep.objects import NotFound, ObjectStore, StoreError
from mmsweep.store import open_store
from trainers.errors import InputError

NODES_TIMEOUT_S = 300.0
"""For all nodes together: each starts torch, and one that cannot reach the store tries for a while."""


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
            what = f"{count(capacity.nodes, 'node')}, {capacity.cpus:g} CPUs, {capacity.gpus:g} GPUs"
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
    here_alone = is_loopback(host_of(head))
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
    here_alone = safe and is_loopback(host_of(url))
    return Finding("warning" if here_alone else "problem", "cluster", what, TOKENS)


def _nodes(objects: ObjectStore | None) -> Findings:
    """What every node says of itself: versions, devices, disks, and the store that was opened here."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    deadline = time.monotonic() + NODES_TIMEOUT_S
    with marked(objects) as mark:
        asked = []
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, scheduling_strategy=there)(examine)
            asked.append(task.remote(mark, node["Resources"].get("GPU", 0.0)))
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
                what = f"{name} does not run mmsweep: {last_line(str(error))}"
                fix = "install the same mmsweep there; see cluster/README.md"
                yield Finding("problem", "cluster", what, fix)
                continue
            bad = list(_of_node(name, *found))
            yield from bad
            sound += not bad
    if sound == len(nodes):
        versions = ", ".join(f"{package} {version}" for package, version in facts().items())
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


def examine(mark: Mark | None, gpus: float = 0.0) -> tuple[dict[str, str], list[Finding]]:
    """In a task on a node of a cluster, where Ray has `gpus`: its versions, and what the checks find."""
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides the GPUs from a task that asks for none
    checks: list[tuple[str, Callable[[], Findings]]] = [
        ("devices", lambda: check_devices(gpus)),
        ("disk", check_disks),
    ]
    if mark is not None:
        checks.append(("store", lambda: _from_here(mark)))
    return facts(), [finding for subject, check in checks for finding in guarded(subject, check)]


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
    packages = {name: installed(name) or "none" for name in ("mmsweep", "ray", "torch", "numpy")}
    return {"python": python, **packages}
