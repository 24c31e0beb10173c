"""`python -m mmsweep.export STORE`: every frame as CSV or Parquet, a card for every run, what to cite."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmsweep.store import StoreError
from trainers.errors import InputError

FORMATS = {"csv": ("csv",), "parquet": ("parquet",), "both": ("csv", "parquet")}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files and print their names and rows. Exit status 2 on bad input."""
    arguments = _parser().parse_args(argv)
    from analysis.export import write_export  # upward, as in `mmsweep.report`: for the command alone

    try:
        written = write_export(
            arguments.store, arguments.out, grid=arguments.grid, formats=FORMATS[arguments.format]
        )
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"mmsweep export: {error}; choose another folder with --out", file=sys.stderr)
        return 2
    except (InputError, StoreError) as error:
        print(f"mmsweep export: {error}", file=sys.stderr)
        return 2
    for note in written.notes:
        print(f"mmsweep export: {note}", file=sys.stderr)
    for name, rows in written.rows.items():
        print(f"{name:17} {rows:>13,} rows")
    print(f"{written.cards:,} cards\n{arguments.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmsweep export", description="Frames as files, a card for every run, and what to cite."
    )
    parser.add_argument("store", nargs="+", help='folders or "s3://bucket/prefix" that hold the runs')
    parser.add_argument("--grid", help="only this grid (default: all runs)")
    parser.add_argument(
        "--out", type=Path, default=Path("export"), help="folder to write to (default: ./export)"
    )
    parser.add_argument("--format", choices=FORMATS, default="both", help="default: both")
    return parser


if __name__ == "__main__":
    from mmsweep.__main__ import quietly

    sys.exit(quietly(main))
