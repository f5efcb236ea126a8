"""What clients do wrong: every bad request gets a 4xx in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest

from ctc_drafter.batch import Batch
from ctc_drafter.drafters import NoDrafter
from ctc_drafter.serving import requests as reading
from ctc_drafter.serving import wire
from ctc_drafter.serving.app import PAGE, POLICY, Limits
from ctc_drafter.serving.stream import EventStream
from ctc_drafter.target import Target
from live import QUESTIONS, BrokenDrafter, Live, PacedDrafter, ask, live, wait_until

HTTP = httpx2.Client(timeout=60)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]


def check(response: httpx2.Response, status: int | None = None) -> dict[str, Any]:
    assert status is None or response.status_code == status, (response.status_code, response.text)
    assert 400 <= response.status_code < 500, (response.status_code, response.text)
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    return dict(error)


def head(length: int | str) -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}", "", ""]
    return "\r\n".join(lines).encode()


FIELDS: list[dict[str, Any]] = [
    *({"model": v} for v in (None, 5, "", "gpt-4o", ["tiny"], {})),
    *(
        {"messages": v}
        for v in (None, [], "Hi", {}, [None], ["Hi"], [[]], [{}], [{"role": "user"}], [{"content": "x"}])
    ),
    *({"messages": [{"role": r, "content": "x"}]} for r in (None, 1, "", "tool", "function", "root")),
    *({"messages": [{"role": "user", "content": c}]} for c in (None, 5, [], {}, ["x"], [{"type": "text"}])),
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
    {"messages": [{"role": "user", "content": "x", "name": 5}]},
    {"messages": [{"role": "assistant"}]},
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
    {"messages": [{"role": "user", "content": "apple " * 400}]},
    *({"n": v} for v in (0, -1, 1.5, "2", True, [1], 129, 10**30, 17)),
    *({"stream": v} for v in (1, "yes", [])),
    *({"stop": v} for v in (5, "", [""], [5], ["x"] * 17, "x" * 257, {})),
    *({"seed": v} for v in (1.5, "1", 2**63, -(10**400), True)),
    *({"temperature": v} for v in (-0.1, 2.1, "1", True, [], 10**400)),
    *({"top_p": v} for v in (-1, 1.01, "1")),
    *({"max_tokens": v} for v in (0, -1, 1.5, "5", True)),
    *({"max_completion_tokens": v} for v in (0, "5")),
    *({"top_k": v} for v in (-2, 1.5)),
    *({"min_p": v} for v in (-1, 2)),
    *({"repetition_penalty": v} for v in (0, -1, 1e300)),
    *({"stream_options": v} for v in (5, {"include_usage": True}, {"include_usage": "yes"})),
    {"stream": True, "stream_options": {"made_up": True}},
    {"stream": True, "stream_options": {"include_obfuscation": True}},
    *({"logprobs": v} for v in ("yes", 1.5, -1, 10**30)),
    {"logprobs": True, "top_logprobs": 21},
    {"top_logprobs": 2},
    *({"tools": [{"type": "function"}]}, {"tool_choice": "required"}, {"functions": [{}]}),
    *({"response_format": {"type": "json_object"}}, {"logit_bias": {"5": 100}}, {"frequency_penalty": 0.5}),
    *({"reasoning_effort": "high"}, {"made_up": 1}, {"\x00": 1}, {"x" * 1000: 1}),
    *({"stop_token_ids": v} for v in ([5], "x", [1.5])),
    *({"ctc_drafter": v} for v in (5, {"drafter": "other"}, {"drafter": 5}, {"steps": 1}, {"made_up": True})),
]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_bad_fields_are_refused(server: Live, path: str) -> None:
    good: dict[str, Any] = {"model": "tiny", "max_tokens": 2, "temperature": 0}
    good |= {"messages": HI} if path == CHAT else {"prompt": "Hi"}
    only_chat = {"messages", "max_completion_tokens"}
    with httpx2.Client(base_url=server.base, timeout=60) as http:
        for fields in FIELDS:
            if path == TEXT and only_chat & fields.keys():
                continue
            response = http.post(
                path, content=json.dumps({**good, **fields}), headers={"content-type": "application/json"}
            )
            error = check(response)
            assert response.status_code == (404 if error["code"] == "model_not_found" else 400), fields
        assert http.post(path, json=good).status_code == 200


@pytest.mark.parametrize(
    "prompt", [None, "", [], 5, {}, [""], [[]], [5.5], [-1], [10**9], [10**400], [True], ["x", 5], "apple " * 400]
)
def test_bad_prompts_are_refused(server: Live, prompt: Any) -> None:
    content = json.dumps({"model": "tiny", "prompt": prompt})
    check(HTTP.post(server.base + TEXT, content=content, headers={"content-type": "application/json"}), 400)


BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"5",
    b"\xff\xfe",
    b"\x00",
    b"{'model': 'tiny'}",
    b'{"model": "tiny", "messages": [], }',
    b'{"temperature": NaN}',
    b'{"temperature": Infinity, "model": "tiny"}',
    b'{"model": "tiny", "temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "\\udfff"}',
    b'{"n": ' + b"1" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"{}",
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:40]))
def test_bad_bodies_are_refused(server: Live, body: bytes) -> None:
    for path in (CHAT, TEXT):
        check(HTTP.post(server.base + path, content=body, headers={"content-type": "application/json"}), 400)


def test_other_content_types_are_refused(server: Live) -> None:
    body = json.dumps({"model": "tiny", "messages": HI, "max_tokens": 2}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "x", ""):
        check(HTTP.post(server.base + CHAT, content=body, headers={"content-type": kind}), 415)
    check(HTTP.post(server.base + CHAT, content=body), 415)
    header = {"content-type": "Application/JSON; charset=utf-8"}
    assert HTTP.post(server.base + CHAT, content=body, headers=header).status_code == 200


def test_all_that_the_page_is_made_of_is_served_under_its_policy(server: Live) -> None:
    index = HTTP.get(f"{server.base}/")
    names = re.findall(r'(?:src|href)="([^":]+)"', index.text)
    assert sorted(names) == sorted(path.name for path in PAGE.iterdir() if path.name != "index.html")
    kinds = {"css": "text/css", "js": "text/javascript"}
    for name in names:
        reply = HTTP.get(f"{server.base}/{name}")
        assert reply.content == (PAGE / name).read_bytes()
        assert reply.headers["content-type"].startswith(kinds[name.rsplit(".")[-1]])
        assert reply.headers["content-security-policy"] == index.headers["content-security-policy"] == POLICY


def test_unknown_routes_and_wrong_methods_are_refused(server: Live) -> None:
    for path in (
        "/v1",
        "/v1/",
        "/v1/embeddings",
        "/v1/chat/completions/",
        "//",
        "/../etc/passwd",
        "/page/page.js",
        "/docs",
    ):
        check(HTTP.get(server.base + path), 404)
    for method, path in (("GET", CHAT), ("DELETE", "/v1/models"), ("POST", "/health"), ("PUT", "/"), ("GET", TEXT)):
        response = HTTP.request(method, server.base + path)
        check(response, 405)
        assert response.headers["allow"]


def test_large_bodies_are_refused_before_they_are_read(target: Target) -> None:
    with live(target, {"none": NoDrafter()}, limits=Limits(max_body=2000, body_timeout=0.3)) as small:
        header = {"content-type": "application/json"}
        check(HTTP.post(small.base + CHAT, content=b" " * 2001, headers=header), 413)
        parts = (b" " * 1000 for _ in range(100))
        check(HTTP.post(small.base + CHAT, content=parts, headers=header), 413)
        check(HTTP.post(small.base + CHAT, content=b" " * 2000, headers=header), 400)
        port = int(small.base.rsplit(":", 1)[1])
        for length, status in ((str(10**15), b"413"), ("50", b"408")):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
                raw.sendall(head(length))
                assert status in raw.recv(1000).splitlines()[0]
        assert small.client().models.list().data


def test_a_head_that_does_not_arrive_is_not_waited_for(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HEAD_TIMEOUT", 0.3)
    monkeypatch.setattr(wire, "MAX_CONNECTIONS", 4)
    with live(target, {"paced": PacedDrafter()}) as server:
        port = int(server.base.rsplit(":", 1)[1])

        def connection() -> socket.socket:
            return socket.create_connection(("127.0.0.1", port), timeout=20)

        for start in (b"", b"POST /v1/comp", head(50)[:-4]):
            with connection() as raw:
                raw.sendall(start)
                with raw.makefile("rb") as answer:
                    assert b"408" in answer.read().splitlines()[0]  # and the connection is closed
        with connection() as raw:  # a second request on a connection, begun and not ended
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            whole = b""
            while b"waiting" not in whole:
                whole += raw.recv(1000)
            assert b"200" in whole.splitlines()[0]
            raw.sendall(b"GET /hea")
            assert b"408" in raw.recv(1000).splitlines()[0]
        # An answer may take as long as it likes.
        client = server.client()
        assert client.chat.completions.create(**ask(QUESTIONS[0], max_tokens=40)).usage.completion_tokens == 40  # type: ignore[union-attr]
        client.close()
        with contextlib.ExitStack() as opened:
            for raw in [opened.enter_context(connection()) for _ in range(6)][4:]:
                assert b"503" in raw.recv(1000).splitlines()[0]


def test_too_much_text_is_refused_before_it_is_tokenized(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 1}
    monkeypatch.setattr(type(server.service.target.tokenizer), "__call__", lambda *a, **k: pytest.fail("tokenized"))
    monkeypatch.setattr(Target, "prompt_ids", lambda *a, **k: pytest.fail("tokenized"))
    many = check(HTTP.post(server.base + TEXT, json=body | {"prompt": ["a"] * 1000}), 400)
    assert many["param"] == "n"
    long = "x" * 500_000
    for path, content in ((TEXT, {"prompt": long}), (CHAT, {"messages": [{"role": "user", "content": long}]})):
        error = check(HTTP.post(server.base + path, json=body | content), 400)
        assert error["code"] == "context_length_exceeded" and "characters" in error["message"]


# ---------------------------------------------------------------- load


def test_as_many_are_read_at_a_time_as_may_wait(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizing has a place in the queue too, and who leaves meanwhile is not answered."""
    go, real = threading.Event(), reading.read_call
    monkeypatch.setattr("ctc_drafter.serving.app.read_call", lambda *a: go.wait(30) and real(*a))
    with live(target, {"none": NoDrafter()}, slots=1, queue=2) as server, ThreadPoolExecutor(2) as pool:
        client = server.client()
        try:
            asked = [pool.submit(client.chat.completions.create, **ask(q, max_tokens=5)) for q in QUESTIONS[:2]]
            wait_until(lambda: server.service._reading == 2)
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.3).chat.completions.create(**ask(QUESTIONS[2]))
            wait_until(lambda: server.service._reading == 2)
            raw = socket.create_connection(("127.0.0.1", int(server.base.rsplit(":", 1)[1])), timeout=20)
            content = json.dumps(ask(QUESTIONS[3])).encode()
            raw.sendall(head(len(content)) + content)
            wait_until(lambda: server.service._reading == 3)
            with pytest.raises(openai.RateLimitError):
                client.chat.completions.create(**ask(QUESTIONS[4]))
            raw.close()
        finally:
            go.set()
        assert [reply.result().choices[0].finish_reason for reply in asked] == ["length"] * 2


