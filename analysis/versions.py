"""Objects of earlier versions, brought to the present one.

`config.json`, `summary.json` and a grid's index carry `schema`, the version they were written in; an
object without it is of version 1. Fields that were added within a version need no migration: their
defaults mean what was done before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trainers.config import SCHEMA_VERSION
from trainers.records import RECORD_VERSION

Migration = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes of an object of one version one of the next."""

NEWEST: Mapping[str, int] = {"config.json": SCHEMA_VERSION, "summary.json": RECORD_VERSION, "index": 1}
MIGRATIONS: Mapping[str, Mapping[int, Migration]] = {"config.json": {}, "summary.json": {}, "index": {}}
"""By object and the version it is in: a version n + 1 comes with an entry n here. Version 1 is the first."""


class TooNewError(Exception):
    """Written by a later version: one line with the fix."""


def migrated(
    value: dict[str, Any],
    what: str,
    *,
    newest: Mapping[str, int] = NEWEST,
    migrations: Mapping[str, Mapping[int, Migration]] = MIGRATIONS,
) -> dict[str, Any]:
    """`value`, a `what`, as the present version would have written it.

    Raises:
        TooNewError: it is of a later version than this code reads.
        ValueError: its version is not a number from 1 on.
    """
    version = value.get("schema", 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"its schema is {version!r}, not a version")
    if version > newest[what]:
        raise TooNewError(
            f"is of schema {version}, and this version of mmsweep reads up to {newest[what]}; update it"
        )
    for step in range(version, newest[what]):
        value = {**migrations[what][step](value), "schema": step + 1}
    return value
