"""`python -m mmsweep.doctor`: is this machine, this store, this cluster fit for a sweep?

Every finding is one line: ok, warning or problem, what was seen, and for the last two what to do.
Nothing is assumed that can be tried: workers exchange a number, files and objects are written,
read and removed again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from mmsweep.doctor.clusters import check_cluster
from mmsweep.doctor.findings import Findings, count, guarded
from mmsweep.doctor.machine import check_devices, check_disks, check_packages, check_python, check_workers
from mmsweep.doctor.stores import check_store
from mmsweep.objects import ObjectStore, StoreError
from mmsweep.store import open_store
from trainers.errors import InputError

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings. Exit status 0: no problem; 1: problems; 2: bad arguments."""
    arguments = _parser().parse_args(argv)
    checks: list[tuple[str, Callable[[], Findings]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("devices", check_devices),
        ("workers", check_workers),
        ("disk", check_disks),
    ]
    objects: ObjectStore | None = None
    try:
        if arguments.store is not None:
            objects = store = open_store(arguments.store).objects
            checks.append(("store", lambda: check_store(store)))
    except (InputError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.address is not None:
        checks.append(("cluster", lambda: check_cluster(arguments.address, objects)))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    problems = warnings = 0
    for subject, check in checks:
        for finding in guarded(subject, check):
            console.print(finding.line(), style=STYLES[finding.level] if finding.level != "ok" else None)
            problems += finding.level == "problem"
            warnings += finding.level == "warning"
    console.print(f"{count(problems, 'problem')}, {count(warnings, 'warning')}")
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmsweep doctor", description="Check this machine, a store and a cluster, and say what to mend."
    )
    parser.add_argument("--store", help='folder or "s3://bucket/prefix" to try reading and writing in')
    parser.add_argument("--address", help='Ray cluster to look at: "auto" or host:port')
    return parser
