"""The one schema of a run: what is trained, on what, how, and how it is judged.

`RunConfig` is strict (unknown keys are errors), immutable and free of torch, so that ten thousand
of them expand in seconds. `run_id` names a run by the fields that change its numbers.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from trainers.iterations import default_steps

SCHEMA_VERSION = 1
"""Counts changes of meaning in the config; part of every run's identity."""

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
"""Names that become paths or object keys."""

ManifoldName = Literal["none", "stiefel", "dgram", "oblique", "spectral"]
SolverName = Literal["dual_ascent", "projected", "exact", "plain"]
MsignName = Literal["polar_express", "gram", "newton_schulz"]
DgramRetraction = Literal["svd_sorted", "column_norm"]
Precision = Literal["float32", "bfloat16"]
MsignPrecision = Literal["float32", "bfloat16", "float16"]

Count = Annotated[int, Field(strict=True, ge=1)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Seed = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]


def _check_name(value: str) -> str:
    if ".." in value:
        raise ValueError("'..' is not allowed in a name")
    return value


SafeName = Annotated[Name, Field(), BeforeValidator(lambda v: _check_name(v) if isinstance(v, str) else v)]


class Section(BaseModel):
    """A part of the config: strict keys, no mutation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """A decoder-only transformer. Width in units, context in tokens."""

    family: Literal["gpt2", "llama"] = "gpt2"
    """`gpt2`: LayerNorm, GELU, learned positions. `llama`: RMSNorm, SwiGLU, rotary positions."""
    n_layer: Count = 12
    n_head: Count = 12
    d_model: Count = 768
    context: Count = 1024
    vocab_size: Count = 50304
    dropout: Fraction = 0.0
    d_ff: Count | None = None
    """Width of the MLP; None is 4 d_model."""
    attention: Literal["softmax", "sigmoid", "relu"] = "softmax"
    """`sigmoid` and `relu` weigh each token by itself: the control for what is softmax's doing."""
    qk_norm: Flag = False
    """RMS norm, without parameters, of every query and key."""

    @property
    def hidden(self) -> int:
        return self.d_ff or 4 * self.d_model

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.d_model % self.n_head:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_head {self.n_head}")
        if self.family == "llama" and self.d_model // self.n_head % 2:
            raise ValueError(
                f"rotary heads need an even width; d_model / n_head is {self.d_model // self.n_head}"
            )
        return self


class DataConfig(Section):
    """Where tokens come from.

    `stdlib`: the bytes of this Python's standard library. `text`: local files (`path` is a glob);
    each row of .jsonl, .jsonl.gz and .parquet files is a document, any other file is one whole.
    `bin`: ready token shards (`path` is a folder or glob of .bin files). `hf`: a Hugging Face
    data set (`dataset`, pinned `revision`).
    """

    source: Literal["stdlib", "text", "bin", "hf"] = "stdlib"
    path: str | None = None
    dataset: str | None = None
    revision: str | None = None
    subset: str | None = None
    """Configuration of a data set that has several, such as `sample-10BT`."""
    rows: Count | None = None
    """How many rows the data set must have; None takes it as it is."""
    text_column: str = "text"
    tokenizer: Literal["bytes", "gpt2"] = "bytes"
    val_fraction: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.1
    digest: str | None = None
    """Identity of the tokens, `sha256:…` or `spec:…`; filled in by `trainers.corpus.identify`."""

    @model_validator(mode="after")
    def _source_has_its_keys(self) -> Self:
        needs = {"stdlib": (), "text": ("path",), "bin": ("path",), "hf": ("dataset", "revision")}
        reads = (*needs[self.source], *(("subset", "rows") if self.source == "hf" else ()))
        for key in needs[self.source]:
            if getattr(self, key) is None:
                raise ValueError(f'source "{self.source}" needs the key "{key}"')
        for key in ("path", "dataset", "revision", "subset", "rows"):
            if getattr(self, key) is not None and key not in reads:
                raise ValueError(f'source "{self.source}" does not use the key "{key}"')
        if self.source == "hf" and "/" not in str(self.dataset):
            raise ValueError(f'data set "{self.dataset}" needs its namespace, as in "owner/name"')
        return self


class AdamWConfig(Section):
    """AdamW for every parameter that Muon does not manage (2-D with decay, 1-D without)."""

    lr: Positive = 6e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: NonNegative = 0.1
    eps: Positive = 1e-8


