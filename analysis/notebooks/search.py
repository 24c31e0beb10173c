"""What a search over settings gives: ranks, whether shorter horizons rank alike, and a grid that runs the
best settings again on fresh seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import yaml

from analysis.figures.drawing import without
from analysis.load import Frames
from analysis.stats import clopper_pearson, median, ranks
from analysis.tables import Text
from mmsweep.halving import survivors
from mmsweep.regrid import arm_name, grid_text
from trainers.config import RunConfig, RuntimeConfig
from trainers.errors import InputError
from trainers.records import FINISHED


def ranking(frames: Frames) -> pd.DataFrame:
    """One row per setting (arm and axis cell) with a finished run: longest horizon first, then best first.

    `final_median` (nats per token; a diverged run counts as +inf, so diverged settings are last) and its
    `rank` among the settings of one horizon (equal ones share the lowest); `n` finished runs, `k_unstable`
    of them, their share with its 95% Clopper–Pearson interval; `run_ids`.
    """
    rows = []
    done = frames.runs[frames.runs["final_val_loss"].notna() & frames.runs["horizon"].notna()]
    for label, runs in done.groupby("label", sort=False):
        bad = runs["unstable"].fillna(True).astype(bool) | ~np.isfinite(runs["final_val_loss"])
        share = clopper_pearson(int(bad.sum()), len(runs))
        row = {"label": str(label), "horizon": int(runs["horizon"].iloc[0])}
        row |= {"final_median": median(runs["final_val_loss"].tolist()), "n": len(runs)}
        row |= {"k_unstable": int(bad.sum()), "unstable": share.estimate}
        row |= {"unstable_low": share.low, "unstable_high": share.high}
        rows.append(row | {"run_ids": " ".join(runs["run_id"])})
    columns = ["label", "horizon", "final_median", "n", "k_unstable"]
    columns += ["unstable", "unstable_low", "unstable_high", "run_ids"]
    table = pd.DataFrame(rows, columns=columns)
    place = table.groupby("horizon")["final_median"].transform(lambda losses: ranks(losses.tolist()))
    table.insert(0, "rank", place.astype("Int64"))
    return table.sort_values(["horizon", "rank"], ascending=[False, True], kind="stable", ignore_index=True)


def ranking_text(table: pd.DataFrame) -> Text:
    """The same as people read it."""
    rows = tuple(
        (
            *(str(row["rank"]), row["label"], f"{row['horizon']:,}"),
            "diverged" if math.isinf(row["final_median"]) else f"{row['final_median']:.4f}",
            str(row["n"]),
            f"{row['k_unstable']}/{row['n']} [{row['unstable_low']:.2f}, {row['unstable_high']:.2f}]",
        )
        for row in table.to_dict("records")
    )
    notes = (
        "Rank: among the settings of one horizon, by the median final loss (nats per token), a diverged run "
        "as +∞. unstable: of the finished runs, with the 95% Clopper–Pearson interval of the share.",
    )
    columns = ("rank", "setting", "steps", "median final loss", "runs", "unstable")
    return Text(columns, rows, (False, True, False, False, False, False), notes)


@dataclass(frozen=True, slots=True)
class Halving:
    """What successive halving would have done with runs that were all made (see `halving`)."""

    table: pd.DataFrame
    """One row per setting, best at the longest horizon first: `setting`, and by horizon `rank_<steps>` and
    `kept_<steps>`, whether halving would have gone on with it after that horizon."""
    agreement: pd.DataFrame
    """By each two successive horizons: Spearman's rank correlation of the medians, over `n` settings."""
    picks: tuple[str, ...]
    """Settings left after the longest horizon."""
    best: tuple[str, ...]
    """Settings with the lowest median there, had all been run."""
    steps_share: float
    """Optimizer steps of halving, as a share of running every setting at the longest horizon."""


def halving(frames: Frames) -> Halving:
    """Successive halving over whole schedules: after each horizon the better half of the settings goes on.

    Every horizon has a schedule of its own that decays to the end, because losses in the middle of a longer
    one hardly predict its end. Settings are compared by the median final loss over seeds, diverged = +inf;
    of equals at the cut all go on, of diverged ones none. Only settings that finished at every horizon take
    part.

    Raises:
        InputError: the finished runs are of one horizon, or no two settings finished at every one.
    """
    runs = frames.runs[frames.runs["final_val_loss"].notna() & frames.runs["horizon"].notna()]
    horizons = sorted(int(h) for h in runs["horizon"].unique())
    if len(horizons) < 2:
        have = f"all have {horizons[0]:,} steps" if horizons else "none has finished"
        raise InputError(f"halving needs runs of several horizons, and of these {have}")
    lengths = [p for p in frames.axes if (runs.groupby(p)["horizon"].nunique() == 1).all()]
    names = {label: without(frames, str(label), *lengths) for label in runs["label"].unique()}
    cells = runs.assign(setting=runs["label"].map(names)).groupby(["setting", "horizon"], sort=False)
    losses = cells["final_val_loss"].agg(lambda values: median(values.tolist())).unstack().dropna()
    if len(losses) < 2:
        raise InputError(f"halving needs two settings that finished at each of {len(horizons)} horizons")
    losses = losses.iloc[losses[horizons[-1]].argsort(kind="stable")]
    return halved(losses, horizons)


