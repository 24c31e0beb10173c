"""Peak rates, the clock of a step, and batches that are read ahead."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from trainers.batches import Batches
from trainers.clock import Clock, no_span
from trainers.devices import peak, peak_memory
from trainers.distributed import Group, pick_device
from trainers.errors import DeviceError, InputError
from trainers.prefetch import Prefetch
from trainers.shards import HEADER_BYTES, write_shard

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_a_device_is_known_by_the_name_that_cuda_gives_it(name, teraflops):
    known = peak(name)
    assert known is not None
    assert known.bfloat16 == teraflops * 1e12
    assert known.float32 < known.bfloat16
    assert known.source


@pytest.mark.parametrize(
    "name", ["cpu", "NVIDIA A10G", "NVIDIA L40", "NVIDIA GH200 480GB", "AMD Instinct MI300X"]
)
def test_other_devices_have_no_known_peak(name):
    assert peak(name) is None


@pytest.mark.parametrize(
    ("visible", "named"),
    [(None, 0), ("", 0), ("-1", 0), ("none", 0), ("0", 1), ("0, 3", 2), ("GPU-8932f937", 1), ("1,-1,2", 1)],
)
@pytest.mark.parametrize("found", [0, 1, 2])
def test_a_gpu_that_was_promised_is_there_or_missed(monkeypatch, visible, named, found):
    """Not on CPU cores instead, nor two ranks on one GPU, which would go on as if nothing were."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    assert pick_device("cpu") == CPU
    if found < named:
        for wanted in ("auto", "cuda"):
            with pytest.raises(DeviceError, match=rf"names {named} GPU.* finds {found or 'none'}; mend"):
                pick_device(wanted)
    elif found:
        assert [pick_device("auto", rank).index for rank in range(3)] == [rank % found for rank in range(3)]
    else:
        assert pick_device("auto") == CPU
        with pytest.raises(InputError, match=r'runtime\.device is "cuda" and torch finds no'):
            pick_device("cuda")


def test_the_clock_adds_spans_of_one_name_and_starts_anew():
    clock = Clock(CPU)
    for _ in range(3):
        with clock.span("a"):
            time.sleep(0.002)
        with clock.span("b"), no_span("c"):
            pass
    totals = clock.totals()
    assert set(totals) == {"a", "b"}
    assert totals["a"] >= 6
    assert totals["b"] < totals["a"]
    assert clock.totals() == {}


def test_peak_memory_is_at_least_what_is_held():
    held = torch.ones(2**24)
    assert peak_memory(CPU) >= held.nbytes


@pytest.fixture
def batches(tmp_path):
    write_shard(tmp_path / "train.bin", np.arange(5_000, dtype=np.uint16) % 256)
    return Batches([tmp_path / "train.bin"], 16, 256)


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_that_were_read_ahead_are_those_of_the_step(batches, rank):
    group = Group(rank, 2, CPU)
    prefetch = Prefetch(batches, 1337, 8, group)
    for step in (0, 1, 2, 7, 7, 8, 3):
        rows = prefetch.rows(step)
        assert torch.equal(rows, torch.from_numpy(batches.batch(1337, step, 8, rank, 2)))
    prefetch.close()


def test_the_next_rows_are_read_by_a_thread_and_nothing_after_the_last(batches, monkeypatch):
    readers = []
    read = batches.batch

    def noticed(*arguments):
        readers.append((arguments[1], threading.current_thread() is threading.main_thread()))
        return read(*arguments)

    monkeypatch.setattr(batches, "batch", noticed)
    prefetch = Prefetch(batches, 1337, 8, Group(0, 1, CPU))
    prefetch.rows(0)
    prefetch.rows(1)
    prefetch.rows(2, last=True)
    prefetch.close()
    assert readers == [(0, True), (1, False), (2, False)]


def test_an_error_of_the_reader_is_raised_where_its_rows_are_wanted(tmp_path):
    path = tmp_path / "train.bin"
    write_shard(path, np.zeros(5_000, np.uint16))
    prefetch = Prefetch(Batches([path], 16, 256), 1337, 8, Group(0, 1, CPU))
    with path.open("r+b") as file:  # after it was checked
        file.seek(HEADER_BYTES)
        file.write(np.full(5_000, 300, np.uint16).tobytes())
    for step in range(2):
        with pytest.raises(InputError, match=r"train.bin.*300.*256"):
            prefetch.rows(step)
    prefetch.close()
