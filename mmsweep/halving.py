"""Successive halving: which settings go on after a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction


def survivors(losses: Mapping[str, float], keep: Fraction = Fraction(1, 2)) -> list[str]:
    """The best share `keep`, rounded up, and all that equal its last. A diverged setting (+inf) is among them
    only where all have diverged."""
    finite = sorted(loss for loss in losses.values() if math.isfinite(loss))
    if not finite:
        return list(losses)
    cut = finite[min(math.ceil(keep * len(losses)), len(finite)) - 1]
    return [name for name, loss in losses.items() if loss <= cut]


def best(losses: Mapping[str, float], count: int) -> list[str]:
    """The `count` lowest that did not diverge, lowest first; of equals the first given."""
    finite = [name for name, loss in losses.items() if math.isfinite(loss)]
    return sorted(finite, key=lambda name: losses[name])[:count]
