"""Whole sweeps, as a user starts them: real Ray, real workers, real stores, and what can go wrong."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from test_notify import Room
from tiny import processes, wait_for

from mmsweep import launch as launch_module
from mmsweep.agent import Job, News
from mmsweep.cluster import Capacity
from mmsweep.grid import load_grid
from mmsweep.placement import Node
from mmsweep.progress import Board
from mmsweep.store import RunStore, StoreError, open_store
from trainers import records
from trainers.corpus import identify

BAD_GRIDS = Path(__file__).parent / "bad_grids"
STEPS = 12

TINY = f"""
name: tiny
seeds: [1, 2]
arms:
  hetero: {{attn: stiefel, mlp: dgram}}
  plain: {{attn: none, mlp: none}}
base:
  data: {{source: text, path: TEXTS}}
  model: {{n_layer: 1, n_head: 2, d_model: 16, context: 16, vocab_size: 256}}
  optimizer: {{muon: {{lr: 0.1, solver: projected}}}}
  schedule: {{steps: {STEPS}, warmup_steps: 2, batch_size: 8}}
  evaluation: {{every: 4, batches: 2}}
  runtime: {{checkpoint_every: 4}}
"""


pytestmark = pytest.mark.usefixtures("texts")


@pytest.fixture
def grid(write_grid) -> Callable[..., Path]:
    return functools.partial(write_grid, TINY)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, texts) -> tuple[RunStore, str]:
    """The store of a launch that nothing happened to, and what it printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "tiny.yaml").write_text(TINY.replace("TEXTS", texts))
    done = launch(folder / "tiny.yaml", folder / "store")
    assert done.returncode == 0, done.stdout + done.stderr
    return open_store(str(folder / "store")), done.stdout


@pytest.fixture
def room() -> Iterator[Room]:
    """A chat room whose server refuses the first message once."""
    room = Room(500)
    yield room
    room.stop()


def command(grid: Path, store: Path | str, *options: str) -> list[str]:
    return [sys.executable, "-m", "mmsweep.launch", str(grid), "--store", str(store), *options]


def launch(grid: Path, store: Path | str, *options: str) -> subprocess.CompletedProcess[str]:
    where = Path(str(grid)).parent
    return subprocess.run(
        command(grid, store, *options), capture_output=True, text=True, timeout=240, cwd=where
    )


def losses(store: RunStore, steps: int = STEPS) -> dict[str, list[float]]:
    """Losses by run; every step is there once, in order."""
    found = {}
    for run_id in store.run_ids():
        table = store.table(run_id, "steps").to_pydict()
        assert table["step"] == list(range(1, steps + 1)), run_id
        found[run_id] = table["loss"]
    return found


def table_1(folder: Path | str) -> bytes:
    """From the report that a launch leaves: in the store's folder, or where it was typed."""
    return (Path(folder) / "report" / "tables" / "t1.csv").read_bytes()


def test_a_grid_becomes_finished_runs_and_a_report(undisturbed):
    store, printed = undisturbed
    assert "tiny: 4 runs, 0 done, 4 to train" in printed
    assert "4 of 4 runs done" in printed
    assert printed.rstrip().endswith("report/index.html")
    assert len(losses(store)) == 4
    for run_id in store.run_ids():
        summary = store.summary(run_id)
        assert summary["status"] == records.COMPLETED
        looked_at = {"spectra": 4 * 4, "updates": 3 * 4, "heads": 4 * 11, "attention": 4 * 2, "flow": 2 * 4}
        assert summary["rows"] == {"steps": STEPS, "evals": 4, "costs": 2, **looked_at}
        assert store.config(run_id)["provenance"]["packages"]["torch"]
        assert store.status(run_id)["status"] == records.COMPLETED
    assert [cell["seed"] for cell in store.grid_index("tiny")["cells"]] == [1, 1, 2, 2]


def test_tune_adds_no_noise(undisturbed):
    _, printed = undisturbed
    lines = printed.splitlines()
    assert lines[0].startswith("tiny: 4 runs")
    ours = ("[", "4 of 4 runs")
    table = next(i for i, line in enumerate(lines) if line.startswith("arm "))
    assert all(line.startswith(ours) for line in lines[1:table])


