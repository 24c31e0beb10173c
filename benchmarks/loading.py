"""How long a store takes to become frames, and a report: 1,000 runs of 50,000 steps, and the paper's sweep.

The store is made here, by the code that compacts real runs, from random numbers in float32's precision
with the shape of training curves. What is timed runs in a fresh process that finds nothing of the store in
the page cache. The loader it is compared with reads every file whole and concatenates, by pandas alone; it
gets a part of the store, and its time and memory are scaled up.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmsweep.rows import to_parquet
from mmsweep.store import RunStore, open_store
from trainers.config import RunConfig, run_id
from trainers.records import RECORD_TYPES
from trainers.stability import judge

ROOT = Path(__file__).parents[1]
ARMS = {
    "unconstrained": ("none", "none"),
    "all_stiefel": ("stiefel", "stiefel"),
    "all_dgram": ("dgram", "dgram"),
    "hetero": ("stiefel", "dgram"),
    "hetero_inv": ("dgram", "stiefel"),
}
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
STEP_ROWS = 2_000_000
"""Rows of `steps` that a report is made from, at most."""
BASELINE_RUNS = 50
SECONDS, GIGABYTES, REPORT_SECONDS = 30, 4, 20
"""The aims: of loading the large store, and of a report of the paper's sweep."""

Floats = np.ndarray[Any, np.dtype[np.float64]]


# --- the stores ------------------------------------------------------------------------------------


def paper_config(arm: str, seed: int, steps: int) -> RunConfig:
    attn, mlp = ARMS[arm]
    fields: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "data": {"digest": "sha256:0"},
        "assignment": {"attn": {"manifold": attn}, "mlp": {"manifold": mlp}},
        "schedule": {"steps": steps, "warmup_steps": steps // 50},
        "evaluation": {"every": 1_000},
    }
    return RunConfig.model_validate(fields)


def make_store(folder: Path, *, seeds: int, steps: int, probes: bool) -> RunStore:
    """Every arm with as many seeds, finished and compacted; `probes`: with all kinds of records."""
    store = open_store(str(folder))
    runs = [paper_config(arm, seed, steps) for arm in ARMS for seed in range(seeds)]
    cells = [{"run_id": run_id(run), "arm": run.arm, "seed": run.seed, "axes": {}} for run in runs]
    arms = {arm: dict(zip(("attn", "mlp"), kinds, strict=True)) for arm, kinds in ARMS.items()}
    index = {"schema": 1, "name": "large", "arms": arms, "axes": [], "seeds": [*range(seeds)], "cells": cells}
    store.put_grid("large", "name: large\n", index)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: write_run(store, run, probes=probes), runs))
    return store


def write_run(store: RunStore, run: RunConfig, *, probes: bool) -> None:
    name = run_id(run)
    noise = np.random.Generator(np.random.Philox([run.seed, list(ARMS).index(run.arm)]))
    rows = {kind: make for kind, make in _KINDS.items() if probes or kind in ("steps", "evals")}
    store.put_config(name, {"schema": 1, "run_id": name, "config": run.model_dump(mode="json")})
    evaluations: list[tuple[int, float]] = []
    for kind, make in rows.items():
        columns = make(run, noise)
        if kind == "evals":
            evaluations = list(zip(columns["step"].tolist(), columns["val_loss"].tolist(), strict=True))
        store.objects.put(f"runs/{name}/{kind}.parquet", to_parquet(table(kind, name, columns), {}))
    losses = [loss for _, loss in evaluations]
    store.put_summary(
        name,
        {
            "schema": 1,
            "run_id": name,
            "arm": run.arm,
            "seed": run.seed,
            "status": "completed",
            "steps": run.schedule.steps,
            "horizon": run.schedule.steps,
            "attempts": 1,
            "final_val_loss": losses[-1],
            "best_val_loss": min(losses),
            "verdict": judge(evaluations, run.schedule.steps, run.stability).to_dict(),
        },
    )