def halved(losses: pd.DataFrame, horizons: Sequence[int]) -> Halving:
    """Halving of `losses`, a row per setting and a column per horizon, shortest first."""
    table = pd.DataFrame({"setting": losses.index.astype(str)})
    alive, spent = list(losses.index), 0
    for horizon in horizons:
        spent += horizon * len(alive)
        at = {s: float(losses.loc[s, horizon]) for s in alive}
        alive = survivors(at) if horizon != horizons[-1] else [s for s in alive if at[s] == min(at.values())]
        table[f"rank_{horizon}"] = ranks(losses[horizon].tolist())
        table[f"kept_{horizon}"] = [s in alive for s in losses.index]
    pairs = []
    for short, long in itertools.pairwise(horizons):
        both = losses[[short, long]].rank()
        rho = both[short].corr(both[long]) if (both.nunique() > 1).all() else math.nan
        pairs.append({"horizon": short, "next": long, "spearman": float(rho), "n": len(losses)})
    least = losses[horizons[-1]].min()
    best = tuple(str(s) for s in losses.index if losses.loc[s, horizons[-1]] == least)
    share = spent / (horizons[-1] * len(losses))
    return Halving(table, pd.DataFrame(pairs), tuple(map(str, alive)), best, share)


def halving_text(found: Halving) -> Text:
    """The ranks at each horizon, and what halving would have kept, picked and cost."""
    horizons = [int(c.removeprefix("rank_")) for c in map(str, found.table) if c.startswith("rank_")]
    rows = tuple(
        (row["setting"], *(f"{row[f'rank_{h}']}{', kept' if row[f'kept_{h}'] else ''}" for h in horizons))
        for row in found.table.to_dict("records")
    )
    agreement = "; ".join(
        f"{row['horizon']:,} and {row['next']:,} steps {row['spearman']:.2f}"
        for row in found.agreement.to_dict("records")
    )
    notes = (
        f"Rank of the median final loss among all {len(rows)} settings; kept: halving goes on with it. "
        f"Spearman's correlation of the ranks: {agreement}.",
        f"Halving picks {', '.join(found.picks)}, for {found.steps_share:.0%} of the steps of training all "
        f"settings at the longest horizon. Lowest of all there: {', '.join(found.best)}.",
    )
    columns = ("setting", *(f"{h:,} steps" for h in horizons))
    return Text(columns, rows, (True, *(False,) * len(horizons)), notes)


def rerun_grid(frames: Frames, labels: Sequence[str], *, seeds: Sequence[int], name: str) -> str:
    """A grid file (YAML) that trains these settings on `seeds`, each as an arm, all else as it was.

    What the settings share is its `base`. They keep their arms' names where those differ, and are named by
    their labels else. Resources are not in a run's config and take their defaults.

    Raises:
        InputError: no run of a setting has its config yet.
    """
    parts: dict[str, RunConfig] = {}
    own = frames.runs[frames.runs["label"].isin(labels)]
    distinct = own["arm"].nunique() == len(labels)
    for label in labels:
        runs = own[own["label"] == label]
        config = next((frames.configs[r] for r in runs["run_id"] if r in frames.configs), None)
        if config is None:
            raise InputError(f"{label}: no run has begun, so its config is not known")
        run = RunConfig.model_validate(config["config"])
        name_of_arm = str(runs["arm"].iloc[0]) if distinct else arm_name(label, parts)
        parts[name_of_arm] = run.model_copy(update={"runtime": RuntimeConfig()})
    return grid_text(name, parts, seeds)


def horizons_axis(frames: Frames) -> str:
    """An axis for a grid file (YAML): a quarter, a half and all of the longest horizon, with warm-up and
    evaluations in proportion; "" where no run has its config yet."""
    configs = [c["config"] for c in frames.configs.values() if "config" in c]
    if not configs:
        return ""
    longest = max(configs, key=lambda config: int(config["schedule"]["steps"]))
    bundles = {}
    for name, share in (("quarter", 4), ("half", 2), ("whole", 1)):
        steps, warmup = (int(longest["schedule"][key]) // share for key in ("steps", "warmup_steps"))
        every = max(1, int(longest["evaluation"]["every"]) // share)
        bundles[name] = {
            "schedule": {"steps": max(1, steps), "warmup_steps": warmup},
            "evaluation": {"every": every},
        }
    text: str = yaml.safe_dump({"axes": {"horizon": bundles}}, sort_keys=False, default_flow_style=None)
    return text.rstrip()


def fresh_seeds(frames: Frames, n: int) -> list[int]:
    """`n` seeds above all that were used."""
    first = int(frames.runs["seed"].max()) + 1
    return list(range(first, first + n))


def calm_settings(frames: Frames) -> pd.DataFrame:
    """Per arm: in how many of its settings with finished runs no finished run is unstable."""
    done = frames.runs[frames.runs["status"].isin(FINISHED) & frames.runs["unstable"].notna()]
    rows = []
    for arm, runs in done.groupby("arm", sort=False):
        calm = ~runs.groupby("label")["unstable"].any().astype(bool)
        rows.append(
            {
                "arm": str(arm),
                "settings": len(calm),
                "without an unstable run": int(calm.sum()),
                "runs": len(runs),
                "unstable runs": int(runs["unstable"].sum()),
                "run_ids": " ".join(runs["run_id"]),
            }
        )
    columns = ["arm", "settings", "without an unstable run", "runs", "unstable runs", "run_ids"]
    return pd.DataFrame(rows, columns=columns)
