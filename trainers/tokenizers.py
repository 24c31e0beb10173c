"""Text to tokens, in this process or in several, always in the order given."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
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
    with ThreadPoolExecutor(workers) as threads:
        crew = [_Worker(name) for _ in range(workers)]
        idle = SimpleQueue[_Worker]()
        for worker in crew:
            idle.put(worker)

        def ask(batch: Sequence[bytes]) -> list[Tokens]:
            worker = idle.get()
            try:
                return worker.encode(batch)
            finally:
                idle.put(worker)

        pending: deque[Future[list[Tokens]]] = deque()
        try:
            for batch in batches:
                pending.append(threads.submit(ask, batch))
                if len(pending) > AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except (EOFError, OSError):
            if all(worker.alive() for worker in crew):
                raise  # the documents' own
            raise InputError(
                "a tokenising process was killed, by a lack of memory perhaps; the same command with fewer "
                "workers goes on from here"
            ) from None
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for worker in crew:
                worker.end()


class _Worker:
    """A process that tokenises, at the other end of a pipe of its own.

    Of its own, because a process killed while it writes to a shared queue (`ProcessPoolExecutor` has
    one) keeps the queue's lock, and everybody waits for ever.
    """

    def __init__(self, name: str) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
        self._pipe, other = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(other, name), daemon=True)
        self._process.start()
        other.close()  # else the end of the process would not be the end of the pipe

    def encode(self, batch: Sequence[bytes]) -> list[Tokens]:
        """Raises EOFError or OSError when the process is gone."""
        self._pipe.send(batch)
        tokens: list[Tokens] = self._pipe.recv()
        return tokens

    def alive(self) -> bool:
        self._process.join(timeout=1)  # the pipe's end shows before the process's
        return self._process.exitcode is None

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, name: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    encode = tokenizer(name)
    while True:
        pipe.send([encode(text) for text in pipe.recv()])


def _end_with_parent() -> None:
    """Else a worker whose parent was killed would write a traceback of the broken pipe."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
