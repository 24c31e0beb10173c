"""The benchmarks run, their ratios are what they say, and what they compare with is right."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run_quick(name: str, folder: Path, *options: str) -> tuple[dict, str]:
    """The figures, and what was printed."""
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--device", "cpu", "--threads", "1"]
    done = subprocess.run(
        [*command, "--out", folder, *options], capture_output=True, text=True, check=True, cwd=ROOT
    )
    (path,) = folder.glob("*.json")
    assert path.name.startswith(f"{name}-")
    assert done.stdout == path.with_suffix(".md").read_text()
    return json.loads(path.read_text()), done.stdout


def test_optimizer_step_gives_ratios_of_medians(tmp_path):
    result, shown = run_quick("optimizer_step", tmp_path, "--arms", "hetero", "unconstrained")
    assert "smoke test" in shown
    assert list(result["arms"]) == ["hetero", "unconstrained"]
    for rows in result["arms"].values():
        for name, own in rows.items():
            assert name in shown
            assert 0 < own["min_s"] <= own["median_s"] <= own["max_s"] < math.inf
            assert own["time_over_muon"] == own["median_s"] / rows["torch.optim.Muon"]["median_s"]
            assert own["speedup_over_published"] == rows["published loop"]["median_s"] / own["median_s"]
            assert 0 <= own["share_of_peak"] < math.inf
    flops = {name: sum(own["gflop"].values()) for name, own in result["arms"]["hetero"].items()}
    assert 0 == flops["torch.optim.AdamW"] < flops["ours: projected"] < flops["published loop"] / 10
    for share in result["sharding"]["share"].values():
        assert share["1"] == 1
        assert 1 / 2 <= share["2"] < 0.6


def test_solver_quality_judges_every_solver(tmp_path):
    result, shown = run_quick("solver_quality", tmp_path)
    assert "smoke test" in shown
    for fixture in result["fixtures"].values():
        for directions in fixture["directions"].values():
            for own in directions.values():
                assert 0 <= own["residual"] < 0.3
                assert 0 < own["cosine"] <= 1
                assert 0.9 < own["spectral_norm"] < 1.02


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the benchmarks, or the oracle."""
    for folder in ("benchmarks", "tests/trainers"):
        monkeypatch.syspath_prepend(ROOT / folder)
    return importlib.import_module


@pytest.mark.parametrize("manifold", ["stiefel", "dgram"])
@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (12, 12)])
def test_the_published_loop_is_the_oracle_s(benchmark, manifold, shape):
    oracle, optimizer_step = benchmark("oracle"), benchmark("optimizer_step")
    expected, buffer = oracle.retract(gaussian(*shape), manifold), torch.zeros(shape, dtype=torch.float64)
    W = nn.Parameter(expected.clone())
    loop = optimizer_step.PublishedLoop([(W, manifold)], torch.float64)
    for k in range(3):
        W.grad = gaussian(*shape, seed=10 + k)
        expected, buffer = oracle.step(expected, W.grad, buffer, manifold, lr=optimizer_step.LR)
        loop.step()
    # Ten steps of Polar Express retract the loop's Stiefel weights, an SVD the oracle's.
    assert torch.allclose(W, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("manifold", "shape"),
    [("stiefel", (24, 10)), ("stiefel", (12, 12)), ("dgram", (24, 10)), ("dgram", (10, 24))],
)
def test_the_optimum_is_tangent_and_has_no_duality_gap(benchmark, manifold, shape):
    solver_quality = benchmark("solver_quality")
    W = torch.linalg.qr(gaussian(max(shape), min(shape))).Q
    if manifold == "dgram":
        W = W * torch.linspace(0.5, 2, min(shape), dtype=torch.float64)
    W = W if W.shape == shape else W.T
    problem = solver_quality.Problem("", manifold, W, gaussian(*shape, seed=1))
    A, gap = solver_quality.optimum(problem, rounds=60, cg_steps=15)
    assert abs(gap) < 1e-10
    own = solver_quality.quality(problem, A, A)
    assert own["residual"] < 1e-8
    assert own["spectral_norm"] == pytest.approx(1)


def test_products_are_counted_by_dtype(benchmark):
    A, B = torch.ones(8, 4), torch.ones(4, 2, dtype=torch.float64)
    with benchmark("optimizer_step").Products() as products:
        A @ B.float() + 1
        torch.baddbmm(torch.zeros(3, 2, 2).double(), B.T.expand(3, 2, 4), B.expand(3, 4, 2))
    assert products.flops == {torch.float32: 2 * 8 * 4 * 2, torch.float64: 2 * 3 * 2 * 4 * 2}


def test_peak_memory_is_what_is_held_at_once(benchmark):
    def work() -> None:
        for _ in range(3):
            held = torch.empty(2**18)
            held = (held, torch.empty(2**19))
            del held

    peak = benchmark("optimizer_step").peak_memory(work, torch.device("cpu"))
    assert peak == pytest.approx((2**18 + 2**19) * 4 / 2**20, rel=0.01)
