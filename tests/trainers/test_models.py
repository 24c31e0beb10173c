"""Both model families: what they compute, against a plain rewriting, and what they must never see."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import ranks
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from trainers import distributed
from trainers.config import ModelConfig
from trainers.models import build
from trainers.models.attention import rotate
from trainers.models.decoder import Decoder
from trainers.param_groups import classify

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"n_layer": 2, "n_head": 2, "d_model": 16, "context": 8, "vocab_size": 256}
VARIANTS = [
    {"family": family, "attention": attention, "qk_norm": qk_norm}
    for family in ("gpt2", "llama")
    for attention in ("softmax", "sigmoid", "relu")
    for qk_norm in (False, True)
]


def model_of(**fields: object) -> torch.nn.Module:
    model = build(ModelConfig.model_validate({**SMALL, **fields}))
    model.initialize(0)
    return model.double()


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_attention_is_its_formula(fields):
    """Token by token, head by head."""
    attention = model_of(**fields).h[0].attn
    torch.manual_seed(1)
    torch.nn.init.normal_(attention.c_attn.weight)  # scores of some size
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    q, k, v = (x[0] @ part.mT for part in attention.c_attn.weight.split(16))
    rows = []
    for i in range(8):
        heads = []
        for h in (slice(0, 8), slice(8, 16)):
            scores = []
            for j in range(i + 1):
                a, b = q[i, h], k[j, h]
                if fields["qk_norm"]:
                    a, b = (t / t.square().mean().sqrt() for t in (a, b))
                if fields["family"] == "llama":
                    a, b = turned(a, i), turned(b, j)
                scores.append(a @ b / math.sqrt(8))
            z = torch.stack(scores)
            weights = {
                "softmax": lambda z: z.softmax(0),
                "sigmoid": lambda z: torch.sigmoid(z - math.log(8)),
                "relu": lambda z: z.clamp_min(0) / len(z),
            }[fields["attention"]](z)
            heads.append(weights @ v[: i + 1, h])
        rows.append(torch.cat(heads))
    expected = torch.stack(rows) @ attention.c_proj.weight.mT
    assert torch.allclose(attention(x)[0], expected, atol=1e-6)


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    """Rotary positions as complex numbers."""
    frequency = 10_000.0 ** (-torch.arange(0, len(x), 2) / len(x)).double()
    turn = torch.polar(torch.ones_like(frequency), position * frequency)
    y = torch.complex(*x.chunk(2)) * turn
    return torch.cat([y.real, y.imag])


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    turned_q, turned_k = rotate(q.expand(1, 1, 20, 8)), rotate(k.expand(1, 1, 20, 8))
    scores = (turned_q @ turned_k.mT)[0, 0]
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-6)


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_no_token_sees_a_later_one(fields):
    model = model_of(**fields)
    tokens = torch.arange(8).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 5] = 99
    difference = (model.logits(tokens) - model.logits(changed)).abs().amax(dim=-1)[0]
    assert (difference[:5] == 0).all()
    assert (difference[5:] > 0).all()


def test_swiglu_is_its_formula():
    mlp = model_of(family="llama", d_ff=24).h[0].mlp
    x = torch.randn(3, 16, dtype=torch.float64)
    expected = (F.silu(x @ mlp.w1.weight.mT) * (x @ mlp.w3.weight.mT)) @ mlp.w2.weight.mT
    assert mlp.w1.weight.shape == (24, 16)
    assert torch.allclose(mlp(x), expected)


def test_every_llama_parameter_has_a_kind():
    kinds = [p.kind for p in classify(model_of(family="llama"))]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "attn": 4,
        "mlp": 6,
        "embedding": 1,
        "norm": 5,
    }


@pytest.mark.parametrize(("kind", "shared"), [("softmax", True), ("sigmoid", False), ("relu", False)])
def test_pointwise_attention_ignores_what_other_tokens_score(kind, shared):
    """Of softmax the weights sum to 1, so a louder token takes from the others; here it does not."""
    attention = model_of(attention=kind).h[0].attn
    torch.nn.init.normal_(attention.c_attn.weight)
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    q, k, v = attention.heads(x)
    louder = k.clone()
    louder[:, :, 0] += 5 * q[:, :, 7]
    v = v.clone()
    v[:, :, 0] = 0  # it says nothing itself
    outputs = []
    for keys in (k, louder):
        attention.heads = lambda _, taken=(q, keys, v): taken
        outputs.append(attention(x)[0, 7])
    assert torch.allclose(*outputs, atol=1e-9) is not shared


# --- activation checkpointing -------------------------------------------------------------------

TOKENS = torch.randint(256, (4, 8), generator=torch.Generator().manual_seed(3))


def trained(call, model: Decoder, precision: str = "float32", micro: int = 4) -> list[torch.Tensor]:
    """Loss and gradients of a batch in micro batches, as the training loop makes them."""
    torch.manual_seed(5)
    losses = []
    chunks = TOKENS.split(micro)
    for n, chunk in enumerate(chunks, start=1):
        last = n == len(chunks)
        quiet = nullcontext() if last or not isinstance(call, DistributedDataParallel) else call.no_sync()
        with quiet:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                losses.append(call(chunk, chunk.roll(1, dims=1)))
            losses[-1].backward()
    return [*losses, *(p.grad for p in model.parameters())]


def decoder(*, checkpointing: bool, **fields: object) -> Decoder:
    model = build(ModelConfig.model_validate({**SMALL, **fields}))
    model.initialize(0)
    model.checkpointing = checkpointing
    return model


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("attention", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpointing_changes_no_bit(family, attention, dropout, precision):
    fields = {"family": family, "attention": attention, "dropout": dropout}
    kept, again = (decoder(checkpointing=c, **fields) for c in (False, True))
    assert same_bits(trained(again, again, precision, 2), trained(kept, kept, precision, 2))
    again.eval()
    kept.eval()
    assert torch.equal(again(TOKENS, TOKENS), kept(TOKENS, TOKENS))


def test_checkpointing_runs_every_block_twice_in_training_alone():
    model = decoder(checkpointing=True)
    runs = []
    for block in model.h:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    trained(model, model)
    assert len(runs) == 2 * len(model.h)
    runs.clear()
    trained(model.eval(), model)
    assert len(runs) == len(model.h)


def test_checkpointing_changes_no_bit_where_graphs_are_captured():
    """Captured whole, in forward and backward, by the front half of torch.compile."""
    kept, again = (decoder(checkpointing=c) for c in (False, True))
    compiled = torch.compile(again, backend="aot_eager", fullgraph=True)
    assert same_bits(trained(compiled, again, "bfloat16"), trained(kept, kept, "bfloat16"))


def of_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    with distributed.join("cpu") as group:
        for checkpointing in (False, True):
            model = decoder(checkpointing=checkpointing, dropout=0.2)
            found = trained(DistributedDataParallel(model), model, "bfloat16", 2)
            torch.save(found, folder / f"{checkpointing}-{group.rank}.pt")


def test_checkpointing_changes_no_bit_under_ddp_with_accumulation(tmp_path):
    log = tmp_path / "log"
    ranks.finish(ranks.start(2, of_rank, tmp_path, log=log), log)
    for rank in range(2):
        kept, again = (torch.load(tmp_path / f"{c}-{rank}.pt") for c in (False, True))
        assert same_bits(kept, again)
