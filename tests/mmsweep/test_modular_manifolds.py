"""The grid of the modular-manifolds plan, cut down to seconds: each arm trains, the report answers."""

from __future__ import annotations

import json

import pytest
import yaml
from tiny import write_texts

from analysis.load import load
from analysis.report import write_report
from mmsweep.grid import load_grid
from mmsweep.launch import SHIPPED
from mmsweep.store import open_store
from trainers import records
from trainers.config import DataConfig
from trainers.corpus import identify
from trainers.train import train

NINE = (
    "baseline", "muon_all", "muon_attention", "muon_ffn", "stiefel_all", "stiefel_attention", "stiefel_ffn",
    "spectral_all", "manifold_muon",
)  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> str:
    """A store with all its arms, one seed, a model of width 16."""
    folder = tmp_path_factory.mktemp("modular")
    text = yaml.safe_load((SHIPPED / "modular_manifolds.yaml").read_text())
    text["seeds"] = [42]
    base = text["base"]
    base["precision"] = "float32"
    base["data"] = {"source": "text", "path": write_texts(folder / "texts")}
    base["model"] |= {"n_layer": 1, "n_head": 2, "d_model": 16, "d_ff": 48, "context": 16, "vocab_size": 256}
    base["schedule"] |= {"steps": 30, "warmup_steps": 2, "batch_size": 8}
    base["evaluation"] = {"every": 10, "batches": 2}
    (folder / "modular_manifolds.yaml").write_text(yaml.safe_dump(text))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MMSWEEP_CACHE", str(folder / "cache"))
        grid = load_grid(folder / "modular_manifolds.yaml", identify=identify)
        store = open_store(str(folder / "store"))
        store.put_grid(grid.name, grid.text, grid.index())
        for run_id, run in grid.runs.items():
            summary = train(run, folder / run_id)
            assert summary.status == records.COMPLETED
            store.ship(run_id, folder / run_id)
            store.put_config(run_id, json.loads((folder / run_id / records.CONFIG).read_text()))
            store.put_summary(run_id, json.loads((folder / run_id / records.SUMMARY).read_text()))
    return store.url


ON_STIEFEL = {
    "attn": {"stiefel_all", "stiefel_attention", "stiefel_all_decay", "manifold_muon"},
    "mlp": {"stiefel_all", "stiefel_ffn", "stiefel_all_decay", "manifold_muon"},
}
BY_MUON = {
    "attn": {"muon_all", "muon_attention", "manifold_muon"},
    "mlp": {"muon_all", "muon_ffn", "manifold_muon"},
}


@pytest.mark.parametrize("kind", ["attn", "mlp"])
def test_every_arm_trains_with_the_optimizer_and_the_manifold_of_its_name(swept, kind):
    frames = load(swept, grid="modular_manifolds")
    assert set(NINE) < set(frames.arms)
    assert set(frames.updates.loc[frames.updates["module"] == kind, "arm"]) == BY_MUON[kind]
    spectra = frames.spectra[(frames.spectra["step"] == 30) & (frames.spectra["module"] == kind)]
    largest = spectra.groupby("arm")["sigma_max"].max()
    smallest = spectra.groupby("arm")["sigma_min"].min()
    at_one = {arm for arm in frames.arms if largest[arm] == pytest.approx(1, abs=1e-3)}
    assert at_one == ON_STIEFEL[kind] | {"spectral_all"}
    assert {arm for arm in at_one if smallest[arm] == pytest.approx(1, abs=1e-3)} == ON_STIEFEL[kind]


def test_its_report_answers_the_five_hypotheses(swept, tmp_path):
    page = write_report(load(swept, grid="modular_manifolds"), tmp_path).read_text()
    for hypothesis in ("H1", "H2", "H3", "H4", "H5"):
        assert hypothesis in page
    assert "not resolved" in page  # there is one seed
    assert (tmp_path / "tables" / "hypotheses.csv").is_file()


def test_the_shipped_grid_is_the_plan():
    grid = load_grid(SHIPPED / "modular_manifolds.yaml", identify=_pinned)
    assert set(NINE) < set(grid.arms)
    run = next(run for run in grid.runs.values() if run.arm == "manifold_muon")
    assert (run.model.family, run.model.n_layer, run.model.d_model, run.model.n_head) == ("llama", 4, 512, 8)
    assert (run.model.hidden, run.model.context, run.model.dropout, run.seed) == (2048, 512, 0.1, 42)
    assert (run.schedule.steps, run.schedule.batch_size, run.schedule.warmup_steps) == (2000, 16, 100)
    assert (run.schedule.min_lr_ratio, run.optimizer.grad_clip) == (0, 1)
    muon, adamw = run.optimizer.muon, run.optimizer.adamw
    assert (adamw.lr, adamw.weight_decay, adamw.betas) == (3e-4, 0.1, (0.9, 0.95))
    assert (muon.lr, muon.momentum, muon.weight_decay) == (0.02, 0.95, 0)
    assert (muon.solver, muon.msign, muon.update_scale) == ("plain", "newton_schulz", "rows_over_cols")


def _pinned(data: DataConfig) -> str:
    assert data.source == "hf"
    return "spec:" + "0" * 64
