"""A few hundred of the hostile requests that `make fuzz` sends by the thousand, and the answer afterwards."""

from __future__ import annotations

import importlib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from openai import OpenAI

from ctc_drafter.drafters import NoDrafter
from ctc_drafter.target import Target
from live import NAME, QUESTIONS, Live, ask, chat_ids, text_of, tokens_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_hostile_requests_get_a_4xx_and_the_server_goes_on(
    server: Live, client: OpenAI, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    fuzz, hostile = importlib.import_module("fuzz"), importlib.import_module("hostile")
    chosen = [case for case in hostile.cases(600, 7, NAME) if not case.kind.startswith("slow")]
    chosen = [case for case in chosen if case.kind != "foreign host"]  # this server is not told that it is local
    assert {case.kind for case in chosen} >= {"broken JSON", "deep nesting", "bad head", "half character", "oversized"}
    port = urlsplit(server.base).port
    assert port is not None
    statuses, faults = fuzz.attack(port, chosen, 8)
    assert faults == []
    assert sum(counts.total() for counts in statuses.values()) == len(chosen)
    reply = client.chat.completions.create(**ask(QUESTIONS[0]))
    want = text_of(target, tokens_of(target, NoDrafter(), chat_ids(target, QUESTIONS[0]), max_new_tokens=40))
    assert reply.choices[0].message.content == want
