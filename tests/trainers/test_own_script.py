"""ManifoldMuon in a training script of one's own: a model that this project has never seen, with the
parts of torch that such scripts are made of. (Data parallelism is in test_sharding.py.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from trainers.manifold import distance
from trainers.optim import ManifoldMuon


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More of them would wait for one another: the matrices are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Tagger(nn.Module):
    """Fused projections, wide, tall and square matrices, an embedding, biases, norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16, bias=False)
        self.head = nn.Linear(16, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x)


def tagger() -> Tagger:
    torch.manual_seed(0)
    return Tagger()


def two_optimizers(model: Tagger, **options: Any) -> tuple[ManifoldMuon, torch.optim.AdamW]:
    fused = model.attention.in_proj_weight
    hidden = [model.attention.out_proj.weight, model.up.weight, model.down.weight]
    muon = ManifoldMuon(
        [{"params": [fused], "row_blocks": 3}, {"params": hidden}],
        **{"lr": 0.05, "manifold": "stiefel"} | options,
    )
    ours = {id(fused), *map(id, hidden)}
    others = [p for p in model.parameters() if id(p) not in ours]
    muon.retract_()
    return muon, torch.optim.AdamW(others, lr=0.01)


def loss_of(model: Callable[[torch.Tensor], torch.Tensor], step: int = 0) -> torch.Tensor:
    """Predict each token's successor modulo 32."""
    tokens = torch.randint(32, (8, 12), generator=torch.Generator().manual_seed(step))
    logits = model(tokens)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), (tokens.flatten() + 1) % 32)


def off_manifold(muon: ManifoldMuon) -> float:
    matrices = [
        M for g in muon.param_groups for p in g["params"] for M in p.detach().double().chunk(g["row_blocks"])
    ]
    return max(float(distance(M, "stiefel")) for M in matrices)


@pytest.mark.parametrize("solver", ["projected", "exact", "dual_ascent"])
def test_a_foreign_model_learns_on_its_manifold(solver):
    model = tagger()
    optimizers = two_optimizers(model, solver=solver)
    first = loss_of(model).item()
    for step in range(60):
        loss_of(model, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert first > 3
    assert loss_of(model, 100) < 0.3
    assert off_manifold(optimizers[0]) < 5e-4


def test_clipping_is_a_matter_of_the_gradient():
    """A clipped step is the step of the clipped gradient; nothing is kept of what it was before."""
    runs = []
    for clip in (True, False):
        model = tagger()
        muon, _ = two_optimizers(model)
        for step in range(3):
            muon.zero_grad()
            loss_of(model, step).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            else:
                norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
                for p in model.parameters():
                    p.grad = p.grad * min(1.0, float(0.1 / (norm + 1e-6)))
            muon.step()
        runs.append(model.up.weight.detach())
    assert torch.allclose(*runs, atol=1e-3)  # directions in bfloat16 where the CPU has it


def test_autocast():
    model = tagger()
    optimizers = two_optimizers(model)
    for step in range(60):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(torch.zeros(1, 1, dtype=torch.long)).dtype == torch.bfloat16
            loss = loss_of(model, step)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert loss_of(model, 100) < 0.3
    assert off_manifold(optimizers[0]) < 5e-4


def test_a_step_inside_autocast_is_the_same_step():
    """A script may leave the context open around everything."""
    runs = []
    for enabled in (False, True):
        model = tagger()
        muon, _ = two_optimizers(model, msign_dtype=torch.float32)
        loss_of(model).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            muon.step()
        runs.append(model.up.weight.detach())
    assert torch.allclose(*runs, atol=1e-6)


def test_a_model_in_bfloat16():
    """Its weights are rounded, their float32 masters are on the manifold."""
    model = tagger().bfloat16()
    muon, adamw = two_optimizers(model)
    for step in range(60):
        loss_of(model, step).backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    assert loss_of(model, 100) < 0.5
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16, name
    master = muon.state[model.up.weight]["master"]
    assert distance(master.double(), "stiefel") < 5e-4
    assert torch.equal(model.up.weight, master.bfloat16())


def test_grad_scaler_skips_a_step_whose_gradients_overflow():
    """Nothing moves then, no weight and no momentum; the steps after it are those of a run without it."""
    plain, scaled = tagger(), tagger()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    muon, _ = two_optimizers(scaled)
    scaler.scale(loss_of(scaled)).backward()
    scaled.up.weight.grad[0, 0] = torch.inf
    before = scaled.up.weight.detach().clone()
    scaler.unscale_(muon)
    scaler.step(muon)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    assert torch.equal(scaled.up.weight, before)
    assert not muon.state
    for step in range(3):
        scaled.zero_grad()
        scaler.scale(loss_of(scaled, step)).backward()
        scaler.step(muon)
        scaler.update()
    reference, _ = two_optimizers(plain)
    for step in range(3):
        plain.zero_grad()
        loss_of(plain, step).backward()
        reference.step()
    # The scale is a power of two: neither it nor its inverse rounds.
    assert torch.equal(plain.up.weight, scaled.up.weight)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda k: k / 4, lambda k: 0.5**k]),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, T_max=5)],
        milestones=[3],
    ),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=10),
}


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_any_optimizer(name, kind):
    """lr of each step, and the momentum where the schedule cycles it, are SGD's; a step goes that far."""
    U, V = (nn.Parameter(torch.randn(8, 5, generator=torch.Generator().manual_seed(k))) for k in range(2))

    def groups() -> list[dict[str, Any]]:
        return [
            {"params": [p], "lr": torch.tensor(lr) if kind == "tensor" else lr}
            for p, lr in ((U, 0.1), (V, 0.05))
        ]

    ours, theirs = ManifoldMuon(groups()), torch.optim.SGD(groups(), lr=0.1, momentum=0.95)
    schedules = [SCHEDULES[name](optimizer) for optimizer in (ours, theirs)]
    for k in range(8):
        lrs = [float(g["lr"]) for g in ours.param_groups]
        assert lrs == [float(g["lr"]) for g in theirs.param_groups]
        assert [g["momentum"] for g in ours.param_groups] == [g["momentum"] for g in theirs.param_groups]
        before = [p.detach().clone() for p in (U, V)]
        for p in (U, V):
            p.grad = torch.randn(8, 5, generator=torch.Generator().manual_seed(10 + k))
        ours.step()
        for p, old, lr in zip((U, V), before, lrs, strict=True):
            moved = float(torch.linalg.matrix_norm(p.detach() - old, 2))
            assert moved == pytest.approx(lr, rel=0.03, abs=1e-6)
        theirs.zero_grad()
        theirs.step()  # schedulers warn of an optimizer that has not stepped
        for schedule in schedules:
            schedule.step()
    assert isinstance(ours.param_groups[0]["lr"], torch.Tensor) == (kind == "tensor")


