"""Arithmetic of a run, counted from its config: parameters, model FLOPs, optimizer FLOPs.

A multiply and an add count as two. Only matrix products are counted; they are all but a percent.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainers.config import ModelConfig, RunConfig

RETRACTION_STEPS = {"stiefel": 2, "dgram": 20, "oblique": 0, "none": 0}
"""Polar iterations of a retraction on a GPU; `stiefel` starts near its manifold (2 at lr 0.02)."""


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs of one optimizer step, and of a whole run (evaluation included)."""

    parameters: int
    model_step: float
    optimizer_step: float
    steps: int
    tokens: int
    evaluation: float

    @property
    def total(self) -> float:
        return self.steps * (self.model_step + self.optimizer_step) + self.evaluation


def matrices(model: ModelConfig) -> dict[str, list[tuple[int, int]]]:
    """Shapes (rows, columns) of one layer's matrices by module kind."""
    d = model.d_model
    return {"attn": [(3 * d, d), (d, d)], "mlp": [(4 * d, d), (d, 4 * d)]}


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the model; the tied head counts once."""
    layer = sum(m * n for shapes in matrices(model).values() for m, n in shapes)
    norms = (2 * model.n_layer + 1) * model.d_model
    return model.n_layer * layer + (model.vocab_size + model.context) * model.d_model + norms


def forward_flops_per_token(model: ModelConfig) -> float:
    """Products with weights and head, plus scores and values over the full context window."""
    weights = parameter_count(model) - model.context * model.d_model  # positions are looked up
    return 2.0 * weights + 4.0 * model.n_layer * model.d_model * model.context


def msign_flops(m: int, n: int, steps: int) -> float:
    m, n = max(m, n), min(m, n)
    return steps * (4.0 * m * n * n + 2.0 * n**3)


def direction_flops(m: int, n: int, manifold: str, run: RunConfig) -> float:
    """One matrix's direction and retraction."""
    m, n = max(m, n), min(m, n)
    muon = run.optimizer.muon
    one = msign_flops(m, n, muon.msign_steps)
    gram = 2.0 * m * n * n
    if manifold == "none":
        return one
    if muon.solver == "dual_ascent":
        solve = gram + muon.dual_steps * (one + 2 * gram)
    else:
        solve = one + 2 * gram + (4 * gram if muon.polish else 0.0)
    return solve + msign_flops(m, n, RETRACTION_STEPS[manifold])


def optimizer_step_flops(run: RunConfig) -> float:
    total = 0.0
    for kind, shapes in matrices(run.model).items():
        module = getattr(run.assignment, kind)
        if module.optimizer == "muon":
            total += sum(direction_flops(m, n, module.manifold, run) for m, n in shapes)
    return run.model.n_layer * total


def evaluation_count(run: RunConfig) -> int:
    """Evaluations of a full run: at step 0, at every multiple of `every`, and at the end."""
    steps, every = run.schedule.steps, run.evaluation.every
    return 1 + steps // every + (1 if steps % every else 0)


def cost(run: RunConfig) -> Cost:
    """What one run takes, by arithmetic."""
    forward = forward_flops_per_token(run.model)
    steps = run.schedule.steps
    evaluation_tokens = evaluation_count(run) * 2 * run.evaluation.batches * run.tokens_per_step
    return Cost(
        parameters=parameter_count(run.model),
        model_step=3.0 * forward * run.tokens_per_step,
        optimizer_step=optimizer_step_flops(run),
        steps=steps,
        tokens=steps * run.tokens_per_step,
        evaluation=forward * evaluation_tokens,
    )
