"""The HTTP application: OpenAI's completions, health, metrics and the page, over one scheduler."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse

from .. import __version__
from ..errors import UserError
from ..target import Target
from .answers import Call, Reply, Said
from .bodies import read_body, unless_left
from .errors import SCHEDULING, ApiError, add_handlers, of_scheduler
from .hosts import LocalNames
from .metrics import Clock, Metrics
from .protocol import Body, ChatRequest, CompletionRequest, parse_body
from .requests import jobs_of, read_call
from .scheduler import Busy, Scheduler, Submission
from .schema import BODIES, openapi
from .stream import Counting, EventStream
from .wire import ShortHeads

PAGE = Path(__file__).parent / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'"
)
PATHS = {"/", "/page.css", "/page.js", "/tree.js", "/health", "/metrics", "/openapi.json", "/v1/models", *BODIES}


@dataclass(frozen=True)
class Limits:
    """What a server allows."""

    max_body: int = 2**20
    """Bytes of a request's body."""
    max_new_tokens: int = 1024
    """Tokens of an answer; requests for more end there with finish_reason `length`."""
    body_timeout: float = 30.0
    """Seconds in which the body must arrive."""


class Service:
    """What the routes share."""

    def __init__(
        self,
        target: Target,
        scheduler: Scheduler,
        *,
        name: str,
        drafter: str,
        key: str | None,
        limits: Limits,
        local: bool = False,
    ) -> None:
        """`local`: only this machine reaches the server, so it answers to no name but localhost and addresses."""
        self.local = local
        self.target, self.scheduler, self.limits = target, scheduler, limits
        self.name, self.drafter, self.key = name, drafter, key
        self.metrics = Metrics(scheduler)
        self.created = int(time.time())
        self.longest_token = max(map(len, target.tokenizer.get_vocab()))
        """Characters."""
        self._reading = 0
        """Requests that are tokenized or wait for it."""
        self._tokenizing = ThreadPoolExecutor(1, "ctc-drafter-tokenizer")

    def check_key(self, request: Request) -> None:
        """Raise ApiError unless the request carries the key, if there is one."""
        if self.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1"), self.key.encode())  # headers are decoded as latin-1
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                401,
                "The key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def complete(self, request: Request, kind: type[Body]) -> Response:
        """Answer a completion request, as a stream if it asks for one."""
        limits, stats = self.limits, self.scheduler.stats
        content = await read_body(request, limits.max_body, limits.body_timeout, lambda: stats().draining)
        arrived = time.monotonic()
        body = parse_body(kind, content)
        call = await unless_left(request, self._read(body))
        if call is None:
            return Response(status_code=499)  # nobody reads it
        jobs = jobs_of(call, body, self)
        reply = Reply(call, self.target)
        clock = Clock(self.metrics, reply, arrived)
        submission = self.scheduler.submit(jobs, arrived)
        said = _counted(reply, submission, clock)
        if not call.stream:
            if await unless_left(request, _exhaust(said), submission.cancel) is None:
                return _left(clock)
            return JSONResponse(reply.whole())
        # Until the first step a failure still has its own status.
        first = await unless_left(request, _first(said), submission.cancel)
        if first is None:
            return _left(clock)
        return EventStream(_chunks(reply, first, said, clock), submission, clock.abandon)

    async def _read(self, body: Body) -> Call:
        """What the request asks for, tokenized on a thread. Raises Busy if as many are read or wait as may at all."""
        stats = self.scheduler.stats()
        if stats.running + stats.waiting + self._reading >= self.scheduler.slots + self.scheduler.queue:
            raise Busy
        self._reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, read_call, body, self)
        except UserError as error:  # of the chat template
            raise ApiError(400, str(error), param="messages", code="invalid_value") from None
        finally:
            self._reading -= 1


def create_app(service: Service) -> FastAPI:
    """The application around `service`; whoever runs it also closes the scheduler."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.scheduler.close()

    app = FastAPI(
        title="ctc-drafter",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    add_handlers(app)
    app.include_router(_api(service))
    app.include_router(_pages(service))
    app.openapi = lambda: openapi(app, service.name)  # type: ignore[method-assign]
    app.add_middleware(ShortHeads)
    if service.local:
        app.add_middleware(LocalNames)
    app.add_middleware(Counting, metrics=service.metrics, name=_label)
    return app


def _label(path: str) -> str:
    """The path as the metrics name it: unknown ones, which anyone can make up, have one name."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{name}"
    return path if path in PATHS else "other"


def _api(service: Service) -> APIRouter:
    guarded = APIRouter(dependencies=[Depends(service.check_key)])

    @guarded.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await service.complete(request, ChatRequest)

    @guarded.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.complete(request, CompletionRequest)

    def model() -> dict[str, Any]:
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "ctc-drafter",
            "max_model_len": service.target.max_context,
            "drafter": service.drafter,
            "drafters": service.scheduler.drafters,
        }

    @guarded.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model()]})

    @guarded.get("/v1/models/{name:path}")
    async def one_model(name: str) -> JSONResponse:
        if name != service.name:
            raise ApiError(404, f"There is no model '{name[:80]}'; this is '{service.name}'.", code="model_not_found")
        return JSONResponse(model())

    @guarded.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return guarded


def _pages(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> JSONResponse:
        stats = service.scheduler.stats()
        status = "dead" if stats.failed else "draining" if stats.draining else "ok"
        content = {"status": status, "running": stats.running, "waiting": stats.waiting}
        return JSONResponse(content, 200 if status == "ok" else 503)

    def page(name: str, kind: str) -> Callable[[], Awaitable[FileResponse]]:
        async def get() -> FileResponse:
            headers = {
                "Content-Security-Policy": POLICY,
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "no-cache",
            }
            return FileResponse(PAGE / name, media_type=kind, headers=headers)

        return get

    for path, name, kind in (
        ("/", "index.html", "text/html"),
        ("/page.css", "page.css", "text/css"),
        ("/page.js", "page.js", "text/javascript"),
        ("/tree.js", "tree.js", "text/javascript"),
    ):
        router.get(path, include_in_schema=False)(page(name, kind))
    return router


# ---------------------------------------------------------------- bodies and replies


async def _counted(reply: Reply, submission: Submission, clock: Clock) -> AsyncIterator[Said]:
    async for said in reply.follow(submission):
        clock.count(said)
        yield said


async def _exhaust(said: AsyncIterator[Said]) -> bool:
    async for _ in said:
        pass
    return True


async def _first(said: AsyncIterator[Said]) -> Said:
    return await anext(said)


async def _chunks(reply: Reply, first: Said, others: AsyncIterator[Said], clock: Clock) -> AsyncIterator[bytes]:
    """The server-sent events of a reply; an error after the first step is an event of its own, and the last one."""
    for chunk in reply.opening():
        yield event_bytes(chunk)
    try:
        if (told := reply.chunk(first)) is not None:
            yield event_bytes(told)
        async for said in others:
            if (told := reply.chunk(said)) is not None:
                yield event_bytes(told)
    except SCHEDULING as error:
        clock.fail()
        yield event_bytes(of_scheduler(error).body)
        return
    for chunk in reply.closing():
        yield event_bytes(chunk)
    yield b"data: [DONE]\n\n"


def event_bytes(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _left(clock: Clock) -> Response:
    clock.abandon()
    return Response(status_code=499)  # nobody reads it
