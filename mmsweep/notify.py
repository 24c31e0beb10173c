"""Messages to a chat room: a POST to a webhook when a launch ends, a run is given up, the store is away.

The URL is a secret: it is in no message, log or store, and processes that a launch starts do not get it.
A webhook that does not answer costs the sweep nothing.
"""

from __future__ import annotations

import ipaddress
import json
import os
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter, deque
from dataclasses import dataclass
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
"""Messages; runs that were given up wait as one, however many they are."""


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


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A run that has failed for good."""

    grid: str
    run_id: str
    status: str
    how: str
    """`at step 4: CUDA out of memory`"""


class Webhook:
    """Sends messages, in order, from a thread of its own: to send never waits and never fails.

    with Webhook("https://…") as hook:
        hook.send("paper: the store is back after 12:05")
        hook.end("paper: 25 of 25 runs done")  # before all that wait
    """

    def __init__(self, url: str | None, *, pause: float = PAUSE_S, timeout: float = TIMEOUT_S) -> None:
        self._url = url
        self._pause = pause
        self._timeout = timeout
        self._waiting: deque[str] = deque()
        self._given_up: list[GivenUp] = []
        self._over = False
        self._changed = threading.Condition()
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
            with self._changed:
                self._over = True
                self._changed.notify()
            self._thread.join(LAST_S)

    def send(self, text: str) -> None:
        with self._changed:
            if self._url is not None and len(self._waiting) < MOST_WAITING:
                self._waiting.append(text)
                self._changed.notify()

    def send_given_up(self, run: GivenUp) -> None:
        """A message of its own, or one of all such runs that wait by the time that its turn comes."""
        with self._changed:
            if self._url is not None:
                self._given_up.append(run)
                self._changed.notify()

    def end(self, text: str) -> None:
        """As `send`, ahead of all that wait: the last words of a launch."""
        with self._changed:
            if self._url is not None:
                self._waiting.appendleft(text)
                self._changed.notify()

    def _work(self) -> None:
        while (text := self._next()) is not None:
            self._deliver(text)

    def _next(self) -> str | None:
        """The next message, which may be waited for; None at the end of all."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._given_up or self._over)
            if self._waiting:
                return self._waiting.popleft()
            runs, self._given_up = self._given_up, []
            return _together(runs) if runs else None

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


def _together(runs: list[GivenUp]) -> str:
    """`paper: hetero-s1-0123abcd failed at step 4: boom`, or of several `paper: 12 more runs: 9 failed, …`"""
    first = runs[0]
    if len(runs) == 1:
        return f"{first.grid}: {first.run_id} {first.status} {first.how}"
    counts = Counter(run.status for run in runs)
    states = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{first.grid}: {len(runs)} more runs: {states}; {', '.join(run.run_id for run in runs)}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """To another place a message would go as a GET, and perhaps in the open."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)
