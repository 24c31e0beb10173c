"""What Muon's steps do to the weights: telemetry of the optimizer as records."""

from __future__ import annotations

from collections.abc import Iterator

from trainers.config import RunConfig
from trainers.optim import ManifoldMuon
from trainers.param_groups import NamedParameter
from trainers.records import UpdateRecord


def update_records(
    optimizer: ManifoldMuon, named: list[NamedParameter], run: RunConfig, run_id: str, attempt: int, step: int
) -> Iterator[UpdateRecord]:
    """One record for every matrix that Muon moved in its last step, if that was measured."""
    by_parameter = {id(p.parameter): p for p in named}
    telemetry = optimizer.telemetry()
    in_blocks = {id(t.parameter) for t in telemetry if t.block > 0}
    for t in telemetry:
        p = by_parameter[id(t.parameter)]
        assert p.layer is not None
        name = p.name.removesuffix(".weight")
        yield UpdateRecord(
            run=run_id,
            attempt=attempt,
            step=step,
            matrix=f"{name}.{t.block}" if id(t.parameter) in in_blocks else name,
            layer=p.layer,
            module=p.kind,
            manifold=getattr(run.assignment, p.kind).manifold,
            residual=t.residual,
            distance=t.distance,
            direction_norm=t.direction_norm,
            update_ratio=t.update_ratio,
        )
