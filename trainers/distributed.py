"""The process group of one run: torchrun's environment variables, gloo on CPUs, nccl on GPUs."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainers.errors import DeviceError, InputError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A worker that waits longer than this for the others fails, so that a hang ends."""

LISTENER = "MASTER_LISTEN_FD"
"""Environment variable: in rank 0 the descriptor of a socket that listens at MASTER_PORT already, so that no
other process can have taken the port meanwhile; empty in the others. torchrun does not set it."""


_last: list[object] = []
"""The newest process group, also after it was left. DDP's destructor would drop the last reference to it
with the interpreter's lock held and wait for gloo's thread, while that waits for the lock to free the
tensors of the last exchange."""


@dataclass(frozen=True, slots=True)
class Group:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place; every rank gets the same bits."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def pick_device(wanted: str, local_rank: int = 0) -> torch.device:
    """`auto` takes CUDA if there is one. Ranks beyond the GPUs share them, which needs gloo.

    Raises:
        InputError: CUDA is wanted and there is none.
        DeviceError: there are fewer GPUs than CUDA_VISIBLE_DEVICES names, as where a driver has failed. A
            run on CPU cores instead, or two on one GPU, would be a hundred times slower and say nothing.
    """
    found = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted != "cpu" and found < (named := _gpus_named()):
        raise DeviceError(
            f"{platform.node()}: CUDA_VISIBLE_DEVICES names {named} GPU{'s'[: named != 1]} and torch finds "
            f"{found or 'none'}; mend that machine (python -m mmsweep doctor), or set runtime.device: cpu"
        )
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError('runtime.device is "cuda" and torch finds no CUDA device here; use "auto" or "cpu"')
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))


def _gpus_named() -> int:
    """By CUDA_VISIBLE_DEVICES, up to the first entry that is none, as CUDA reads it."""
    count = 0
    for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","):
        if not re.fullmatch(r"\d+|(GPU|MIG)-.+", entry.strip()):
            break
        count += 1
    return count


@contextmanager
def join(wanted: str) -> Iterator[Group]:
    """The group that the environment describes (torchrun's RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*),
    or a group of one. It is left on every way out."""
    try:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise InputError(
            f"WORLD_SIZE, RANK and LOCAL_RANK must be numbers, as torchrun sets them: {error}"
        ) from None
    device = pick_device(wanted, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Group(0, 1, device)
        return
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    one_gpu_each = device.type == "cuda" and local_world <= torch.cuda.device_count()
    backend = "nccl" if one_gpu_each else "gloo"
    if LISTENER in os.environ:
        store = _store(rank, world_size)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
        )
    else:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    _last[:] = [dist.group.WORLD]
    try:
        yield Group(rank, world_size, device)
    finally:
        dist.destroy_process_group()


def _store(rank: int, world_size: int) -> Any:
    """Where the ranks meet: rank 0 serves it on the socket that was handed to it."""
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0,
        timeout=COLLECTIVE_TIMEOUT,
        master_listen_fd=int(os.environ[LISTENER]) if rank == 0 else None,
    )
