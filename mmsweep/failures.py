"""What went wrong with an attempt at a run, and what follows from it. No files, no processes, no clocks.

An attempt ends well, or is stopped on purpose, or leaves a `Failure`. `explain` names the kind and the
cause from exit codes and logs, `hung` from the stacks of workers that do not move. `decide` reads the
failures of one launch and says whether the run is tried again.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mmsweep.workers import EXIT_BAD_INPUT, EXIT_NO_DEVICE, EXIT_STOPPED
from trainers import records

CRASH = "crash"
HANG = "hang"
OOM = "oom"
KILLED = "killed"
"""A worker was ended by a signal that none of us sent."""
BAD_INPUT = "bad_input"
PREEMPTED = "preempted"
LOST = "lost"
"""An attempt without a last word: its machine or its agent died."""
DEVICE = "device"
"""A GPU of its machine is gone or broken."""

OF_THE_RUN = (CRASH, HANG, KILLED)
"""Kinds that `resources.max_failures` limits."""
OF_THE_MACHINE = (PREEMPTED, LOST, DEVICE)
"""Kinds that `resources.max_preemptions` limits."""

KEPT = 20
"""Failures that a run's status remembers."""
MOST_BACK_OFF_S = 60.0
LOG_TAIL_LINES = 12
_LONGEST_REASON = 500


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that did not finish."""

    attempt: int
    kind: str
    reason: str
    step: int
    """Steps that were recorded by then."""
    launch: str
    host: str
    at: float
    """Unix seconds, by the clock of `host`."""


_FAILURES: TypeAdapter[list[Failure]] = TypeAdapter(list[Failure])


def history(status: Mapping[str, Any]) -> list[Failure]:
    """The failures in a run's `status.json`, oldest first; none where they do not read."""
    try:
        return _FAILURES.validate_python(status.get("failures", []))
    except ValidationError:
        return []


def lost(status: Mapping[str, Any], *, now: float) -> Failure | None:
    """The failure of an attempt whose last word is that it runs; None if it said how it ended.

    Args:
        status: the run's `status.json`, read while nobody works on the run.
    """
    if status.get("status") != records.RUNNING:
        return None
    host, step = str(status.get("host", "?")), int(status.get("step", 0))
    reason = f"no last word from {host} after step {step}"
    attempt, launch = int(status.get("attempt", 0)), str(status.get("launch", ""))
    return Failure(attempt, LOST, reason, step, launch, host, now)


def to_json(failures: Sequence[Failure]) -> list[dict[str, Any]]:
    """What `history` reads: the newest KEPT."""
    return [asdict(failure) for failure in failures[-KEPT:]]


# --- what follows --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a run after a failure."""

    status: str
    """`pending` where it is tried again."""
    reason: str
    wait_s: float = 0.0
    """Pause before the next attempt, from the failure on."""

    @property
    def retry(self) -> bool:
        return self.status == records.PENDING


def decide(failures: Sequence[Failure], *, max_failures: int, max_preemptions: int) -> Decision:
    """What becomes of a run whose newest failure is the last of `failures`, all of one launch.

    Bad input is never tried again, lack of memory once. Two crashes with the same error quarantine a
    run. Otherwise crashes, hangs and killed workers have `max_failures` retries in common, and losses
    of the machine have `max_preemptions` of their own.
    """
    last = failures[-1]
    count = Counter(failure.kind for failure in failures)
    own = sum(count[kind] for kind in OF_THE_RUN)
    wait = min(2.0 ** (own + count[OOM] - 1), MOST_BACK_OFF_S)
    if last.kind == BAD_INPUT:
        return Decision(records.FAILED, last.reason)
    if last.kind == OOM and count[OOM] > 1:
        return Decision(records.OOM, f"out of memory in two tries: {last.reason}")
    if last.kind == OOM:
        return Decision(records.PENDING, f"{what_happened(last)}; one more try", wait)
    if last.kind in OF_THE_MACHINE:
        losses = sum(count[kind] for kind in OF_THE_MACHINE)
        if losses > max_preemptions:
            end = f"{losses} losses of a machine, and resources.max_preemptions is {max_preemptions}"
            return Decision(records.FAILED, f"{what_happened(last)}; {end}")
        return Decision(records.PENDING, what_happened(last))
    if last.kind == CRASH and any(same_error(last, earlier) for earlier in failures[:-1]):
        return Decision(records.QUARANTINED, f"twice the same error: {last.reason}")
    if own > max_failures:
        return Decision(records.FAILED, f"{what_happened(last)}; that was try {own} of {max_failures + 1}")
    return Decision(records.PENDING, f"{what_happened(last)}; try {own + 1} of {max_failures + 1}", wait)


