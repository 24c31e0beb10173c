"""Time, arithmetic and memory of one optimizer step at GPT-2 small's matrices.

Contenders of an arm take turns in one process, so that a busy or throttled machine slows all of them;
figures are medians, ratios are ratios of medians. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import (
    RESULTS,
    heading,
    introduction,
    peak_gflops,
    prepare,
    progress,
    publish,
    seconds,
    synchronize,
    table,
    write,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trainers.config import ModelConfig
from trainers.manifold import default_dtype, retract
from trainers.manifold.msign import polar_express_coefficients
from trainers.memory import keep_freed_memory
from trainers.models.gpt2 import GPT2
from trainers.optim import ManifoldMuon, _Shares

ARMS = {
    "hetero": ("stiefel", "dgram"),
    "all_stiefel": ("stiefel", "stiefel"),
    "all_dgram": ("dgram", "dgram"),
    "unconstrained": ("none", "none"),
}
"""Manifolds of the attention's and of the MLP's matrices."""

LR, MOMENTUM, WEIGHT_DECAY = 0.02, 0.95, 0.1
INIT_STD = 0.02
"""Of every weight before its retraction. Columns of MLP matrices then have norms of about 1, as in
training (tests/fixtures/real_momentum.npz: .5 to 1.5)."""
GRADIENT_SLOPE, GRADIENT_NORM = -1.4, 0.1
"""Singular values of a gradient are `j ** slope`, of this Frobenius norm. The slope is the median of those
fitted to the momentum in tests/fixtures/real_momentum.npz (-.9 to -1.8)."""
RANKS = (1, 2, 4, 8)


def layer_shapes(width: int) -> list[tuple[str, tuple[int, int]]]:
    """Kind and shape of one layer's matrices: c_attn, c_proj, c_fc, c_proj."""
    d = width
    return [("attn", (3 * d, d)), ("attn", (d, d)), ("mlp", (4 * d, d)), ("mlp", (d, 4 * d))]


# --- the published loop ----------------------------------------------------------------------------


class PublishedLoop:
    """Manifold Muon as the paper's Appendix A has it (arXiv 2606.13276): one matrix at a time, twenty dual
    steps, `msign` by ten steps of Polar Express in half precision, all else in the weights' precision.

    `dtype` is bfloat16 where the device multiplies it natively; elsewhere it would take a hundred times
    as long, and float32 stands in for it.
    """

    def __init__(self, weights: list[tuple[nn.Parameter, str]], dtype: torch.dtype) -> None:
        self.weights = weights
        self.dtype = dtype
        self.buffers = [torch.zeros_like(W) for W, _ in weights]

    @torch.no_grad()
    def step(self) -> None:
        for (W, manifold), buffer in zip(self.weights, self.buffers, strict=True):
            assert W.grad is not None
            buffer.mul_(MOMENTUM).add_(W.grad)
            G = W.grad + MOMENTUM * buffer
            if manifold == "none":
                W.copy_(W * (1 - LR * WEIGHT_DECAY) - LR * self.msign(G))
            elif W.size(0) < W.size(1):
                W.copy_(self.updated(W.T, G.T, manifold).T)
            else:
                W.copy_(self.updated(W, G, manifold))

    def updated(self, W: Tensor, G: Tensor, manifold: str) -> Tensor:
        V = W - LR * self.direction(W, G, manifold)
        if manifold == "stiefel":
            return self.msign(V)
        U, S, Qt = torch.linalg.svd(V, full_matrices=False)
        polar: Tensor = U @ Qt
        return polar @ torch.diag(S)

    def direction(self, W: Tensor, G: Tensor, manifold: str, K: int = 20, alpha: float = 0.1) -> Tensor:
        def project(M: Tensor) -> Tensor:
            return M if manifold == "stiefel" else M - torch.diag(torch.diag(M))

        A = G
        multiplier = -0.25 * project(W.T @ G + G.T @ W)
        for k in range(K):
            A = self.msign(G + 2 * W @ project((multiplier + multiplier.T) / 2))
            H = project(W.T @ A + A.T @ W)
            multiplier = multiplier - alpha * (1 - k / K) * H
        return A

    def msign(self, G: Tensor) -> Tensor:
        X: Tensor = G.to(self.dtype)
        if G.size(0) > G.size(1):
            X = X.mT
        X = X / (X.norm() * 1.01 + 1e-7)
        for a, b, c in polar_express_coefficients(10):
            A = X @ X.mT
            B = b * A + c * A @ A
            X = a * X + B @ X
        if G.size(0) > G.size(1):
            X = X.mT
        return X.to(G.dtype)


