"""`mmsweep COMMAND …`: the commands under one name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from trainers.errors import did_you_mean

COMMANDS = {
    "launch": "run what a grid asks for and its store does not have yet",
    "status": "where every run of a store stands",
    "report": "tables and figures of a store",
    "data": "make, check and list the tokens that runs read",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with the rest of the arguments; exit status 2 for an unknown one."""
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
    status: int = importlib.import_module(f"mmsweep.{given[0]}").main(given[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
