"""What the runs say, in sentences: every number computed, with its n and the runs that it comes from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pandas as pd

from analysis import mechanism
from analysis.contrasts import LEVEL, UNDECIDED, Contrast, Swap, count, lost_seeds, predeclared
from analysis.hypotheses import MARGIN
from analysis.load import Frames
from analysis.stats import clopper_pearson, pilot_sigma, runs_needed
from analysis.tables import PREDECLARED, bounds, p_cell, signed, three_digits
from trainers.records import FINISHED, PENDING, RUNNING

DECIDED = "decided"
TOO_FEW = "too few seeds"
POWER = 0.9
USUAL_SIGMA = 0.002
"""Seed noise of a 124M GPT-2's validation loss, nats per token, for sweeps that have one seed yet."""
NAMED = 2
"""As many comparisons of one module as are written out; the table has all of them."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a sentence, and the runs that its numbers are made from."""

    text: str
    runs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sentence:
    topic: str
    parts: tuple[Part, ...]
    verdict: str = ""
    """DECIDED, UNDECIDED or TOO_FEW; "" for a plain fact."""

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)


def summary(
    frames: Frames, table: pd.DataFrame, swaps: Sequence[Swap], crossed: pd.DataFrame
) -> list[Sentence]:
    """What these runs say. `table` is T1, `swaps` the contrasts of single modules, `crossed` the first
    crossings of `mechanism.crossings`."""
    return [
        *_progress(frames),
        *_lowest(frames, table),
        *(
            _sentence("Predeclared", f"{found.arm} − {found.reference}", found)
            for found in predeclared(frames, table)
        ),
        *_modules(swaps),
        *_stability(frames),
        *_spectra(frames),
        *_mechanism(frames, crossed),
        *_seeds(frames),
    ]


def standing(*several: Frames) -> dict[str, tuple[str, ...]]:
    """Runs of one grid or several by status: finished, running, in trouble, pending."""
    runs = pd.concat([frames.runs[["run_id", "status"]] for frames in several]).drop_duplicates("run_id")
    found = {str(status): _ids(group) for status, group in runs.groupby("status")}
    known = (*FINISHED, RUNNING)
    order = [*known, *(status for status in found if status not in (*known, PENDING)), PENDING]
    return {status: found[status] for status in order if status in found}


def newest(frames: Frames) -> float | None:
    """Unix seconds of the newest record of a step or an evaluation."""
    times = [float(frame["time"].max()) for frame in (frames.steps, frames.evals) if len(frame)]
    return max([time for time in times if math.isfinite(time)], default=None)


