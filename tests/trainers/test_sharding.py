"""ManifoldMuon with a process group: real processes over gloo, which must compute the bits of one process."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn

from trainers.optim import ManifoldMuon

WORLDS = (3, 1, 2, 4)  # 3 first: the others continue from its checkpoint
STEPS = range(5)
LATER = range(5, 8)


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrices(*shapes: tuple[int, int], seed: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(gaussian(*shape, seed=seed + k).to(dtype)) for k, shape in enumerate(shapes)]


# --- what is run ---------------------------------------------------------------------------------


def one_type() -> list[dict[str, Any]]:
    """Every manifold, tall, wide and square; seven matrices of one kind, which no world size divides."""
    return [
        {"params": matrices((24, 10), (12, 12), (10, 24), seed=100), "manifold": "stiefel", "lr": 0.05},
        {"params": matrices((16, 8), (8, 16), seed=110), "manifold": "dgram", "lr": 0.02},
        {
            "params": matrices((16, 8), (8, 16), seed=120),
            "manifold": "dgram",
            "retraction": "column_norm",
        },
        {"params": matrices(*[(12, 5)] * 5, seed=130), "manifold": "oblique", "lr": 0.1},
        {"params": matrices(*[(9, 6)] * 7, seed=140), "weight_decay": 0.3},
        {"params": matrices((30, 10), (30, 10), seed=150), "manifold": "stiefel", "row_blocks": 3},
        {"params": matrices((14, 6), seed=160), "manifold": "spectral", "update_scale": "rows_over_cols"},
    ]


def several_types() -> list[dict[str, Any]]:
    """float32, float64, and half precision with its float32 master."""
    half = matrices((20, 8), (8, 20), (18, 8), seed=200, dtype=torch.bfloat16)
    double = matrices((12, 6), (6, 12), (10, 10), seed=210, dtype=torch.float64)
    single = matrices((20, 8), (22, 8), (18, 8), seed=220)
    return [
        {"params": [half[0], single[0], double[0], half[1]], "manifold": "stiefel", "lr": 0.1},
        {"params": [double[1], half[2], single[1]], "manifold": "dgram", "lr": 0.05},
        {"params": [single[2], double[2]], "weight_decay": 0.1},
    ]


def one_item_of_each_type() -> list[dict[str, Any]]:
    types = (torch.float32, torch.float64, torch.bfloat16)
    params = [matrices((20, 8), seed=300, dtype=dtype)[0] for dtype in types]
    return [{"params": params, "manifold": "stiefel"}]


def one_matrix() -> list[dict[str, Any]]:
    """Nothing to do for any rank but one."""
    return [{"params": matrices((12, 7), seed=400), "manifold": "stiefel"}]


def slow_solvers() -> list[dict[str, Any]]:
    """Five matrices of one kind are a batch of four and one of one."""
    return [
        {"params": matrices(*[(12, 7)] * 5, seed=500), "manifold": "stiefel", "solver": "exact"},
        {"params": matrices(*[(14, 6)] * 5, seed=510), "solver": "dual_ascent", "manifold": "dgram"},
        {
            "params": matrices((12, 12), (20, 6), seed=520),
            "manifold": "stiefel",
            "solver": "dual_ascent",
            "dual_impl": "reduced",
        },
    ]


def lr_on_the_device() -> list[dict[str, Any]]:
    """The second group stands still; what its matrices would become must not be sent either."""
    moving = {"params": matrices((12, 7), (9, 9), (7, 12), seed=600), "lr": torch.tensor(0.05)}
    still = {"params": matrices((12, 7), (8, 8), seed=610), "lr": torch.tensor(0.0)}
    return [group | {"manifold": "stiefel"} for group in (moving, still)]


CASES = {
    case.__name__: case
    for case in (
        one_type,
        several_types,
        one_item_of_each_type,
        one_matrix,
        slow_solvers,
        lr_on_the_device,
    )
}


def has_gradient(case: str, parameter: int, step: int) -> bool:
    """In `one_type` one matrix of a batch never has one, some have them now and then; step 2 has none."""
    if case != "one_type":
        return True
    return step != 2 and parameter != 8 and bool(parameter % 4 or step % 2)


def run(
    case: str,
    group: dist.ProcessGroup | bool | None,
    *,
    steps: Sequence[int] = STEPS,
    seed: int = 0,
    checkpoint: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything there is to know of some steps of one case."""
    optimizer = ManifoldMuon(CASES[case](), process_group=group)
    params = [p for g in optimizer.param_groups for p in g["params"]]
    if checkpoint is None:
        optimizer.retract_()
    else:
        with torch.no_grad():
            for parameter, weight in zip(params, checkpoint["weights"], strict=True):
                parameter.copy_(weight)
        optimizer.load_state_dict(checkpoint["state"])
    start = [p.detach().clone() for p in params]
    updated: list[tuple[float, int]] = []  # cost and matrices of each batch that this rank computes
    update = optimizer._update

    def noted(item: Any) -> Any:
        updated.append((item.cost, len(item.members)))
        return update(item)

    optimizer._update = noted
    optimizer.measure = True
    number = {id(p): k for k, p in enumerate(params)}
    telemetry = []
    for step in steps:
        for k, p in enumerate(params):
            p.grad = None
            if has_gradient(case, k, step):
                p.grad = gaussian(*p.shape, seed=100_000 * (seed + 1) + 1000 * step + k).to(p.dtype)
        optimizer.step()
        telemetry.append(
            [
                (number[id(t.parameter)], t.block, t.residual, t.distance, t.direction_norm, t.update_ratio)
                for t in optimizer.telemetry()
            ]
        )
    return {
        "start": start,
        "weights": [p.detach() for p in params],
        "state": optimizer.state_dict(),
        "telemetry": telemetry,
        "updated": updated,
    }


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 24, bias=False), nn.Linear(24, 4)]
    return nn.Sequential(*layers).double()


