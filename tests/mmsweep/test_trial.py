"""Sweeps on clusters of several nodes: where runs go, what they see there, and nodes that die."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import Nodes, launch, left_over, losses, running_nodes, write_grid
from ray._raylet import GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, GCS_AUTOSCALER_STATE_NAMESPACE
from ray.core.generated import autoscaler_pb2
from ray.experimental.internal_kv import _internal_kv_put
from tiny import processes, wait_for

from mmsweep import cluster, doctor, trial
from mmsweep.agent import Job
from mmsweep.cluster import connect
from mmsweep.progress import Board
from mmsweep.resources import Resources
from mmsweep.store import RunStore, open_store
from mmsweep.workers import Workers
from trainers import records
from trainers.config import RunConfig
from trainers.provenance import checkout

STEPS = 60


pytestmark = pytest.mark.usefixtures("texts")


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with running_nodes() as cluster:
        yield cluster


def on_this_machine(store: RunStore, run_id: str, folder: Path) -> list[float]:
    """Losses of a run that two workers train here, without Ray and undisturbed."""
    folder.mkdir()
    with Workers(store.config(run_id)["config"], folder, 1, 2) as workers:
        wait_for(lambda: workers.poll() is not None, "the workers to end")
        assert workers.poll() == 0
    parts = sorted(folder.glob("attempt-001/steps-*"))
    return [json.loads(line)["loss"] for part in parts for line in part.read_text().splitlines()]


def all_completed(store: RunStore, runs: int) -> bool:
    summaries = [store.summary(run_id) for run_id in store.run_ids()]
    return [s and s["status"] for s in summaries] == [records.COMPLETED] * runs


def test_runs_of_two_nodes_each_take_turns_and_compute_the_bits_of_one_machine(
    nodes, texts, tmp_path, monkeypatch
):
    """Each node has room for one share: runs that took a node each and waited would wait for ever."""
    with monkeypatch.context() as synced:  # on the nodes the code is no checkout
        synced.setenv("GIT_DIR", str(tmp_path / "none"))
        for _ in range(2):
            nodes.add(cpus=1)
    resources = "{workers: 2, nodes: 2}"
    grid = write_grid(tmp_path / "g.yaml", texts, resources=resources, seeds=[1], steps=STEPS, every=20)
    sweep = launch(grid, tmp_path / "store", tmp_path / "log", nodes.address)
    wait_for(lambda: len(processes("trainers.train")) == 2, "the ranks of a run")
    places = [process.environ() for process in processes("trainers.train")]
    assert sorted((place["RANK"], place["LOCAL_RANK"], place["WORLD_SIZE"]) for place in places) == [
        ("0", "0", "2"),
        ("1", "0", "2"),
    ]
    assert {place["CUDA_VISIBLE_DEVICES"] for place in places} == {""}  # none was asked for
    sweep.wait(240)
    store = open_store(str(tmp_path / "store"))
    assert all_completed(store, 2), (tmp_path / "log").read_text()
    facts = [store.config(run_id)["provenance"] for run_id in store.run_ids()]
    assert {fact["world_size"] for fact in facts} == {2}
    here = checkout() or {"commit": None}
    assert {(fact["git"] or {"commit": None})["commit"] for fact in facts} == {here["commit"]}
    measured = losses(store, STEPS)
    first = min(measured)
    assert measured[first] == on_this_machine(store, first, tmp_path / "alone")
    wait_for(lambda: not left_over(), "all processes to end")


def test_a_run_whose_node_dies_goes_on_elsewhere(nodes, texts, tmp_path):
    """Nothing is lost, nothing is there twice, and no bit differs."""
    steps = 1000
    for _ in range(2):
        nodes.add()
    resources = "{workers: 2, max_failures: 0}"  # a lost node is no failure
    grid = write_grid(tmp_path / "g.yaml", texts, resources=resources, seeds=[1], steps=steps, every=50)
    where, log = tmp_path / "store", tmp_path / "log"
    sweep = launch(grid, where, log, nodes.address)

    def on_both_nodes() -> bool:
        return len({path.parts[-3] for path in where.glob("runs/*/attempt-*/*.jsonl")}) == 2

    wait_for(on_both_nodes, "a run on each node")
    nodes.remove(0)
    nodes.add()
    sweep.wait(240)
    store = open_store(str(where))
    assert all_completed(store, 2), log.read_text()
    measured = losses(store, steps)
    attempts = {run_id: store.summary(run_id)["attempts"] for run_id in measured}
    assert sorted(attempts.values()) == [1, 2]
    moved = max(attempts, key=lambda run_id: attempts[run_id])
    assert measured[moved] == on_this_machine(store, moved, tmp_path / "alone")
    wait_for(lambda: not left_over(), "all processes to end")


def test_as_many_runs_go_on_at_once_as_the_cluster_has_room_for_when_it_grows(nodes, texts, tmp_path):
    nodes.add(cpus=1)
    grid = write_grid(tmp_path / "g.yaml", texts, resources="{}", seeds=[1, 2], steps=100_000, every=1000)
    sweep = launch(grid, tmp_path / "store", tmp_path / "log", nodes.address)
    wait_for(lambda: len(processes("trainers.train")) == 1, "the first run")
    (first,) = processes("trainers.train")
    nodes.add(cpus=2)
    wait_for(lambda: len(processes("trainers.train")) == 3, "two more runs on the new node")
    nodes.add(cpus=1)
    wait_for(lambda: len(processes("trainers.train")) == 4, "the last run on the newest node")
    assert first.is_running()
    parts = "store/runs/*/attempt-*/steps-*"
    wait_for(lambda: len({path.parts[-3] for path in tmp_path.glob(parts)}) == 4, "records of all")
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(120) == 1
    wait_for(lambda: not left_over(), "all processes to end")
    store = open_store(str(tmp_path / "store"))
    assert [store.status(run_id)["status"] for run_id in store.run_ids()] == [records.PENDING] * 4


def test_workers_see_the_gpus_of_their_trial_and_no_others(nodes, texts, tmp_path):
    """A node that claims three GPUs: two runs share one of them, a run of two workers has the others. They
    are told to use none, and the doctor is not deceived."""
    nodes.add(cpus=4, gpus=3)
    half = "{gpus_per_worker: 0.5, max_concurrent: 2}"
    whole = "{workers: 2, gpus_per_worker: 1.0, max_concurrent: 1}"
    sweeps = []
    for name, resources in (("half", half), ("whole", whole)):
        folder = tmp_path / name
        folder.mkdir()
        grid = write_grid(folder / "g.yaml", texts, resources=resources, seeds=[1], steps=100_000, every=1000)
        sweeps.append(launch(grid, folder / "store", folder / "log", nodes.address))
    wait_for(lambda: len(processes("trainers.train")) == 4, "the workers of three runs")
    seen = [process.environ() for process in processes("trainers.train")]
    shared = [place["CUDA_VISIBLE_DEVICES"] for place in seen if place["WORLD_SIZE"] == "1"]
    own = [place for place in seen if place["WORLD_SIZE"] == "2"]
    assert len(shared) == len(own) == 2
    assert shared[0] == shared[1]
    assert len({place["CUDA_VISIBLE_DEVICES"] for place in own}) == 1
    visible = own[0]["CUDA_VISIBLE_DEVICES"].split(",")
    assert {*shared, *visible} == {"0", "1", "2"}
    assert {place["LOCAL_RANK"] for place in own} == {"0", "1"}  # each picks its own of the two
    for sweep in sweeps:
        sweep.send_signal(signal.SIGINT)
    for sweep in sweeps:
        sweep.wait(120)
    wait_for(lambda: not left_over(), "all processes to end")
    said = [found.what for found in doctor.check_cluster(nodes.address) if found.level == "problem"]
    assert any(what.endswith("Ray hands out 3 GPUs here, and torch finds 0") for what in said), said


def test_a_launch_that_finds_no_room_says_so_and_ends(nodes, texts, tmp_path):
    nodes.add(cpus=2)
    resources = "{workers: 4, placement_timeout_s: 5}"
    grid = write_grid(tmp_path / "g.yaml", texts, resources=resources, seeds=[1], steps=8, every=8)
    sweep = launch(grid, tmp_path / "store", tmp_path / "log", nodes.address)
    assert sweep.wait(120) == 1
    printed = (tmp_path / "log").read_text()
    assert "a run needs 4 CPUs on one node, and the largest node has 2 CPUs; " in printed
    assert (
        "nothing could be placed for 5 s (resources.placement_timeout_s): 2 runs wait: each needs" in printed
    )
    assert "0 of 2 runs done" in printed


@pytest.fixture(scope="module")
def connected() -> Iterator[None]:
    with connect(None):
        yield


def test_what_an_autoscaler_may_add_is_known(connected):
    assert cluster.to_come() == []
    config = autoscaler_pb2.ClusterConfig()
    config.node_group_configs.add(max_count=2, resources={"CPU": 48, "GPU": 4})
    _internal_kv_put(
        GCS_AUTOSCALER_CLUSTER_CONFIG_KEY,
        config.SerializeToString(),
        namespace=GCS_AUTOSCALER_STATE_NAMESPACE,
    )
    assert cluster.to_come() == [{"CPU": 48, "GPU": 4}] * 2
    (here,) = cluster.nodes()
    assert here.total["CPU"] == here.free["CPU"] == cluster.usable_cpus()


def test_a_trial_that_always_dies_without_a_word_is_given_up(connected, monkeypatch):
    monkeypatch.setattr(trial, "WORDLESS", 2)
    run = RunConfig.model_validate({"arm": "plain", "seed": 1})
    job = Job("plain-s1-00000000", run.model_dump(mode="json"), "ftp://nowhere")  # its agent dies of that
    board = Board({job.run_id: run})
    trial.run_all([job], Resources(), board)
    news = board.rows[job.run_id].news
    assert news.status == records.FAILED
    assert news.reason == "the agent died"
