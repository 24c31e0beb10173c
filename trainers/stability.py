"""The verdict on a run, from its evaluations alone.

The paper's Appendix A names four conditions; every copy found prints them without their numbers.
The numbers here are this project's defaults. The same function judges online and from stored logs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainers.config import StabilityConfig

HARD_SPIKE = "hard_spike"
PERSISTENT_DRIFT = "persistent_drift"
NO_RECOVERY = "no_recovery"
EARLY_TERMINATION = "early_termination"


@dataclass(frozen=True, slots=True)
class Fired:
    """A rule that fired: `value` crossed `threshold` between `last_good` (exclusive) and `step`."""

    rule: str
    step: int
    last_good: int | None
    """Last evaluation before `step` that did not break the rule; None if there was none."""
    value: float
    threshold: float


@dataclass(frozen=True, slots=True)
class Verdict:
    unstable: bool
    rules: tuple[Fired, ...]

    @property
    def first_bad(self) -> int | None:
        """Step of the earliest rule."""
        return min((rule.step for rule in self.rules), default=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "unstable": self.unstable,
            "first_bad": self.first_bad,
            "rules": [
                {
                    "rule": r.rule,
                    "step": r.step,
                    "last_good": r.last_good,
                    "value": r.value,
                    "threshold": r.threshold,
                }
                for r in self.rules
            ],
        }


def judge(
    evaluations: Sequence[tuple[int, float]],
    horizon: int,
    rules: StabilityConfig,
    *,
    nonfinite_at: int | None = None,
) -> Verdict:
    """Apply the four rules. Drift and recovery are judged once the evaluations reach the horizon:
    a run that is under way or was cut short has not had its chance to recover.

    Args:
        evaluations: `(step, validation loss in nats)`, steps ascending.
        horizon: the schedule's optimizer steps.
        rules: thresholds.
        nonfinite_at: step of the first non-finite training loss or gradient, if any.

    Source: paper 2606.13276, Appendix A, "Instability criterion".
    """
    fired: list[Fired] = []
    spike = _hard_spike(evaluations, horizon, rules)
    if spike:
        fired.append(spike)
    nonfinite = [step for step, loss in evaluations if not math.isfinite(loss)]
    if nonfinite_at is not None:
        nonfinite.append(nonfinite_at)
    if nonfinite and (first := min(nonfinite)) <= horizon:
        fired.append(Fired(EARLY_TERMINATION, first, _before(evaluations, first), math.nan, math.inf))
    if evaluations and evaluations[-1][0] >= horizon and not nonfinite:
        fired.extend(_at_the_end(evaluations, horizon, rules))
    return Verdict(bool(fired), tuple(fired))


def _hard_spike(evals: Sequence[tuple[int, float]], horizon: int, rules: StabilityConfig) -> Fired | None:
    best = math.inf
    for step, loss in evals:
        threshold = rules.spike_loss if rules.style == "paper" else best + rules.spike_rise
        if step > rules.spike_after * horizon and loss > threshold:
            return Fired(HARD_SPIKE, step, _before(evals, step), loss, threshold)
        if math.isfinite(loss):
            best = min(best, loss)
    return None


def _at_the_end(evals: Sequence[tuple[int, float]], horizon: int, rules: StabilityConfig) -> list[Fired]:
    fired: list[Fired] = []
    best = min(loss for _, loss in evals)
    window = max(1, round(rules.drift_window * len(evals)))
    tail = [loss for _, loss in evals[-window:]]
    mean = sum(tail) / len(tail)
    line = best + rules.drift_rise
    if mean > line and tail[-1] > best:  # a loss that still falls has not departed
        # Dated at the start of the last stretch above the line.
        last_bad = max(i for i, (_, loss) in enumerate(evals) if loss > line)
        first_bad = max((i + 1 for i in range(last_bad) if evals[i][1] <= line), default=0)
        step = evals[first_bad][0]
        fired.append(Fired(PERSISTENT_DRIFT, step, _before(evals, step), mean, line))
    last_good = max(s for s, loss in evals if loss <= best + rules.recovery_rise)
    later = [(s, loss) for s, loss in evals if s > last_good]
    if last_good < rules.recovery_by * horizon and later:
        fired.append(Fired(NO_RECOVERY, later[0][0], last_good, later[0][1], best + rules.recovery_rise))
    return fired


def _before(evals: Sequence[tuple[int, float]], step: int) -> int | None:
    return max((s for s, _ in evals if s < step), default=None)
