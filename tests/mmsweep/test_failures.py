"""What went wrong, from exit codes, logs and stacks, and what follows from it."""

from __future__ import annotations

import faulthandler
import math
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsweep import failures
from mmsweep.failures import (
    BAD_INPUT,
    CRASH,
    DEVICE,
    HANG,
    KEPT,
    KILLED,
    LOST,
    OOM,
    PREEMPTED,
    Cause,
    Failure,
    Sight,
    decide,
    explain,
    history,
    hung,
    log_tail,
    lost,
    same_error,
    to_json,
)
from mmsweep.workers import EXIT_BAD_INPUT, EXIT_NO_DEVICE, EXIT_STOPPED
from trainers import records, train

KINDS = (CRASH, HANG, OOM, KILLED, BAD_INPUT, PREEMPTED, LOST, DEVICE)


def failure(kind: str, reason: str = "why", attempt: int = 1) -> Failure:
    return Failure(attempt, kind, reason, 40, "paper-1", "node-3", 1e9)


# --- budgets --------------------------------------------------------------------------------------


def tried_until_given_up(kinds: Sequence[str], max_failures: int, max_preemptions: int) -> tuple[int, str]:
    """Failures that one launch sees of an endless row of `kinds`, no two errors alike; and the status."""
    seen: list[Failure] = []
    while True:
        number = len(seen)
        seen.append(failure(kinds[number % len(kinds)], reason=f"error {'x' * number}", attempt=number))
        decision = decide(seen, max_failures=max_failures, max_preemptions=max_preemptions)
        assert decision.retry == (decision.status == records.PENDING)
        if not decision.retry:
            return len(seen), decision.status


@pytest.mark.parametrize(
    ("kinds", "seen", "status"),
    [
        ((BAD_INPUT,), 1, records.FAILED),
        ((OOM,), 2, records.OOM),
        ((CRASH,), 3, records.FAILED),
        ((HANG,), 3, records.FAILED),
        ((KILLED,), 3, records.FAILED),
        ((CRASH, HANG, KILLED), 3, records.FAILED),
        ((PREEMPTED,), 6, records.FAILED),
        ((LOST, PREEMPTED, DEVICE), 6, records.FAILED),
        ((DEVICE,), 6, records.FAILED),  # always the same words, and yet no poison
        ((PREEMPTED, CRASH), 6, records.FAILED),  # the third crash, after three preemptions
        ((PREEMPTED, PREEMPTED, OOM), 6, records.OOM),
        ((CRASH, OOM), 4, records.OOM),
        ((CRASH, BAD_INPUT), 2, records.FAILED),
    ],
)
def test_how_often_a_run_is_tried(kinds, seen, status):
    assert tried_until_given_up(kinds, max_failures=2, max_preemptions=5) == (seen, status)


@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=60),
    st.integers(0, 6),
    st.integers(0, 6),
)
def test_a_run_goes_on_exactly_while_no_budget_is_spent(kinds, max_failures, max_preemptions):
    seen = [failure(kind, reason="x" * k) for k, kind in enumerate(kinds)]
    decision = decide(seen, max_failures=max_failures, max_preemptions=max_preemptions)
    own = len([kind for kind in kinds if kind in (CRASH, HANG, KILLED)])
    losses = len([kind for kind in kinds if kind in (PREEMPTED, LOST, DEVICE)])
    goes_on = {
        BAD_INPUT: False,
        OOM: kinds.count(OOM) == 1,
        PREEMPTED: losses <= max_preemptions,
        LOST: losses <= max_preemptions,
        DEVICE: losses <= max_preemptions,
    }.get(kinds[-1], own <= max_failures)
    assert decision.retry == goes_on
    assert decision.status in records.STATUSES
    assert 0 <= decision.wait_s <= 60
    if kinds[-1] in (PREEMPTED, LOST, DEVICE) or not goes_on:
        assert decision.wait_s == 0


def test_retries_wait_longer_each_time():
    seen, waits = [], []
    for number in range(10):
        seen.append(failure(CRASH, reason="x" * number))
        waits.append(decide(seen, max_failures=99, max_preemptions=0).wait_s)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert math.isclose(decide([failure(OOM)], max_failures=0, max_preemptions=0).wait_s, 1)


