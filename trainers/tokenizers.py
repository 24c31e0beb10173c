"""Text to tokens, in this process or in several, always in the order given."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from trainers.errors import InputError
from trainers.shards import Tokens

AHEAD = 3
"""Batches of documents handed out for each process: enough that none ever waits."""

Encode = Callable[[bytes], Tokens]


def tokenizer(name: str) -> Encode:
    """UTF-8 text to tokens: `bytes` (values 0 to 255) or `gpt2` (BPE, each document ends in <|endoftext|>).

    For `gpt2`, bytes that are not UTF-8 become U+FFFD.

    Raises:
        InputError: GPT-2's vocabulary is neither cached nor downloadable.
    """
    if name == "bytes":
        return lambda text: np.frombuffer(text, np.uint8).astype(np.uint16)
    encoding = gpt2_encoding()

    def encode(text: bytes) -> Tokens:
        # An array straight from the encoder: a list of as many Python integers takes longer.
        tokens = encoding.encode_to_numpy(text.decode("utf-8", errors="replace"), disallowed_special=())
        ended = np.empty(len(tokens) + 1, np.uint16)
        ended[:-1], ended[-1] = tokens, encoding.eot_token
        return ended

    return encode


def gpt2_encoding() -> Any:
    """tiktoken's GPT-2 encoding; downloaded by tiktoken on first use, then cached by it."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # network errors of several libraries
        raise InputError(
            "GPT-2's vocabulary could not be downloaded "
            f"({type(error).__name__}); connect once, or point TIKTOKEN_CACHE_DIR at a folder that has it"
        ) from error


def encoded(batches: Iterable[Sequence[bytes]], name: str, *, workers: int = 1) -> Iterator[list[Tokens]]:
    """Tokens of every document, batch by batch, by `workers` processes (1 is this one).

    Processes and not threads: two threads encode no more than one.

    Raises:
        InputError: see `tokenizer`; or a process was killed.
    """
    encode = tokenizer(name)  # also where there are several: what is wrong shows here first
    if workers == 1:
        for batch in batches:
            yield [encode(text) for text in batch]
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start, initargs=(name,))
    pending: deque[Future[list[Tokens]]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode, batch))
            if len(pending) > AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise InputError(
            "a tokenising process was killed, by a lack of memory perhaps; the same command with fewer "
            "workers goes on from here"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_own: Encode | None = None
"""The encoder of a worker process."""


def _start(name: str) -> None:
    global _own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _own = tokenizer(name)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode(batch: Sequence[bytes]) -> list[Tokens]:
    assert _own is not None
    return [_own(text) for text in batch]
