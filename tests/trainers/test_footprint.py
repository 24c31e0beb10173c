"""Planned bytes against what torch really keeps and allocates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from trainers.config import RunConfig
from trainers.distributed import Group
from trainers.footprint import Footprint, footprint, largest_micro_batch, usable
from trainers.models import Model, build
from trainers.param_groups import classify
from trainers.train import _optimizers

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = Group(0, 1, torch.device("cpu"))
MICRO = 4
SHAPE = {"n_layer": 3, "n_head": 4, "d_model": 64, "context": 128, "vocab_size": 300}
XL = {
    "precision": "bfloat16",
    "model": {"n_layer": 48, "n_head": 25, "d_model": 1600},
    "assignment": {"attn": "stiefel", "mlp": "dgram"},
    "optimizer": {"muon": {"solver": "projected", "retraction": "column_norm"}},
}


def run_of(precision: str = "float32", checkpointing: bool = False, **model: Any) -> RunConfig:
    fields = {"precision": precision, "model": {**SHAPE, **model}}
    return RunConfig.model_validate(fields | {"runtime": {"activation_checkpointing": checkpointing}})


def model_of(run: RunConfig) -> Model:
    model = build(run.model)
    model.initialize(0)
    model.checkpointing = run.runtime.activation_checkpointing
    return model


def loss_of(model: Model, run: RunConfig) -> Tensor:
    tokens = torch.arange(MICRO * run.model.context).view(MICRO, -1) % run.model.vocab_size
    with torch.autocast("cpu", torch.bfloat16, enabled=run.precision == "bfloat16"):
        return model(tokens, tokens)


@contextmanager
def counting_saved(model: Model) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd keeps, weights excepted, by its address."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    kept = []  # or an address would be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def peak(work: Callable[[], object]) -> int:
    """The most bytes that `work` holds at once beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def planned(run: RunConfig) -> Footprint:
    return footprint(run, workers=1, micro_batch=MICRO)


VARIANTS = [
    {"precision": precision, "family": family, "attention": attention, "qk_norm": qk_norm}
    for precision, family, attention, qk_norm in product(
        ("float32", "bfloat16"), ("gpt2", "llama"), ("softmax", "relu", "sigmoid"), (False, True)
    )
]


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(fields, checkpointing):
    run = run_of(checkpointing=checkpointing, **fields)
    model = model_of(run)
    with counting_saved(model) as saved:
        loss = loss_of(model, run)
    assert loss.grad_fn
    plan = planned(run)
    copies = 0 if checkpointing else plan.weights - 4 * sum(p.numel() for p in model.parameters())
    logits = MICRO * 128 * 300 * 4  # of the three that the backward pass needs at once
    expected = plan.activations + copies + plan.logits - 2 * logits
    assert expected == pytest.approx(sum(saved.values()), rel=0.05)


@pytest.mark.parametrize(("family", "precision"), [("gpt2", "bfloat16"), ("llama", "float32")])
@pytest.mark.parametrize(
    "fields",
    [
        {"checkpointing": False},
        {"checkpointing": True},
        {"checkpointing": True, "attention": "relu"},
        {"checkpointing": True, "vocab_size": 5000},
    ],
    ids=lambda v: "-".join(map(str, v.values())),
)
def test_the_peak_of_forward_and_backward_is_planned(family, precision, fields):
    run = run_of(precision, family=family, **fields)
    model = model_of(run)
    for parameter in model.parameters():  # of an earlier micro batch
        parameter.grad = torch.zeros_like(parameter)
    plan = planned(run)
    copies = plan.weights - 4 * sum(p.numel() for p in model.parameters())
    expected = copies + plan.activations + max(plan.logits, plan.block)
    assert expected == pytest.approx(peak(lambda: loss_of(model, run).backward()), rel=0.15)


ASSIGNMENTS = [
    ({"attn": "none", "mlp": "none"}, {}),
    ({"attn": "stiefel", "mlp": "stiefel"}, {"solver": "projected"}),
    ({"attn": "stiefel", "mlp": "stiefel"}, {"solver": "plain"}),
    ({"attn": "dgram", "mlp": "dgram"}, {"solver": "projected"}),
    ({"attn": "dgram", "mlp": "dgram"}, {"solver": "projected", "retraction": "column_norm"}),
    ({"attn": "stiefel", "mlp": "dgram"}, {"solver": "dual_ascent", "dual_steps": 2}),
    ({"attn": "oblique", "mlp": "oblique"}, {"solver": "exact"}),
    ({"attn": "spectral", "mlp": "spectral"}, {"qkv": "split"}),
    ({"attn": {"optimizer": "adamw"}, "mlp": "stiefel"}, {"solver": "exact"}),
]


@pytest.mark.parametrize(("assignment", "muon"), ASSIGNMENTS)
def test_optimizers_hold_and_take_what_is_planned(assignment, muon):
    """At this width the batches of matrices are those of a GPU."""
    shape = {"n_layer": 1, "n_head": 4, "d_model": 96, "context": 8, "vocab_size": 300}
    run = RunConfig.model_validate({"model": shape, "assignment": assignment, "optimizer": {"muon": muon}})
    model = model_of(run)
    optimizers = _optimizers(classify(model), run, ALONE)
    if "muon" in optimizers:
        optimizers["muon"].retract_()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) / 100
    for optimizer in optimizers.values():
        optimizer.step()
    plan = planned(run)
    held = [value for o in optimizers.values() for state in o.state.values() for value in state.values()]
    assert plan.weights == sum(p.nbytes for p in model.parameters())
    assert plan.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert plan.optimizer == pytest.approx(sum(t.nbytes for t in held if t.ndim), rel=1e-3)
    taken = max(peak(optimizer.step) for optimizer in optimizers.values())
    assert taken / 1.01 < plan.temporaries < 1.3 * taken


def test_several_workers_hold_buckets_and_what_they_exchange():
    run = RunConfig.model_validate(XL)
    alone, eight = (footprint(run, workers=n, micro_batch=8) for n in (1, 8))
    assert eight.gradients == 2 * alone.gradients
    # Of 96 MLP matrices each rank updates 12 and gathers all: 9 times 12 matrices.
    assert eight.temporaries > 9 * 12 * 1600 * 6400 * 4
    assert (eight.weights, eight.optimizer, eight.activations) == (
        alone.weights,
        alone.optimizer,
        alone.activations,
    )


@pytest.mark.parametrize("workers", [1, 8])
def test_gpt2_xl_trains_on_80_gigabytes(workers):
    run = RunConfig.model_validate({**XL, "runtime": {"activation_checkpointing": True}})
    micro = largest_micro_batch(run, workers, usable(80))
    assert micro is not None
    assert micro >= 8
    assert footprint(run, workers=workers, micro_batch=micro).total <= usable(80)
    without = footprint(RunConfig.model_validate(XL), workers=workers, micro_batch=micro)
    assert without.activations > 5 * footprint(run, workers=workers, micro_batch=micro).activations


def test_the_largest_micro_batch_divides_the_share_and_the_next_does_not_fit():
    run = RunConfig.model_validate({**XL, "schedule": {"batch_size": 60}})
    for bytes_ in (usable(40), usable(48), usable(80)):
        micro = largest_micro_batch(run, 1, bytes_)
        assert micro is not None
        larger = min((n for n in range(micro + 1, 61) if 60 % n == 0), default=None)
        assert 60 % micro == 0
        assert footprint(run, workers=1, micro_batch=micro).total <= bytes_
        assert larger is None or footprint(run, workers=1, micro_batch=larger).total > bytes_
    assert largest_micro_batch(run, 1, usable(16)) is None
