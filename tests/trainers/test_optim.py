"""ManifoldMuon: against the naive step, its options, its state, its fixed points, its groups."""

from __future__ import annotations

import copy
import io
import math
import pickle
import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from torch import nn

import trainers.optim
from trainers.config import RunConfig, ScheduleConfig
from trainers.flops import parameter_count
from trainers.manifold import METHODS, SOLVERS, distance, retract, solve
from trainers.manifold.msign import polar_near
from trainers.models.gpt2 import GPT2
from trainers.optim import ManifoldMuon
from trainers.param_groups import classify, optimizer_groups
from trainers.schedule import lr_factor

SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (12, 12)}
WAYS = [
    ("none", None),
    ("stiefel", "polar"),
    ("dgram", "svd_sorted"),
    ("dgram", "column_norm"),
    ("oblique", "normalize"),
    ("spectral", "scale"),
]
"""Every manifold with every way back to it."""
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More of them would wait for one another: the matrices are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrices(
    *shapes: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[nn.Parameter]:
    return [nn.Parameter(gaussian(*shape, seed=seed + k).to(dtype)) for k, shape in enumerate(shapes)]


def set_gradients(optimizer: ManifoldMuon, seed: int, scale: float = 1.0) -> None:
    for k, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        p.grad = (scale * gaussian(*p.shape, seed=1000 * (seed + 1) + k)).to(p.dtype)


def take_steps(optimizer: ManifoldMuon, steps: range) -> None:
    for k in steps:
        set_gradients(optimizer, k)
        optimizer.step()


def masters(optimizer: ManifoldMuon) -> list[torch.Tensor]:
    """The weights that are updated: of a half precision parameter its float32 master."""
    return [
        optimizer.state[p].get("master", p).detach()
        for group in optimizer.param_groups
        for p in group["params"]
    ]


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


# --- the formula ---------------------------------------------------------------------------------


def test_momentum_is_nesterov_s(monkeypatch):
    """Against plain numbers, with a direction that is G itself."""
    monkeypatch.setattr(trainers.optim, "solve", lambda W, G, manifold, **options: G)
    W = nn.Parameter(torch.tensor([[0.5, -2.0], [1.0, 3.0]], dtype=torch.float64))
    optimizer = ManifoldMuon([W], lr=0.1, momentum=0.9)
    expected, buffers = W.flatten().tolist(), [0.0] * 4
    for k in range(4):
        W.grad = gaussian(2, 2, seed=k)
        gradients = W.grad.flatten().tolist()
        optimizer.step()
        for i, g in enumerate(gradients):
            buffers[i] = 0.9 * buffers[i] + g
            expected[i] -= 0.1 * (g + 0.9 * buffers[i])
        assert W.flatten().tolist() == pytest.approx(expected, rel=1e-14)
        assert W.grad.flatten().tolist() == gradients
    assert optimizer.state[W]["momentum_buffer"].flatten().tolist() == pytest.approx(buffers, rel=1e-14)


def test_options_of_each_group_reach_the_solver(monkeypatch):
    seen = []

    def noted(W: torch.Tensor, G: torch.Tensor, manifold: str, **options: Any) -> torch.Tensor:
        seen.append((manifold, options))
        return solve(W, G, manifold, **options)

    monkeypatch.setattr(trainers.optim, "solve", noted)
    ours = {
        "solver": "exact",
        "dual_steps": 7,
        "dual_alpha": 0.3,
        "dual_impl": "reduced",
        "polish": True,
        "exact_steps": 1,
        "cg_steps": 5,
        "msign_steps": 9,
        "msign_dtype": torch.bfloat16,
        "msign_method": "polar_express",
    }
    V, W = matrices((8, 5), (8, 5))
    optimizer = ManifoldMuon([{"params": [V], "manifold": "stiefel", **ours}, {"params": [W]}])
    set_gradients(optimizer, 0)
    optimizer.step()
    assert seen[0] == ("stiefel", ours)
    assert seen[1][0] == "none"
    assert seen[1][1] == {
        "solver": "projected",
        "dual_steps": 20,
        "dual_alpha": 0.1,
        "dual_impl": "published",
        "polish": False,
        "exact_steps": None,
        "cg_steps": 16,
        "msign_steps": None,
        "msign_dtype": torch.float64,  # None: the parameter's own, where that is not float32
        "msign_method": "gram",
    }


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize(("manifold", "way"), WAYS)
@pytest.mark.parametrize("lr", [0.01, 0.3, 2.0])
def test_a_step_is_decay_then_direction_then_retraction(manifold, way, lr, decay):
    """Of all shapes at once; the optimizer knows how far it moved, and retracts no less exactly for it."""
    params = matrices(*SHAPES.values())
    optimizer = ManifoldMuon(params, lr=lr, weight_decay=decay, manifold=manifold, retraction=way)
    optimizer.retract_()
    before = [p.detach().clone() for p in params]
    set_gradients(optimizer, 0)
    optimizer.step()
    for W, p in zip(before, params, strict=True):
        A = solve(W, 1.95 * p.grad, manifold, msign_method="gram")
        V = retract(W * (1 - lr * decay) - lr * A, manifold, method=way)
        assert torch.allclose(p, V, atol=1e-6)  # the iterations near a manifold end at 1e-7


@pytest.mark.parametrize(
    ("shape", "row_blocks", "scale"),
    [((24, 6), 1, 2.0), ((6, 24), 1, 1.0), ((8, 8), 1, 1.0), ((24, 6), 4, 1.0), ((48, 6), 2, 2.0)],
)
def test_rows_over_cols_scales_the_step_of_a_tall_block(shape, row_blocks, scale):
    one, other = (matrices(shape)[0] for _ in range(2))
    start = one.detach().clone()
    for W, way in ((one, "unit"), (other, "rows_over_cols")):
        W.grad = gaussian(*shape, seed=1)
        ManifoldMuon([W], lr=0.1, row_blocks=row_blocks, update_scale=way).step()
    assert torch.allclose(other - start, scale * (one - start), atol=1e-12)


@pytest.mark.parametrize("manifold", ["stiefel", "dgram", "oblique", "none"])
@pytest.mark.parametrize(
    ("shape", "blocks"), [((36, 12), 3), ((72, 12), 3), ((36, 12), 9), ((36, 12), 12), ((10, 4), 1)]
)
def test_row_blocks_are_separate_parameters(manifold, shape, blocks):
    """Bit for bit: a fused query-key-value weight (square and tall blocks), and its heads (wide ones)."""
    [fused] = matrices(shape, dtype=torch.float32)
    parts = [nn.Parameter(part.clone()) for part in fused.detach().chunk(blocks)]
    optimizers = [
        ManifoldMuon([fused], lr=0.04, manifold=manifold, row_blocks=blocks),
        ManifoldMuon(parts, lr=0.04, manifold=manifold),
    ]
    for optimizer in optimizers:
        optimizer.retract_()
    for k in range(3):
        fused.grad = gaussian(*shape, seed=k).float()
        for part, gradient in zip(parts, fused.grad.chunk(blocks), strict=True):
            part.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(fused, torch.cat(parts))


def test_a_transposed_view_is_a_parameter_like_another():
    plain, transposed = nn.Parameter(gaussian(12, 5)), nn.Parameter(gaussian(12, 5).t().contiguous().t())
    assert not transposed.is_contiguous()
    for W in (plain, transposed):
        optimizer = ManifoldMuon([W], lr=0.1, manifold="stiefel", row_blocks=2)
        optimizer.retract_()
        take_steps(optimizer, range(3))
    assert torch.allclose(plain, transposed, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("manifold", "way"), WAYS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_solver_steps_on_every_manifold_in_every_type(manifold, way, solver, dtype):
    params = matrices(*SHAPES.values(), dtype=dtype)
    optimizer = ManifoldMuon(params, lr=0.02, manifold=manifold, retraction=way, solver=solver)
    optimizer.retract_()
    start = [p.detach().clone() for p in params]
    take_steps(optimizer, range(3))
    for p, W, before in zip(params, masters(optimizer), start, strict=True):
        assert p.dtype == dtype
        assert torch.isfinite(W).all()
        assert not torch.equal(p, before)
        assert torch.equal(p, W.to(dtype))  # a parameter is its master, rounded
        size = float((W.double().mT @ W.double()).norm()) if manifold == "dgram" else 1.0
        # What corrections in bfloat16 leave; the spectral norm is within 1e-4, by its definition.
        assert distance(W.double(), manifold) < 5e-4 * size


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("manifold", "way"), WAYS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_spoils_its_own_matrix_alone(manifold, way, solver, bad):
    """It shares its batch with the others, which move as they do without it."""
    runs = []
    for value in (0.0, bad):
        params = matrices(*[(9, 5)] * 3)
        optimizer = ManifoldMuon(params, lr=0.1, manifold=manifold, retraction=way, solver=solver)
        optimizer.retract_()
        set_gradients(optimizer, 0)
        params[1].grad[2, 3] = value
        optimizer.step()
        runs.append([p.detach() for p in params])
    assert torch.isfinite(runs[0][1]).all()
    assert runs[1][1].isnan().any()
    for k in (0, 2):
        assert torch.allclose(runs[0][k], runs[1][k], atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("manifold", "way"), [w for w in WAYS if w[1] != "svd_sorted"])
@pytest.mark.parametrize("lr", [0.02, 1.0])
def test_without_a_gradient_s_pull_a_weight_stays(manifold, way, solver, lr):
    """Gradients and momentum are zero. (`svd_sorted` is no identity on the manifold.)"""
    params = matrices(*SHAPES.values())
    optimizer = ManifoldMuon(params, lr=lr, manifold=manifold, retraction=way, solver=solver)
    optimizer.retract_()
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, W in zip(params, before, strict=True):
        assert torch.allclose(p, W, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_directions_longer_than_one_do_not_spoil_the_retraction(method):
    """`newton_schulz` is up to 1.3 long, longer than the radius that the retraction is told."""
    params = matrices(*SHAPES.values(), dtype=torch.float32)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (0.04, 0.3, 0.48), strict=True)]
    optimizer = ManifoldMuon(groups, manifold="stiefel", msign_method=method)
    optimizer.retract_()
    take_steps(optimizer, range(30))
    assert max(float(distance(p.detach().double(), "stiefel")) for p in params) < 5e-4


# --- the learning rate ---------------------------------------------------------------------------


@pytest.mark.parametrize(("manifold", "way"), WAYS)
def test_an_lr_on_the_device_is_a_number_that_may_change(manifold, way):
    runs = {}
    for kind, lr in (("float", 0.0), ("tensor", torch.tensor(0.0))):
        params = matrices(*SHAPES.values())
        optimizer = ManifoldMuon(params, lr=lr, weight_decay=0.2, manifold=manifold, retraction=way)
        optimizer.retract_()
        for k, value in enumerate((0.01, 0.2, 0.0, 0.03)):
            if kind == "float":
                optimizer.param_groups[0]["lr"] = value
            else:
                lr.fill_(value)
            set_gradients(optimizer, k)
            optimizer.step()
        runs[kind] = torch.cat([p.detach().flatten() for p in params])
    # A float tells the retraction how far the step went, and the retraction ends at 1e-7.
    assert torch.allclose(runs["float"], runs["tensor"], atol=2e-6)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize(("manifold", "way"), WAYS)
def test_zero_lr_changes_no_bit_of_a_weight(manifold, way, kind, dtype):
    """Also of one that is not on its manifold, where the retraction is no identity, and with decay."""
    lr = 0.0 if kind == "float" else torch.tensor(0.0)
    params = matrices(*SHAPES.values(), dtype=dtype)
    start = [p.detach().clone() for p in params]
    optimizer = ManifoldMuon(params, lr=lr, weight_decay=0.5, manifold=manifold, retraction=way)
    gradients = []
    for k in range(2):
        set_gradients(optimizer, k)
        gradients.append([p.grad.clone() for p in params])
        optimizer.step()
    for k, (p, W, before) in enumerate(zip(params, masters(optimizer), start, strict=True)):
        assert torch.equal(p, before)
        assert torch.equal(W, before.to(W.dtype))
        buffer = optimizer.state[p]["momentum_buffer"]
        first, second = (g[k].to(buffer.dtype) for g in gradients)
        assert torch.equal(buffer, 0.95 * first + second)


def test_a_thousand_steps_with_zero_lr_change_nothing():
    """The lr is on the device: of a float 0 the optimizer knows that there is nothing to do."""
    params = matrices(*[(10, 4)] * len(WAYS), dtype=torch.float32)
    params[1] = nn.Parameter(params[1].detach().bfloat16())  # stiefel, with a master
    groups = [
        {"params": [p], "manifold": manifold, "retraction": way}
        for p, (manifold, way) in zip(params, WAYS, strict=True)
    ]
    optimizer = ManifoldMuon(groups, lr=torch.tensor(0.0), weight_decay=0.1)
    optimizer.retract_()
    before = [W.clone() for W in masters(optimizer)]
    set_gradients(optimizer, 0)
    for _ in range(1000):
        optimizer.step()
    for W, start in zip(masters(optimizer), before, strict=True):
        assert W.dtype == torch.float32
        assert torch.equal(W, start)


# --- drift ---------------------------------------------------------------------------------------


def farthest(optimizer: ManifoldMuon, steps: int, manifold: str) -> float:
    """Largest distance from the manifold, for dgram relative to ‖WᵀW‖, looked at every 20 steps.

    Gradients that always pull the same way are the worst for drift.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    pull = [gaussian(*p.shape, seed=77 + k).float() for k, p in enumerate(params)]
    noise = torch.Generator().manual_seed(5)
    optimizer.retract_()
    worst = 0.0
    for k in range(steps):
        for p, gradient in zip(params, pull, strict=True):
            p.grad = gradient + 0.1 * torch.randn(p.shape, generator=noise)
        optimizer.step()
        if k % 20 == 19:
            for p in params:
                W = p.detach().double()
                size = torch.linalg.matrix_norm(W.mT @ W) if manifold == "dgram" else 1.0
                worst = max(worst, float(distance(W, manifold) / size))
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lr", [1e-3, 0.02, 0.048, 0.3, 1.0])
def test_stiefel_stays_on_its_manifold_over_a_thousand_float32_steps(lr, dtype):
    """`dtype` is that of directions and corrections; .048 is the largest lr whose corrections are coarse."""
    params = matrices((24, 12), (12, 24), (12, 12), dtype=torch.float32)
    optimizer = ManifoldMuon(params, lr=lr, manifold="stiefel", msign_dtype=dtype)
    assert farthest(optimizer, 1000, "stiefel") < 5e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_larger_stiefel_matrix_stays_on_its_manifold(dtype):
    [W] = matrices((192, 64), dtype=torch.float32)
    optimizer = ManifoldMuon([W], lr=0.02, manifold="stiefel", msign_dtype=dtype)
    assert farthest(optimizer, 1000, "stiefel") < 5e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lr", [1e-3, 0.02, 0.3])
def test_column_norm_keeps_columns_orthogonal_over_three_hundred_steps(lr, dtype):
    params = matrices((24, 12), (12, 24), (12, 12), (96, 32), dtype=torch.float32)
    optimizer = ManifoldMuon(params, lr=lr, manifold="dgram", retraction="column_norm", msign_dtype=dtype)
    assert farthest(optimizer, 300, "dgram") < 1e-3


# --- state ---------------------------------------------------------------------------------------


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def of_every_kind(dtype: torch.dtype, **options: Any) -> ManifoldMuon:
    fused, *rest = matrices((24, 8), (8, 12), (12, 8), (9, 9), (10, 6), dtype=dtype)
    groups = [
        {"params": [fused], "manifold": "stiefel", "row_blocks": 3},
        {"params": rest[:2], "manifold": "dgram", "retraction": "column_norm", "lr": 0.07},
        {"params": rest[2:], "weight_decay": 0.1, "solver": "exact", "msign_dtype": torch.float32},
    ]
    return ManifoldMuon(groups, **options)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_checkpoint_continues_to_the_same_bits(dtype):
    first = of_every_kind(dtype, lr=0.03, momentum=0.9)
    first.retract_()
    take_steps(first, range(4))
    state = saved_and_loaded(first.state_dict())
    second = of_every_kind(dtype, lr=99.0, momentum=0.0)  # overwritten by the checkpoint
    pairs = list(
        zip(
            *([p for g in optimizer.param_groups for p in g["params"]] for optimizer in (first, second)),
            strict=True,
        )
    )
    with torch.no_grad():
        for p, q in pairs:
            q.copy_(p)
    second.load_state_dict(state)
    for kept, loaded in zip(first.param_groups, second.param_groups, strict=True):
        assert {k: v for k, v in kept.items() if k != "params"} == {
            k: v for k, v in loaded.items() if k != "params"
        }
    for optimizer in (first, second):
        take_steps(optimizer, range(4, 7))
    for p, q in pairs:
        assert torch.equal(p, q)
        assert first.state[p].keys() == second.state[q].keys()
        for key, value in first.state[p].items():
            assert second.state[q][key].dtype == value.dtype
            assert torch.equal(second.state[q][key], value)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_state_of_half_precision_parameters_is_float32_and_survives_exactly(dtype):
    first, second = (of_every_kind(dtype) for _ in range(2))
    first.retract_()
    take_steps(first, range(3))
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    for a, b in zip(first.state.values(), second.state.values(), strict=True):
        assert set(a) == {"momentum_buffer", "master"}
        for key, value in a.items():
            assert value.dtype == b[key].dtype == torch.float32
            assert torch.equal(value, b[key])
            assert not torch.equal(value, value.to(dtype).float())  # it has more than dtype could keep


def test_a_loaded_state_is_the_optimizer_s_own():
    """Loading copies, so that two optimizers from one checkpoint go separate ways."""
    first = of_every_kind(torch.float32)
    take_steps(first, range(1))
    state = first.state_dict()
    before = copy.deepcopy(state["state"])
    second = of_every_kind(torch.float32)
    second.load_state_dict(state)
    take_steps(second, range(1, 3))
    for number, tensors in before.items():
        for key, value in tensors.items():
            assert torch.equal(state["state"][number][key], value)


def test_an_lr_on_the_device_is_part_of_the_checkpoint():
    lr = torch.tensor(0.05)
    [W] = matrices((8, 5))
    optimizer = ManifoldMuon([W], lr=lr)
    take_steps(optimizer, range(2))
    state = saved_and_loaded(optimizer.state_dict())
    lr.fill_(0.5)
    optimizer.load_state_dict(state)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05)
    before = W.detach().clone()
    take_steps(optimizer, range(2, 3))
    assert float(torch.linalg.matrix_norm(W.detach() - before, 2)) == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_a_copied_optimizer_steps_as_the_original(duplicate):
    """As those of torch.optim do."""
    first = of_every_kind(torch.float32)
    take_steps(first, range(2))
    second = duplicate(first)
    for optimizer in (first, second):
        take_steps(optimizer, range(2, 4))
    for a, b in zip(masters(first), masters(second), strict=True):
        assert a is not b
        assert torch.equal(a, b)


def test_a_group_may_be_added_after_some_steps():
    """It starts with no momentum and leaves that of the others alone; each moves as if it were alone."""
    V, W = matrices((9, 5), (9, 5))
    alone = [nn.Parameter(M.detach().clone()) for M in (V, W)]
    optimizer = ManifoldMuon([V], lr=0.1)
    take_steps(optimizer, range(2))
    optimizer.add_param_group({"params": [W], "lr": 0.3, "manifold": "oblique"})
    optimizer.retract_()
    for k in range(2, 4):
        V.grad, W.grad = gaussian(9, 5, seed=k), gaussian(9, 5, seed=10 + k)
        optimizer.step()
    first = ManifoldMuon([alone[0]], lr=0.1)
    take_steps(first, range(2))
    second = ManifoldMuon([alone[1]], lr=0.3, manifold="oblique")
    second.retract_()
    for k in range(2, 4):
        alone[0].grad, alone[1].grad = gaussian(9, 5, seed=k), gaussian(9, 5, seed=10 + k)
        first.step()
        second.step()
    assert torch.equal(V, alone[0])
    assert torch.equal(W, alone[1])


BAD_OPTIONS = [
    ({"manifold": "stifel"}, "unknown manifold"),
    ({"solver": "adam"}, "unknown solver"),
    ({"msign_method": "svd"}, "unknown msign_method"),
    ({"update_scale": "cols"}, "unknown update_scale"),
    ({"manifold": "stiefel", "retraction": "svd_sorted"}, "has no retraction"),
    ({"lr": -1.0}, "lr must not be negative"),
    ({"momentum": -0.1}, "momentum must not be negative"),
    ({"weight_decay": -0.1}, "weight_decay must not be negative"),
    ({"row_blocks": 3}, "row_blocks 3 do not divide 4 rows"),
    ({"row_blocks": 0}, "row_blocks 0 do not divide 4 rows"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ManifoldMuon([nn.Parameter(gaussian(4, 3))], **options)
    with pytest.raises(ValueError, match=message):
        ManifoldMuon([{"params": [nn.Parameter(gaussian(4, 3))], **options}])


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_of_an_added_group_are_errors(options, message):
    optimizer = ManifoldMuon([nn.Parameter(gaussian(4, 3))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(gaussian(4, 3))], **options})


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"needs matrices; a parameter has shape \(4,\)"):
        ManifoldMuon([nn.Parameter(torch.zeros(4))])
    with pytest.raises(ValueError, match=r"needs matrices; a parameter has shape \(4,\)"):
        ManifoldMuon(matrices((4, 3))).add_param_group({"params": [nn.Parameter(torch.zeros(4))]})


# --- the device ----------------------------------------------------------------------------------


def test_a_meta_tensor_refuses_to_be_read():
    """What the next test relies on."""
    with pytest.raises(RuntimeError):
        bool(torch.ones(1, device="meta").all())
    with pytest.raises(RuntimeError):
        torch.ones(1, device="meta").item()


@pytest.mark.parametrize("solver", [*SOLVERS, "polished", "reduced"])
@pytest.mark.parametrize(("manifold", "way"), WAYS)
def test_a_step_reads_nothing_back_from_the_device(manifold, way, solver):
    """A CPU's numbers cost nothing and are read; the meta device takes the path of every other one."""
    variants = {
        "polished": {"solver": "projected", "polish": True},
        "reduced": {"solver": "dual_ascent", "dual_impl": "reduced"},
    }
    options = variants.get(solver, {"solver": solver}) | {"dual_steps": 2, "cg_steps": 2}
    with torch.device("meta"):
        params = [nn.Parameter(torch.empty(shape)) for shape in SHAPES.values()]
        params += [nn.Parameter(torch.empty(24, 10, dtype=torch.bfloat16))]
        groups = [
            {"params": params[:2], "lr": 0.02, "row_blocks": 2},
            {"params": params[2:], "lr": torch.tensor(0.02), "weight_decay": 0.1},
        ]
    optimizer = ManifoldMuon(groups, manifold=manifold, retraction=way, **options)
    optimizer.measure = True
    optimizer.retract_()
    for _ in range(2):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()


# --- telemetry -----------------------------------------------------------------------------------


@pytest.mark.parametrize("manifold", ["none", "stiefel", "dgram", "oblique"])
def test_telemetry_is_what_the_definitions_say(manifold, monkeypatch):
    """By plain formulas from the step's own direction; every matrix is tall and 10 wide."""
    directions = []

    def noted(*args: Any, **options: Any) -> torch.Tensor:
        directions.append(solve(*args, **options))
        return directions[-1]

    monkeypatch.setattr(trainers.optim, "solve", noted)
    params = matrices(*[(24, 10)] * 3)
    optimizer = ManifoldMuon(params, lr=0.3, manifold=manifold)
    optimizer.retract_()
    before = [p.detach().clone() for p in params]
    optimizer.measure = True
    take_steps(optimizer, range(1))
    rows = optimizer.telemetry()
    assert [t.parameter is p for t, p in zip(rows, params, strict=True)] == [True] * 3
    eye = torch.eye(10, dtype=torch.float64)
    masks = {"none": 0 * eye, "stiefel": 1 + 0 * eye, "dgram": 1 - eye, "oblique": eye}
    after = [p.detach() for p in params]
    for t, W, V, A in zip(rows, before, after, torch.cat(directions), strict=True):
        H = masks[manifold] * (W.T @ A + A.T @ W)
        error = masks[manifold] * (V.T @ V - eye)
        assert t.residual == pytest.approx(math.sqrt((H**2).mean()), abs=1e-12)
        assert t.distance == pytest.approx(math.sqrt((error**2).sum()), abs=1e-9)
        assert t.direction_norm == pytest.approx(float(torch.linalg.svdvals(A)[0]), rel=0.01)
        assert t.direction_norm == pytest.approx(1, abs=0.02)
        assert t.update_ratio == pytest.approx(float((V - W).norm() / W.norm()), rel=1e-9)
    if manifold == "stiefel":
        assert min(t.residual for t in rows) > 0.01  # no test of zeros


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("manifold", "way"), WAYS)
def test_the_norm_of_every_direction_is_one(manifold, way, solver):
    """Within two percent, also where msign is in bfloat16."""
    params = matrices((40, 16), (16, 40), (16, 16), dtype=torch.float32)
    optimizer = ManifoldMuon(
        params, manifold=manifold, retraction=way, solver=solver, msign_dtype=torch.bfloat16
    )
    optimizer.retract_()
    optimizer.measure = True
    take_steps(optimizer, range(3))
    for t in optimizer.telemetry():
        assert t.direction_norm == pytest.approx(1, abs=0.02)


