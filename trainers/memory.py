"""How this process gives memory back to the system."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 256 * 2**20


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep up to 256 MiB of what was freed; False where the C library is another.

    A training step frees and allocates the same large tensors again and again. By default each comes
    back from the system as fresh pages, 30,000 faults in one optimizer step of one GPT-2 layer: a sixth
    of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # Older versions refuse more than 32 MiB.
    kept = mallopt(_M_MMAP_THRESHOLD, _KEPT) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, _KEPT))
