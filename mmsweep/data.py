"""`python -m mmsweep.data`: make, check and list the tokens that runs read.

    prepare grid.yaml               all corpora that a grid needs, into this machine's cache
    prepare --source … --out DIR    one corpus into a folder, for `data: {source: bin, path: DIR}`
    verify PATH                     read every shard again
    ls                              what this machine's cache holds

A killed preparation goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import fnmatch
import glob
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mmsweep.objects import StoreError
from trainers import corpus
from trainers.config import DataConfig
from trainers.documents import expanded
from trainers.errors import InputError

LINE_S = 10.0
"""Without a terminal, a line of progress at most this often."""
DOWNLOADS = 8
"""Objects fetched at once."""
INTERRUPTED = 130

OPTIONS = {
    "source": "stdlib, text, hf or bin",
    "path": "text: a glob of .txt, .jsonl, .jsonl.gz or .parquet files; bin: shards; or s3://bucket/prefix/*.jsonl",
    "dataset": 'hf: "owner/name"',
    "revision": "hf: the commit to read",
    "subset": "hf: the configuration, where there are several",
    "rows": "hf: how many rows it must have",
    "text_column": "column or key that holds the text (default: text)",
    "tokenizer": "bytes or gpt2 (default: bytes)",
    "val_fraction": "share of the documents that validate (default: 0.1)",
}
"""Keys of `data:` in a grid, as options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: done, and all is whole; 2: bad input or a damaged shard; 130: interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except (InputError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmsweep data", description="Make, check and list the tokens that runs read."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    prepare = commands.add_parser("prepare", help="make the corpora of a grid, or one corpus by its options")
    prepare.add_argument("grid", nargs="?", help="grid file, or the name of one that ships")
    for name, what in OPTIONS.items():
        kind = {"rows": int, "val_fraction": float}.get(name, str)
        prepare.add_argument(f"--{name.replace('_', '-')}", type=kind, help=what)
    prepare.add_argument("--out", type=Path, help="folder for the corpus (default: this machine's cache)")
    prepare.add_argument("--workers", type=int, default=_cpus(), help="processes (default: one for each CPU)")
    prepare.set_defaults(run=_prepare)
    verify = commands.add_parser("verify", help="read every shard of a corpus and compare digests")
    verify.add_argument("path", type=Path, help="folder of shards, or one shard")
    verify.set_defaults(run=_verify)
    listing = commands.add_parser("ls", help="corpora in this machine's cache")
    listing.set_defaults(run=_ls)
    return parser


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- prepare -------------------------------------------------------------------------------------


def _prepare(arguments: argparse.Namespace) -> int:
    if arguments.workers < 1:
        raise InputError(f"--workers {arguments.workers}: at least 1")
    given = {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
    if arguments.grid is not None and given:
        raise InputError(f"--{next(iter(given))}: a grid says this itself; give a grid or options, not both")
    if arguments.grid is None and "source" not in given:
        raise InputError("nothing to prepare; name a grid file, or give --source and what it needs")
    wanted = _of_options(given) if arguments.grid is None else _of_grid(arguments.grid)
    out: Path | None = arguments.out and expanded(str(arguments.out))
    if out is not None and len(wanted) > 1:
        raise InputError(f"--out: the grid needs {len(wanted)} corpora; prepare each by its options")
    for data in wanted:
        made = _one(data, out, arguments.workers)
        print(
            f"{made.folder}: {made.tokens['train']:,} tokens to train, {made.tokens['val']:,} to validate, "
            f"{made.digest}",
            flush=True,
        )
    if out is not None:
        print(f"in a grid: data: {{source: bin, path: {out}, tokenizer: {wanted[0].tokenizer}}}")
    return 0


def _of_options(given: dict[str, Any]) -> list[DataConfig]:
    try:
        return [DataConfig(**given)]
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            option = "".join(f"--{str(key).replace('_', '-')}: " for key in problem["loc"])
            lines.append(option + problem["msg"].removeprefix("Value error, "))
        raise InputError("\n".join(lines)) from None


def _of_grid(given: str) -> list[DataConfig]:
    """Every corpus that the runs of a grid read, once. Nothing is tokenised before the grid is right."""
    from mmsweep.grid import load_grid
    from mmsweep.launch import grid_path

    wanted: dict[str, DataConfig] = {}

    def note(data: DataConfig) -> str:
        name = hashlib.sha256(data.model_dump_json().encode()).hexdigest()
        wanted[name] = data
        return f"sha256:{name}"  # stands for the digest: different for different data

    load_grid(grid_path(given), identify=note)
    return list(wanted.values())


def _one(data: DataConfig, out: Path | None, workers: int) -> corpus.Corpus:
    remote = data.path is not None and data.path.startswith("s3://")
    if remote and out is None:
        raise InputError(f'--path "{data.path}": name a folder for its tokens with --out')
    if data.source == "bin" and not remote and out is not None:
        raise InputError("--out: local shards are read where they are; leave it out")
    with _Display(data) as display:
        if out is None:
            return corpus.prepare(data, workers=workers, on_progress=display)
        if not remote:
            return corpus.build(out, data, workers=workers, on_progress=display)
        return (_fetched_shards if data.source == "bin" else _fetched_text)(data, out, workers, display)


class _Display:
    """A bar on a terminal, plain lines elsewhere, both with tokens per second of this attempt."""

    def __init__(self, data: DataConfig) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.name = str(data.path or data.dataset or data.source)
        self.begun: tuple[float, int] | None = None
        self.printed = time.monotonic()
        self.bar = Bar(
            TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:.0f}%"),
            TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task(self.name, total=None)

    def __enter__(self) -> _Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, now: corpus.Progress) -> None:
        clock = time.monotonic()
        if self.begun is None:
            self.begun = clock, now.tokens
        rate = (now.tokens - self.begun[1]) / max(clock - self.begun[0], 1e-9)
        text = f"{now.rows:,} documents, {now.tokens:,} tokens, {rate:,.0f} tokens/s"
        self.bar.update(
            self.task, total=now.size, completed=now.done, description=f"{self.name[-40:]}  {text}"
        )
        if not self.console.is_terminal and clock - self.printed >= LINE_S:
            self.printed = clock
            self.say(f"{100 * now.done / max(now.size, 1):.0f}%, {text}")

    def say(self, text: str) -> None:
        self.console.print(f"{self.name}: {text}", markup=False, soft_wrap=True)


# --- from S3 -------------------------------------------------------------------------------------


def _fetched_text(data: DataConfig, out: Path, workers: int, display: _Display) -> corpus.Corpus:
    """Text from a bucket: fetched into the cache, tokenised, and dropped from the cache again."""
    made = corpus.existing(out, data)
    if made is None:
        url = str(data.path)
        folder = corpus.cache_root() / "s3" / hashlib.sha256(url.encode()).hexdigest()[:16]
        _fetch(url, folder, display)
        local = data.model_copy(update={"path": f"{glob.escape(str(folder))}/**/*"})
        made = corpus.build(out, local, workers=workers, on_progress=display, origin=data)
        shutil.rmtree(folder, ignore_errors=True)
    return made


def _fetched_shards(data: DataConfig, out: Path, _: int, display: _Display) -> corpus.Corpus:
    """Shards from a bucket, and the manifest beside them if there is one."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        part = out.with_name(out.name + corpus.PART)
        _fetch(str(data.path), part, display)
        corpus.prepare(data.model_copy(update={"path": str(part)}))
        part.rename(out)
    return corpus.prepare(data.model_copy(update={"path": str(out)}))


def _fetch(url: str, folder: Path, display: _Display) -> None:
    """The objects that `url` names, below `folder`. Those that are there already are kept."""
    from mmsweep.s3 import S3Store  # boto3 only where it is needed

    bucket, _, path = url.removeprefix("s3://").partition("/")
    prefix, pattern = _split(path)
    store = S3Store(bucket, prefix)
    try:
        keys = [key for key in store.list("") if _chosen(key, pattern)]
        if not keys:
            raise InputError(
                f'--path "{url}" names no object; give a folder of the bucket, or a pattern in one'
            )
        for stray in {p for p in folder.rglob("*") if p.is_file()} - {folder / key for key in keys}:
            stray.unlink()  # of an object that is gone, or half of one
        missing = [key for key in keys if not (folder / key).is_file()]
        display.say(f"{len(keys)} objects, {len(missing)} to fetch")
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(DOWNLOADS) as threads:
            list(threads.map(lambda key: store.get_file(key, folder / key), missing))
    except ValueError as error:
        raise InputError(f'--path "{url}": {error}; give the objects plain names') from None
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror}); make room there") from None


def _split(path: str) -> tuple[str, str]:
    """Folder and pattern: `a/b` and `*.jsonl` of `a/b/*.jsonl`; without a wildcard, all below the folder."""
    segments = path.strip("/").split("/")
    wild = [number for number, segment in enumerate(segments) if set(segment) & set("*?[")]
    if not wild:
        return path, "**/*"
    return "/".join(segments[: wild[0]]), "/".join(segments[wild[0] :])


def _chosen(key: str, pattern: str) -> bool:
    """Whether a key below the folder matches `*.jsonl`, or `**/*.jsonl` at any depth."""
    names, wanted = key.split("/"), pattern.split("/")
    if wanted[0] == "**":
        return any(_chosen("/".join(names[n:]), "/".join(wanted[1:])) for n in range(len(names)))
    if len(wanted) == 1 or len(names) == 1:
        return len(names) == len(wanted) and fnmatch.fnmatchcase(names[0], wanted[0])
    return fnmatch.fnmatchcase(names[0], wanted[0]) and _chosen("/".join(names[1:]), "/".join(wanted[1:]))


# --- verify and ls -------------------------------------------------------------------------------


def _verify(arguments: argparse.Namespace) -> int:
    bad = 0
    for path, found in corpus.verify(arguments.path):
        if isinstance(found, InputError):
            bad += 1
            print(found, file=sys.stderr, flush=True)
        else:
            print(
                f"{path}: whole, {found.tokens:,} tokens up to {found.max_token}, SHA-256 {found.sha256}",
                flush=True,
            )
    return 2 if bad else 0


def _ls(_: argparse.Namespace) -> int:
    folders = sorted(p for p in (corpus.cache_root() / "corpora").glob("*") if p.is_dir())
    for folder in folders:
        print(f"{folder}: {_described(folder)}")
    if not folders:
        print(f"{corpus.cache_root()} holds no corpus")
    return 0


def _described(folder: Path) -> str:
    try:
        if folder.name.endswith(corpus.PART):
            state = json.loads((folder / corpus.PROGRESS).read_text())
            return f"unfinished, {state['rows']:,} documents"
        manifest = json.loads((folder / corpus.MANIFEST).read_text())
        data = manifest["data"]
        tokens = {
            split: sum(entry["tokens"] for entry in manifest["shards"][split]) for split in corpus.SPLITS
        }
        what = data["path"] or data["dataset"] or data["source"]
        return f"{what}, {data['tokenizer']}, {tokens['train']:,} + {tokens['val']:,} tokens"
    except (OSError, ValueError, KeyError, TypeError):
        return "unreadable; remove it"


if __name__ == "__main__":
    from mmsweep.__main__ import quietly

    sys.exit(quietly(main))
