"""The training loop, in real processes: workers that share a run, runs that are killed and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trainers import corpus, records
from trainers.config import RunConfig, run_id
from trainers.distributed import Group
from trainers.manifest import CorruptError, verify
from trainers.records import PartReader, latest, read_part
from trainers.shards import write_shard
from trainers.train import EXIT_STOPPED, _batch_shape, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A corpus with structure to learn: a random walk over 64 symbols."""
    folder = tmp_path_factory.mktemp("shards")
    walk = np.cumsum(np.random.default_rng(0).integers(-2, 3, 60_000)) % 64
    write_shard(folder / "train.bin", walk[:50_000].astype(np.uint16))
    write_shard(folder / "val.bin", walk[50_000:].astype(np.uint16))
    return folder


def config(shards: Path, **fields: object) -> RunConfig:
    data = {
        "arm": "hetero",
        "model": {"n_layer": 2, "n_head": 2, "d_model": 16, "context": 16, "vocab_size": 256},
        "data": {"source": "bin", "path": str(shards)},
        "optimizer": {"muon": {"lr": 0.1, "solver": "projected"}},
        "assignment": {"attn": "stiefel", "mlp": "dgram"},
        "schedule": {"steps": 12, "warmup_steps": 2, "batch_size": 12},
        "evaluation": {"every": 5, "batches": 2},
        "runtime": {"checkpoint_every": 4},
    }
    for path, value in fields.items():
        *parents, last = path.split(".")
        inner = data
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[last] = value
    run = RunConfig.model_validate(data)
    digest = corpus.identify(run.data)
    return run.model_copy(update={"data": run.data.model_copy(update={"digest": digest})})


def rows(run_dir: Path, kind: str) -> list[records.Record]:
    parts = sorted(run_dir.glob(f"attempt-*/{kind}-*.jsonl"))
    kept, conflicts = latest(record for part in parts for record in read_part(part))
    assert conflicts == []
    return kept


def losses(run_dir: Path) -> list[float]:
    return [row.loss for row in rows(run_dir, "steps")]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = max((run_dir / "checkpoints").iterdir())
    return {**load_file(newest / "model.safetensors"), **load_file(newest / "optimizer.safetensors")}


