"""Stores of both kinds, runs with records and checkpoints, and a server that answers with errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import boto3
import pytest
from http_service import HttpService
from tiny import write_texts

from mmsweep.agent import AgentProcess, Job
from mmsweep.s3 import S3Store
from mmsweep.store import ObjectStore, RunStore, open_store


@pytest.fixture(params=["dir", pytest.param("s3", marks=pytest.mark.s3)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty store; a test that asks for it runs once on a folder and once on S3."""
    if request.param == "dir":
        return str(tmp_path / "store")
    return str(request.getfixturevalue("s3_url"))


@pytest.fixture
def runs(store_url: str) -> RunStore:
    store = open_store(store_url)
    if isinstance(store.objects, S3Store):
        store.objects = S3Store(store.objects.bucket, store.objects.prefix, _client())
    return store


@cache
def _client() -> Any:
    """Making one takes a tenth of a second, most of the time of these tests."""
    return boto3.Session().client("s3")


@pytest.fixture
def objects(runs: RunStore) -> ObjectStore:
    return runs.objects


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A pattern of small files, and a cache of the module's own, which marks its processes."""
    folder = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MMSWEEP_CACHE", str(folder / "cache"))
        environment.setenv("PYTHONPATH", str(Path.cwd()))
        yield write_texts(folder / "texts")


@pytest.fixture
def agent_for() -> Iterator[Callable[[Job], AgentProcess]]:
    """Agents as a launch starts them."""
    started: list[AgentProcess] = []

    def start(job: Job) -> AgentProcess:
        started.append(AgentProcess(job))
        return started[-1]

    yield start
    for agent in started:
        agent.close()


class AnswersWith(HttpService):
    """An S3 service whose answers are the given ones in turn, the last one for ever after.

    An answer is `(HTTP status, error code)`, or the bytes of a good one.
    """

    def __init__(self) -> None:
        self.answers: list[tuple[int, str] | bytes] = [(500, "InternalError")]
        self.requests = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # with 100-continue, which boto3 waits for

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer = outer.answers[min(outer.requests, len(outer.answers) - 1)]
                outer.requests += 1
                status, body = (200, answer) if isinstance(answer, bytes) else (answer[0], _error(answer[1]))
                self.send_response(status)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = do_DELETE = do_POST = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(Handler)


def _error(code: str) -> bytes:
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code>'
        f"<Message>{code} was\nthe answer.</Message></Error>"
    ).encode()


@pytest.fixture
def s3_answers(aws: pytest.MonkeyPatch) -> Iterator[AnswersWith]:
    service = AnswersWith()
    aws.setenv("AWS_ENDPOINT_URL", service.url)
    yield service
    service.stop()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """AWS variables of this test alone: valid-looking keys, no endpoint, two tries of a request."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def write_grid(tmp_path: Path, texts: str) -> Callable[..., Path]:
    """Writes tiny.yaml: a text, with its TEXTS and what else is named replaced."""

    def write(text: str, **changes: str) -> Path:
        text = text.replace("TEXTS", texts)
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "tiny.yaml"
        path.write_text(text)
        return path

    return write
