"""Pure mathematics of manifold-constrained steps: no state, no I/O, no config objects."""

from trainers.manifold.manifolds import (
    MANIFOLDS,
    RETRACTIONS,
    constrained_part,
    distance,
    retract,
    spectral_norm,
    tangency_residual,
    tangent_project,
)
from trainers.manifold.msign import METHODS, default_dtype, msign
from trainers.manifold.solvers import DUAL_IMPLS, SOLVERS, solve

__all__ = [
    "DUAL_IMPLS",
    "MANIFOLDS",
    "METHODS",
    "RETRACTIONS",
    "SOLVERS",
    "constrained_part",
    "default_dtype",
    "distance",
    "msign",
    "retract",
    "solve",
    "spectral_norm",
    "tangency_residual",
    "tangent_project",
]