def start(run: RunConfig, run_dir: Path, *options: str, workers: int = 1) -> list[subprocess.Popen[str]]:
    """One process per rank, as torchrun starts them."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "run.yaml").write_text(run.model_dump_json())
    port = 20_000 + os.getpid() % 10_000 + len(list(run_dir.parent.iterdir()))
    command = [sys.executable, "-m", "trainers.train", str(run_dir / "run.yaml"), "--run-dir", str(run_dir)]
    return [
        subprocess.Popen(
            [*command, *options],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(workers)
    ]


def finish(processes: list[subprocess.Popen[str]], code: int = 0) -> str:
    output = "".join(process.communicate(timeout=120)[0] for process in processes)
    assert [process.returncode for process in processes] == [code] * len(processes), output
    return output


def wait_for_step(run_dir: Path, step: int, attempt: int = 1) -> None:
    reader = PartReader(run_dir, attempt)
    deadline = time.monotonic() + 60
    while not any(row.step >= step for row in reader.poll() if row.kind == "steps"):
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


# --- one process ---------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_every_record(shards, tmp_path):
    run = config(shards)
    heard = []
    summary = train(run, tmp_path, on_record=heard.append)
    assert summary.status == records.COMPLETED
    assert [row.step for row in rows(tmp_path, "steps")] == list(range(1, 13))
    assert [row.step for row in rows(tmp_path, "evals")] == [0, 5, 10, 12]
    spectra = rows(tmp_path, "spectra")
    assert len(spectra) == 4 * 8  # 4 evaluations, 2 layers of 4 matrices
    updates = rows(tmp_path, "updates")
    assert sorted({row.step for row in updates}) == [5, 10, 12]
    assert len(updates) == 3 * 8
    assert len(rows(tmp_path, "heads")) == 4 * 2 * 11  # 3 parts, whole and of 2 heads, and 2 products
    assert len(rows(tmp_path, "attention")) == 4 * 2 * 2
    assert [row.step for row in rows(tmp_path, "flow")] == [10] * 8 + [12] * 8
    assert [row.step for row in rows(tmp_path, "costs")] == [10, 12]
    assert len(heard) == 12 + 4 + 32 + 24 + 88 + 16 + 16 + 2
    for row in updates:
        assert row.distance < 1e-3
        assert row.direction_norm == pytest.approx(1, abs=0.02)
        assert 0 < row.residual < 0.3
        assert 0 < row.update_ratio < 1
    evals = rows(tmp_path, "evals")
    assert evals[-1].val_loss < evals[0].val_loss - 0.05
    assert evals[0].val_loss == pytest.approx(np.log(256), abs=0.3)
    for row in spectra:
        if row.module == "attn":
            assert row.sigma_max == pytest.approx(1, abs=1e-3)
            assert row.sigma_min == pytest.approx(1, abs=1e-3)
        else:
            assert row.gram_off_norm < 1e-3 * row.gram_norm
        assert row.sigma == sorted(row.sigma, reverse=True)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["final_val_loss"] == evals[-1].val_loss
    assert written["verdict"]["unstable"] is False
    provenance = json.loads((tmp_path / "config.json").read_text())["provenance"]
    assert provenance["tokens"] == run.data.digest
    assert provenance["packages"]["torch"] == torch.__version__


@pytest.mark.parametrize(("qkv", "blocks"), [("split", 3), ("per_head", 6)])
def test_queries_keys_and_values_can_be_matrices_of_their_own(shards, tmp_path, qkv, blocks):
    fields = {"optimizer.muon.qkv": qkv, "probes.updates_every": 6, "schedule.steps": 6}
    train(config(shards, **fields), tmp_path)
    matrices = [row.matrix for row in rows(tmp_path, "updates") if row.matrix.startswith("h.1.attn.c_attn")]
    assert matrices == [f"h.1.attn.c_attn.{k}" for k in range(blocks)]
    W = weights(tmp_path)["h.1.attn.c_attn.weight"]
    for part in W.view(blocks, -1, 16):
        assert torch.allclose(part @ part.mT, torch.eye(len(part)), atol=1e-3)


OFF = {f"probes.{probe}": False for probe in ("spectra", "updates", "heads", "attention", "flow", "costs")}
EVERY_STEP = {f"probes.{probe}_every": 1 for probe in ("updates", "attention", "flow", "costs")}


def test_evaluation_and_probes_never_change_training(shards, tmp_path):
    base = {"model.dropout": 0.1}
    train(config(shards, **base), tmp_path / "a")
    train(config(shards, **base, **OFF, **{"evaluation.every": 1, "evaluation.batches": 5}), tmp_path / "b")
    train(config(shards, **base, **EVERY_STEP), tmp_path / "c")
    for other in ("b", "c"):
        assert losses(tmp_path / "a") == losses(tmp_path / other)
        kept, others = weights(tmp_path / "a"), weights(tmp_path / other)
        assert all(torch.equal(kept[name], others[name]) for name in kept)
    assert {p.name.split("-")[0] for p in (tmp_path / "b").glob("attempt-*/*.jsonl")} == {"steps", "evals"}


def test_probes_see_every_step_that_they_are_asked_to(shards, tmp_path):
    train(config(shards, **EVERY_STEP), tmp_path)
    every = list(range(1, 13))
    for kind in ("updates", "flow", "costs"):
        assert sorted({row.step for row in rows(tmp_path, kind)}) == every
    assert sorted({row.step for row in rows(tmp_path, "attention")}) == [0, *every]
    for flow, update in zip(rows(tmp_path, "flow"), rows(tmp_path, "updates"), strict=True):
        assert (flow.step, flow.matrix) == (update.step, update.matrix)
        assert flow.update_ratio == pytest.approx(update.update_ratio, rel=1e-4)
        assert flow.clipped_grad_norm <= flow.grad_norm
    norms = {row.step: row.grad_norm for row in rows(tmp_path, "steps")}
    for step in every:  # the norm of all gradients is no smaller than that of the matrices
        matrices = [row.grad_norm for row in rows(tmp_path, "flow") if row.step == step]
        assert np.linalg.norm(matrices) <= norms[step] * (1 + 1e-5)
    for cost in rows(tmp_path, "costs"):
        parts = [cost.forward_backward_ms, cost.solver_ms, cost.retraction_ms]
        assert min(parts) > 0
        assert sum(parts) < cost.step_ms
        assert cost.communication_ms == 0
        assert np.isnan(cost.flop_utilisation)  # nobody knows the peak of this CPU
        assert cost.peak_memory > 2**26


@pytest.mark.parametrize("fetch_every", [3, 100])
def test_losses_may_be_read_later(shards, tmp_path, fetch_every):
    train(config(shards), tmp_path / "a")
    train(config(shards, **{"runtime.fetch_every": fetch_every}), tmp_path / "b")
    for name in ("loss", "grad_norm", "lr", "muon_lr", "step", "tokens_seen"):
        first, second = ([getattr(row, name) for row in rows(tmp_path / x, "steps")] for x in "ab")
        assert first == second
    assert rows(tmp_path / "a", "spectra") == rows(tmp_path / "b", "spectra")


def test_activation_checkpointing_changes_no_bit(shards, tmp_path):
    train(config(shards, **{"model.dropout": 0.1}), tmp_path / "a")
    again = {"model.dropout": 0.1, "runtime.activation_checkpointing": True}
    train(config(shards, **again), tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert all(torch.equal(weights(tmp_path / "a")[k], v) for k, v in weights(tmp_path / "b").items())


NINE = {
    "baseline": ("adamw", "none", "adamw", "none"),
    "muon_attention": ("muon", "none", "adamw", "none"),
    "stiefel_all": ("adamw", "stiefel", "adamw", "stiefel"),
    "stiefel_ffn": ("adamw", "none", "adamw", "stiefel"),
    "spectral_all": ("adamw", "spectral", "adamw", "spectral"),
    "manifold_muon": ("muon", "stiefel", "muon", "stiefel"),
}


@pytest.mark.parametrize("arm", NINE)
def test_each_module_has_its_own_optimizer_and_manifold(shards, tmp_path, arm):
    optimizers = dict(zip(("attn", "mlp"), NINE[arm][0::2], strict=True))
    manifolds = dict(zip(("attn", "mlp"), NINE[arm][1::2], strict=True))
    run = config(
        shards,
        assignment={k: {"optimizer": optimizers[k], "manifold": manifolds[k]} for k in optimizers},
        model={"family": "llama", "n_layer": 1, "n_head": 2, "d_model": 16, "context": 16, "vocab_size": 256},
        **{"optimizer.muon": {"lr": 0.02, "solver": "plain", "msign": "newton_schulz"}},
    )
    assert train(run, tmp_path).status == records.COMPLETED
    assert {row.module for row in rows(tmp_path, "updates")} == {
        k for k in optimizers if optimizers[k] == "muon"
    }
    for row in rows(tmp_path, "spectra"):
        if manifolds[row.module] == "stiefel":
            assert (row.sigma_min, row.sigma_max) == pytest.approx((1, 1), abs=1e-4)
        elif manifolds[row.module] == "spectral":
            assert row.sigma_max == pytest.approx(1, abs=1e-4)
            assert row.sigma_min < 0.9
        else:
            assert row.sigma_max < 0.9


def test_arms_of_one_seed_see_the_same_batches(shards, tmp_path):
    """Before the first update only the weights differ, and adamw arms share even those."""
    adamw = {"attn": {"optimizer": "adamw"}, "mlp": {"optimizer": "adamw"}}
    train(config(shards, assignment=adamw, arm="adamw"), tmp_path / "a")
    train(config(shards, assignment={"attn": "none", "mlp": "none"}, arm="none"), tmp_path / "b")
    assert losses(tmp_path / "a")[0] == losses(tmp_path / "b")[0]
    assert losses(tmp_path / "a")[3] != losses(tmp_path / "b")[3]


@pytest.mark.parametrize("assignment", ["hetero", "adamw"])
def test_accumulation_gives_the_same_losses(shards, tmp_path, assignment):
    modules = (
        {"attn": {"optimizer": "adamw"}, "mlp": {"optimizer": "adamw"}} if assignment == "adamw" else None
    )
    extra = {"assignment": modules} if modules else {}
    train(config(shards, **extra), tmp_path / "whole")
    train(config(shards, **extra, **{"runtime.micro_batch": 3}), tmp_path / "parts")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), abs=2e-5)


def test_bfloat16_autocast_trains_as_float32_does(shards, tmp_path):
    full = train(config(shards), tmp_path / "full")
    half = train(config(shards, precision="bfloat16"), tmp_path / "half")
    assert half.final_val_loss == pytest.approx(full.final_val_loss, abs=0.05)
    assert losses(tmp_path / "half") != losses(tmp_path / "full")
    for row in rows(tmp_path / "half", "spectra"):  # retractions stay in float32
        if row.module == "attn":
            assert row.sigma_max == pytest.approx(1, abs=1e-4)


def test_dropout_runs_resume_with_their_own_noise(shards, tmp_path):
    run = config(shards, **{"model.dropout": 0.2})
    train(run, tmp_path / "whole")
    stop_at = 5
    seen = []
    train(run, tmp_path / "cut", on_record=seen.append, should_stop=lambda: _steps(seen) >= stop_at)
    train(run, tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_manifolds_under_adamw_resume_bit_for_bit(shards, tmp_path):
    modules = {
        kind: {"optimizer": "adamw", "manifold": m} for kind, m in (("attn", "stiefel"), ("mlp", "dgram"))
    }
    run = config(shards, assignment=modules)
    train(run, tmp_path / "whole")
    seen = []
    train(run, tmp_path / "cut", on_record=seen.append, should_stop=lambda: _steps(seen) >= 5)
    train(run, tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def _steps(seen: list[records.Record]) -> int:
    return sum(record.kind == "steps" for record in seen)


@pytest.mark.parametrize("fetch_every", [1, 12])
def test_a_diverging_run_ends_as_a_result(shards, tmp_path, fetch_every):
    run = config(shards, arm="wild", assignment={"attn": "none", "mlp": "none"})
    run = run.model_copy(
        update={
            "optimizer": run.optimizer.model_copy(
                update={"adamw": run.optimizer.adamw.model_copy(update={"lr": 1e30})}
            ),
            "runtime": run.runtime.model_copy(update={"fetch_every": fetch_every}),
        }
    )
    summary = train(run, tmp_path)
    assert summary.status == records.DIVERGED
    assert "not finite" in summary.reason
    assert summary.steps < 12
    assert summary.verdict["rules"][-1]["rule"] == "early_termination"
    last = rows(tmp_path, "steps")[-1]
    assert last.step == summary.steps
    assert not np.isfinite([last.loss, last.grad_norm]).all()


def test_a_spike_ends_the_run_only_where_asked(shards, tmp_path):
    """A threshold below what this corpus allows makes the first late evaluation a spike."""
    rules = {"style": "paper", "spike_loss": 0.5, "stop": True}
    stopped = train(config(shards, stability=rules), tmp_path / "a")
    assert (stopped.status, stopped.steps) == (records.DIVERGED, 5)
    assert stopped.reason == "validation loss spiked at step 5"
    went_on = train(config(shards, stability={**rules, "stop": False}), tmp_path / "b")
    assert (went_on.status, went_on.steps) == (records.COMPLETED, 12)
    assert went_on.verdict["rules"][0]["rule"] == "hard_spike"


# --- several processes ---------------------------------------------------------------------------


def test_two_workers_give_the_losses_of_one_with_twice_the_accumulation(shards, tmp_path):
    one = config(shards, **{"runtime.micro_batch": 3})
    finish(start(one, tmp_path / "one", "--quiet"))
    finish(start(one, tmp_path / "two", "--quiet", workers=2))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    assert rows(tmp_path / "two", "evals")[-1].val_loss == pytest.approx(
        rows(tmp_path / "one", "evals")[-1].val_loss, abs=2e-5
    )


def test_in_slots_no_bit_depends_on_the_number_of_workers(shards, tmp_path):
    run = config(shards, **{"runtime.slots": 6, "model.dropout": 0.1})
    for workers in (1, 2, 3):
        finish(start(run, tmp_path / str(workers), "--quiet", workers=workers))
    one = tmp_path / "1"
    for other in (tmp_path / "2", tmp_path / "3"):
        assert all(torch.equal(weights(one)[name], value) for name, value in weights(other).items())
        assert rows(other, "evals")[-1].val_loss == rows(one, "evals")[-1].val_loss
        assert rows(other, "spectra") == rows(one, "spectra")
        for name in ("loss", "grad_norm"):
            mine, theirs = ([getattr(row, name) for row in rows(x, "steps")] for x in (one, other))
            assert mine == theirs
    # Slots are only another order of the same sum.
    plain = config(shards, **{"runtime.micro_batch": 2})
    train(plain, tmp_path / "plain")
    train(config(shards, **{"runtime.slots": 6}), tmp_path / "slots")
    assert losses(tmp_path / "slots") == pytest.approx(losses(tmp_path / "plain"), abs=2e-5)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_killed_run_goes_on_as_if_it_had_not_stopped(shards, tmp_path, workers):
    run = config(shards, **{"schedule.steps": 30, "model.d_model": 32})
    finish(start(run, tmp_path / "whole", "--quiet", workers=workers))
    killed = start(run, tmp_path / "cut", "--quiet", workers=workers)
    wait_for_step(tmp_path / "cut", 14)
    killed[-1].send_signal(signal.SIGKILL)  # the last rank; the others lose their peer
    for process in killed:
        process.kill()
        process.communicate()
    finish(start(run, tmp_path / "cut", "--quiet", workers=workers))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert rows(tmp_path / "cut", "steps")[-1].attempt == 2
    assert [r.step for r in rows(tmp_path / "cut", "evals")] == [0, 5, 10, 15, 20, 25, 30]
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_sigterm_saves_at_once_and_loses_nothing(shards, tmp_path):
    run = config(shards, **{"schedule.steps": 400, "runtime.checkpoint_every": 1000})
    running = start(run, tmp_path, workers=2)
    wait_for_step(tmp_path, 20)
    running[1].terminate()  # one rank is told; all stop at the same step
    output = finish(running, EXIT_STOPPED)
    assert "stopped; the same command goes on" in output
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
    assert saved == [rows(tmp_path, "steps")[-1].step]


def test_the_end_of_the_lifeline_stops_a_run(shards, tmp_path):
    run = config(shards, **{"schedule.steps": 4000})
    [process] = start(run, tmp_path, "--lifeline", "--quiet")
    wait_for_step(tmp_path, 3)
    finish([process], EXIT_STOPPED)  # communicate() closes its standard input


def test_torchrun_starts_it(shards, tmp_path):
    run = config(shards, **{"schedule.steps": 3, "evaluation.every": 3})
    (tmp_path / "run.yaml").write_text(run.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["-m", "trainers.train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "runs")]
    done = subprocess.run(command + arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "completed: validation loss" in done.stdout
    assert done.stdout.count("completed") == 1
    assert (tmp_path / "runs" / run_id(run) / "summary.json").is_file()


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(shards, tmp_path, capsys):
    run = config(shards)
    train(run, tmp_path / "whole")
    train(run, tmp_path / "cut", should_stop=_after(8))
    newest = tmp_path / "cut" / "checkpoints" / "00000008"
    assert newest.is_dir()
    raw = bytearray((newest / "model.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 1
    (newest / "model.safetensors").write_bytes(raw)
    train(run, tmp_path / "cut")
    assert "checkpoint of step 8 refused" in capsys.readouterr().err
    assert (tmp_path / "cut" / "checkpoints" / "bad-00000008-1").is_dir()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def _after(steps: int):
    calls = iter(range(10_000))
    return lambda: next(calls) >= steps - 1


def test_a_checkpoint_of_another_run_is_refused(shards, tmp_path, capsys):
    train(config(shards), tmp_path, should_stop=_after(4))
    (tmp_path / "attempt-001").rename(tmp_path / "old")
    train(config(shards, seed=2), tmp_path)
    assert "run_id is 'hetero-s1337" in capsys.readouterr().err
    assert [row.step for row in rows(tmp_path, "steps")] == list(range(1, 13))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest"])
def test_every_damage_to_a_checkpoint_is_seen(shards, tmp_path, damage):
    train(config(shards, **{"schedule.steps": 3}), tmp_path)
    folder = tmp_path / "checkpoints" / "00000003"
    verify(folder)
    for name in ("manifest.json",) if damage == "no manifest" else sorted(verify(folder)["files"]):
        path = folder / name
        raw = path.read_bytes()
        if damage in ("remove", "no manifest"):
            path.unlink()
        else:
            path.write_bytes(raw[:-1] if damage == "truncate" else raw[:-1] + bytes([raw[-1] ^ 0x10]))
        with pytest.raises(CorruptError, match=name.split(".")[0]):
            verify(folder)
        path.write_bytes(raw)


def test_nothing_saved_is_pickled(shards, tmp_path):
    train(config(shards, **{"schedule.steps": 3}), tmp_path)
    names = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert {Path(name).suffix for name in names} <= {".json", ".jsonl", ".safetensors"}


# --- bad input -----------------------------------------------------------------------------------


def test_uneven_shares_are_refused(shards):
    with pytest.raises(Exception, match="batch_size 12 is not a multiple of the 5 workers"):
        _batch_shape(config(shards), Group(0, 5, CPU))
    with pytest.raises(Exception, match="micro_batch 5 does not divide the 6 sequences"):
        _batch_shape(config(shards, **{"runtime.micro_batch": 5}), Group(0, 2, CPU))
    with pytest.raises(Exception, match=r"runtime\.slots 5 do not divide schedule.batch_size 12"):
        _batch_shape(config(shards, **{"runtime.slots": 5}), Group(0, 2, CPU))
    with pytest.raises(Exception, match="slots: 2 cannot be divided evenly over 3 workers"):
        _batch_shape(config(shards, **{"runtime.slots": 2}), Group(0, 3, CPU))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {n_layers: 2}\n", 'run.yaml:1: model.n_layers: unknown key (did you mean "n_layer"?)'),
        ("data: {source: text, path: nothing.txt}\n", 'data.path "nothing.txt" matches no file'),
        (None, "run.yaml"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, text, message):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    command = [sys.executable, "-m", "trainers.train", "run.yaml"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
