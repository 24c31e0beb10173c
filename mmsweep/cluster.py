"""Connecting to Ray: an address that was given, or a Ray of our own on this machine."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from mmsweep.placement import Node
from trainers.errors import InputError

# Ray's own defaults are for notebooks: these keep it quiet, keep our working directory, let an
# autoscaler see the whole grid, and give training the priority of any other process. They count only
# if set before ray is imported.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # tracebacks of Ray's own, also where a retry follows
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1e9",  # `mmsweep.placement` says it better
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S_AUTOSCALER": "1e9",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_worker_niceness": "0",
}
_OBJECT_STORE_BYTES = 128 * 2**20
"""Trials exchange a few kilobytes; Ray's default would take a third of the memory."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the whole cluster has."""

    cpus: float
    gpus: float
    nodes: int


@contextmanager
def connect(address: str | None) -> Iterator[Capacity]:
    """A Ray connection for the length of the block.

    Args:
        address: None starts a Ray on this machine that ends with the block (Ray would join
            whatever cluster was left over); "auto" joins the cluster this machine belongs to;
            "host:port" or "ray://…" one that is named.

    Raises:
        InputError: no cluster at the address, or one that takes jobs from anybody.
    """
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    if address is not None:
        check_authentication(address)
        _check_listening(address)
    import ray

    # What Ray prints of a node that dies is twenty lines of counters, also with log_to_driver=False.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    local = {
        "num_cpus": usable_cpus(),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            **(local if address is None else {}),
        )
    except Exception as error:  # Ray's own are of many kinds, a plain Exception among them
        reason = (str(error).splitlines() or [""])[0]
        if address is None:
            raise InputError(f"Ray does not start on this machine: {reason}") from None
        raise InputError(
            f"no Ray cluster at {address!r}: {reason}; "
            "start one with `ray up`, or leave --address out to use this machine"
        ) from None
    try:
        total = ray.cluster_resources()
        nodes = sum(1 for node in ray.nodes() if node["Alive"])
        yield Capacity(total.get("CPU", 0.0), total.get("GPU", 0.0), nodes)
    finally:
        ray.shutdown()


def nodes() -> list[Node]:
    """The machines of the connected cluster that are alive."""
    import ray
    from ray._private.state import available_resources_per_node  # the public one needs the dashboard

    free = available_resources_per_node()
    return [
        Node(node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def to_come() -> list[Mapping[str, float]]:
    """What the further machines would have that the cluster's autoscaler may start; none without one."""
    from ray._private.state import state

    config = state.get_cluster_config()
    groups = config.node_group_configs if config is not None else ()
    # A count of -1 is no limit; no run of ours spans more than this many.
    return [dict(g.resources) for g in groups for _ in range(g.max_count if 0 <= g.max_count < 64 else 64)]


def check_authentication(address: str) -> None:
    """Refuse an address other machines can reach unless Ray asks for a token there.

    Raises:
        InputError: the address is not loopback and RAY_AUTH_MODE is not "token".
    """
    if os.environ.get("RAY_AUTH_MODE") == "token" or _is_loopback(address):
        return
    raise InputError(
        f"refusing {address!r}: a Ray cluster without authentication runs code for anyone who reaches it; "
        "set RAY_AUTH_MODE=token on every node and here"
    )


def _check_listening(address: str) -> None:
    """Ray keeps trying for minutes where nobody answers. Raises InputError."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return  # "auto": Ray knows where to look
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"nothing answers at {address!r}: {error}; start a cluster with `ray up`") from None


def _is_loopback(address: str) -> bool:
    if address == "local":
        return True
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "127.0.0.1")
    host = address.removeprefix("ray://").rsplit(":", 1)[0].strip("[]")
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(a).is_loopback for a in found)


def usable_cpus() -> int:
    """CPUs this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
