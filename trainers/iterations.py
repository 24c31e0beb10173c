"""How many polynomials a polar factor takes, and in which order: plain numbers, shared by the arithmetic
itself and by what plans it without torch."""

from __future__ import annotations

HALF = ("float16", "bfloat16")

SMALL = 256
"""Width below which half precision composes nothing."""

GPU_BATCH = 2**27
"""Elements of the matrices that a GPU updates as one batch, at most; temporaries are several times that."""

POLAR_STEPS = 18
"""`gram` steps that turn singular values down to 1e-6 of the Frobenius norm into 1: a Gaussian matrix of
width 768, the start of every run, has some at 5e-6, which fewer steps leave below 1."""


def default_rounds(manifold: str) -> int:
    """Rounds of the solver `exact`; Stiefel's multiplier, with its diagonal, converges more slowly."""
    return 3 if manifold == "stiefel" else 2


def reduces(m: int, n: int, manifold: str) -> bool:
    """Whether the dual ascent of a tall m x n matrix has a smaller form: from m = 2n up, and where a square
    Stiefel matrix spans everything. The columns must be orthogonal, which `oblique` ones are not."""
    return manifold != "oblique" and (m >= 2 * n or (manifold == "stiefel" and m == n))


def default_steps(method: str, precision: str) -> int:
    """Iterations after which a method of `msign` is converged for singular values down to 1e-3 of the norm.

    (`newton_schulz` never is; 5 is Muon's number.) `gram` takes its scale from the fourth power of X and so
    starts closer. Where the smallest are a thousandth of the largest, six steps in half precision leave
    some of them at .6 to .9; the error as a whole, which is rounding, is that of ten published steps.
    """
    if method == "gram":
        return 6 if precision in HALF else 8
    return {"polar_express": 10, "newton_schulz": 5}[method]


def gram_groups(m: int, n: int, steps: int, precision: str) -> list[int]:
    """How many polynomials `gram` composes before it touches the m x n matrix again.

    A group of g costs 4mn² + (1, 5, 9)[g - 1] 2n³ (m >= n), so composing pays where m > 1.5 n. Rounding in
    the composed Gram matrix grows with g, and a polynomial explodes above its interval: float32 bears
    threes, half precision twos, and none where the matrix is so small that rounding does not average out.
    """
    m, n = max(m, n), min(m, n)
    if 2 * m <= 3 * n or (precision in HALF and n < SMALL):
        return [1] * steps
    size = 2 if precision in HALF else 3
    return [size] * (steps // size) + ([steps % size] if steps % size else [])
