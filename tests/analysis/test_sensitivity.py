from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
from synthetic import Run, curve, grid_index, write_store

from analysis import sensitivity
from analysis.load import load
from trainers.errors import InputError

LR, DECAY = "assignment.attn.lr_multiplier", "optimizer.muon.weight_decay"
RATES = (0.125, 0.25, 0.5, 1.0, 2.0)
# Final losses by rate, on average over the seeds; None diverges.
TRUTH = {
    ("all_dgram", 0.0): (2.60, 2.50, 2.70, None, None),
    ("all_dgram", 0.1): (2.55, 2.50, 2.45, 2.48, 2.60),
    ("hetero", 0.0): (2.60, 2.55, 2.50, 2.45, 2.40),
    ("hetero", 0.1): (None, None, None, None, None),
}
SHIFTS = (-0.02, 0.0, 0.5)  # a median does not mind the third


def row(arm: str, seed: int, rate: float, decay: float, final: float | None, status: str) -> dict:
    loss = final + SHIFTS[seed] if final else math.inf
    facts = {"run_id": f"{arm}-s{seed}-{rate}-{decay}", "grid": "retune", "arm": arm, "seed": seed}
    return facts | {"status": status, "final_val_loss": loss, LR: rate, DECAY: decay}


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """A grid's frames with the runs of a retune sweep in them, one under way."""
    rows = [
        row(arm, seed, rate, decay, final, "completed" if final else "diverged")
        for (arm, decay), finals in TRUTH.items()
        for rate, final in zip(RATES, finals, strict=True)
        for seed in range(3)
    ]
    rows.append(row("all_dgram", 0, 4.0, 0.0, 1.0, "running"))
    one = load(write_store(tmp_path_factory.mktemp("one"), [Run("hetero", 0, [2.4])]))
    return replace(one, grid="retune", axes=(LR, DECAY), runs=pd.DataFrame(rows))


def test_what_each_cell_of_a_retune_grid_depends_on(frames):
    table = sensitivity.table(frames)
    assert table["axis"].tolist() == [LR] * 4
    assert list(zip(table["arm"], table[DECAY], strict=True)) == list(TRUTH)
    rows = dict(zip(TRUTH, table.to_dict("records"), strict=True))

    row = rows["all_dgram", 0.0]
    assert (row["best_lr"], row["best_loss"], row["at_edge"]) == (0.25, 2.5, False)
    # Around .25, within a factor of 4: .125 to 1, and 1 diverges.
    assert (row["n_around"], row["spread"]) == (4, math.inf)
    assert (row["rates"], row["rates_diverged"], row["diverged"]) == (5, 2, 0.4)
    assert 0.05 < row["diverged_low"] < 0.06  # 2 of 5: Clopper–Pearson .0527 to .8534
    assert 0.85 < row["diverged_high"] < 0.86
    assert row["n_runs"] == 15 == len(set(row["run_ids"].split()))

    row = rows["all_dgram", 0.1]
    assert (row["best_lr"], row["best_loss"], row["n_around"]) == (0.5, 2.45, 5)
    assert row["spread"] == pytest.approx(0.15)

    row = rows["hetero", 0.0]
    assert (row["best_lr"], row["at_edge"], row["n_around"]) == (2.0, True, 3)
    assert row["spread"] == pytest.approx(0.1)

    row = rows["hetero", 0.1]
    assert all(math.isnan(row[name]) for name in ("best_lr", "best_loss", "spread"))
    assert (row["diverged"], row["rates_diverged"]) == (1.0, 5)


def test_the_factor_around_the_best_rate_can_be_chosen(frames):
    narrow = sensitivity.table(frames, within=2.0)
    assert narrow["n_around"].tolist() == [3, 3, 2, 0]
    assert narrow["spread"].tolist()[0] == pytest.approx(0.2)


def test_the_axis_can_be_named_and_must_be_where_there_are_several(frames):
    assert sensitivity.rate_axes(frames) == (LR,)
    by_decay = sensitivity.table(frames, DECAY)
    assert len(by_decay) == 2 * len(RATES)
    with pytest.raises(InputError, match=r'no axis "assignment.attn.lr_multplier" .*did you mean'):
        sensitivity.table(frames, "assignment.attn.lr_multplier")


@pytest.mark.parametrize("axes", [(), ("optimizer.muon.lr", "optimizer.adamw.lr")])
def test_without_one_rate_the_fix_is_said(tmp_path, axes):
    one = Run("hetero", 0, curve(2.4), axes=dict.fromkeys(axes, 0.1))
    frames = load(write_store(tmp_path, [one], index=grid_index([one], axes=axes)))
    fix = "name one of optimizer.muon.lr, optimizer.adamw.lr" if axes else "add one, as in axes"
    with pytest.raises(InputError, match=f"quickstart: {len(axes)} axes are learning rates; {fix}"):
        sensitivity.table(frames)
