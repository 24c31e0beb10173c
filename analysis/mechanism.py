"""What moved first: when each measured quantity of a run first left its bounds, how long before the loss
did, how often the same alarm rings in arms that stay stable, and which order of events the runs support.

No order is assumed. A quantity is looked at every so often, so a crossing lies in a bracket (after, step];
of two crossings the earlier is known only where their brackets do not overlap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.load import Frames
from analysis.stats import (
    SHORT_WINDOW,
    SPIKE_SIGMAS,
    SPIKE_WINDOW,
    clopper_pearson,
    holm,
    median_interval,
    sign_test,
    spikes,
)
from analysis.stepwise import LOSS_RISE, first_crossing
from analysis.survival import times
from analysis.tables import Text, p_cell
from trainers.records import FINISHED

LEVEL = 0.05
"""Family-wise error of what is called supported."""


class Rule(Enum):
    """How a quantity leaves its bounds. A value that is not finite has left them by any rule."""

    ABOVE = "above"
    BELOW = "below"
    SPIKE = "standard deviations above its own past"
    RISE = "above its own lowest value so far"


@dataclass(frozen=True, slots=True)
class Quantity:
    """A series per run, and the threshold that was fixed before any run was looked at."""

    name: str
    words: str
    rule: Rule
    threshold: float
    records: str
    """The kind of record it comes from."""

    @property
    def bound(self) -> str:
        """`> 10`, `< 0.1`, `7σ spike`, `best + 1`."""
        number = f"{self.threshold:g}"
        return {
            Rule.ABOVE: f"> {number}",
            Rule.BELOW: f"< {number}",
            Rule.SPIKE: f"{number}σ spike",
            Rule.RISE: f"best + {number}",
        }[self.rule]


QUANTITIES = (
    Quantity("sigma", "attention σ_max", Rule.ABOVE, 10.0, "spectra"),
    Quantity("logit", "largest attention logit", Rule.ABOVE, 100.0, "attention"),
    Quantity("entropy", "attention entropy, lowest layer", Rule.BELOW, 0.1, "attention"),
    Quantity("jacobian", "softmax ‖J‖_F, lowest layer", Rule.BELOW, 0.1, "attention"),
    Quantity("gradient", "gradient norm", Rule.SPIKE, SPIKE_SIGMAS, "steps"),
    Quantity("update", "update ‖ΔW‖/‖W‖, largest matrix", Rule.SPIKE, SPIKE_SIGMAS, "flow"),
    Quantity("loss", "loss of a step", Rule.RISE, LOSS_RISE, "steps"),
)
"""σ and logit: the loosest caps that a retune of DGram attention tries (σ ≤ 10; QK-clip at 100, as in
arXiv 2507.20534). Entropy: a tenth of a uniform row's. ‖J‖: a fifth of its largest value, .5, on the sharp
side alone (p_max > .5), because flat rows have a small ‖J‖ too. Spikes: OLMo 2 (arXiv 2501.00656). Loss:
the rise of the hard-spike rule of `trainers.stability`, on single steps. Those of steps are dated when the
steps are loaded, by all of them: `analysis.stepwise`."""
SHARP = 0.5
"""p_max above which a small ‖J‖ means saturation."""
EVENT = "event"
"""The first bad evaluation, or the step at which a run diverged: see `survival.times`."""
CHAIN = ("sigma", "logit", "jacobian", EVENT)
"""The order that arXiv 2606.13276 proposes: singular values grow, logits inflate, softmax saturates, then
training fails."""


def series(frames: Frames, quantity: Quantity) -> pd.DataFrame:
    """One row per run and step at which it was recorded, of what is not of every step: `run_id, step, value`.

    `sigma`: largest of any attention matrix, from spectra and flow. `logit`: largest of any head.
    `entropy`, `jacobian`: mean over the heads of a layer, of the layer where it is lowest; ‖J‖ counts as
    .5, its largest value, where the layer's p_max is at most `SHARP`. `update`: largest of any matrix.
    """
    if quantity.name == "sigma":
        columns = ["run_id", "step", "module", "sigma_max"]
        both = pd.concat([frames.spectra[columns], frames.flow[columns]])
        return _by_step(both[both["module"] == "attn"], "sigma_max", "max")
    if quantity.name == "logit":
        return _by_step(frames.attention, "max_logit", "max")
    if quantity.name in ("entropy", "jacobian"):
        layers = layer_means(frames)
        flat = layers["p_max"] <= SHARP
        layers["jacobian"] = layers["jacobian_norm"].mask(flat, 0.5)
        return _by_step(layers, quantity.name, "min")
    return _by_step(frames.flow, "update_ratio", "max")


def layer_means(frames: Frames) -> pd.DataFrame:
    """Attention's records as means over the heads of each layer."""
    columns = ["entropy", "p_max", "jacobian_norm"]
    return frames.attention.groupby(["run_id", "step", "layer"], sort=False)[columns].mean().reset_index()