def table(kind: str, name: str, columns: dict[str, Any]) -> pa.Table:
    """The columns as records of a kind, in the order of its fields and of its key."""
    n = len(columns["step"])
    columns |= {"run": pa.array(np.repeat(name, n)), "attempt": np.ones(n, np.int64)}
    names = [field.name for field in fields(RECORD_TYPES[kind])]
    made = pa.table({field: columns[field] for field in names})
    return made.sort_by([(field, "ascending") for field in RECORD_TYPES[kind].key if field != "run"])


def _measured(values: Floats) -> Floats:
    """As a float32 that was read off a device."""
    return values.astype(np.float32).astype(np.float64)


def _curve(step: Any, run: RunConfig) -> Floats:
    horizon = run.schedule.steps
    final = 3.2 + 0.05 * list(ARMS).index(run.arm) + 0.002 * (run.seed % 7)
    return np.asarray(final + 7.6 * np.exp(-np.asarray(step) / (horizon / 25)), dtype=np.float64)


def _steps(run: RunConfig, noise: np.random.Generator) -> dict[str, Any]:
    step = np.arange(1, run.schedule.steps + 1)
    n = len(step)
    lr = 6e-5 + 2.7e-4 * (1 + np.cos(np.pi * step / n))
    seconds = 0.3 + 0.01 * noise.standard_normal(n)
    return {
        "step": step,
        "tokens_seen": step * 65536,
        "loss": _measured(_curve(step, run) + 0.03 * noise.standard_normal(n)),
        "grad_norm": _measured(np.exp(0.1 * noise.standard_normal(n))),
        "lr": lr,
        "muon_lr": lr / 0.03,
        "step_ms": 1000 * seconds,
        "tokens_per_s": 65536 / seconds,
        "time": 1.7e9 + np.cumsum(seconds),
    }


def _evaluated(run: RunConfig) -> Any:
    return np.arange(0, run.schedule.steps + 1, run.evaluation.every)


def _evals(run: RunConfig, noise: np.random.Generator) -> dict[str, Any]:
    step = _evaluated(run)
    loss = _measured(_curve(step, run) + 0.002 * noise.standard_normal(len(step)))
    return {
        "step": step,
        "tokens_seen": step * 65536,
        "train_loss": loss,
        "val_loss": loss,
        "time": 1.7e9 + step,
    }


def _by(step: Any, **parts: list[Any]) -> dict[str, Any]:
    """Columns of the product of steps and parts, which vary together."""
    width = len(next(iter(parts.values())))
    columns: dict[str, Any] = {name: values * len(step) for name, values in parts.items()}
    return {"step": np.repeat(step, width), **columns}


def _matrices(run: RunConfig, step: Any) -> dict[str, Any]:
    layers = [layer for layer in range(run.model.n_layer) for _ in MATRICES]
    modules = [name[: name.index(".")] for name in MATRICES] * run.model.n_layer
    names = [f"h.{layer}.{name}" for layer in range(run.model.n_layer) for name in MATRICES]
    return _by(step, matrix=names, layer=layers, module=modules)


def _filled(kind: str, columns: dict[str, Any], noise: np.random.Generator) -> dict[str, Any]:
    """The same with random numbers in the fields that are not there yet."""
    n = len(columns["step"])
    for field in fields(RECORD_TYPES[kind]):
        if field.type == "float" and field.name not in columns:
            columns[field.name] = _measured(np.exp(0.2 * noise.standard_normal(n)))
    return columns


def _spectra(run: RunConfig, noise: np.random.Generator) -> dict[str, Any]:
    columns = _matrices(run, _evaluated(run))
    n, width = len(columns["step"]), run.model.d_model
    sigma = -np.sort(-_measured(np.exp(0.2 * noise.standard_normal((n, width)))), axis=1)
    starts = np.arange(0, (n + 1) * width, width, dtype=np.int32)
    columns |= {"manifold": ["none"] * n, "sigma_max": sigma[:, 0], "sigma_min": sigma[:, -1]}
    for name, values in (("sigma", sigma), ("gram_diag", sigma**2)):
        columns[name] = pa.ListArray.from_arrays(pa.array(starts), pa.array(values.ravel()))
    return _filled("spectra", columns, noise)