def clock(seconds: float) -> str:
    """`2026-11-22 15:03 UTC`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def finished(frames: Frames, label: str) -> tuple[str, ...]:
    """Finished runs of an arm (and axis cell)."""
    return _ids(frames.runs[(frames.runs["label"] == label) & frames.runs["status"].isin(FINISHED)])


def _ids(runs: pd.DataFrame) -> tuple[str, ...]:
    return tuple(runs["run_id"].astype(str))


def _progress(frames: Frames) -> Iterator[Sentence]:
    by_status = standing(frames)
    done = tuple(run for status in FINISHED for run in by_status.get(status, ()))
    total = sum(map(len, by_status.values()))
    parts = [Part(f"{len(done)} of {total} runs finished", done)]
    others = [(status, runs) for status, runs in by_status.items() if status not in FINISHED]
    for i, (status, runs) in enumerate(others):
        parts += [Part(", " if i else " ("), Part(f"{len(runs)} {status}", runs)]
    arms, seeds = frames.runs["arm"].nunique(), frames.runs["seed"].nunique()
    parts.append(Part(f"{')' if others else ''}: {count(arms, 'arm')}, {count(seeds, 'seed')}."))
    yield Sentence("Progress", tuple(parts))


def _lowest(frames: Frames, table: pd.DataFrame) -> Iterator[Sentence]:
    finite = table[table["final_median"].map(math.isfinite)].sort_values("final_median", kind="stable")
    if finite.empty:
        return
    best, worst = finite.iloc[0], finite.iloc[-1]
    parts = [Part(f"Lowest median final validation loss: {best['label']}, "), _median(frames, best)]
    parts.append(Part(" nats per token"))
    if len(finite) > 1:
        parts += [Part(f"; highest finite one: {worst['label']}, "), _median(frames, worst)]
    yield Sentence("Loss", (*parts, Part(".")))


def _median(frames: Frames, row: pd.Series) -> Part:
    unstable = f", {row['n_unstable']} unstable" if row["n_unstable"] else ""
    text = f"{row['final_median']:.4f} (n = {row['n_finished']}{unstable})"
    return Part(text, finished(frames, str(row["label"])))


def _sentence(topic: str, words: str, found: Contrast) -> Sentence:
    """The difference with its interval, n and p, or what keeps it from being decided."""
    decided = found.verdict != UNDECIDED
    parts = [Part(f"{words}: ")]
    if found.pairs:
        parts.append(Part(signed(found.estimate) + bounds(found.low, found.high), found.runs))
        facts = f" (n = {count(found.pairs, 'pair')}"
        parts.append(Part(f"{facts}, Holm p {_equals(found.holm)})" if decided else f"{facts})"))
        parts.append(Part("" if decided else f", undecided: {found.why_undecided}"))
    else:
        parts.append(Part(found.why_undecided, found.runs))
    parts.append(Part("".join(f"; {what}" for what in (lost_seeds(found), _unstable(found)) if what) + "."))
    return Sentence(topic, tuple(part for part in parts if part.text), DECIDED if decided else UNDECIDED)


def _unstable(found: Contrast) -> str:
    """`unstable: hetero in 5 of its runs`: final losses alone do not tell it."""
    arms = ((found.arm, found.arm_unstable), (found.reference, found.reference_unstable))
    told = [f"{name} in {count(k, 'run')}" for name, k in arms if k]
    return f"unstable: {', '.join(told)}" if told else ""


def _equals(p: float) -> str:
    text = p_cell(p)
    return text if text.startswith("<") else f"= {text}"


def _modules(found: Sequence[Swap]) -> Iterator[Sentence]:
    """Which assignment suits which module, as far as arms tell that differ in that module alone."""
    for module in dict.fromkeys(swap.module for swap in found):
        own = [swap for swap in found if swap.module == module]
        topic, other = module[0].upper() + module[1:], "attention" if module == "MLP" else "MLP"
        if len(own) <= NAMED:
            for swap in own:
                words = f"{swap.this} instead of {swap.that}, {other} on {swap.held} "
                names = f"({swap.contrast.arm} − {swap.contrast.reference})"
                yield _sentence(topic, words + names, swap.contrast)
            continue
        decided = [swap for swap in own if swap.contrast.verdict != UNDECIDED]
        runs = tuple(dict.fromkeys(run for swap in decided for run in swap.contrast.runs))
        text = f"{len(decided)} of {len(own)}"
        rest = " comparisons of two arms that differ there alone are decided; the table of modules has them."
        yield Sentence(topic, (Part(text, runs), Part(rest)), DECIDED if decided else UNDECIDED)


def _stability(frames: Frames) -> Iterator[Sentence]:
    """k of n finished runs with the 95% Clopper–Pearson interval of the share."""
    judged = frames.runs.drop_duplicates("run_id")
    judged = judged[judged["status"].isin(FINISHED) & judged["unstable"].notna()]
    bad = judged[judged["unstable"].astype(bool)]
    clean = judged[~judged["label"].isin(bad["label"])]
    if judged.empty:
        return
    parts = [Part("Unstable runs: " if len(bad) else "No finished run counts as unstable: ")]
    for label in bad["label"].unique():
        own = judged[judged["label"] == label]
        parts += [
            Part(f"{label} "),
            Part(_share(int(own["unstable"].sum()), len(own)), _ids(own)),
            Part("; "),
        ]
    if len(clean):
        others = f" in {count(clean['label'].nunique(), 'other arm')}" if len(bad) else ""
        parts += [Part(_share(0, len(clean)), _ids(clean)), Part(f"{others}.")]
    else:
        parts[-1] = Part(".")
    yield Sentence("Stability", tuple(parts))


def _share(k: int, n: int) -> str:
    share = clopper_pearson(k, n)
    return f"{k} of {n} [{share.low:.2f}, {share.high:.2f}]"


def _spectra(frames: Frames) -> Iterator[Sentence]:
    attention = frames.spectra[frames.spectra["module"] == "attn"]
    if attention.empty:
        return
    peak = attention.groupby("run_id")["sigma_max"].max().rename("peak")
    by_manifold = frames.runs.drop_duplicates("run_id").merge(peak, on="run_id").groupby("attn")
    parts = [Part("Largest singular value that attention reached, by its manifold: ")]
    for i, (manifold, runs) in enumerate(by_manifold):
        low, high = three_digits(runs["peak"].min()), three_digits(runs["peak"].max())
        values = low if low == high else f"{low} to {high}"
        parts += [Part(f"{'; ' if i else ''}{manifold} "), Part(f"{values} (n = {len(runs)})", _ids(runs))]
    yield Sentence("Spectra", (*parts, Part(".")))


_LINKS = {
    "sigma": "singular values",
    "logit": "logits",
    "jacobian": "saturation",
    mechanism.EVENT: "first bad evaluation",
}
"""Of `mechanism.CHAIN`, in a sentence."""


def _mechanism(frames: Frames, crossed: pd.DataFrame) -> Iterator[Sentence]:
    """Whether unstable runs show the paper's order of events; nothing where no run is unstable."""
    if mechanism.lead_times(frames, crossed).empty:
        return
    found = mechanism.chain(frames, crossed)
    order = ", then ".join(_LINKS[link] for link in mechanism.CHAIN)
    if not found.n:
        text = f"Whether the order is {order} cannot be told: no unstable run recorded all of these."
        yield Sentence("Mechanism", (Part(text),), UNDECIDED)
        return
    share = f"{found.k} of {found.n} [{found.low:.2f}, {found.high:.2f}]"
    parts = (
        Part(f"The order {order} is seen in "),
        Part(share, found.runs),
        Part(f" unstable runs and known to be another in {found.against}: {found.verdict}"),
        Part(f" (one-sided exact p {_equals(found.p)})."),
    )
    yield Sentence("Mechanism", parts, UNDECIDED if found.verdict == "not resolved" else DECIDED)


