"""Tokens per second of the real trainer: AdamW alone, Muon, Manifold Muon; and what the probes cost.

Every round runs each contender from its start in a folder of its own, one after another, so that all see
the same moods of the machine. Speeds are compared within a round; a figure is the median over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, heading, introduction, prepare, progress, publish, table

from trainers import corpus
from trainers.config import RunConfig
from trainers.devices import device_name, peak
from trainers.flops import cost
from trainers.manifold import default_dtype
from trainers.records import CostRecord, EvalRecord, Record, StepRecord
from trainers.train import train

WARMUP = 3
"""Steps that do not count: caches, and on a GPU compilation."""

TINY = {
    "model": {"n_layer": 4, "n_head": 4, "d_model": 128, "context": 128, "vocab_size": 256},
    "schedule": {"batch_size": 32, "warmup_steps": 0},
    "precision": "float32",
}
"""The quickstart's model."""
GPT2_SMALL = {
    "model": {},
    "schedule": {"batch_size": 64, "warmup_steps": 0},
    "precision": "bfloat16",
    "runtime": {"micro_batch": 32},
}

ADAMW = {"attn": {"optimizer": "adamw"}, "mlp": {"optimizer": "adamw"}}
HETERO = {"attn": "stiefel", "mlp": "dgram"}
FAST = {
    "solver": "projected",
    "retraction": "column_norm",
    "msign": "gram",
    "msign_dtype": str(default_dtype(torch.empty(0))).removeprefix("torch."),
}
PROBES = ("spectra", "heads", "attention", "updates", "flow", "costs")
CONTENDERS: dict[str, dict[str, Any]] = {
    "adamw": {"assignment": ADAMW},
    "unconstrained": {"optimizer": {"muon": {k: FAST[k] for k in ("msign", "msign_dtype")}}},
    "hetero, projected": {"assignment": HETERO, "optimizer": {"muon": FAST}},
    "hetero, projected, svd_sorted": {
        "assignment": HETERO,
        "optimizer": {"muon": {**FAST, "retraction": "svd_sorted"}},
    },
    "hetero, exact": {"assignment": HETERO, "optimizer": {"muon": {**FAST, "solver": "exact"}}},
    "hetero, dual_ascent": {"assignment": HETERO},
    "hetero, projected, all probes": {
        "assignment": HETERO,
        "optimizer": {"muon": FAST},
        "probes": dict.fromkeys(PROBES, True),
    },
}
BASE, PLAIN, PROBED = "adamw", "hetero, projected", "hetero, projected, all probes"


def configs(options: argparse.Namespace, device: torch.device) -> dict[str, RunConfig]:
    size = GPT2_SMALL if device.type == "cuda" else TINY
    data: dict[str, Any] = {"source": "stdlib"}
    digest = corpus.identify(RunConfig.model_validate({"data": data}).data)
    found = {}
    for name in options.contenders or CONTENDERS:
        given: dict[str, Any] = {"probes": dict.fromkeys(PROBES, False), **size, **CONTENDERS[name]}
        given["data"] = {**data, "digest": digest}
        given["schedule"] = {**given["schedule"], "steps": options.steps}
        if options.batch_size:
            given["schedule"]["batch_size"] = options.batch_size
        given["evaluation"] = {"every": options.evaluate_every, "batches": 1}
        runtime = {"device": device.type, "threads": torch.get_num_threads(), "checkpoint_every": 10**6}
        given["runtime"] = {**given.get("runtime", {}), **runtime}
        found[name] = RunConfig.model_validate(given)
    return found


def measured(run: RunConfig) -> dict[str, float]:
    """Tokens per second of the steps alone; seconds of the steps, and from first evaluation to last."""
    heard: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        train(run, Path(folder), on_record=heard.append)
    steps = [row.step_ms for row in heard if isinstance(row, StepRecord)][WARMUP:]
    evaluations = [row.time for row in heard if isinstance(row, EvalRecord)]
    result = {
        "tokens_per_s": run.tokens_per_step / (statistics.median(steps) / 1e3),
        "steps_s": sum(steps) / 1e3,
        "all_s": evaluations[-1] - evaluations[0],
    }
    costs = [row for row in heard if isinstance(row, CostRecord)]
    if costs:
        result["peak_memory"] = costs[-1].peak_memory
    return result