def train(model: nn.Module, shard: slice, group: bool | None) -> list[torch.Tensor]:
    """Ten steps of ManifoldMuon and AdamW on this rank's part of every batch."""
    muon = ManifoldMuon(
        [p for p in model.parameters() if p.ndim == 2], lr=0.05, manifold="stiefel", process_group=group
    )
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.01)
    muon.retract_()
    for step in range(10):
        x, y = gaussian(16, 12, seed=step)[shard], gaussian(16, 4, seed=100 + step)[shard]
        nn.functional.mse_loss(model(x), y).backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


# --- the processes -------------------------------------------------------------------------------


@contextmanager
def group_of(world: int, rank: int, folder: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous-{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    _left.append(dist.group.WORLD)
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


_left: list[object] = []
"""Every group of a process, for the reason that `trainers.distributed` keeps its last."""


def everything(folder: Path) -> None:
    """What one process does: every case in every world that it belongs to. A world of one has, besides,
    the runs without a process group that the others are measured by."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for world in WORLDS:
        if rank >= world:
            continue
        with group_of(world, rank, folder):
            found = {case: run(case, True) for case in CASES}
            if world == 3:
                torch.save(found["several_types"], folder / f"checkpoint-{rank}.pt")
                dist.barrier()
            # Every rank resumes from the file of another one: any of them is complete.
            checkpoint = torch.load(folder / f"checkpoint-{(rank + 1) % 3}.pt", weights_only=True)
            found["resumed"] = run("several_types", True, steps=LATER, checkpoint=checkpoint)
            found["explicit"] = run("one_type", dist.group.WORLD)
            if world == 4:
                halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
                found["half"] = run("one_type", halves[rank % 2], seed=rank % 2)
            if world == 2:
                part = slice(8 * rank, 8 * rank + 8)
                found["ddp"] = train(nn.parallel.DistributedDataParallel(network()), part, True)
            if world == 1:
                found |= {f"{case} alone": run(case, None) for case in CASES}
                found["uninterrupted"] = run("several_types", None, steps=[*STEPS, *LATER])
                found["half 0"], found["half 1"] = (run("one_type", None, seed=k) for k in range(2))
                found["no ddp"] = train(network(), slice(None), None)
            torch.save(found, folder / f"{world}-{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """What each (world size, rank) found. One set of processes forms all worlds, one after the other."""
    folder = tmp_path_factory.mktemp("ranks")
    log = folder / "log"
    ranks.finish(ranks.start(max(WORLDS), everything, folder, log=log), log)
    return {
        (world, rank): torch.load(folder / f"{world}-{rank}.pt", weights_only=True)
        for world in WORLDS
        for rank in range(world)
    }


def assert_same(a: Any, b: Any) -> None:
    """Equal in structure, dtypes and every bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(a: dict[str, Any], b: dict[str, Any]) -> None:
    for what in ("start", "weights", "state", "telemetry"):
        assert_same(a[what], b[what])


# --- the tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", sorted(WORLDS))
@pytest.mark.parametrize("case", CASES)
def test_every_rank_has_the_bits_of_a_single_process(results, world, case):
    """Weights, momentum, masters and telemetry."""
    for rank in range(world):
        assert_same_run(results[world, rank][case], results[1, 0][f"{case} alone"])


def test_the_cases_show_what_they_are_for(results):
    """They move what has a gradient, leave the rest, and have telemetry of all that moved."""
    alone = results[1, 0]["one_type alone"]
    moved = [not torch.equal(a, b) for a, b in zip(alone["start"], alone["weights"], strict=True)]
    assert moved == [k != 8 for k in range(22)]
    assert [len(rows) for rows in alone["telemetry"]] == [18, 25, 0, 25, 18]
    assert [t[:2] for t in alone["telemetry"][1]] == [
        *((k, 0) for k in range(19) if k != 8),
        *((k, block) for k in (19, 20) for block in range(3)),
        (21, 0),
    ]
    types = [dict(s) for s in results[1, 0]["several_types alone"]["state"]["state"].values()]
    assert [s["master"].dtype for s in types if "master" in s] == [torch.float32] * 3
    assert {s["momentum_buffer"].dtype for s in types} == {torch.float32, torch.float64}


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("case", ["one_type", "several_types", "slow_solvers", "lr_on_the_device"])
def test_the_work_is_divided(results, world, case):
    """Every batch is computed once, and no rank has more than its share and one batch."""
    batches = [results[world, rank][case]["updated"] for rank in range(world)]
    whole = results[1, 0][f"{case} alone"]["updated"]
    assert sorted(b for own in batches for b in own) == sorted(whole)
    steps = len({step for step in STEPS if any(has_gradient(case, k, step) for k in range(99))})
    total = sum(cost for cost, _ in whole)
    largest = steps * max(cost for cost, _ in whole)
    assert max(sum(cost for cost, _ in own) for own in batches) <= total / world + largest
    assert all(0 < len(own) < len(whole) for own in batches)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_single_matrix_is_one_rank_s_work(results, world):
    counts = sorted(len(results[world, rank]["one_matrix"]["updated"]) for rank in range(world))
    assert counts == [0] * (world - 1) + [len(STEPS)]


@pytest.mark.parametrize("world", [2, 3])
def test_batches_of_several_types_do_not_all_go_to_one_rank(results, world):
    counts = [len(results[world, rank]["one_item_of_each_type"]["updated"]) for rank in range(world)]
    assert max(counts) == len(STEPS) * math.ceil(3 / world)


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_a_group_can_be_named(results, world):
    for rank in range(world):
        assert_same_run(results[world, rank]["explicit"], results[1, 0]["one_type alone"])


def test_a_group_can_be_a_part_of_the_ranks(results):
    """Two groups of two with gradients of their own; rank 2 is the second of the first."""
    for rank in range(4):
        assert_same_run(results[4, rank]["half"], results[1, 0][f"half {rank % 2}"])
        assert len(results[4, rank]["half"]["updated"]) < len(results[1, 0]["half 0"]["updated"])
    assert not torch.equal(results[4, 0]["half"]["weights"][0], results[4, 1]["half"]["weights"][0])


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_a_checkpoint_knows_no_world_size(results, world):
    """Three ranks' checkpoint, continued by any number of ranks, is the run that was never stopped."""
    uninterrupted = results[1, 0]["uninterrupted"]
    for rank in range(world):
        resumed = results[world, rank]["resumed"]
        assert_same(resumed["weights"], uninterrupted["weights"])
        assert_same(resumed["state"], uninterrupted["state"])
        assert_same(resumed["telemetry"], uninterrupted["telemetry"][len(STEPS) :])


def test_ddp_is_a_single_process_with_the_whole_batch(results):
    """Not to the bit: the gradient's sum is taken in another order."""
    first, second = results[2, 0]["ddp"], results[2, 1]["ddp"]
    assert_same(first, second)
    for shared, alone in zip(first, results[1, 0]["no ddp"], strict=True):
        assert torch.allclose(shared, alone, atol=1e-5, rtol=0)
