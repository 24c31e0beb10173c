"""The five hypotheses of the modular-manifolds plan, each with the verdict that its runs give.

Every comparison is one arm minus another, paired by seed, with a 95% interval that is not adjusted for
the number of comparisons. None was declared before the runs: all are exploratory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import pandas as pd

from analysis.load import Frames
from analysis.stats import (
    SHORT_WINDOW,
    SPIKE_SIGMAS,
    SPIKE_WINDOW,
    Interval,
    clopper_pearson,
    paired_t,
)
from analysis.tables import Text, three_digits
from trainers.records import FINISHED

ADAMW_ARMS = ("baseline", "stiefel_all", "stiefel_attention", "stiefel_ffn", "spectral_all")
MUON_ARMS = ("muon_all", "muon_attention", "muon_ffn", "manifold_muon")
DECAY_ARMS = ("stiefel_all_decay", "baseline_no_decay")
"""Beyond the plan's nine: without them H5 has no answer."""
NINE = ("baseline", *MUON_ARMS[:3], *ADAMW_ARMS[1:], "manifold_muon")
KINDS = {"attn": "attention", "mlp": "MLP"}

SUPPORTED = "supported"
CONTRADICTED = "contradicted"
NOT_RESOLVED = "not resolved"
NO_DATA = "no data"

MARGIN = 0.0135
"""Nats per token: the gap of losses that this project sets out to resolve. H5 calls less no benefit."""
NO_GROWTH = 1e-3
"""ln growth below this (0.1%) counts as none, so that rounding on a manifold is no finding."""


def applies(frames: Frames) -> bool:
    """Whether the plan's nine are there to compare: at least one arm that trains matrices by Muon, and
    at least one that trains all by AdamW."""
    arms = set(frames.runs["arm"])
    return bool(arms & set(MUON_ARMS)) and bool(arms & set(ADAMW_ARMS))


@dataclass(frozen=True, slots=True)
class Measure:
    """A column of `measures`, and how people read it."""

    column: str
    words: str
    digits: str = "#.3g"
    is_growth: bool = False
    """Shown as a factor: the column holds its logarithm."""


VAL_LOSS = Measure("val_loss", "final validation loss (nats)", ".4f")
UNSTABLE = Measure("unstable", "share of unstable runs")
SPIKES = Measure("spike_score", "spike score (share of steps)")
LOSS_SPREAD = Measure("loss_spread", "spread of the step loss (nats)")
GRAD_SPREAD = Measure("grad_spread", "spread of ln gradient norm")
GROWTH = {
    kind: (
        Measure(f"{kind}_sigma_growth", f"growth of σ_max, {name}", is_growth=True),
        Measure(f"{kind}_norm_growth", f"growth of ‖W‖_F, {name}", is_growth=True),
    )
    for kind, name in KINDS.items()
}


class Claim(Enum):
    """What a hypothesis says of a difference (arm minus reference)."""

    LOWER = "below 0"
    HIGHER = "above 0"
    NO_BENEFIT = "not below 0 by as much as the margin"
    NONE = "nothing: the difference stands beside the others for comparison"


@dataclass(frozen=True, slots=True)
class Comparison:
    """`arm` minus `reference` in one measure."""

    measure: Measure
    arm: str
    reference: str
    arm_median: float
    reference_median: float
    """Medians over the paired runs."""
    difference: Interval
    """Mean over the seeds where it is finite; n counts them."""
    below: int
    """Seeds where the reference alone is not finite: it diverged, or its weights did."""
    above: int
    """Seeds where the arm alone is not finite."""
    claim: Claim
    lacking: str
    """Why there are no pairs; "" where there are."""
    runs: tuple[str, ...] = ()
    """Ids of the paired runs."""

    @property
    def verdict(self) -> str:
        """Supported where the whole interval is on the claimed side, contradicted where it is on the
        other; a seed where one arm alone diverged takes away a verdict that it speaks against.

        A claim of no benefit cannot be shown by an interval around 0. It is supported where the interval
        is above -`MARGIN`, contradicted where it is not but is below 0.
        """
        if self.lacking:
            return NO_DATA
        low, high, below, above = self.difference.low, self.difference.high, self.below, self.above
        if self.claim is Claim.HIGHER:
            low, high, below, above = -high, -low, above, below
        if math.isnan(low):
            return NOT_RESOLVED
        if self.claim is Claim.NO_BENEFIT:
            supports, contradicts = low > -MARGIN and not below, high < 0 and not above
        else:
            supports, contradicts = high < 0 and not above, low > 0 and not below
        return SUPPORTED if supports else CONTRADICTED if contradicts else NOT_RESOLVED


