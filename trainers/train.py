"""Train one run: a config and a folder in, records, checkpoints and a summary in that folder out.

Alone:            python -m trainers.train run.yaml --out runs
On many devices:  torchrun --nproc-per-node 8 -m trainers.train run.yaml --out runs
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import hashlib
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainers import checkpoint, corpus, records
from trainers.batches import EVALUATION_KEY, Batches
from trainers.checkpoint import Progress, SaveError, Saver, TrainState
from trainers.config import SCHEMA_VERSION, RunConfig, run_id
from trainers.distributed import Group, join
from trainers.errors import DeviceError, InputError
from trainers.farewell import leave
from trainers.memory import keep_freed_memory
from trainers.models import Model, build
from trainers.optim import ManifoldMuon
from trainers.param_groups import NamedParameter, classify, optimizer_groups
from trainers.prefetch import Prefetch
from trainers.probes.panel import Panel
from trainers.provenance import code_digest, provenance
from trainers.records import EvalRecord, PartWriter, Record, StepRecord, Summary
from trainers.retraction import retract_after_steps
from trainers.schedule import lr_factor
from trainers.slots import SlotSum
from trainers.stability import EARLY_TERMINATION, HARD_SPIKE, Fired, judge

EXIT_NO_DEVICE = 69
"""Exit code of a run whose GPU is not there (EX_UNAVAILABLE: run it elsewhere)."""
EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and saved its state (EX_TEMPFAIL: run it again)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def train(
    run: RunConfig,
    run_dir: Path,
    *,
    attempt: int | None = None,
    on_record: Callable[[Record], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Summary | None:
    """Train `run` to its end, going on from the newest checkpoint in `run_dir` if there is one.

    Args:
        run: the whole experiment; `data.digest` is filled in if it is None.
        run_dir: the run's own folder; see `trainers.records` for what is in it.
        attempt: number of this try; None is one more than the folder has seen.
        on_record: called on rank 0 with every record, after it was written.
        should_stop: asked on every rank each step; if any says yes, all save their state and return.

    Returns:
        The summary, also when the run diverged; None when it was stopped.

    Raises:
        InputError: data or batch shape that cannot be trained on.
    """
    torch.set_num_threads(run.runtime.threads)
    keep_freed_memory()
    tokens = corpus.prepare(run.data)
    run = run.model_copy(
        update={"data": run.data.model_copy(update={"digest": run.data.digest or tokens.digest})}
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    with join(run.runtime.device) as group:
        work = _set_up(run, run_dir, tokens, group, attempt, on_record)
        with contextlib.closing(work.prefetch), work.saver:
            return _loop(work, should_stop)


@dataclass
class _Work:
    """What the loop holds."""

    run: RunConfig
    run_dir: Path
    group: Group
    state: TrainState
    forward: nn.Module
    """The model as it is called to evaluate: compiled where that pays."""
    network: nn.Module
    """The model as it is called to train: `forward`, in DDP where there are several ranks."""
    train_batches: Batches
    val_batches: Batches
    prefetch: Prefetch
    """Of the training batches."""
    probes: Panel
    share: int
    """Sequences of a batch on this rank."""
    micro: int
    """Sequences per forward pass."""
    log: _Log
    saver: Saver
    identity: dict[str, Any]
    started: float
    attempt: int

    @property
    def name(self) -> str:
        """The run's id."""
        return str(self.identity["run_id"])


class _Log:
    """Writes records on rank 0 and shows them to a listener."""

    def __init__(self, parts: PartWriter | None, listener: Callable[[Record], None] | None) -> None:
        self.parts = parts
        self.listener = listener

    def add(self, record: Record) -> None:
        if self.parts:
            self.parts.append(record)
            if self.listener:
                self.listener(record)

    def commit(self) -> None:
        if self.parts:
            self.parts.roll()

    def commit_if_older(self, seconds: float) -> None:
        if self.parts:
            self.parts.roll_if_older(seconds)