def _by_step(long: pd.DataFrame, column: str, how: str) -> pd.DataFrame:
    """One value a step; NaN, which is no number, wins over any."""
    groups = long.groupby(["run_id", "step"])[column]
    values = groups.max() if how == "max" else groups.min()
    lost = long[column].isna()
    if lost.any():
        broken = pd.MultiIndex.from_frame(long.loc[lost, ["run_id", "step"]]).unique()
        values[values.index.isin(broken)] = math.nan
    return values.rename("value").reset_index()


_CROSSINGS = {
    "run_id": "string",
    "arm": "string",
    "label": "string",
    "seed": "int64",
    "quantity": "string",
    "crossed": "bool",
    "after": "int64",
    "step": "int64",
    "value": "float64",
    "records": "int64",
}


def crossings(frames: Frames) -> pd.DataFrame:
    """One row per run and quantity that it recorded.

    Where `crossed`, the first crossing lies in `(after, step]` and `value` is the one at `step`; `after` is
    0 where the first record had crossed already. Else censored: within bounds up to `step`.
    """
    runs = {run["run_id"]: run for run in frames.runs.drop_duplicates("run_id").to_dict("records")}
    rows = [
        {name: runs[run_id][name] for name in ("run_id", "arm", "label", "seed")}
        | {"quantity": quantity.name, **first}
        for quantity in QUANTITIES
        for run_id, first in _firsts(frames, quantity, runs)
    ]
    return pd.DataFrame(rows, columns=list(_CROSSINGS)).astype(_CROSSINGS)


