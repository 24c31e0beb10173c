"""Checks of a store: each right that a sweep needs, what the service honours, its clock."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from mmsweep.cluster import is_loopback
from mmsweep.doctor.findings import PROBES, Finding, Findings, guarded
from mmsweep.objects import DirectoryStore, NotFound, ObjectStore, StoreError

CLOCK_WARNING_S, CLOCK_PROBLEM_S = 30.0, 600.0
"""S3 refuses requests signed more than 15 minutes off."""
NOT_NEEDED = "nothing to do: no sweep depends on it"
CHECKED_ANYWAY = "nothing to do: mmsweep compares what has arrived"
RACERS, RACE = 8, "-race"
CREATED, REFUSED = 200, 412
WRONG_CRC32 = "AAAAAA=="
WRONG_CRC32 = "AAAAAA=="
DIGEST = "sha256"  # mmsweep.s3.DIGEST; importing it would load boto3


def check_store(objects: ObjectStore, *, service: bool = True) -> Findings:
    """Each right that a sweep needs, tried on one object; then what is good to know, and the clock.

    `service`: also what the service does, which is the same wherever it is asked from.
    """
    key = f"{PROBES}/{uuid.uuid4().hex}"
    first, second = uuid.uuid4().bytes, uuid.uuid4().bytes
    try:
        objects.put(key, first)
    except (StoreError, NotFound) as error:
        yield Finding("problem", "store", f"writing: {error}")
        return

    def overwrites() -> bool:
        objects.put(key, second)
        return objects.get(key) == second

    rights: dict[str, Callable[[], bool]] = {
        "reading": lambda: objects.get(key) == first,
        "listing": lambda: key in objects.list(PROBES),
        "overwriting": overwrites,
    }
    good = ["writing"]
    for right, works in rights.items():
        try:
            if works():
                good.append(right)
            else:
                fix = "this is no store for a sweep: what was written must be there at once"
                yield Finding("problem", "store", f"{objects.url}: {right}: not what was just written", fix)
        except (StoreError, NotFound) as error:
            yield Finding("problem", "store", f"{right}: {error}")
    more = list(guarded("clock", lambda: _clock(objects, key)))
    if service:
        more[:0] = [
            *guarded("store", lambda: _conditional(objects, key)),
            *guarded("store", lambda: _integrity(objects, key)),
            *guarded("store", lambda: _encryption(objects)),
        ]
    try:
        for probe in (key, key + RACE):
            objects.delete(probe)
        if objects.exists(key):
            fix = f"remove {PROBES}/ yourself, and give these credentials the right to delete"
            yield Finding("problem", "store", f"{objects.url}: deleting: the object is still there", fix)
        else:
            good.append("deleting")
    except StoreError as error:
        yield Finding("problem", "store", f"deleting ({key} stays there): {error}")
    if len(good) == 1 + len(rights) + 1:
        yield Finding("ok", "store", f"{objects.url}: {', '.join(good)}")
    yield from more


def _conditional(objects: ObjectStore, key: str) -> Findings:
    """Whether "write unless it is there" refuses where it is there, also when several try at once.

    Nothing depends on it: leases are made for stores that have no such thing.
    """
    fresh = key + RACE
    create = _create_file if isinstance(objects, DirectoryStore) else _create_object
    again = create(objects, key)
    with ThreadPoolExecutor(RACERS) as pool:
        answers = list(pool.map(lambda _: create(objects, fresh), range(RACERS)))
    won = answers.count(CREATED)
    if again not in (CREATED, REFUSED):
        yield Finding("warning", "store", f"answers If-None-Match with {again}", NOT_NEEDED)
    elif again == CREATED:
        yield Finding("warning", "store", "ignores If-None-Match: creates an object twice", NOT_NEEDED)
    elif won != 1:
        what = f"honours If-None-Match, and yet of {RACERS} at once {won} create the same object"
        yield Finding("warning", "store", what, NOT_NEEDED)
    else:
        what = f"creates an object once (If-None-Match), also when {RACERS} try at once"
        yield Finding("ok", "store", what)


def _create_file(objects: Any, key: str) -> int:
    try:
        (objects.root / key).open("xb").close()
    except FileExistsError:
        return REFUSED
    return CREATED


def _create_object(objects: Any, key: str) -> int:
    return _s3_put(objects, key, IfNoneMatch="*")[0]


def _integrity(objects: ObjectStore, key: str) -> Findings:
    """What the service does against damage on the way, beside what mmsweep does itself."""
    if isinstance(objects, DirectoryStore):
        return
    status, _ = _s3_put(objects, key, ChecksumCRC32=WRONG_CRC32)
    objects.put(key, b"with a digest")
    answer = objects.client.get_object(Bucket=objects.bucket, Key=objects.prefix + key)  # type: ignore[attr-defined]
    if DIGEST not in answer["Metadata"]:
        what = "drops the metadata of objects, and with it their digests"
        yield Finding("warning", "store", what, "use https, so that nothing is damaged on the way")
    elif status == 200:
        yield Finding("warning", "store", "takes a write whose checksum is wrong", CHECKED_ANYWAY)
    else:
        yield Finding("ok", "store", "keeps digests, and refuses a write whose checksum is wrong")
    try:
        objects.unfinished()
    except StoreError as error:
        fix = "without it `mmsweep store gc` leaves them, and they are paid for"
        yield Finding("warning", "store", f"uploads that were cut off: {error}", fix)


def _encryption(objects: ObjectStore) -> Findings:
    """Whether others on the way can read what is stored."""
    if isinstance(objects, DirectoryStore):
        return
    endpoint = objects.client.meta.endpoint_url  # type: ignore[attr-defined]
    parts = urlsplit(endpoint)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        what = f"{endpoint}: requests are signed, but all that is stored can be read on the way"
        yield Finding("warning", "store", what, "use https, or keep it in a private network")


def _clock(objects: ObjectStore, key: str) -> Findings:
    """This machine's clock against the store's: the Date of an answer, or the time of a file."""
    before = time.time()
    if isinstance(objects, DirectoryStore):
        objects.put(key, b"clock")
        stored, resolution = (objects.root / key).stat().st_mtime, 0.1
    else:
        _, date = _s3_put(objects, key)
        if date is None:
            yield Finding("warning", "clock", "the store's answers carry no date", "check the clock by hand")
            return
        stored, resolution = parsedate_to_datetime(date).timestamp(), 1.0
    after = time.time()
    skew = max(before - stored - resolution, stored - after, 0.0) * (1 if stored > after else -1)
    what = f"this machine's clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the store's"
    if abs(skew) > CLOCK_PROBLEM_S:
        yield Finding("problem", "clock", what, "set it: timedatectl set-ntp true")
    elif abs(skew) > CLOCK_WARNING_S:
        yield Finding("warning", "clock", what, "set it: timedatectl set-ntp true")
    else:
        yield Finding("ok", "clock", "agrees with the store's")


def _s3_put(objects: Any, key: str, **conditions: str) -> tuple[int, str | None]:
    """Status and Date header of one PUT, which `ObjectStore` does not show."""
    from botocore.exceptions import ClientError

    try:
        answer = objects.client.put_object(
            Bucket=objects.bucket, Key=objects.prefix + key, Body=b"probe", **conditions
        )
    except ClientError as error:
        answer = error.response
    facts = answer["ResponseMetadata"]
    return int(facts["HTTPStatusCode"]), facts["HTTPHeaders"].get("date")
