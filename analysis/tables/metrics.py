"""The metrics of the modular-manifolds plan."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from analysis.load import Frames
from analysis.tables.cells import Text, arm_cells, loss_cell, three_digits
from trainers.records import FINISHED

_KINDS = {"attn": "attention", "mlp": "MLP"}


def modular(frames: Frames) -> pd.DataFrame:
    """The metrics of the modular-manifolds plan: one row per arm (and axis cell), in the order of the grid.

    Each is the median over finished runs of the run's own value: losses (nats per token) and perplexity
    at the end, +inf where `val_loss` is; by module kind, at the run's last records, σ_max (largest of
    any matrix), σ_min (smallest) and the Frobenius norm (largest); by module kind, the median gradient
    norm over steps and matrices, before the clip; median tokens per second over steps. `n_spectra` and
    `n_flow` count the runs that recorded spectra, and norms and gradients. `run_ids`: the finished runs.
    """
    runs = frames.runs.drop_duplicates("run_id").set_index("run_id")
    val_loss = runs["final_val_loss"]
    train_loss = frames.evals.groupby("run_id")["train_loss"].last().reindex(runs.index)
    values = pd.DataFrame({"train_loss": train_loss.mask(val_loss == math.inf, math.inf)})
    values["val_loss"], values["perplexity"] = val_loss, np.exp(val_loss)
    for kind in _KINDS:
        spectra = _last(frames.spectra[frames.spectra["module"] == kind])
        flow = frames.flow[frames.flow["module"] == kind]
        values[f"{kind}_sigma_max"] = spectra["sigma_max"].max()
        values[f"{kind}_sigma_min"] = spectra["sigma_min"].min()
        values[f"{kind}_norm"] = _last(flow)["weight_norm"].max()
        values[f"{kind}_grad_norm"] = flow.groupby("run_id")["grad_norm"].median()
    values["tokens_per_s"] = frames.steps.groupby("run_id")["tokens_per_s"].median()
    rows = []
    for label, group in frames.runs.groupby("label", sort=False):
        finished = group.loc[group["status"].isin(FINISHED), "run_id"]
        own = values.reindex(finished)
        rows.append(
            {"arm": str(group["arm"].iloc[0]), "label": str(label), "n_finished": len(finished)}
            | {axis: group[axis].iloc[0] for axis in frames.axes}
            | own.median().to_dict()
            | {"n_spectra": finished.isin(frames.spectra["run_id"]).sum()}
            | {"n_flow": finished.isin(frames.flow["run_id"]).sum(), "run_ids": " ".join(finished)}
        )
    return pd.DataFrame(rows)


def _last(long: pd.DataFrame) -> Any:
    """The rows of each run's last step, by run."""
    return long[long["step"] == long.groupby("run_id")["step"].transform("max")].groupby("run_id")


def modular_text(frames: Frames, table: pd.DataFrame) -> Text:
    """The same with four decimals of losses and three digits of the rest."""
    rows = []
    for row in table.to_dict("records"):
        cells = arm_cells(frames, row)
        cells |= {"n": str(row["n_finished"]), "train loss": loss_cell(row["train_loss"])}
        cells |= {"val loss": loss_cell(row["val_loss"]), "perplexity": _perplexity(row["perplexity"])}
        for kind, name in _KINDS.items():
            cells[f"{name} σ_max"] = three_digits(row[f"{kind}_sigma_max"])
            cells[f"{name} σ_min"] = three_digits(row[f"{kind}_sigma_min"])
            cells[f"{name} ‖W‖_F"] = three_digits(row[f"{kind}_norm"])
            cells[f"{name} gradient norm"] = three_digits(row[f"{kind}_grad_norm"])
        cells["tokens/s"] = three_digits(row["tokens_per_s"])
        rows.append(cells)
    note = (
        "Medians over n finished runs. Losses at the end, nats per token. At the last record of a run: "
        "σ_max and ‖W‖_F (Frobenius) of the largest matrix, σ_min of the smallest. Gradient norm: Frobenius, "
        "before the clip, median over steps and matrices. tokens/s: median over steps."
    )
    return Text.of(rows, ("arm", *frames.axes), note)


def _perplexity(value: float) -> str:
    return "diverged" if value == math.inf else three_digits(value)
