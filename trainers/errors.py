"""The one error that means "your input is wrong", and how to suggest the name that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Bad input from a person: every line of the message stands alone and says what to change.

    Commands print it without a traceback and exit with code 2.
    """


class DeviceError(InputError):
    """A GPU that was promised to this process is not there. Another machine may have it."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """`' (did you mean "stiefel"?)'`, or the allowed names where nothing is near."""
    names = sorted(str(name) for name in allowed)
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.6)
    if near:
        return f' (did you mean "{near[0]}"?)'
    return f" (allowed: {', '.join(names)})" if names else ""
