"""Propositions 4.1 and 4.2 of the paper (2606.13276), in numbers.

The paper's W_Q is (d, c), here a block of rows of `c_attn` is its transpose: scores are
`z_ij = (W_Q x_i)·(W_K x_j) / √c` with W_Q, W_K (c, d), and the paper's `WᵀW` is our `W Wᵀ`, which is the
Gram matrix of which `distance` judges a wide matrix. p is a row's softmax, J its Jacobian.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import gaussian, one_thread, orthonormal, uniform

from trainers.config import ModelConfig
from trainers.manifold import distance, retract
from trainers.models import build
from trainers.optim import ManifoldMuon
from trainers.probes.attention import row_statistics, walk

pytestmark = pytest.mark.usefixtures("single")
single = pytest.fixture(autouse=True, scope="module")(one_thread)

D, C = 12, 4
seeds = st.integers(0, 9_999)
bounds = st.floats(0.1, 6)


def scores(W_Q: torch.Tensor, W_K: torch.Tensor, X: torch.Tensor) -> torch.Tensor:  # (T, d) -> (T, T)
    return (X @ W_Q.mT) @ (X @ W_K.mT).mT / math.sqrt(W_Q.size(0))


def jacobian_norms(z: torch.Tensor) -> torch.Tensor:  # (T, T) -> (T,)
    return row_statistics(z)[2]


def within(X: torch.Tensor, B: float) -> torch.Tensor:
    """Features scaled back to norm B where they are longer."""
    return X * (B / X.norm(dim=-1, keepdim=True)).clamp_max(1)


def least_norm(B: float, T: int) -> float:
    """The constant of Proposition 4.1.

    Scores lie within R = B²/√c of 0, so of T weights the largest, p₁, leaves at least q to the others,
    `q / (1 - q) = (T - 1) e^(-2R)`, and is at least 1/T. ‖J‖_F >= J₁₁ = p₁ (1 - p₁).
    """
    odds = (T - 1) * math.exp(-2 * B * B / math.sqrt(C))
    q = odds / (1 + odds)
    return min(q * (1 - q), (1 - 1 / T) / T)


# --- Proposition 4.1: on Stiefel, bounded features cannot saturate a row ---------------------------


@given(seeds, st.integers(2, 9), bounds)
@settings(max_examples=100, deadline=None)
def test_stiefel_scores_and_jacobians_are_bounded_for_all_features(seed, T, B):
    W_Q, W_K = orthonormal(D, C, seed).mT, orthonormal(D, C, seed + 1).mT
    assert distance(W_Q, "stiefel") < 1e-12
    for scale in (1e-2, 1.0, 1e2):
        X = within(scale * gaussian(T, D, seed=seed + 2), B)
        z = scores(W_Q, W_K, X)
        assert z.abs().max() <= B * B / math.sqrt(C) * (1 + 1e-12)
        assert jacobian_norms(z).min() >= least_norm(B, T) * (1 - 1e-9)


def test_an_adversary_comes_near_the_bound_and_not_below():
    """Features, from 16 starts, that descend on the entropy of one row; weights that share a direction let
    them. (On ‖J‖ itself they would as well end in a uniform row.)"""
    T, B = 5, 2.0
    W = orthonormal(D, C).mT
    Y = gaussian(16, T, D, seed=1).requires_grad_()
    optimizer = torch.optim.Adam([Y], lr=0.05)
    reached = []
    for _ in range(300):
        entropy, _, jacobian = row_statistics(scores(W, W, within(1e3 * Y, B))[:, 0])
        optimizer.zero_grad()
        entropy.log().sum().backward()
        optimizer.step()
        reached.append(float(jacobian.detach().min()))
    c = least_norm(B, T)
    assert min(reached) >= c * (1 - 1e-9)
    assert min(reached) < 2 * c < reached[0]


@given(seeds, st.integers(2, 9), st.floats(1, 6))
@settings(max_examples=50, deadline=None)
def test_the_bound_is_attained_but_for_a_factor(seed, T, B):
    """Row 0 sees itself at +R and its opposites at -R. The rest of J adds at most a factor of 2 to J₁₁."""
    W = orthonormal(D, C, seed).mT
    X = B * W[0].repeat(T, 1) * torch.tensor([1.0] + [-1.0] * (T - 1)).unsqueeze(-1)
    z = scores(W, W, X)[0]
    R = B * B / math.sqrt(C)
    assert z.tolist() == pytest.approx([R] + [-R] * (T - 1))
    if math.log(T) < R:  # else rows are far from one-hot
        assert 1 - 1e-9 <= float(jacobian_norms(z)) / least_norm(B, T) <= 2 + 1e-9
        # Off the manifold the bound breaks.
        assert jacobian_norms(scores(2 * W, 2 * W, X)[0]) < 0.5 * least_norm(B, T)


# --- Proposition 4.2: DGram has pairs that saturate any row ----------------------------------------


@given(seeds, st.integers(2, 40), st.floats(-2, 3))
@settings(max_examples=100, deadline=None)
def test_a_gap_bounds_the_jacobian(seed, T, decades):
    """‖J‖_F <= tr J <= 2 (1 - p₁) <= 2 (T - 1) e^(-gap)."""
    z = gaussian(T, seed=seed) * 10**decades
    top, second = z.topk(2).values
    assert jacobian_norms(z) <= 2 * (T - 1) * math.exp(second - top) * (1 + 1e-9) + 1e-300


def test_a_feasible_pair_makes_the_jacobian_as_small_as_one_likes():
    """W_Q = W_K = diag(α, 1, ..., 1) U with orthonormal rows U; features x and -x of length 1."""
    T = 8
    U = orthonormal(D, C).mT
    X = U[0].repeat(T, 1) * torch.tensor([1.0] + [-1.0] * (T - 1)).unsqueeze(-1)
    norms = []
    for alpha in (1.0, 2.0, 4.0, 6.0, 8.0):
        W = torch.diag(torch.tensor([alpha] + [1.0] * (C - 1)).double()) @ U
        assert distance(W, "dgram") < 1e-13 * alpha**2
        assert torch.linalg.matrix_norm(W, 2) == pytest.approx(alpha)
        z = scores(W, W, X)[0]
        gap = 2 * alpha**2 / math.sqrt(C)
        assert float(z[0] - z[1]) == pytest.approx(gap)
        norms.append(float(jacobian_norms(z)))
        assert norms[-1] <= 2 * (T - 1) * math.exp(-gap)
    assert norms == sorted(norms, reverse=True)
    assert norms[0] > least_norm(1.0, T)  # α = 1 is on Stiefel
    assert norms[-1] < 1e-26


def model_with(W: torch.Tensor) -> torch.nn.Module:
    fields = {"n_layer": 1, "n_head": 2, "d_model": 16, "context": 80, "vocab_size": 64}
    model = build(ModelConfig.model_validate(fields))
    model.initialize(0)
    model.h[0].attn.c_attn.weight.data = W
    return model.double()


@pytest.mark.parametrize("family_of_norms", ["equal", "spread"])
def test_dgram_weights_of_a_whole_layer_saturate_where_stiefel_ones_cannot(family_of_norms):
    """LayerNorm bounds the features: ‖x‖ = √d. Only the weights differ."""
    spread = torch.ones(16) if family_of_norms == "equal" else 0.5 + uniform(16)
    Q = orthonormal(48, 16, seed=2)
    tokens = torch.randint(64, (1, 80), generator=torch.Generator().manual_seed(0))
    norms = []
    for alpha in (1.0, 3.0, 10.0, 100.0):
        W = alpha * Q * spread
        assert distance(W, "dgram") < 1e-12 * alpha**2
        heads = walk(model_with(W), tokens).attention[0]
        norms.append(max(jacobian_norm for *_, jacobian_norm in heads))
        stiefel = walk(model_with(retract(W, "stiefel")), tokens).attention[0]
        for max_logit, _, _, jacobian_norm in stiefel:
            assert max_logit <= 16 / math.sqrt(8)
            assert jacobian_norm > 0.05
    assert norms[0] > 0.05
    assert norms[-1] < 5e-3


# --- what the published grouping constrains --------------------------------------------------------


def test_stiefel_on_the_fused_weight_is_not_stiefel_on_queries():
    """Fused, W_QᵀW_Q + W_KᵀW_K + W_VᵀW_V = I: each part is only a contraction. In three blocks each is
    orthogonal. The bound on scores holds for both."""
    d = 24
    identity = torch.eye(d, dtype=torch.float64)
    gram = {}
    for blocks in (1, 3):
        weight = torch.nn.Parameter(gaussian(3 * d, d, seed=3))
        optimizer = ManifoldMuon([weight], lr=0.1, manifold="stiefel", row_blocks=blocks)
        optimizer.retract_()
        weight.grad = gaussian(3 * d, d, seed=4)
        optimizer.step()
        parts = weight.detach().split(d)
        gram[blocks] = [W.mT @ W for W in parts]
        assert all(float(torch.linalg.matrix_norm(W, 2)) < 1 + 1e-6 for W in parts)
    assert torch.allclose(sum(gram[1]), identity, atol=1e-6)
    for K in gram[1]:
        assert float((K - identity).norm()) > 0.5 * math.sqrt(d)
    for K in gram[3]:
        assert torch.allclose(K, identity, atol=1e-6)
