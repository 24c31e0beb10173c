"""Memory of a run, counted from its config: bytes on the device of one worker.

What is counted is what PyTorch's eager mode holds, as saved tensors and allocations show it; a compiled
model was seen to hold half of it. CUDA's own context, workspaces of libraries, buffers of NCCL and
fragmentation are not in it: leave a tenth of a device to them, `usable`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from trainers.config import RunConfig
from trainers.flops import matrices, parameter_count
from trainers.iterations import GPU_BATCH

FLOAT32 = 4

_STEP = {"projected": (4.5, 4.5), "exact": (7.0, 11.0), "dual_ascent": (6.0, 6.0), "plain": (4.5, 4.5)}
"""What Muon's step of a tall m x n matrix holds at most, by solver: (a, b) for `a mn + b n²` float32.
Measured on a CPU and rounded up, as the next three are."""
_COLUMN_NORM, _SVD_SORTED = (5.0, 8.0), (10.2, 3.0)
"""The same of DGram's two retractions, where they hold more than the solver."""
_SPECTRAL = (5.0, 3.0)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on one worker's device."""

    weights: int
    """float32, and under autocast the bfloat16 copies of the matrices and of the head."""
    gradients: int
    """float32; twice where there are several workers, for DDP's buckets."""
    optimizer: int
    """AdamW's two moments, Muon's momentum."""
    activations: int
    """What the blocks keep of one micro batch until the backward pass."""
    logits: int
    """The last norm and the loss over the vocabulary: its float32 logarithms, their gradient and that of
    the logits, which are there at one time."""
    block: int
    """One block's backward pass: gradients and, with checkpointing, its activations again."""
    temporaries: int
    """The optimizer's step: copies of a batch of matrices, and what workers exchange."""

    @property
    def total(self) -> int:
        """The largest sum at any one time: in the loss, in the backward pass or in the optimizer's step."""
        passing = self.activations + max(self.logits, self.block)
        return self.weights + self.gradients + self.optimizer + max(passing, self.temporaries)


def usable(gigabytes: float) -> int:
    """Bytes of a device that a run can count on; vendors' gigabytes of devices are binary ones."""
    return int(0.9 * gigabytes * 2**30)


def footprint(run: RunConfig, *, workers: int, micro_batch: int) -> Footprint:
    """What one worker holds.

    Args:
        run: its model, precision, optimizers and `runtime.activation_checkpointing` count.
        workers: data-parallel processes of the run.
        micro_batch: sequences per forward pass and worker.
    """
    model = run.model
    parameters = parameter_count(model)
    on_muon = sum(count * m * n for (_, m, n), count in _muon_matrices(run).items())
    copied = sum(m * n for shapes in matrices(model).values() for m, n in shapes) * model.n_layer
    copies = 2 * (copied + model.vocab_size * model.d_model) if _width(run) == 2 else 0
    tokens = micro_batch * model.context
    block = tokens * (_attention_bytes(run) + _mlp_bytes(run) + 2 * _norm_bytes(run))
    recomputed = run.runtime.activation_checkpointing
    kept = tokens * FLOAT32 * model.d_model if recomputed else block
    return Footprint(
        weights=FLOAT32 * parameters + copies,
        gradients=FLOAT32 * parameters * (2 if workers > 1 else 1),
        optimizer=FLOAT32 * (on_muon + 2 * (parameters - on_muon)),
        activations=model.n_layer * kept,
        logits=tokens * (_norm_bytes(run) + 3 * FLOAT32 * model.vocab_size),
        block=tokens * _gradient_bytes(run) + (block if recomputed else 0),
        temporaries=_step_bytes(run, workers),
    )


def micro_batch_of(run: RunConfig, workers: int) -> int:
    """Sequences per forward pass and worker that the config asks for."""
    share = run.schedule.batch_size // workers
    return min(run.runtime.micro_batch or share, share)


def largest_micro_batch(run: RunConfig, workers: int, bytes_: int) -> int | None:
    """The largest micro batch that divides a worker's share and stays within `bytes_`; None if none does."""
    share = run.schedule.batch_size // workers
    sizes = (size for size in range(share, 0, -1) if share % size == 0)
    return next((n for n in sizes if footprint(run, workers=workers, micro_batch=n).total <= bytes_), None)


# --- activations of one token in one block -------------------------------------------------------