def what_happened(failure: Failure) -> str:
    """`crashed at step 40 (RuntimeError: no such thing)`"""
    verb = {CRASH: "crashed", KILLED: "killed", OOM: "out of memory"}.get(failure.kind)
    return f"{verb} at step {failure.step} ({failure.reason})" if verb else failure.reason


def same_error(one: Failure, other: Failure) -> bool:
    """Whether two crashes say the same, but for what differs from process to process."""
    return one.kind == other.kind == CRASH and _timeless(one.reason) == _timeless(other.reason)


_FLEETING = re.compile(
    r"""
      0x[0-9a-f]+                                          # addresses in memory
    | \d{4}-\d\d-\d\d[T\ ]?                                # dates
    | \d\d?:\d\d:\d\d(?:[.,]\d+)?                          # times
    | (?:\[[0-9a-f:.]*\]|(?:\d{1,3}\.){3}\d{1,3}|\blocalhost)(?::\d+)?   # network addresses
    | \b(?:pid|process|port|thread|rank|attempt)[\ =:#-]*\d+
    | (?<=/tmp/)[^/\s'":,)]+                               # what is random in names of temporary files
    | \bmmsweep-[a-z0-9._-]+
    | \.saving-[^/\s'":,)]+
    """,
    re.VERBOSE | re.IGNORECASE,
)  # fmt: skip


def _timeless(error: str) -> str:
    return " ".join(_FLEETING.sub("…", error).split())


# --- why the workers ended -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cause:
    """Why an attempt ended that should have gone on."""

    kind: str
    reason: str
    rank: int = 0
    """Whose log tells of it."""


OUT_OF_MEMORY = (
    "out of memory",
    "outofmemoryerror",
    "can't allocate memory",
    "cannot allocate memory",
    "memoryerror",
    "not enough memory",
    "std::bad_alloc",
)
BROKEN_DEVICE = (
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
    "no cuda-capable device is detected",
    "cuda-capable device(s) is/are busy or unavailable",
    "cuda driver initialization failed",
    "cuda error: system not yet initialized",
    "cuda unknown error",
    "gpu is lost",
)
"""What CUDA says when the machine is to blame, not the program."""
LOST_ANOTHER = ("closed by peer", "reset by peer", "broken pipe", "remote process exited", "socket closed")
"""What a worker says when another one has gone."""
WAITED_IN_VAIN = ("timed out waiting", "timed out after", "operation timeout", "wait timeout")
"""What a worker says when a collective has taken `trainers.distributed.COLLECTIVE_TIMEOUT`."""
_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_RANK = re.compile(r"^\[rank\d+\]: ?")
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(?:Error|Exception)(?::|$)")


def explain(codes: Mapping[int, int | None], logs: Mapping[int, str], *, oom_killed: bool) -> Cause:
    """Why workers ended badly.

    Args:
        codes: exit codes by rank, as `Popen.returncode` has them: None for those that still run.
        logs: what they wrote, by rank; the end of it is enough.
        oom_killed: the kernel has killed some process of this machine for its memory just now.
    """
    ended = {rank: code for rank, code in codes.items() if code}
    tails = {rank: log_tail(logs.get(rank, "")) for rank in codes}
    for kind, own in ((BAD_INPUT, EXIT_BAD_INPUT), (DEVICE, EXIT_NO_DEVICE)):
        for rank, code in ended.items():
            if code == own:
                return Cause(kind, _short(tails[rank][-1] if tails[rank] else "no output"), rank)
    for kind, words in ((OOM, OUT_OF_MEMORY), (DEVICE, BROKEN_DEVICE)):
        for rank in ended:
            for line in reversed(tails[rank]):
                if _says(line, words):
                    return Cause(kind, _short(line), rank)
    for rank, code in ended.items():
        if -code in _OUTSIDE:
            if oom_killed and code == -signal.SIGKILL:
                return Cause(OOM, f"rank {rank} was killed by the kernel, out of host memory", rank)
            return Cause(KILLED, f"rank {rank} got {signal.Signals(-code).name} from outside", rank)
    if all(code == EXIT_STOPPED for code in ended.values()):
        return Cause(PREEMPTED, "its workers were told to stop from outside", next(iter(ended)))
    errors = {rank: error_line(tails[rank]) for rank, code in ended.items() if code != EXIT_STOPPED}
    rank = next((rank for rank, error in errors.items() if not _of_another(error)), next(iter(errors)))
    error, code = errors[rank], ended[rank]
    waited = next((line for line in tails[rank] if _says(line, WAITED_IN_VAIN)), "")
    if waited:  # also where it has then aborted, as NCCL's watchdog does
        return Cause(HANG, _short(waited), rank)
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return Cause(CRASH, _short(f"rank {rank} died of {name}: {error or 'no output'}"), rank)
    kind = KILLED if _says(error, LOST_ANOTHER) else CRASH
    return Cause(kind, _short(error or f"exit code {code} without a word"), rank)