def test_reduce_on_plateau():
    [W] = [nn.Parameter(torch.eye(4))]
    optimizer = ManifoldMuon([W], lr=0.4)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 1.0, 1.0):
        schedule.step(loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_a_compiled_model_trains_as_the_plain_one():
    runs = []
    for compiled in (False, True):
        model = tagger().double()
        muon, adamw = two_optimizers(model)
        call = torch.compile(model, backend="eager") if compiled else model
        for step in range(3):
            loss_of(call, step).backward()
            for optimizer in (muon, adamw):
                optimizer.step()
                optimizer.zero_grad()
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*runs, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulated_gradients_are_one_gradient(set_to_none):
    """Also where zero_grad leaves zeros."""
    runs = []
    for parts in (1, 2):
        model = tagger().double()
        muon, _ = two_optimizers(model)
        for step in range(2):
            muon.zero_grad(set_to_none=set_to_none)
            tokens = torch.randint(32, (8, 12), generator=torch.Generator().manual_seed(step))
            for part in tokens.chunk(parts):
                logits = model(part).flatten(0, 1)
                (nn.functional.cross_entropy(logits, (part.flatten() + 1) % 32) / parts).backward()
            muon.step()
        runs.append(model.up.weight.detach())
    assert torch.allclose(*runs, atol=1e-6)


def test_a_closure_is_called_once_with_gradients_on():
    model = tagger()
    muon, _ = two_optimizers(model)
    losses = []

    def closure() -> torch.Tensor:
        muon.zero_grad()
        loss = loss_of(model)
        loss.backward()
        losses.append(loss)
        return loss

    before = model.up.weight.detach().clone()
    with torch.no_grad():
        returned = muon.step(closure)
    assert losses == [returned]
    assert not torch.equal(model.up.weight, before)


def test_step_hooks_are_called():
    model = tagger()
    muon, _ = two_optimizers(model)
    calls = []
    muon.register_step_pre_hook(lambda *_: calls.append("before"))
    muon.register_step_post_hook(lambda *_: calls.append("after"))
    loss_of(model).backward()
    muon.step()
    assert calls == ["before", "after"]


def test_a_script_s_own_checkpoint_continues_to_the_same_bits(tmp_path):
    """Model, both optimizers, a schedule and a scaler, through a file."""

    def everything() -> dict[str, Any]:
        model = tagger()
        muon, adamw = two_optimizers(model)
        schedule = lr_scheduler.CosineAnnealingLR(muon, T_max=10)
        scaler = torch.amp.GradScaler("cpu")
        return {"model": model, "muon": muon, "adamw": adamw, "schedule": schedule, "scaler": scaler}

    def train(parts: dict[str, Any], steps: range) -> None:
        for step in steps:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(parts["model"], step)
            parts["scaler"].scale(loss).backward()
            for optimizer in (parts["muon"], parts["adamw"]):
                parts["scaler"].step(optimizer)
                optimizer.zero_grad()
            parts["scaler"].update()
            parts["schedule"].step()

    first, second = everything(), everything()
    train(first, range(4))
    torch.save({name: part.state_dict() for name, part in first.items()}, tmp_path / "checkpoint.pt")
    for name, state in torch.load(tmp_path / "checkpoint.pt", weights_only=True).items():
        second[name].load_state_dict(state)
    for parts in (first, second):
        train(parts, range(4, 7))
    for p, q in zip(first["model"].parameters(), second["model"].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_distributed_checkpoints_find_all_state(dtype):
    """torch.distributed.checkpoint names state by parameter, and fills that of a fresh optimizer."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def model_and_optimizer() -> tuple[nn.Module, ManifoldMuon]:
        torch.manual_seed(0)
        model = nn.Linear(12, 8, bias=False).to(dtype)
        return model, ManifoldMuon(model.parameters(), manifold="stiefel")

    def step(model: nn.Module, optimizer: ManifoldMuon, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        model.weight.grad = torch.randn(8, 12, generator=generator).to(dtype)
        optimizer.step()

    (model, optimizer), (other, restored) = model_and_optimizer(), model_and_optimizer()
    optimizer.retract_()
    for k in range(3):
        step(model, optimizer, k)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, restored, get_optimizer_state_dict(model, optimizer))
    for pair in ((model, optimizer), (other, restored)):
        step(*pair, 3)
    assert torch.equal(model.weight, other.weight)