def _updates(run: RunConfig, noise: np.random.Generator) -> dict[str, Any]:
    columns = _matrices(run, _evaluated(run)[1:])
    columns["manifold"] = ["none"] * len(columns["step"])
    return _filled("updates", columns, noise)


def _heads(run: RunConfig, noise: np.random.Generator) -> dict[str, Any]:
    model = run.model
    whole = [(layer, part, -1) for layer in range(model.n_layer) for part in "qkv"]
    heads = [
        (layer, part, head)
        for layer in range(model.n_layer)
        for part in ("q", "k", "v", "qk")
        for head in range(model.n_head)
    ]
    layers, parts, numbers = (list(column) for column in zip(*whole, *heads, strict=True))
    return _filled("heads", _by(_evaluated(run), layer=layers, part=parts, head=numbers), noise)


def _attention(run: RunConfig, noise: np.random.Generator) -> dict[str, Any]:
    layers = [layer for layer in range(run.model.n_layer) for _ in range(run.model.n_head)]
    heads = [*range(run.model.n_head)] * run.model.n_layer
    return _filled("attention", _by(_evaluated(run), layer=layers, head=heads), noise)


def _flow(run: RunConfig, noise: np.random.Generator) -> dict[str, Any]:
    return _filled("flow", _matrices(run, np.arange(10, run.schedule.steps + 1, 10)), noise)


def _costs(run: RunConfig, noise: np.random.Generator) -> dict[str, Any]:
    step = np.arange(10, run.schedule.steps + 1, 10)
    return _filled("costs", {"step": step, "peak_memory": np.full(len(step), 2**34)}, noise)


_KINDS = {
    "steps": _steps,
    "evals": _evals,
    "spectra": _spectra,
    "updates": _updates,
    "heads": _heads,
    "attention": _attention,
    "flow": _flow,
    "costs": _costs,
}


# --- what is timed, each in a process of its own ---------------------------------------------------

OURS = """
import sys
from analysis.load import load
frames = load(sys.argv[1], step_rows=int(sys.argv[2]))
rows = {"steps": len(frames.steps), "evals": len(frames.evals), "runs": len(frames.runs)}
facts = {"rows": rows, "stride": frames.stride, "notes": len(frames.notes)}
"""
NAIVE = """
import sys
from pathlib import Path
import pandas as pd
runs = sorted(Path(sys.argv[1], "runs").iterdir())[: int(sys.argv[2])]
def whole(kind):
    return pd.concat([pd.read_parquet(run / f"{kind}.parquet") for run in runs])
frames = [whole("steps"), whole("evals")]
facts = {"rows": {"steps": len(frames[0]), "evals": len(frames[1]), "runs": len(runs)}}
"""
REPORT = """
import contextlib, io, sys
from mmsweep.report import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main([sys.argv[1], "--out", sys.argv[2]]) == 0
facts = {}
"""
_TOLD = """
import json, resource
peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps(facts | {"peak_gb": peak * 1024 / 1e9}))
"""


def timed(code: str, *arguments: str) -> dict[str, Any]:
    """Wall-clock seconds of a fresh Python with what it says, its start and imports included."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + _TOLD, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts | {"seconds": time.perf_counter() - started}


def forget(folder: Path) -> int:
    """Take the files out of the page cache, and return their bytes."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            total += path.stat().st_size
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return total


def measure(folder: Path, *, runs: int) -> dict[str, Any]:
    result: dict[str, Any] = {"gigabytes": forget(folder) / 1e9}
    result["cold"] = timed(OURS, str(folder), str(STEP_ROWS))
    result["warm"] = timed(OURS, str(folder), str(STEP_ROWS))
    few = min(BASELINE_RUNS, runs)
    forget(folder)
    result["baseline"] = timed(NAIVE, str(folder), str(few))
    result["baseline"]["scale"] = runs / few
    return result


