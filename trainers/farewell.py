"""How a process ends that may have threads which cannot be joined."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """Straight out, past the interpreter's own farewell: what gloo leaves running can abort it ("terminate
    called without an active exception"), and a request to a server that does not answer can hold it up.
    What is to be kept must be on disk."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