def log_tail(log: str) -> list[str]:
    """The last lines of a log that are not blank; of stacks at its end the innermost frames."""
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    current = max((k for k, line in enumerate(lines) if line.startswith("Current thread ")), default=None)
    if current is not None and all(_FRAME.match(line) for line in lines[current + 1 :]):
        return lines[current : current + LOG_TAIL_LINES]
    return lines[-LOG_TAIL_LINES:]


def error_line(lines: Sequence[str]) -> str:
    """The line that names the last exception, else the last line, else nothing."""
    plain = [_RANK.sub("", line) for line in lines]
    named = [line for line in plain if _EXCEPTION.match(line)]
    return (named or plain or [""])[-1].strip()


def _of_another(error: str) -> bool:
    return _says(error, (*LOST_ANOTHER, *WAITED_IN_VAIN))


def _says(error: str, words: Sequence[str]) -> bool:
    return any(some in error.lower() for some in words)


def _short(reason: str) -> str:
    reason = " ".join(_RANK.sub("", reason).split())
    return reason if len(reason) <= _LONGEST_REASON else reason[: _LONGEST_REASON - 1] + "…"


# --- workers that do not move --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen of a worker from outside."""

    rank: int
    state: str
    """The letter of `/proc/<pid>/stat`, empty where nobody tells."""
    wchan: str = ""
    """Where in the kernel it waits."""
    dump: str = ""
    """Stacks of its threads by `faulthandler`, empty if it did not answer."""

    def __str__(self) -> str:
        """`stopped by a signal`, `in all_reduce (trainers/distributed.py:45)`"""
        if self.state in ("T", "t"):
            return "stopped by a signal (SIGSTOP)"
        if place := _place(self.dump):
            return place
        where = f", in {self.wchan} of the kernel" if self.wchan not in ("", "0") else ""
        if self.state == "D":
            return f"in a call to the kernel that does not return{where or ' (state D)'}"
        return f"silent: no answer to SIGUSR1 (state {self.state or 'unknown'}{where})"


def hung(sights: Sequence[Sight]) -> Cause:
    """Who keeps the others waiting: one that does not answer, else the one that is somewhere else."""
    if not sights:
        return Cause(HANG, "its workers are not on this machine")
    silent = [sight for sight in sights if not _place(sight.dump)]
    places = Counter(str(sight) for sight in sights)
    alone = min(sights, key=lambda sight: (places[str(sight)], _waits(sight), sight.rank))
    which = silent[0] if silent else alone
    return Cause(HANG, f"rank {which.rank} is {which}", which.rank)


_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>\S+)$', re.MULTILINE)
_OWN = re.compile(r"(?:^|/)(trainers/[^\"]+\.py)$")


def _frames(dump: str) -> list[re.Match[str]]:
    """Frames of the main thread, the innermost first: it ends in runpy, or it is the current one."""
    threads = [[*_FRAME.finditer(text)] for text in re.split(r"^(?=(?:Current t|T)hread )", dump, flags=re.M)]
    main = [frames for frames in threads if frames and frames[-1]["function"] == "_run_module_as_main"]
    return (main or [frames for frames in threads if frames] or [[]])[-1]


def _place(dump: str) -> str:
    """`in all_reduce (trainers/distributed.py:45)`: what runs, and the line of ours that called it."""
    frames = _frames(dump)
    if not frames:
        return ""
    own = next(((m[1], f["line"]) for f in frames if (m := _OWN.search(f["file"]))), None)
    file, line = own or (frames[0]["file"].rsplit("/", 1)[-1], frames[0]["line"])
    return f"in {frames[0]['function']} ({file}:{line})"


def _waits(sight: Sight) -> bool:
    """Whether a worker waits for the others."""
    return any("/torch/distributed/" in frame["file"] for frame in _frames(sight.dump))
