"""Sums over slots: the same bits from 1, 2, 3, 4 and 6 real processes, where a plain sum's differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trainers.distributed import Group, join
from trainers.errors import InputError
from trainers.slots import SlotSum, _Node, _push, _subtrees

CPU = torch.device("cpu")
ALONE = Group(0, 1, CPU)
S = 12
WORLDS = (1, 2, 3, 4, 6)


def leaf(slot: int) -> list[torch.Tensor]:
    """Gradients and a loss of one slot; magnitudes over twelve decades, so that the order shows."""
    generator = torch.Generator().manual_seed(slot)
    scale = 10.0 ** torch.randint(-6, 7, (64, 33), generator=generator)
    return [
        torch.randn(64, 33, generator=generator) * scale,
        torch.randn(7, generator=generator),
        torch.randn(5, 6, generator=generator, dtype=torch.float64).mT,
        torch.randn((), generator=generator),
    ]


def tree_of_12(leaves: list[torch.Tensor]) -> torch.Tensor:
    """The promised order, written out."""
    a, b, c, d, e, f, g, h, i, j, k, m = leaves
    return (((a + b) + (c + d)) + ((e + f) + (g + h))) + ((i + j) + (k + m))


def add_and_write(folder: Path) -> None:
    with join("cpu") as group:
        total = SlotSum(S, group)
        for slot in total.mine:
            total.add(slot, leaf(slot))
        named = {f"{k}": tensor.contiguous() for k, tensor in enumerate(total.finish())}
        save_file(named, folder / f"{group.world_size}-{group.rank}.safetensors")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def test_every_number_of_ranks_gives_the_bits_of_the_tree(tmp_path):
    for workers in WORLDS:
        log = tmp_path / f"log-{workers}"
        ranks.finish(ranks.start(workers, add_and_write, tmp_path, log=log), log)
    expected = [tree_of_12(list(column)) for column in zip(*map(leaf, range(S)), strict=True)]
    for workers in WORLDS:
        for rank in range(workers):
            got = load_file(tmp_path / f"{workers}-{rank}.safetensors")
            for k, tensor in enumerate(expected):
                assert bits(got[f"{k}"]) == bits(tensor), (workers, rank, k)


def test_a_plain_sum_would_depend_on_the_number_of_ranks():
    """What the tree is for: sums of each rank's share, added up."""

    def plain(workers: int) -> torch.Tensor:
        share = S // workers
        parts = [sum(leaf(slot)[0] for slot in range(r * share, (r + 1) * share)) for r in range(workers)]
        return sum(parts[1:], start=parts[0])

    sums = {bits(plain(workers)) for workers in WORLDS}
    assert len(sums) == len(WORLDS)
    assert bits(tree_of_12([leaf(slot)[0] for slot in range(S)])) not in sums


@given(st.integers(1, 70), st.data())
def test_ranks_fold_their_slots_into_the_largest_complete_subtrees(slots, data):
    first = data.draw(st.integers(0, 200))
    nodes: list[_Node] = []
    for slot in range(first, first + slots):
        _push(nodes, _Node(0, slot, [torch.tensor([float(slot)])]))
    assert [(node.level, node.index) for node in nodes] == _subtrees(first, first + slots)
    assert len(nodes) <= 2 * slots.bit_length()
    for node in nodes:
        width = 1 << node.level
        assert float(node.tensors[0]) == sum(range(node.index * width, (node.index + 1) * width))


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_one_rank_sums_any_number_of_slots(slots, seed):
    generator = torch.Generator().manual_seed(seed)
    leaves = torch.randn(slots, 5, generator=generator)
    total = SlotSum(slots, ALONE)
    for slot in total.mine:
        total.add(slot, [leaves[slot].clone()])
    [got] = total.finish()
    assert torch.allclose(got.double(), leaves.double().sum(0), atol=1e-5)


def test_what_cannot_be_summed_is_refused():
    with pytest.raises(InputError, match="12 cannot be divided evenly over 5 workers"):
        SlotSum(12, Group(0, 5, CPU))
    with pytest.raises(InputError, match=r'need runtime\.device "cpu", this is cuda'):
        SlotSum(12, Group(0, 1, torch.device("cuda")))
    assert SlotSum(12, Group(2, 4, CPU)).mine == range(6, 9)
    total = SlotSum(2, ALONE)
    with pytest.raises(ValueError, match="slot 1 out of turn"):
        total.add(1, [torch.zeros(2)])
    total.add(0, [torch.zeros(2)])
    with pytest.raises(ValueError, match="shapes or dtypes differ"):
        total.add(1, [torch.zeros(3)])
    with pytest.raises(ValueError, match=r"1 of range\(0, 2\) are added"):
        total.finish()
    total.add(1, [torch.ones(2)])
    with pytest.raises(ValueError, match="slot 2 out of turn"):
        total.add(2, [torch.ones(2)])
    assert total.finish()[0].tolist() == [1.0, 1.0]
