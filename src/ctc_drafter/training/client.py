"""JSON over HTTP to an OpenAI-compatible server, from many threads, patient with one that is busy or restarting."""

from __future__ import annotations

import email.utils
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from ..errors import UserError
from ..jsonl import parse_json

ATTEMPTS = 8
BACKOFF = 0.5
"""Seconds before the second attempt; doubled for each further one."""
LONGEST_WAIT = 3600.0
"""Seconds; a server that asks for more with Retry-After is asked again after this."""
TRANSIENT = {408, 425, 429, 500, 502, 503, 504, 529}


class _Transient(Exception):
    def __init__(self, reason: str, status: int = 0, wait: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.wait = status, wait


class Refused(Exception):
    """The server declines this one request: `status` of HTTP and its own words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Stopped(Exception):
    """Somebody has set `Server.stopped`."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None  # the key must not travel to another host


class Server:
    """JSON over HTTP with retries; one object serves many threads."""

    def __init__(self, base: str, key: str | None = None, timeout: float = 600.0) -> None:
        try:
            parts = urlsplit(base)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise UserError(f"'{base}' is not the address of a server; give one such as http://localhost:8000/v1.")
        self.base = base.rstrip("/")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._timeout = timeout
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._not_before = 0.0  # of time.monotonic(): one reply with Retry-After holds all threads back
        self._successes = 0
        self.stopped = threading.Event()

    def request(self, path: str, body: dict[str, Any] | None = None, *, patient: bool = True) -> dict[str, Any]:
        """The JSON object in the reply to GET (no body) or POST.

        Busy and failing servers are asked up to ATTEMPTS times, at growing intervals, unless `patient` is False and
        nobody listens. Raises UserError if that does not help or no request can, Refused if this one request cannot.
        """
        failures, seen = 0, self._successes
        while True:
            self._pause(self._not_before - time.monotonic())
            try:
                reply = self._once(path, body)
            except _Transient as error:
                if error.status == 429 and self._successes > seen:
                    failures, seen = 0, self._successes  # a queue that moves
                failures += 1
                if failures == ATTEMPTS or not (patient or error.status):
                    if error.status and self._successes > seen:
                        raise Refused(error.status, str(error)) from None
                    raise UserError(f"The server at {self.base} cannot be used: {error}.") from None
                if error.wait is not None:
                    self._not_before = time.monotonic() + min(error.wait, LONGEST_WAIT)
                else:
                    self._pause(BACKOFF * 2 ** (failures - 1) * random.uniform(0.75, 1.25))
            else:
                self._successes += 1
                return reply

    def _pause(self, seconds: float) -> None:
        if self.stopped.wait(max(0.0, seconds)):
            raise Stopped

    def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            raise self._failure(error, path) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise _Transient(f"no answer to {path} ({text})") from None
        try:
            reply = parse_json(content)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise self.malformed(path, "is not a JSON object")
        return reply

    def _failure(self, error: urllib.error.HTTPError, path: str) -> Exception:
        message = _message(error)
        if error.code in TRANSIENT:
            return _Transient(f"{path} failed with status {error.code}: {message}", error.code, _retry_after(error))
        if error.code in (401, 403):
            return UserError(
                f"The server at {self.base} refuses the key (status {error.code}); "
                "name the environment variable that holds it with --api-key-env."
            )
        if 300 <= error.code < 400:
            return UserError(
                f"The server at {self.base} redirects {path} to {error.headers.get('Location')}; give that address."
            )
        return Refused(error.code, message)

    def malformed(self, path: str, what: str) -> UserError:
        """The error for a reply to `path` that does not follow the protocol."""
        return UserError(f"The reply of {self.base}{path} {what}; is this an OpenAI-compatible server?")

    def models(self) -> list[dict[str, Any]] | None:
        """What `/models` lists, None if there is no such page. Raises UserError if nobody listens."""
        try:
            listed = self.request("/models", patient=False).get("data")
        except Refused as error:
            if error.status in (404, 405, 501):
                return None
            raise UserError(f"The server at {self.base} refuses /models ({error.status}): {error}.") from None
        if not isinstance(listed, list) or not all(
            isinstance(m, dict) and isinstance(m.get("id"), str) for m in listed
        ):
            raise self.malformed("/models", "lists no models")
        return listed


def _message(error: urllib.error.HTTPError) -> str:
    try:
        content = error.read(100_000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        content = ""
    try:
        found: Any = parse_json(content)
        for key in ("error", "message", "detail"):
            found = found.get(key, found) if isinstance(found, dict) else found
        content = found if isinstance(found, str) else json.dumps(found)
    except (ValueError, RecursionError):
        pass
    return (" ".join(content.split())[:300] or str(error.reason)).rstrip(".")


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the server asks to wait: given as such or as a date."""
    value = error.headers.get("Retry-After", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
