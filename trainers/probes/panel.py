"""The probes of one run: what is looked at when, and the records that come of it.

Nothing here changes what is trained: probes read weights, gradients and the optimizer's own numbers,
and look at attention with a forward pass apart from training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from trainers.clock import no_span
from trainers.config import RunConfig
from trainers.distributed import Group
from trainers.models import Model
from trainers.optim import ManifoldMuon
from trainers.param_groups import NamedParameter
from trainers.probes.attention import Walk, attention_records, walk
from trainers.probes.costs import Costs
from trainers.probes.flow import Flow
from trainers.probes.spectra import head_records, spectrum_records
from trainers.probes.updates import update_records
from trainers.records import Record


class Panel:
    """Arms the probes that are due at a step, on rank 0; only Muon's own telemetry needs every rank.

    Args:
        windows: (S, T) token ids that attention and activations are looked at with.
    """

    def __init__(
        self,
        run: RunConfig,
        model: Model,
        named: list[NamedParameter],
        muon: torch.optim.Optimizer | None,
        windows: Tensor,
        group: Group,
        *,
        run_id: str,
        attempt: int,
    ) -> None:
        self._run = run
        self._model = model
        self._named = named
        self._muon = muon if isinstance(muon, ManifoldMuon) else None
        self._windows = windows
        self._main = group.is_main
        self._stamp = (run_id, attempt)
        self._flow = Flow(named)
        self._costs = Costs(run, group.device, group.world_size)
        self._flow_is_on = self._costs_are_on = False
        self._walked: tuple[int, Walk] | None = None

    def periods(self) -> list[int]:
        """Steps from one look to the next, of every probe of steps."""
        probes, evaluation = self._run.probes, self._run.evaluation
        wanted = [
            (probes.updates, probes.updates_every or evaluation.every),
            (probes.flow, probes.flow_every),
            (probes.costs, probes.costs_every),
            (probes.attention and probes.attention_every is not None, probes.attention_every or 0),
        ]
        return [every for on, every in wanted if on]

    # --- one step, as it goes ----------------------------------------------------------------------

    def arm(self, step: int) -> None:
        """Get ready for the step that ends as number `step`."""
        probes = self._run.probes
        self._flow_is_on = self._main and probes.flow and self._due(step, probes.flow_every)
        self._costs_are_on = self._main and probes.costs and self._due(step, probes.costs_every)
        if self._muon is not None:
            every = probes.updates_every or self._run.evaluation.every
            self._muon.measure = probes.updates and self._due(step, every)
            self._muon.span = self._costs.clock.span if self._costs_are_on else no_span

    def span(self, name: str) -> AbstractContextManager[None]:
        """Time a part of the step, if it is timed."""
        return self._costs.clock.span(name) if self._costs_are_on else nullcontext()

    def after_backward(self) -> None:
        if self._flow_is_on:
            self._flow.before()

    def after_step(self) -> None:
        if self._flow_is_on:
            self._flow.after()

    def count(self, steps: int, seconds: float) -> None:
        """Steps and the time they took, evaluations excluded."""
        self._costs.count(steps, seconds)

    # --- records -------------------------------------------------------------------------------------

    def of_step(self, step: int) -> Iterator[Record]:
        """What the probes saw of the armed step. Reads the device."""
        if not self._main:
            return
        probes = self._run.probes
        if self._muon is not None and self._muon.measure:
            yield from update_records(self._muon, self._named, self._run, *self._stamp, step)
        evaluated = self._due(step, self._run.evaluation.every)  # then attention has its turn there
        every = probes.attention_every
        if probes.attention and every is not None and step % every == 0 and not evaluated:
            yield from attention_records(self._walk(step, scores=True), *self._stamp, step)
        if self._flow_is_on:
            seen = self._walk(step, scores=probes.attention and evaluated)
            yield from self._flow.records(seen.activation_rms, *self._stamp, step)
        if self._costs_are_on:
            yield self._costs.record(*self._stamp, step)

    def of_evaluation(self, step: int) -> Iterator[Record]:
        """What is looked at whenever the model is evaluated."""
        if not self._main:
            return
        probes = self._run.probes
        if probes.spectra:
            yield from spectrum_records(self._named, self._run, *self._stamp, step)
        if probes.heads:
            yield from head_records(self._named, self._run.model.n_head, *self._stamp, step)
        if probes.attention:
            yield from attention_records(self._walk(step, scores=True), *self._stamp, step)

    def _walk(self, step: int, *, scores: bool) -> Walk:
        """One forward pass for all that look at the weights of this step."""
        if self._walked is None or self._walked[0] != step or (scores and not self._walked[1].attention):
            self._walked = (step, walk(self._model, self._windows, scores=scores))
        return self._walked[1]

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self._run.schedule.steps
