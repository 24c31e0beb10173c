"""Grid files out of runs: settings that were found in one grid, each as an arm of another."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from trainers.config import RunConfig


def grid_text(name: str, arms: Mapping[str, RunConfig], seeds: Sequence[int], **keys: Any) -> str:  # YAML
    """A grid file that trains these runs' settings on `seeds`; what the arms share is its `base`.

    `keys` are other keys of a grid file (`store`, `resources`, …), as they are to stand there.
    """
    parts = {arm: flat(_fields(run)) for arm, run in arms.items()}
    shared = {
        path: value
        for path, value in next(iter(parts.values()), {}).items()
        if all(path in other and other[path] == value for other in parts.values())
    }
    own = {arm: nested({k: v for k, v in part.items() if k not in shared}) for arm, part in parts.items()}
    grid = {"name": name, **keys, "seeds": [int(s) for s in seeds], "arms": own, "base": nested(shared)}
    text: str = yaml.safe_dump(grid, sort_keys=False, width=100)
    return text


def _fields(run: RunConfig) -> dict[str, Any]:
    fields = run.model_dump(mode="json", exclude_defaults=True, exclude={"arm", "seed"})
    fields["precision"] = run.precision  # a grid's own default depends on its resources
    fields.get("data", {}).pop("digest", None)
    return fields


def arm_name(label: str, taken: Mapping[str, Any]) -> str:
    """The label as a name that a grid allows, unlike those taken. A long one ends with a digest of itself."""
    name = re.sub(r"[^a-z0-9._-]+", "-", label.lower()).strip("-._").replace("..", "-") or "setting"
    if len(name) > _LONGEST:
        name = f"{name[: _LONGEST - 9].rstrip('-._')}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    return next(each for each in names if each not in taken)


_LONGEST = 56


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path → value. Lists are values."""
    paths: dict[str, Any] = {}
    for key, inner in value.items():
        path = f"{prefix}{key}"
        paths |= flat(inner, f"{path}.") if isinstance(inner, Mapping) else {path: inner}
    return paths


def nested(paths: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths as mappings."""
    tree: dict[str, Any] = {}
    for path, value in paths.items():
        *outer, last = path.split(".")
        inner = tree
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return tree
