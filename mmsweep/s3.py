"""Objects in an S3 bucket, or in any service that speaks S3 (AWS_ENDPOINT_URL says which).

Credentials, region and endpoint come from where boto3 looks for them: the environment, the shared
config files, the machine's role. Every failure becomes one line that says what to do.

No byte is taken on trust. A write counts when the service's ETag is the MD5 of what was sent, or
else when it reads back the same; every object carries its SHA-256, which every read compares.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import boto3
from boto3.s3.transfer import TransferConfig as CopyConfig
from botocore import exceptions as errors
from botocore.config import Config
from botocore.parsers import ResponseParserError
from s3transfer.manager import TransferConfig, TransferManager

from mmsweep.objects import (
    DamagedError,
    Entries,
    Entry,
    Keys,
    NotFound,
    StoreError,
    Upload,
    Uploads,
    check_key,
    replacing,
)

T = TypeVar("T")

ATTEMPTS = 6
"""Tries of one request, over some 15 s; AWS_MAX_ATTEMPTS overrides it."""
BODY_ATTEMPTS = 3
"""Tries to get a body across whole, in either direction, which boto3 does not repeat by itself."""
PART_BYTES = 16 * 2**20
"""Larger files go up in parts of this size: 10,000 of them, the most there may be, are 160 GB."""
PARTS_AT_ONCE = 4
COPY_BYTES = 5 * 2**30
"""The largest object that a service copies in one request, with its metadata."""
DIGEST = "sha256"
"""The metadata of an object that holds its digest, in hexadecimal."""

_CREDENTIALS = "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_EXPIRED = (
    "the credentials have expired; sign in again, or put new ones into ~/.aws/credentials "
    "(what runs takes them up by itself)"
)
_WRONG = f"the credentials are not valid there; {_CREDENTIALS}, and check AWS_ENDPOINT_URL"
_DENIED = (
    "access denied; give these credentials s3:ListBucket on the bucket and "
    "s3:GetObject, s3:PutObject and s3:DeleteObject below the prefix"
)
_BUSY = "the service is failing or overloaded; try again later"
_CLOCK = "the service refuses this machine's time; set its clock"
_REGION = "the bucket is in another region; set AWS_REGION to it"
_UPLOADS = (
    "access denied; to see and remove uploads that were cut off, these credentials need "
    "s3:ListBucketMultipartUploads on the bucket and s3:AbortMultipartUpload below the prefix"
)

_BY_CODE = {
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "403": _DENIED,
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidAccessKeyId": _WRONG,
    "SignatureDoesNotMatch": _WRONG,
    "InvalidToken": _WRONG,
    "RequestExpired": _CLOCK,
    "RequestTimeTooSkewed": _CLOCK,
    "SlowDown": _BUSY,
    "ServiceUnavailable": _BUSY,
    "InternalError": _BUSY,
    "500": _BUSY,
    "503": _BUSY,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
}
_STALE = {code for code, words in _BY_CODE.items() if words in (_EXPIRED, _WRONG)}
"""Answers that other credentials may not get."""
_REPLACED = ("PreconditionFailed", "412")
"""The object has been replaced since a request before this one."""
_NO_CREDENTIALS = (errors.NoCredentialsError, errors.PartialCredentialsError, errors.CredentialRetrievalError)
_NOT_SIGNED_IN = (errors.SSOError, errors.LoginError, errors.TokenRetrievalError, errors.NoAuthTokenError)
_UNREACHABLE = (errors.HTTPClientError, errors.ConnectionError, errors.IncompleteReadError)
_GARBLED = (
    errors.IncompleteReadError,
    errors.ResponseStreamingError,
    errors.FlexibleChecksumError,
    ResponseParserError,
)
"""An answer has not arrived whole, or makes no sense."""
_CUT_OFF = (errors.IncompleteReadError, errors.ResponseStreamingError, errors.ReadTimeoutError)


class _Changed(Exception):  # noqa: N818 (never leaves this file)
    """What arrived is not what was sent."""


@dataclass(frozen=True, slots=True)
class _Digests:
    sha256: str
    etag: str
    """As S3 computes it: MD5, or MD5 of the MD5s of the parts."""


class S3Store:
    """Objects below `prefix` in `bucket`. The client is made at the first request, in any thread."""

    def __init__(self, bucket: str, prefix: str = "", client: Any = None) -> None:
        """`client`: an S3 client of boto3; it is then kept, whatever becomes of its credentials."""
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._made = client
        self._given = client is not None
        self._keys: Any = None
        self._lock = threading.Lock()
        self._etags_are_digests = True
        """False once an ETag was something else: with KMS encryption, and in some services, it is."""

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    # The client, and what becomes of its requests

    @property
    def client(self) -> Any:
        with self._lock:
            if self._made is None:
                self._connect(boto3.Session())
            return self._made

    def _connect(self, session: boto3.Session) -> None:
        attempts = int(os.environ.get("AWS_MAX_ATTEMPTS", ATTEMPTS))
        config = Config(
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=32,
        )
        self._made = session.client("s3", config=config)
        self._keys = _keys(session)

    def _renewed(self, client: Any) -> bool:
        """Whether there are other credentials by now than those of `client`; they are then used.

        A session of boto3 reads the credentials file once.
        """
        with self._lock:
            if self._given or self._made is not client:
                return self._made is not client  # another thread has seen to it
            try:
                session = boto3.Session()
                keys = _keys(session)
                if keys is None or keys == self._keys:
                    return False
                self._connect(session)
            except errors.BotoCoreError:  # a file that is being written
                return False
            return True

    def _ask(self, key: str, request: Callable[[Any], T]) -> T:
        """What `request` makes of the client. It may be called several times, so it must be repeatable.

        Raises:
            NotFound: there is no such object.
            DamagedError: what arrives is not what was written, every time.
            StoreError: anything else.
        """
        attempt, client = 0, None
        while True:
            attempt += 1
            try:
                client = self.client
                return request(client)
            except errors.ClientError as error:
                if (code := _code(error)) in ("NoSuchKey", "404", "NotFound"):
                    raise NotFound(f"{self.url}/{key}") from None
                again = code in _REPLACED or (code in _STALE and self._renewed(client))
                failure: Exception = error
            except _NO_CREDENTIALS as error:
                again, failure = self._renewed(client), error
            except (*_GARBLED, _Changed) as error:
                again, failure = True, error
            except (errors.BotoCoreError, ValueError) as error:
                again, failure = False, error
            if not again or attempt == BODY_ATTEMPTS:
                raise self._explained(key, failure) from failure

    def _explained(self, key: str, failure: Exception) -> StoreError:
        if isinstance(failure, _Changed):
            return DamagedError(f"{self.url}/{key}: damaged ({failure}); move it away")
        if isinstance(failure, errors.ClientError):
            return StoreError(f"{self.url}: {self._refusal(failure)}")
        return StoreError(f"{self.url}: {self._failure(failure)}")

    def _refusal(self, error: errors.ClientError) -> str:
        """The service has answered with an error."""
        code = _code(error)
        if code == "NoSuchBucket":
            return f"there is no such bucket; create it (aws s3 mb s3://{self.bucket}) or correct the URL"
        if code in _BY_CODE:
            return f"{_BY_CODE[code]} ({code})"
        return _one_line(error)

    def _failure(self, error: Exception) -> str:
        """There was no answer, or no request."""
        if isinstance(error, _NO_CREDENTIALS):
            return f"no credentials ({_one_line(error)}); {_CREDENTIALS}, or give the machine a role"
        if isinstance(error, _NOT_SIGNED_IN):
            return f"not signed in ({_one_line(error)}); run `aws sso login`"
        # Not asked of the client, which may be what could not be made.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        if isinstance(error, _GARBLED):
            return f"answers of {endpoint} arrive damaged ({_one_line(error)}); check the network"
        if isinstance(error, _UNREACHABLE):
            return f"{endpoint} does not answer ({_one_line(error)}); check AWS_ENDPOINT_URL and the network"
        return f"{_one_line(error)}; check the AWS_… environment variables and ~/.aws/config"

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + check_key(key)}

    # Objects

    def get(self, key: str) -> bytes:
        place = self._at(key)

        def fetch(client: Any) -> bytes:
            answer = client.get_object(**place)
            data = bytes(answer["Body"].read())
            _compare(hashlib.sha256(data).hexdigest(), answer)
            return data

        return self._ask(key, fetch)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start` on. No digest covers a part. Raises `NotFound`."""
        place = self._at(key) | {"Range": f"bytes={start}-{start + length - 1}"}
        return self._ask(key, lambda client: bytes(client.get_object(**place)["Body"].read()))

    def put(self, key: str, data: bytes) -> None:
        place, digests = self._at(key), _digests([data])

        def send(client: Any) -> None:
            answer = client.put_object(**place, Body=data, Metadata={DIGEST: digests.sha256})
            self._check_arrival(client, place, answer["ETag"], digests)

        self._send(key, send)

    def get_file(self, key: str, path: Path) -> None:
        place = self._at(key)

        def fetch(client: Any) -> None:
            answer = client.get_object(**place)
            digest = hashlib.sha256()
            with replacing(path) as file:
                for block in _body(client, place, answer):
                    digest.update(block)
                    file.write(block)
                _compare(digest.hexdigest(), answer)

        self._ask(key, fetch)

    def put_file(self, key: str, path: Path) -> None:
        if path.stat().st_size <= PART_BYTES:
            self.put(key, path.read_bytes())
            return
        place = self._at(key)
        digests = _digests(_blocks(path))

        def send(client: Any) -> None:
            try:
                with TransferManager(client, _transfer_config()) as manager:
                    extra = {"Metadata": {DIGEST: digests.sha256}}
                    manager.upload(str(path), place["Bucket"], place["Key"], extra_args=extra).result()
            except errors.ClientError as error:
                # A repeated request to complete the upload, where the answer to the first was lost.
                if _code(error) != "NoSuchUpload":
                    raise
            found = self._listed(client, place)
            if found is None:
                raise _Changed("nothing has arrived")
            self._check_arrival(client, place, found["ETag"], digests)

        self._send(key, send)

    def _send(self, key: str, send: Callable[[Any], None]) -> None:
        try:
            self._ask(key, send)
        except NotFound as error:
            raise StoreError(f"{error}, just after it was written; try again") from None
        except DamagedError as error:  # the next try may fare better; the file here is whole
            fix = "check the network; an old service may need AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
            raise StoreError(f"{self.url}/{key}: does not arrive as it was sent; {fix}") from error

    def _check_arrival(self, client: Any, place: dict[str, str], etag: str, sent: _Digests) -> None:
        """Raises `_Changed` if the service holds something else than what was sent."""
        if etag.strip('"') == sent.etag or not self._etags_are_digests:
            return
        digest = hashlib.sha256()
        try:
            for block in _body(client, place, client.get_object(**place)):
                digest.update(block)
        except errors.FlexibleChecksumError as error:
            raise _Changed(_one_line(error)) from None
        if digest.hexdigest() != sent.sha256:
            raise _Changed("it reads back differently")
        self._etags_are_digests = False  # from here on the service's own checksums have to do

    def list(self, prefix: str) -> Keys:
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> Entries:
        folder = self._folder(prefix)

        def look(client: Any) -> Entries:
            return [
                Entry(item["Key"].removeprefix(self.prefix), item["Size"], item["LastModified"].timestamp())
                for page in _pages(client, "list_objects_v2", Bucket=self.bucket, Prefix=folder)
                for item in page.get("Contents", ())
                if not item["Key"].endswith("/")  # consoles make these to stand for folders
            ]

        return sorted(self._ask(prefix, look), key=lambda entry: entry.key)

    def time(self) -> float:
        def look(client: Any) -> Any:
            return client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)

        date = self._ask("", look)["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(date).timestamp() if date else time.time()

    def children(self, prefix: str) -> Keys:
        folder = self._folder(prefix)

        def look(client: Any) -> set[str]:
            names: set[str] = set()
            for page in _pages(client, "list_objects_v2", Bucket=self.bucket, Prefix=folder, Delimiter="/"):
                names.update(item["Prefix"] for item in page.get("CommonPrefixes", ()))
                names.update(item["Key"] for item in page.get("Contents", ()))
            return names

        return sorted({name.removeprefix(folder).rstrip("/") for name in self._ask(prefix, look)} - {""})

    def _folder(self, prefix: str) -> str:
        return f"{self.prefix}{check_key(prefix.rstrip('/'))}/" if prefix else self.prefix

    def exists(self, key: str) -> bool:
        place = self._at(key)
        return self._ask(key, lambda client: self._listed(client, place)) is not None

    def _listed(self, client: Any, place: dict[str, str]) -> Any:
        """An object in a listing, or None. Unlike HEAD, this tells a missing bucket from a missing object."""
        # The key comes first among those that begin with it.
        page = client.list_objects_v2(Bucket=place["Bucket"], Prefix=place["Key"], MaxKeys=1)
        return next((item for item in page.get("Contents", ()) if item["Key"] == place["Key"]), None)

    def delete(self, key: str) -> None:
        place = self._at(key)
        self._ask(key, lambda client: client.delete_object(**place))

    def move(self, key: str, to: str) -> None:
        source, target = self._at(key), self._at(to)
        config = CopyConfig(multipart_threshold=COPY_BYTES)

        def move(client: Any) -> None:
            client.copy(source, **target, Config=config)
            client.delete_object(**source)

        self._ask(key, move)

    # Uploads in parts that were cut off

    def unfinished(self) -> Uploads:
        def look(client: Any) -> Uploads:
            return [
                Upload(item["Key"].removeprefix(self.prefix), item["UploadId"], item["Initiated"].timestamp())
                for page in _pages(client, "list_multipart_uploads", Bucket=self.bucket, Prefix=self.prefix)
                for item in page.get("Uploads", ())
            ]

        return sorted(self._about_uploads(look), key=lambda upload: (upload.key, upload.begun))

    def discard(self, upload: Upload) -> None:
        place = self._at(upload.key)

        def abort(client: Any) -> None:
            try:
                client.abort_multipart_upload(**place, UploadId=upload.id)
            except errors.ClientError as error:
                if _code(error) != "NoSuchUpload":
                    raise

        self._about_uploads(abort)

    def _about_uploads(self, request: Callable[[Any], T]) -> T:
        try:
            return self._ask("", request)
        except StoreError as error:
            raise StoreError(str(error).replace(_DENIED, _UPLOADS)) from error


def _keys(session: boto3.Session) -> Any:
    """The credentials of a session, to compare; None where there are none."""
    credentials = session.get_credentials()
    return credentials and credentials.get_frozen_credentials()


def _transfer_config() -> TransferConfig:
    return TransferConfig(
        multipart_threshold=PART_BYTES,
        multipart_chunksize=PART_BYTES,
        max_request_concurrency=PARTS_AT_ONCE,
    )


def _pages(client: Any, operation: str, **arguments: str) -> Iterator[Any]:
    return iter(client.get_paginator(operation).paginate(**arguments))


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(PART_BYTES):
            yield block


def _digests(blocks: Iterator[bytes] | list[bytes]) -> _Digests:
    """Of an object that is sent in these parts."""
    whole, parts = hashlib.sha256(), []
    for block in blocks:
        whole.update(block)
        parts.append(hashlib.md5(block, usedforsecurity=False))
    if len(parts) == 1:
        return _Digests(whole.hexdigest(), parts[0].hexdigest())
    together = hashlib.md5(b"".join(part.digest() for part in parts), usedforsecurity=False)
    return _Digests(whole.hexdigest(), f"{together.hexdigest()}-{len(parts)}")


def _body(client: Any, place: dict[str, str], answer: Any) -> Iterator[bytes]:
    """The body of an answer; where it breaks off, the rest of it is asked for."""
    first, seen, failures = answer, 0, 0
    while True:
        try:
            for block in answer["Body"].iter_chunks(1 << 18):
                seen, failures = seen + len(block), 0
                yield block
            return
        except _CUT_OFF:
            failures += 1
            if failures == BODY_ATTEMPTS:
                raise
        answer = client.get_object(**place, Range=f"bytes={seen}-", IfMatch=first["ETag"])


def _compare(digest: str, answer: Any) -> None:
    """Raises `_Changed` if an object carries another digest. One that mmsweep did not write has none."""
    written = answer.get("Metadata", {}).get(DIGEST)
    if written is not None and written != digest:
        raise _Changed(f"its SHA-256 is {digest[:12]}…, and was {written[:12]}… when it was written")


def _code(error: errors.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
