"""Folders on this machine's disk that a process works in, and that vanish with it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OWNED = ".mmsweep-owned"
"""A file of such a folder, locked by the process that works there: the system lets go of the lock when
that process ends, however it ends."""


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A folder `mmsweep-NAME-…` below the system's temporary one, for the length of the block.

    What processes of this user that were killed have left there is removed first: files that were not
    shipped by then never will be, the next attempt goes on from what is in the store.
    """
    for folder in Path(tempfile.gettempdir()).glob("mmsweep-*"):
        with suppress(OSError):  # its owner lives; another process removes it too
            _remove_abandoned(folder)
    prefix = f"mmsweep-{name}-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as made, _owned(Path(made)):
        yield Path(made)


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    unnamed = folder / f"{OWNED}.new"  # who looks for owners sees none that is not locked yet
    with unnamed.open("wb") as file:
        with suppress(OSError):  # a file system without locks: what is left there stays
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unnamed.rename(folder / OWNED)
        yield


def _remove_abandoned(folder: Path) -> None:
    """Remove a folder whose owner is gone. Raises OSError where that is not so, or nobody owned it."""
    with os.fdopen(os.open(folder / OWNED, os.O_RDWR | os.O_NOFOLLOW), "wb") as file:
        if folder.is_symlink() or os.fstat(file.fileno()).st_uid != os.getuid():
            return
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in folder.iterdir():  # the mark comes last, or a second try would not know the folder
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != OWNED:
                path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