class Rule(Enum):
    """How the comparisons of a hypothesis make its verdict."""

    AGREE = (
        "an arm supports it where at least one of its comparisons does and none contradicts, and contradicts "
        "it likewise; supported where every arm with data supports it; contradicted where any contradicts it"
    )
    EVERY = "supported where every comparison with data is; contradicted where any is"
    COMPLETE = "supported where every comparison has data and is; contradicted where any is"


@dataclass(frozen=True, slots=True)
class Answer:
    """A hypothesis with its comparisons."""

    name: str
    text: str
    rule: Rule
    comparisons: tuple[Comparison, ...]
    missing: tuple[str, ...]
    """Arms without a finished run, of those that the hypothesis needs."""
    facts: tuple[str, ...] = ()

    @property
    def verdicts(self) -> list[str]:
        """Of the comparisons that count."""
        return [c.verdict for c in self.comparisons if c.claim is not Claim.NONE]

    @property
    def verdict(self) -> str:
        verdicts = self._by_arm() if self.rule is Rule.AGREE else self.verdicts
        found = {verdict for verdict in verdicts if verdict != NO_DATA}
        if not found:
            return NO_DATA
        if CONTRADICTED in found:
            return CONTRADICTED
        asked = set(verdicts) if self.rule is Rule.COMPLETE else found
        return SUPPORTED if asked == {SUPPORTED} else NOT_RESOLVED

    def _by_arm(self) -> list[str]:
        """One verdict per arm: that of its comparisons that are resolved, where they agree."""
        verdicts = []
        for arm in dict.fromkeys(c.arm for c in self.comparisons):
            found = {c.verdict for c in self.comparisons if c.arm == arm} - {NO_DATA}
            resolved = found - {NOT_RESOLVED}
            verdicts.append(resolved.pop() if len(resolved) == 1 else NOT_RESOLVED if found else NO_DATA)
        return verdicts


def answers(frames: Frames) -> tuple[Answer, ...]:
    """H1 to H5, from finished runs alone. A run that diverged has an infinite final loss."""
    table = measures(frames)
    return (_h1(table), _h2(table), _h3(table), _h4(table), _h5(table))


def _h1(table: pd.DataFrame) -> Answer:
    """Each Muon arm is less unstable than the baseline, spikes less, or spreads less."""
    arms = MUON_ARMS[:3]
    measured = (UNSTABLE, SPIKES, LOSS_SPREAD, GRAD_SPREAD)
    comparisons = [_compare(table, m, arm, "baseline", Claim.LOWER) for arm in arms for m in measured]
    facts = _unstable_shares(table, ("baseline", *arms))
    return _answer("H1", "Muon improves stability", Rule.AGREE, table, comparisons, facts)


def _h2(table: pd.DataFrame) -> Answer:
    """The matrices that Stiefel holds grow less than the same matrices of the arm with the same
    optimizer and no constraint. The spectral cap is shown beside them: it is no Stiefel constraint."""
    held = (
        ("stiefel_all", "baseline", ("attn", "mlp")),
        ("stiefel_attention", "baseline", ("attn",)),
        ("stiefel_ffn", "baseline", ("mlp",)),
        ("manifold_muon", "muon_all", ("attn", "mlp")),
    )
    comparisons = [
        _compare(table, measure, arm, reference, Claim.LOWER)
        for arm, reference, kinds in held
        for kind in kinds
        for measure in GROWTH[kind]
    ]
    comparisons += [
        _compare(table, measure, "spectral_all", "baseline", Claim.NONE)
        for kind in KINDS
        for measure in GROWTH[kind]
    ]
    return _answer("H2", "Stiefel prevents weight explosion", Rule.EVERY, table, comparisons)


def _h3(table: pd.DataFrame) -> Answer:
    """(baseline - attention arm) - (baseline - FFN arm) > 0, for Muon and for Stiefel.

    The baseline cancels, so the difference is the FFN arm's loss minus the attention arm's. It does not
    say that either arm is better than the baseline; those two differences are shown beside it.
    """
    comparisons = [
        _compare(table, VAL_LOSS, f"{name}_ffn", f"{name}_attention", Claim.HIGHER)
        for name in ("muon", "stiefel")
    ]
    comparisons += [
        _compare(table, VAL_LOSS, f"{name}_{kind}", "baseline", Claim.NONE)
        for name in ("muon", "stiefel")
        for kind in ("attention", "ffn")
    ]
    return _answer("H3", "Attention benefits more than the MLP", Rule.EVERY, table, comparisons)


