"""ASGI pieces that deal with clients that leave, and the count of all requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .scheduler import Submission

GRACE = 5.0
"""Seconds past the time limit in which the last events may still be read."""


class EventStream(StreamingResponse):
    """Server-sent events of a submission, which is cancelled when the client leaves or reads too slowly."""

    def __init__(self, content: AsyncIterator[bytes], submission: Submission, left: Callable[[], None]) -> None:
        """`left` is called at the end, however it comes."""
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, headers=headers, media_type="text/event-stream")
        self._submission, self._left = submission, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(max(0.0, self._submission.deadline - time.monotonic()) + GRACE):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # the server closes the connection, since the body is not complete
        finally:
            self._submission.cancel()
            self._left()


class Counting:
    """Middleware that counts requests by path and status; `name` gives unknown paths one name for all."""

    def __init__(self, app: ASGIApp, metrics: Metrics, name: Callable[[str], str]) -> None:
        self._app, self._metrics, self._name = app, metrics, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(self._name(scope["path"]), str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)
