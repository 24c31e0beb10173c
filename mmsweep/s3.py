"""Objects in an S3 bucket, or in any service that speaks S3 (AWS_ENDPOINT_URL says which).

Credentials, region and endpoint come from where boto3 looks for them: the environment, the shared
config files, the machine's role. Every failure becomes one line that says what to do.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore import exceptions as errors
from botocore.config import Config
from s3transfer.exceptions import RetriesExceededError

from mmsweep.objects import Entries, Entry, Keys, NotFound, StoreError, check_key, replacing

ATTEMPTS = 6
"""Tries of one request, over some 15 s; AWS_MAX_ATTEMPTS overrides it."""
BODY_ATTEMPTS = 3
"""Tries to read one answer whole, which boto3 does not repeat by itself."""

_CREDENTIALS = "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_EXPIRED = "the credentials have expired; sign in again, or renew AWS_SESSION_TOKEN"
_WRONG = f"the credentials are not valid there; {_CREDENTIALS}, and check AWS_ENDPOINT_URL"
_DENIED = (
    "access denied; give these credentials s3:ListBucket on the bucket and "
    "s3:GetObject, s3:PutObject and s3:DeleteObject below the prefix"
)
_BUSY = "the service is failing or overloaded; try again later"
_CLOCK = "the service refuses this machine's time; set its clock"
_REGION = "the bucket is in another region; set AWS_REGION to it"

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
_NO_CREDENTIALS = (errors.NoCredentialsError, errors.PartialCredentialsError, errors.CredentialRetrievalError)
_NOT_SIGNED_IN = (errors.SSOError, errors.LoginError, errors.TokenRetrievalError, errors.NoAuthTokenError)
_UNREACHABLE = (errors.HTTPClientError, errors.ConnectionError, errors.IncompleteReadError)


class S3Store:
    """Objects below `prefix` in `bucket`. The client is made at the first request, in any thread."""

    def __init__(self, bucket: str, prefix: str = "", client: Any = None) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._made = client
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def client(self) -> Any:
        with self._lock:
            if self._made is None:
                attempts = int(os.environ.get("AWS_MAX_ATTEMPTS", ATTEMPTS))
                config = Config(
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    connect_timeout=5,
                    read_timeout=60,
                    max_pool_connections=32,
                )
                self._made = boto3.Session().client("s3", config=config)
            return self._made

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + check_key(key)}

    def get(self, key: str) -> bytes:
        place = self._at(key)
        with self._guard(key):
            for attempt in range(1, BODY_ATTEMPTS + 1):
                try:
                    return bytes(self.client.get_object(**place)["Body"].read())
                except (
                    errors.IncompleteReadError,
                    errors.ResponseStreamingError,
                    errors.FlexibleChecksumError,
                ):
                    if attempt == BODY_ATTEMPTS:
                        raise
        raise AssertionError("unreachable")

    def put(self, key: str, data: bytes) -> None:
        place = self._at(key)
        with self._guard(key):
            self.client.put_object(**place, Body=data)

    def get_file(self, key: str, path: Path) -> None:
        place = self._at(key)
        with self._guard(key), replacing(path) as file:
            self.client.download_fileobj(**place, Fileobj=file)

    def put_file(self, key: str, path: Path) -> None:
        place = self._at(key)
        with path.open("rb") as file, self._guard(key):
            self.client.upload_fileobj(file, **place)

    def list(self, prefix: str) -> Keys:
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> Entries:
        folder = self._folder(prefix)
        with self._guard(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder)
            found = [
                Entry(item["Key"].removeprefix(self.prefix), item["Size"], item["LastModified"].timestamp())
                for page in pages
                for item in page.get("Contents", ())
                if not item["Key"].endswith("/")  # consoles make these to stand for folders
            ]
        return sorted(found, key=lambda entry: entry.key)

    def time(self) -> float:
        with self._guard(""):
            answer = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(date).timestamp() if date else time.time()

    def children(self, prefix: str) -> Keys:
        folder = self._folder(prefix)
        names: set[str] = set()
        with self._guard(prefix):
            lister = self.client.get_paginator("list_objects_v2")
            for page in lister.paginate(Bucket=self.bucket, Prefix=folder, Delimiter="/"):
                names.update(item["Prefix"] for item in page.get("CommonPrefixes", ()))
                names.update(item["Key"] for item in page.get("Contents", ()))
        return sorted({name.removeprefix(folder).rstrip("/") for name in names} - {""})

    def _folder(self, prefix: str) -> str:
        return f"{self.prefix}{check_key(prefix.rstrip('/'))}/" if prefix else self.prefix

    def exists(self, key: str) -> bool:
        place = self._at(key)
        # Unlike HEAD, a listing tells a missing bucket from a missing object. The key comes first.
        with self._guard(key):
            page = self.client.list_objects_v2(Bucket=self.bucket, Prefix=place["Key"], MaxKeys=1)
        return any(item["Key"] == place["Key"] for item in page.get("Contents", ()))

    def delete(self, key: str) -> None:
        place = self._at(key)
        with self._guard(key):
            self.client.delete_object(**place)

    def move(self, key: str, to: str) -> None:
        source, target = self._at(key), self._at(to)
        with self._guard(key):
            self.client.copy(source, **target)
            self.client.delete_object(**source)

    @contextmanager
    def _guard(self, key: str) -> Iterator[None]:
        try:
            yield
        except errors.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in ("NoSuchKey", "404", "NotFound"):
                raise NotFound(f"{self.url}/{key}") from None
            raise StoreError(f"{self.url}: {self._refusal(code, error)}") from error
        except RetriesExceededError as error:
            raise StoreError(f"{self.url}: {self._failure(error.last_exception)}") from error
        except (errors.BotoCoreError, Boto3Error, ValueError) as error:
            raise StoreError(f"{self.url}: {self._failure(error)}") from error

    def _refusal(self, code: str, error: errors.ClientError) -> str:
        """The service has answered with an error."""
        if code == "NoSuchBucket":
            return f"there is no such bucket; create it (aws s3 mb s3://{self.bucket}) or correct the URL"
        if code in _BY_CODE:
            return f"{_BY_CODE[code]} ({code})"
        return _one_line(error)

    def _failure(self, error: BaseException) -> str:
        """There was no answer, or no request."""
        if isinstance(error, _NO_CREDENTIALS):
            return f"no credentials ({_one_line(error)}); {_CREDENTIALS}, or give the machine a role"
        if isinstance(error, _NOT_SIGNED_IN):
            return f"not signed in ({_one_line(error)}); run `aws sso login`"
        if isinstance(error, _UNREACHABLE):
            # Not asked of the client, which may be what could not be made.
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
            return f"{endpoint} does not answer ({_one_line(error)}); check AWS_ENDPOINT_URL and the network"
        return f"{_one_line(error)}; check the AWS_… environment variables and ~/.aws/config"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
