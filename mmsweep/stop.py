"""`python -m mmsweep stop STORE GRID|RUN …`: let launches, or single runs of them, save and end.

The request is an object in the store, which a launch and its agents look for every few seconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console

from mmsweep.lease import Claim
from mmsweep.store import NotFound, RunStore, StoreError, open_store
from trainers import records
from trainers.errors import InputError, did_you_mean
from trainers.yamlfile import printable

POLL_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, and wait until it is done. Exit status 0: nothing of it runs any more, or --no-wait; 2: bad
    input or no store; 130: Ctrl-C while waiting (the request stays)."""
    parser = argparse.ArgumentParser(
        prog="mmsweep stop", description="Let launches of grids, or single runs, save their state and end."
    )
    parser.add_argument("store", help='folder or "s3://bucket/prefix"')
    parser.add_argument("names", nargs="+", metavar="GRID|RUN", help="name of a grid, or id of a run")
    parser.add_argument("--no-wait", action="store_true", help="ask, and do not wait for the end")
    arguments = parser.parse_args(argv)
    try:
        store = open_store(arguments.store)
        targets = _targets(store, list(dict.fromkeys(arguments.names)))
        for line in (line for target in targets for line in target.ask()):
            print(line, flush=True)
        if arguments.no_wait:
            return 0
        with _spinner() as show:
            _wait(targets, show)
        for line in (line for target in targets for line in target.outcome()):
            print(line)
    except (InputError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("not waiting any more; the request stays", file=sys.stderr)
        return 130
    return 0


def _targets(store: RunStore, names: Sequence[str]) -> list[_Target]:
    grids, runs = store.grids(), set(store.facts())
    planned = {grid: _run_ids(store, grid) for grid in grids}
    known = [*grids, *sorted(runs.union(*planned.values()))]
    for name in names:
        if name not in known:
            raise InputError(f'{store.url} has no grid and no run "{name}"{did_you_mean(name, known)}')
    return [
        _Target(store, name, grid=name in planned, run_ids=planned.get(name, [name]), planned=planned)
        for name in names
    ]


def _run_ids(store: RunStore, grid: str) -> list[str]:
    try:
        return list(dict.fromkeys(cell["run_id"] for cell in store.grid_index(grid)["cells"]))
    except NotFound:
        return []


@dataclass
class _Target:
    """A grid or a run that is to stop."""

    store: RunStore
    name: str
    grid: bool
    run_ids: list[str]
    planned: dict[str, list[str]]
    """Every grid's runs."""
    asked: bool = False
    working: list[str] = field(default_factory=list)
    """Runs that were training when it was asked."""
    launches: set[str] = field(default_factory=set)
    """Names of the launches that were asked; a run can be another grid's too, and go on for that one."""
    _beats: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Of every claim the last heartbeat that was seen, and when it was seen first."""

    def ask(self) -> Iterator[str]:
        """Write the request, if there is anybody to heed it."""
        owners = self._owners()
        if not owners and not self.grid and (launching := self._launching()):
            self._request()  # before it begins
            yield f"{self.name} is not running; the launch of {', '.join(launching)} will not begin it"
            return
        if not owners:
            yield f"nothing of {self.name} is running"
            return
        self.asked = True
        self.launches = {owner.launch for owner in owners}
        self.working = [run_id for run_id in self.run_ids if self._works(run_id)]
        self._request()
        yield f"{self.name}: asked {'; '.join(owner.who() for owner in owners)} to stop"

    def done(self) -> bool:
        """Whether nothing of it runs any more."""
        if not self.asked:
            return True
        if self._owners():
            if not self.store.stop_requested(**self._of()):
                self._request()  # a launch that has just begun withdrew it
            return False
        return not any(map(self._works, self.working))

    def outcome(self) -> Iterator[str]:
        """What became of every run that was training."""
        for run_id in self.working if self.asked else []:
            status = self.store.status(run_id) or {}
            saved = self.store.saved_step(run_id)
            step = (
                "nothing is saved"
                if saved is None
                else f"saved at step {saved} of {status.get('steps', '?')}"
            )
            yield printable(f"{run_id}: {status.get('status', records.PENDING)}, {step}")

    def _of(self) -> dict[str, str]:
        return {"grid": self.name} if self.grid else {"run_id": self.name}

    def _request(self) -> None:
        self.store.request_stop(**self._of())

    def _launching(self) -> list[str]:
        holding = [grid for grid, run_ids in self.planned.items() if self.name in run_ids]
        return [grid for grid in holding if self._alive(self.store.launches(grid))]

    def _owners(self) -> list[Claim]:
        claims = self.store.launches(self.name) if self.grid else self.store.workers(self.name)
        return self._alive(claims)

    def _works(self, run_id: str) -> bool:
        claims = self._alive(self.store.workers(run_id))
        return any(claim.launch in self.launches for claim in claims)

    def _alive(self, claims: list[Claim]) -> list[Claim]:
        """Those that are not known to be dead: by their process, or by a silence that was watched here."""
        now, alive = time.monotonic(), []
        for claim in claims:
            beat, since = self._beats.get(claim.nonce, (-1, now))
            if beat != claim.beat:
                since = now
            self._beats[claim.nonce] = (claim.beat, since)
            if not claim.process_is_gone() and now - since <= claim.ttl:
                alive.append(claim)
        return alive


def _wait(targets: list[_Target], show: Callable[[str], None]) -> None:
    while waiting := [target.name for target in targets if not target.done()]:
        show(f"waiting for {', '.join(waiting)} to save and end")
        time.sleep(POLL_S)


@contextmanager
def _spinner() -> Iterator[Callable[[str], None]]:
    """Shows what is waited for on a terminal, and nothing elsewhere."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("") as status:
        yield lambda text: status.update(text)


if __name__ == "__main__":
    from mmsweep.__main__ import quietly

    sys.exit(quietly(main))
