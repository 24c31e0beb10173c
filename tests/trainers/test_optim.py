"""ManifoldMuon: against the naive step, its fixed points, its groups."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import nn

from trainers.config import RunConfig, ScheduleConfig
from trainers.flops import parameter_count
from trainers.manifold import distance
from trainers.models.gpt2 import GPT2
from trainers.optim import ManifoldMuon
from trainers.param_groups import classify, optimizer_groups
from trainers.schedule import lr_factor

SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (12, 12)}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("manifold", ["stiefel", "dgram", "oblique"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_three_steps_of_dual_ascent_are_three_naive_steps(manifold, shape):
    W = nn.Parameter(gaussian(*shape))
    published = {"solver": "dual_ascent", "msign_method": "polar_express"}
    optimizer = ManifoldMuon([W], lr=0.05, manifold=manifold, **published)
    optimizer.retract_()
    expected, buffer = oracle.retract(gaussian(*shape), manifold), torch.zeros(shape, dtype=torch.float64)
    for k in range(3):
        W.grad = gaussian(*shape, seed=10 + k)
        expected, buffer = oracle.step(expected, W.grad, buffer, manifold, lr=0.05)
        optimizer.step()
    assert torch.allclose(W, expected, atol=1e-5)


def test_the_unconstrained_step_is_decay_then_msign():
    W = nn.Parameter(gaussian(8, 6))
    before, W.grad = W.detach().clone(), gaussian(8, 6, seed=1)
    ManifoldMuon([W], lr=0.02, weight_decay=0.1).step()
    U, _, Vt = torch.linalg.svd(W.grad, full_matrices=False)  # the first direction is 1.95 times the gradient
    assert torch.allclose(W, before * (1 - 0.02 * 0.1) - 0.02 * (U @ Vt), atol=1e-6)


def test_decay_on_a_manifold_comes_before_the_retraction():
    W = nn.Parameter(gaussian(8, 6))
    optimizer = ManifoldMuon([W], lr=0.1, weight_decay=2.0, manifold="dgram", retraction="column_norm")
    optimizer.retract_()
    norms = W.detach().norm(dim=0)
    W.grad = torch.zeros_like(W)
    optimizer.step()
    assert distance(W, "dgram") < 1e-6
    assert torch.allclose(W.norm(dim=0), norms * (1 - 0.1 * 2.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("manifold", "way"), [("stiefel", None), ("dgram", "column_norm"), ("oblique", None)]
)
def test_zero_lr_is_a_fixed_point(manifold, way):
    W = nn.Parameter(gaussian(9, 5).float())
    optimizer = ManifoldMuon([W], lr=0.0, manifold=manifold, retraction=way)
    optimizer.retract_()
    before = W.detach().clone()
    for k in range(5):
        W.grad = gaussian(9, 5, seed=k).float()
        optimizer.step()
    assert torch.allclose(W, before, atol=1e-5)


def test_batches_are_loops():
    """Same-shape and transposed matrices share a batch; each moves as if it were alone."""
    shapes = [(9, 5), (5, 9), (9, 5), (6, 6)]

    together = [nn.Parameter(gaussian(*s, seed=k)) for k, s in enumerate(shapes)]
    alone = [nn.Parameter(M.detach().clone()) for M in together]
    optimizers = [ManifoldMuon(together, lr=0.1, manifold="stiefel")]
    optimizers += [ManifoldMuon([M], lr=0.1, manifold="stiefel") for M in alone]
    for optimizer in optimizers:
        optimizer.retract_()
    for k, (M, N) in enumerate(zip(together, alone, strict=True)):
        M.grad = gaussian(*M.shape, seed=50 + k)
        N.grad = M.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    for M, N in zip(together, alone, strict=True):
        assert torch.allclose(M, N, atol=1e-9)


def test_parameters_without_gradient_stay():
    W, V = nn.Parameter(gaussian(4, 3)), nn.Parameter(gaussian(4, 3, seed=1))
    optimizer = ManifoldMuon([W, V], lr=0.1)
    before, V.grad = W.detach().clone(), gaussian(4, 3)
    optimizer.step()
    assert torch.equal(W, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"manifold": "stifel"}, "unknown manifold"),
        ({"solver": "adam"}, "unknown solver"),
        ({"manifold": "stiefel", "retraction": "svd_sorted"}, "has no retraction"),
        ({"lr": -1.0}, "lr must not be negative"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ManifoldMuon([nn.Parameter(gaussian(4, 3))], **options)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"needs matrices; a parameter has shape \(4,\)"):
        ManifoldMuon([nn.Parameter(torch.zeros(4))])


# --- groups, model, schedule ---------------------------------------------------------------------


def small(**fields: object) -> RunConfig:
    model = {"n_layer": 2, "n_head": 2, "d_model": 16, "context": 8, "vocab_size": 256}
    return RunConfig.model_validate({"model": model, **fields})


def test_groups_are_a_partition_with_the_settings_of_the_paper():
    run = small(
        assignment={
            "attn": {"manifold": "dgram", "lr_multiplier": 0.5, "weight_decay": 0.3},
            "mlp": "none",
        }
    )
    named = classify(GPT2(run.model))
    muon, adamw = optimizer_groups(named, run)
    assert {g["kind"]: len(g["params"]) for g in muon + adamw} == {
        "attn": 4,
        "mlp": 4,
        "embedding": 2,
        "norm": 5,
    }
    attn, mlp = muon
    assert (attn["manifold"], attn["peak_lr"], attn["weight_decay"]) == ("dgram", 0.01, 0.3)
    assert (mlp["manifold"], mlp["peak_lr"], mlp["weight_decay"]) == ("none", 0.02, 0.1)
    assert [g["weight_decay"] for g in adamw] == [0.1, 0.0]


def test_an_adamw_arm_has_no_muon_group():
    run = small(assignment={"attn": {"optimizer": "adamw"}, "mlp": {"optimizer": "adamw"}})
    muon, adamw = optimizer_groups(classify(GPT2(run.model)), run)
    assert muon == []
    assert {g["kind"] for g in adamw} == {"attn", "mlp", "embedding", "norm"}


def test_a_parameter_of_no_kind_is_an_error():
    model = GPT2(small().model)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight.*0 kinds"):
        classify(model)


def test_arms_of_one_seed_share_their_initial_weights():
    first, second, other = (GPT2(small().model) for _ in range(3))
    first.initialize(7)
    second.initialize(7)
    other.initialize(8)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.wte.weight, other.wte.weight)
    std = {name: float(p.detach().std()) for name, p in first.named_parameters() if p.ndim == 2}
    assert std["wte.weight"] == pytest.approx(0.02, rel=0.1)
    assert std["h.0.mlp.c_proj.weight"] == pytest.approx(0.02 / math.sqrt(4), rel=0.1)


def test_gpt2_small_has_124_million_parameters():
    with torch.device("meta"):
        model = GPT2(RunConfig().model)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == parameter_count(RunConfig().model) == 124_373_760


def test_attention_sees_no_later_token():
    model = GPT2(small().model)
    model.initialize(0)
    tokens = torch.arange(8).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 5] = 99
    difference = (model.logits(tokens) - model.logits(changed)).abs().amax(dim=-1)[0]
    assert (difference[:5] == 0).all()
    assert (difference[5:] > 0).all()


def test_the_schedule_is_nanogpt_s():
    schedule = ScheduleConfig()  # the paper's
    assert 6e-4 * lr_factor(0, schedule) == pytest.approx(6e-4 / 1001)
    assert lr_factor(999, schedule) == pytest.approx(1000 / 1001)
    assert lr_factor(1000, schedule) == 1.0
    assert lr_factor(25_500, schedule) == pytest.approx(0.55)
    assert 6e-4 * lr_factor(50_000, schedule) == pytest.approx(6e-5)


@pytest.mark.parametrize("lr", [1e-3, 0.02, 0.3, 1.0])
def test_stiefel_stays_on_its_manifold_over_a_thousand_float32_steps(lr):
    """Gradients that always pull the same way are the worst for drift."""
    W = nn.Parameter(gaussian(24, 12).float())
    optimizer = ManifoldMuon([W], lr=lr, manifold="stiefel")
    optimizer.retract_()
    pull = gaussian(24, 12, seed=1).float()
    for k in range(1000):
        W.grad = pull + 0.1 * gaussian(24, 12, seed=k).float()
        optimizer.step()
    assert distance(W.detach().double(), "stiefel") < 5e-4