def _h4(table: pd.DataFrame) -> Answer:
    """Manifold Muon ends below the baseline and below both of what it combines."""
    references = ("baseline", "muon_all", "stiefel_all")
    arm = "manifold_muon"
    comparisons = [_compare(table, VAL_LOSS, arm, reference, Claim.LOWER) for reference in references]
    comparisons += [_compare(table, UNSTABLE, arm, reference, Claim.NONE) for reference in references]
    facts = [*_rank(table, arm), *_unstable_shares(table, (arm, *references))]
    return _answer("H4", "Manifold Muon is the best of both", Rule.COMPLETE, table, comparisons, facts)


def _h5(table: pd.DataFrame) -> Answer:
    """On Stiefel, decay before the retraction lowers the loss by less than `MARGIN`. What leaving decay
    out does to the baseline is shown beside it."""
    comparisons = [
        _compare(table, VAL_LOSS, "stiefel_all_decay", "stiefel_all", Claim.NO_BENEFIT),
        _compare(table, VAL_LOSS, "baseline_no_decay", "baseline", Claim.NONE),
    ]
    return _answer("H5", "Weight decay is unnecessary with Stiefel", Rule.EVERY, table, comparisons)


def _answer(
    name: str,
    text: str,
    rule: Rule,
    table: pd.DataFrame,
    comparisons: Iterable[Comparison],
    facts: Sequence[str] = (),
) -> Answer:
    comparisons = tuple(comparisons)
    needed = dict.fromkeys(
        arm for c in comparisons if c.claim is not Claim.NONE for arm in (c.reference, c.arm)
    )
    missing = tuple(arm for arm in needed if arm not in set(table["arm"]))
    return Answer(name, text, rule, comparisons, missing, tuple(facts))


def _compare(table: pd.DataFrame, measure: Measure, arm: str, reference: str, claim: Claim) -> Comparison:
    """Pairs have their seed, grid and axis cell in common; a seed counts once, with the mean over cells."""
    ours, theirs = (table[table["arm"] == name] for name in (arm, reference))
    pairs = ours.merge(theirs, on=["family", "seed"], suffixes=("", "_reference"))
    column, other = measure.column, f"{measure.column}_reference"
    pairs["difference"] = pairs[column] - pairs[other]
    pairs = pairs.dropna(subset=["difference"])
    by_seed = pairs.groupby("seed")["difference"].mean().dropna()
    finite = [value for value in by_seed.tolist() if math.isfinite(value)]
    lacking = ""
    if by_seed.empty:
        empty = [name for name, runs in ((arm, ours), (reference, theirs)) if runs.empty]
        unknown = [name for name, runs in ((arm, ours), (reference, theirs)) if runs[column].isna().all()]
        lacking = "no pair"
        if empty or unknown:
            lacking = f"{'no finished run' if empty else 'not recorded'}: {', '.join(empty or unknown)}"
    return Comparison(
        measure,
        arm,
        reference,
        float(pairs[column].median()),
        float(pairs[other].median()),
        _sign_interval(finite) if measure is UNSTABLE else paired_t(finite),
        int((by_seed == -math.inf).sum()),
        int((by_seed == math.inf).sum()),
        claim,
        lacking,
        (*pairs["run_id"], *pairs["run_id_reference"]),
    )


def _sign_interval(differences: Sequence[float]) -> Interval:
    """Mean of differences of two outcomes (-1, 0 or 1 each) with an interval that is exact given the
    number m of pairs that differ: of these, the share θ with +1 is binomial, and the mean is
    (m / n)(2θ - 1). No bounds where none differ. McNemar 1947; six pairs must differ for p < .05."""
    n = len(differences)
    differing = [d for d in differences if d]
    if not differing:
        return Interval(0.0 if n else math.nan, math.nan, math.nan, n)
    size = sum(map(abs, differing)) / n
    share = clopper_pearson(sum(d > 0 for d in differing), len(differing))
    return Interval(math.fsum(differing) / n, size * (2 * share.low - 1), size * (2 * share.high - 1), n)


