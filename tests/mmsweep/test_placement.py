"""The order of runs, what one takes of which machines, and what is said while there is no room."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsweep.placement import Need, Node, Watch, check_room, in_order
from mmsweep.resources import Resources
from trainers.config import RunConfig
from trainers.errors import InputError
from trainers.flops import cost


def run(arm: str, seed: int, steps: int = 100) -> RunConfig:
    return RunConfig.model_validate(
        {
            "arm": arm,
            "seed": seed,
            "model": {"n_layer": 1, "n_head": 2, "d_model": 16, "context": 16, "vocab_size": 256},
            "schedule": {"steps": steps, "warmup_steps": 2, "batch_size": 4},
        }
    )


def node(name: str, cpus: float, gpus: float = 0, *, free: float | None = None) -> Node:
    total = {"CPU": cpus, "GPU": gpus, "memory": 1e9}
    return Node(name, total, {**total, "CPU": cpus if free is None else free})


# --- order ----------------------------------------------------------------------------------------


def test_longer_runs_go_first_and_equal_ones_stay_seed_by_seed():
    grid = {
        f"{arm}-{seed}-{steps}": run(arm, seed, steps)
        for seed in (1, 2)
        for steps in (100, 1000)
        for arm in ("a", "b")
    }
    assert in_order(grid, {}) == [
        *("a-1-1000", "b-1-1000", "a-2-1000", "b-2-1000"),
        *("a-1-100", "b-1-100", "a-2-100", "b-2-100"),
    ]


def test_priority_of_the_arm_counts_more_than_length():
    grid = {"long": run("long", 1, 1000), "short": run("short", 1, 10), "last": run("last", 1, 5000)}
    assert in_order(grid, {"short": 1, "last": -1}) == ["short", "long", "last"]


def test_a_few_percent_more_arithmetic_does_not_part_a_pair():
    pair = {"plain": run("plain", 1, 100), "dgram": run("dgram", 1, 104)}
    assert cost(pair["dgram"]).total > cost(pair["plain"]).total
    assert in_order(pair, {}) == ["plain", "dgram"]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.sampled_from([100, 1000, 10_000])),
        max_size=12,
    ),
    st.dictionaries(st.sampled_from("abc"), st.integers(-2, 2)),
)
def test_order_is_a_stable_permutation(cells, priority):
    runs = {f"{k}": run(*cell) for k, cell in enumerate(cells)}
    order = in_order(runs, priority)
    assert sorted(order, key=int) == list(runs)
    for one, other in itertools.pairwise(order):
        ranks = [priority.get(runs[k].arm, 0) for k in (one, other)]
        steps = [runs[k].schedule.steps for k in (one, other)]  # a factor of 10 apart
        assert (-ranks[0], -steps[0], int(one)) < (-ranks[1], -steps[1], int(other))


# --- what one run takes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resources", "bundle", "text"),
    [
        ({}, {"CPU": 1}, "1 CPU on one node"),
        ({"workers": 4, "gpus_per_worker": 1.0}, {"CPU": 4, "GPU": 4}, "4 CPUs and 4 GPUs on one node"),
        ({"workers": 4, "nodes": 2, "gpus_per_worker": 1.0}, {"CPU": 2, "GPU": 2},
         "2 CPUs and 2 GPUs on each of 2 nodes"),
        ({"gpus_per_worker": 0.25}, {"CPU": 1, "GPU": 0.25}, "1 CPU and 0.25 GPUs on one node"),
        ({"workers": 3, "gpus_per_worker": 0.5}, {"CPU": 3, "GPU": 2}, "3 CPUs and 2 GPUs on one node"),
    ],
)  # fmt: skip
def test_what_a_run_takes_of_each_machine(resources, bundle, text):
    need = Need.of(Resources.model_validate(resources))
    assert need.bundle() == bundle
    assert str(need) == text


def test_a_run_fits_where_enough_machines_have_all_of_it():
    need = Need.of(Resources(workers=4, nodes=2, gpus_per_worker=1.0))
    assert need.fits([{"CPU": 2, "GPU": 2}] * 2)
    assert not need.fits([{"CPU": 2, "GPU": 2}, {"CPU": 8, "GPU": 1}])
    assert not need.fits([{"CPU": 8, "GPU": 8}])  # on two machines, not twice on one


@pytest.mark.parametrize(
    ("resources", "gpus", "runs"),
    [
        ({"gpus_per_worker": 1.0}, [8], 8),
        ({"gpus_per_worker": 1.0, "workers": 3}, [8], 2),
        ({"gpus_per_worker": 0.5}, [8], 16),
        ({"gpus_per_worker": 0.3}, [2], 6),  # a GPU holds three, and the rest of two GPUs is no fourth
        ({"gpus_per_worker": 0.6}, [8], 8),
        ({"gpus_per_worker": 0.5, "workers": 3}, [1], 0),
        ({"gpus_per_worker": 0.5, "workers": 3}, [3], 1),
        ({"gpus_per_worker": 0.55, "workers": 20}, [11], 1),
        ({"gpus_per_worker": 1.0, "workers": 4}, [6, 6], 2),
        ({"gpus_per_worker": 1.0, "workers": 4, "nodes": 2}, [8, 3, 2], 2),
        ({"gpus_per_worker": 1.0, "workers": 4, "nodes": 2}, [80, 2], 1),  # never twice on the large one
        ({"cpus_per_worker": 1.6}, [0], 40),
        ({"cpus_per_worker": 33.0, "workers": 2}, [0], 0),
    ],
)
def test_how_many_runs_machines_hold(resources, gpus, runs):
    need = Need.of(Resources.model_validate(resources))
    assert need.most([{"CPU": 64.0, "GPU": count} for count in gpus]) == runs


def test_a_run_that_no_node_can_hold_is_told_with_the_fix():
    resources = Resources(workers=4, gpus_per_worker=1.0)
    (said,) = check_room(resources, [node("a", 16, 2), node("b", 16, 2)], [], local=False)
    assert said == (
        "a run needs 4 CPUs and 4 GPUs on one node, and the largest node has 16 CPUs and 2 GPUs; "
        "lower resources.workers or what each takes, spread them with resources.nodes, or add such nodes; "
        "waiting for at most 30 min"
    )
    with pytest.raises(
        InputError, match=r"this machine has 16 CPUs and 2 GPUs; .*name a cluster with --addr"
    ):
        check_room(resources, [node("a", 16, 2)], [], local=True)


def test_too_few_nodes_are_counted():
    resources = Resources(workers=2, nodes=2)
    (said,) = check_room(resources, [node("a", 8), node("b", 0)], [], local=False)
    assert "a run needs 1 CPU on each of 2 nodes, and only one is that large; " in said


def test_a_node_that_an_autoscaler_can_start_is_room():
    resources = Resources(workers=4, gpus_per_worker=1.0)
    assert check_room(resources, [node("head", 2)], [{"CPU": 48, "GPU": 4}], local=False) == []


def test_gpus_that_no_run_uses_are_mentioned():
    (said,) = check_room(Resources(), [node("a", 8, 4)], [], local=True)
    assert said == "the cluster has 4 GPUs, and resources.gpus_per_worker is 0: runs train on CPUs"


# --- runs that wait -------------------------------------------------------------------------------


class Waiting:
    """A watch with a clock of its own, and what it has said."""

    def __init__(self, *, timeout_s: float = 300.0, at_once: int | None = None) -> None:
        self.nodes = [node("a", 4, free=1), node("b", 4, free=0)]
        self.said: list[tuple[float, str]] = []
        self.now = 1000.0
        self.watch = Watch(
            Need.of(Resources(workers=2)),
            timeout_s,
            at_once=at_once,
            say=lambda text: self.said.append((self.now - 1000.0, text)),
            nodes=lambda: self.nodes,
            to_come=list,
        )

    def pass_time(self, seconds: int, running: tuple[str, ...] = (), waiting: int = 12) -> None:
        for _ in range(seconds):
            self.watch.look(frozenset(running), waiting, self.now)
            self.now += 1.0


ROOM = "12 runs wait: each needs 2 CPUs on one node; free: 1 CPU on a, 0 CPUs on b; the cluster has 2 nodes"


def test_runs_that_find_no_room_are_spoken_of_every_half_minute():
    case = Waiting(timeout_s=600.0)
    case.pass_time(100)
    assert case.said == [
        (30.0, f"{ROOM}; this launch ends in 10 min"),
        (60.0, f"{ROOM}; this launch ends in 9 min"),
        (90.0, f"{ROOM}; this launch ends in 8 min"),
    ]
    assert not case.watch.over


def test_a_cluster_that_others_fill_is_mentioned_once_while_runs_go_on():
    case = Waiting()
    case.pass_time(200, running=("one",))
    assert case.said == [(30.0, ROOM)]
    case.nodes = case.nodes[:1]
    case.pass_time(60, running=("one",))
    assert [text for _, text in case.said[1:]] == [
        "12 runs wait: each needs 2 CPUs on one node; free: 1 CPU on a; the cluster has 1 node"
    ]


@pytest.mark.parametrize(("at_once", "running"), [(None, 4), (2, 2)])
def test_a_cluster_full_of_one_s_own_runs_is_no_news(at_once, running):
    case = Waiting(at_once=at_once)
    case.pass_time(200, running=tuple("abcd"[:running]))
    assert case.said == []
    case.pass_time(31, running=tuple("abcd"[: running - 1]))
    assert len(case.said) == 1


def test_nothing_is_said_while_runs_begin():
    case = Waiting()
    for k in range(20):
        case.pass_time(20, running=(f"run {k}",))
    assert case.said == []


def test_a_launch_ends_when_nothing_ran_for_the_whole_timeout():
    case = Waiting(timeout_s=300.0)
    case.pass_time(200)
    case.pass_time(1, running=("one",))
    case.pass_time(299)
    assert not case.watch.over
    case.pass_time(2)
    assert case.watch.over
    last = case.said[-1][1]
    assert (
        last == f"nothing could be placed for 5 min (resources.placement_timeout_s): {ROOM}; this launch ends"
    )


def test_a_launch_with_nothing_left_to_place_never_times_out():
    case = Waiting(timeout_s=50.0)
    case.pass_time(200, running=("last",), waiting=0)
    case.pass_time(200, waiting=0)
    assert case.said == []
    assert not case.watch.over