def _set_up(
    run: RunConfig,
    run_dir: Path,
    tokens: corpus.Corpus,
    group: Group,
    attempt: int | None,
    listener: Callable[[Record], None] | None,
) -> _Work:
    name = run_id(run)
    share, micro = _batch_shape(run, group)
    attempt = attempt or _next_attempt(run_dir)
    group.barrier()  # every rank has read the folder before rank 0 writes to it
    model = build(run.model)
    model.checkpointing = run.runtime.activation_checkpointing
    model.initialize(run.seed)
    model.to(group.device)
    named = classify(model)
    state = TrainState(model, _optimizers(named, run, group), Progress())
    identity = {"run_id": name, "data": tokens.digest, "code": code_digest()}
    found, remarks = checkpoint.load_newest(run_dir, state, group, identity=identity)
    if not found and "muon" in state.optimizers:
        state.optimizers["muon"].retract_()  # type: ignore[attr-defined]
    forward = _compiled(model, run, group)
    if group.is_main:
        for line in remarks:
            print(line, file=sys.stderr, flush=True)
        facts = provenance(
            run, group.device, world_size=group.world_size, attempt=attempt, tokens=tokens.digest
        )
        config = {"schema": SCHEMA_VERSION, "run_id": name, "config": run.model_dump(mode="json")}
        records.write_json(run_dir / records.CONFIG, {**config, "provenance": facts})
    train_batches = Batches(tokens.train, run.model.context, run.model.vocab_size)
    val_batches = Batches(tokens.val, run.model.context, run.model.vocab_size)
    muon = state.optimizers.get("muon")
    windows = _probe_windows(run, val_batches, group)
    return _Work(
        run=run,
        run_dir=run_dir,
        group=group,
        state=state,
        forward=forward,
        network=_data_parallel(forward, run, group, micro),
        train_batches=train_batches,
        val_batches=val_batches,
        prefetch=Prefetch(train_batches, run.seed, run.schedule.batch_size, group),
        probes=Panel(run, model, named, muon, windows, group, run_id=name, attempt=attempt),
        share=share,
        micro=micro,
        log=_Log(PartWriter(run_dir, attempt) if group.is_main else None, listener),
        saver=Saver(run_dir, group, identity=identity, keep=run.runtime.keep_checkpoints),
        identity=identity,
        started=time.time(),
        attempt=attempt,
    )


def _probe_windows(run: RunConfig, batches: Batches, group: Group) -> Tensor:  # (S, context)
    """What attention is looked at with: the first sequences of the evaluation set."""
    rows = batches.batch(EVALUATION_KEY, 0, run.probes.sequences)
    return torch.from_numpy(rows[:, :-1]).to(group.device)


def _batch_shape(run: RunConfig, group: Group) -> tuple[int, int]:
    """Sequences per rank, and per forward pass."""
    batch, workers, slots = run.schedule.batch_size, group.world_size, run.runtime.slots
    if slots and batch % slots:
        raise InputError(f"runtime.slots {slots} do not divide schedule.batch_size {batch}")
    if slots:
        SlotSum(slots, group)  # refuses what it cannot add up
    if batch % workers:
        raise InputError(f"schedule.batch_size {batch} is not a multiple of the {workers} workers")
    share = batch // workers
    micro = batch // slots if slots else min(run.runtime.micro_batch or share, share)
    if share % micro:
        raise InputError(f"runtime.micro_batch {micro} does not divide the {share} sequences of a worker")
    return share, micro


def _next_attempt(run_dir: Path) -> int:
    seen = [re.fullmatch(r"attempt-(\d{3,})", p.name) for p in run_dir.glob("attempt-*")]
    return 1 + max((int(match[1]) for match in seen if match), default=0)


