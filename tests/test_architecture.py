"""Dependencies run one way, and what is documented works."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from mmsweep.grid import Grid, load_grid

ROOT = Path(__file__).parents[1]

# Modules, and what none of them may load. `mmsweep.report` and `mmsweep.plan` call analysis inside functions.
RULES = {
    "trainers": ("trainers", {"ray", "boto3", "pandas", "pyarrow", "mmsweep", "analysis"}),
    "planning": (
        "trainers.config trainers.iterations trainers.yamlfile trainers.flops trainers.stability "
        "mmsweep.grid mmsweep.plan",
        {"torch"},
    ),
    "mmsweep": ("mmsweep", {"ray", "boto3", "analysis", "pandas", "torch"}),
    "the Ray adapter": ("mmsweep.trial", {"boto3", "analysis", "torch"}),
    "analysis": ("analysis", {"torch", "ray", "boto3", "mmsweep.grid", "mmsweep.agent", "mmsweep.launch"}),
}
APART = {"mmsweep": {"mmsweep.trial", "mmsweep.s3"}}
"""The modules that may load ray and boto3."""


def modules(names: str) -> list[str]:
    found = []
    for name in names.split():
        folder = ROOT / name.replace(".", "/")
        if folder.is_dir():
            paths = [p.relative_to(ROOT).with_suffix("") for p in folder.rglob("*.py")]
            paths = [path for path in paths if path.name.isidentifier()]  # a notebook would run
            found += [".".join(p.parts).removesuffix(".__init__") for p in paths]
        else:
            found.append(name)
    return sorted(set(found) - APART.get(names, set()))


@pytest.mark.parametrize("rule", RULES)
def test_imports_go_one_way(rule):
    names, forbidden = RULES[rule]
    code = (
        "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *modules(names)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not forbidden & set(done.stdout.split())


def test_every_package_is_installed():
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("mmsweep", "trainers", "analysis")
        for path in (ROOT / top).rglob("__init__.py")
    }
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(found)


def test_the_readme_s_grid_expands(tmp_path):
    text = re.search(r"```yaml\n(# my_grid.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert len(expand(text, tmp_path).runs) == 3 * 2 * 2


def expand(text: str, folder: Path) -> Grid:
    (folder / "my_grid.yaml").write_text(text)
    return load_grid(folder / "my_grid.yaml", identify=lambda data: "sha256:" + "0" * 64)


def test_the_reference_s_grid_expands(tmp_path):
    text = re.search(
        r"```yaml\n(name: my_grid.*?)```", (ROOT / "docs" / "grids.md").read_text(), re.DOTALL
    ).group(1)
    assert len(expand(text, tmp_path).runs) == 2 * 2


def test_the_readme_s_optimizer_trains_a_model_of_one_s_own():
    code = re.search(
        r"```python\n(from trainers.optim.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    ).group(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False))
    scope = {"model": model}
    exec(code, scope)
    x = torch.randn(64, 8)
    losses = []
    for _ in range(30):
        loss = (model(x) - x.roll(1, dims=1)).square().mean()
        scope["optimizer"].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scope["optimizer"].step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    for layer in (model[0], model[2]):
        sigma = torch.linalg.svdvals(layer.weight.detach())
        assert torch.allclose(sigma, torch.ones_like(sigma), atol=1e-4)


def test_the_optimizer_s_example_runs_as_it_stands():
    text = (ROOT / "docs" / "optimizer.md").read_text()
    code, adamw = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    torch.manual_seed(0)
    scope = {}
    exec(code, scope)
    assert float(scope["loss"].detach()) < 0.6  # 2 at the start: a shifted unit Gaussian against noise
    stiefel, dgram = scope["muon"].telemetry()
    for row in (stiefel, dgram):
        assert row.distance < 1e-3
        assert row.direction_norm == pytest.approx(1, abs=0.02)
    W = scope["model"][0].weight.detach()
    assert torch.allclose(W.mT @ W, torch.eye(32), atol=1e-3)
    scope["model"][0].weight.grad = torch.randn(128, 32)
    exec(adamw, scope)
    scope["adamw"].step()
    W = scope["model"][0].weight.detach()
    assert torch.allclose(W.mT @ W, torch.eye(32), atol=1e-5)