def test_the_reason_says_what_happened_and_which_try_comes():
    seen = [failure(CRASH, "RuntimeError: no such thing")]
    said = decide(seen, max_failures=2, max_preemptions=0).reason
    assert said == "crashed at step 40 (RuntimeError: no such thing); try 2 of 3"
    seen.append(failure(KILLED, "rank 1 got SIGKILL from outside"))
    said = decide(seen, max_failures=2, max_preemptions=0).reason
    assert said == "killed at step 40 (rank 1 got SIGKILL from outside); try 3 of 3"
    seen.append(failure(HANG, "no record for 15:00 after step 40; rank 0 is in f (trainers/a.py:1)"))
    said = decide(seen, max_failures=2, max_preemptions=0).reason
    assert said.endswith("rank 0 is in f (trainers/a.py:1); that was try 3 of 3")


# --- the same error -------------------------------------------------------------------------------

ERRORS = [
    (
        "RuntimeError: [../gloo/transport/tcp/pair.cc:553] bad magic from [127.0.0.1]:37261",
        "RuntimeError: [../gloo/transport/tcp/pair.cc:553] bad magic from [127.0.0.1]:4711",
    ),
    ("ValueError: <object at 0x7f2a8e9a4400>", "ValueError: <object at 0x55d0>"),
    (
        "OSError: [Errno 28] No space left: '/tmp/mmsweep-a-s1-0123abcd-x1y2z3/checkpoints/.saving-12'",
        "OSError: [Errno 28] No space left: '/tmp/mmsweep-a-s1-0123abcd-abc_9d/checkpoints/.saving-40'",
    ),
    ("rank 1 died of SIGSEGV: no output", "rank 0 died of SIGSEGV: no output"),
    ("RuntimeError: process 12 (pid=34) at 12:03:11.5", "RuntimeError: process 9 (pid=8) at 9:59:00"),
    ("TimeoutError: since 2026-11-22 12:03:11", "TimeoutError: since 2026-11-23T01:00:59"),
]


@pytest.mark.parametrize(("one", "other"), ERRORS)
def test_what_changes_from_process_to_process_makes_no_other_error(one, other):
    assert same_error(failure(CRASH, one), failure(CRASH, other))
    decision = decide(
        [failure(CRASH, one), failure(HANG), failure(CRASH, other)], max_failures=9, max_preemptions=0
    )
    assert (decision.status, decision.reason) == (records.QUARANTINED, f"twice the same error: {other}")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("KeyError: 'wte'", "KeyError: 'wpe'"),
        ("ValueError: 3 heads", "ValueError: 4 heads"),
        ("RuntimeError: mat1 and mat2 (4x16)", "RuntimeError: mat1 and mat2 (8x16)"),
        ("ValueError: layer 1", "IndexError: layer 1"),
        ("OSError: [Errno 5] /data/a/x.bin", "OSError: [Errno 5] /data/b/x.bin"),
    ],
)
def test_other_errors_are_others(one, other):
    assert not same_error(failure(CRASH, one), failure(CRASH, other))


@given(st.sampled_from([HANG, KILLED, OOM, PREEMPTED, LOST]), st.text(max_size=20))
def test_only_crashes_are_poison(kind, reason):
    assert not same_error(failure(kind, reason), failure(kind, reason))


@given(st.text(max_size=60), st.integers(1, 65535), st.integers(1, 65535))
def test_an_error_is_the_same_at_another_port(text, one, other):
    errors = [failure(CRASH, f"{text} from 10.0.0.7:{port}") for port in (one, other)]
    assert same_error(*errors)


# --- history --------------------------------------------------------------------------------------


def test_the_newest_failures_are_remembered():
    many = [failure(CRASH, attempt=number) for number in range(1, 31)]
    read = history({"failures": to_json(many)})
    assert read == many[-KEPT:]
    assert len(read) == 20


@pytest.mark.parametrize("damaged", [[{}], [{"attempt": "x"}], "no list", [1], None])
def test_a_history_that_does_not_read_is_none(damaged):
    assert history({"failures": damaged}) == []
    assert history({}) == []


def test_an_attempt_without_a_last_word_is_lost():
    status = {"status": records.RUNNING, "attempt": 3, "step": 12, "launch": "paper-1", "host": "node-3"}
    reason = "no last word from node-3 after step 12"
    assert lost(status, now=5.0) == Failure(3, LOST, reason, 12, "paper-1", "node-3", 5.0)
    for ended in (*(set(records.STATUSES) - {records.RUNNING}), None):
        assert lost({**status, "status": ended}, now=5.0) is None


