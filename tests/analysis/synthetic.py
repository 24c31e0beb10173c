"""Small stores with known numbers, written by the code that writes real ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmsweep.store import RunStore, open_store
from trainers.config import RunConfig, run_id
from trainers.records import (
    CONFIG,
    STATUS,
    SUMMARY,
    EvalRecord,
    FlowRecord,
    PartWriter,
    SpectrumRecord,
    StepRecord,
    attempt_dir,
    dumps,
)
from trainers.stability import judge

__all__ = ["CONFIG", "STATUS", "SUMMARY", "attempt_dir", "dumps"]

ARMS = {
    "unconstrained": ("none", "none"),
    "all_stiefel": ("stiefel", "stiefel"),
    "all_dgram": ("dgram", "dgram"),
    "hetero": ("stiefel", "dgram"),
    "hetero_inv": ("dgram", "stiefel"),
}
ADAMW = {"optimizer": "adamw"}
STIEFEL = {"optimizer": "adamw", "manifold": "stiefel"}
SPECTRAL = {"optimizer": "adamw", "manifold": "spectral"}
MODULAR = {
    "baseline": (ADAMW, ADAMW),
    "muon_all": ("none", "none"),
    "muon_attention": ("none", ADAMW),
    "muon_ffn": (ADAMW, "none"),
    "stiefel_all": (STIEFEL, STIEFEL),
    "stiefel_attention": (STIEFEL, ADAMW),
    "stiefel_ffn": (ADAMW, STIEFEL),
    "spectral_all": (SPECTRAL, SPECTRAL),
    "manifold_muon": ("stiefel", "stiefel"),
    "stiefel_all_decay": ({**STIEFEL, "weight_decay": 0.1}, {**STIEFEL, "weight_decay": 0.1}),
    "baseline_no_decay": ({**ADAMW, "weight_decay": 0.0}, {**ADAMW, "weight_decay": 0.0}),
}
MATRICES = tuple(
    f"h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
)


@dataclass
class Run:
    """What one synthetic run leaves behind. `losses` are its evaluations, evenly spaced over `steps`."""

    arm: str
    seed: int
    losses: Sequence[float]
    attn_sigma: float = 1.0
    mlp_sigma: float = 1.0
    status: str = "completed"
    steps: int = 300
    every: int = 25
    overrides: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    step_losses: Sequence[float] = ()
    """Of the steps 1, 2, ..., with `step_grads`; where empty, ten records are made from `losses`."""
    step_grads: Sequence[float] = ()
    norms: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By module kind, the first and last Frobenius norm of its largest matrix; no flow where empty."""

    @property
    def config(self) -> RunConfig:
        attn, mlp = (ARMS | MODULAR).get(self.arm, ("none", "none"))
        fields: dict[str, Any] = {
            "arm": self.arm,
            "seed": self.seed,
            "model": {"n_layer": 2, "n_head": 4, "d_model": 128, "context": 128, "vocab_size": 256},
            "data": {"digest": "sha256:5f3c0d6e"},
            "assignment": {"attn": attn, "mlp": mlp},
            "schedule": {"steps": self.steps, "warmup_steps": self.steps // 15, "batch_size": 16},
            "evaluation": {"every": self.every, "batches": 8},
        }
        return RunConfig.model_validate(fields | self.overrides)

    @property
    def run_id(self) -> str:
        return run_id(self.config)

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        return [(i * self.every, loss) for i, loss in enumerate(self.losses)]


def curve(final: float, *, dip: float | None = None, n: int = 13, start: float = 5.55) -> list[float]:
    """`n` losses that fall to `final`; by way of the lower `dip` at half time where one is given."""
    low = final if dip is None else dip
    losses = []
    for i in range(n):
        t = i / (n - 1)
        fallen = (math.exp(-7 * t) - math.exp(-7)) / (1 - math.exp(-7))
        losses.append(low + (start - low) * fallen + (final - low) * max(0.0, 2 * t - 1))
    return losses


def paper_like() -> list[Run]:
    """Five arms, two seeds: what a laptop measures, σ_max 40 to 160 where attention is on DGram."""
    finals = {
        "unconstrained": 2.436,
        "all_stiefel": 2.448,
        "all_dgram": 2.832,
        "hetero": 2.423,
        "hetero_inv": 3.127,
    }
    runs = []
    for arm, final in finals.items():
        for seed, shift in ((0, -0.002), (1, 0.002 + 0.001 * len(arm) / 10)):
            attn, mlp = ARMS[arm]
            sigma = {"stiefel": 1.0, "none": 6.5 + seed}
            sigma |= {"dgram": (160.0 if arm == "hetero_inv" else 44.0) * (1 + 0.1 * seed)}
            dip = 2.85 + 0.02 * seed if arm == "hetero_inv" else None
            grown = {**sigma, "dgram": 21.0 + 3 * seed}
            runs.append(Run(arm, seed, curve(final + shift, dip=dip), sigma[attn], grown[mlp]))
    return runs


def grid_index(
    runs: Sequence[Run], *, name: str = "quickstart", axes: Sequence[str] = (), **facts: Any
) -> dict[str, Any]:
    arms = dict.fromkeys(run.arm for run in runs)
    return {
        "schema": 1,
        "name": name,
        "description": "Five assignments on a tiny GPT",
        "arms": {
            arm: dict(zip(("attn", "mlp"), (ARMS | MODULAR).get(arm, ("none", "none")), strict=True))
            for arm in arms
        },
        "axes": list(axes),
        "seeds": sorted({run.seed for run in runs}),
        "cells": [{"run_id": r.run_id, "arm": r.arm, "seed": r.seed, "axes": r.axes} for r in runs],
        **facts,
    }


def write_store(root: Path, runs: Sequence[Run], *, index: dict[str, Any] | None = None) -> RunStore:
    """A store with these runs, and the grid of `index` (none where it is empty)."""
    store = open_store(str(root / "store"))
    index = grid_index(runs) if index is None else index
    if index:
        store.put_grid(index["name"], f"name: {index['name']}\n", index)
    for run in runs:
        write_run(store, run, root / "scratch" / run.run_id)
    return store


def write_run(store: RunStore, run: Run, folder: Path) -> None:
    """Ship the records of one run; config, status and, where it is finished, its summary."""
    provenance = {
        "host": "laptop",
        "packages": {"torch": "2.13.0", "mmsweep": "0.1.0"},
        "git": {"commit": "6dd3698"},
    }
    config = {"schema": 1, "run_id": run.run_id, "config": run.config.model_dump(mode="json")}
    store.put_config(run.run_id, {**config, "provenance": provenance})
    if run.status == "pending":
        return
    writer = PartWriter(folder, 1)
    for step, loss in run.evaluations:
        writer.append(EvalRecord(run.run_id, 1, step, step * 2048, loss - 0.03, loss, 1e9 + step))
        for record in _spectra(run, step):
            writer.append(record)
    done = run.evaluations[-1][0]
    for step, loss, grad in _steps(run, done):
        writer.append(
            StepRecord(run.run_id, 1, step, step * 2048, loss, grad, 6e-4, 0.3, 210.0, 9800.0, 1e9 + step)
        )
    for record in _flow(run, done):
        writer.append(record)
    writer.roll()
    store.ship(run.run_id, folder)
    state = {
        "status": run.status,
        "reason": "",
        "attempt": 1,
        "step": done,
        "steps": run.steps,
        "host": "laptop",
    }
    store.put_status(run.run_id, state)
    if run.status in ("completed", "diverged"):
        store.put_summary(run.run_id, summary_of(run, done))
        store.compact(run.run_id)


def summary_of(run: Run, done: int) -> dict[str, Any]:
    finite = [loss for loss in run.losses if math.isfinite(loss)]
    verdict = judge(run.evaluations, run.steps, run.config.stability)
    return {
        "schema": 1,
        "run_id": run.run_id,
        "arm": run.arm,
        "seed": run.seed,
        "status": run.status,
        "reason": "",
        "steps": done,
        "horizon": run.steps,
        "final_val_loss": run.losses[-1],
        "best_val_loss": min(finite, default=math.nan),
        "verdict": verdict.to_dict(),
        "attempts": 1,
    }


def _steps(run: Run, done: int) -> Iterator[tuple[int, float, float]]:
    if len(run.step_losses):
        yield from zip(itertools.count(1), run.step_losses, run.step_grads, strict=False)
        return
    for step in range(1, done + 1, run.steps // 10):
        yield step, run.losses[min(step // run.every, len(run.losses) - 1)], 0.8


def _flow(run: Run, done: int) -> Iterator[FlowRecord]:
    """Norms that go from first to last in a straight line; of each kind the first matrix is the largest."""
    for step in (1, *range(run.every, done + 1, run.every)) if run.norms else ():
        for i, matrix in enumerate(MATRICES):
            module = "attn" if ".attn." in matrix else "mlp"
            first, last = run.norms[module]
            norm = (first + (last - first) * (step - 1) / max(done - 1, 1)) * (1.0 if i in (0, 2) else 0.5)
            grad = 0.1 * (i + 1) * (1 + 1 / step)
            yield FlowRecord(
                run=run.run_id,
                attempt=1,
                step=step,
                matrix=matrix,
                layer=i // 4,
                module=module,
                grad_norm=grad,
                clipped_grad_norm=grad,
                update_ratio=1e-3,
                weight_norm=norm,
                sigma_max=1.0,
                activation_rms=1.0,
            )


def modular_like(seeds: int = 3, arms: Sequence[str] = tuple(MODULAR)) -> list[Run]:
    """The modular-manifolds grid with truths planted for every hypothesis, all of them supported."""
    finals = {
        "baseline": 3.90,
        "muon_all": 3.60,
        "muon_attention": 3.70,
        "muon_ffn": 3.80,
        "stiefel_all": 3.75,
        "stiefel_attention": 3.78,
        "stiefel_ffn": 3.86,
        "spectral_all": 3.88,
        "manifold_muon": 3.50,
        "stiefel_all_decay": 3.751,
        "baseline_no_decay": 3.95,
    }
    return [planted(arm, seed, finals[arm]) for arm in arms for seed in range(seeds)]


def planted(arm: str, seed: int, final: float, **changes: Any) -> Run:
    """A run of the modular-manifolds grid that ends near `final`. Unless changed: Muon arms have half
    the noise of the others, and matrices grow 3 to 4 times, but not where they are held."""
    kinds = ("attn", "mlp")
    noise = np.random.Generator(np.random.Philox([seed, list(MODULAR).index(arm)]))
    muon = "muon" in arm
    held = {k for k in kinds if "stiefel_all" in arm or arm in ("spectral_all", "manifold_muon")}
    held |= {"attn"} if arm == "stiefel_attention" else {"mlp"} if arm == "stiefel_ffn" else set()
    grown = {kind: 1.0 if kind in held else 3.0 + 0.2 * seed + 0.3 * muon for kind in kinds}
    steps, every = changes.setdefault("steps", 200), changes.setdefault("every", 50)
    spread = 0.01 if muon else 0.02 + 0.001 * seed
    fields: dict[str, Any] = {
        "attn_sigma": grown["attn"],
        "mlp_sigma": grown["mlp"],
        "norms": {kind: (16.0, 16.0 * grown[kind]) for kind in kinds},
        "step_losses": final + 2 * np.exp(-np.arange(steps) / 40) + spread * noise.standard_normal(steps),
        "step_grads": np.exp(10 * spread * noise.standard_normal(steps)),
    }
    losses = curve(final + 0.002 * noise.standard_normal(), n=steps // every + 1)
    fields |= changes
    return Run(arm, seed, fields.pop("losses", losses), **fields)


def _spectra(run: Run, step: int) -> list[SpectrumRecord]:
    share = step / run.steps
    records = []
    for i, matrix in enumerate(MATRICES):
        module = "attn" if ".attn." in matrix else "mlp"
        end = run.attn_sigma if module == "attn" else run.mlp_sigma
        # The largest matrix of each module reaches exactly `end`.
        top = 1.0 + (end - 1.0) * share**1.5 * (
            1.0 if matrix.endswith(("0.attn.c_attn", "0.mlp.c_fc")) else 0.4
        )
        sigma = [top, 0.8 * top]
        row = (
            matrix,
            i // 4,
            module,
            "none",
            sigma,
            sigma[0],
            sigma[1],
            [s * s for s in sigma],
            0.0,
            top * top,
        )
        records.append(SpectrumRecord(run.run_id, 1, step, *row))
    return records
