"""What goes wrong before there is a request: bytes that are no HTTP, and heads that are too long, in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

MAX_HEAD = 2**16
"""Bytes of a request's headers. h11 counts only what has not arrived in one piece."""
HEAD_TIMEOUT = 30.0
"""Seconds in which the head of a request must arrive, from the connection's or the head's own beginning."""
MAX_CONNECTIONS = 1000
"""Connections at a time, idle ones included."""


class ShortHeads:
    """Middleware that refuses requests with longer headers than MAX_HEAD."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD:
            error = ApiError(431, f"The headers are larger than {MAX_HEAD} bytes.", code="headers_too_large")
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


class Protocol(H11Protocol):
    """uvicorn's, with another answer to what h11 cannot read, and an end to the wait for a request's head."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(ApiError(503, "There are too many connections; try again later.", code="too_many_connections"))
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def _await_head(self) -> None:
        """Start the clock where a head is to come, and stop it where it has. Between two requests uvicorn's runs."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop_waiting()
        elif self._late is None:
            error = ApiError(408, "The head of the request did not arrive in time.", code="request_timeout")
            self._late = self.loop.call_later(HEAD_TIMEOUT, self._refuse, error)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def send_400_response(self, msg: str) -> None:
        """Answer and close; only close if an answer has already begun."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (
                h11.Response(
                    status_code=error.status, headers=headers, reason=HTTPStatus(error.status).phrase.encode()
                ),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
