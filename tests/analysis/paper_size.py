"""Frames of a sweep of the paper's size, made in memory: five arms, five seeds, 50,000 steps.

The losses are those of the paper's Table 1 with the seed noise of a 124M GPT-2; in arms with DGram
attention singular values grow, then logits, then attention saturates, then the loss fails, at steps that
`crossing_steps` plants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd
from synthetic import ARMS

from analysis.load import ENVELOPES, RUN_DTYPES, Frames, long_dtypes
from analysis.stepwise import stepwise, stepwise_frame
from trainers.config import RunConfig, run_id
from trainers.records import KINDS
from trainers.stability import judge

HORIZON = 50_000
FINALS = {"unconstrained": 3.3855, "all_stiefel": 3.3679, "hetero": 3.3544}
BAD = {"all_dgram": (16_000, 5.41), "hetero_inv": (20_000, 6.84)}
"""First bad evaluation and its loss."""
SIGMA = 0.002
MODEL = {"n_layer": 12, "n_head": 12, "d_model": 768, "context": 1024, "vocab_size": 50304}
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def config(arm: str, seed: int, **changes: Any) -> RunConfig:
    attn, mlp = ARMS.get(arm, ("none", "none"))
    return RunConfig.model_validate(
        {
            "arm": arm,
            "seed": seed,
            "model": MODEL,
            "data": {"digest": "sha256:0"},
            "assignment": {"attn": attn, "mlp": mlp},
            "schedule": {"steps": HORIZON, "warmup_steps": 1000, "batch_size": 64},
            "evaluation": {"every": 1000, "batches": 200},
            **changes,
        }
    )


def losses(arm: str, seed: int, steps: np.ndarray, noise: np.random.Generator) -> np.ndarray:
    final = FINALS.get(arm, 3.37) + SIGMA * noise.standard_normal()
    fallen = final + (10.9 - final) * np.exp(-steps / 1200) + 0.45 * np.exp(-steps / 14_000)
    fallen -= 0.45 * math.exp(-HORIZON / 14_000)
    if arm in BAD:
        first, top = BAD[arm]
        bad = first + 1000 * (seed % 3)
        fallen = np.where(steps >= bad - 400, top + 0.4 * np.sin(steps / 2000), fallen)
    return fallen


def crossing_steps(arm: str, seed: int) -> dict[str, int]:
    """Steps from which σ_max > 10, the logit > 100 and the softmax is saturated; none in stable arms."""
    if arm not in BAD:
        return {}
    bad = BAD[arm][0] + 1000 * (seed % 3)
    return {"sigma": bad - 9_000, "logit": bad - 6_000, "saturated": bad - 3_000}


def paper_size(
    arms: Sequence[str] = tuple(ARMS),
    seeds: int = 5,
    *,
    step_every: int = 10,
    flow_every: int = 250,
    attention_every: int = 500,
) -> Frames:
    """Frames as `load` makes them. The cadences are wider than a real sweep's, to be quick."""
    runs = [(arm, seed) for seed in range(seeds) for arm in arms]
    parts: dict[str, list[pd.DataFrame]] = {kind: [] for kind in KINDS}
    rows, configs, verdicts, states = [], {}, {}, {}
    for arm, seed in runs:
        made = config(arm, seed)
        name = run_id(made)
        noise = np.random.Generator(np.random.Philox([seed, sum(map(ord, arm))]))
        every = np.arange(0, HORIZON + 1, 1000)
        val = losses(arm, seed, every, noise)
        verdict = judge(list(zip(every.tolist(), val.tolist(), strict=True)), HORIZON, made.stability)
        configs[name] = {
            "config": made.model_dump(mode="json"),
            "provenance": {
                "parameters": 124_373_760,
                "model_flops_per_step": 5.6e13,
                "optimizer_flops_per_step": 7e13,
                "world_size": 1,
                "host": "node",
                "device": "NVIDIA H100 80GB HBM3",
            },
        }
        verdicts[name], states[name] = verdict, {"status": "completed"}
        rows.append(_run_row(made, name, val, verdict))
        for kind, frame in _records(
            made, noise, val, step_every=step_every, flow_every=flow_every, attention_every=attention_every
        ).items():
            parts[kind].append(frame.assign(run_id=name, arm=arm, seed=seed, attempt=1))
    values: dict[str, Any] = {kind: _long(kind, parts[kind]) for kind in KINDS}
    values |= {"store": "memory", "grid": "paper", "description": "", "arms": tuple(arms), "axes": ()}
    values |= {"runs": pd.DataFrame(rows).astype(RUN_DTYPES)[list(RUN_DTYPES)], "notes": ()}
    values |= {"stepwise": stepwise_frame({f["run_id"].iloc[0]: every_step(f) for f in parts["steps"]})}
    values |= {"verdicts": verdicts, "configs": configs, "states": states, "urls": {}, "stride": 1}
    return Frames(**{field.name: values[field.name] for field in fields(Frames)})