def test_telemetry_is_in_the_order_of_the_groups():
    """Whatever the batches, which are by group and shape and hold four matrices at most."""
    params = matrices((8, 4), (6, 6), (4, 8), (6, 6), (8, 4), (12, 4), (4, 8), (9, 3), (12, 4))
    groups = [{"params": params[:5]}, {"params": params[5:], "row_blocks": 3}]
    with pytest.raises(ValueError, match="row_blocks 3 do not divide 4 rows"):
        ManifoldMuon(groups)
    params.pop(6)
    groups[1]["params"] = params[5:]
    optimizer = ManifoldMuon(groups, manifold="stiefel")
    optimizer.retract_()
    optimizer.measure = True
    set_gradients(optimizer, 0)
    params[2].grad = None
    optimizer.step()
    number = {id(p): k for k, p in enumerate(params)}
    found = [(number[id(t.parameter)], t.block) for t in optimizer.telemetry()]
    fused = [(k, block) for k in (5, 6, 7) for block in range(3)]
    assert found == [(0, 0), (1, 0), (3, 0), (4, 0), *fused]


def test_telemetry_of_a_block_is_that_block_s():
    [fused] = matrices((24, 8))
    optimizer = ManifoldMuon([fused], manifold="oblique", row_blocks=3, lr=0.1)
    optimizer.retract_()
    before = fused.detach().clone()
    optimizer.measure = True
    take_steps(optimizer, range(1))
    ratios = [
        float((new - old).norm() / old.norm())
        for new, old in zip(fused.detach().chunk(3), before.chunk(3), strict=True)
    ]
    assert [t.update_ratio for t in optimizer.telemetry()] == pytest.approx(ratios, rel=1e-9)
    assert len({round(r, 6) for r in ratios}) == 3