def test_a_body_that_does_not_come_does_not_hold_up_the_end(target: Target) -> None:
    with live(target, {"none": NoDrafter()}) as server, contextlib.ExitStack() as opened:
        address = ("127.0.0.1", int(server.base.rsplit(":", 1)[1]))
        raw = opened.enter_context(socket.create_connection(address, timeout=20))
        raw.sendall(head(100) + b"{")
        time.sleep(0.2)
        asyncio.run(server.service.scheduler.drain())
        began = time.monotonic()
        assert b"503" in raw.recv(1000).splitlines()[0]
        assert time.monotonic() - began < 5


def test_a_model_that_is_gone_is_told(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(target, {"none": NoDrafter()}) as server:
        monkeypatch.setattr(Batch, "step", lambda batch: 1 / 0)
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="log says why"):
                server.client().chat.completions.create(**ask("Hi"))
        health = HTTP.get(server.base + "/health")
        assert (health.status_code, health.json()["status"]) == (503, "dead")


def running(server: Live) -> tuple[int, int]:
    stats = server.service.scheduler.stats()
    return stats.running, stats.waiting


def test_a_client_that_leaves_frees_its_slot(target: Target) -> None:
    with live(target, {"paced": PacedDrafter()}, slots=1, queue=4) as slow:
        stream = slow.client().chat.completions.create(stream=True, **ask(QUESTIONS[0], max_tokens=150))
        next(iter(stream))
        assert running(slow) == (1, 0)
        stream.close()
        wait_until(lambda: running(slow) == (0, 0), 1.0)
        with pytest.raises(openai.APITimeoutError):
            slow.client().with_options(timeout=0.3).chat.completions.create(**ask(QUESTIONS[0], max_tokens=150))
        wait_until(lambda: running(slow) == (0, 0), 1.0)
        text = slow.service.metrics.text().decode()
        assert 'abandoned_requests_total{drafter="paced"} 2.0' in text


