"""Messages to a chat room: a POST to a webhook when a launch ends, a run is given up, the store is away.

The URL is a secret: it is in no message, log or store, and processes that a launch starts do not get it.
A webhook that does not answer costs the sweep nothing.
"""

from __future__ import annotations

import ipaddress
import json
import os
import queue
import sys
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from trainers.errors import InputError

VARIABLE = "MMSWEEP_WEBHOOK"
TRIES = 3
TIMEOUT_S = 5.0
PAUSE_S = 1.0
"""Before the second try; then twice as long."""
LAST_S = 20.0
"""How long the end of a launch waits for messages that are on their way."""
MOST_CHARACTERS = 1900
"""Discord refuses 2,000."""
MOST_WAITING = 100


def webhook(given: str | None) -> Webhook:
    """The webhook of `--webhook`, or of the environment, which then forgets it; a silent one without both.

    Raises:
        InputError: not an https URL (http will do for this machine).
    """
    inherited = os.environ.pop(VARIABLE, None)
    url, name = (given, "--webhook") if given is not None else (inherited, VARIABLE)
    return Webhook(_checked(url, name) if url else None)


def _checked(url: str, name: str) -> str:
    """The message does not repeat the URL."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise InputError(f"{name}: not a URL; write https://…") from None
    if not host or parts.scheme not in ("http", "https"):
        raise InputError(f"{name}: not a URL of the web; write https://…")
    if parts.scheme == "http" and not _is_this_machine(host):
        raise InputError(f"{name}: http:// shows the URL, which is a secret, to the network; write https://…")
    return url


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Webhook:
    """Sends messages, in order, from a thread of its own: `send` never waits and never fails.

    with Webhook("https://…") as hook:
        hook.send("paper: 25 of 25 runs done")
    """

    def __init__(self, url: str | None, *, pause: float = PAUSE_S, timeout: float = TIMEOUT_S) -> None:
        self._url = url
        self._pause = pause
        self._timeout = timeout
        self._messages: queue.Queue[str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="webhook", daemon=True)
        self._complained = False

    def __enter__(self) -> Webhook:
        if self._url is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self._messages.put(None)
            self._thread.join(LAST_S)

    def send(self, text: str) -> None:
        if self._url is not None and self._messages.qsize() < MOST_WAITING:
            self._messages.put(text)

    def _work(self) -> None:
        while (text := self._messages.get()) is not None:
            self._deliver(text)

    def _deliver(self, text: str) -> None:
        if len(text) > MOST_CHARACTERS:
            text = text[: MOST_CHARACTERS - 1] + "…"
        # "text" is read by Slack and Mattermost, "content" by Discord.
        body = json.dumps({"text": text, "content": text}).encode()
        for attempt in range(TRIES):
            if attempt:
                threading.Event().wait(self._pause * 2 ** (attempt - 1))
            refusal = self._post(body)
            if refusal is None:
                return
        if not self._complained:
            self._complained = True
            print(f"the webhook does not take messages: {refusal}", file=sys.stderr, flush=True)

    def _post(self, body: bytes) -> str | None:
        """Why it was not taken, without the URL; None: it was."""
        assert self._url is not None
        # S310: the scheme was checked.
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})  # noqa: S310
        try:
            with _OPENER.open(request, timeout=self._timeout):
                return None
        except urllib.error.HTTPError as error:
            error.close()
            return f"HTTP {error.code}"
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            return getattr(reason, "strerror", None) or type(reason).__name__


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """To another place a message would go as a GET, and perhaps in the open."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)