def _firsts(
    frames: Frames, quantity: Quantity, runs: Mapping[str, Mapping[Any, Any]]
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """The `first_crossing` of every run of `runs`, by id."""
    if quantity.records == "steps":
        found = frames.stepwise[frames.stepwise["quantity"] == quantity.name]
        columns = ["crossed", "after", "step", "value", "records"]
        firsts = zip(found["run_id"], found[columns].to_dict("records"), strict=True)
        yield from ((run_id, first) for run_id, first in firsts if run_id in runs)
        return
    for run_id, rows in series(frames, quantity).groupby("run_id", sort=False):
        run = runs.get(str(run_id))
        if run is None:
            continue
        rows = rows.sort_values("step")
        horizon = run["step"] if pd.isna(run["horizon"]) else run["horizon"]
        steps, values = rows["step"].to_numpy(), rows["value"].to_numpy(dtype=float)
        yield str(run_id), first_crossing(steps, values, _outside(steps, values, quantity, horizon))


def _outside(steps: Any, values: Any, quantity: Quantity, horizon: int) -> Any:
    """Which records are out of bounds, of a quantity that is not of every step."""
    lost = ~np.isfinite(values)
    if quantity.rule is Rule.ABOVE:
        return lost | (values > quantity.threshold)
    if quantity.rule is Rule.BELOW:
        return lost | (values < quantity.threshold)
    cadence = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    window = max(SHORT_WINDOW, round(min(SPIKE_WINDOW, horizon / 10) / max(cadence, 1.0)))
    return spikes(values, window=window, sigmas=quantity.threshold)


def lead_times(frames: Frames, crossed: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per run that became unstable and quantity that it recorded: how many steps the alarm came
    before the first bad evaluation.

    `lead` = `event_step` - `alarm_step`, -inf where there was no alarm: the steps that someone who watches
    would have had. The truth lies in `(lead_low, lead_high)`, because both were looked at every so often.
    """
    found = crossings(frames) if crossed is None else crossed
    events = _events(frames)
    both = found.merge(events[["run_id", "event_after", "event_step"]], on="run_id")
    silent = ~both["crossed"]
    both["lead"] = (both["event_step"] - both["step"]).astype(float).mask(silent, -math.inf)
    both["lead_low"] = (both["event_after"] - both["step"]).astype(float).mask(silent, -math.inf)
    both["lead_high"] = (both["event_step"] - both["after"]).astype(float)
    both["alarm_step"] = both["step"].astype("Int64").mask(silent)
    columns = ["run_id", "arm", "label", "seed", "quantity", "alarm_step", "event_after", "event_step"]
    return both[[*columns, "lead", "lead_low", "lead_high"]]


def _events(frames: Frames) -> pd.DataFrame:
    """Runs that became unstable, each once, with the bracket of the first bad evaluation."""
    seen = times(frames).drop_duplicates("run_id")
    events = seen[seen["event"]]
    return events.rename(columns={"after": "event_after", "step": "event_step"})


def stable_runs(frames: Frames) -> list[str]:
    """Finished runs of the arms in which no finished run is unstable."""
    seen = times(frames)
    bad = set(seen.loc[seen["event"], "label"])
    done = seen["status"].isin(FINISHED) & ~seen["label"].isin(bad)
    return list(dict.fromkeys(seen.loc[done, "run_id"].tolist()))


def alarms(frames: Frames, crossed: pd.DataFrame | None = None) -> pd.DataFrame:
    """T5: one row per quantity, as an alarm for instability.

    Of the `n_unstable` runs that became unstable and recorded it, `n_before` crossed before the first bad
    evaluation; the lead in steps is the median over those runs, a silent one as -inf, with its exact
    interval (none below six runs). Of the `n_stable` runs of stable arms, `n_false` crossed at all. Shares
    have Clopper–Pearson intervals.
    """
    found = crossings(frames) if crossed is None else crossed
    leads = lead_times(frames, found)
    calm = found[found["run_id"].isin(stable_runs(frames))]
    rows = []
    for quantity in QUANTITIES:
        own, quiet = (t[t["quantity"] == quantity.name] for t in (leads, calm))
        lead = median_interval(own["lead"].tolist())
        before, false = int((own["lead"] > 0).sum()), int(quiet["crossed"].sum())
        hit, wrong = clopper_pearson(before, len(own)), clopper_pearson(false, len(quiet))
        rows.append(
            {
                "quantity": quantity.name,
                "what": quantity.words,
                "bound": quantity.bound,
                "n_unstable": len(own),
                "n_before": before,
                "before_low": hit.low,
                "before_high": hit.high,
                "lead_median_steps": lead.estimate,
                "lead_low_steps": lead.low,
                "lead_high_steps": lead.high,
                "n_stable": len(quiet),
                "n_false": false,
                "false_low": wrong.low,
                "false_high": wrong.high,
                "run_ids": " ".join([*own["run_id"], *quiet["run_id"]]),
            }
        )
    return pd.DataFrame(rows)


def precedence(frames: Frames, crossed: pd.DataFrame | None = None) -> pd.DataFrame:
    """Which of every two quantities crossed first, over the runs that became unstable.

    `first`, `second` count the runs in which that one is known to have crossed before the other; a
    quantity that never crossed comes after one that did, if it was still watched then. `undecided`: their
    brackets overlap. `neither` crossed. `p`: exact sign test of the decided runs; `holm` adjusts over all
    pairs; `supported` names the one that came first where `holm` < .05, else "". Were the order chance,
    some pair would be called supported in at most 5% of such tables.
    """
    found = crossings(frames) if crossed is None else crossed
    found = found[found["run_id"].isin(_events(frames)["run_id"])]
    by_run = {run_id: rows.set_index("quantity") for run_id, rows in found.groupby("run_id", sort=False)}
    rows = []
    for a, b in itertools.combinations((q.name for q in QUANTITIES), 2):
        both = {r: t for r, t in by_run.items() if a in t.index and b in t.index}
        signs = {r: _sign(t.loc[a], t.loc[b]) for r, t in both.items()}
        counts = {s: list(signs.values()).count(s) for s in ("<", ">", "~", "")}
        rows.append(
            {"a": a, "b": b, "n": len(both), "first": counts["<"], "second": counts[">"]}
            | {"undecided": counts["~"], "neither": counts[""]}
            | _share("share_first", counts["<"], counts["<"] + counts[">"])
            | {"p": sign_test(counts["<"], counts[">"]), "run_ids": " ".join(str(r) for r in both)}
        )
    table = pd.DataFrame(rows)
    table.insert(len(table.columns) - 1, "holm", holm(table["p"].tolist()))
    sure = table["holm"] < LEVEL
    winner = table["a"].where(table["first"] > table["second"], table["b"])
    table.insert(len(table.columns) - 1, "supported", winner.where(sure, ""))
    return table


def _share(name: str, k: int, n: int) -> dict[str, float]:
    found = clopper_pearson(k, n)
    bounds = {f"{name}_low": found.low, f"{name}_high": found.high}
    return {name: found.estimate, **bounds}


def _sign(a: Any, b: Any) -> str:
    """`<` where a is known to have crossed before b, `>` the other way, `~` not known, "" neither did."""
    if not (a["crossed"] or b["crossed"]):
        return ""
    if a["crossed"] and a["step"] <= b["after"]:
        return "<"
    if b["crossed"] and b["step"] <= a["after"]:
        return ">"
    return "~"


def orders(frames: Frames, crossed: pd.DataFrame | None = None) -> pd.DataFrame:
    """Each order of crossings that was seen, with the share of the unstable runs that show it.

    Quantities are joined by `<` where the bracket of the one ends before the next one's begins and by `~`
    where that is not known; those that never crossed are left out. The event is among them.
    """
    found = crossings(frames) if crossed is None else crossed
    events = _events(frames)
    seen: dict[str, list[str]] = {}
    for run in events.to_dict("records"):
        own = found[(found["run_id"] == run["run_id"]) & found["crossed"]]
        rows = [*own[["quantity", "after", "step"]].to_dict("records"), _event_row(run)]
        rows.sort(key=lambda r: (r["step"], r["after"]))
        text = str(rows[0]["quantity"])
        for one, other in itertools.pairwise(rows):
            text += f" {'<' if one['step'] <= other['after'] else '~'} {other['quantity']}"
        seen.setdefault(text, []).append(str(run["run_id"]))
    table = [
        {"order": text, "k": len(ids), "n": len(events)}
        | _share("share", len(ids), len(events))
        | {"run_ids": " ".join(ids)}
        for text, ids in sorted(seen.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    columns = ["order", "k", "n", "share", "share_low", "share_high", "run_ids"]
    return pd.DataFrame(table, columns=columns)


def _event_row(run: Any) -> dict[str, Any]:
    return {"quantity": EVENT, "crossed": True, "after": run["event_after"], "step": run["event_step"]}


@dataclass(frozen=True, slots=True)
class Chain:
    """How many unstable runs show the paper's order of events (see `CHAIN`)."""

    k: int
    """Runs in which each link is known to come before the next."""
    against: int
    """Runs in which a link is known to come after a later one, or not to have come before training failed."""
    n: int
    """Unstable runs in which all links were recorded; the rest of them are undecided."""
    low: float
    high: float
    """Clopper–Pearson interval of k / n."""
    p: float
    """One-sided exact p of k or more, were training to fail last and all orders of the links before it
    equally likely. Undecided runs count as if they did not show it."""
    runs: tuple[str, ...]
    """Ids of the n runs."""

    @property
    def verdict(self) -> str:
        """Supported where p < .05 and most runs show it; contradicted where most are known not to, with
        the whole interval of their share above ½."""
        if self.n and self.p < LEVEL and 2 * self.k > self.n:
            return "supported"
        if self.n and clopper_pearson(self.against, self.n).low > 0.5:
            return "contradicted"
        return "not resolved" if self.n else "no data"


def chain(frames: Frames, crossed: pd.DataFrame | None = None) -> Chain:
    """The one order that was named before any run.

    That the failure comes last shows nothing of the order of the alarms before it, which are mostly there
    by then: chance is over their orders alone, so that one run cannot support the chain.
    """
    found = crossings(frames) if crossed is None else crossed
    k = against = 0
    runs = []
    for run in _events(frames).to_dict("records"):
        own = {r["quantity"]: r for r in found[found["run_id"] == run["run_id"]].to_dict("records")}
        own[EVENT] = _event_row(run)
        if not all(link in own for link in CHAIN):
            continue
        runs.append(str(run["run_id"]))
        k += all(_sign(own[a], own[b]) == "<" for a, b in itertools.pairwise(CHAIN))
        against += any(_sign(own[a], own[b]) == ">" for a, b in itertools.combinations(CHAIN, 2))
    n = len(runs)
    share = clopper_pearson(k, n)
    chance = 1 / math.factorial(len(CHAIN) - 1)
    p = float(stats.binom.sf(k - 1, n, chance)) if n else math.nan
    return Chain(k, against, n, share.low, share.high, p, tuple(runs))


def alarms_text(table: pd.DataFrame) -> Text:
    """The table of `alarms` as people read it."""
    columns = ("quantity", "alarm", "warned", "lead, steps", "false alarms")
    rows = tuple(
        (
            *(row["what"], row["bound"]),
            _k_of_n(row["n_before"], row["n_unstable"], row["before_low"], row["before_high"]),
            _steps(row["lead_median_steps"], row["lead_low_steps"], row["lead_high_steps"]),
            _k_of_n(row["n_false"], row["n_stable"], row["false_low"], row["false_high"]),
        )
        for row in table.to_dict("records")
    )
    notes = (
        "warned: unstable runs that crossed before the first bad evaluation. lead: from the alarm to that "
        "evaluation, median over the unstable runs, one without alarm as −∞, with its exact 95% interval "
        "(none below six runs). false alarms: runs of stable arms that crossed. Shares with 95% "
        "Clopper–Pearson intervals. Thresholds were fixed before any run was looked at.",
    )
    return Text(columns, rows, (True, True, False, False, False), notes)


def precedence_text(table: pd.DataFrame) -> Text:
    """The pairs of `precedence` in which one is known to have come first in some run."""
    columns = (
        "quantity",
        "other",
        "first",
        "other first",
        "not known",
        "neither",
        "p",
        "Holm p",
        "supported",
    )
    words = {q.name: q.words for q in QUANTITIES}
    told = table[table["first"] + table["second"] > 0]
    rows = tuple(
        (
            *(words[row["a"]], words[row["b"]]),
            _decided(row),
            *(str(row[name]) for name in ("second", "undecided", "neither")),
            *(p_cell(row[name]) for name in ("p", "holm")),
            {row["a"]: "first", row["b"]: "other first"}.get(row["supported"], "–"),
        )
        for row in told.to_dict("records")
    )
    notes = (
        f"Over the unstable runs. Left out, but counted by Holm: {len(table) - len(told)} pairs that no run "
        "decides. first: of the runs that decide, with the 95% Clopper–Pearson interval. not known: both lie "
        "between the same two looks. p: exact sign test; Holm over all pairs, below .05 supported.",
    )
    return Text(columns, rows, (True, True, *(False,) * 6, True), notes)


def _decided(row: Mapping[Any, Any]) -> str:
    n = row["first"] + row["second"]
    return _k_of_n(row["first"], n, row["share_first_low"], row["share_first_high"])


def orders_text(table: pd.DataFrame, found: Chain) -> Text:
    """The orders that were seen, and in a note what the runs say of the paper's."""
    words = {q.name: q.words for q in QUANTITIES} | {EVENT: "first bad evaluation"}
    rows = tuple(
        (
            " ".join(words.get(part, part) for part in row["order"].split(" ")),
            _k_of_n(row["k"], row["n"], row["share_low"], row["share_high"]),
        )
        for row in table.to_dict("records")
    )
    notes = (
        "< known to come before; ~ not known, between the same two looks. What never crossed is left out.",
        f"Proposed by arXiv 2606.13276: {' → '.join(words[link] for link in CHAIN)}. {_shown(found)}",
    )
    return Text(("order", "unstable runs"), rows, (True, False), notes)


def _shown(found: Chain) -> str:
    if not found.n:
        return "No unstable run recorded all of them."
    p = p_cell(found.p)
    return (
        f"Unstable runs that show it: {_k_of_n(found.k, found.n, found.low, found.high)}; known to be "
        f"otherwise: {found.against}; p {p if p.startswith('<') else f'= {p}'} were all orders of the "
        f"alarms equally likely: {found.verdict}. That one thing comes before another does not make it the "
        "cause."
    )


def _k_of_n(k: int, n: int, low: float, high: float) -> str:
    return f"{k}/{n} [{low:.2f}, {high:.2f}]" if n else "–"


def _steps(middle: float, low: float, high: float) -> str:
    def text(value: float) -> str:
        return "−∞" if value == -math.inf else f"{value:,.0f}".replace("-", "−")

    if math.isnan(middle):
        return "–"
    return text(middle) if math.isnan(low) else f"{text(middle)} [{text(low)}, {text(high)}]"
