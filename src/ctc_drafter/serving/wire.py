"""What goes wrong before there is a request: bytes that are no HTTP get OpenAI's shape too."""

from __future__ import annotations

import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError


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