def _optimizers(
    named: list[NamedParameter], run: RunConfig, group: Group
) -> dict[str, torch.optim.Optimizer]:
    muon_groups, adamw_groups = optimizer_groups(named, run)
    muon, adamw = run.optimizer.muon, run.optimizer.adamw
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(adamw_groups, lr=adamw.lr, betas=adamw.betas, eps=adamw.eps, fused=True)
    }
    retract_after_steps(optimizers["adamw"])
    if muon_groups:
        optimizers["muon"] = ManifoldMuon(
            muon_groups,
            lr=muon.lr,
            momentum=muon.momentum,
            update_scale=muon.update_scale,
            dual_steps=muon.dual_steps,
            dual_alpha=muon.dual_alpha,
            dual_impl=muon.dual_impl,
            polish=muon.polish,
            exact_steps=muon.exact_steps,
            cg_steps=muon.cg_steps,
            msign_method=muon.msign,
            msign_steps=muon.msign_steps,
            msign_dtype=DTYPES[muon.msign_dtype or run.precision],
            process_group=group.world_size > 1,
        )
    return optimizers


def _compiled(model: Model, run: RunConfig, group: Group) -> nn.Module:
    wanted = run.runtime.compile
    if wanted is None:
        wanted = group.device.type == "cuda"
    return torch.compile(model) if wanted else model  # type: ignore[return-value]


def _data_parallel(forward: nn.Module, run: RunConfig, group: Group, micro: int) -> nn.Module:
    if group.world_size == 1 or run.runtime.slots:
        return forward
    device_ids = [group.device] if group.device.type == "cuda" else None
    network = DistributedDataParallel(forward, device_ids=device_ids)
    # DDP rebuilds its buckets after the first backward pass, which changes the order of sums from
    # three ranks on. Two passes that are thrown away put that behind us, so that a resumed run and
    # an uninterrupted one add in the same order.
    blank = torch.zeros(micro, run.model.context, dtype=torch.int64, device=group.device)
    for _ in range(2):
        with _autocast(run, group):
            loss = network(blank, blank)
        loss.backward()
    network.zero_grad(set_to_none=True)
    return network


def _autocast(run: RunConfig, group: Group) -> torch.autocast:
    return torch.autocast(group.device.type, torch.bfloat16, enabled=run.precision == "bfloat16")


# --- the loop ------------------------------------------------------------------------------------


def _loop(work: _Work, should_stop: Callable[[], bool]) -> Summary | None:
    run, progress = work.run, work.state.progress
    horizon = run.schedule.steps
    diverged_at: int | None = None
    if not progress.evaluations:
        _evaluate(work)
    cut = _cut_short(work)
    while progress.step < horizon and cut is None:
        finite, stop = _train_steps(work, _steps_until_pause(work), should_stop)
        if not finite:
            diverged_at = progress.step
            break
        if progress.step % run.evaluation.every == 0 or progress.step == horizon:
            _evaluate(work)
            cut = _cut_short(work)
        if stop or progress.step % run.runtime.checkpoint_every == 0 or progress.step == horizon:
            _save(work)
        else:
            work.log.commit_if_older(run.runtime.part_seconds)
        if stop and progress.step < horizon and cut is None:
            return None
    work.log.commit()
    work.saver.wait()  # the summary, which comes last, says that all else is there
    return _finish(work, diverged_at, cut)


def _steps_until_pause(work: _Work) -> int:
    """Steps to the next one after which the host looks at the device."""
    run, step = work.run, work.state.progress.step
    fetch_every = run.runtime.fetch_every or (10 if work.group.device.type == "cuda" else 1)
    periods = [run.evaluation.every, run.runtime.checkpoint_every, fetch_every, *work.probes.periods()]
    return min([every - step % every for every in periods] + [run.schedule.steps - step])


@dataclass(frozen=True, slots=True)
class _Pending:
    """A step that the device may still be working on."""

    factor: float
    """Of the learning rates."""
    facts: Tensor
    """(3,): loss, number of ranks that want to stop, gradient norm; the same on every rank."""


def _train_steps(work: _Work, count: int, should_stop: Callable[[], bool]) -> tuple[bool, bool]:
    """`count` optimizer steps, and their records. Returns (all were finite, some rank wants to stop).

    Weights and optimizers are of no use after a step that was not finite; it is the last one counted.
    """
    progress = work.state.progress
    begun = time.perf_counter()
    pending = [_train_step(work, progress.step + k, should_stop()) for k in range(count)]
    facts = torch.stack([step.facts for step in pending]).tolist()  # here the host waits for the device
    seconds = (time.perf_counter() - begun) / count
    stop = False
    for step, (loss, stop_votes, norm) in zip(pending, facts, strict=True):
        stop |= stop_votes > 0
        progress.step += 1
        progress.tokens_seen += work.run.tokens_per_step
        progress.train_seconds += seconds
        work.log.add(_step_record(work, step.factor, loss, norm, seconds))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False, stop
    work.probes.count(count, seconds * count)
    for record in work.probes.of_step(progress.step):
        work.log.add(record)
    return True, stop