def _width(run: RunConfig) -> int:
    """Bytes of a number that a matrix product reads."""
    return 2 if run.precision == "bfloat16" else FLOAT32


def _norm_bytes(run: RunConfig) -> int:
    """The float32 residual stream, what the next product reads, and mean and deviation. RMSNorm also keeps
    its float32 result before the scale."""
    d = run.model.d_model
    if run.model.family == "llama":
        return FLOAT32 * (2 * d + 1) + _width(run) * d
    return FLOAT32 * (d + 2) + _width(run) * d


def _attention_bytes(run: RunConfig) -> int:
    model, width = run.model, _width(run)
    d, rotary = model.d_model, model.family == "llama"
    y = width * d  # which c_proj reads
    mask = d if model.dropout else 0
    norms = 2 * FLOAT32 * model.n_head if model.qk_norm else 0
    upcast = 2 * FLOAT32 * d if model.qk_norm and width == 2 else 0
    if model.attention == "softmax":  # a fused kernel: no T x T
        fresh = 2 * width * d + y if model.qk_norm or rotary else 0  # new q and k; y in their layout
        return 3 * width * d + fresh + y + FLOAT32 * model.n_head + norms + upcast + mask
    unnormed = 3 * width * d if model.qk_norm and width == FLOAT32 else 0
    pointwise = (2 * width + (1 if model.dropout else 0)) * model.n_head * model.context
    return 3 * width * d + unnormed + y + pointwise + norms + upcast + mask


def _mlp_bytes(run: RunConfig) -> int:
    """Before and after GELU; or both products, SiLU of one, and their product."""
    model = run.model
    kept = 4 if model.family == "llama" else 2
    return kept * _width(run) * model.hidden + (model.d_model if model.dropout else 0)


def _gradient_bytes(run: RunConfig) -> int:
    """The widest gradients inside a block, and those of the stream before and after it."""
    model, width = run.model, _width(run)
    mlp = (2 if model.family == "llama" else 1) * width * model.hidden
    scores = width * model.n_head * model.context if model.attention != "softmax" else 0
    return max(mlp, scores) + 2 * FLOAT32 * model.d_model


# --- the optimizer's step ------------------------------------------------------------------------


def _muon_matrices(run: RunConfig) -> Counter[tuple[str, int, int]]:
    """How many matrices Muon has of each module kind and shape, made tall."""
    found: Counter[tuple[str, int, int]] = Counter()
    for kind, shapes in matrices(run.model).items():
        if getattr(run.assignment, kind).optimizer != "muon":
            continue
        for number, (m, n) in enumerate(shapes):
            split = run.qkv_blocks if (kind, number) == ("attn", 0) else 1
            tall = max(m // split, n), min(m // split, n)
            found[kind, *tall] += split * run.model.n_layer
    return found


def _batches(run: RunConfig, workers: int) -> Iterator[tuple[int, int]]:
    """(bytes, bytes that its update holds) of each batch of matrices."""
    for (kind, m, n), count in _muon_matrices(run).items():
        size = max(1, min(math.ceil(count / workers), GPU_BATCH // (m * n)))
        a, b = _step_numbers(run, kind)
        gathered = m * n if size > 1 else 0
        update = size * (gathered + a * m * n + b * n * n)
        yield from [(FLOAT32 * size * m * n, int(FLOAT32 * update))] * math.ceil(count / size)


def _step_numbers(run: RunConfig, kind: str) -> tuple[float, float]:
    muon, manifold = run.optimizer.muon, getattr(run.assignment, kind).manifold
    solver = "plain" if manifold == "none" else muon.solver
    needs = [_SPECTRAL if manifold == "spectral" else _STEP[solver]]
    if manifold == "dgram":
        needs.append(_SVD_SORTED if muon.retraction == "svd_sorted" else _COLUMN_NORM)
    a, b = max(needs, key=sum)
    return a, b


def _step_bytes(run: RunConfig, workers: int) -> int:
    """Of the dearest batch; with several workers what a turn gathers waits beside the next turn's."""
    turns = sorted(_batches(run, workers), reverse=True)[::workers]
    if workers == 1 or not turns:
        return max((update for _, update in turns), default=0)
    exchange = [(workers + 1) * size for size, _ in turns]
    waiting = [0, *exchange]
    return max(
        before + max(update, after)
        for before, (_, update), after in zip(waiting, turns, exchange, strict=False)
    )