def _unstable_shares(table: pd.DataFrame, arms: Sequence[str]) -> list[str]:
    parts = []
    for arm in arms:
        judged = table.loc[table["arm"] == arm, "unstable"].dropna()
        if len(judged):
            share = clopper_pearson(int(judged.sum()), len(judged))
            k = f"{arm} {judged.sum():.0f} of {len(judged)}"
            parts.append(f"{k} [{share.low:.2f}, {share.high:.2f}]")
    return [f"Unstable runs, with 95% Clopper–Pearson intervals: {'; '.join(parts)}."] if parts else []


def _rank(table: pd.DataFrame, arm: str) -> list[str]:
    """Place of `arm` among the nine; a run without a finite final loss counts as +inf."""
    medians = table[table["arm"].isin(NINE)].groupby("arm")["val_loss"].median().dropna()
    if arm not in medians:
        return []
    place = int((medians < medians[arm]).sum()) + 1
    tied = int((medians == medians[arm]).sum()) - 1
    ties = f", tied with {tied} more" if tied else ""
    return [f"Rank of {arm} by median final validation loss: {place} of {len(medians)} arms{ties}."]


def measures(frames: Frames) -> pd.DataFrame:
    """One row per finished run of the plan's arms, with what the hypotheses compare.

    `val_loss`: nats per token, +inf where the run has no finite loss at its horizon. `unstable`: 0 or 1.
    `spike_score`: OLMo 2's, of the loss. `loss_spread`, `grad_spread`: +inf where `val_loss` is. These three
    are of every step: see `analysis.stepwise`. `<kind>_sigma_growth`, `<kind>_norm_growth`: see `_growth`.
    """
    listed = frames.runs["arm"].isin((*NINE, *DECAY_ARMS)) & frames.runs["status"].isin(FINISHED)
    runs = frames.runs[listed]
    table = runs[["run_id", "arm", "seed", "family"]].copy()
    table["val_loss"] = runs["final_val_loss"]
    table["unstable"] = runs["unstable"].to_numpy(dtype=float, na_value=math.nan)
    by_run = frames.stepwise.set_index(["quantity", "run_id"])
    for measure, quantity, column in (
        (SPIKES, "loss", "olmo2"),
        (LOSS_SPREAD, "loss", "spread"),
        (GRAD_SPREAD, "gradient", "spread"),
    ):
        keys = [(quantity, run_id) for run_id in table["run_id"]]
        table[measure.column] = by_run[column].reindex(keys).to_numpy()
    table.loc[table["val_loss"] == math.inf, [LOSS_SPREAD.column, GRAD_SPREAD.column]] = math.inf
    for kind, (sigma, norm) in GROWTH.items():
        for measure, long, column in (
            (sigma, frames.spectra, "sigma_max"),
            (norm, frames.flow, "weight_norm"),
        ):
            grown = _growth(long[long["module"] == kind], column)
            table[measure.column] = grown.reindex(table["run_id"]).to_numpy(dtype=float)
    return table.reset_index(drop=True)


def _growth(long: pd.DataFrame, column: str) -> pd.Series[float]:
    """By run: ln(last / first record), the largest over matrices, 0 where it is below `NO_GROWTH` (a
    matrix that shrinks does not explode), +inf where the last is not finite. Spectra begin at step 0,
    norms at the first step that was measured. Runs with one record alone are left out."""
    ends = long.sort_values("step", kind="stable").groupby(["run_id", "matrix"])
    columns = ["run_id", "matrix", "step", column]
    both = ends.head(1)[columns].merge(ends.tail(1)[columns], on=["run_id", "matrix"])
    first, last = both[f"{column}_x"].to_numpy(dtype=float), both[f"{column}_y"].to_numpy(dtype=float)
    with np.errstate(all="ignore"):
        grown = np.log(last / first)
    grown = np.where(np.isfinite(last), np.where(grown < NO_GROWTH, 0.0, grown), math.inf)
    known = np.isfinite(first) & (first > 0) & (both["step_x"] < both["step_y"]).to_numpy()
    return pd.Series(grown[known]).groupby(both["run_id"].to_numpy()[known]).max()


def frame(found: Sequence[Answer]) -> pd.DataFrame:
    """One row per comparison. Growth is in logarithms; `verdict` is empty where the comparison does not
    count for its hypothesis."""
    return pd.DataFrame(
        {
            "hypothesis": answer.name,
            "answer": answer.verdict,
            "measure": c.measure.column,
            "arm": c.arm,
            "reference": c.reference,
            "arm_median": c.arm_median,
            "reference_median": c.reference_median,
            "difference": c.difference.estimate,
            "low": c.difference.low,
            "high": c.difference.high,
            "pairs": c.difference.n,
            "reference_diverged": c.below,
            "arm_diverged": c.above,
            "verdict": "" if c.claim is Claim.NONE else c.verdict,
            "run_ids": " ".join(c.runs),
        }
        for answer in found
        for c in answer.comparisons
    )


