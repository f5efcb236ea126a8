"""What goes wrong before there is a request: bytes that are no HTTP, and heads that are too long, in OpenAI's shape."""

from __future__ import annotations

import json

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

MAX_HEAD = 2**16
"""Bytes of a request's headers. h11 counts only what has not arrived in one piece."""


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
    """uvicorn's, with another answer to what h11 cannot read."""

    def send_400_response(self, msg: str) -> None:
        """Answer and close; only close if an answer has already begun."""
        body = json.dumps(ApiError(400, msg, code="invalid_http").body).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
