"""Whole objects under keys: the little that is asked of storage, and a folder that provides it.

Every object is written whole or not at all. `mmsweep.s3.S3Store` is the other provider.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Entry:
    """One object as a listing shows it."""

    key: str
    bytes: int
    modified: float
    """Unix seconds, by the store's clock."""


@dataclass(frozen=True, slots=True)
class Upload:
    """An object that is being written, or whose writer was cut off. It takes room, and no reader sees it."""

    key: str
    id: str
    begun: float
    """Unix seconds, by the store's clock; of a file, when it was last written to."""


Keys: TypeAlias = list[str]  # the stores have a method called `list`
Entries: TypeAlias = list[Entry]
Uploads: TypeAlias = list[Upload]

TEMPORARY = ".tmp-"
"""Begins the name of a file that is still being written; no key may contain such a name."""


class NotFound(KeyError):  # noqa: N818 (the name is part of the interface)
    """No object has this key."""

    def __str__(self) -> str:
        return f"{self.args[0]}: not found"


class StoreError(Exception):
    """The store cannot be used, or holds something unreadable: one line with the URL and the fix."""


class DamagedError(StoreError):
    """An object is there and cannot be what it should be: waiting does not help."""


class ObjectStore(Protocol):
    """Whole objects under slash-separated keys. Safe to use from several threads.

    Every method raises `StoreError` when the store cannot be reached or refuses, and `ValueError`
    for a key that is not plain (see `check_key`). Prefixes name folders: `list("runs/a")` holds
    no key of `runs/ab`.
    """

    @property
    def url(self) -> str:
        """What `open_store` takes to reach this store from another process."""

    def get(self, key: str) -> bytes:
        """The object. Raises `NotFound`."""

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object; a reader sees the old bytes or the new, never a mixture."""

    def get_file(self, key: str, path: Path) -> None:
        """Fetch an object into a file, which appears whole or not at all. Raises `NotFound`."""

    def put_file(self, key: str, path: Path) -> None:
        """Like `put`, from a file of any size. Raises `FileNotFoundError`."""

    def list(self, prefix: str) -> Keys:
        """All keys below the prefix, sorted."""

    def entries(self, prefix: str) -> Entries:
        """All objects below the prefix, sorted by key."""

    def time(self) -> float:
        """Unix seconds by the clock that dates the objects; nothing is left in the store."""

    def children(self, prefix: str) -> Keys:
        """Names directly below the prefix, of objects and folders, sorted."""

    def exists(self, key: str) -> bool: ...

    def delete(self, key: str) -> None:
        """Remove an object if it is there."""

    def move(self, key: str, to: str) -> None:
        """Give an object another key. Raises `NotFound`."""

    def unfinished(self) -> Uploads:
        """What is being written at the moment, and what killed writers have left, sorted by key."""

    def discard(self, upload: Upload) -> None:
        """Remove one of `unfinished`, if it is still there."""


def check_key(key: str) -> str:
    """`key`, if it is plain: no empty, `.` or `..` segment, nothing absolute, no backslash or NUL.

    Raises:
        ValueError: it is not.
    """
    segments = key.split("/")
    bad = any(s in ("", ".", "..") or s.startswith(TEMPORARY) for s in segments)
    if bad or "\\" in key or "\0" in key:
        raise ValueError(f"not a plain key: {key!r}")
    return key


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` on success and vanishes on failure."""
    temporary = path.with_name(TEMPORARY + uuid.uuid4().hex)
    try:
        with _create(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create(path: Path) -> BinaryIO:
    # Another process may remove the folder, still empty, before the file is in it.
    for _ in range(20):
        with suppress(FileNotFoundError, FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("xb")
    return path.open("xb")


class DirectoryStore:
    """A folder on a local or shared disk."""

    def __init__(self, root: Path) -> None:
        try:
            self.root = root.expanduser().absolute()
        except RuntimeError as error:  # no such user
            raise StoreError(f"{root}: {error}") from None

    @property
    def url(self) -> str:
        return str(self.root)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _check_root(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"{self.url}: not a folder; name a folder for the store")

    @contextmanager
    def _guard(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError):
            self._check_root()
            raise NotFound(f"{self.url}/{key}") from None
        except OSError as error:
            reason = error.strerror or str(error)
            fix = "check that the disk has room and that you may read and write there"
            raise StoreError(f"{self.url}/{key}: {reason}; {fix}") from error

    @contextmanager
    def _writing(self, key: str) -> Iterator[BinaryIO]:
        try:
            with self._guard(key), replacing(self._path(key)) as file:
                yield file
        except NotFound:
            raise StoreError(f"{self.url}/{key}: a file or folder is in the way; move it") from None

    def get(self, key: str) -> bytes:
        with self._guard(key):
            return self._path(key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        with self._writing(key) as file:
            file.write(data)

    def get_file(self, key: str, path: Path) -> None:
        source = self._path(key)
        with self._guard(key):
            file = source.open("rb")
        with file, replacing(path) as target:
            shutil.copyfileobj(file, target, 1 << 20)

    def put_file(self, key: str, path: Path) -> None:
        with path.open("rb") as source, self._writing(key) as file:
            shutil.copyfileobj(source, file, 1 << 20)

    def list(self, prefix: str) -> Keys:
        self._check_root()
        top = self._path(prefix.rstrip("/")) if prefix else self.root
        keys: Keys = []
        with self._guard(prefix):
            for folder, _, names in os.walk(top, onerror=_unless_gone):
                base = Path(folder).relative_to(self.root).as_posix()
                visible = (name for name in names if not name.startswith(TEMPORARY))
                keys.extend(name if base == "." else f"{base}/{name}" for name in visible)
        return sorted(keys)

    def entries(self, prefix: str) -> Entries:
        return [entry for key in self.list(prefix) if (entry := self._entry(key))]

    def _entry(self, key: str) -> Entry | None:
        try:
            with self._guard(key):
                facts = (self.root / key).stat()
        except NotFound:  # deleted since it was listed
            return None
        return Entry(key, facts.st_size, facts.st_mtime)

    def time(self) -> float:
        try:
            with tempfile.TemporaryFile(dir=self.root) as file:  # a shared disk has its server's clock
                file.write(b"0")
                file.flush()
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            return time.time()

    def children(self, prefix: str) -> Keys:
        top = self._path(prefix.rstrip("/")) if prefix else self.root
        try:
            with self._guard(prefix):
                return sorted(p.name for p in top.iterdir() if not p.name.startswith(TEMPORARY))
        except NotFound:
            return []

    def exists(self, key: str) -> bool:
        with self._guard(key):
            return self._path(key).is_file()

    def delete(self, key: str) -> None:
        path = self._path(key)
        with suppress(NotFound), self._guard(key):
            path.unlink()
        self._remove_empty_folders(path)

    def move(self, key: str, to: str) -> None:
        source, target = self._path(key), self._path(to)
        with self._guard(key):
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
        self._remove_empty_folders(source)

    def unfinished(self) -> Uploads:
        self._check_root()
        found: Uploads = []
        with self._guard(""):
            for folder, _, names in os.walk(self.root, onerror=_unless_gone):
                for name in names:
                    if name.startswith(TEMPORARY):
                        with suppress(FileNotFoundError):  # finished since it was listed
                            written = Path(folder, name).stat().st_mtime
                            key = Path(folder, name).relative_to(self.root).as_posix()
                            found.append(Upload(key, name, written))
        return sorted(found, key=lambda upload: upload.key)

    def discard(self, upload: Upload) -> None:
        folder, _, name = upload.key.rpartition("/")
        if name != upload.id or not name.startswith(TEMPORARY):
            raise ValueError(f"not an unfinished file: {upload.key!r}")
        path = (self._path(folder) if folder else self.root) / name
        with suppress(NotFound), self._guard(upload.key):
            path.unlink()
        self._remove_empty_folders(path)

    def _remove_empty_folders(self, path: Path) -> None:
        for folder in path.parents:
            if folder == self.root:
                return
            try:
                folder.rmdir()
            except OSError:
                return  # it holds something


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