def _step_record(work: _Work, factor: float, loss: float, grad_norm: float, seconds: float) -> StepRecord:
    run, progress = work.run, work.state.progress
    return StepRecord(
        run=work.name,
        attempt=work.attempt,
        step=progress.step,
        tokens_seen=progress.tokens_seen,
        loss=loss,
        grad_norm=grad_norm,
        lr=run.optimizer.adamw.lr * factor,
        muon_lr=run.optimizer.muon.lr * factor,
        step_ms=seconds * 1e3,
        tokens_per_s=run.tokens_per_step / seconds,
        time=time.time(),
    )


def _train_step(work: _Work, done: int, wants_stop: bool) -> _Pending:
    """One optimizer step after `done` of them. Nothing is read from the device, unless it is probed."""
    run, group, state = work.run, work.group, work.state
    step = done + 1
    factor = lr_factor(done, run.schedule)
    rows = work.prefetch.rows(done, last=step == run.schedule.steps)
    work.probes.arm(step)
    with work.probes.span("forward_backward"):
        loss = (_backward_in_slots if run.runtime.slots else _forward_backward)(work, rows, done)
    work.probes.after_backward()
    with work.probes.span("update"):
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), run.optimizer.grad_clip)
        # All ranks learn what one of them wants, so that they take the same way.
        votes = group.sum_(loss.new_tensor([float(wants_stop)]))
        for optimizer in state.optimizers.values():
            for parameters in optimizer.param_groups:
                parameters["lr"] = parameters["peak_lr"] * factor
            optimizer.step()
    work.probes.after_step()
    for parameter in state.model.parameters():
        parameter.grad = None
    return _Pending(factor, torch.cat([loss.reshape(1), votes, norm.reshape(1)]))


def _noise_seed(*parts: int) -> int:
    """Dropout of a step is a function of (seed, step, rank): there is no generator state to save."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _forward_backward(work: _Work, rows: Tensor, done: int) -> Tensor:  # (share, context + 1) -> scalar
    """Accumulate the gradient of this rank's share, DDP those of all; returns the mean loss over ranks."""
    if work.run.model.dropout:
        torch.manual_seed(_noise_seed(work.run.seed, done, work.group.rank))
    chunks = torch.split(rows, work.micro)
    total = torch.zeros((), device=rows.device)
    for index, chunk in enumerate(chunks):
        last = index == len(chunks) - 1
        network = work.network
        quiet = (
            contextlib.nullcontext()
            if last or not isinstance(network, DistributedDataParallel)
            else network.no_sync()
        )
        with quiet:
            with _autocast(work.run, work.group):
                loss = network(chunk[:, :-1], chunk[:, 1:]) / len(chunks)
            loss.backward()
        total += loss.detach()
    return work.group.sum_(total) / work.group.world_size


