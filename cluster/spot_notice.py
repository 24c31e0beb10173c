"""Wait for the notice that this spot machine will be taken away, then tell Ray so.

    python spot_notice.py aws|gcp

Ray ships no such watcher. A drained node gets no new trial, and Tune does not count the end of the
trials on it as failures. Training goes on until the machine is gone; what it saved by then is in the
store, and the run goes on from there on another node.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
POLL_S = 5.0
"""What AWS recommends."""
DEADLINE_S = {"aws": 110, "gcp": 25}
"""The clouds give 120 and 30 seconds; a poll and Ray's own start have taken some of them."""
DRAIN_TRIES = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: the node was drained; 1: a notice came and Ray would not hear of it."""
    parser = argparse.ArgumentParser(description="Drain this Ray node when its spot machine is reclaimed.")
    parser.add_argument("cloud", choices=sorted(METADATA))
    parser.add_argument("--metadata", help="another address of the metadata service")
    parser.add_argument("--poll", type=float, default=POLL_S, help="seconds between two looks")
    arguments = parser.parse_args(argv)
    server = arguments.metadata or METADATA[arguments.cloud]
    while not noticed(arguments.cloud, server):
        time.sleep(arguments.poll)
    print("notice: this machine will be taken away", flush=True)
    for _ in range(DRAIN_TRIES):
        found = nodes()
        accepted = [drain(address, node, DEADLINE_S[arguments.cloud]) for address, node in found]
        if found and all(accepted):
            return 0
        time.sleep(arguments.poll)
    return 1


def noticed(cloud: str, server: str) -> bool:
    """Whether the metadata service has a notice. No answer is no notice."""
    try:
        if cloud == "gcp":
            headers = {"Metadata-Flavor": "Google"}
            return _ask("GET", f"{server}/computeMetadata/v1/instance/preempted", headers) == "TRUE"
        token = _ask("PUT", f"{server}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        headers = {"X-aws-ec2-metadata-token": token}
        _ask("GET", f"{server}/latest/meta-data/spot/instance-action", headers)  # 404 until there is one
    except urllib.error.HTTPError as error:
        if error.code != 404:
            print(f"{server}: {error}", file=sys.stderr, flush=True)
        return False
    except OSError as error:
        print(f"{server}: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _ask(method: str, url: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(url, method=method, headers=headers)  # noqa: S310 (http, as above)
    with urllib.request.urlopen(request, timeout=2) as answer:  # noqa: S310
        return str(answer.read().decode()).strip()


def nodes() -> list[tuple[str, str]]:
    """Address of the cluster and id of the node, for every Ray node on this machine.

    The raylets' command lines tell. Left to itself, `ray drain-node` looks for a cluster and asks a
    driver of its own where it is; with no answer it starts another Ray here, and drains that.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            program, *options = path.read_bytes().decode(errors="replace").split("\0")
            if program.endswith("/raylet"):
                told = dict(option.partition("=")[::2] for option in options)
                found.append((told["--gcs-address"], told["--node_id"]))
    return found


def drain(address: str, node: str, deadline_s: int) -> bool:
    """Whether Ray has accepted that a node goes away in `deadline_s` seconds."""
    command = [
        *("ray", "drain-node", "--address", address, "--node-id", node),
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot machine reclaimed"),
        *("--deadline-remaining-seconds", str(deadline_s)),
    ]
    return subprocess.run(command, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
