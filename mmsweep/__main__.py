"""`mmsweep COMMAND …`: the commands under one name."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from trainers.errors import did_you_mean

COMMANDS = {
    "launch": "run what a grid asks for and its store does not have yet",
    "search": "find the best setting of a grid, and train it on fresh seeds",
    "status": "where every run of a store stands; --watch goes on looking",
    "stop": "let a grid or single runs save their state and end",
    "report": "tables and figures of a store",
    "export": "every frame as CSV or Parquet, a card per run, what to cite",
    "data": "make, check and list the tokens that runs read",
    "doctor": "check this machine, a store and a cluster, and say what to mend",
    "plan": "what a grid would take: hours, money, bytes, and seeds for a gap",
    "diff": "what two runs do not have in common",
    "store": "list, verify and clean what a store holds",
}

MODULES = {"store": "keep"}
"""Commands whose module has another name: `mmsweep.store` is the library."""


def quietly(command: Callable[[], int]) -> int:
    """What the command returns, or 141, as of SIGPIPE, where nobody reads its output any more (`| head`)."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with the rest of the arguments; exit status 2 for an unknown one."""
    return quietly(lambda: _dispatch(argv))


def _dispatch(argv: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help"):
        print("usage: mmsweep COMMAND ...\n")
        for name, what in COMMANDS.items():
            print(f"  {name:8} {what}")
        print("\n`mmsweep COMMAND --help` tells more.")
        return 0 if given else 2
    if given[0] not in COMMANDS:
        print(f'mmsweep: unknown command "{given[0]}"{did_you_mean(given[0], COMMANDS)}', file=sys.stderr)
        return 2
    status: int = importlib.import_module(f"mmsweep.{MODULES.get(given[0], given[0])}").main(given[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
