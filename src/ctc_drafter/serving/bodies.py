"""Bodies as they arrive, and work for clients that may leave meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from .errors import ApiError
from .scheduler import Draining

LOOK = 0.25
"""Seconds between two looks at whether a body is still wanted."""
Result = TypeVar("Result")


async def read_body(request: Request, largest: int, timeout: float, draining: Callable[[], bool]) -> bytes:
    """The body, of at most `largest` bytes.

    Raises ApiError if it is no JSON by its own account, too large, or does not arrive in `timeout` seconds; Draining if
    the server begins to drain before it has.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Asked for strictly: any web page may post other types to a local server, and the browser would not ask first.
        raise ApiError(415, "Send JSON, with the header Content-Type: application/json.", code="unsupported_media_type")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > largest:
        raise _too_large(largest)
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    reading = asyncio.ensure_future(_collect(request, largest))
    try:
        while not (await asyncio.wait([reading], timeout=max(0.0, min(LOOK, end - loop.time()))))[0]:
            if draining():
                raise Draining
            if loop.time() >= end:
                raise ApiError(408, "The body did not arrive in time.", code="request_timeout")
        return reading.result()
    finally:
        reading.cancel()


async def _collect(request: Request, largest: int) -> bytes:
    content = bytearray()
    try:
        async for part in request.stream():
            content += part
            if len(content) > largest:
                raise _too_large(largest)
    except ClientDisconnect:
        raise ApiError(400, "The client left before its body had arrived.", code="client_left") from None
    return bytes(content)


def _too_large(largest: int) -> ApiError:
    return ApiError(413, f"The body is larger than {largest} bytes.", code="body_too_large")


async def unless_left(
    request: Request, work: Coroutine[Any, Any, Result], cancel: Callable[[], None] = lambda: None
) -> Result | None:
    """The result of `work`; None if the client leaves before. What ends `work` early calls `cancel` too."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Task[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            result: Result = tasks[0].result()
            return result
        cancel()
        return None
    except BaseException:
        cancel()
        raise
    finally:
        for task in tasks:
            task.cancel()