def answers_text(found: Sequence[Answer]) -> Text:
    """The five verdicts, with what they were made from."""
    rows = []
    for answer in found:
        counts = [f"{answer.verdicts.count(v)} {v}" for v in _ORDER if v in answer.verdicts]
        cells = (answer.name, answer.text, answer.verdict, ", ".join(counts), ", ".join(answer.missing))
        rows.append((*cells[:-1], cells[-1] or "–"))
    columns = ("", "hypothesis", "verdict", "comparisons", "arms without a finished run")
    rules = dict.fromkeys(answer.rule for answer in found)
    whose = {rule: ", ".join(answer.name for answer in found if answer.rule is rule) for rule in rules}
    notes = [f"{whose[rule]}: {rule.value}; else not resolved." for rule in rules]
    facts = [f"{answer.name}. {fact}" for answer in found for fact in answer.facts]
    return Text(columns, tuple(rows), (True,) * len(columns), (_SCOPE, *facts, *notes))


_SCOPE = (
    "Exploratory: no comparison was declared before the runs. This section stands where the runs hold an arm "
    "of the plan that trains matrices by Muon and one that trains all by AdamW."
)
_ORDER = (SUPPORTED, CONTRADICTED, NOT_RESOLVED, NO_DATA)


def comparisons_text(found: Sequence[Answer]) -> Text:
    """Every comparison, those that do not count among them."""
    columns = ("", "measure", "arm − reference", "arm", "reference", "difference", "seeds", "verdict")
    rows = [_comparison_row(answer.name, c) for answer in found for c in answer.comparisons]
    words = tuple(column in ("", "measure", "arm − reference", "verdict") for column in columns)
    return Text(columns, tuple(rows), words, _NOTES)


_NOTES = (
    "arm, reference: medians over the runs that are paired. difference: mean over seeds, with its 95% t "
    "interval, not adjusted for the number of comparisons; of growth, the ratio of two factors; of unstable "
    "runs, exact given how many pairs differ. No interval where one seed is paired or all differences are "
    "alike. verdict –: does not count, shown for comparison.",
    "A seed where one of the two diverged has no finite difference. It is named under seeds, and takes away "
    "a verdict that it speaks against.",
    f"spike score: step losses at least {SPIKE_SIGMAS:g} standard deviations above the mean of the "
    f"{SPIKE_WINDOW:,} before (of a tenth of the horizon in runs below {10 * SPIKE_WINDOW:,} steps, at least "
    f"{SHORT_WINDOW}). spread: standard deviation of the change from step to step, over √2, after a tenth of "
    "the horizon. growth: last over first record, at least ×1, the largest of any matrix.",
    "H3: muon_ffn − muon_attention is (baseline − muon_attention) − (baseline − muon_ffn): above 0 where "
    "attention gains more.",
    f"H5: supported where decay lowers the loss by less than {MARGIN:g} nats per token, with the whole "
    "interval; contradicted where it does not and the interval is below 0.",
)


def _comparison_row(name: str, c: Comparison) -> tuple[str, ...]:
    found = c.difference
    lost = [f"{n} diverged: {arm}" for n, arm in ((c.above, c.arm), (c.below, c.reference)) if n]
    seeds = f"{found.n} [{', '.join(lost)}]" if lost else str(found.n)
    difference = "–"
    if found.n:
        difference = _difference(c.measure, found.estimate)
        if not math.isnan(found.low):
            bounds = (_difference(c.measure, found.low), _difference(c.measure, found.high))
            difference += f" [{bounds[0]}, {bounds[1]}]"
    return (
        name,
        c.measure.words,
        f"{c.arm} − {c.reference}",
        _value(c.measure, c.arm_median),
        _value(c.measure, c.reference_median),
        difference,
        c.lacking or seeds,
        "–" if c.claim is Claim.NONE and not c.lacking else c.verdict,
    )


def _value(measure: Measure, value: float) -> str:
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "diverged"
    return _factor(value) if measure.is_growth else format(value, measure.digits)


def _difference(measure: Measure, value: float) -> str:
    if measure.is_growth:
        return _factor(value)
    return format(value, f"+{measure.digits}").replace("-", "−")


def _factor(log: float) -> str:
    return f"×{three_digits(math.exp(log))}" if log < 700 else "×∞"