def test_a_relaunch_trains_nothing_and_still_reports(undisturbed, grid):
    store, _ = undisturbed
    before = {run_id: store.summary(run_id) for run_id in store.run_ids()}
    again = launch(grid(), store.url)
    assert again.returncode == 0
    assert "all 4 runs are in" in again.stdout
    assert again.stdout.rstrip().endswith("report/index.html")
    assert {run_id: store.summary(run_id) for run_id in store.run_ids()} == before


def test_a_grown_grid_trains_the_difference(undisturbed, grid, tmp_path):
    store, _ = undisturbed
    grown = grid(**{"seeds: [1, 2]": "seeds: [1, 2, 3]"})
    planned = launch(grown, store.url, "--dry-run")
    assert planned.returncode == 0
    assert "6 runs (6 cells), 4 done" in planned.stdout
    assert "2 to train" in planned.stdout


def test_status_tells_where_every_run_stands(undisturbed):
    store, _ = undisturbed
    done = subprocess.run([sys.executable, "-m", "mmsweep.status", store.url], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count(f"completed  {STEPS}/{STEPS}") == 4
    assert "4 completed" in done.stdout


@pytest.mark.s3
def test_an_s3_store_gives_the_same_tables(undisturbed, grid, s3_url, tmp_path):
    store, _ = undisturbed
    done = launch(grid(), s3_url)
    assert done.returncode == 0, done.stdout + done.stderr
    remote = open_store(s3_url)
    assert losses(remote) == losses(store)
    assert table_1(tmp_path) == table_1(store.url)


def test_killed_and_stopped_launches_go_on_where_they_were(grid, tmp_path):
    """SIGKILL to the first driver, Ctrl-C to the second; the third finishes. Nothing is lost or doubled."""
    steps = 3000
    long = grid(
        **{
            "steps: 12": f"steps: {steps}",
            "{every: 4": "{every: 1500",
            "checkpoint_every: 4": "checkpoint_every: 100, part_seconds: 1",
            "seeds: [1, 2]": "seeds: [1]",
            "  plain: {attn: none, mlp: none}\n": "",
        }
    )
    where = tmp_path / "store"
    store = open_store(str(where))

    first = subprocess.Popen(command(long, where), stdout=subprocess.DEVNULL, cwd=tmp_path)
    wait_for(lambda: _checkpoints(where, "hetero"), "a checkpoint in the store")
    first.kill()
    first.wait()
    wait_for(lambda: not processes("mmsweep.agent") and not processes("trainers.train"), "orphans to end")
    assert _finished(store) == []

    second = subprocess.Popen(
        command(long, where), stdout=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
    )
    wait_for(lambda: any(where.glob("runs/*/attempt-002/*.jsonl")), "records of the second launch")
    os.killpg(second.pid, signal.SIGINT)  # as a terminal does it
    printed, _ = second.communicate(timeout=90)
    assert second.returncode == 1
    assert printed.startswith(f"tiny: taken over from pid {first.pid} on ")
    assert "\ntiny: stopped by Ctrl-C\n" in printed
    assert "the same command goes on from here" in printed
    assert store.launches("tiny") == []
    wait_for(lambda: not processes("mmsweep.agent") and not processes("trainers.train"), "orphans to end")
    assert {store.status(run_id)["status"] for run_id in store.run_ids()} == {records.PENDING}

    third = launch(long, where)
    assert third.returncode == 0, third.stdout + third.stderr
    assert all(store.conflicts(run_id) == [] for run_id in store.run_ids())
    assert {store.summary(run_id)["attempts"] for run_id in store.run_ids()} == {3}

    undisturbed = launch(long, tmp_path / "other")
    assert undisturbed.returncode == 0
    expected = open_store(str(tmp_path / "other"))
    assert losses(store, steps) == losses(expected, steps)
    assert table_1(where) == table_1(tmp_path / "other")


@contextlib.contextmanager
def held(store: RunStore, grid: Path) -> Iterator[None]:
    """The leases of the grid's runs: whoever launches it has to wait for them."""
    with contextlib.ExitStack() as leases:
        for run_id in load_grid(grid, identify=identify).runs:
            lease = leases.enter_context(store.run_lease(run_id, "the test"))
            wait_for(lease.advance, "a lease")
        yield


def start(grid: Path, store: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(grid, store),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=store.parent,
        start_new_session=True,
    )


def test_of_eight_launches_at_once_one_trains_and_seven_name_it(grid, tmp_path, undisturbed):
    expected, _ = undisturbed
    path = grid(**{"seeds: [1, 2]": "seeds: [1]"})
    where = tmp_path / "store"
    store = open_store(str(where))
    with held(store, path):
        launches = {one.pid: one for one in (start(path, where) for _ in range(8))}
        wait_for(lambda: sum(one.poll() is not None for one in launches.values()) == 7, "seven to leave")
        (works,) = (pid for pid, one in launches.items() if one.poll() is None)
        (owner,) = store.launches("tiny")
        assert owner.pid == works
        shown = subprocess.run(
            [sys.executable, "-m", "mmsweep.status", str(where)], capture_output=True, text=True
        )
        assert f"tiny: launched by {owner.who()}" in shown.stdout
        for pid, one in launches.items():
            if pid != works:
                printed, told = one.communicate()
                assert (one.returncode, printed) == (2, "")
                assert told.startswith(f"tiny is being launched by {owner.who()}, last heartbeat ")
                assert len(told.splitlines()) == 1
    printed, told = launches[works].communicate(timeout=120)
    assert launches[works].returncode == 0, printed + told
    assert "2 of 2 runs done" in printed
    assert told == ""
    of_seed_1 = {run_id: values for run_id, values in losses(expected).items() if "-s1-" in run_id}
    assert losses(store) == of_seed_1  # every step once
    assert {store.summary(run_id)["attempts"] for run_id in of_seed_1} == {1}
    (log,) = (where / "grids" / "tiny.launches").iterdir()
    kept = [line[20:] for line in log.read_text().splitlines()]  # without the times
    assert kept == [line for line in printed.splitlines() if line.startswith(("tiny: ", "[", "2 of 2"))]


def test_a_launch_that_was_declared_dead_or_gets_sigterm_stops_its_runs_without_noise(grid, tmp_path):
    path = grid(**{"seeds: [1, 2]": "seeds: [1]"})
    where = tmp_path / "store"
    store = open_store(str(where))
    endings = {}
    with held(store, path):
        for how in ("declared dead", "SIGTERM"):
            one = start(path, where)
            begun = [one.stdout.readline()]
            while "waits for pid" not in begun[-1]:
                begun.append(one.stdout.readline())
                assert begun[-1], one.communicate()
            (owner,) = store.launches("tiny")
            if how == "SIGTERM":
                one.terminate()
            else:  # by somebody who heard nothing for a minute
                store.objects.put(f"grids/tiny.lease/{owner.nonce}.dead", b"")
            printed, told = one.communicate(timeout=90)
            endings[how] = "".join(begun) + printed, told, one.returncode
    for how, said in (
        ("declared dead", "another launch has taken over; stopping"),
        ("SIGTERM", "by SIGTERM"),
    ):
        printed, told, code = endings[how]
        assert (code, told) == (1, "")
        assert printed.startswith("tiny: 2 runs, 0 done, 2 to train")
        assert said in printed
        assert printed.endswith("the same command goes on from here\n")
    assert store.objects.children("grids") == ["tiny.json", "tiny.launches", "tiny.yaml"]


def _finished(store: RunStore) -> list[str]:
    return [run_id for run_id in store.run_ids() if store.summary(run_id)]


def test_a_failing_run_never_stops_the_others_and_a_killed_worker_is_tried_again(grid, tmp_path, room):
    broken = grid(
        **{
            "seeds: [1, 2]": "seeds: [1]",
            "  plain:": "  broken: {runtime: {device: cuda}}\n  plain:",
            "steps: 12": "steps: 3000",
            "every: 4": "every: 400",
            "checkpoint_every: 400": "checkpoint_every: 200",
            "name: tiny": "name: tiny\nresources: {max_failures: 1}",
        }
    )
    where = tmp_path / "store"
    running = subprocess.Popen(
        command(broken, where), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        env={**os.environ, "MMSWEEP_WEBHOOK": f"{room.url}/secret"},
    )  # fmt: skip
    victims: list[psutil.Process] = []

    def killed() -> bool:
        victims.extend(processes("trainers.train", "hetero-s1"))
        return bool(victims) and _checkpoints(where, "hetero") > 0

    wait_for(killed, "a checkpoint of the run whose worker is to die")
    assert all("MMSWEEP_WEBHOOK" not in process.environ() for process in processes("mmsweep.agent"))
    victims[-1].kill()
    printed, _ = running.communicate(timeout=240)
    assert running.returncode == 1, printed
    assert room.url not in printed
    store = open_store(str(where))
    by_arm = {run_id.split("-")[0]: run_id for run_id in store.run_ids()}
    assert sorted(r.split("-")[0] for r in _finished(store)) == ["hetero", "plain"]
    assert store.summary(by_arm["hetero"])["attempts"] == 2
    failed = store.status(by_arm["broken"])
    assert failed["status"] == records.FAILED
    assert failed["attempt"] == 1  # another attempt would find no CUDA either
    assert failed["reason"].startswith('runtime.device is "cuda" and torch finds no CUDA device')
    assert f"{by_arm['broken']}: failed at step 0" in printed
    assert "2 of 3 runs done" in printed
    of_the_run, of_the_end = [message["text"] for message in room.taken]
    assert of_the_run.startswith(f"tiny: {by_arm['broken']} failed at step 0: runtime.device is")
    assert re.fullmatch(r"tiny: 2 of 3 runs done in [\d:]+; 1 failed", of_the_end)
    assert b"/secret" not in b"".join(path.read_bytes() for path in where.rglob("*.*") if path.is_file())
    told = subprocess.run(
        [sys.executable, "-m", "mmsweep.status", str(where)], capture_output=True, text=True
    )
    assert told.returncode == 1
    assert f"  {by_arm['broken']} | " in told.stdout  # the last lines of its log


def _checkpoints(where: Path, arm: str) -> int:
    return len(list(where.glob(f"runs/{arm}-*/checkpoints/*/manifest.json")))


def test_two_workers_a_trial_give_the_same_losses(undisturbed, grid, tmp_path):
    expected, _ = undisturbed
    two = "name: tiny\nresources: {workers: 2, cpus_per_worker: 0.5}"
    done = launch(grid(**{"name: tiny": two, "seeds: [1, 2]": "seeds: [1]"}), tmp_path / "s")
    assert done.returncode == 0, done.stdout + done.stderr
    store = open_store(str(tmp_path / "s"))
    for run_id, values in losses(store).items():
        assert values == pytest.approx(losses(expected)[run_id], abs=2e-5)
        assert store.config(run_id)["provenance"]["world_size"] == 2


def test_more_than_the_machine_has_is_refused(grid, tmp_path):
    done = launch(grid(**{"name: tiny": "name: tiny\nresources: {gpus_per_worker: 1}"}), tmp_path / "s")
    if done.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("a run needs ")
    assert "1 GPU" in line
    assert line.endswith("or name a cluster with --address")


# --- launches that end otherwise, on a stand-in for Ray --------------------------------------------


class Cluster:
    """Has room for one run, and finishes each in no time; then does what it is told to."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.waves: list[list[str]] = []
        self.then: Callable[[], object] = lambda: None

    def run_all(self, jobs: Sequence[Job], _: object, board: Board) -> None:
        signal.signal(signal.SIGINT, lambda *_: None)  # what Tune leaves behind
        self.waves.append([job.run_id for job in jobs])
        for job in jobs:
            result = {"status": records.COMPLETED, "steps": STEPS, "horizon": STEPS}
            taken = {"final_val_loss": 2.0, "device_seconds": 36.0}
            self.store.put_summary(job.run_id, {**result, **taken})
            board.heard(job.run_id, News(records.COMPLETED, step=STEPS, done=True))
        self.then()


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Cluster:
    stand_in = Cluster(open_store(str(tmp_path / "store")))
    monkeypatch.setattr(launch_module, "connect", lambda _: contextlib.nullcontext(Capacity(1, 0, 1)))
    monkeypatch.setattr(launch_module, "nodes", lambda: [Node("a", {"CPU": 1.0}, {"CPU": 1.0})])
    monkeypatch.setattr(launch_module, "to_come", list)
    monkeypatch.setattr(launch_module, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(launch_module, "make_report", lambda *_, **__: 0)
    monkeypatch.setitem(sys.modules, "mmsweep.trial", SimpleNamespace(run_all=stand_in.run_all))
    return stand_in


class Outage:
    """From `begin` on the store answers no listing, for a minute at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.until = 0.0
        self.asked = 0
        facts = RunStore.facts

        def away(store: RunStore) -> dict[str, set[str]]:
            if time.monotonic() > self.until:
                return facts(store)
            self.asked += 1
            raise StoreError("s3://b: the service is failing or overloaded; try again later (SlowDown)")

        monkeypatch.setattr(RunStore, "facts", away)

    def begin(self, then: Callable[[], object]) -> None:
        """`then`: what happens when the store has been asked for the second time."""
        self.asked, self.until = 0, time.monotonic() + 60

        def watch() -> None:
            wait_for(lambda: self.asked > 1, "questions", seconds=60)
            then()

        threading.Thread(target=watch, daemon=True).start()

    def end(self) -> None:
        self.until = 0.0


@pytest.fixture
def outage(monkeypatch) -> Outage:
    return Outage(monkeypatch)


@pytest.fixture
def tell(cluster, grid, room, capsys) -> Callable[[], tuple[int, list[str], list[str]]]:
    """Launches the grid on a budget, one run at a time, into a store that is new; returns the exit
    status, what was printed and what the room was told."""

    def call() -> tuple[int, list[str], list[str]]:
        path = grid(**{"name: tiny": "name: tiny\nbudget: {gpu_hours: 1}"})
        code = launch_module.main([str(path), "--store", cluster.store.url, "--webhook", room.url])
        printed = capsys.readouterr()
        return code, (printed.out + printed.err).splitlines(), [each["text"] for each in room.taken]

    return call


def kept(store: RunStore) -> list[str]:
    """The lines of a launch's log in the store, without the times."""
    (log,) = store.objects.list("grids/tiny.launches")
    return [line[20:] for line in store.objects.get(log).decode().splitlines()]


def test_a_store_that_is_away_between_two_waves_and_at_the_end_is_waited_for(cluster, outage, tell):
    cluster.then = lambda: outage.begin(outage.end)
    code, printed, told = tell()
    assert code == 0
    assert [len(wave) for wave in cluster.waves] == [1, 3]  # then the price is known, and the budget has room
    waits = [line for line in printed if "the store" in line]
    assert waits == ["tiny: waiting for the store: s3://b: the service is failing or overloaded; "
                     "try again later (SlowDown)", "tiny: the store is back"] * 2  # fmt: skip
    assert re.fullmatch(r"tiny: 4 of 4 runs done in [\d:]+", told[-1])
    assert len(told) == 1


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_store_that_stays_away_ends_a_launch_with_what_is_known(cluster, outage, tell, monkeypatch, by):
    monkeypatch.setattr(launch_module, "LAST_S", 0.2)
    cluster.then = lambda: outage.begin(lambda: os.kill(os.getpid(), by))
    code, printed, (end,) = tell()
    assert code == 1
    assert [len(wave) for wave in cluster.waves] == [1]
    why = "stopped by Ctrl-C" if by == signal.SIGINT else "stopped by SIGTERM"
    known = r"1/4 done \(as known here: the store does not answer\) in [\d:]+"
    assert f"tiny: {why}" in printed
    assert re.fullmatch(known, printed[-2])
    assert printed[-1] == "the same command goes on from here"
    assert re.fullmatch(rf"tiny: {known}; {why}", end)
    assert kept(cluster.store) == printed


def test_an_exception_that_ends_a_launch_is_in_its_log_and_told(cluster, tell, room):
    def breaks() -> None:
        raise RuntimeError("GCS is gone\nand so on")

    cluster.then = breaks
    with pytest.raises(RuntimeError):
        tell()
    assert kept(cluster.store)[-1] == "tiny: ended: RuntimeError: GCS is gone"
    (message,) = room.taken
    assert re.fullmatch(r"the launch of .*tiny\.yaml has ended: RuntimeError: GCS is gone", message["text"])
    assert cluster.store.launches("tiny") == []


def test_bad_input_is_told_where_nobody_may_look(tmp_path, room):
    assert launch_module.main([str(tmp_path / "none.yaml"), "--webhook", room.url]) == 2
    (message,) = room.taken
    path = tmp_path / "none.yaml"
    assert message["text"] == f"the launch of {path} has ended: {path}: no such file: check the path"


# --- planning ------------------------------------------------------------------------------------


def test_the_paper_s_grid_is_25_runs_of_gpt2_small(tmp_path):
    done = launch(Path("paper"), tmp_path / "s", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "paper: 25 runs (25 cells), 0 done" in done.stdout
    assert done.stdout.count("124 M") == 25
    assert done.stdout.count("50,000 x 65,536") == 25
    assert "a step takes 56 TFLOP for the model" in done.stdout


def test_the_retune_grid_is_120_runs(tmp_path):
    done = launch(Path("retune_dgram_attention"), tmp_path / "s", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "retune_dgram_attention: 120 runs (120 cells), 0 done" in done.stdout


def test_every_bad_grid_exits_2_before_ray_starts(tmp_path):
    """All of them in one process, which at its end has not imported ray."""
    grids = sorted(str(path) for path in BAD_GRIDS.glob("*.yaml"))
    assert len(grids) >= 30
    code = (
        "import json, sys\n"
        "from mmsweep.launch import main\n"
        "codes = [main([grid, '--store', sys.argv[1]]) for grid in sys.argv[2:]]\n"
        "print(json.dumps([codes, 'ray' in sys.modules, 'torch' in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store"), *grids],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    codes, ray_imported, torch_imported = json.loads(done.stdout)
    assert codes == [2] * len(grids)
    assert not ray_imported
    assert not torch_imported
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.yaml"], "nothing.yaml"),
        (["quickstart", "--store", "ftp://x"], "ftp:// is not supported"),
        (["quickstart", "--address", "192.0.2.1:6379"], "refusing '192.0.2.1:6379'"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "mmsweep.launch", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_command_suggests_the_right_one():
    done = subprocess.run([sys.executable, "-m", "mmsweep", "lunch"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == 'mmsweep: unknown command "lunch" (did you mean "launch"?)\n'


@pytest.mark.parametrize(
    "arguments",
    [
        ["mmsweep", "launch", "quickstart", "--dry-run"],
        ["mmsweep.launch", "quickstart", "--dry-run"],
        ["mmsweep.status", "STORE"],
        ["mmsweep.status", "STORE", "--watch"],
        ["mmsweep", "stop", "STORE", "tiny"],
        ["mmsweep", "report", "STORE"],
        ["mmsweep", "--help"],
    ],
)
def test_nobody_who_reads_the_output_is_no_traceback(undisturbed, arguments, tmp_path):
    """As in `| head`, whose end is not waited for: here it is gone before anything is written."""
    store, _ = undisturbed
    given = [store.url if word == "STORE" else word for word in arguments]
    done = subprocess.Popen(
        [sys.executable, "-m", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    done.stdout.close()
    assert done.stderr.read() == ""
    done.stderr.close()
    assert done.wait() == 128 + signal.SIGPIPE
