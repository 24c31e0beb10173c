"""`python -m mmsweep.diff STORE RUN RUN`: what two runs do not have in common.

Config, provenance, outcome, and the first step at which their losses part. The beginning of a run's id
is enough where no other begins so.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmsweep.store import RunStore, StoreError, open_store
from trainers.errors import InputError, did_you_mean
from trainers.yamlfile import printable

ABSENT = "–"
OUTCOME = ("status", "reason", "steps", "horizon", "attempts", "verdict")
LOSSES = ("final_val_loss", "final_train_loss", "best_val_loss", "best_step")


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that two runs have differently. A side that lacks it has None."""

    section: str
    """config, provenance, outcome, losses or curves."""
    name: str
    left: Any
    right: Any


def main(argv: Sequence[str] | None = None) -> int:
    """Print the differences. Exit status, as of diff(1): 0 none, 1 some, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="mmsweep diff", description="What two runs do not have in common: config, provenance, losses."
    )
    parser.add_argument("store", help='folder or "s3://bucket/prefix"')
    parser.add_argument("left", metavar="RUN", help="run id, or a beginning that no other run has")
    parser.add_argument("right", metavar="RUN")
    arguments = parser.parse_args(argv)
    try:
        store = open_store(arguments.store)
        run_ids = store.run_ids()
        left, right = (find(run_ids, name, store.url) for name in (arguments.left, arguments.right))
        found = list(differences(store, left, right))
    except (InputError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    _print(found, left, right)
    return 1 if found else 0


def find(run_ids: Sequence[str], name: str, url: str) -> str:
    """The run of that id, or the one whose id begins so.

    Raises:
        InputError: there is none, or several begin so.
    """
    begin_so = [run_id for run_id in run_ids if run_id.startswith(name)]
    if name in begin_so:
        return name
    if len(begin_so) == 1:
        return begin_so[0]
    if not begin_so:
        raise InputError(f'{url} has no run "{name}"{did_you_mean(name, run_ids)}')
    some = ", ".join(begin_so[:5]) + (", …" if len(begin_so) > 5 else "")
    raise InputError(f'{len(begin_so)} runs of {url} begin with "{name}": {some}; write more of the id')


def differences(store: RunStore, left: str, right: str) -> Iterator[Difference]:
    """What two runs of a store do not have in common; NaN equals NaN.

    Raises:
        StoreError: the store cannot be read, or an object of these runs is damaged.
    """
    configs = [store.config(run_id) or {} for run_id in (left, right)]
    for section in ("config", "provenance"):
        yield from _compare(section, *(_flat(config.get(section, {})) for config in configs))
    ends = [_end(store, run_id) for run_id in (left, right)]
    for section, names in (("outcome", OUTCOME), ("losses", LOSSES)):
        yield from _compare(section, *(_flat({n: end[n] for n in names if n in end}) for end in ends))
    for kind, column in (("steps", "loss"), ("evals", "val_loss")):
        yield from _parting(store, left, right, kind, column)


def _end(store: RunStore, run_id: str) -> dict[str, Any]:
    """The summary of a finished run; else as far as it has come, under the names of a summary."""
    summary = store.summary(run_id)
    if summary is not None:
        return summary
    status = store.status(run_id) or {"status": "pending"}
    names = {
        "status": "status",
        "reason": "reason",
        "step": "steps",
        "steps": "horizon",
        "attempt": "attempts",
    }
    return {names[key]: value for key, value in status.items() if key in names}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted path → plain value. An empty mapping has no paths, a list is a value."""
    if not isinstance(value, dict):
        return {name: value}
    inner = (_flat(item, f"{name}.{key}" if name else str(key)) for key, item in value.items())
    return {path: item for flat in inner for path, item in flat.items()}


def _compare(section: str, left: dict[str, Any], right: dict[str, Any]) -> Iterator[Difference]:
    for name in dict.fromkeys([*left, *right]):
        one, other = left.get(name), right.get(name)
        if not _same(one, other):
            yield Difference(section, name, one, other)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
        return True
    return type(one) is type(other) and bool(one == other)


def _parting(store: RunStore, left: str, right: str, kind: str, column: str) -> Iterator[Difference]:
    """How many rows they have, and the first step of both at which a loss differs."""
    one, other = (_column(store, run_id, kind, column) for run_id in (left, right))
    if len(one) != len(other):
        yield Difference("curves", f"rows of {kind}", len(one), len(other))
    for step in sorted(one.keys() & other.keys()):
        if not _same(one[step], other[step]):
            name = f"{column} of {kind} parts at step {step}"
            yield Difference("curves", name, one[step], other[step])
            return


def _column(store: RunStore, run_id: str, kind: str, column: str) -> dict[int, float]:
    table = store.table(run_id, kind)
    return dict(zip(table["step"].to_pylist(), table[column].to_pylist(), strict=True))


def _print(found: list[Difference], left: str, right: str) -> None:
    if not found:
        print(f"same: {left}" + (f" and {right}" if right != left else ""))
        return
    rows = [[item.name, _show(item.left), _show(item.right)] for item in found]
    names, lefts = (max(len(row[k]) for row in [["", left, right], *rows]) for k in (0, 1))
    print(f"{'':{names + 2}}  {left:{lefts}}  {right}")
    section = None
    for item, (name, one, other) in zip(found, rows, strict=True):
        if item.section != section:
            section = item.section
            print(section)
        print(f"  {name:{names}}  {one:{lefts}}  {other}")


def _show(value: Any) -> str:
    return ABSENT if value is None else printable(str(value)) or '""'


if __name__ == "__main__":
    from mmsweep.__main__ import quietly

    sys.exit(quietly(main))
