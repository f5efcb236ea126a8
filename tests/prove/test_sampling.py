"""What is sampled has the target's exact distribution, whatever is drafted; and the tests would notice if it had not.

A model with seven tokens, so that every text of three can be enumerated: its exact distribution comes from passes of
the model over all prefixes and from the processors' definitions in plain Python. Samples come from the whole engine,
many rows at a time.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, product
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ctc_drafter import acceptance, decoding
from ctc_drafter.acceptance import Sampling
from ctc_drafter.batch import Batch
from ctc_drafter.drafters import CTCConfig, CTCDrafter, Drafter, LookupDrafter, NoDrafter
from ctc_drafter.drafters.hybrid import HybridDrafter
from ctc_drafter.target import Target
from ctc_drafter.tree import ROOT, DraftTree
from distribution import SETTINGS, chi_square, chi_square_limit, kolmogorov, kolmogorov_limit, processed
from helpers import Build, Scripted, always_right, equal_siblings, pack, random_tree

from .tally import TALLY

VOCAB, DEPTH = 7, 3
PROMPT = [5, 3, 0, 3]
DRAWS, SHORT_DRAWS, POWER_DRAWS = 2400, 400, 800
ROWS, BUDGET = 32, 9

Text = tuple[int, ...]
Exact = dict[Text, list[float]]
"""For every prefix of an answer the distribution of its next token."""


@pytest.fixture(scope="module")
def seven() -> Target:
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=32, initializer_range=0.35, **sizes, **ends)
    return Target.of(LlamaForCausalLM(config).float(), None, "seven")


@pytest.fixture(scope="module")
def logits(seven: Target) -> Exact:
    """The model's own, without a cache and without processors."""
    out: Exact = {}
    for depth in range(DEPTH):
        texts = list(product(range(VOCAB), repeat=depth))
        with torch.inference_mode():
            scores = seven.model(torch.tensor([PROMPT + list(text) for text in texts]), use_cache=False).logits[:, -1]
        out |= dict(zip(texts, scores.double().tolist()))
    return out


def exact(logits: Exact, sampling: Sampling) -> Exact:
    return {text: processed(scores, PROMPT + list(text), sampling) for text, scores in logits.items()}


# ---------------------------------------------------------------- drawing


