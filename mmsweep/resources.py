"""What one run of a grid takes from a cluster, and how much goes wrong before it is given up."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from trainers.config import Count, NonNegative, SafeName, Section, Whole


def _one_gpu(value: float) -> float:
    if value > 1:
        raise ValueError("one process drives one GPU, so at most 1: for more GPUs raise resources.workers")
    return value


Positive = Annotated[float, Field(strict=True, gt=0, le=1e9, allow_inf_nan=False)]


class Resources(Section):
    """`resources:` of a grid file. Nothing here changes what a run computes."""

    workers: Count = 1
    """Processes of one run, data-parallel."""
    nodes: Count = 1
    """Machines that the workers of one run are divided over, as many on each."""
    cpus_per_worker: Annotated[float, Field(strict=True, ge=0.01, allow_inf_nan=False)] = 1.0
    gpus_per_worker: Annotated[NonNegative, AfterValidator(_one_gpu)] = 0.0
    """One process drives one GPU; a fraction lets several runs share one."""
    max_concurrent: Count | None = None
    """None leaves it to what the cluster has."""
    priority: dict[SafeName, Annotated[int, Field(strict=True)]] = Field(default_factory=dict)
    """Arm → rank: higher ones go first, those that are not named have 0."""
    max_failures: Whole = 2
    """Crashes and hangs after which a run is given up."""
    max_preemptions: Whole = 20
    """Losses of its machine after which a run is given up."""
    hang_after_s: Positive = 900.0
    """A run that has written no record for so many seconds is ended, with its stacks, and tried again."""
    spool_gb: Positive = 20.0
    """What may wait on a machine's disk, per run, while the store is away; beyond it the run pauses."""
    placement_timeout_s: Positive = 1800.0
    """A launch ends when the cluster has had no room for any of its runs for so many seconds."""

    @model_validator(mode="after")
    def _even(self) -> Resources:
        if self.workers % self.nodes:
            raise ValueError(
                f"{self.workers} workers cannot be divided evenly over {self.nodes} nodes; "
                "make resources.workers a multiple of resources.nodes"
            )
        return self
