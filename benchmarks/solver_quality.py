"""How good each solver's direction is, on real momentum: against the float64 optimum, by its tangency.

The optimum is computed here, with SVDs in float64 and nothing of the solvers' own code.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import RESULTS, heading, introduction, prepare, progress, publish, table
from torch import Tensor

from trainers.manifold import retract, solve, tangency_residual

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "real_momentum.npz"

SOLVERS: dict[str, dict[str, Any]] = {
    "plain Muon": {},
    "dual_ascent": {"solver": "dual_ascent", "msign_method": "polar_express"},
    "projected": {"solver": "projected"},
    "projected, polish": {"solver": "projected", "polish": True},
    "exact": {"solver": "exact"},
}
"""Options of `solve`; plain Muon is that of no manifold. `msign_method` is `gram` unless named."""
PRECISIONS = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.float32, torch.bfloat16),
    "float16": (torch.float32, torch.float16),
}
"""Dtypes of W and G, and of `msign`."""


@dataclass(frozen=True, slots=True)
class Problem:
    name: str
    manifold: str
    W: Tensor  # (m, n), float64, on the manifold
    G: Tensor  # (m, n), float64


def problems() -> list[Problem]:
    """Weights and Nesterov momentum of a small GPT in training; the weights put exactly on their manifold."""
    arrays = np.load(FIXTURES)
    found = []
    for name in sorted({key.rsplit("/", 1)[0] for key in arrays.files}):
        W, G = (torch.from_numpy(arrays[f"{name}/{key}"]).double() for key in "WG")
        manifold = str(arrays[f"{name}/manifold"])
        method = "column_norm" if manifold == "dgram" else None
        found.append(Problem(name, manifold, retract(W, manifold, method=method), G))
    return found


# --- the optimum -----------------------------------------------------------------------------------


def optimum(problem: Problem, rounds: int, cg_steps: int) -> tuple[Tensor, float]:
    """The A that maximises ⟨G, A⟩ over ‖A‖₂ <= 1 and A tangent at W, and its relative duality gap.

    The dual is to minimise the nuclear norm of `M = G + 2 W P(Λ)`. Each round majorises that norm at M by
    the quadratic `tr(MᵀM Z) / 2 + const` with `Z = (MᵀM)^(-1/2)`, and minimises this by conjugate gradients.
    The gap is `(‖M‖_* - ⟨G, A⟩) / ‖M‖_*`; at 0, and with A tangent, A is optimal.
    """
    wide = problem.G.size(0) < problem.G.size(1)
    W, G = (problem.W.T, problem.G.T) if wide else (problem.W, problem.G)
    n = G.size(1)
    if problem.manifold == "stiefel" and G.size(0) == n:
        # On the orthogonal group A = W X with X skew, so X is the polar factor of skew(WᵀG). Its singular
        # values come in pairs, so none is 0 alone for an even n.
        M = W.T @ G
        U, S, Vt = torch.linalg.svd((M - M.T) / 2)
        A = W @ U @ Vt
        return (A.T if wide else A), float(1 - (G * A).sum() / S.sum())

    mask = torch.ones(n, n, dtype=torch.float64)
    if problem.manifold == "dgram":
        mask.fill_diagonal_(0)
    squares = (W * W).sum(dim=0)
    weights = mask / (squares[:, None] + squares[None, :])

    def violation(A: Tensor) -> Tensor:
        M = W.T @ A
        return mask * (M + M.T)

    multiplier = -weights * violation(G) / 2
    for _ in range(rounds):
        U, S, Vt = torch.linalg.svd(G + 2 * W @ multiplier, full_matrices=False)
        Z = Vt.T / S @ Vt

        def curvature(step: Tensor, Z: Tensor = Z) -> Tensor:
            X = squares[:, None] * (step @ Z)
            return 2 * mask * (X + X.T)

        H = violation(U @ Vt)
        step = torch.zeros_like(H)
        residual, direction = H, weights * H
        size = (residual * direction).sum()
        for _ in range(cg_steps):
            if size == 0:
                break
            image = curvature(direction)
            length = size / (direction * image).sum()
            step = step + length * direction
            residual = residual - length * image
            conditioned = weights * residual
            before, size = size, (residual * conditioned).sum()
            direction = conditioned + size / before * direction
        multiplier = multiplier - step
    U, S, Vt = torch.linalg.svd(G + 2 * W @ multiplier, full_matrices=False)
    A = U @ Vt
    return (A.T if wide else A), float(1 - (G * A).sum() / S.sum())


# --- the solvers -----------------------------------------------------------------------------------


def direction(problem: Problem, solver: str, precision: str, device: torch.device) -> Tensor:
    """A in float64 on the CPU."""
    dtype, msign_dtype = PRECISIONS[precision]
    W, G = (X.to(device, dtype) for X in (problem.W, problem.G))
    manifold = "none" if solver == "plain Muon" else problem.manifold
    options = {"msign_method": "gram", **SOLVERS[solver]}
    return solve(W, G, manifold, msign_dtype=msign_dtype, **options).cpu().double()


def quality(problem: Problem, A: Tensor, best: Tensor) -> dict[str, float]:
    return {
        "residual": float(tangency_residual(problem.W, A, problem.manifold)),
        "cosine": float((A * best).sum() / (A.norm() * best.norm())),
        "spectral_norm": float(torch.linalg.matrix_norm(A, 2)),
    }


# --- the command -----------------------------------------------------------------------------------


def document(result: dict[str, Any]) -> str:
    lines = [introduction(result), ""]
    if result["settings"]["quick"]:
        lines += ["**Quick run: a smoke test. The optimum has not converged, its figures mean nothing.**", ""]
    lines += [
        "RMS tangency residual / cosine with the optimum of each direction A, both in float64. W and G are "
        "float64 in the rows so named, else float32; a half precision is `msign_dtype`.",
        "",
    ]
    rows = []
    for name, fixture in result["fixtures"].items():
        for precision, solvers in fixture["directions"].items():
            cells = [f"{own['residual']:.4f} / {own['cosine']:.4f}" for own in solvers.values()]
            rows.append([f"{name}, {fixture['manifold']}, {precision}", *cells])
    lines += [table(("momentum, manifold, precision", *SOLVERS), rows), "", "Largest ‖A‖₂:", ""]
    rows = [
        [precision, *(f"{largest_norm(result, precision, solver):.4f}" for solver in SOLVERS)]
        for precision in PRECISIONS
    ]
    lines += [table(("precision", *SOLVERS), rows), "", "The optimum:", ""]
    rows = [
        [name, f"{f['optimum']['residual']:.1e}", f"{f['optimum']['duality_gap']:.1e}"]
        for name, f in result["fixtures"].items()
    ]
    return "\n".join([*lines, table(("momentum", "residual", "relative duality gap"), rows)])


def largest_norm(result: dict[str, Any], precision: str, solver: str) -> float:
    fixtures = result["fixtures"].values()
    return max(float(f["directions"][precision][solver]["spectral_norm"]) for f in fixtures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rounds", type=int, help="of the optimum; default: 200")
    parser.add_argument("--cg-steps", type=int, help="in each round; default: 30")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a smoke test: two matrices, 3 rounds")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = prepare(options.device, options.threads)
    rounds = options.rounds or (3 if options.quick else 200)
    cg_steps = options.cg_steps or (10 if options.quick else 30)
    chosen = problems()[::3][:2] if options.quick else problems()
    fixtures: dict[str, Any] = {}
    for k, problem in enumerate(chosen):
        progress(f"{problem.name}, {k + 1} of {len(chosen)}: the optimum")
        best, gap = optimum(problem, rounds, cg_steps)
        directions: dict[str, dict[str, Any]] = {}
        for precision in PRECISIONS:
            progress(f"{problem.name}, {k + 1} of {len(chosen)}: {precision}")
            directions[precision] = {
                solver: quality(problem, direction(problem, solver, precision, device), best)
                for solver in SOLVERS
            }
        own = quality(problem, best, best)
        fixtures[problem.name] = {
            "manifold": problem.manifold,
            "shape": list(problem.G.shape),
            "optimum": {"residual": own["residual"], "duality_gap": gap},
            "directions": directions,
        }
    result = heading("solver_quality", device)
    result["settings"] = {"rounds": rounds, "cg_steps": cg_steps, "quick": options.quick}
    result["fixtures"] = fixtures
    text = document(result)
    publish(options, device, result, text)


if __name__ == "__main__":
    main()
