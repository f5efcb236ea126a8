"""One server process: load, warm up, listen, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from ..acceptance import Sampling
from ..errors import UserError
from .scheduler import Job, Scheduler, TimedOut
from .wire import Protocol

WARM_UP_TOKENS = 16


class Server(uvicorn.Server):
    """uvicorn that finishes what it has on the first SIGTERM or Ctrl-C, and stops at once on the second."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._scheduler, self._ready = scheduler, ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._scheduler.when_ended(self._ended)
        await super().startup(sockets)
        if self.started:
            self._ready()

    def _ended(self) -> None:
        """Called on any thread: without the model there is nothing to serve."""
        if self._scheduler.stats().failed and self._loop is not None:
            self._loop.call_soon_threadsafe(setattr, self, "should_exit", True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by signals on the main thread; not recorded, so that a drained server ends with exit code 0."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        stats = self._scheduler.stats()
        count = stats.running + stats.waiting
        if count:
            print(f"Finishing {count} answers; a second signal stops them.", file=sys.stderr, flush=True)
        await self._scheduler.drain()
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen yet. Raises UserError if the address is taken or none of ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}); choose another --host or --port."
        ) from None
    return bound


async def warm_up(scheduler: Scheduler) -> None:
    """Let every drafter draft once, so that the first request finds weights packed and threads started."""
    ids = [i % scheduler.target.vocab_size for i in range(1, min(9, scheduler.context))]
    for name in scheduler.drafters:
        job = Job(ids, min(WARM_UP_TOKENS, scheduler.context - len(ids)), Sampling(), (), name)
        with suppress(TimedOut):  # then it is merely slow
            async for _ in scheduler.submit([job]):
                pass


def run(app: FastAPI, scheduler: Scheduler, bound: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until a signal; `ready` is called when the server answers."""
    options: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False, "ws": "none"}
    config = uvicorn.Config(app, http=Protocol, loop="asyncio", lifespan="on", timeout_keep_alive=30, **options)

    async def main() -> None:
        await warm_up(scheduler)
        await Server(config, scheduler, ready).serve([bound])

    # Before the server has its own handlers, SIGTERM ends the process like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        asyncio.run(main())
    finally:
        scheduler.close()
        bound.close()
    if scheduler.stats().failed:
        print("The model has failed, so the server has ended; the log above says why.", file=sys.stderr)
        raise SystemExit(1)