def test_only_a_measured_step_leaves_telemetry():
    optimizer = ManifoldMuon(matrices((8, 5), (5, 8)))
    assert optimizer.telemetry() == []
    take_steps(optimizer, range(1))
    assert optimizer.telemetry() == []
    optimizer.measure = True
    take_steps(optimizer, range(1, 2))
    assert len(optimizer.telemetry()) == 2
    optimizer.measure = False
    take_steps(optimizer, range(2, 3))
    assert optimizer.telemetry() == []


def test_measuring_changes_no_bit():
    runs = []
    for measure in (False, True):
        optimizer = of_every_kind(torch.bfloat16)
        optimizer.retract_()
        optimizer.measure = measure
        take_steps(optimizer, range(3))
        runs.append(masters(optimizer))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


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


def test_the_schedule_is_nanogpt_s():
    schedule = ScheduleConfig()  # the paper's
    assert 6e-4 * lr_factor(0, schedule) == pytest.approx(6e-4 / 1001)
    assert lr_factor(999, schedule) == pytest.approx(1000 / 1001)
    assert lr_factor(1000, schedule) == 1.0
    assert lr_factor(25_500, schedule) == pytest.approx(0.55)
    assert 6e-4 * lr_factor(50_000, schedule) == pytest.approx(6e-5)