def summarised(
    rounds: dict[str, list[dict[str, float]]], runs: dict[str, RunConfig], device: torch.device
) -> Any:
    known = peak(device_name(device))
    rows = {}
    for name, results in rounds.items():
        speeds = [own["tokens_per_s"] for own in results]
        speed = statistics.median(speeds)
        price = cost(runs[name])
        model_flops = price.model_step / runs[name].tokens_per_step
        rows[name] = {
            "tokens_per_s": speed,
            "slowest": min(speeds),
            "fastest": max(speeds),
            "over_adamw": _ratio(results, rounds.get(BASE), "tokens_per_s"),
            "model_gflop_per_s": speed * model_flops / 1e9,
            "mfu": None if known is None else speed * model_flops / getattr(known, runs[name].precision),
            "optimizer_share_of_flops": price.optimizer_step / (price.optimizer_step + price.model_step),
        }
    return rows


def _ratio(mine: list[dict[str, float]], others: list[dict[str, float]] | None, key: str) -> float | None:
    """Median over rounds of mine / other."""
    if others is None:
        return None
    return statistics.median(a[key] / b[key] for a, b in zip(mine, others, strict=True))


def probe_cost(rounds: dict[str, list[dict[str, float]]]) -> float | None:
    """What all probes add, over the time of the steps without them."""
    if PLAIN not in rounds or PROBED not in rounds:
        return None
    pairs = zip(rounds[PROBED], rounds[PLAIN], strict=True)
    return statistics.median((probed["all_s"] - plain["all_s"]) / plain["steps_s"] for probed, plain in pairs)


def document(result: dict[str, Any]) -> str:
    settings = result["settings"]
    lines = [
        introduction(result),
        "",
        f"{settings['parameters'] / 1e6:.1f} M parameters, {settings['tokens_per_step']:,} tokens a step, "
        f"{settings['precision']}; {settings['rounds']} rounds of {settings['steps']} steps, "
        f"evaluation every {settings['evaluate_every']}.",
        "Speeds are those of steps, evaluation excluded; ratios are medians of ratios within a round.",
        f"Peak of the device: {settings['peak']}.",
        "",
    ]
    rows = [
        [
            name,
            f"{own['tokens_per_s']:,.0f}",
            f"{own['slowest']:,.0f}",
            f"{own['fastest']:,.0f}",
            "–" if own["over_adamw"] is None else f"{own['over_adamw']:.3f}",
            f"{own['model_gflop_per_s']:,.0f}",
            "–" if own["mfu"] is None else f"{100 * own['mfu']:.1f}",
            f"{100 * own['optimizer_share_of_flops']:.1f}",
        ]
        for name, own in result["contenders"].items()
    ]
    header = (
        "contender",
        "tokens/s",
        "slowest",
        "fastest",
        "this / adamw",
        "model GFLOP/s",
        "MFU %",
        "optimizer % of FLOPs",
    )
    lines.append(table(header, rows))
    if result["probe_cost"] is not None:
        every = f"with an evaluation every {settings['evaluate_every']} steps"
        share = f"{100 * result['probe_cost']:.1f}% of the time of the steps"
        lines += ["", f"All probes at their default cadence, {every}: {share}."]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help="; ".join(CONTENDERS)
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="of each contender in each round; default: 51")
    parser.add_argument("--evaluate-every", type=int, help="default: 24, the quickstart's")
    parser.add_argument("--batch-size", type=int, help="sequences a step; default: 32 on a CPU, 64 on a GPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a smoke test: two rounds of six steps")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 2
    options.steps = options.steps or (6 if options.quick else 51)
    options.evaluate_every = options.evaluate_every or (3 if options.quick else 24)
    if options.steps <= WARMUP:
        parser.error(f"--steps must be above {WARMUP}: so many do not count")
    return options


def main() -> None:
    options = arguments()
    device = prepare(options.device, options.threads)
    runs = configs(options, device)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    names = list(runs)
    for k in range(options.rounds):
        first = k % len(names)  # nobody always follows the same one
        for name in names[first:] + names[:first]:
            rounds[name].append(measured(runs[name]))
            speed = rounds[name][-1]["tokens_per_s"]
            progress(f"round {k + 1} of {options.rounds}, {name}: {speed:,.0f} tokens/s")
    result = heading("throughput", device)
    some = next(iter(runs.values()))
    known = peak(device_name(device))
    result["settings"] = {
        "parameters": cost(some).parameters,
        "tokens_per_step": some.tokens_per_step,
        "precision": some.precision,
        "rounds": options.rounds,
        "steps": options.steps,
        "evaluate_every": options.evaluate_every,
        "peak": "not known"
        if known is None
        else f"{getattr(known, some.precision):.4g} FLOP/s ({known.source})",
    }
    result["contenders"] = summarised(rounds, runs, device)
    result["probe_cost"] = probe_cost(rounds)
    text = document(result)
    if options.quick:
        text += "\n\nA smoke test: the figures mean nothing."
    publish(options, device, result, text)


if __name__ == "__main__":
    main()
