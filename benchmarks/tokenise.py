"""How many tokens a second text becomes: GPT-2's BPE, by one process and by several.

The loop it is compared with is the usual one: `encode_ordinary` for each document, a list of
integers, an array.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trainers import corpus
from trainers.config import DataConfig
from trainers.documents import Document, find
from trainers.errors import InputError
from trainers.tokenizers import encoded, gpt2_encoding

FILES = 16


def texts(megabytes: float) -> dict[str, list[bytes]]:
    """Documents of two kinds: Python source, and the English of packages' own descriptions."""
    code = [document.text for document in find(DataConfig()).documents((0, 0)) if document.text]
    payloads = [d.metadata.get_payload() for d in importlib.metadata.distributions()]  # type: ignore[attr-defined]
    prose = sorted(str(payload).encode(errors="replace") for payload in payloads if payload)
    return {"Python source": _repeated(code, megabytes), "English prose": _repeated(prose, megabytes)}


def _repeated(documents: list[bytes], megabytes: float) -> list[bytes]:
    chosen: list[bytes] = []
    size = 0
    for document in itertools.cycle(documents):
        if size >= 1e6 * megabytes:
            return chosen
        text = document.decode(errors="replace").encode()
        chosen.append(text)
        size += len(text)
    raise AssertionError("unreachable")


# --- what is compared ------------------------------------------------------------------------------


def plain_loop(documents: list[bytes]) -> int:
    encoding = gpt2_encoding()
    total = 0
    for text in documents:
        tokens = np.array([*encoding.encode_ordinary(text.decode()), encoding.eot_token], np.uint16)
        total += len(tokens)
    return total


def tokenised(documents: list[bytes], workers: int) -> int:
    stream = (Document("", text, (0, 0), 0) for text in documents)
    batches = ([own.text for own in batch] for batch in corpus.by_size(stream))
    return sum(len(own) for batch in encoded(batches, "gpt2", workers=workers) for own in batch)


def prepared(folder: Path, workers: int) -> int:
    """From files to shards on disk, with digests, as `mmsweep data prepare` does it."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MMSWEEP_CACHE"] = cache
        data = DataConfig(source="text", path=f"{folder}/*.jsonl", tokenizer="gpt2")
        made = corpus.build(Path(cache) / "out", data, workers=workers)
    return sum(made.tokens.values())


def write_files(documents: list[bytes], folder: Path) -> None:
    for number in range(FILES):
        lines = [json.dumps({"text": text.decode()}) + "\n" for text in documents[number::FILES]]
        (folder / f"{number}.jsonl").write_text("".join(lines))


# --- the command -----------------------------------------------------------------------------------


def measure(
    documents: list[bytes], workers: int, rounds: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Tokens and tokens/s of each way, the best of interleaved rounds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(documents, folder)
        ways: dict[str, Callable[[], int]] = {
            "plain loop": lambda: plain_loop(documents),
            "1 process": lambda: tokenised(documents, 1),
            f"{workers} processes": lambda: tokenised(documents, workers),
            f"prepare, {workers} processes": lambda: prepared(folder, workers),
        }
        best = dict.fromkeys(ways, 0.0)
        counts = set()
        for number in range(rounds):
            for way, work in ways.items():
                progress(f"round {number + 1} of {rounds}: {way}")
                begun = time.perf_counter()
                tokens = work()
                best[way] = max(best[way], tokens / (time.perf_counter() - begun))
                counts.add(tokens)
    (tokens,) = counts  # all ways agree
    return {
        "megabytes": sum(map(len, documents)) / 1e6,
        "documents": len(documents),
        "tokens": tokens,
        "tokens_per_s": best,
        "over_plain_loop": {way: rate / best["plain loop"] for way, rate in best.items()},
    }


def report(result: dict[str, Any]) -> str:
    from machine import introduction, table

    lines = [introduction(result), ""]
    if result["settings"]["quick"]:
        lines += ["**Quick run: a smoke test, mostly of starting processes.**", ""]
    lines += ["Million tokens a second, best of interleaved rounds (in brackets: over the plain loop).", ""]
    kinds = result["texts"]
    ways = next(iter(kinds.values()))["tokens_per_s"]
    rows = [
        [
            way,
            *(
                f"{1e-6 * k['tokens_per_s'][way]:.2f} ({k['over_plain_loop'][way]:.2f})"
                for k in kinds.values()
            ),
        ]
        for way in ways
    ]
    lines += [table(("GPT-2 BPE", *kinds), rows), ""]
    lines += [
        f"{kind}: {own['megabytes']:.0f} MB, {own['documents']:,} documents, {own['tokens']:,} tokens."
        for kind, own in kinds.items()
    ]
    return "\n".join(lines)


def main() -> None:
    # Here, so that the processes that tokenise, which import this file too, do not import torch.
    import torch
    from machine import RESULTS, heading, progress, publish

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=60, help="of text of each kind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a smoke test: 2 MB, one round")
    options = parser.parse_args()
    megabytes, rounds = (2, 1) if options.quick else (options.megabytes, options.rounds)
    device = torch.device("cpu")
    result = heading("tokenise", device)
    result["settings"] = {"workers": options.workers, "rounds": rounds, "quick": options.quick}
    result["texts"] = {}
    for kind, documents in texts(megabytes).items():
        progress(kind)
        result["texts"][kind] = measure(documents, options.workers, rounds, progress)
    text = report(result)
    publish(options, device, result, text)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:  # no vocabulary of GPT-2's
        sys.exit(str(error))
