"""Damaged checkpoints: every flipped bit and every truncation is seen, set aside, and survived."""

from __future__ import annotations

import errno
import json
import random
import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file

from trainers import checkpoint
from trainers.checkpoint import Progress, SaveError, Saver, TrainState, load_newest
from trainers.distributed import Group, join
from trainers.manifest import CorruptError, checkpoint_steps, verify, write_manifest
from trainers.optim import ManifoldMuon

GROUP = Group(0, 1, torch.device("cpu"))
IDENTITY = {"run_id": "a-s1-00000000", "data": "sha256:0", "code": "1"}
FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.zeros(6, 4))
        self.bias = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        self.scale = torch.nn.Parameter(torch.zeros(()))


def fresh() -> TrainState:
    model = Small()
    adamw = torch.optim.AdamW([model.bias, model.scale], fused=True)
    muon = ManifoldMuon([model.matrix], manifold="stiefel")
    return TrainState(model, {"adamw": adamw, "muon": muon}, Progress())


def trained(step: int) -> TrainState:
    """A state that no other step has, with a NaN in it."""
    state = fresh()
    generator = torch.Generator().manual_seed(step)
    for parameter in state.model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    for optimizer in state.optimizers.values():
        optimizer.step()
    state.model.scale.data.fill_(float("nan"))
    state.progress = Progress(step, 64 * step, 0.5 * step, [(0, 5.5, 5.6), (step, 4.25, float("inf"))])
    return state


def contents(state: TrainState) -> dict[str, object]:
    """Every bit of a state."""
    tensors = checkpoint._model_tensors(state.model) | checkpoint._optimizer_tensors(state)
    facts = {name: (t.dtype, t.shape, checkpoint._bits(t).tolist()) for name, t in tensors.items()}
    return {**facts, "progress": repr(state.progress)}


def save(run_dir: Path, *steps: int, keep: int = 2) -> None:
    with Saver(run_dir, GROUP, identity=IDENTITY, keep=keep) as saver:
        for step in steps:
            saver.save(trained(step))


def load(run_dir: Path) -> tuple[dict[str, object] | None, list[str]]:
    state = fresh()
    found, remarks = load_newest(run_dir, state, GROUP, identity=IDENTITY)
    return (contents(state) if found else None), remarks


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("good")
    save(run_dir, 4, 8)
    return run_dir


@pytest.fixture
def copied(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "run"))


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# --- damage on disk ------------------------------------------------------------------------------


def flips(seed: int, files: dict[str, bytes], count: int) -> Iterator[tuple[str, bytes]]:
    draw = random.Random(seed)
    for k in range(count):
        name = FILES[k % len(FILES)]
        damaged = bytearray(files[name])
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        yield name, bytes(damaged)


def truncations(seed: int, files: dict[str, bytes], count: int) -> Iterator[tuple[str, bytes]]:
    draw = random.Random(seed)
    for k in range(count):
        name = FILES[k % len(FILES)]
        # Without its last newline a manifest says the same: that is no damage.
        yield name, files[name][: draw.randrange(len(files[name].rstrip()))]


@pytest.mark.parametrize(("damage", "count"), [(flips, 300), (truncations, 100)])
def test_every_damage_is_seen_and_the_checkpoint_before_is_used(good, copied, damage, count):
    newest = copied / "checkpoints" / "00000008"
    files = {name: (newest / name).read_bytes() for name in FILES}
    expected = contents(trained(4))
    for name, damaged in damage(20_261, files, count):
        (newest / name).write_bytes(damaged)
        got, remarks = load(copied)
        aside = copied / "checkpoints" / "bad-00000008-1"
        assert got == expected, (name, remarks)
        assert names(copied) == ["00000004", "bad-00000008-1"]
        assert (aside / name).read_bytes() == damaged
        assert remarks[0].startswith("checkpoint of step 8 refused: ")
        if name != "manifest.json":  # a damaged manifest can make any file look wrong
            assert name in remarks[0]
        assert remarks[1:] == ["4 steps are lost; the run goes on from step 4"]
        aside.rename(newest)
        (newest / name).write_bytes(files[name])
    assert load(copied) == (contents(trained(8)), [])