# --- the command -----------------------------------------------------------------------------------


@contextmanager
def stores(given: Path | None) -> Iterator[Path]:
    """The folder of the two stores: the one given, which stays, or one that is removed."""
    if given:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="mmsweep-loading-") as name:
        yield Path(name)


def stored(folder: Path, progress: Any, **shape: Any) -> Path:
    """The store of that shape below `folder`, made where it is not there yet."""
    where = folder / "-".join(f"{name}-{value}" for name, value in shape.items())
    if not (where / "whole").exists():
        progress(f"making {where}")
        make_store(where, **shape)
        (where / "whole").touch()
    return where


def report(result: dict[str, Any]) -> str:
    from machine import introduction, table

    large, sweep, settings = result["large"], result["sweep"], result["settings"]
    rows = large["cold"]["rows"]
    lines = [introduction(result), ""]
    if settings["quick"]:
        lines += ["**Quick run: a smoke test, mostly of starting processes.**", ""]
    base = large["baseline"]
    scale = base["scale"]
    lines += [
        f"A folder of {rows['runs']:,} runs x {settings['steps']:,} steps ({large['gigabytes']:.2f} GB). "
        "Seconds from the start of Python to the frames, and the most memory held.",
        "",
        table(
            ("loader", "seconds", "GB", "rows of steps"),
            [
                ["load, nothing cached", *_cells(large["cold"])],
                ["load, files cached", *_cells(large["warm"])],
                [f"pandas, {base['rows']['runs']} runs, nothing cached", *_cells(base)],
                [
                    f"the same x {scale:g} (scaled, not measured)",
                    f"{base['seconds'] * scale:.1f}",
                    f"{base['peak_gb'] * scale:.1f}",
                    f"{base['rows']['steps'] * scale:,.0f}",
                ],
            ],
        ),
        "",
        f"`load` thins: a row for every {large['cold']['stride']} steps of each run, with the extremes "
        f"between. Aims: {SECONDS} s and {GIGABYTES} GiB.",
        "",
        f"A report of {sweep['runs']} runs x {settings['steps']:,} steps with every probe "
        f"({sweep['gigabytes']:.2f} GB): {sweep['report']['seconds']:.1f} s, "
        f"{sweep['report']['peak_gb']:.2f} GB, of which loading alone "
        f"{sweep['load']['seconds']:.1f} s. Aim: {REPORT_SECONDS} s.",
    ]
    return "\n".join(lines)


def _cells(own: dict[str, Any]) -> list[str]:
    return [f"{own['seconds']:.1f}", f"{own['peak_gb']:.2f}", f"{own['rows']['steps']:,}"]


def main() -> None:
    import torch
    from machine import RESULTS, heading, progress, publish

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=200, help="of each of five arms")
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--stores", type=Path, help="folder to make the stores in and to leave them in")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a smoke test: 5 runs of 1,000 steps")
    options = parser.parse_args()
    seeds, steps = (1, 1_000) if options.quick else (options.seeds, options.steps)
    device = torch.device("cpu")
    result = heading("loading", device)
    result["settings"] = {"seeds": seeds, "steps": steps, "quick": options.quick}
    with stores(options.stores) as folder:
        large = stored(folder, progress, seeds=seeds, steps=steps, probes=False)
        progress("loading")
        result["large"] = measure(large, runs=len(ARMS) * seeds)
        few = min(5, seeds)
        sweep = stored(folder, progress, seeds=few, steps=steps, probes=True)
        result["sweep"] = {"runs": len(ARMS) * few, "gigabytes": forget(sweep) / 1e9}
        progress("a report")
        result["sweep"]["report"] = timed(REPORT, str(sweep), str(folder / "report"))
        result["sweep"]["load"] = timed(OURS, str(sweep), str(STEP_ROWS))
    publish(options, device, result, report(result))


if __name__ == "__main__":
    main()
