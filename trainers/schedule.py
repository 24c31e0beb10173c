"""Learning rate by step."""

from __future__ import annotations

import math

from trainers.config import ScheduleConfig


def lr_factor(step: int, schedule: ScheduleConfig) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0).

    Linear warm-up `(t + 1)/(warmup + 1)`, then cosine to `min_lr_ratio` at `schedule.steps`
    (nanoGPT's schedule; paper, Appendix A). Every optimizer multiplies its own peak by it, which
    is the paper's coupling `muon_lr(t) = muon_lr · adamw_lr(t) / adamw_peak`.
    """
    warmup, steps, floor = schedule.warmup_steps, schedule.steps, schedule.min_lr_ratio
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if step >= steps:
        return floor
    progress = (step - warmup) / (steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
