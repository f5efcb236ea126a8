"""A real server in a thread of this process, around a tiny target, and drafters whose pace a test decides."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import uvicorn
from openai import OpenAI

from ctc_drafter.decoding import generate
from ctc_drafter.drafters import Drafter, NoDrafter
from ctc_drafter.serving.app import Limits, Service, create_app
from ctc_drafter.serving.scheduler import Scheduler
from ctc_drafter.serving.server import bind
from ctc_drafter.serving.wire import Protocol
from ctc_drafter.target import Target

NAME = "tiny"
QUESTIONS = [f"How many apples are left if {i} are eaten?" for i in range(8)]


class PacedDrafter(NoDrafter):
    """Plain decoding with a pause before every step."""

    name = "paced"

    def __init__(self, seconds: float = 0.02) -> None:
        super().__init__()
        self.seconds = seconds

    def draft(self, features: torch.Tensor, next_tokens: torch.Tensor) -> Any:
        time.sleep(self.seconds)
        return next_tokens.device


class BrokenDrafter(NoDrafter):
    """Fails at its third step."""

    name = "broken"
    count = 0

    def draft(self, features: torch.Tensor, next_tokens: torch.Tensor) -> Any:
        self.count += 1
        if self.count > 2:
            raise RuntimeError("broken on purpose")
        return next_tokens.device


@dataclass
class Live:
    """A running server."""

    service: Service
    base: str

    def client(self, key: str = "unused", **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.base}/v1", api_key=key, max_retries=0, timeout=60, **options)


@contextmanager
def live(
    target: Target,
    drafters: Mapping[str, Drafter],
    *,
    slots: int = 8,
    queue: int = 8,
    timeout: float = 60.0,
    key: str | None = None,
    limits: Limits = Limits(),
) -> Iterator[Live]:
    """Serve `target`; the first of `drafters` is the default."""
    scheduler = Scheduler(target, drafters, budget=6, slots=slots, queue=queue, timeout=timeout)
    service = Service(target, scheduler, name=NAME, drafter=next(iter(drafters)), key=key, limits=limits)
    bound = bind("127.0.0.1", 0)
    config = uvicorn.Config(create_app(service), log_level="warning", http=Protocol, loop="asyncio", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Live(service, f"http://127.0.0.1:{bound.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()
    assert not thread.is_alive()


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def chat_ids(target: Target, question: str) -> list[int]:
    return target.prompt_ids([{"role": "user", "content": question}])


def tokens_of(target: Target, drafter: Drafter, ids: list[int], **options: Any) -> list[int]:
    """What `generate` itself says."""
    return [t for step in generate(target, drafter, ids, budget=6, **options) for t in step.tokens]


def text_of(target: Target, tokens: list[int]) -> str:
    return str(target.tokenizer.decode(tokens, skip_special_tokens=True))


def ask(question: str, **options: Any) -> dict[str, Any]:
    """Arguments of a greedy chat request."""
    messages = [{"role": "user", "content": question}]
    return {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 40, **options}