class MuonConfig(Section):
    """Muon and Manifold Muon (paper, Appendix A). `lr` follows AdamW's schedule in proportion."""

    lr: Positive = 0.02
    momentum: Fraction = 0.95
    weight_decay: NonNegative = 0.1
    """Applied to unconstrained matrices alone; see `ModuleAssignment.weight_decay`."""
    solver: SolverName = "dual_ascent"
    dual_steps: Count = 20
    dual_alpha: Positive = 0.1
    dual_impl: Literal["published", "reduced"] = "published"
    """The same loop as written, or on 2n rows; see `trainers.manifold.solve`."""
    polish: Flag = False
    exact_steps: Count | None = None
    cg_steps: Count = 16
    retraction: DgramRetraction = "svd_sorted"
    """How DGram weights return to the manifold, under either optimizer; the others have one retraction."""
    qkv: Literal["fused", "split", "per_head"] = "fused"
    """What of attention's input weight is one matrix to Muon and to a retraction: all of it, each of Q, K
    and V, or each head of each."""
    update_scale: Literal["unit", "rows_over_cols"] = "unit"
    """`rows_over_cols` multiplies updates by √max(1, rows / cols)."""
    msign: MsignName = "polar_express"
    msign_steps: Annotated[int, Field(strict=True, ge=1, le=30)] | None = None
    """None is the method's own number, `trainers.iterations.default_steps`."""
    msign_dtype: MsignPrecision | None = None
    """None follows the run's precision."""


class OptimizerConfig(Section):
    adamw: AdamWConfig = AdamWConfig()
    muon: MuonConfig = MuonConfig()
    grad_clip: Positive = 1.0
    """Global norm over all parameters."""


class ModuleAssignment(Section):
    """What one kind of module gets. A bare manifold name stands for `{manifold: name}`."""

    manifold: ManifoldName = "none"
    optimizer: Literal["muon", "adamw"] = "muon"
    """`adamw` with a manifold is AdamW's step, then the retraction."""
    lr_multiplier: Positive = 1.0
    weight_decay: NonNegative | None = None
    """None is the paper's rule: the optimizer's own decay when unconstrained, 0 on a manifold.
    On a manifold it is applied before the retraction: W *= 1 - lr * weight_decay."""


def _bare_name(value: Any) -> Any:
    return {"manifold": value} if isinstance(value, str) else value


Assigned = Annotated[ModuleAssignment, BeforeValidator(_bare_name)]


class AssignmentConfig(Section):
    """Manifolds by module kind: `attn` is c_attn and c_proj of attention, `mlp` is c_fc and c_proj."""

    attn: Assigned = ModuleAssignment()
    mlp: Assigned = ModuleAssignment()


class ScheduleConfig(Section):
    """Optimizer steps, and the cosine with linear warm-up that both learning rates follow."""

    steps: Count = 50_000
    warmup_steps: Whole = 1_000
    min_lr_ratio: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.1
    batch_size: Count = 64
    """Sequences per optimizer step, over all workers."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self


class EvaluationConfig(Section):
    """A fixed set of `batches` batches of each split, every `every` steps, at step 0 and at the end."""

    every: Count = 1_000
    batches: Count = 200


class StabilityConfig(Section):
    """When a run counts as unstable. The numbers are this project's defaults, not the paper's.

    `scale_free` judges a spike against the run's own best loss, `paper` against a fixed loss.
    """

    style: Literal["paper", "scale_free"] = "scale_free"
    spike_after: Fraction = 0.1
    spike_loss: Positive = 5.0
    spike_rise: Positive = 1.0
    drift_window: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.1
    drift_rise: Positive = 0.1
    recovery_rise: Positive = 0.05
    recovery_by: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.8
    stop: Flag = False
    """End a run at its first hard spike. A non-finite loss always ends it."""


class ProbesConfig(Section):
    spectra: Flag = True
    """Singular values and Gram statistics of every attention and MLP matrix at each evaluation."""
    heads: Flag = True
    """Singular values of W_Q, W_K and W_V, whole and by head, and of their product, at evaluations."""
    attention: Flag = True
    """Logits, entropy and softmax Jacobian by head, on fixed sequences."""
    attention_every: Count | None = None
    """Steps from one to the next; None measures at evaluations."""
    flow: Flag = True
    """Gradient, update and activations of every attention and MLP matrix."""
    flow_every: Count = 10
    costs: Flag = True
    """Speed, and where the time of a step goes."""
    costs_every: Count = 10
    sequences: Count = 2
    """Sequences of the validation set that `attention` and `flow` look at."""
    updates: Flag = True
    """Tangency, length and effect of Muon's steps, measured inside the optimizer."""
    updates_every: Count | None = None
    """Steps from one measured step to the next; None measures the last before each evaluation."""


class RuntimeConfig(Section):
    """What changes speed and safety but not the experiment; never part of a run's identity."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    micro_batch: Count | None = None
    """Sequences per forward pass and worker; None takes the worker's whole share."""
    compile: Flag | None = None
    """None compiles on CUDA alone."""
    slots: Count | None = None
    """Add the gradients of this many equal slots of a batch in one fixed order: the same bits for every
    number of workers that divides them. On CPUs; slower, for verification."""
    activation_checkpointing: Flag = False
    """Compute activations again in the backward pass instead of keeping them."""
    fetch_every: Count | None = None
    """Steps whose losses are read from the device at once; None is 1 on a CPU and 10 on CUDA. Divergence
    and requests to stop are noticed then."""
    threads: Annotated[int, Field(strict=True, ge=1, le=1024)] = 1
    checkpoint_every: Count = 1_000
    keep_checkpoints: Count = 2
    part_seconds: Positive = 10.0
    """Records are closed for shipping at least this often."""


