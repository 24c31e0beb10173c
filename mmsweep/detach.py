"""`mmsweep launch GRID --address http://127.0.0.1:8265 --detach`: the head of a cluster launches the grid.

By Ray's job API, there or through a tunnel: the grid's file is all that is sent. The head reads the store and
the data, so both must be where the cluster reaches them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mmsweep.cluster import ENVIRONMENT, is_loopback, jobs_status, wants_token
from mmsweep.grid import Grid, load_grid
from mmsweep.store import open_store
from trainers.config import DataConfig
from trainers.errors import InputError
from trainers.provenance import CHECKOUT, checkout

PORT = 8265
"""Of Ray's dashboard, which takes the jobs."""


def submit(path: Path, store: str | None, address: str | None) -> list[str]:
    """Have the grid launched by the cluster whose dashboard is at `address`; returns what to tell the user.

    Raises:
        InputError: a grid with mistakes, a store or data that only this machine has, an address that is not
            the URL of a dashboard or takes jobs from anybody, or the same launch is on its way already.
    """
    grid = load_grid(path, identify=_on_the_cluster)
    url = _reachable(store, grid)
    _check_data(grid)
    head = _dashboard(address)
    _check_closed(head)
    identity = submission_id(grid, url)
    with _quiet_client(head) as client:
        _check_free(client, identity, grid, url, head)
        with tempfile.TemporaryDirectory(prefix="mmsweep-detach-") as folder:
            file = f"{grid.name}.yaml"  # a grid without a name is called as its file
            shutil.copy(path, Path(folder) / file)
            entrypoint = ["python", "-m", "mmsweep.launch", file, "--address", "auto", "--store", url]
            client.submit_job(
                entrypoint=shlex.join(entrypoint),
                submission_id=identity,
                runtime_env={"working_dir": folder, "env_vars": {CHECKOUT: json.dumps(checkout())}},
            )
    return [
        f"{grid.name}: {len(grid.runs)} runs, launched by {head} as {identity}",
        *_how_to(grid, url, head),
    ]


def submission_id(grid: Grid, store: str) -> str:
    """`paper-0123abcd`: the same for the same runs into the same store."""
    what = json.dumps([sorted(grid.runs), store])
    return f"{grid.name}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"


def _how_to(grid: Grid, store: str, head: str) -> list[str]:
    logs = ["ray", "job", "logs", "--address", head, "--follow", submission_id(grid, store)]
    return [
        "  watch  " + shlex.join(["python", "-m", "mmsweep.status", store, "--grid", grid.name, "--watch"]),
        "  stop   " + shlex.join(["python", "-m", "mmsweep.stop", store, grid.name]),
        "  logs   " + shlex.join(logs),
    ]


# --- what can be sent ----------------------------------------------------------------------------


def _on_the_cluster(data: DataConfig) -> str:
    """In place of the digest of the tokens, which are looked at where they are."""
    return "sha256:" + hashlib.sha256(data.model_dump_json().encode()).hexdigest()


def _reachable(given: str | None, grid: Grid) -> str:
    url = grid.store if given is None else given
    open_store(url)  # its form
    if url.startswith(("s3://", "/", "file:///")):
        return url
    raise InputError(
        f'store "{url}" would be a folder of whichever machine runs the launch; name one that the whole '
        "cluster reaches with --store: s3://bucket/prefix, or the absolute path of a shared folder"
    )


def _check_data(grid: Grid) -> None:
    for path in {run.data.path for run in grid.runs.values() if run.data.path is not None}:
        if not path.startswith(("/", "~")):
            raise InputError(
                f'data.path "{path}" is relative to this folder, which the cluster does not have; '
                "write the absolute path that its machines know"
            )


def _dashboard(address: str | None) -> str:
    """The URL of a dashboard.

    Raises:
        InputError: it is none, or a token sent there could be read on the way.
    """
    example = f"as in http://127.0.0.1:{PORT} at the end of `ray dashboard`'s tunnel"
    if address is None:
        raise InputError(f"--detach wants the --address of the cluster's dashboard, {example}")
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port  # of the port only whether it is one
    except ValueError:
        raise InputError(f"--address {address}: not a URL; name the dashboard, {example}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"--address {address}: with --detach name the cluster's dashboard, {example}")
    if parts.scheme == "http" and not is_loopback(host):
        raise InputError(
            f"--address {address}: without https the token can be read on the way; open a tunnel, {example}"
        )
    return address.rstrip("/")


def _check_closed(head: str) -> None:
    """Raises InputError: nobody answers, just anybody may send jobs there, or we are to bring no token."""
    try:
        status = jobs_status(head)
    except OSError as error:
        raise InputError(f"{head}: {error}; see that the cluster is up, and the tunnel open") from None
    if status not in (401, 403):
        raise InputError(
            f"refusing {head}: without a token it answers HTTP {status}, not 401: it runs code for anyone, "
            "or is no dashboard; start every node with RAY_AUTH_MODE=token"
        )
    if os.environ.get("RAY_AUTH_MODE") != "token":
        raise InputError(wants_token(head))


# --- Ray's job API -------------------------------------------------------------------------------


@contextmanager
def _quiet_client(head: str) -> Iterator[Any]:
    """A client whose failures are one line. Raises InputError."""
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    from ray.job_submission import JobSubmissionClient

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Ray's client sets the levels of its own loggers
    try:
        yield JobSubmissionClient(head)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{head}: {_first_line(error)}") from None
    finally:
        logging.disable(before)


def _check_free(client: Any, identity: str, grid: Grid, store: str, head: str) -> None:
    """Ray keeps the name of a job that has ended; it is forgotten, so that it can be submitted again."""
    known = {job.submission_id: job for job in client.list_jobs()}
    if identity not in known:
        return
    if not known[identity].status.is_terminal():
        lines = [f"{grid.name} is being launched by {head} as {identity}; nothing submitted"]
        raise InputError("\n".join([*lines, *_how_to(grid, store, head)]))
    client.delete_job(identity)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
