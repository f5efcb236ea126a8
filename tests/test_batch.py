"""Batches: whatever rows come, go and share a pass, each answers as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from conftest import build_drafter
from ctc_drafter.acceptance import Chooser, Sampling
from ctc_drafter.batch import Batch
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import Drafter, NoDrafter, load_drafter
from ctc_drafter.drafters.hybrid import HybridDrafter
from ctc_drafter.errors import UserError
from ctc_drafter.steps import Step
from ctc_drafter.target import Target
from helpers import (
    BUILDS,
    CAPABLE,
    CONTEXT,
    Build,
    ScriptedForMany,
    joined,
    save_model,
)

TOKENS = 24
BUDGET = 5
ROWS = 4


# ---------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    tokens: int
    sampling: Sampling = Sampling()  # noqa: RUF009
    stop: tuple[str, ...] = ()
    draft: bool = True

    def options(self) -> dict[str, Any]:
        return {"max_new_tokens": self.tokens, "sampling": self.sampling, "stop": self.stop}


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    finish: str | None
    sure: int
    """How many tokens come before the first near-tie, whose order rounding may change."""


Alone = Callable[[Request], Answer]


# ---------------------------------------------------------------- models and drafters


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma3_text"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """Full attention, a sliding window, and both mixed."""
    folder = save_model(tmp_path_factory.mktemp("families") / request.param, request.param, **CAPABLE[request.param])
    return Target.load(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def alone(family: Target) -> Alone:
    """What plain decoding answers one by one."""
    known: dict[Request, Answer] = {}
    scores_of = Chooser.scores

    def answer(request: Request) -> Answer:
        if request not in known:
            margins: list[float] = []

            def scores(*arguments: Any) -> torch.Tensor:
                out = scores_of(*arguments)
                best, second = out[0, 0].topk(2).values.tolist()
                margins.append(best - second)
                return out

            with patch.object(Chooser, "scores", scores):
                steps = list(generate(family, NoDrafter(), list(request.prompt), **request.options()))
            sure = next((i for i, margin in enumerate(margins) if margin < 1e-4), len(margins))
            known[request] = Answer(*joined(steps), sure)
        return known[request]

    return answer


@pytest.fixture(scope="module")
def drafters(family: Target, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drafter]:
    folder = tmp_path_factory.mktemp("drafters")
    out: dict[str, Drafter] = {name: load_drafter(name, family) for name in ("none", "lookup")}
    for kind, config in (("ctc", {"feature_layers": [1, -1]}), ("eagle", {}), ("hydra", {}), ("medusa", {})):
        config = {**config, "heads": 4, "kv_heads": 2} if kind in ("ctc", "eagle") else config
        out[kind] = load_drafter(str(build_drafter(folder / kind, family, kind, **config)), family)
    out["ctc+lookup"] = HybridDrafter(out["ctc"])
    return out


PROMPTS = st.one_of(
    st.lists(st.integers(2, 250), min_size=1, max_size=12),
    st.lists(st.sampled_from([5, 9, 31]), min_size=1, max_size=CONTEXT - 1),
    st.just([7] * (CONTEXT - 1)),
).map(tuple)

SAMPLINGS = st.one_of(
    st.just(Sampling()),
    st.builds(Sampling, temperature=st.sampled_from([0.5, 1.0, 3.0]), seed=st.integers(0, 3)),
    st.just(Sampling(repetition_penalty=1.5)),
    st.builds(Sampling, temperature=st.just(1.0), top_k=st.just(20), top_p=st.just(0.9), seed=st.just(1)),
)

REQUESTS = st.builds(
    Request,
    prompt=PROMPTS,
    tokens=st.sampled_from([1, 2, 5, TOKENS, 10_000]),
    sampling=SAMPLINGS,
    stop=st.sampled_from([(), (), ("e",), ("th", "q")]),
    draft=st.booleans(),
)

ACTIONS = st.lists(
    st.one_of(REQUESTS, *[st.just("step")] * 3, st.integers(0, 10)),
    min_size=3,
    max_size=18,
)
"""Requests are added, numbers cancel the row of that rank."""


def play(batch: Batch, actions: list[Any]) -> Iterator[tuple[Request, list[Step]]]:
    """Do all that, then run to the end; yields every request with its steps, cancelled ones without a finish."""
    requests: dict[int, Request] = {}
    steps: dict[int, list[Step]] = {}
    running: list[int] = []

    def step() -> None:
        waiting = [key for key in running if not steps[key]]
        done = batch.step()
        # A step of one new row, or else one of every row.
        assert sorted(key for key, _ in done) == (waiting[:1] or sorted(running))
        for key, one in done:
            steps[key].append(one)
            if one.finish is not None:
                running.remove(key)

    for action in actions:
        if action == "step":
            step()
        elif isinstance(action, Request):
            if not batch.free:
                with pytest.raises(UserError, match="rows of the batch are taken"):
                    batch.add(list(action.prompt), **action.options())
                step()
                continue
            key = batch.add(list(action.prompt), **action.options(), drafter=None if action.draft else NoDrafter())
            requests[key], steps[key] = action, []
            running.append(key)
        elif running:
            batch.cancel(running.pop(action % len(running)))
        assert len(batch) == len(running) and batch.free == ROWS - len(running)
    while running:
        step()
    assert batch.step() == [] and batch.nbytes == 0
    for key, request in requests.items():
        yield request, steps[key]


def check(batch: Batch, actions: list[Any], alone: Alone) -> None:
    for request, steps in play(batch, actions):
        if not steps:
            continue
        tokens, finish = joined(steps)
        want = alone(request)
        if want.sure < len(want.tokens):
            tokens, finish = tokens[: want.sure], None
        assert tokens == want.tokens[: len(tokens)]
        assert finish is None or (finish, len(tokens)) == (want.finish, len(want.tokens))
        assert all(step.finish is None for step in steps[:-1])
        assert all(step.accepted == len(step.tokens) - 1 for step in steps[1:-1])
        if not request.draft:
            assert all(step.drafted == 0 for step in steps)


MANY = settings(
    max_examples=10,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("kind", ["none", "lookup", "ctc", "ctc+lookup", "eagle", "hydra", "medusa"])
@MANY
@given(actions=ACTIONS, adaptive=st.booleans())
def test_any_interleaving_answers_as_one_by_one(
    kind: str, family: Target, drafters: dict[str, Drafter], alone: Alone, actions: list[Any], adaptive: bool
) -> None:
    check(Batch(family, drafters[kind], rows=ROWS, budget=BUDGET, adaptive=adaptive), actions, alone)


@pytest.mark.parametrize("build", BUILDS)
@settings(MANY, max_examples=4)
@given(actions=ACTIONS)
def test_any_drafter(build: Build, family: Target, alone: Alone, actions: list[Any]) -> None:
    answers = {a.prompt: alone(a).tokens for a in actions if isinstance(a, Request)}
    drafter = ScriptedForMany(build, answers, family.vocab_size)  # type: ignore[arg-type]
    check(Batch(family, drafter, rows=ROWS, budget=BUDGET, adaptive=False), actions, alone)
