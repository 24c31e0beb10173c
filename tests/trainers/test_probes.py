"""The probes against dense float64 arithmetic, and against what they must not disturb."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import SPECTRA, gaussian, hard_cases, one_thread, spectrum, with_spectrum
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trainers.config import ModelConfig, RunConfig
from trainers.models import build
from trainers.optim import ManifoldMuon
from trainers.param_groups import classify, optimizer_groups
from trainers.probes import attention
from trainers.probes.attention import attention_records, row_statistics, walk
from trainers.probes.flow import Flow, bidiagonal, largest_singular_values, start_vector
from trainers.probes.spectra import head_records, head_spectra

pytestmark = pytest.mark.usefixtures("single")
single = pytest.fixture(autouse=True, scope="module")(one_thread)

SMALL = {"n_layer": 2, "n_head": 2, "d_model": 16, "context": 100, "vocab_size": 64}
VARIANTS = [
    {"family": family, "attention": kind, "qk_norm": qk_norm}
    for family in ("gpt2", "llama")
    for kind in ("softmax", "sigmoid", "relu")
    for qk_norm in (False, True)
]
seeds = st.integers(0, 9_999)


def model_of(scale: float = 30.0, **fields: object) -> nn.Module:
    """A model in float64 with scores of some size."""
    model = build(ModelConfig.model_validate({**SMALL, **fields}))
    model.initialize(0)
    with torch.no_grad():
        for block in model.h:
            block.attn.c_attn.weight *= scale
    return model.double()


def tokens_of(T: int, S: int = 2) -> torch.Tensor:
    return torch.randint(64, (S, T), generator=torch.Generator().manual_seed(1))


# --- attention: rows -----------------------------------------------------------------------------


def dense(p: torch.Tensor) -> tuple[float, float, float]:  # (T,)
    """H, max p and ‖diag(p) - ppᵀ‖_F, entry by entry; 1 - p_i is the sum of the others."""
    J = -torch.outer(p, p)
    for i in range(len(p)):
        J[i, i] = p[i] * (p[:i].sum() + p[i + 1 :].sum())
    return float(-torch.xlogy(p, p).sum()), float(p.max()), float(J.norm())


@given(seeds, st.integers(1, 48), st.floats(-3, 3), st.floats(-1e4, 1e4), st.sampled_from(["flat", "gapped"]))
@settings(max_examples=150, deadline=None)
def test_row_statistics_are_those_of_the_dense_softmax(seed, T, decades, shift, kind):
    z = gaussian(T, seed=seed) * 10**decades
    if kind == "gapped":
        z[seed % T] += 10**decades * 5
    z = (z + shift).float()
    expected = dense(z.double().softmax(0))
    for dtype, rel in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        entropy, p_max, jacobian = (float(x) for x in row_statistics(z.to(dtype)))
        assert p_max == pytest.approx(expected[1], rel=rel)
        assert entropy == pytest.approx(expected[0], rel=rel, abs=1e-15)
        assert jacobian == pytest.approx(expected[2], rel=rel, abs=1e-15)


@given(st.floats(0, 80))
def test_the_norm_near_one_hot_keeps_its_digits(gap):
    """Of two tokens ‖J‖ = 2 p (1 - p); sums of powers of p in float32 would end at 3e-4."""
    gap = float(torch.tensor(gap))
    _, _, jacobian = row_statistics(torch.tensor([3.0 * gap, 4.0 * gap]))
    gap = float(torch.tensor(4.0 * gap)) - float(torch.tensor(3.0 * gap))
    exact = 2 * math.exp(-gap) / (1 + math.exp(-gap)) ** 2
    assert float(jacobian) == pytest.approx(exact, rel=1e-4, abs=1e-18)


@pytest.mark.parametrize("size", [1e4, 1e6, 1e30])
def test_huge_scores_are_one_hot_or_tied(size):
    tied = torch.tensor(
        [[size, 0, -size, 0], [size, size, -size, 0], [-size, -math.inf, -math.inf, -math.inf]]
    )
    entropy, p_max, jacobian = row_statistics(tied)
    assert entropy.tolist() == pytest.approx([0, math.log(2), 0], abs=1e-6)
    assert p_max.tolist() == [1, 0.5, 1]
    assert jacobian.tolist() == pytest.approx([0, 0.5, 0], abs=1e-12)


def test_uniform_and_one_hot_rows_are_told_apart():
    """‖J‖ is small for both."""
    rows = torch.zeros(2, 1024)
    rows[1, 500] = 1e3
    entropy, p_max, jacobian = row_statistics(rows)
    assert (entropy / math.log(1024)).tolist() == pytest.approx([1, 0], abs=1e-6)
    assert p_max.tolist() == pytest.approx([1 / 1024, 1])
    assert jacobian.tolist() == pytest.approx([0.03123, 0], abs=1e-5)


def test_a_row_without_weight_or_with_nan_is_nan():
    z = torch.tensor([[-math.inf, -math.inf], [0.0, math.nan], [0.0, math.inf]])
    assert torch.stack(row_statistics(z)).isnan().all()
    assert torch.stack(row_statistics(z[:1, :1])).isnan().all()


# --- attention: the walk -------------------------------------------------------------------------


@torch.no_grad()
def expected_attention(model: nn.Module, tokens: torch.Tensor) -> list[list[tuple[float, ...]]]:
    """What the walk should find, row by row with dense weights."""
    found = []
    T = tokens.size(1)
    first = 64 if T > 64 else T // 2
    x = model.embed(tokens)
    for block in model.h:
        q, k, _ = block.attn.heads(block.ln_1(x))
        layer = []
        for h in range(block.attn.n_head):
            logits, rows = [], []
            for s, i in itertools.product(range(len(tokens)), range(T)):
                z = k[s, h, : i + 1] @ q[s, h, i] / math.sqrt(q.size(-1))
                logits.append(float(z.max()))
                weights = {
                    "softmax": lambda z: z.softmax(0),
                    "sigmoid": lambda z: torch.sigmoid(z - math.log(model.config.context)),
                    "relu": lambda z: z.clamp_min(0) / len(z),
                }[block.attn.kind](z)
                if i >= first and weights.sum() > 0:
                    entropy, p_max, jacobian = dense(weights / weights.sum())
                    rows.append((entropy / math.log(i + 1), p_max, jacobian))
            means = (
                [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else [math.nan] * 3
            )
            layer.append((max(logits), *means))
        found.append(layer)
        x = block(x)
    return found


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
@torch.no_grad()
def test_every_head_is_measured_as_its_dense_attention(fields):
    model = model_of(**fields)
    tokens = tokens_of(70, S=1)
    seen = walk(model, tokens).attention
    for layer, expected in zip(seen, expected_attention(model, tokens), strict=True):
        for head, numbers in zip(layer, expected, strict=True):
            assert head == pytest.approx(numbers, rel=1e-6, nan_ok=True)
    single = walk(model.float(), tokens).attention
    assert torch.tensor(single).flatten().tolist() == pytest.approx(
        torch.tensor(seen).flatten().tolist(), rel=1e-3, nan_ok=True
    )


@torch.no_grad()
def test_short_contexts_are_averaged_over_their_second_half():
    model, tokens = model_of(), tokens_of(9, S=3)
    for layer, expected in zip(walk(model, tokens).attention, expected_attention(model, tokens), strict=True):
        for head, numbers in zip(layer, expected, strict=True):
            assert head == pytest.approx(numbers, rel=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "relu"])
def test_blocks_of_rows_give_what_one_block_gives(kind, monkeypatch):
    model, tokens = model_of(attention=kind), tokens_of(100)
    whole = torch.tensor(walk(model, tokens).attention)
    for rows in (1, 7, 50, 99):
        monkeypatch.setattr(attention, "ROWS", rows)
        assert torch.allclose(torch.tensor(walk(model, tokens).attention), whole, rtol=1e-9)


def test_uniform_and_saturated_attention():
    tokens = tokens_of(1024, S=1)
    model = model_of(scale=0.0, n_layer=1, context=1024)
    seen = torch.arange(65, 1025, dtype=torch.float64)
    uniform = (0, 1, float((1 / seen).mean()), float(((seen - 1).sqrt() / seen).mean()))
    for head in walk(model, tokens).attention[0]:
        assert head == pytest.approx(uniform, abs=1e-9)
    model = model_of(scale=1e5, n_layer=1, context=1024)
    for max_logit, entropy, p_max, jacobian in walk(model, tokens).attention[0]:
        assert max_logit > 1e4
        assert entropy < 1e-3
        assert p_max > 0.995
        assert 0 <= jacobian < 2e-3


def test_rows_without_any_weight_are_left_out():
    """Every score is -‖q‖² / √c: of relu nothing is left; one token more, and rows have that one."""
    model = model_of(attention="relu", n_layer=1)
    with torch.no_grad():
        q, k, _ = model.h[0].attn.c_attn.weight.split(16)
        k.copy_(-q)
        model.wpe.weight.zero_()
    tokens = torch.zeros(1, 80, dtype=torch.int64)
    for max_logit, *others in walk(model, tokens).attention[0]:
        assert max_logit < 0
        assert all(math.isnan(x) for x in others)
    with torch.no_grad():
        model.wte.weight[1] = -model.wte.weight[0]
        model.wte.weight[0] -= model.wte.weight[0].mean()
        model.wte.weight[1] -= model.wte.weight[1].mean()
    tokens[0, 70] = 1  # rows 71 and on have weight for it alone; row 70 for all the others
    numbers = torch.tensor(walk(model, tokens).attention[0])
    assert torch.allclose(numbers, torch.tensor(expected_attention(model, tokens)[0]), rtol=1e-5)
    assert torch.allclose(numbers[:, 2], torch.tensor((9 + 1 / 70) / 10))


@torch.no_grad()
def test_weights_that_are_not_finite_show():
    model = model_of()
    model.h[1].attn.c_attn.weight[0, 0] = math.nan
    seen = walk(model, tokens_of(80))
    assert not any(math.isnan(x) for head in seen.attention[0] for x in head)
    assert all(math.isnan(x) for x in seen.attention[1][0])
    assert math.isnan(seen.activation_rms["h.1.attn.c_attn"])


@torch.no_grad()
def test_rows_that_are_not_finite_are_not_left_out():
    model, tokens = model_of(), torch.zeros(1, 80, dtype=torch.int64)
    model.wte.weight[5] = math.nan
    tokens[0, 75] = 5  # which rows 64 to 74 do not see
    assert all(math.isnan(x) for x in walk(model, tokens).attention[0][0])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_activations_are_those_of_each_matrix(family):
    model, tokens = model_of(family=family), tokens_of(80)
    expected = {}
    x = model.embed(tokens)
    for layer, block in enumerate(model.h):
        a = block.ln_1(x)
        expected[f"h.{layer}.attn.c_attn"] = a @ block.attn.c_attn.weight.mT
        expected[f"h.{layer}.attn.c_proj"] = block.attn(a)
        x = x + block.attn(a)
        b = block.ln_2(x)
        for name in ("w1", "w3") if family == "llama" else ("c_fc",):
            expected[f"h.{layer}.mlp.{name}"] = b @ getattr(block.mlp, name).weight.mT
        expected[f"h.{layer}.mlp.{'w2' if family == 'llama' else 'c_proj'}"] = block.mlp(b)
        x = x + block.mlp(b)
    for scores in (True, False):
        seen = walk(model, tokens, scores=scores)
        assert seen.activation_rms.keys() == expected.keys()
        for name, output in expected.items():
            assert seen.activation_rms[name] == pytest.approx(float(output.square().mean().sqrt()), rel=1e-9)
        assert bool(seen.attention) is scores


def test_the_walk_leaves_no_trace():
    model = model_of(dropout=0.3).float()
    model.train()
    model.h[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: W.clone() for name, W in model.state_dict().items()}
    noise = torch.get_rng_state()
    first = walk(model, tokens_of(80))
    with torch.autocast("cpu", torch.bfloat16):
        assert walk(model, tokens_of(80)) == first
    with pytest.raises(IndexError):
        walk(model, tokens_of(80) + 1000)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(torch.equal(W, weights[name]) for name, W in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_training_does_not_know_of_the_probes():
    trained = []
    for probed in (False, True):
        model = model_of(dropout=0.3, scale=1.0).float()
        optimizer = torch.optim.AdamW(model.parameters())
        flow = Flow(classify(model))
        torch.manual_seed(0)
        for step in range(4):
            tokens = tokens_of(80 + step)
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            if probed:
                flow.before()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            if probed:
                flow.after()
                seen = walk(model, tokens)
                assert len(list(flow.records(seen.activation_rms, "r", 1, step))) == 8
                assert len(list(head_records(classify(model), 2, "r", 1, step))) == 2 * 11
            optimizer.zero_grad()
        trained.append(model.state_dict())
    assert all(torch.equal(W, trained[1][name]) for name, W in trained[0].items())


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any operation gave out."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_scores_exist_for_a_block_of_rows_at_a_time():
    model = model_of(n_layer=1, context=1024)
    with LargestTensor() as mode:
        walk(model, tokens_of(1024, S=1))
    assert mode.numel == 2 * 256 * 1024


def test_every_head_has_a_record():
    seen = walk(model_of(), tokens_of(80))
    rows = list(attention_records(seen, "r", 3, 50))
    assert [(r.layer, r.head) for r in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {(r.run, r.attempt, r.step) for r in rows} == {("r", 3, 50)}
    last = rows[-1]
    assert (last.max_logit, last.entropy, last.p_max, last.jacobian_norm) == seen.attention[1][1]


# --- heads ---------------------------------------------------------------------------------------


def numbers_of(sigma: torch.Tensor) -> list[float]:
    share = sigma / sigma.sum()
    rank = math.exp(-torch.xlogy(share, share).sum())
    return [float(sigma[0]), float(sigma[-1]), float(sigma.norm()), rank]


@given(seeds, st.integers(1, 4), st.integers(1, 6), st.sampled_from(SPECTRA), st.floats(0, 5))
@settings(max_examples=60, deadline=None)
def test_heads_have_the_singular_values_of_their_blocks(seed, n_head, c, kind, decades):
    d = n_head * c
    W = torch.cat([with_spectrum(spectrum(kind, d, decades, seed), d, seed + 7 * k)[0] for k in range(3)])
    got = head_spectra(W, n_head)
    parts = dict(zip(("q", "k", "v"), W.split(d), strict=True))
    heads = {part: rows.split(c) for part, rows in parts.items()}
    for part, rows in parts.items():
        for values, block in zip(got[part], (rows, *heads[part]), strict=True):
            check(values, torch.linalg.svdvals(block))
    for h, values in enumerate(got["qk"]):
        scores = heads["q"][h].mT @ heads["k"][h] / math.sqrt(c)
        check(values, torch.linalg.svdvals(scores)[:c])


def check(values: torch.Tensor, sigma: torch.Tensor) -> None:
    expected = numbers_of(sigma)
    assert values.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6 * expected[0])


def test_effective_rank_counts_equal_singular_values():
    W = torch.cat([torch.eye(8), torch.outer(torch.ones(8), torch.arange(1.0, 9)), torch.eye(8)])
    got = head_spectra(W, 2)
    assert got["q"][:, 3].tolist() == pytest.approx([8, 4, 4])
    assert got["k"][:, 3].tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert got["qk"][:, 3].tolist() == pytest.approx([1, 1], abs=1e-5)


def test_records_of_heads():
    named = classify(model_of())
    rows = list(head_records(named, 2, "r", 1, 5))
    keys = [(r.layer, r.part, r.head) for r in rows]
    parts = [(part, head) for part in ("q", "k", "v") for head in (-1, 0, 1)] + [("qk", 0), ("qk", 1)]
    assert keys == [(layer, *part) for layer in (0, 1) for part in parts]
    [W] = [p.parameter.detach() for p in named if p.name == "h.1.attn.c_attn.weight"]
    [row] = [r for r in rows if (r.layer, r.part, r.head) == (1, "k", 1)]
    assert row.sigma_max == pytest.approx(float(torch.linalg.matrix_norm(W[24:32], 2)))
    assert row.fro_norm == pytest.approx(float(W[24:32].norm()))


def test_heads_that_are_not_finite_are_nan():
    W = gaussian(24, 8)
    W[3, 3] = math.inf
    got = head_spectra(W, 2)
    assert {part: tuple(rows.shape) for part, rows in got.items()} == {
        "q": (3, 4),
        "k": (3, 4),
        "v": (3, 4),
        "qk": (2, 4),
    }
    assert all(rows.isnan().all() for rows in got.values())


# --- flow ----------------------------------------------------------------------------------------


def optimizers_of(model: nn.Module, attn: object, mlp: object) -> list[torch.optim.Optimizer]:
    run = RunConfig.model_validate(
        {"arm": "a", "assignment": {"attn": attn, "mlp": mlp}, "optimizer": {"muon": {"qkv": "split"}}}
    )
    muon, adamw = optimizer_groups(classify(model), run)
    chosen = [torch.optim.AdamW(adamw, lr=1e-3)]
    if muon:
        chosen.append(ManifoldMuon(muon, lr=0.1))
        chosen[-1].retract_()
    return chosen


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("attn", "mlp"),
    [("stiefel", "dgram"), ({"optimizer": "adamw"}, {"optimizer": "adamw"}), ("dgram", "none")],
)
def test_flow_is_what_a_step_did(family, attn, mlp):
    model = build(ModelConfig.model_validate({**SMALL, "family": family}))
    model.initialize(0)
    optimizers = optimizers_of(model, attn, mlp)
    named = classify(model)
    flow = Flow(named)
    matrices = [p for p in named if p.kind in ("attn", "mlp")]
    for step in range(2):  # the second is measured as the first was
        tokens = tokens_of(40 + step)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        W = {p.name: p.parameter.detach().clone() for p in matrices}
        grad = {p.name: p.parameter.grad.clone() for p in matrices}
        flow.before()
        total = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert total > 0.6
        for optimizer in optimizers:
            optimizer.step()
        flow.after()
        model.zero_grad()
        seen = walk(model, tokens, scores=False)
        rows = list(flow.records(seen.activation_rms, "r", 1, step + 1))
        assert [row.matrix for row in rows] == [p.name.removesuffix(".weight") for p in matrices]
        for row, p in zip(rows, matrices, strict=True):
            V = p.parameter.detach()
            assert (row.run, row.attempt, row.step) == ("r", 1, step + 1)
            assert (row.layer, row.module) == (p.layer, p.kind)
            assert row.grad_norm == pytest.approx(float(grad[p.name].norm()), rel=1e-5)
            assert row.clipped_grad_norm == pytest.approx(row.grad_norm * 0.5 / float(total), rel=1e-4)
            assert row.update_ratio == pytest.approx(
                float((V - W[p.name]).norm() / W[p.name].norm()), rel=1e-4
            )
            assert row.update_ratio > 1e-3
            assert row.weight_norm == pytest.approx(float(V.norm()), rel=1e-5)
            assert row.sigma_max == pytest.approx(float(torch.linalg.matrix_norm(V, 2)), rel=1e-4)
            assert row.activation_rms == seen.activation_rms[row.matrix]


def test_flow_reads_nothing_back_before_the_records():
    """A meta tensor has no numbers to read."""
    model = build(ModelConfig.model_validate(SMALL)).to("meta")
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    flow = Flow(classify(model))
    flow.before()
    flow.after()
    with pytest.raises(NotImplementedError, match="meta"):
        list(flow.records({}, "r", 1, 1))


def test_flow_of_a_run_that_blew_up_is_recorded():
    model = build(ModelConfig.model_validate(SMALL))
    model.initialize(0)
    flow = Flow(classify(model))
    tokens = tokens_of(40)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    flow.before()
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight[0, 0] = math.nan
    flow.after()
    rows = {r.matrix: r for r in flow.records(walk(model, tokens).activation_rms, "r", 1, 1)}
    broken, whole = rows["h.0.mlp.c_fc"], rows["h.0.attn.c_attn"]
    assert all(math.isnan(x) for x in (broken.update_ratio, broken.weight_norm, broken.sigma_max))
    assert math.isfinite(broken.grad_norm)
    assert whole.sigma_max > 0
    assert whole.update_ratio == 0


def test_flow_without_gradients_says_when_to_measure():
    flow = Flow(classify(model_of()))
    with pytest.raises(ValueError, match=r"^h\.0\.attn\.c_attn\.weight has no gradient: measure between"):
        flow.before()


@given(seeds, st.integers(1, 60), st.integers(1, 60), st.sampled_from(SPECTRA), st.floats(0, 6))
@settings(max_examples=150, deadline=None)
def test_the_largest_singular_value_is_found_from_below(seed, m, n, kind, decades):
    W = with_spectrum(spectrum(kind, min(m, n), decades, seed), max(m, n), seed)[0].float()
    W = copy.copy(W if m >= n else W.mT)
    sigma = float(largest_singular_values(bidiagonal(W[None], start_vector(W)).double()))
    assert 0.99 < sigma < 1 + 1e-5  # the truth is 1


def test_the_largest_singular_value_of_hard_cases_and_of_orthogonal_rows():
    cases = {name: G for name, G in hard_cases((24, 10)).items() if name not in ("huge", "tiny")}
    cases["orthogonal"] = torch.linalg.qr(gaussian(24, 10)).Q
    W = torch.stack(list(cases.values())).float()
    sigma = largest_singular_values(bidiagonal(W, start_vector(W[0])).double())
    assert sigma.tolist() == pytest.approx(torch.linalg.matrix_norm(W.double(), 2).tolist(), rel=1e-5)


def test_a_gaussian_matrix_of_a_real_width():
    W = F.normalize(gaussian(384, 384, seed=5), dim=(0, 1)).float()
    sigma = float(largest_singular_values(bidiagonal(W[None], start_vector(W)).double()))
    assert sigma == pytest.approx(float(torch.linalg.matrix_norm(W.double(), 2)), rel=1e-2)