def every_child(d: Scripted, position: int, budget: int) -> DraftTree:
    """All tokens after the root, then all after the first of them: whatever is drawn, a child carries it."""
    return pack([i % VOCAB for i in range(budget)], [ROOT if i < VOCAB else i // VOCAB - 1 for i in range(budget)])


SCRIPTS: dict[str, Build] = {
    "random trees": random_tree,
    "likeliest path": always_right,
    "every child": every_child,
    "equal siblings": equal_siblings,
}
NAMES = [*SCRIPTS, "none", "lookup", "ctc", "ctc+lookup"]


def drafter_of(name: str, target: Target, likeliest: Sequence[int], seed: int) -> Drafter:
    if name in SCRIPTS:
        scripted = Scripted(SCRIPTS[name], PROMPT, [*likeliest, *[0] * BUDGET], VOCAB)
        scripted.random = random.Random(seed)
        return scripted
    return LookupDrafter() if name == "lookup" else NoDrafter()


def draw(target: Target, sampling: Sampling, name: str, exactly: Exact, draws: int) -> list[Text]:
    """Answers of DEPTH tokens, one for each seed."""
    likeliest: list[int] = []
    while len(likeliest) < DEPTH:
        likeliest.append(max(range(VOCAB), key=exactly[tuple(likeliest)].__getitem__))
    torch.manual_seed(2)
    config = CTCConfig(slots=3, labels=3, heads=2, kv_heads=1, context_rank=4)
    shared: Any = NoDrafter()
    if name.startswith("ctc"):
        shared = CTCDrafter(config, target).eval()
        shared.requires_grad_(False).prepare()
    if name == "ctc+lookup":
        shared = HybridDrafter(shared)
    batch = Batch(target, shared, rows=ROWS, budget=BUDGET, adaptive=False)
    first = 10_000 * (1 + list(SETTINGS.values()).index(sampling) if sampling in SETTINGS.values() else 99)
    first += 1_000_000 * NAMES.index(name)
    answers: dict[int, list[int]] = {}
    for seed in range(first, first + draws):
        own = None if name.startswith("ctc") else drafter_of(name, target, likeliest, seed)
        key = batch.add(PROMPT, max_new_tokens=DEPTH, sampling=replace(sampling, seed=seed), drafter=own)
        answers[key] = []
        while not batch.free or (seed == first + draws - 1 and len(batch)):
            for done, step in batch.step():
                assert step.error is None
                answers[done] += step.tokens
    TALLY.draws += draws
    return [tuple(answer) for answer in answers.values()]


def rejections(answers: list[Text], exactly: Exact) -> set[str]:
    """Which tests say that the answers do not have the exact distribution."""
    joint = {}
    for text in product(range(VOCAB), repeat=DEPTH):
        joint[text] = 1.0
        for i, token in enumerate(text):
            joint[text] *= exactly[text[:i]][token]
    out = {"support"} if any(joint[text] == 0 for text in answers) else set()
    found, freedom = chi_square(Counter(answers), joint)
    if found > chi_square_limit(freedom):
        out.add("chi-square")
    rng = random.Random(1)
    for i in range(DEPTH):
        # A token's place in its cumulative distribution, chosen at random within its step, is uniform.
        places = []
        for text in answers:
            p, token = exactly[text[:i]], text[i]
            places.append(sum(p[:token]) + rng.random() * p[token])
        if kolmogorov(places) > kolmogorov_limit(len(places)):
            out.add("kolmogorov")
    return out


# ---------------------------------------------------------------- exactness


def test_the_distribution_is_worth_testing(logits: Exact) -> None:
    """Neither flat nor sure of itself, and every processor changes it; even the short cut tries each of them."""
    assert len(NAMES) >= len(SETTINGS)
    seen = [exact(logits, sampling) for sampling in SETTINGS.values()]
    for p in seen[0].values():
        assert 0.15 < max(p) < 0.97
    assert all(any(a[text] != b[text] for text in a) for a, b in product(seen, seen) if a is not b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.slow
def test_samples_have_the_exact_distribution(setting: str, name: str, seven: Target, logits: Exact) -> None:
    exactly = exact(logits, SETTINGS[setting])
    assert rejections(draw(seven, SETTINGS[setting], name, exactly, DRAWS), exactly) == set()


@pytest.mark.parametrize(("setting", "name"), list(zip(cycle(SETTINGS), NAMES)))
def test_fewer_samples_have_it_too(setting: str, name: str, seven: Target, logits: Exact) -> None:
    exactly = exact(logits, SETTINGS[setting])
    assert rejections(draw(seven, SETTINGS[setting], name, exactly, SHORT_DRAWS), exactly) == set()


# ---------------------------------------------------------------- power


def eager(tree: DraftTree, chosen: torch.Tensor, budgets: Any = None) -> list[tuple[list[int], list[int]]]:
    """Wrong: in one case of four the first guess is taken, whatever the target chose."""
    for row in range(len(chosen) if tree.budget else 0):
        if eager_random.random() < 0.25:
            chosen[row, 0] = tree.tokens[row, 0]
    return acceptance.accepted_paths(tree, chosen, budgets)


eager_random = random.Random(0)


@pytest.mark.parametrize("setting", [s if s == "all" else pytest.param(s, marks=pytest.mark.slow) for s in SETTINGS])
def test_biased_acceptance_is_caught(
    setting: str, seven: Target, logits: Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "accepted_paths", eager)
    exactly = exact(logits, SETTINGS[setting])
    answers = draw(seven, SETTINGS[setting], "every child", exactly, POWER_DRAWS)
    assert {"chi-square", "kolmogorov"} <= rejections(answers, exactly)


WRONG: dict[str, Callable[[Sampling], Sampling]] = {
    "temperature": lambda s: replace(s, temperature=1.0),
    "top_k": lambda s: replace(s, top_k=0),
    "top_p": lambda s: replace(s, top_p=1.0),
    "min_p": lambda s: replace(s, min_p=0.0),
    "repetition_penalty": lambda s: replace(s, repetition_penalty=1.0),
}


@pytest.mark.parametrize("setting", [s if s == "min_p" else pytest.param(s, marks=pytest.mark.slow) for s in WRONG])
def test_a_processor_that_is_left_out_is_caught(setting: str, seven: Target, logits: Exact) -> None:
    exactly = exact(logits, SETTINGS[setting])
    answers = draw(seven, WRONG[setting](SETTINGS[setting]), "random trees", exactly, POWER_DRAWS)
    assert rejections(answers, exactly), f"nobody noticed that {setting} was left out"


@pytest.mark.slow
def test_noise_that_is_shared_between_depths_is_caught(
    seven: Target, logits: Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subtle one: every token alone has its distribution, the text has not."""
    real = acceptance.Chooser._noise_of

    def shared(self: Any, like: torch.Tensor, tree: DraftTree, position: int) -> torch.Tensor:
        noise = real(self, like, tree, position)
        return noise[:1].expand_as(noise)

    monkeypatch.setattr(acceptance.Chooser, "_noise_of", shared)
    exactly = exact(logits, SETTINGS["plain"])
    answers = draw(seven, SETTINGS["plain"], "every child", exactly, POWER_DRAWS)
    assert "chi-square" in rejections(answers, exactly)
