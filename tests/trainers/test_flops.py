"""Counted arithmetic against what torch really multiplies, and against the models' real parameters."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainers.config import RunConfig
from trainers.flops import (
    direction_flops,
    forward_flops_per_token,
    optimizer_step_flops,
    parameter_count,
    retraction_flops,
)
from trainers.manifold import retract, solve
from trainers.models import build
from trainers.train import DTYPES

OPTIONS = [
    {"solver": "projected"},
    {"solver": "projected", "polish": True, "msign": "gram"},
    {"solver": "projected", "msign": "gram", "msign_dtype": "bfloat16"},
    {"solver": "exact"},
    {"solver": "exact", "msign": "gram", "cg_steps": 5, "exact_steps": 1},
    {"solver": "dual_ascent", "dual_steps": 3},
    {"solver": "dual_ascent", "dual_steps": 3, "dual_impl": "reduced", "msign": "newton_schulz"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("manifold", ["none", "stiefel", "dgram", "oblique"])
@pytest.mark.parametrize("shape", [(48, 16), (20, 16), (16, 16), (16, 64)])
def test_a_direction_takes_the_flops_that_are_planned(shape, manifold, options):
    run = RunConfig.model_validate({"optimizer": {"muon": options}})
    muon = run.optimizer.muon
    W = retract(torch.randn(shape), manifold, method="column_norm" if manifold == "dgram" else None)
    with FlopCounterMode(display=False) as counter:
        solve(
            W,
            torch.randn(shape),
            manifold,
            solver=muon.solver,
            polish=muon.polish,
            dual_steps=muon.dual_steps,
            dual_impl=muon.dual_impl,
            exact_steps=muon.exact_steps,
            cg_steps=muon.cg_steps,
            msign_method=muon.msign,
            msign_dtype=DTYPES[muon.msign_dtype or "float32"],
        )
    assert direction_flops(*shape, manifold, run) == pytest.approx(counter.get_total_flops(), rel=0.06)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("fields", [{}, {"d_ff": 24, "attention": "relu", "qk_norm": True}])
def test_a_model_has_the_parameters_and_flops_that_are_planned(family, fields):
    shape = {"n_layer": 2, "n_head": 2, "d_model": 16, "context": 32, "vocab_size": 300}
    config = RunConfig.model_validate({"model": {"family": family, **shape, **fields}}).model
    model = build(config)
    model.initialize(0)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config)
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    # The fused kernel of a CPU is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(tokens)
    planned = 32 * forward_flops_per_token(config)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_each_of_queries_keys_and_values_is_counted():
    def flops(qkv: str) -> float:
        muon = {"qkv": qkv, "solver": "projected"}
        fields = {
            "optimizer": {"muon": muon},
            "assignment": {"attn": "stiefel", "mlp": {"optimizer": "adamw"}},
        }
        return optimizer_step_flops(RunConfig.model_validate(fields))

    run = RunConfig.model_validate({"optimizer": {"muon": {"solver": "projected"}}})
    square = direction_flops(768, 768, "stiefel", run) + retraction_flops(768, 768, "stiefel", run)
    assert flops("split") == pytest.approx(12 * 4 * square)  # Q, K, V and the output of 12 layers
    head = direction_flops(64, 768, "stiefel", run) + retraction_flops(64, 768, "stiefel", run)
    assert flops("per_head") == pytest.approx(12 * (36 * head + square))