# --- exit codes and logs --------------------------------------------------------------------------

TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n'
CRASHED = TRACEBACK + "ValueError: no such head\n"
PEER = TRACEBACK + "[rank0]: RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:37261\n"
WAITED = TRACEBACK + "RuntimeError: [unbound_buffer.cc:81] Timed out waiting 600000ms for recv operation\n"
NCCL = (
    "[rank0]: [E ProcessGroupNCCL.cpp:632] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)\n"
    "terminate called after throwing an instance of 'c10::DistBackendError'\n"
    "  what():  [PG ID 0] Process group watchdog thread terminated with exception\n"
)
BROKEN = "[rank1]: RuntimeError: CUDA error: uncorrectable ECC error encountered\n"
GONE = "n3: CUDA_VISIBLE_DEVICES names 1 GPU and torch finds none; mend that machine\n"
CUDA = TRACEBACK + "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9.00 GiB.\n"


@pytest.mark.parametrize(
    ("codes", "logs", "cause"),
    [
        ({0: 1}, {0: CRASHED}, Cause(CRASH, "ValueError: no such head", 0)),
        # Who lost another one did not fail itself.
        ({0: 1, 1: 1}, {0: PEER, 1: CRASHED}, Cause(CRASH, "ValueError: no such head", 1)),
        ({0: 1, 1: None}, {0: WAITED, 1: ""}, Cause(HANG, WAITED.splitlines()[-1], 0)),
        ({0: 1, 1: -9}, {0: PEER, 1: ""}, Cause(KILLED, "rank 1 got SIGKILL from outside", 1)),
        ({0: -15, 1: 75}, {}, Cause(KILLED, "rank 0 got SIGTERM from outside", 0)),
        ({0: 1, 1: None}, {0: PEER}, Cause(KILLED, PEER.splitlines()[-1].removeprefix("[rank0]: "), 0)),
        ({0: 1, 1: 1}, {0: PEER, 1: CUDA}, Cause(OOM, CUDA.splitlines()[-1].removeprefix("[rank1]: "), 1)),
        ({0: 69, 1: 1}, {0: GONE, 1: PEER}, Cause(DEVICE, GONE.strip(), 0)),
        (
            {0: 1, 1: -6},
            {0: PEER, 1: TRACEBACK + BROKEN},
            Cause(DEVICE, BROKEN.strip().removeprefix("[rank1]: "), 1),
        ),
        (
            {0: -6},
            {0: "terminate called\n  what():  std::bad_alloc\n"},
            Cause(OOM, "what(): std::bad_alloc", 0),
        ),
        ({0: 2}, {0: "run.yaml:3: no such key\n"}, Cause(BAD_INPUT, "run.yaml:3: no such key", 0)),
        ({0: 1, 1: 2}, {0: PEER, 1: "bad\n"}, Cause(BAD_INPUT, "bad", 1)),
        ({0: -11}, {0: "last words\n"}, Cause(CRASH, "rank 0 died of SIGSEGV: last words", 0)),
        ({0: -6, 1: None}, {0: NCCL}, Cause(HANG, NCCL.splitlines()[0].removeprefix("[rank0]: "), 0)),
        ({0: 1}, {}, Cause(CRASH, "exit code 1 without a word", 0)),
        ({0: 75, 1: 75}, {}, Cause(PREEMPTED, "its workers were told to stop from outside", 0)),
        ({0: 1}, {0: CRASHED + "[W socket.cpp] a warning\n"}, Cause(CRASH, "ValueError: no such head", 0)),
    ],
)
def test_why_workers_ended(codes, logs, cause):
    assert (EXIT_BAD_INPUT, EXIT_NO_DEVICE, EXIT_STOPPED) == (2, train.EXIT_NO_DEVICE, train.EXIT_STOPPED)
    assert explain(codes, logs, oom_killed=False) == cause


def test_the_kernel_s_kill_is_a_lack_of_memory():
    assert explain({0: -signal.SIGKILL}, {}, oom_killed=True).kind == OOM
    assert explain({0: -signal.SIGSEGV}, {}, oom_killed=True).kind == CRASH