def test_a_client_that_leaves_gives_up_its_place_in_the_queue(target: Target) -> None:
    with live(target, {"paced": PacedDrafter()}, slots=1, queue=1) as slow, ThreadPoolExecutor(2) as pool:
        client = slow.client()
        first = pool.submit(client.chat.completions.create, **ask(QUESTIONS[0], max_tokens=60))
        wait_until(lambda: running(slow) == (1, 0))
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2).chat.completions.create(**ask(QUESTIONS[1]))
        wait_until(lambda: running(slow) == (1, 0), 1.0)
        assert first.result().choices[0].finish_reason == "length"


def test_a_full_queue_answers_429(target: Target) -> None:
    with live(target, {"paced": PacedDrafter()}, slots=1, queue=1) as slow, ThreadPoolExecutor(6) as pool:
        client = slow.client()

        def attempt(i: int) -> str:
            try:
                return str(client.chat.completions.create(**ask(QUESTIONS[i], max_tokens=20)).choices[0].finish_reason)
            except openai.RateLimitError as error:
                assert error.code == "queue_full"
                assert error.response.headers["retry-after"]
                return "busy"

        outcomes = sorted(pool.map(attempt, range(6)))
        assert outcomes == ["busy"] * 4 + ["length"] * 2
        with pytest.raises(openai.BadRequestError, match="ask for fewer"):
            client.chat.completions.create(**ask("Hi", n=3))