def _backward_in_slots(work: _Work, rows: Tensor, done: int) -> Tensor:  # (share, context + 1) -> scalar
    """The same with bits that do not depend on the number of ranks: noise, gradients and losses are those
    of slots, added in one order; see `trainers.slots`."""
    run, parameters = work.run, list(work.state.model.parameters())
    slots = SlotSum(run.schedule.batch_size // work.micro, work.group)
    for slot, chunk in zip(slots.mine, torch.split(rows, work.micro), strict=True):
        if run.model.dropout:
            torch.manual_seed(_noise_seed(run.seed, done, slot))
        with _autocast(run, work.group):
            loss = work.network(chunk[:, :-1], chunk[:, 1:]) / slots.slots
        slots.add(slot, [*torch.autograd.grad(loss, parameters), loss.detach()])
    *gradients, total = slots.finish()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return total


def _to_device(rows: Any, group: Group) -> Tensor:
    tensor = torch.from_numpy(rows)
    if group.device.type == "cuda":
        return tensor.pin_memory().to(group.device, non_blocking=True)
    return tensor


def _evaluate(work: _Work) -> None:
    """Losses on the fixed sets, and probes; written at once so that a checkpoint never precedes them."""
    progress = work.state.progress
    train_loss = _mean_loss(work, work.train_batches)
    val_loss = _mean_loss(work, work.val_batches)
    progress.evaluations.append((progress.step, train_loss, val_loss))
    for record in work.probes.of_evaluation(progress.step):
        work.log.add(record)
    work.log.add(
        EvalRecord(
            run=work.name,
            attempt=work.attempt,
            step=progress.step,
            tokens_seen=progress.tokens_seen,
            train_loss=train_loss,
            val_loss=val_loss,
            time=time.time(),
        )
    )
    work.log.commit()


@torch.no_grad()
def _mean_loss(work: _Work, batches: Batches) -> float:
    run, group, forward = work.run, work.group, work.forward
    forward.eval()
    chunks = work.share // work.micro
    # One place for each forward pass on any rank, so that the order of the sum is that of the sequences.
    shape = (run.evaluation.batches, group.world_size * chunks)
    losses = torch.zeros(shape, dtype=torch.float64, device=group.device)
    for index in range(run.evaluation.batches):
        rows = batches.batch(EVALUATION_KEY, index, run.schedule.batch_size, group.rank, group.world_size)
        for k, chunk in enumerate(torch.split(_to_device(rows, group), work.micro)):
            with _autocast(run, group):
                losses[index, group.rank * chunks + k] = forward(chunk[:, :-1], chunk[:, 1:])
    forward.train()
    return float(group.sum_(losses).mean())


def _save(work: _Work) -> None:
    work.log.commit()  # what the checkpoint has seen is on disk before the checkpoint is
    work.saver.save(work.state)


def _val_losses(work: _Work) -> list[tuple[int, float]]:
    return [(step, val) for step, _, val in work.state.progress.evaluations]


def _cut_short(work: _Work) -> Fired | None:
    """The rule for which the run is to end now: a non-finite validation loss, or a spike where asked."""
    run = work.run
    ending = {EARLY_TERMINATION, HARD_SPIKE} if run.stability.stop else {EARLY_TERMINATION}
    verdict = judge(_val_losses(work), run.schedule.steps, run.stability)
    return next((rule for rule in verdict.rules if rule.rule in ending), None)


def _finish(work: _Work, nonfinite_at: int | None, cut: Fired | None) -> Summary:
    run, progress = work.run, work.state.progress
    evaluations = progress.evaluations
    verdict = judge(_val_losses(work), run.schedule.steps, run.stability, nonfinite_at=nonfinite_at)
    if nonfinite_at is not None:
        status, reason = records.DIVERGED, f"loss or gradient not finite at step {nonfinite_at}"
    elif cut is not None:
        what = "spiked" if cut.rule == HARD_SPIKE else "not finite"
        status, reason = records.DIVERGED, f"validation loss {what} at step {cut.step}"
    else:
        status, reason = records.COMPLETED, ""
    _, final_train, final_val = evaluations[-1] if evaluations[-1][0] == progress.step else (0, None, None)
    finite = [(val, step) for step, _, val in evaluations if math.isfinite(val)]
    best_loss, best_step = min(finite) if finite else (None, None)
    summary = Summary(
        run_id=work.name,
        arm=run.arm,
        seed=run.seed,
        status=status,
        reason=reason,
        steps=progress.step,
        horizon=run.schedule.steps,
        tokens_seen=progress.tokens_seen,
        final_val_loss=final_val,
        final_train_loss=final_train,
        best_val_loss=best_loss,
        best_step=best_step,
        verdict=verdict.to_dict(),
        attempts=work.attempt,
        started=work.started,
        finished=time.time(),
        train_seconds=progress.train_seconds,
        rows={},
    )
    if work.group.is_main:
        records.write_json(work.run_dir / records.SUMMARY, asdict(summary))
    return summary


# --- the command ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """`python -m trainers.train run.yaml`; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m trainers.train", description="Train one run.")
    parser.add_argument("config", type=Path, help="run.yaml: keys of RunConfig")
    parser.add_argument(
        "--out", type=Path, default=Path("runs"), help="folder that gets <run_id>/ (default: runs)"
    )
    parser.add_argument("--run-dir", type=Path, help="the run's own folder, instead of --out")
    parser.add_argument(
        "--attempt", type=int, help="number of this try (default: one more than the folder has)"
    )
    parser.add_argument("--lifeline", action="store_true", help="save and stop when standard input closes")
    parser.add_argument("--quiet", action="store_true", help="print no progress")
    arguments = parser.parse_args(argv)
    faulthandler.register(signal.SIGUSR1, file=2)  # whoever finds this process silent may ask where it is
    from trainers.yamlfile import load_run

    try:
        run = load_run(arguments.config)
        if run.data.digest is None:
            run = run.model_copy(
                update={"data": run.data.model_copy(update={"digest": corpus.identify(run.data)})}
            )
        run_dir = _usable(arguments.run_dir or arguments.out / run_id(run))
        if arguments.attempt is not None and not 1 <= arguments.attempt <= 999_999:
            raise InputError(f"--attempt {arguments.attempt}: attempts are numbered from 1")
        done = run_dir / records.SUMMARY
        if done.is_file():
            print(f"{run_dir} is complete already")
            return 0
        with _stop_requests(arguments.lifeline) as stop:
            show = None if arguments.quiet else _progress_lines(run)
            summary = train(run, run_dir, attempt=arguments.attempt, on_record=show, should_stop=stop.is_set)
    except DeviceError as error:
        print(error, file=sys.stderr)
        return EXIT_NO_DEVICE
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except SaveError as error:
        print(error, file=sys.stderr)
        return 1
    if summary is None:
        print(f"stopped; the same command goes on from {run_dir}", file=sys.stderr)
        return EXIT_STOPPED
    if not arguments.quiet and os.environ.get("RANK", "0") == "0":
        loss = summary.final_val_loss
        result = f"validation loss {loss:.4f}" if loss is not None else summary.reason
        print(f"{summary.status}: {result}; records in {run_dir}")
    return 0


def _usable(run_dir: Path) -> Path:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{run_dir}: {error.strerror}; choose a folder that can be written") from None
    return run_dir


@contextlib.contextmanager
def _stop_requests(lifeline: bool) -> Iterator[threading.Event]:
    """An event that SIGTERM, SIGINT and, with `lifeline`, the end of standard input set."""
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    if lifeline:
        _wake_when_orphaned()
        threading.Thread(target=_watch_stdin, args=(stop,), daemon=True).start()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


ORPHAN_GRACE_S = 120.0
"""How long a run whose launcher is gone may take to save itself."""


PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def _wake_when_orphaned() -> None:
    """A process that its launcher has paused (SIGSTOP) goes on when the launcher dies, to save itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGCONT))


def _watch_stdin(stop: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    stop.set()
    time.sleep(ORPHAN_GRACE_S)
    os._exit(EXIT_STOPPED)


def _progress_lines(run: RunConfig) -> Callable[[Record], None]:
    """A listener that prints evaluations, and a step every few seconds."""
    last = 0.0

    def show(record: Record) -> None:
        nonlocal last
        if isinstance(record, EvalRecord):
            print(
                f"step {record.step:>6}/{run.schedule.steps}  train {record.train_loss:.4f}  "
                f"val {record.val_loss:.4f}",
                flush=True,
            )
        elif isinstance(record, StepRecord) and time.monotonic() - last > 5:
            last = time.monotonic()
            print(
                f"step {record.step:>6}/{run.schedule.steps}  loss {record.loss:.4f}  "
                f"{record.tokens_per_s:,.0f} tokens/s",
                flush=True,
            )

    return show


if __name__ == "__main__":
    leave(main())
