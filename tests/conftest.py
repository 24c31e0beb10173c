"""An S3 server for the tests that need one: a real process behind a real socket."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

AWS_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    # Nothing from the home of whoever runs the tests.
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
_buckets = itertools.count(1)

# The same examples every time; `pytest --hypothesis-profile random` looks further.
settings.register_profile("random")
settings.register_profile("same", derandomize=True, database=None)
settings.load_profile("same")

# Tests that a script started in the background ignore Ctrl-C, and so would every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a running S3 server; from here to the end of the tests the AWS_* variables name it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    output = tmp_path_factory.mktemp("s3") / "server.log"
    with output.open("wb") as file:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        _wait_until_it_answers(url, server, output)
        with pytest.MonkeyPatch.context() as environment:
            environment.delenv("AWS_PROFILE", raising=False)
            environment.delenv("AWS_SESSION_TOKEN", raising=False)
            for name, value in {**AWS_ENVIRONMENT, "AWS_ENDPOINT_URL": url}.items():
                environment.setenv(name, value)
            yield url
    finally:
        server.kill()
        server.wait()


def _wait_until_it_answers(url: str, server: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/moto-api/", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not start:\n{output.read_text()}")


@pytest.fixture
def s3_url(s3_server: str) -> str:
    """`s3://bucket/prefix` of a new, empty bucket."""
    bucket = f"bucket-{next(_buckets)}"
    request = urllib.request.Request(f"{s3_server}/{bucket}", method="PUT")  # a client takes far longer
    with urllib.request.urlopen(request, timeout=30):
        return f"s3://{bucket}/sweeps/one"