# --- contenders ------------------------------------------------------------------------------------


@dataclass
class Contender:
    name: str
    parameters: list[nn.Parameter]
    step: Callable[[], object]
    slow: bool = False
    """Takes part in `--slow-repeats` rounds alone."""
    times: list[float] = field(default_factory=list)

    def timed_step(self, gradients: list[Tensor], device: torch.device) -> float:
        self.give(gradients)
        return seconds(self.step, device)

    def give(self, gradients: list[Tensor]) -> None:
        """A copy of the gradients, as a backward pass would leave them."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.clone()

    def rest(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


_SORTED, _NORMED = {"retraction": "svd_sorted"}, {"retraction": "column_norm"}
OURS: dict[str, dict[str, Any]] = {
    "projected": {"dgram": _NORMED},
    "projected, svd_sorted": {"dgram": _SORTED},
    "projected, polish": {"polish": True, "dgram": _NORMED},
    "exact": {"solver": "exact", "dgram": _NORMED},
    "dual_ascent, reduced": {"solver": "dual_ascent", "dual_impl": "reduced", "dgram": _SORTED},
    "dual_ascent, published": {
        "solver": "dual_ascent",
        "msign_method": "polar_express",
        "dgram": _SORTED,
    },
}
"""Options of `ManifoldMuon`; `dgram` holds those of DGram matrices alone. `dual_ascent` retracts as the paper
does, so that it is compared with the published loop for the same mathematics."""


def contenders(arm: str, kinds: list[str], start: list[Tensor], dtype: torch.dtype) -> Iterator[Contender]:
    """Each with its own copy of the weights; `dtype` is the published loop's."""
    manifolds = dict(zip(("attn", "mlp"), ARMS[arm], strict=True))

    def copies() -> list[nn.Parameter]:
        return [nn.Parameter(W.clone()) for W in start]

    own = copies()
    published = PublishedLoop([(W, manifolds[k]) for W, k in zip(own, kinds, strict=True)], dtype)
    yield Contender("published loop", own, published.step, slow=arm != "unconstrained")
    own = copies()
    muon = torch.optim.Muon(own, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    yield Contender("torch.optim.Muon", own, muon.step)
    own = copies()
    adamw = torch.optim.AdamW(own, lr=6e-4, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    yield Contender("torch.optim.AdamW", own, adamw.step)
    for name, options in OURS.items() if arm != "unconstrained" else [("msign", {})]:
        if "svd_sorted" in name and "dgram" not in ARMS[arm]:
            continue
        own = copies()
        optimizer = manifold_muon(own, kinds, manifolds, options)
        yield Contender(f"ours: {name}", own, optimizer.step, slow="dual_ascent" in name)


def manifold_muon(
    parameters: list[nn.Parameter], kinds: list[str], manifolds: dict[str, str], options: dict[str, Any]
) -> ManifoldMuon:
    """One group per kind of module, as in training."""
    groups = []
    for kind, manifold in manifolds.items():
        group: dict[str, Any] = {key: value for key, value in options.items() if key != "dgram"}
        group |= options.get(manifold, {})
        group["params"] = [p for p, own in zip(parameters, kinds, strict=True) if own == kind]
        group["manifold"] = manifold
        group["weight_decay"] = WEIGHT_DECAY if manifold == "none" else 0.0
        groups.append(group)
    return ManifoldMuon(groups, lr=LR, momentum=MOMENTUM)


def start_weights(arm: str, shapes: list[tuple[str, tuple[int, int]]], device: torch.device) -> list[Tensor]:
    """Gaussian, retracted onto the arm's manifolds."""
    generator = torch.Generator().manual_seed(1)
    manifolds = dict(zip(("attn", "mlp"), ARMS[arm], strict=True))
    weights = []
    for kind, shape in shapes:
        W = (INIT_STD * torch.randn(shape, generator=generator)).to(device)
        method = "column_norm" if manifolds[kind] == "dgram" else None
        weights.append(retract(W, manifolds[kind], method=method).contiguous())
    return weights


def heavy_tailed_gradients(shapes: list[tuple[str, tuple[int, int]]], device: torch.device) -> list[Tensor]:
    """Random singular vectors, singular values that fall by a power law."""
    generator = torch.Generator().manual_seed(2)
    gradients = []
    for _, (m, n) in shapes:
        rank = min(m, n)
        U, V = (torch.randn(k, rank, generator=generator).to(device) for k in (m, n))
        sigma = torch.arange(1, rank + 1, device=device) ** GRADIENT_SLOPE
        G = torch.linalg.qr(U).Q * sigma @ torch.linalg.qr(V).Q.mT
        gradients.append(G * (GRADIENT_NORM / G.norm()))
    return gradients


# --- counting --------------------------------------------------------------------------------------


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOPs of matrix products by dtype, with torch's own formulas. LAPACK is not counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops[out.dtype] += formula(*args, **kwargs, out_val=out)
        return out


def inspect(
    contender: Contender, gradients: list[Tensor], device: torch.device
) -> tuple[Counter[Any], float]:
    """FLOPs by dtype, and peak memory in MiB, of one untimed step; it also warms up, where one is enough."""
    if not contender.slow:
        contender.timed_step(gradients, device)
    contender.give(gradients)
    with Products() as products:
        memory = peak_memory(contender.step, device)
    return products.flops, memory


def peak_memory(work: Callable[[], object], device: torch.device) -> float:
    """MiB beyond what is held at the end, optimizer state included. On a CPU by the allocator's events in
    torch.profiler, which do not see scratch memory of BLAS."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None
    trace = profiled.profiler.kineto_results
    assert trace is not None
    held = largest = 0
    for event in sorted((e for e in trace.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        largest = max(largest, held)
    return (largest - max(held, 0)) / 2**20


def sharded_shares(
    arm: str, width: int, gradients: list[Tensor], device: torch.device
) -> dict[str, dict[str, float]]:
    """Share of the arithmetic of `projected` at twelve layers that falls to the busiest rank, by kind of
    device and number of ranks. By count: the optimizer's own plan, and the FLOPs that each kind of
    matrix takes here. Weights are shapes without contents, so any machine can plan for any."""
    manifolds = dict(zip(("attn", "mlp"), ARMS[arm], strict=True))
    layer = layer_shapes(width)
    flops: dict[tuple[str, tuple[int, int]], int] = {}
    for (kind, shape), W, gradient in zip(layer, start_weights(arm, layer, device), gradients, strict=False):
        parameter = nn.Parameter(W)
        optimizer = manifold_muon([parameter], [kind], {kind: manifolds[kind]}, OURS["projected"])
        with Products() as products:
            Contender("", [parameter], optimizer.step).timed_step([gradient], device)
        flops[manifolds[kind], (max(shape), min(shape))] = sum(products.flops.values())
    shapes = layer * 12
    kinds = [kind for kind, _ in shapes]
    shares: dict[str, dict[str, float]] = {}
    for planned in ("cpu", "cuda"):
        with FakeTensorMode():
            weights = [nn.Parameter(torch.empty(shape, device=planned)) for _, shape in shapes]
        shares[planned] = {}
        for ranks in RANKS:
            optimizer = manifold_muon(weights, kinds, manifolds, OURS["projected"])
            division = object.__new__(_Shares)  # without its process group
            division.size = ranks
            optimizer._shares = division
            load = [0] * ranks
            for turn in division.turns(optimizer._items()):
                for rank, item in enumerate(turn):
                    if item is not None:
                        load[rank] += len(item.members) * flops[item.group["manifold"], item.shape]
            shares[planned][str(ranks)] = max(load) / sum(load)
    return shares


# --- measuring -------------------------------------------------------------------------------------


def measure_arm(
    arm: str,
    shapes: list[tuple[str, tuple[int, int]]],
    gradients: list[Tensor],
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """Times, FLOPs and memory by contender."""
    start = start_weights(arm, shapes, device)
    entrants = list(contenders(arm, [kind for kind, _ in shapes], start, published_dtype(device)))
    if not options.slow_repeats:
        entrants = [c for c in entrants if not c.slow]
    counts = {}
    for contender in entrants:
        progress(f"{arm}: untimed step of {contender.name}")
        counts[contender.name] = inspect(contender, gradients, device)
        contender.rest()
    repeats = options.repeats
    slow_rounds = spread(options.slow_repeats, repeats)
    for k in range(repeats):
        first = k % len(entrants)  # nobody always follows the same one
        for contender in entrants[first:] + entrants[:first]:
            if contender.slow and k not in slow_rounds:
                continue
            contender.times.append(contender.timed_step(gradients, device))
            contender.rest()
            progress(f"{arm}: repeat {k + 1} of {repeats}, {contender.name}: {contender.times[-1]:.4g} s")
    return {c.name: figures(c.times, *counts[c.name]) for c in entrants}


def published_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16
    return default_dtype(torch.empty(0, device=device))


def spread(count: int, repeats: int) -> set[int]:
    """`count` of the rounds 0 … repeats - 1, from the first to the last."""
    count = min(count, repeats)
    return {round(i * (repeats - 1) / max(1, count - 1)) for i in range(count)}


def figures(times: list[float], flops: Counter[torch.dtype], memory: float) -> dict[str, Any]:
    return {
        "median_s": statistics.median(times),
        "min_s": min(times),
        "max_s": max(times),
        "times_s": times,
        "gflop": {str(dtype).removeprefix("torch."): count / 1e9 for dtype, count in flops.items()},
        "peak_memory_mib": memory,
    }


def add_ratios(arm: dict[str, dict[str, Any]], peaks: dict[str, float]) -> None:
    """Ratios of medians, and the time that the counted products would take at the machine's peak."""
    for own in arm.values():
        median = own["median_s"]
        if "published loop" in arm:
            own["speedup_over_published"] = arm["published loop"]["median_s"] / median
        own["time_over_muon"] = median / arm["torch.optim.Muon"]["median_s"]
        at_peak = sum(gflop / peaks[dtype] for dtype, gflop in own["gflop"].items())
        own["share_of_peak"] = at_peak / median


def forward_backward(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """GPT-2 small at 65,536 tokens, compiled, in bfloat16 autocast."""
    config = ModelConfig()
    if options.quick:
        config = ModelConfig(n_layer=1, n_head=1, d_model=64, context=64, vocab_size=512)
    sequences = 64
    model = GPT2(config)
    model.initialize(0)
    model.to(device)
    compiled = torch.compile(model)
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(config.vocab_size, (sequences, config.context + 1), generator=generator).to(device)

    def once() -> None:
        model.zero_grad(set_to_none=True)
        for i in range(0, sequences, options.micro_batch):
            part = text[i : i + options.micro_batch]
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = compiled(part[:, :-1], part[:, 1:])
            (loss * (len(part) / sequences)).backward()

    times = []
    for k in range(options.repeats + 3):
        times.append(seconds(once, device))
        progress(f"forward and backward: pass {k + 1} of {options.repeats + 3}: {times[-1]:.4g} s")
    times = times[3:]
    return {
        "tokens": sequences * config.context,
        "micro_batch": options.micro_batch,
        "layers": config.n_layer,
        "median_s": statistics.median(times),
        "min_s": min(times),
        "max_s": max(times),
    }


# --- what is shown ---------------------------------------------------------------------------------


def document(result: dict[str, Any]) -> str:
    settings, passes = result["settings"], result["forward_backward"]
    lines = [introduction(result), ""]
    if settings["quick"]:
        lines += ["**Quick run: a smoke test at a small width. Its figures mean nothing.**", ""]
    lines += [
        f"{settings['layers']} layer(s) of width {settings['width']}; `msign` in {settings['msign_dtype']}, "
        f"the published loop's in {settings['published_dtype']}; {settings['repeats']} repeats, "
        f"{settings['slow_repeats']} of the published loop and of dual_ascent.",
        f"Gradients: {settings['gradients']}. Weights: {settings['weights']}.",
        f"Memory: {settings['memory']}. Allocator: {settings['allocator']}.",
        "FLOPs are those of matrix products; factorisations (LAPACK) are not counted. Share of peak is "
        "the time that they would take at the peak of their precision, over the time taken.",
        "",
        "Rate of products in GFLOP/s before the first arm and after each: "
        + "; ".join(
            f"{dtype} {', '.join(f'{rate:,.0f}' for rate in rates)}"
            for dtype, rates in result["peak_gflops"].items()
        )
        + ". The largest is the peak.",
    ]
    for arm, rows in result["arms"].items():
        lines += ["", f"## {arm}", "", arm_table(rows, passes)]
    if passes:
        lines += [
            "",
            f"Forward and backward of GPT-2 ({passes['layers']} layers, {passes['tokens']:,} tokens, "
            f"{passes['micro_batch']} sequences at a time, compiled, bfloat16 autocast): "
            f"{passes['median_s'] * 1e3:.1f} ms ({passes['min_s'] * 1e3:.1f} to "
            f"{passes['max_s'] * 1e3:.1f})",
        ]
    if result["sharding"]:
        sharding = result["sharding"]
        rows = [
            [ranks, *(f"{share[ranks]:.4f}" for share in sharding["share"].values()), f"{1 / int(ranks):.4f}"]
            for ranks in sharding["share"]["cpu"]
        ]
        lines += [
            "",
            f"## Sharded: {sharding['arm']}, projected, {sharding['layers']} layers, by count",
            "",
            "Share of the FLOPs that falls to the busiest rank, as `ManifoldMuon` divides the matrices.",
            "",
            table(("ranks", *(f"on {planned}" for planned in sharding["share"]), "1 / ranks"), rows),
        ]
    return "\n".join(lines)


def arm_table(rows: dict[str, dict[str, Any]], passes: dict[str, Any] | None) -> str:
    header = ["contender", "median ms", "min", "max", "runs", "published / this", "this / Muon"]
    header += ["GFLOP", "% of peak", "peak MiB"]
    if passes:
        header.append("% of forward + backward")
    lines = []
    for name, own in rows.items():
        gflop = sum(own["gflop"].values())
        cells = [name, *(f"{own[key] * 1e3:.1f}" for key in ("median_s", "min_s", "max_s"))]
        cells.append(str(len(own["times_s"])))
        cells.append(f"{own['speedup_over_published']:.1f}" if "speedup_over_published" in own else "–")
        cells.append(f"{own['time_over_muon']:.2f}")
        cells += [f"{gflop:.1f}", f"{100 * own['share_of_peak']:.0f}"] if gflop else ["–", "–"]
        cells.append(f"{own['peak_memory_mib']:.1f}")
        if passes:
            cells.append(f"{100 * own['median_s'] / passes['median_s']:.1f}")
        lines.append(cells)
    return table(header, lines)


# --- the command -----------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, help="default: 1 on a CPU, 12 on a GPU")
    parser.add_argument("--width", type=int, help="of the model; default: GPT-2 small's 768")
    parser.add_argument("--repeats", type=int, help="default: 21 on a CPU, 20 on a GPU")
    parser.add_argument(
        "--slow-repeats",
        type=int,
        help="of the published loop and of dual_ascent; 0 leaves them out; default: 3",
    )
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument(
        "--micro-batch", type=int, default=16, help="sequences per pass of the model, on a GPU"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a smoke test: width 64, two repeats")
    options = parser.parse_args()
    if options.layers is not None and options.layers < 1:
        parser.error("--layers must be at least 1")
    if options.repeats is not None and options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return options


def complete(options: argparse.Namespace, device: torch.device) -> None:
    """Fill in the defaults that depend on the device."""
    gpu = device.type == "cuda"
    if options.layers is None:
        options.layers = 12 if gpu and not options.quick else 1
    if options.width is None:
        options.width = 64 if options.quick else 768
    if options.repeats is None:
        options.repeats = 2 if options.quick else 20 if gpu else 21
    if options.slow_repeats is None:
        options.slow_repeats = 2 if options.quick else 3
    options.repeats = max(options.repeats, options.slow_repeats)


def settings(options: argparse.Namespace, device: torch.device, *, kept: bool) -> dict[str, Any]:
    gpu = device.type == "cuda"
    names = ("layers", "width", "repeats", "slow_repeats", "quick")
    return {name: getattr(options, name) for name in names} | {
        "lr": LR,
        "dtype": "float32",
        "msign_dtype": str(default_dtype(torch.empty(0, device=device))).removeprefix("torch."),
        "published_dtype": str(published_dtype(device)).removeprefix("torch."),
        "gradients": f"random singular vectors, singular values j^{GRADIENT_SLOPE}, norm {GRADIENT_NORM}",
        "weights": f"N(0, {INIT_STD}), retracted",
        "memory": "peak during a step beyond weights, gradients and state, by "
        + ("torch.cuda.max_memory_allocated" if gpu else "torch.profiler (it does not see scratch of BLAS)"),
        "allocator": "glibc, told to keep freed memory (mallopt)" if kept else "as it is",
    }


def main() -> None:
    options = arguments()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log lines
    device = prepare(options.device, options.threads)
    kept = keep_freed_memory()
    complete(options, device)
    shapes = layer_shapes(options.width) * options.layers
    gradients = heavy_tailed_gradients(shapes, device)
    dtypes = {torch.float32, torch.float64, published_dtype(device), default_dtype(gradients[0])}

    def note_peaks() -> None:
        batch = options.layers if device.type == "cuda" else 1
        for dtype in sorted(dtypes, key=str):
            rates = result["peak_gflops"].setdefault(str(dtype).removeprefix("torch."), [])
            rates.append(peak_gflops(dtype, options.width, batch, device))

    def text() -> str:
        """Of what is there so far. It is written after each part: a run that is cut short leaves it."""
        peaks = {dtype: max(rates) for dtype, rates in result["peak_gflops"].items()}
        for rows in result["arms"].values():
            add_ratios(rows, peaks)
        return document(result)

    result = heading("optimizer_step", device) | {"settings": settings(options, device, kept=kept)}
    result |= {"peak_gflops": {}, "arms": {}, "sharding": None, "forward_backward": None}
    progress("rate of matrix products")
    note_peaks()
    for arm in options.arms:
        result["arms"][arm] = measure_arm(arm, shapes, gradients, device, options)
        note_peaks()
        write(options, device, result, text())
    sharded = next((arm for arm in options.arms if arm != "unconstrained"), None)
    if sharded:
        share = sharded_shares(sharded, options.width, gradients, device)
        result["sharding"] = {"arm": sharded, "layers": 12, "share": share}
    if device.type == "cuda":
        write(options, device, result, text())
        result["forward_backward"] = forward_backward(device, options)
    publish(options, device, result, text())


if __name__ == "__main__":
    main()
