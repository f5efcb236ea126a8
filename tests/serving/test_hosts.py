"""A server on the loopback address answers to no name but its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ctc_drafter.serving.hosts import LocalNames, is_local_name


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:80", "[::1]:8000", "[::1]", "10.0.0.7"]
)
def test_addresses_and_localhost_are_local(host: str) -> None:
    assert is_local_name(host)


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "x", "[::1", "["],
)
def test_other_names_are_not(host: str) -> None:
    assert not is_local_name(host)


def test_a_foreign_name_is_refused_in_openais_shape() -> None:
    passed: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["type"])

    async def ask(host: bytes) -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", host)]}
        await LocalNames(app)(scope, None, send)  # type: ignore[arg-type]
        return sent

    assert asyncio.run(ask(b"localhost:8000")) == [] and passed == ["http"]
    start, body = asyncio.run(ask(b"evil.example:8000"))
    assert start["status"] == 403 and b"unknown_host" in body["body"] and passed == ["http"]