def test_a_wide_step_is_near_although_its_gram_error_is_not_small():
    """‖E‖_F grows with the width where ‖E‖₂, which decides, does not."""
    W = torch.linalg.qr(gaussian(900, 600)).Q.float()
    A = torch.linalg.qr(gaussian(900, 600, seed=1)).Q.float()
    V = (W - 0.06 * A).unsqueeze(0)
    assert torch.linalg.matrix_norm(V.mT @ V - torch.eye(600)) > 1
    near = polar_near(V, 0.1)
    assert near is not None
    assert distance(near[0].double(), "stiefel") < 1e-4
    assert polar_near(3 * V, 0.1) is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_steps_take_no_fresh_memory_from_the_system():
    """Each page that comes back from the system is a fault. Above 32 MiB malloc would ask for every one."""
    script = """
import resource, statistics, torch
from torch import nn
from trainers.optim import ManifoldMuon
weights = [nn.Parameter(torch.randn(70_000, 128)), nn.Parameter(torch.randn(128, 70_000))]
optimizer = ManifoldMuon(weights, manifold="dgram", retraction="column_norm")
optimizer.retract_()
faults = []
for step in range(9):  # the heap still grows in some
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    optimizer.step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(faults))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8_000  # of 4 KiB; one temporary matrix takes 8,750
