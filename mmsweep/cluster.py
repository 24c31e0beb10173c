"""Connecting to Ray: an address that was given, or a Ray of our own on this machine."""

from __future__ import annotations

import http.client
import ipaddress
import os
import secrets
import socket
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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
_ANSWER_S = 5.0
_GCS_QUESTION = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""What Ray's own nodes ask the head first."""


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
        address: None or "local" starts a Ray on this machine that ends with the block (Ray would join
            whatever cluster was left over); "auto" joins the cluster this machine belongs to;
            "host:port" one that is named.

    Raises:
        InputError: no cluster at the address, or one that takes jobs from anybody.
    """
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    address = _found(address)
    if address is None:
        _keep_others_out()
    else:
        check_authentication(address)
        _check_listening(address)
        _check_token(address)
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


def usable_cpus() -> int:
    """CPUs this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- who is let in -------------------------------------------------------------------------------


def _found(address: str | None) -> str | None:
    """host:port of the cluster that Ray would join; None: a Ray of our own.

    Raises:
        InputError: this machine belongs to no cluster, or the address is a URL.
    """
    if address == "auto":
        from ray._private.services import get_ray_address_from_environment

        try:
            address = str(get_ray_address_from_environment("auto", None))
        except ConnectionError:
            raise InputError(
                "--address auto: this machine belongs to no Ray cluster; "
                "start one with `ray up`, or leave --address out to use this machine"
            ) from None
    if address is not None and "://" in address:
        raise InputError(
            f"{address}: name the cluster as host:port, on one of its machines; "
            "from elsewhere launch with --detach and the http:// address of its dashboard"
        )
    return None if address == "local" else address


def _keep_others_out() -> None:
    """Have the Ray that starts here, which listens to the whole network, ask for a token.

    Ray would make the token itself, in a file that everybody on this machine may read.

    Raises:
        InputError: the file cannot be made, or closed to others.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")  # what Ray has read of the environment, if it is loaded already
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # for its owner alone
                file.write(secrets.token_hex(32))
                file.flush()
                with suppress(FileExistsError):  # another launch was faster
                    os.link(file.name, path)
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: {reason}; name a file with a token in RAY_AUTH_TOKEN_PATH") from None


def check_authentication(address: str) -> None:
    """Refuse an address other machines can reach unless we are to bring a token.

    Raises:
        InputError: the address is not loopback and RAY_AUTH_MODE is not "token".
    """
    if os.environ.get("RAY_AUTH_MODE") == "token" or is_loopback(host_of(address)):
        return
    raise InputError(
        f"refusing {address!r}: a Ray cluster without authentication runs code for anyone who reaches it; "
        "set RAY_AUTH_MODE=token on every node and here"
    )


def _check_listening(address: str) -> None:
    """Ray keeps trying for minutes where nobody answers. Raises InputError."""
    _, separator, port = address.rpartition(":")
    if not separator or not port.isdigit():
        return  # Ray says what is wrong with it
    try:
        socket.create_connection((host_of(address), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"nothing answers at {address!r}: {error}; start a cluster with `ray up`") from None


def _check_token(address: str) -> None:
    """Compare what the cluster wants with what we are to bring.

    Raises:
        InputError: it lets in anybody from other machines, or wants a token and RAY_AUTH_MODE says none.
    """
    asks = asks_for_token(address)
    if asks is False and not is_loopback(host_of(address)):
        raise InputError(
            f"refusing {address!r}: it asks for no token and runs code for anyone who reaches it; "
            "start every node with RAY_AUTH_MODE=token"
        )
    if asks and os.environ.get("RAY_AUTH_MODE") != "token":  # Ray would try for 20 seconds
        raise InputError(wants_token(address))


def wants_token(where: str) -> str:
    """What to tell who brings none."""
    return f"{where} wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN if not in ~/.ray/auth_token"


def asks_for_token(address: str) -> bool | None:
    """Whether the cluster at host:port turns away who brings no token; None: it cannot be told."""
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_GCS_QUESTION)(b"", timeout=_ANSWER_S)
        except grpc.RpcError as error:
            return True if error.code() is grpc.StatusCode.UNAUTHENTICATED else None
    return False


def jobs_status(dashboard: str) -> int:
    """HTTP status of a dashboard's jobs API for who brings no token: 401 or 403 of a closed one.

    Raises:
        OSError: no answer, or none of HTTP.
    """
    try:
        with urllib.request.urlopen(f"{dashboard}/api/jobs/", timeout=2 * _ANSWER_S) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from None
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"no answer of HTTP: {error}") from None


def is_loopback(host: str) -> bool:
    """Whether a host name or IP address means this machine to this machine alone."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address).is_loopback for address in found)


def host_of(address: str) -> str:
    """Of `host:port`; an IPv6 address may be in brackets."""
    return address.rsplit(":", 1)[0].strip("[]")
