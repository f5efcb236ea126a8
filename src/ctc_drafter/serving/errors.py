"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .scheduler import Busy, Draining, Failed, TimedOut

RETRY_AFTER = "1"  # seconds


class ApiError(Exception):
    """What a request gets instead of an answer: an HTTP status and one sentence."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that is sent."""
        kinds = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


NOT_AGAIN = {"x-should-retry": "false"}
"""Keeps OpenAI's clients from repeating by themselves what would only fail or take as long again."""


def of_scheduler(error: Exception) -> ApiError:
    """What the scheduler's exceptions mean to a client."""
    wait = {"Retry-After": RETRY_AFTER}
    if isinstance(error, Busy):
        message = "All slots are busy and the queue is full; try again in a moment."
        return ApiError(429, message, code="queue_full", headers=wait)
    if isinstance(error, Draining):
        return ApiError(503, "The server is shutting down and takes nothing new.", code="draining", headers=wait)
    if isinstance(error, TimedOut):
        message = "The time limit of the server passed before the answer was complete."
        return ApiError(408, message, code="request_timeout", headers=NOT_AGAIN)
    message = "The model failed to answer; the server's log says why."
    return ApiError(500, message, code="model_failed", headers=NOT_AGAIN)


SCHEDULING = (Busy, Draining, TimedOut, Failed)


def add_handlers(app: FastAPI) -> None:
    """Answer every exception in OpenAI's shape."""

    def api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        place = f"{request.method} {request.url.path}"
        texts = {404: f"There is no {place}.", 405: f"{request.url.path} does not take {request.method}."}
        message = texts.get(error.status_code, f"{place}: {error.detail}")
        headers = dict(error.headers) if error.headers else None
        return ApiError(error.status_code, message, code=_CODES.get(error.status_code), headers=headers).response()

    def internal_error(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "The server failed to answer; its log says why.", code="internal_error").response()

    def scheduling_error(request: Request, error: Exception) -> JSONResponse:
        return of_scheduler(error).response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, internal_error)
    for kind in SCHEDULING:
        app.add_exception_handler(kind, scheduling_error)


_CODES = {404: "not_found", 405: "method_not_allowed"}
