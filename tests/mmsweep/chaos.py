"""A proxy before an S3 server that does it harm on command, in a process of its own.

    with Chaos(server_url) as chaos:
        chaos.do("answer", status=503, code="SlowDown", times=3)
        ...                            # requests to chaos.url
        assert chaos.counts() == {"answer": 3}

A fault befalls requests whose "METHOD /path?query" `match` finds, after `skip` of them, `times`
times or for `seconds`. Faults are tried in the order in which they were given.

    answer     with `status` and `code`, without asking the server (`forward=True`: after asking it)
    lose       forward the request, then close the connection without an answer
    cut        break off after half of the body of the answer (`side="request"`: send half on)
    flip       one bit of the body of the answer (`side="request"`: of the request)
    delay      by `pause` seconds, or until `stop`
    refuse     close the port for `seconds`, and the connections that are open
    expire     400 ExpiredToken to requests signed with the access key `key`

Where bits flip is drawn from `seed`. It speaks plain HTTP with Content-Length, as boto3 and moto do.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

ANYTHING = ""


class Chaos:
    """The side of the tests: starts the proxy, and tells it what to do."""

    def __init__(self, behind: str, *, seed: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, behind, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lock = threading.Lock()
        self.url = self._hear()["url"]

    def do(self, kind: str, *, match: str = ANYTHING, **facts: Any) -> None:
        self._tell({"do": {"kind": kind, "match": match, **facts}})

    def stop(self) -> None:
        """No more faults; the counts stay."""
        self._tell({"stop": True})

    def counts(self) -> dict[str, int]:
        """How often each kind of fault has happened."""
        return dict(self._tell({})["counts"])

    def requests(self) -> list[str]:
        """Every request so far, as `match` sees them."""
        return list(self._tell({"requests": True})["requests"])

    def _tell(self, command: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the proxy has died")
        return dict(json.loads(line))

    def __enter__(self) -> Chaos:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


# --- the proxy's process -------------------------------------------------------------------------


class Faults:
    """What is to happen, and what has happened."""

    def __init__(self, seed: int) -> None:
        self.lock = threading.Lock()
        self.draw = random.Random(seed)
        self.pending: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {}
        self.requests: list[str] = []

    def add(self, fault: dict[str, Any]) -> None:
        if "seconds" in fault:
            fault["until"] = time.monotonic() + fault["seconds"]
        with self.lock:
            self.pending.append(fault)

    def clear(self) -> None:
        with self.lock:
            self.pending.clear()

    def count(self, kind: str) -> None:
        with self.lock:
            self.counts[kind] = self.counts.get(kind, 0) + 1

    def befall(self, request: str, access_key: str) -> dict[str, Any]:
        """The fault of this request, or nothing."""
        with self.lock:
            self.requests.append(request)
            for fault in self.pending:
                if not re.search(fault["match"], request) or fault.get("key", access_key) != access_key:
                    continue
                if time.monotonic() > fault.get("until", float("inf")) or fault.get("times", 1) == 0:
                    continue
                if fault.get("skip", 0):
                    fault["skip"] -= 1
                    continue
                if "times" in fault:
                    fault["times"] -= 1
                self.counts[fault["kind"]] = self.counts.get(fault["kind"], 0) + 1
                return fault
        return {"kind": "none"}

    def wait(self, fault: dict[str, Any]) -> None:
        end = time.monotonic() + fault["pause"]
        while time.monotonic() < end and fault in self.pending:
            time.sleep(0.01)

    def flipped(self, body: bytes) -> bytes:
        if not body:
            return body
        with self.lock:
            place, bit = self.draw.randrange(len(body)), self.draw.randrange(8)
        return body[:place] + bytes([body[place] ^ (1 << bit)]) + body[place + 1 :]


class Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behind: str, faults: Faults, port: int = 0) -> None:
        self.behind = urlsplit(behind)
        self.faults = faults
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, *_: object) -> None:
        pass  # a client that hangs up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        signed_by = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization") or "")
        faults = self.server.faults
        fault = faults.befall(f"{self.command} {self.path}", signed_by[1] if signed_by else "")
        kind, on_request = fault["kind"], fault.get("side") == "request"
        if kind == "delay":
            faults.wait(fault)
        if kind == "answer" and not fault.get("forward"):
            return self.refuse(fault["status"], fault["code"])
        if kind == "expire":
            return self.refuse(400, "ExpiredToken")
        if kind == "flip" and on_request:
            body = faults.flipped(body)
        if kind == "cut" and on_request:
            body = body[: len(body) // 2]
        answer, data = self.ask(body)
        if kind == "answer":
            return self.refuse(fault["status"], fault["code"])
        if kind == "lose":
            self.close_connection = True
            return None
        if kind == "flip" and not on_request:
            data = faults.flipped(data)
        cut = len(data) // 2 if kind == "cut" and not on_request else len(data)
        own = ("connection", "transfer-encoding", "content-length")
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in own}
        headers["Content-Length"] = answer.getheader("Content-Length") or "0"
        self.respond(answer.status, headers, data[:cut])
        self.close_connection |= cut < len(data)
        return None

    def ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        behind = self.server.behind
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("expect", "content-length")}
        connection = http.client.HTTPConnection(str(behind.hostname), behind.port, timeout=300)
        connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer, data

    def refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>{code}, says the proxy.</Message></Error>".encode()
        self.respond(status, {"content-type": "application/xml", "content-length": str(len(body))}, body)

    def respond(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_DELETE = do_POST = do_HEAD = relay  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


class Port:
    """The proxy on its port, which can be closed for a while."""

    def __init__(self, behind: str, faults: Faults) -> None:
        self.behind, self.faults = behind, faults
        self.proxy = Proxy(behind, faults)
        self.number = self.proxy.server_port
        self.serve()

    def serve(self) -> None:
        threading.Thread(target=self.proxy.serve_forever, args=(0.02,), daemon=True).start()

    def close_for(self, seconds: float) -> None:
        self.faults.count("refuse")
        self.proxy.shutdown()
        self.proxy.server_close()
        for connection in list(self.proxy.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        threading.Timer(seconds, self.open_again).start()

    def open_again(self) -> None:
        self.proxy = Proxy(self.behind, self.faults, self.number)
        self.serve()


def main(behind: str, seed: str) -> None:
    faults = Faults(int(seed))
    port = Port(behind, faults)
    print(json.dumps({"url": f"http://127.0.0.1:{port.number}"}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        fault = command.get("do")
        if fault and fault["kind"] == "refuse":
            port.close_for(fault["seconds"])
        elif fault:
            faults.add(fault)
        if command.get("stop"):
            faults.clear()
        told = {"requests": faults.requests} if command.get("requests") else {}
        print(json.dumps({"counts": faults.counts, **told}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
