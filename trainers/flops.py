"""Arithmetic of a run, counted from its config: parameters, model FLOPs, optimizer FLOPs.

A multiply and an add count as two. Only matrix products are counted; they are all but a percent.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainers.config import ModelConfig, RunConfig
from trainers.iterations import POLAR_STEPS, default_rounds, default_steps, gram_groups, reduces


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
    d, hidden = model.d_model, model.hidden
    mlp = [(hidden, d), (d, hidden)] if model.family == "gpt2" else [(hidden, d), (hidden, d), (d, hidden)]
    return {"attn": [(3 * d, d), (d, d)], "mlp": mlp}


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the model; the tied head counts once."""
    layer = sum(m * n for shapes in matrices(model).values() for m, n in shapes)
    norms = (2 * model.n_layer + 1) * model.d_model
    positions = model.context if model.family == "gpt2" else 0  # rotary ones have no parameters
    return model.n_layer * layer + (model.vocab_size + positions) * model.d_model + norms


def forward_flops_per_token(model: ModelConfig) -> float:
    """Products with weights and head, plus scores and values over the full context window."""
    positions = model.context * model.d_model if model.family == "gpt2" else 0
    weights = parameter_count(model) - positions  # which are looked up
    return 2.0 * weights + 4.0 * model.n_layer * model.d_model * model.context


def msign_flops(m: int, n: int, steps: int, method: str, precision: str) -> float:
    m, n = max(m, n), min(m, n)
    if method != "gram":
        return steps * (4.0 * m * n * n + 2.0 * n**3)
    return sum(4.0 * m * n * n + (4 * g - 3) * 2.0 * n**3 for g in gram_groups(m, n, steps, precision))


def direction_flops(m: int, n: int, manifold: str, run: RunConfig) -> float:
    """One matrix's direction."""
    m, n = max(m, n), min(m, n)
    muon = run.optimizer.muon
    precision = muon.msign_dtype or run.precision
    steps = muon.msign_steps or default_steps(muon.msign, precision)

    def sign(rows: int, method: str = muon.msign) -> float:
        return msign_flops(rows, n, steps, method, precision)

    gram = 2.0 * m * n * n
    if manifold in ("none", "spectral") or muon.solver == "plain":
        return sign(m)
    if muon.solver == "dual_ascent":
        if muon.dual_impl == "published" or not reduces(m, n, manifold):
            return gram + muon.dual_steps * (sign(m) + 2 * gram)
        slim = n if m == n else 2 * n
        return 4 * gram + (muon.dual_steps - 1) * sign(slim) + sign(m)
    if manifold == "stiefel" and m == n:
        return sign(m) + 2 * gram
    if muon.solver == "projected":
        return sign(m) + 2 * gram + (4 * gram if muon.polish else 0.0)
    rounds = muon.exact_steps or default_rounds(manifold)
    root_steps = steps if muon.msign == "gram" else default_steps("gram", precision)
    groups = len(gram_groups(m, n, root_steps, precision))
    root = msign_flops(m, n, root_steps, "gram", precision) + (groups - 1) * 2.0 * n**3
    one_cg = 4.0 * n**3 if manifold == "oblique" else 2.0 * n**3
    once = gram if manifold == "oblique" else 0.0
    return once + rounds * (root + 2 * gram + muon.cg_steps * one_cg) + 2 * gram + sign(m)


def retraction_flops(m: int, n: int, manifold: str, run: RunConfig) -> float:
    """One matrix's way back, near its manifold: a Gram matrix, a product, and a Newton-Schulz step of fifth
    order between, which is what a learning rate of some percent takes.

    `svd_sorted` is counted as on a GPU, by matrix products; a CPU factorises.
    """
    m, n = max(m, n), min(m, n)
    if manifold == "spectral":
        return 2.0 * m * n * n + 16 * 2.0 * n**3
    if manifold == "dgram" and run.optimizer.muon.retraction == "svd_sorted":
        return msign_flops(m, n, POLAR_STEPS, "gram", "float32") + 2.0 * m * n * n
    near = 4.0 * m * n * n + 2 * 2.0 * n**3
    return near if manifold in ("stiefel", "dgram") else 0.0


def optimizer_step_flops(run: RunConfig) -> float:
    total = 0.0
    for kind, shapes in matrices(run.model).items():
        module = getattr(run.assignment, kind)
        if kind == "attn":
            (rows, columns), *others = shapes
            shapes = [(rows // run.qkv_blocks, columns)] * run.qkv_blocks + others
        total += sum(retraction_flops(m, n, module.manifold, run) for m, n in shapes)
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
