"""Any optimizer's step, then back to the manifold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainers.manifold import RETRACTIONS, distance, msign, retract
from trainers.optim import ManifoldMuon
from trainers.retraction import retract_after_steps

WAYS = [(manifold, way) for manifold, ways in RETRACTIONS.items() for way in ways]
SHAPES = ((24, 10), (10, 24), (12, 12))


def weights(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def optimizers(groups: list[dict]) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1),
        torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        torch.optim.Muon(groups, lr=0.02),
    ]


@pytest.mark.parametrize(("manifold", "way"), WAYS)
@pytest.mark.parametrize("number", range(3))
def test_weights_are_on_their_manifold_from_the_start_and_after_every_step(manifold, way, number):
    free, bound = weights(0), weights(1)
    groups = [{"params": free}, {"params": bound, "manifold": manifold, "retraction": way}]
    optimizer = optimizers(groups)[number]
    start = [w.clone() for w in free]
    retract_after_steps(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(free, start, strict=True))
    for step in range(4):
        assert max(float(distance(w.detach(), manifold)) for w in bound) < 2e-5
        give_gradients([*free, *bound], step)
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(free, start, strict=True))


@pytest.mark.parametrize(("manifold", "way"), WAYS)
def test_a_step_is_the_optimizers_own_and_then_the_retraction(manifold, way):
    bound = weights()
    optimizer = torch.optim.AdamW([{"params": bound, "manifold": manifold, "retraction": way}], lr=3e-3)
    retract_after_steps(optimizer)
    expected = [retract(w.detach(), manifold, method=way) for w in weights()]
    twins = [nn.Parameter(w.clone()) for w in expected]
    bare = torch.optim.AdamW(twins, lr=3e-3)
    for step in range(5):
        for parameters, stepped in ((bound, optimizer), (twins, bare)):
            give_gradients(parameters, step)
            stepped.step()
        with torch.no_grad():
            for twin in twins:  # in float64, from scratch
                twin.copy_(retract(twin.double(), manifold, method=way))
    torch.testing.assert_close(bound, twins, atol=2e-5, rtol=2e-4)


def test_blocks_of_rows_are_matrices_of_their_own():
    fused = nn.Parameter(torch.randn(30, 10))
    retract_after_steps(
        torch.optim.SGD([{"params": [fused], "manifold": "stiefel", "row_blocks": 3}], lr=0.1)
    )
    for block in fused.detach().view(3, 10, 10):
        assert float(distance(block, "stiefel")) < 1e-5
    assert float(distance(fused.detach(), "stiefel")) > 1


def test_nothing_moves_without_a_learning_rate_or_a_gradient():
    still, without = nn.Parameter(torch.randn(9, 4)), nn.Parameter(torch.randn(9, 4))
    groups = [
        {"params": [still], "manifold": "dgram", "retraction": "svd_sorted", "lr": 0.0},
        {"params": [without], "manifold": "stiefel", "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    retract_after_steps(optimizer)
    before = [still.clone(), without.clone()]
    give_gradients([still], 0)
    optimizer.step()
    assert torch.equal(still, before[0])
    assert torch.equal(without, before[1])


def test_a_step_under_autocast_is_the_same():
    results = []
    for enabled in (False, True):
        bound = weights()
        optimizer = torch.optim.AdamW([{"params": bound, "manifold": "stiefel"}], lr=3e-3)
        retract_after_steps(optimizer)
        give_gradients(bound, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            optimizer.step()
        results.append([w.detach() for w in bound])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("weight", "blocks", "words"),
    [
        (torch.zeros(4), 1, r"shape \(4,\)"),
        (torch.zeros(4, 2, dtype=torch.bfloat16), 1, "bfloat16"),
        (torch.zeros(4, 2), 3, "do not divide 4 rows"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_moves(weight, blocks, words):
    good = nn.Parameter(torch.randn(6, 3))
    before = good.clone()
    groups = [
        {"params": [good], "manifold": "stiefel"},
        {"params": [nn.Parameter(weight)], "manifold": "stiefel", "row_blocks": blocks},
    ]
    with pytest.raises(ValueError, match=words):
        retract_after_steps(torch.optim.SGD(groups, lr=0.1))
    assert torch.equal(good, before)


@pytest.mark.parametrize("manifold", ["stiefel", "dgram", "oblique", "spectral"])
def test_plain_muon_is_muon_and_a_retraction(manifold):
    weight = nn.Parameter(torch.randn(24, 10, dtype=torch.float64))
    optimizer = ManifoldMuon(
        [weight], lr=0.02, manifold=manifold, solver="plain", msign_method="newton_schulz"
    )
    optimizer.retract_()
    W, buffer = weight.detach().clone(), torch.zeros(24, 10, dtype=torch.float64)
    for step in range(3):
        give_gradients([weight], step)
        buffer = 0.95 * buffer + weight.grad
        A = msign(weight.grad + 0.95 * buffer, method="newton_schulz")
        W = retract(W - 0.02 * A, manifold)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), W, atol=1e-9, rtol=1e-9)