def test_with_all_checkpoints_damaged_the_run_begins_again(copied):
    for folder in (copied / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    got, remarks = load(copied)
    assert got is None
    assert remarks[-1] == "8 steps are lost; the run goes on from step 0"
    assert names(copied) == ["bad-00000004-1", "bad-00000008-1"]
    save(copied, 8)
    (copied / "checkpoints" / "00000008" / "model.safetensors").unlink()
    load(copied)
    assert names(copied) == ["bad-00000004-1", "bad-00000008-1", "bad-00000008-2"]


@pytest.mark.parametrize("key", ["run_id", "data"])
def test_a_checkpoint_of_another_run_or_step_is_refused(copied, key):
    state = fresh()
    _, remarks = load_newest(copied, state, GROUP, identity={**IDENTITY, key: "other"})
    assert f"{key} is {IDENTITY[key]!r}, this run's is 'other'" in remarks[0]
    root = copied / "checkpoints"
    (root / "bad-00000008-1").rename(root / "00000012")
    assert "its manifest is that of step 8" in load(copied)[1][0]


def test_a_disk_that_cannot_read_is_damage(copied):
    newest = copied / "checkpoints" / "00000008"
    (newest / "model.safetensors").unlink()
    (newest / "model.safetensors").symlink_to("/proc/self/mem")  # of 0 bytes; reading it is an EIO
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["bytes"] = 0
    (newest / "manifest.json").write_text(json.dumps(manifest))
    got, remarks = load(copied)
    assert got == contents(trained(4))
    assert "model.safetensors: the disk cannot read it back" in remarks[0]


def test_files_of_another_model_are_refused(copied):
    state = fresh()
    state.model.matrix = torch.nn.Parameter(torch.zeros(4, 6))
    found, remarks = load_newest(copied, state, GROUP, identity=IDENTITY)
    assert not found
    assert "model.safetensors: its parameters are not this model's" in remarks[0]


def test_loaded_state_does_not_rest_on_the_files(copied):
    state = fresh()
    load_newest(copied, state, GROUP, identity=IDENTITY)
    for path in (copied / "checkpoints").rglob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert contents(state) == contents(trained(8))


def test_only_names_of_checkpoints_are_checkpoints():
    found = ["00000004", "000000008", "4", "bad-00000004-1", ".saving-00000012", "100000000", "٠٠٠٠٠٠٠٤"]
    assert checkpoint_steps(found) == [100_000_000, 4]


# --- ranks ---------------------------------------------------------------------------------------


def load_on_every_rank(folders: list[Path], out: Path) -> None:
    with join("cpu") as group:
        state = fresh()
        found, remarks = load_newest(folders[group.rank], state, group, identity=IDENTITY)
        (out / f"{group.rank}").write_text(repr((found, sorted(contents(state).items()), remarks)))


def test_all_ranks_go_on_from_what_rank_0_has_read(copied, tmp_path):
    """Another node's folder may be older, damaged or missing: it plays no part."""
    older = Path(shutil.copytree(copied, tmp_path / "older"))
    shutil.rmtree(older / "checkpoints" / "00000008")
    damaged = Path(shutil.copytree(copied, tmp_path / "damaged"))
    (damaged / "checkpoints" / "00000008" / "model.safetensors").write_bytes(b"")
    (copied / "checkpoints" / "00000008" / "state.json").write_bytes(b"")
    (tmp_path / "out").mkdir()
    folders, log = [copied, older, damaged, tmp_path / "none"], tmp_path / "log"
    ranks.finish(ranks.start(4, load_on_every_rank, folders, tmp_path / "out", log=log), log)
    said = {(tmp_path / "out" / f"{rank}").read_text() for rank in range(4)}
    assert len(said) == 1
    assert repr(sorted(contents(trained(4)).items())) in said.pop()
    assert names(damaged) == ["00000004", "00000008"]


# --- writing -------------------------------------------------------------------------------------


def test_what_is_saved_is_the_state_of_the_call_and_training_goes_on(tmp_path, monkeypatch):
    """The disk hangs; meanwhile weights, optimizer and progress change in place."""
    answer = threading.Event()
    write = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *a: (answer.wait(30), write(*a)))
    state = trained(4)
    expected = contents(state)
    with Saver(tmp_path, GROUP, identity=IDENTITY, keep=2) as saver:
        saver.save(state)  # returns
        for tensor in (
            *state.model.parameters(),
            *state.optimizers["adamw"].state[state.model.bias].values(),
        ):
            tensor.data.zero_()
        state.progress.evaluations.append((5, 0.0, 0.0))
        # The next one waits: there is never a second copy.
        second = threading.Thread(target=saver.save, args=(trained(8),))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        answer.set()
        second.join()
    assert names(tmp_path) == ["00000004", "00000008"]
    shutil.rmtree(tmp_path / "checkpoints" / "00000008")
    assert load(tmp_path) == (expected, [])