def every_step(steps: pd.DataFrame) -> tuple[dict[str, Any], ...]:
    """What `load` would take from these steps of one run, were they all."""
    return stepwise(*(steps[name].to_numpy() for name in ("step", "loss", "grad_norm")), HORIZON)


def _run_row(made: RunConfig, name: str, val: np.ndarray, verdict: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(RUN_DTYPES, "")
    rules = "; ".join(f"{rule.rule} ({rule.last_good}, {rule.step}]" for rule in verdict.rules)
    row |= {"run_id": name, "grid": "paper", "arm": made.arm, "seed": made.seed, "label": made.arm}
    row |= {"attn": made.assignment.attn.manifold, "mlp": made.assignment.mlp.manifold}
    row |= {"group": made.arm, "family": "paper", "status": "completed", "step": HORIZON, "horizon": HORIZON}
    row |= {"final_val_loss": val[-1], "last_val_loss": val[-1], "best_val_loss": val.min()}
    row |= {"unstable": verdict.unstable, "first_bad": verdict.first_bad, "rules": rules}
    return {key: 1 if value == "" and RUN_DTYPES[key] in ("int64", "Int64") else value
            for key, value in row.items()} | {"d_model": 768}  # fmt: skip


def _long(kind: str, parts: list[pd.DataFrame]) -> pd.DataFrame:
    dtypes = long_dtypes(kind)
    frame = pd.concat(parts, ignore_index=True)
    for name in dtypes:
        if name not in frame:  # an envelope is the value itself where every row is there
            frame[name] = frame[ENVELOPES[name]] if name in ENVELOPES else 0
    return frame[list(dtypes)].astype(dtypes)


def _records(
    made: RunConfig,
    noise: np.random.Generator,
    val: np.ndarray,
    *,
    step_every: int,
    flow_every: int,
    attention_every: int,
) -> dict[str, pd.DataFrame]:
    every = np.arange(0, HORIZON + 1, 1000)
    steps = np.arange(1, HORIZON + 1, step_every)
    flow, looks = np.arange(flow_every, HORIZON + 1, flow_every), np.arange(0, HORIZON + 1, attention_every)
    planted = crossing_steps(made.arm, made.seed)
    grown = {kind: _sigma(made, kind, planted) for kind in ("attn", "mlp")}
    costs = np.arange(100, HORIZON + 1, 500)
    held = made.assignment.attn.manifold != "none" or made.assignment.mlp.manifold != "none"
    solver = (95.0 if held else 4.0) * np.exp(0.02 * noise.standard_normal(len(costs)))
    return {
        "steps": _steps(made, steps, noise),
        "evals": pd.DataFrame(
            {
                "step": every,
                "tokens_seen": every * 65_536,
                "train_loss": val - 0.02,
                "val_loss": val,
                "time": 0.0,
            }
        ),
        "spectra": _per_matrix(every, grown, noise, "sigma_max"),
        "updates": _per_matrix(every[1:], grown, noise, "residual"),
        "flow": _per_matrix(flow, grown, noise, "sigma_max").assign(grad_norm=0.05, update_ratio=1e-3),
        "heads": _heads(every, grown["attn"], noise),
        "attention": _attention(looks, planted, noise),
        "costs": pd.DataFrame(
            {
                "step": costs,
                "tokens_per_s": 65_536 / (0.35 + solver / 1e3),
                "flop_utilisation": 0.41 * 0.35 / (0.35 + solver / 1e3),
                "step_ms": 350.0 + solver,
                "forward_backward_ms": 330.0,
                "solver_ms": 0.7 * solver,
                "retraction_ms": 0.3 * solver,
                "communication_ms": 0.0,
                "peak_memory": 41_000_000_000,
            }
        ),
    }


def _sigma(made: RunConfig, kind: str, planted: dict[str, int]) -> Any:
    """σ_max as a function of steps: 1 on Stiefel, slow growth without a manifold, planted on DGram."""
    manifold = getattr(made.assignment, kind).manifold
    if manifold == "stiefel":
        return lambda steps: np.ones(len(steps))
    if manifold == "none":
        return lambda steps: 0.6 + 6 * (1 - np.exp(-steps / 9000))
    if kind == "attn":
        return lambda steps: 10.0 * np.exp((steps - planted["sigma"]) / 5000).clip(0.02, 40)
    return lambda steps: 0.6 + 30 * (1 - np.exp(-steps / 15_000))


def _steps(made: RunConfig, steps: np.ndarray, noise: np.random.Generator) -> pd.DataFrame:
    loss = losses(made.arm, made.seed, steps, noise) + 0.03 * noise.standard_normal(len(steps))
    grad = 0.4 * np.exp(0.1 * noise.standard_normal(len(steps)))
    if made.arm in BAD:
        grad[steps >= BAD[made.arm][0] + 1000 * (made.seed % 3) - 500] *= 30
    cost = 0.445 if made.assignment.attn.manifold != "none" else 0.355
    columns = {"step": steps, "tokens_seen": steps * 65_536, "loss": loss, "grad_norm": grad}
    columns |= {
        "lr": 6e-4,
        "muon_lr": 0.02,
        "step_ms": 1e3 * cost,
        "tokens_per_s": 65_536 / cost,
        "time": 0.0,
    }
    return pd.DataFrame(columns)


def _per_matrix(steps: np.ndarray, grown: Any, noise: np.random.Generator, column: str) -> pd.DataFrame:
    layers = MODEL["n_layer"]
    parts = []
    for name in MATRICES:
        kind = name.partition(".")[0]
        value = np.outer(grown[kind](steps), np.linspace(1.0, 0.7, layers))
        value *= np.exp(0.01 * noise.standard_normal(value.shape))
        value[:, 0] = grown[kind](steps)  # the first layer has exactly the planted value
        if name.endswith("c_proj"):
            value = 0.6 * value
        part = pd.DataFrame(
            {"step": np.repeat(steps, layers), "layer": np.tile(np.arange(layers), len(steps))}
        )
        part["matrix"] = "h." + part["layer"].astype(str) + "." + name
        parts.append(part.assign(module=kind, manifold="", **{column: value.ravel()}))
    return pd.concat(parts, ignore_index=True)


def _heads(steps: np.ndarray, grown: Any, noise: np.random.Generator) -> pd.DataFrame:
    layers, heads = MODEL["n_layer"], MODEL["n_head"]
    parts = []
    for part, share in (("q", 0.9), ("k", 0.85), ("v", 0.7), ("qk", 0.1)):
        ids = np.arange(heads) if part == "qk" else np.array([-1])
        index = pd.MultiIndex.from_product([steps, range(layers), ids], names=["step", "layer", "head"])
        frame = index.to_frame(index=False)
        value = share * grown(frame["step"].to_numpy()) ** (2 if part == "qk" else 1)
        frame["sigma_max"] = value * np.exp(0.02 * noise.standard_normal(len(frame)))
        parts.append(frame.assign(part=part))
    return pd.concat(parts, ignore_index=True)


def _attention(steps: np.ndarray, planted: dict[str, int], noise: np.random.Generator) -> pd.DataFrame:
    layers, heads = MODEL["n_layer"], MODEL["n_head"]
    index = pd.MultiIndex.from_product([steps, range(layers), range(heads)], names=["step", "layer", "head"])
    frame = index.to_frame(index=False)
    at = frame["step"].to_numpy()
    jitter = np.exp(0.02 * noise.standard_normal(len(frame)))
    if not planted:
        return frame.assign(
            max_logit=8 * jitter, entropy=0.6 * jitter, p_max=0.2 * jitter, jacobian_norm=0.25 * jitter
        )
    logit = 101 * np.exp((at - planted["logit"]) / 2500).clip(0.05, 40)
    late = at >= planted["saturated"]
    p_max = np.where(late, 0.97, 0.2 + 0.5 * (at / planted["saturated"]).clip(0, 1))
    jacobian = np.where(late, 0.03, 0.25)
    return frame.assign(
        max_logit=logit, entropy=np.where(late, 0.02, 0.6), p_max=p_max, jacobian_norm=jacobian * jitter
    )


def many_arms(arms: int = 40, seeds: int = 2) -> Frames:
    """Forty arms with names of their own, two seeds."""
    names = [*ARMS, *(f"variant-{i:02d}" for i in range(arms - len(ARMS)))]
    return paper_size(names, seeds, step_every=500, flow_every=5000, attention_every=5000)
