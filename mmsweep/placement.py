"""Which run goes first, what one takes of which machines, and what is said of runs that find no room."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmsweep.resources import Resources
from trainers.config import RunConfig
from trainers.errors import InputError
from trainers.flops import cost

SAY_S = 30.0
"""Runs that wait are spoken of when nothing has begun for so long, and no more often."""
_MOST_NODES = 6
"""A line names no more of them."""


def in_order(runs: Mapping[str, RunConfig], priority: Mapping[str, int]) -> list[str]:
    """Run ids in the order to begin them: by rank of the arm, then long ones first, then as given.

    Lengths are FLOPs, rounded to a power of two: what takes about as long stays in the grid's order,
    seed by seed, so that the arms of a pair are done together.

    Args:
        runs: in the grid's order, by run id.
        priority: arm → rank; higher ones go first, the others have 0.
    """

    def key(run_id: str) -> tuple[int, int]:
        run = runs[run_id]
        return -priority.get(run.arm, 0), -round(math.log2(cost(run).total))

    return sorted(runs, key=key)


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of a cluster: what it has, and what nobody has reserved."""

    name: str
    total: Mapping[str, float]
    free: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Need:
    """What one run takes: so much on each of so many machines."""

    cpus: float
    gpus: float
    nodes: int

    @staticmethod
    def of(resources: Resources) -> Need:
        workers = resources.workers // resources.nodes
        gpus = workers * resources.gpus_per_worker
        if gpus > 1:
            gpus = math.ceil(gpus - 1e-9)  # Ray divides one GPU, not several
        return Need(workers * resources.cpus_per_worker, gpus, resources.nodes)

    def bundle(self) -> dict[str, float]:
        """What Ray reserves on one machine."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def fits(self, rooms: Sequence[Mapping[str, float]]) -> bool:
        """Whether machines with this much room can hold a run."""
        return sum(self._fits_one(room) for room in rooms) >= self.nodes

    def most(self, rooms: Sequence[Mapping[str, float]]) -> int:
        """How many runs at once such machines hold if nothing else is on them."""
        each = [self._most_on_one(room) for room in rooms]
        runs = sum(each) // self.nodes
        while sum(min(shares, runs) for shares in each) < runs * self.nodes:  # no run is on a machine twice
            runs -= 1
        return runs

    def _most_on_one(self, room: Mapping[str, float]) -> int:
        most, gpus = room.get("CPU", 0.0) / self.cpus, room.get("GPU", 0.0)
        if self.gpus > 1:
            most = min(most, gpus / self.gpus)
        elif self.gpus:  # what is left over of one GPU cannot be joined with that of another
            most = min(most, math.floor(gpus) * math.floor(1 / self.gpus + 1e-9))
        return math.floor(most + 1e-9)

    def _fits_one(self, room: Mapping[str, float]) -> bool:
        return all(room.get(kind, 0.0) + 1e-9 >= amount for kind, amount in self.bundle().items())

    def __str__(self) -> str:
        """`2 CPUs and 1 GPU on one node`"""
        where = "one node" if self.nodes == 1 else f"each of {self.nodes} nodes"
        return f"{_amounts(self.bundle())} on {where}"

    def never_fits(self, nodes: Sequence[Node], to_come: Sequence[Mapping[str, float]]) -> str:
        """Why no machine could ever hold a run, and what to change; empty if some could.

        Args:
            nodes: of the cluster now.
            to_come: what further ones would have that an autoscaler may start.
        """
        rooms = [*(node.total for node in nodes), *to_come]
        if self.fits(rooms):
            return ""
        able = sum(self._fits_one(room) for room in rooms)
        if able:
            has = f"{'only one is' if able == 1 else f'only {able} are'} that large"
        else:
            largest = max(rooms, key=lambda room: tuple(room.get(k, 0.0) for k in ("GPU", "CPU")), default={})
            has = f"the largest node has {_amounts({kind: largest.get(kind, 0.0) for kind in self.bundle()})}"
        fix = "lower resources.workers or what each takes"
        spread = ", spread them with resources.nodes" if self.nodes == 1 and not able else ""
        return f"a run needs {self}, and {has}; {fix}{spread}, or add such nodes"


def check_room(
    resources: Resources, nodes: Sequence[Node], to_come: Sequence[Mapping[str, float]], *, local: bool
) -> list[str]:
    """What to say about a cluster before a launch begins on it.

    Args:
        local: the cluster is this machine alone, which grows for nobody.

    Raises:
        InputError: this machine can never hold a run.
    """
    need = Need.of(resources)
    said = []
    if problem := need.never_fits(nodes, to_come):
        if local:
            problem = problem.replace("the largest node has", "this machine has")
            raise InputError(problem.replace("add such nodes", "name a cluster with --address"))
        said.append(f"{problem}; waiting for at most {_minutes(resources.placement_timeout_s)}")
    gpus = sum(node.total.get("GPU", 0.0) for node in nodes)
    if gpus and not resources.gpus_per_worker:
        said.append(
            f"the cluster has {_amounts({'GPU': gpus})}, and resources.gpus_per_worker is 0: "
            "runs train on CPUs"
        )
    return said


class Watch:
    """Notices when runs find no room, says so, and gives up in the end. Cheap: `look` at any rate.

    Args:
        need: of every run.
        at_once: so many run at once by the user's wish; None: as many as there is room for.
        timeout_s: `over` is set when nothing has run for so long.
        say: gets a line.
        nodes: the machines now; asked for only when there is something to say.
        to_come: what an autoscaler may add.
    """

    def __init__(
        self,
        need: Need,
        timeout_s: float,
        *,
        at_once: int | None,
        say: Callable[[str], None],
        nodes: Callable[[], list[Node]],
        to_come: Callable[[], list[Mapping[str, float]]],
    ) -> None:
        self.need = need
        self.timeout_s = timeout_s
        self.at_once = at_once
        self.say = say
        self.nodes = nodes
        self.to_come = to_come
        self.over = False
        self._running: frozenset[str] = frozenset()
        self._idle_since: float | None = None
        self._quiet_since: float | None = None
        self._said = ""

    def look(self, running: frozenset[str], waiting: int, now: float) -> None:
        """Called again and again; `now` is in seconds of a clock that never jumps."""
        if self._quiet_since is None or running - self._running:
            self._quiet_since, self._said = now, ""
        if self._idle_since is None or running or not waiting:
            self._idle_since = now
        self._running = running
        idle = now - self._idle_since
        if waiting and idle >= self.timeout_s:
            self.over = True
            self.say(
                f"nothing could be placed for {_minutes(self.timeout_s)} (resources.placement_timeout_s): "
                f"{self._wait(waiting)}; this launch ends"
            )
        elif waiting and now - self._quiet_since >= SAY_S:
            self._quiet_since = now
            if not running:
                self.say(f"{self._wait(waiting)}; this launch ends in {_minutes(self.timeout_s - idle)}")
            elif len(running) < self._most() and (text := self._wait(waiting)) != self._said:
                self._said = text
                self.say(text)

    def _most(self) -> float:
        """How many runs could go on at once if nobody else used the cluster."""
        most = self.need.most([node.total for node in self.nodes()])
        return most if self.at_once is None else min(most, self.at_once)

    def _wait(self, waiting: int) -> str:
        """`12 runs wait: each needs 2 CPUs on one node; free: 1 CPU on a; the cluster has 1 node`"""
        nodes = self.nodes()
        run = "1 run waits: it" if waiting == 1 else f"{waiting} runs wait: each"
        kinds = self.need.bundle()
        rooms = [
            f"{_amounts({kind: node.free.get(kind, 0.0) for kind in kinds})} on {node.name}" for node in nodes
        ]
        more = f" and {len(rooms) - _MOST_NODES} more nodes" if len(rooms) > _MOST_NODES else ""
        count = f"the cluster has {len(nodes)} node{'' if len(nodes) == 1 else 's'}"
        free = f"free: {', '.join(rooms[:_MOST_NODES])}{more}; {count}" if rooms else count
        never = self.need.never_fits(nodes, self.to_come())
        return f"{run} needs {self.need}; {free}" + (f"; {never}" if never else "")


def _amounts(bundle: Mapping[str, float]) -> str:
    """`2 CPUs and 1 GPU`"""
    return " and ".join(f"{amount:g} {kind}{'' if amount == 1 else 's'}" for kind, amount in bundle.items())


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{max(seconds, 0):.0f} s"