def test_the_time_limit_is_told_in_a_status_or_in_the_stream(target: Target) -> None:
    with live(target, {"paced": PacedDrafter(0.05)}, timeout=0.5) as slow:
        client = slow.client()
        with pytest.raises(openai.APIStatusError) as error:
            client.chat.completions.create(**ask(QUESTIONS[0], max_tokens=150))
        assert (error.value.status_code, error.value.code) == (408, "request_timeout")
        text = ""
        with pytest.raises(openai.APIError, match="time limit") as late:
            for chunk in client.chat.completions.create(stream=True, **ask(QUESTIONS[0], max_tokens=150)):
                text += chunk.choices[0].delta.content or ""
        assert late.value.code == "request_timeout"
        assert text
        assert "abandoned_requests_total{" not in slow.service.metrics.text().decode()
        assert client.chat.completions.create(**ask(QUESTIONS[0], max_tokens=2)).choices


def test_a_failure_of_the_model_is_told_and_the_next_request_goes_well(target: Target) -> None:
    broken = BrokenDrafter()
    with live(target, {"broken": broken, "none": NoDrafter()}) as server:
        client = server.client()
        with pytest.raises(openai.InternalServerError, match="log says why"):
            client.chat.completions.create(**ask("Hi"))
        broken.count = 0
        with pytest.raises(openai.APIError, match="log says why"):
            list(client.chat.completions.create(stream=True, **ask("Hi")))
        assert client.chat.completions.create(**ask("Hi", extra_body={"ctc_drafter": {"drafter": "none"}})).choices


def test_a_client_that_does_not_read_is_dropped_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctc_drafter.serving.stream.GRACE", 0.2)
    ended: list[str] = []

    async def content() -> AsyncIterator[bytes]:
        yield b"data: {}\n\n"

    async def never(*message: Any) -> Any:
        await asyncio.Event().wait()

    async def trial() -> None:
        submission: Any = SimpleNamespace(deadline=time.monotonic() + 0.1, cancel=lambda: ended.append("cancelled"))
        stream = EventStream(content(), submission, lambda: ended.append("left"))
        await asyncio.wait_for(stream({"type": "http", "asgi": {"spec_version": "2.3"}}, never, never), 5)

    asyncio.run(trial())
    assert ended == ["cancelled", "left"]
