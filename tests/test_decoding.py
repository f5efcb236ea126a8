"""The loop: whatever the drafter proposes, the text is the model's own."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from conftest import CONTEXT, TEXTS, build_drafter
from ctc_drafter.acceptance import Sampling
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import Drafter, NoDrafter, load_drafter
from ctc_drafter.errors import UserError
from ctc_drafter.pace import Pace
from ctc_drafter.steps import PHASES
from ctc_drafter.target import Target
from helpers import (
    BUILDS,
    CAPABLE,
    Build,
    Scripted,
    always_right,
    equal_siblings,
    first_with,
    plain,
    random_tree,
    run,
    save_model,
)

TOKENS = 48


@pytest.fixture(autouse=True)
def never_ending(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """No stop token, so that every answer has its full length."""
    monkeypatch.setattr(target, "stop_ids", frozenset())


@pytest.fixture(scope="module")
def prompt(target: Target) -> list[int]:
    return [t for t in target.tokenizer(TEXTS[0])["input_ids"]][:12]


@pytest.fixture
def answer(target: Target, prompt: list[int]) -> list[int]:
    return plain(target, prompt, TOKENS)


def scripted(build: Build, target: Target, prompt: list[int], answer: list[int]) -> Scripted:
    return Scripted(build, prompt, answer, target.vocab_size)


# ---------------------------------------------------------------- the same text


def test_the_answer_is_worth_comparing(answer: list[int]) -> None:
    assert len(answer) == TOKENS and len(set(answer)) > 5


def test_plain_decoding(target: Target, prompt: list[int], answer: list[int]) -> None:
    out, steps = run(target, NoDrafter(), prompt, TOKENS)
    assert out == answer
    assert [len(s.tokens) for s in steps] == [1] * TOKENS and steps[-1].finish == "length"
    assert sum(s.accepted + s.drafted for s in steps) == 0


@pytest.mark.parametrize("budget", [0, 1, 4, 16, 32])
@pytest.mark.parametrize("build", BUILDS)
def test_any_drafter(build: Build, budget: int, target: Target, prompt: list[int], answer: list[int]) -> None:
    out, steps = run(target, scripted(build, target, prompt, answer), prompt, TOKENS, budget=budget)
    assert out == answer
    assert sum(len(s.tokens) for s in steps[:-1]) == 1 + sum(s.accepted + 1 for s in steps[1:-1])


class Wandering(Pace):
    """Takes its candidates in turn, and notes what it is told."""

    def __init__(self, budgets: Sequence[int]) -> None:
        super().__init__(budgets)
        self.told: list[tuple[int, Mapping[int, int]]] = []

    def choose(self, rows: int, most: int | None = None) -> int:
        return self.budgets[len(self.told) % len(self.budgets)]

    def record(self, rows: int, told: Mapping[int, int], seconds: float) -> None:
        assert seconds > 0
        self.told.append((rows, told))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_budget_chosen_anew_in_every_pass(
    temperature: float, target: Target, drafter_folder: Path, prompt: list[int]
) -> None:
    """Plain passes among drafted ones change nothing of the text, and the drafter reads what it missed."""
    drafter, sampling = load_drafter(str(drafter_folder), target), Sampling(temperature=temperature, seed=3)
    pace = Wandering([0, 8, 3, 0, 0])
    out, steps = run(target, drafter, prompt, TOKENS, budget=8, sampling=sampling, pace=pace)
    assert out == run(target, NoDrafter(), prompt, TOKENS, budget=0, sampling=sampling)[0]
    assert [step.drafted for step in steps[1:6]] == [0, 8, 3, 0, 0]
    assert [(rows, max(told), told[max(told)]) for rows, told in pace.told] == [
        (1, step.drafted, len(step.tokens)) for step in steps[1:]
    ]
    assert all(told.keys() == {b for b in (0, 3, 8) if 0 < b < max(told)} | {max(told)} for _, told in pace.told)
    again = Wandering([8])
    assert run(target, drafter, prompt, TOKENS, budget=8, sampling=sampling, pace=again)[0] == out


@pytest.mark.parametrize("budget", [1, 16])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"layers": 2, "feature_layers": [1, -1]},
        {"topology": "merge"},
        {"topology": "merge", "tree": "paths"},
        {"topology": "merge", "tree": "slots", "module": "heads"},
        {"kind": "medusa"},
        {"kind": "parallel"},
        {"kind": "parallel", "label_context": True},
    ],
)
def test_untrained_drafters(
    config: dict[str, object], budget: int, target: Target, prompt: list[int], answer: list[int], tmp_path: Path
) -> None:
    drafter = load_drafter(str(build_drafter(tmp_path / "d", target, **config)), target)
    out, steps = run(target, drafter, prompt, TOKENS, budget=budget)
    assert out == answer
    assert {s.drafted for s in steps[1:]} == {budget}


def walking_in_circles(target: Target, period: int = 7) -> Target:
    """The same shape with weights that name the next token of a circle of `period` ids after each."""
    model = copy.deepcopy(target.model)
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    here = torch.arange(target.vocab_size // period * period)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = model.model.embed_tokens.weight
        embedding /= embedding.norm(dim=1, keepdim=True).clamp_min(1e-6)  # one may be padding
        model.lm_head.weight.zero_()[here // period * period + (here + 1) % period] = embedding[here]
    circles = Target.of(model, target.tokenizer, "circles")
    circles.stop_ids = frozenset()
    return circles


@pytest.mark.parametrize("budget", [1, 5, 16])
def test_lookup(budget: int, target: Target, prompt: list[int]) -> None:
    """On a text that goes in circles its guesses are accepted; on another the answer is the same anyway."""
    text = (prompt * 4)[: CONTEXT - TOKENS - 1]
    out, steps = run(target, load_drafter("lookup", target), text, TOKENS, budget=budget)
    assert out == plain(target, text, TOKENS)
    assert {s.drafted for s in steps[1:]} == {budget}

    circles, text = walking_in_circles(target), [*range(14, 21)] * 2
    out, steps = run(circles, load_drafter("lookup", circles), text, TOKENS, budget=budget)
    assert out == plain(circles, text, TOKENS) == [14 + i % 7 for i in range(TOKENS)]
    assert all(s.accepted >= min(budget, 7) for s in steps[1:-1]) and steps[-1].accepted


@pytest.mark.parametrize("build", [always_right, random_tree])
def test_prompt_of_one_token(build: Build, target: Target) -> None:
    want = plain(target, [9], TOKENS)
    assert run(target, scripted(build, target, [9], want), [9], TOKENS)[0] == want


@pytest.mark.parametrize("kind", ["gpt2", "opt", "mistral", "gemma3_text"])
def test_up_to_the_edge_of_the_context(kind: str, tmp_path: Path) -> None:
    """Learned positions must not be overrun by draft nodes; sliding windows must not matter."""
    target = Target.load(save_model(tmp_path / kind, kind, **CAPABLE[kind]), dtype="float32", device="cpu")
    target.stop_ids = frozenset()
    prompt = [5, 9, 31, 7]
    want = plain(target, prompt, target.max_context - len(prompt))
    assert len(prompt) + len(want) == target.max_context
    for build in (always_right, random_tree):
        out, steps = run(target, scripted(build, target, prompt, want), prompt, 10_000, budget=16)
        assert out == want and steps[-1].finish == "length"
    longest = prompt + want[:-1]
    assert run(target, scripted(always_right, target, longest, want[-1:]), longest, 10)[0] == want[-1:]


def test_repetition_penalty_is_the_models_own(target: Target, prompt: list[int]) -> None:
    """The penalty depends on all text so far, also on what this very step accepts."""
    want = plain(target, prompt, TOKENS, repetition_penalty=1.4)
    assert want != plain(target, prompt, TOKENS)
    sampling = Sampling(repetition_penalty=1.4)
    for build in (always_right, random_tree, equal_siblings):
        assert run(target, scripted(build, target, prompt, want), prompt, TOKENS, sampling=sampling)[0] == want


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9}, {"repetition_penalty": 1.4, "top_k": 50}])
def test_a_seed_gives_the_sample_of_plain_decoding(
    options: dict[str, float], target: Target, prompt: list[int], answer: list[int]
) -> None:
    """Not only the distribution: the very tokens, whatever the trees and their sizes."""

    def sample(seed: int, drafter: Drafter, budget: int) -> list[int]:
        sampling = Sampling(**{"temperature": 1.0, "seed": seed, **options})  # type: ignore[arg-type]
        return run(target, drafter, prompt, TOKENS, sampling=sampling, budget=budget)[0]

    want = sample(1, NoDrafter(), 0)
    assert want != answer and want != sample(2, NoDrafter(), 0)
    for build in BUILDS:
        for told, budget in ((want, 5), (want, 16), (answer, 3)):
            assert sample(1, scripted(build, target, prompt, told), budget) == want


# ---------------------------------------------------------------- speed, in steps


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_a_perfect_chain_gives_its_depth_and_one(
    depth: int, target: Target, prompt: list[int], answer: list[int]
) -> None:
    _, steps = run(target, scripted(always_right, target, prompt, answer), prompt, TOKENS, budget=depth)
    assert all(len(s.tokens) == depth + 1 and s.accepted == depth for s in steps[1:-1])
    assert len(steps) == 1 + -(-(TOKENS - 1) // (depth + 1))
    assert all(s.drafted == depth for s in steps[1:])


def test_phases_are_timed(target: Target, prompt: list[int], answer: list[int]) -> None:
    _, steps = run(target, scripted(always_right, target, prompt, answer), prompt, TOKENS)
    assert set(steps[0].seconds) == {"prefill"}
    for step in steps[1:]:
        assert tuple(step.seconds) == PHASES and all(s >= 0 for s in step.seconds.values())


def test_drafter_sees_each_committed_pair_once(target: Target, prompt: list[int], answer: list[int]) -> None:
    """Features and next tokens arrive in order, exactly those of a forward pass over the text."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Listening(Scripted):
        feature_layers = (1, -1)

        def draft(self, features: torch.Tensor, next_tokens: torch.Tensor) -> int:
            pairs.append((features.clone(), next_tokens.clone()))
            return super().draft(features, next_tokens)

    drafter = Listening(random_tree, prompt, answer, target.vocab_size)
    run(target, drafter, prompt, TOKENS, budget=6)
    seen = torch.cat([t for _, t in pairs], 1)
    assert seen[0].tolist() == (prompt[1:] + answer)[: seen.shape[1]] and seen.shape[1] > TOKENS
    with torch.inference_mode():
        _, want = target.forward(torch.tensor([(prompt + answer)[: seen.shape[1]]]), use_cache=False)
    torch.testing.assert_close(torch.cat([f for f, _ in pairs], 1), want, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- endings


@pytest.mark.parametrize("place", [0, 1, 5, 6, 7, 20])
@pytest.mark.parametrize("build", [always_right, random_tree])
def test_stop_token_inside_a_run(
    build: Build, place: int, target: Target, prompt: list[int], answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = answer[place]
    monkeypatch.setattr(target, "stop_ids", frozenset({stop, 10**6}))
    out, steps = run(target, scripted(build, target, prompt, answer), prompt, TOKENS, budget=5)
    assert out == answer[: answer.index(stop) + 1] == plain(target, prompt, TOKENS)
    assert steps[-1].finish == "stop"


@pytest.mark.parametrize("limit", [1, 2, 5, 6, 7, 8])
def test_limit_inside_a_run(limit: int, target: Target, prompt: list[int], answer: list[int]) -> None:
    out, steps = run(target, scripted(always_right, target, prompt, answer), prompt, limit, budget=5)
    assert out == answer[:limit] and steps[-1].finish == "length"
    last = steps[-1]
    assert last.accepted == (len(last.tokens) if limit not in (1, 7) else len(last.tokens) - 1)


@pytest.mark.parametrize("build", [always_right, random_tree])
def test_stop_strings_anywhere(build: Build, target: Target, prompt: list[int], answer: list[int]) -> None:
    """Within a token, across tokens, across steps: generation ends with the first token that completes one."""
    text = target.tokenizer.decode(answer, skip_special_tokens=True)
    rng = random.Random(0)
    for _ in range(25):
        start, size = rng.randrange(len(text) - 8), rng.randint(1, 8)
        stops = ["", "never in there", text[start : start + size]]
        if "\ufffd" in stops[-1]:  # half a character; no user can type it
            continue
        drafter = scripted(build, target, prompt, answer)
        out, steps = run(target, drafter, prompt, TOKENS, budget=3, stop=stops)
        assert out == answer[: first_with(target, answer, stops)]
        assert steps[-1].finish == "stop"


def test_stop_string_across_the_border_of_steps(target: Target) -> None:
    """Two tokens of an ASCII text, one on each side of a border."""
    tokens = target.tokenizer(TEXTS[1])["input_ids"]
    border = 5  # the first token, then steps of 4
    stop = target.tokenizer.decode(tokens[border - 1 : border + 1])[1:]
    assert first_with(target, tokens, [stop]) == border + 1

    class Dictated(Target):
        """Chooses the tokens of the text, whatever it reads."""

        def _pass(self, ids, offsets, ancestors, cache, **options):  # type: ignore[no-untyped-def]
            _, features = super()._pass(ids, offsets, ancestors, cache, **options)
            place = offsets if cache.length else offsets[:, -1:] * 0 - 1
            chosen = torch.tensor(tokens)[place + max(cache.length, 0) - (0 if cache.length else -1)]
            return torch.nn.functional.one_hot(chosen, self.vocab_size).float(), features

    dictated = Dictated(target.model, target.tokenizer, "dictated")
    dictated.stop_ids = frozenset()
    out, steps = run(dictated, Scripted(always_right, [1], tokens, target.vocab_size), [1], 20, budget=3, stop=[stop])
    assert out == tokens[: border + 1]
    assert [len(s.tokens) for s in steps] == [1, 4, 1] and steps[-1].finish == "stop"


def test_no_stop_string_found(target: Target, prompt: list[int], answer: list[int]) -> None:
    out, steps = run(target, NoDrafter(), prompt, TOKENS, stop=["never in there"])
    assert out == answer and steps[-1].finish == "length"


# ---------------------------------------------------------------- the caller


@pytest.mark.parametrize(
    ("prompt_ids", "options", "match"),
    [
        ([], {}, "prompt is empty"),
        ([3] * CONTEXT, {}, f"has {CONTEXT} tokens and the context of 'tiny' ends at {CONTEXT}"),
        ([3], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([3], {"budget": -1}, "budget must be at least 0"),
    ],
)
def test_impossible_requests(target: Target, prompt_ids: list[int], options: dict[str, int], match: str) -> None:
    with pytest.raises(UserError, match=match):
        next(generate(target, NoDrafter(), prompt_ids, **options))  # type: ignore[arg-type]


def test_inference_mode_stays_inside(target: Target, prompt: list[int]) -> None:
    for _ in generate(target, NoDrafter(), prompt, max_new_tokens=3):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    steps = generate(target, NoDrafter(), prompt, max_new_tokens=3)
    next(steps)
    steps.close()
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_closing_early_leaves_no_trace(target: Target, prompt: list[int], answer: list[int]) -> None:
    drafter: Drafter = scripted(always_right, target, prompt, answer)
    steps = generate(target, drafter, prompt)
    next(steps), next(steps)
    steps.close()
    assert run(target, drafter, prompt, TOKENS)[0] == answer


def test_interleaved_generations(target: Target, prompt: list[int], answer: list[int], tmp_path: Path) -> None:
    """Two generations on one target, with other features each, do not disturb each other."""
    drafter = load_drafter(str(build_drafter(tmp_path / "d", target, feature_layers=[1, -1])), target)
    first = generate(target, drafter, prompt, max_new_tokens=TOKENS)
    second = generate(target, NoDrafter(), prompt, max_new_tokens=TOKENS)
    out: tuple[list[int], list[int]] = ([], [])
    for mine, other in zip(first, second):
        out[0].extend(mine.tokens)
        out[1].extend(other.tokens)
    out[0].extend(t for s in first for t in s.tokens)
    out[1].extend(t for s in second for t in s.tokens)
    assert out[0] == answer
    assert out[1] == answer[: len(out[1])] and len(out[1]) >= len(out[0]) // 4


def test_threads_take_turns(target: Target, prompt: list[int], answer: list[int], tmp_path: Path) -> None:
    """Generations in several threads, with other features each, give the text of one by itself."""
    drafters = [
        NoDrafter(),
        *(load_drafter(str(build_drafter(tmp_path / str(i), target, feature_layers=[i, -1])), target) for i in (1, 2)),
    ]

    def work(number: int) -> list[int]:
        return run(target, drafters[number % 3].twin(), prompt, TOKENS)[0]

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(24))) == [answer] * 24
