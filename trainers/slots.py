"""Sums over a batch that have the same bits for every number of ranks.

Rounding makes a sum depend on its order, and a data-parallel sum's order on the number of ranks. Here a
batch is S slots, S fixed by the experiment, and the order is a binary tree over the slots: a node of
level k adds two neighbours of level k - 1, and the complete subtrees that make up S (8 + 4 for S = 12) are
added from the right. Ranks hold neighbouring slots, so each adds up the complete subtrees that lie within
its own, and rank 0 the rest of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from trainers.distributed import Group
from trainers.errors import InputError


@dataclass(frozen=True, slots=True)
class _Node:
    """The sum of slots [index 2^level, (index + 1) 2^level)."""

    level: int
    index: int
    tensors: list[Tensor]


class SlotSum:
    """Adds the tensors of every slot, gradients and losses say; each rank gives those of its own slots.

    ```
    total = SlotSum(12, group)
    for slot in total.mine:
        loss, gradients = ...  # of the slot's sequences, a shape that no number of ranks changes
        total.add(slot, [*gradients, loss])
    *gradients, loss = total.finish()
    ```

    A rank keeps at most 2 log₂ S sets of tensors. One `SlotSum` serves one sum.

    Args:
        slots: S, over all ranks.
        group: ranks on CPUs.

    Raises:
        InputError: S is not a multiple of the number of ranks, or the device is not a CPU.
    """

    def __init__(self, slots: int, group: Group) -> None:
        if group.device.type != "cpu":
            raise InputError(
                f'slots: sums with the same bits for every number of workers need runtime.device "cpu", '
                f"this is {group.device.type}"
            )
        if slots < 1 or slots % group.world_size:
            raise InputError(
                f"slots: {slots} cannot be divided evenly over {group.world_size} workers; use a multiple"
            )
        share = slots // group.world_size
        self.slots = slots
        self.group = group
        self.mine = range(group.rank * share, (group.rank + 1) * share)
        """This rank's slots, in the order in which `add` wants them."""
        self._nodes: list[_Node] = []
        self._added = 0

    def add(self, slot: int, tensors: Sequence[Tensor]) -> None:
        """Give the tensors of the next slot. They belong to the sum from now on, which works in place.

        Every slot gives as many, of the same shapes and dtypes.

        Raises:
            ValueError: another slot is next, or the tensors differ from those of the slot before.
        """
        if self._added == len(self.mine) or slot != self.mine[self._added]:
            raise ValueError(f"slot {slot} out of turn; {self._added} of {self.mine} are added")
        if self._nodes and _layout(tensors) != _layout(self._nodes[0].tensors):
            raise ValueError(f"slot {slot}: shapes or dtypes differ from those of the slot before")
        _push(self._nodes, _Node(0, slot, [tensor.detach() for tensor in tensors]))
        self._added += 1

    def finish(self) -> list[Tensor]:
        """The sum over all slots, on every rank. Every rank calls it, after its last `add`.

        Raises:
            ValueError: slots of this rank are missing.
        """
        if self._added < len(self.mine):
            raise ValueError(f"{self._added} of {self.mine} are added")
        if not self.group.is_main:
            for node in self._nodes:
                for tensor in node.tensors:
                    dist.send(tensor.contiguous(), 0)
            total = [tensor.contiguous() for tensor in self._nodes[0].tensors]
        else:
            for rank in range(1, self.group.world_size):
                self._receive(rank)
            *left, last = self._nodes
            total = last.tensors
            for node in reversed(left):
                total = _add(node.tensors, total)
            total = [tensor.contiguous() for tensor in total]
        self._nodes = []
        if self.group.world_size > 1:
            for tensor in total:
                dist.broadcast(tensor, 0)
        return total

    def _receive(self, rank: int) -> None:
        """Take the subtrees of a rank, in order."""
        like = self._nodes[0].tensors
        share = len(self.mine)
        for level, index in _subtrees(rank * share, (rank + 1) * share):
            tensors = [tensor.new_empty(tensor.shape) for tensor in like]
            for tensor in tensors:
                dist.recv(tensor, rank)
            _push(self._nodes, _Node(level, index, tensors))


def _push(nodes: list[_Node], node: _Node) -> None:
    """Append the node that follows; two halves of a larger subtree become one, as in a binary counter."""
    nodes.append(node)
    while len(nodes) > 1 and nodes[-2].level == nodes[-1].level and nodes[-2].index % 2 == 0:
        right, left = nodes.pop(), nodes.pop()
        nodes.append(_Node(left.level + 1, left.index // 2, _add(left.tensors, right.tensors)))


def _subtrees(first: int, end: int) -> list[tuple[int, int]]:
    """(level, index) of the largest complete subtrees that make up slots [first, end), in order."""
    found: list[tuple[int, int]] = []
    while first < end:
        level = (end - first).bit_length() - 1
        if first:
            level = min(level, (first & -first).bit_length() - 1)
        found.append((level, first >> level))
        first += 1 << level
    return found


def _add(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    return [a.add_(b) for a, b in zip(left, right, strict=True)]


def _layout(tensors: Sequence[Tensor]) -> list[object]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]