def test_the_last_checkpoints_are_kept(tmp_path):
    (tmp_path / "checkpoints" / ".saving-00000001").mkdir(parents=True)  # left by a process that was killed
    save(tmp_path, 1, 2, 3, 10, 200, keep=3)
    assert names(tmp_path) == ["00000003", "00000010", "00000200"]
    save(tmp_path, 200, keep=1)  # again
    assert names(tmp_path) == ["00000200"]
    assert load(tmp_path)[0] == contents(trained(200))


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("free", [0, 300, 600])
def test_a_full_disk_is_one_line_that_names_the_path(copied, free):
    saver = Saver(copied, GROUP, identity=IDENTITY, keep=2)
    with full_disk(free):
        saver.save(trained(12))
        with pytest.raises(SaveError) as caught:
            saver.wait()
    message = str(caught.value)
    assert message.startswith(f"{copied / 'checkpoints' / '00000012'}: the checkpoint could not be written (")
    assert "File too large" in message
    assert "\n" not in message
    assert caught.value.__cause__ is not None
    assert names(copied) == ["00000004", "00000008"]
    with saver:  # said once; and there is room again
        saver.save(trained(12))
    assert load(copied) == (contents(trained(12)), [])


def test_the_next_call_tells_of_a_failed_write(copied):
    saver = Saver(copied, GROUP, identity=IDENTITY, keep=2)
    with full_disk(0):
        saver.save(trained(12))
        saver._writing.exception()
    with pytest.raises(SaveError, match="00000012"):
        saver.save(trained(16))
    assert names(copied) == ["00000004", "00000008"]


def test_an_error_in_training_is_told_before_one_in_writing(copied):
    def train() -> None:
        with Saver(copied, GROUP, identity=IDENTITY, keep=2) as saver:
            saver.save(trained(12))
            raise ZeroDivisionError

    with full_disk(0), pytest.raises(ZeroDivisionError):
        train()
    assert names(copied) == ["00000004", "00000008"]


def test_files_that_differ_from_memory_are_no_checkpoint(copied, monkeypatch):
    """A fault in writing, before the digests are taken: they would bless it."""
    write = checkpoint.save_file

    def faulty(tensors: dict[str, torch.Tensor], path: Path) -> None:
        write(tensors, path)
        with path.open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))

    monkeypatch.setattr(checkpoint, "save_file", faulty)
    with pytest.raises(SaveError, match=r"model\.safetensors: \w+ is not what was written"):
        save(copied, 12)
    assert names(copied) == ["00000004", "00000008"]


def test_other_ranks_write_nothing(tmp_path):
    with Saver(tmp_path, Group(1, 2, GROUP.device), identity=IDENTITY, keep=2) as saver:
        saver.save(trained(4))
    assert not list(tmp_path.iterdir())


def test_the_format_is_that_of_the_first_version(tmp_path):
    """Written here by hand: what is on people's disks stays loadable."""
    state = trained(4)
    folder = tmp_path / "checkpoints" / "00000004"
    folder.mkdir(parents=True)
    checkpoint.save_file(dict(state.model.named_parameters()), folder / "model.safetensors")
    adamw, muon = (optimizer.state for optimizer in state.optimizers.values())
    optimizer = {
        f"adamw/{name}/{key}": value
        for name in ("bias", "scale")
        for key, value in adamw[getattr(state.model, name)].items()
    }
    optimizer["muon/matrix/momentum_buffer"] = muon[state.model.matrix]["momentum_buffer"]
    checkpoint.save_file(optimizer, folder / "optimizer.safetensors")
    progress = {"step": 4, "tokens_seen": 256, "train_seconds": 2.0}
    progress |= {"evaluations": [[0, 5.5, 5.6], [4, 4.25, "Infinity"]]}
    facts = {"version": 1, "world_size": 1, "identity": IDENTITY, "progress": progress}
    (folder / "state.json").write_text(json.dumps(facts))
    write_manifest(folder, step=4)
    assert load(tmp_path) == (contents(state), [])
    save(tmp_path, 4)  # and is what is written today
    assert load_file(folder / "optimizer.safetensors").keys() == optimizer.keys()
    assert json.loads((folder / "state.json").read_text()) == facts


def test_a_checkpoint_that_may_not_be_read_is_no_damage(copied, monkeypatch):
    """A wrong owner says nothing about the bytes: nothing is set aside."""

    def forbidden(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("trainers.manifest.sha256", forbidden)
    with pytest.raises(PermissionError):
        load(copied)
    assert names(copied) == ["00000004", "00000008"]


def test_verify_names_the_first_bad_file(copied):
    newest = copied / "checkpoints" / "00000008"
    (newest / "optimizer.safetensors").unlink()
    with pytest.raises(CorruptError, match=r"optimizer\.safetensors: missing"):
        verify(newest)
