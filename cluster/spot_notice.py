"""Wait for the notice that this spot machine will be taken away, then save what trains on it and tell Ray.

    python spot_notice.py aws|gcp
    python spot_notice.py --now          without a notice, as in a Kubernetes preStop hook

Ray ships no such watcher. The agents of runs on this machine get SIGTERM: their workers save, everything
is shipped, and the runs go on elsewhere without a step lost. Then the node is drained: it gets no new
trial, and Tune does not count the end of the trials on it as failures.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
POLL_S = 5.0
"""What AWS recommends."""
DEADLINE_S = {"aws": 110, "gcp": 25}
"""The clouds give 120 and 30 seconds; a poll and Ray's own start have taken some of them."""
NOW_DEADLINE_S = 110
"""kuberay.yaml gives a pod 120 seconds to end."""
DRAIN_TRIES = 5
AGENTS = ("mmsweep.agent", "mmsweep.follower")
PROC = Path("/proc")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: the node was drained; 1: Ray would not hear of it, or no Ray is here."""
    arguments = _parser().parse_args(argv)
    cloud, proc = arguments.cloud, arguments.proc
    if arguments.now:
        deadline_s = DEADLINE_S.get(cloud, NOW_DEADLINE_S)
    else:
        deadline_s = DEADLINE_S[cloud]
        while not noticed(cloud, arguments.metadata or METADATA[cloud]):
            time.sleep(arguments.poll)
        print("notice: this machine will be taken away", flush=True)
    end = time.monotonic() + deadline_s
    asked = tell_agents(proc, told=set())
    print(f"{len(asked)} runs on this machine save their state", flush=True)
    drained = _drain_all(proc, deadline_s, arguments.poll)
    asked |= tell_agents(proc, told=asked)  # some may have begun before Ray heard of it
    while asked & agents(proc) and time.monotonic() < end:
        time.sleep(min(arguments.poll, 0.5))  # who called this with --now ends the machine on return
        asked |= tell_agents(proc, told=asked)
    if left := asked & agents(proc):
        print(f"{len(left)} runs have not ended in {deadline_s} s", file=sys.stderr, flush=True)
    return 0 if drained else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Save what trains on this spot machine when it is reclaimed."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("cloud", nargs="?", choices=sorted(METADATA))
    what.add_argument("--now", action="store_true", help="do not wait for a notice")
    parser.add_argument("--metadata", help="another address of the metadata service")
    parser.add_argument("--poll", type=float, default=POLL_S, help="seconds between two looks")
    parser.add_argument(
        "--proc", type=Path, default=PROC, help="a folder that shows fewer processes than /proc"
    )
    return parser


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


def _processes(proc: Path) -> Iterator[tuple[int, list[str]]]:
    """Id and command line of every process."""
    for path in proc.glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            yield int(path.parent.name), path.read_bytes().decode(errors="replace").split("\0")


# --- the agents of runs --------------------------------------------------------------------------


def agents(proc: Path = PROC) -> set[int]:
    """Process ids of what launches of this user have started here: `python -m mmsweep.agent --detach`,
    and the followers of runs that have several machines."""
    found = set()
    for pid, words in _processes(proc):
        modules = [word for option, word in itertools.pairwise(words) if option == "-m"]
        if modules[:1] and modules[0] in AGENTS and "--detach" in words:
            with contextlib.suppress(OSError):
                if (proc / str(pid)).stat().st_uid == os.getuid():
                    found.add(pid)
    return found


def tell_agents(proc: Path, told: set[int]) -> set[int]:
    """Send SIGTERM, "this machine goes away", to the agents but those `told`; returns their process ids."""
    asked = set()
    for pid in agents(proc) - told:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGTERM)
            asked.add(pid)
    return asked


# --- Ray -----------------------------------------------------------------------------------------


def nodes(proc: Path = PROC) -> list[tuple[str, str]]:
    """Address of the cluster and id of the node, for every Ray node on this machine.

    The raylets' command lines tell. Left to itself, `ray drain-node` looks for a cluster and asks a
    driver of its own where it is; with no answer it starts another Ray here, and drains that.
    """
    found = []
    for _, (program, *options) in _processes(proc):
        if program.endswith("/raylet"):
            told = dict(option.partition("=")[::2] for option in options)
            found.append((told["--gcs-address"], told["--node_id"]))
    return found


def _drain_all(proc: Path, deadline_s: int, pause_s: float) -> bool:
    """Whether every Ray node on this machine is drained, and there is one."""
    for _ in range(DRAIN_TRIES):
        found = nodes(proc)
        accepted = [drain(address, node, deadline_s) for address, node in found]
        if found and all(accepted):
            return True
        time.sleep(pause_s)
    return False


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