class RunConfig(Section):
    """One training run: an arm with a seed."""

    arm: SafeName = "run"
    seed: Seed = 1337
    precision: Precision = "float32"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    assignment: AssignmentConfig = AssignmentConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    stability: StabilityConfig = StabilityConfig()
    probes: ProbesConfig = ProbesConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _vocabulary_holds_tokens(self) -> Self:
        needed = {"bytes": 256, "gpt2": 50257}[self.data.tokenizer]
        if self.model.vocab_size < needed:
            raise ValueError(
                f"vocab_size {self.model.vocab_size} is below the {needed} tokens of tokenizer "
                f'"{self.data.tokenizer}"'
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        return self.schedule.batch_size * self.model.context

    @property
    def qkv_blocks(self) -> int:
        """How many matrices, on top of one another, attention's input weight is; see `MuonConfig.qkv`."""
        return {"fused": 1, "split": 3, "per_head": 3 * self.model.n_head}[self.optimizer.muon.qkv]


def module_weight_decay(module: ModuleAssignment, optimizer: OptimizerConfig) -> float:
    """The module's own decay, or the paper's rule: none on a manifold, else the optimizer's."""
    if module.weight_decay is not None:
        return module.weight_decay
    if module.manifold != "none":
        return 0.0
    return (optimizer.muon if module.optimizer == "muon" else optimizer.adamw).weight_decay


def science(run: RunConfig) -> dict[str, Any]:
    """The fields that change a run's numbers, where they differ from their defaults.

    Leaving defaults out keeps every id when a later version adds a field. Options that the run's
    own assignment never reads (the solver of an unconstrained run, the DGram retraction of a
    Stiefel run) are left out too, so a grid over them makes no twin runs.

    Raises:
        ValueError: the data digest has not been filled in.
    """
    if run.data.digest is None:
        raise ValueError("data.digest is unknown; call trainers.corpus.identify first")
    fields = run.model_dump(
        mode="json", exclude={"arm", "seed", "runtime", "probes", "data", "stability"}, exclude_defaults=True
    )
    fields |= {"schema": SCHEMA_VERSION, "data": run.data.digest, "seed": run.seed}
    if run.stability.stop:  # of the rules, only a spike ends a run
        threshold = "spike_loss" if run.stability.style == "paper" else "spike_rise"
        read = {"stop", "style", "spike_after", threshold}
        fields["stability"] = run.stability.model_dump(mode="json", include=read, exclude_defaults=True)
    muon = fields.get("optimizer", {}).get("muon", {})
    for key in _unread(run):
        muon.pop(key, None)
    assignment = fields.setdefault("assignment", {})
    for kind, module in (("attn", run.assignment.attn), ("mlp", run.assignment.mlp)):
        assignment.setdefault(kind, {})["weight_decay"] = module_weight_decay(module, run.optimizer)
    return _canonical(fields)


def _unread(run: RunConfig) -> set[str]:
    """Keys of `optimizer.muon` that this run's assignment does not read, or that say the same twice."""
    muon = run.optimizer.muon
    modules = (run.assignment.attn, run.assignment.mlp)
    managed = [m for m in modules if m.optimizer == "muon"]
    constrained = {m.manifold for m in managed} - {"none", "spectral"}  # the solver's business
    unread = {"weight_decay"}  # said by the modules
    if not managed:
        unread |= set(MuonConfig.model_fields) - {"retraction", "qkv"}
    options = {
        "dual_ascent": {"dual_steps", "dual_alpha", "dual_impl"},
        "projected": {"polish"},
        "exact": {"exact_steps", "cg_steps"},
    }
    for solver, names in options.items():
        if solver != muon.solver or not constrained:
            unread |= names
    if not constrained:
        unread |= {"solver"}
    if "dgram" not in {m.manifold for m in modules}:
        unread |= {"retraction"}
    if run.assignment.attn.optimizer != "muon" and run.assignment.attn.manifold == "none":
        unread |= {"qkv"}
    if muon.msign_dtype == run.precision:
        unread |= {"msign_dtype"}
    if muon.msign_steps == default_steps(muon.msign, muon.msign_dtype or run.precision):
        unread |= {"msign_steps"}
    return unread


def _canonical(fields: dict[str, Any]) -> dict[str, Any]:
    """Without empty sections, and with one zero."""
    plain = {k: _canonical(v) if isinstance(v, dict) else 0.0 if v == 0.0 and isinstance(v, float) else v
             for k, v in fields.items()}  # fmt: skip
    return {k: v for k, v in plain.items() if v != {}}


def run_id(run: RunConfig) -> str:
    """`<arm>-s<seed>-<hash8>`: the hash is SHA-256 over the canonical JSON of `science(run)`."""
    canonical = json.dumps(science(run), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{run.arm}-s{run.seed}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


RUN_ID = re.compile(r"^[a-z0-9][a-z0-9._-]{0,63}-s\d+-[0-9a-f]{8}$")
