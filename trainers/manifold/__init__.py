"""Pure mathematics of manifold-constrained steps: no state, no I/O, no config objects."""

from trainers.manifold.manifolds import (
    MANIFOLDS,
    RETRACTIONS,
    constrained_part,
    distance,
    retract,
    tangency_residual,
    tangent_project,
)
from trainers.manifold.msign import msign
from trainers.manifold.solvers import SOLVERS, solve

__all__ = [
    "MANIFOLDS",
    "RETRACTIONS",
    "SOLVERS",
    "constrained_part",
    "distance",
    "msign",
    "retract",
    "solve",
    "tangency_residual",
    "tangent_project",
]