def _seeds(frames: Frames) -> Iterator[Sentence]:
    """How many seeds it takes to decide a predeclared difference of `MARGIN` with probability `POWER`.

    The noise is that of stable finished runs about the mean of their arm, its 80% upper bound. The test is
    the summary's: paired, at the level that Holm gives the smallest p of the predeclared contrasts. A pair
    is taken to have nothing in common, so that where seeds move both arms alike fewer are enough.
    """
    finished_runs = frames.runs[frames.runs["status"].isin(FINISHED)]
    stable = finished_runs[~finished_runs["unstable"].fillna(True).astype(bool)]
    losses = stable[np.isfinite(stable["final_val_loss"])].drop_duplicates("run_id")  # one run, many cells
    if losses.empty or frames.runs["arm"].nunique() < 2:
        return
    sigma = pilot_sigma(group.tolist() for _, group in losses.groupby("group")["final_val_loss"])
    seeds = finished_runs.groupby("label")["seed"].nunique()
    have = int(seeds.reindex(frames.runs["label"].unique(), fill_value=0).min())
    level = 1 - LEVEL / len(PREDECLARED)
    goal = f"to decide a predeclared difference of {MARGIN:g} nats with {POWER:.0%} power"
    if not sigma.freedom:
        needed = runs_needed(MARGIN, USUAL_SIGMA, power_wanted=POWER, paired=True, level=level)
        text = (
            "No arm has two stable finished runs, so the noise between seeds is not known; at the "
            f"{USUAL_SIGMA:g} usual of GPT-2 small, {goal} takes {needed} seeds an arm."
        )
        yield Sentence("Seeds", (Part(text),), TOO_FEW)
        return
    noise = f"Noise between seeds: {sigma.estimate:.2g} nats, below {sigma.upper:.2g} with 80% confidence"
    about = (Part(f"{noise} ("), Part(f"{sigma.freedom} degrees of freedom", _ids(losses)), Part(")"))
    try:
        needed = 2
        if sigma.upper > 0:
            needed = runs_needed(MARGIN, sigma.upper, power_wanted=POWER, paired=True, level=level)
    except ValueError:
        yield Sentence("Seeds", (*about, Part(f". No practical number of seeds is enough {goal}.")), TOO_FEW)
        return
    lacking = f", {needed - have} more than the smallest arm has" if needed > have else ""
    verdict = TOO_FEW if lacking else ""
    yield Sentence("Seeds", (*about, Part(f". It takes {needed} seeds an arm {goal}{lacking}.")), verdict)