@given(
    st.dictionaries(st.integers(0, 3), st.sampled_from([None, 0, 1, 2, 69, 75, -6, -9, -15, -64]), min_size=1)
)
def test_every_bad_end_has_a_cause(codes):
    if any(codes.values()):
        cause = explain(codes, dict.fromkeys(codes, CRASHED), oom_killed=False)
        assert cause.kind in KINDS
        assert codes[cause.rank] or cause.kind == PREEMPTED
        assert cause.reason


def test_a_reason_is_one_line_of_bounded_length():
    long = explain({0: 1}, {0: "ValueError: " + "x" * 9999}, oom_killed=False)
    assert len(long.reason) == 500
    assert "\n" not in long.reason


# --- stacks ---------------------------------------------------------------------------------------

MAIN = '  File "<frozen runpy>", line 198 in _run_module_as_main\n'
OTHERS = 'Thread 0x00007f01 (most recent call first):\n  File "/lib/threading.py", line 324 in wait\n\n'
REDUCES = (
    OTHERS + "Current thread 0x00007f00 (most recent call first):\n"
    '  File "/site-packages/torch/distributed/distributed_c10d.py", line 2810 in all_reduce\n'
    '  File "/site-packages/torch/distributed/c10d_logger.py", line 81 in wrapper\n'
    '  File "/opt/trainers/distributed.py", line 44 in sum_\n'
    '  File "/opt/trainers/train.py", line 300 in _loop\n' + MAIN
)
READS = (
    OTHERS + "Current thread 0x00007f00 (most recent call first):\n"
    '  File "/lib/numpy/memmap.py", line 9 in read\n'
    '  File "/opt/trainers/batches.py", line 7 in batch\n' + MAIN
)
ASKED_ELSEWHERE = READS.replace("Current thread", "Thread").replace(OTHERS, "") + OTHERS.replace(
    "Thread", "\nCurrent thread"
)
"""Another thread than the main one took the signal."""


@pytest.mark.parametrize(
    ("sights", "rank", "said"),
    [
        ({0: REDUCES, 1: REDUCES, 2: READS}, 2, "in read (trainers/batches.py:7)"),
        ({0: REDUCES, 1: READS, 2: READS}, 0, "in all_reduce (trainers/distributed.py:44)"),
        ({0: REDUCES, 1: READS}, 1, "in read (trainers/batches.py:7)"),  # the other waits
        ({0: REDUCES, 1: REDUCES}, 0, "in all_reduce (trainers/distributed.py:44)"),
        ({0: REDUCES, 1: ("T", "")}, 1, "stopped by a signal (SIGSTOP)"),
        ({0: REDUCES, 1: ("T", ""), 2: ("T", "")}, 1, "stopped by a signal (SIGSTOP)"),
        ({0: ASKED_ELSEWHERE}, 0, "in read (trainers/batches.py:7)"),
        (
            {0: REDUCES, 1: ("D", "nfs_wait")},
            1,
            "in a call to the kernel that does not return, in nfs_wait of the kernel",
        ),
        (
            {0: ("S", "futex_wait"), 1: READS},
            0,
            "silent: no answer to SIGUSR1 (state S, in futex_wait of the kernel)",
        ),
    ],
)
def test_who_keeps_the_others_waiting(sights, rank, said):
    seen = [
        Sight(rank, *one) if isinstance(one, tuple) else Sight(rank, "S", "futex_wait", one)
        for rank, one in sights.items()
    ]
    assert hung(seen) == Cause(HANG, f"rank {rank} is {said}", rank)


def test_a_real_dump_names_this_line():
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=False)
        file.seek(0)
        dump = file.read()
    assert str(Sight(0, "R", "", dump)).startswith("in test_a_real_dump_names_this_line (test_failures.py:")


def test_of_stacks_at_the_end_of_a_log_the_innermost_frames_are_shown():
    deep = READS.replace(MAIN, '  File "/opt/trainers/train.py", line 300 in _loop\n' * 20 + MAIN)
    tail = log_tail("step 40\n" + deep)
    assert len(tail) == failures.LOG_TAIL_LINES
    assert tail[1].endswith("in read")
    assert log_tail(deep + "\n\n  \nlast words\n")[-1] == "last words"
    assert log_tail("") == []


def test_a_failure_is_read_back_as_it_was():
    one = failure(CRASH, "ValueError: “é” \ud7ff")
    assert history({"failures": to_json([one, replace(one, attempt=2)])}) == [one, replace(one, attempt=2)]
