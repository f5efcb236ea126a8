"""A server that speaks as much of OpenAI's API as `distill` asks for, and fails as a test tells it to."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ctc_drafter.target import Target
from ctc_drafter.training.answers import batched_answers

Plan = Callable[[int, dict[str, Any]], Any]


class FakeServer(ThreadingHTTPServer):
    """Speaks the protocol; `plan(number of the request, body)` may return (status, body, headers), bytes or "drop"."""

    daemon_threads = True

    def __init__(self, target: Target) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = target
        self.plan: Plan = lambda number, body: None
        self.key: str | None = None
        self.models: list[dict[str, Any]] = [{"id": "tiny", "max_model_len": 180}]
        self.gives_ids = True
        self.gives_usage = True
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        tokenizer, chat = self.target.tokenizer, "messages" in body
        ids = self.target.prompt_ids(body["messages"]) if chat else body["prompt"]
        stops = set(body.get("stop_token_ids", self.target.stop_ids))
        # A request that was given up may be answered still while another test decodes with the target.
        with self.lock, self.target.turn:
            (answer,) = batched_answers(
                self.target.model, [ids], pad=0, stop_ids=stops, max_new_tokens=body["max_tokens"]
            )
        text = tokenizer.decode(answer, skip_special_tokens=True)
        ended = answer[-1] in stops
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if ended else "length"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        whole: dict[str, Any] = {"model": body["model"], "choices": [choice]}
        if self.gives_usage:
            whole["usage"] = {"prompt_tokens": len(ids), "completion_tokens": len(answer)}
        if self.gives_ids and body.get("return_token_ids"):
            choice["token_ids"] = answer
            (whole if chat else choice)["prompt_token_ids"] = ids
        return whole


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *args: Any) -> None:
        pass

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def refused(self) -> bool:
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self.send(401, {"error": {"message": "Unauthorized"}})
            return True
        return False

    def do_GET(self) -> None:
        if not self.refused():
            known = self.path == "/v1/models"
            self.send(200 if known else 404, {"data": self.server.models} if known else {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        server = self.server
        with server.lock:
            number = len(server.requests)
            server.requests.append({**body, "path": self.path})
            server.times.append(time.monotonic())
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        action = server.plan(number, body)
        reply = server.reply(body) if action is None else None
        with server.lock:
            server.busy -= 1
        with suppress(OSError):  # the client may have gone
            if action == "drop":
                self.connection.shutdown(socket.SHUT_RDWR)
            elif isinstance(action, tuple):
                self.send(*action)
            else:
                self.send(200, reply if action is None else action)
