"""In float32, greedy answers are `model.generate`'s own: every family, every drafter, any budget, any company.

The cells of the matrix take their budget and number of rows from a list of all pairs, so that over all of them each
pair comes about. A short cut of it runs with the tests that are not slow.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate, count, product
from typing import Any

import pytest

from ctc_drafter.acceptance import Sampling
from ctc_drafter.batch import Batch
from ctc_drafter.drafters import Drafter, NoDrafter
from ctc_drafter.steps import Step
from helpers import CAPABLE, CONTEXT, Scripted, always_right, first_with, plain, random_tree, run

from .drafters import KINDS, NAMES, REPEATED, WITH_LOOKUP, maker, trained
from .family import TOKENS, Case, Family, build_family, case_of_length
from .tally import TALLY

SHORT = ("deepseek_v3", "gemma2", "gpt2", "qwen3_moe")
"""Latent attention; windows with soft caps; learned positions; experts."""
CELLS = 2
PAIRS = list(product(range(1, 65), range(1, 9)))
random.Random(0).shuffle(PAIRS)


@pytest.fixture(
    scope="module", params=[k if k in SHORT else pytest.param(k, marks=pytest.mark.slow) for k in sorted(CAPABLE)]
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return build_family(request.param, tmp_path_factory.mktemp("prove") / request.param)


def pair_of(family: str, name: str, cell: int) -> tuple[int, int]:
    """Budget and rows of a cell."""
    place = (sorted(CAPABLE).index(family) * len(NAMES) + NAMES.index(name)) * CELLS + cell
    return PAIRS[place % len(PAIRS)]


def test_the_matrix_is_complete() -> None:
    asked = {name: {pair_of(kind, name, cell) for kind, cell in product(CAPABLE, range(CELLS))} for name in NAMES}
    assert len(CAPABLE) >= 15 and set().union(*asked.values()) == set(PAIRS) == set(product(range(1, 65), range(1, 9)))
    for pairs in asked.values():  # each drafter by itself: small and large trees, every number of rows
        budgets, rows = zip(*pairs)
        assert min(budgets) <= 8 and max(budgets) >= 57 and set(rows) == set(range(1, 9))


@pytest.mark.parametrize("name", [n for n in KINDS if n.endswith(("all blank", "repeats"))])
def test_what_is_bad_on_purpose_is_bad(name: str, family: Family) -> None:
    """Else the matrix would hold one more drafter at random in its place."""
    drafter: Any = trained(name, family)
    case = family.cases[4]
    _, steps = run(family.target, drafter, case.prompt, TOKENS, budget=6)
    for step in steps[1:]:
        assert step.tree is not None
        if name.endswith("repeats"):
            assert step.tree.tokens[0, 0] == drafter.kept[REPEATED]
        else:
            assert step.tree.log_probs is not None and step.tree.log_probs.max() < -10


def test_the_answers_are_worth_comparing(family: Family) -> None:
    """They differ, they have many tokens, and they end where the context does."""
    assert len({tuple(case.answer) for case in family.cases}) >= len(family.cases) - 2
    assert len({t for case in family.cases for t in case.answer}) > 12
    assert max(len(set(case.answer)) for case in family.cases) >= 5
    assert [len(c.prompt + c.answer) for c in family.cases][-3:] == [CONTEXT] * 3 == [family.target.max_context] * 3


def check(family: Family, name: str, case: Case, steps: list[Step], want: tuple[list[int], str]) -> None:
    """The tokens, the finish, and what each step says of itself."""
    tokens = [t for step in steps for t in step.tokens]
    assert (tokens, steps[-1].finish) == want, f"{name} on {family.kind}, prompt {case.prompt}"
    assert all(step.finish is None and step.accepted == len(step.tokens) - 1 for step in steps[1:-1])
    TALLY.families.add(family.kind)
    TALLY.drafters.add(name)
    TALLY.prompts.add(len(case.prompt))
    TALLY.answers += 1
    TALLY.tokens += len(tokens)
    TALLY.accepted += sum(step.accepted for step in steps)


def erratic_clock(rng: random.Random) -> Callable[[], float]:
    """Seconds that say nothing about how long anything took."""
    ticks = accumulate(rng.random() for _ in count())
    return lambda: next(ticks)


@pytest.mark.parametrize("cell", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_any_drafter_any_budget_any_company(name: str, cell: int, family: Family) -> None:
    """Rows join at different steps, with limits of their own; some cells have a stop token, a prefix cache, a pace.

    The pace has an erratic clock, so passes draft nothing, a quarter, half, all or twice the budget, as if by chance.
    """
    budget, rows = pair_of(family.kind, name, cell)
    rng = random.Random(f"{family.kind} {name} {cell}")
    cases = rng.sample(family.cases, rows)
    stop = rng.choice([None, rng.choice(cases[0].answer)])
    limits = [rng.choice([1, 3, 7, TOKENS, TOKENS]) for _ in cases]
    drafter, make = maker(name, family)
    adaptive, prefixes = rng.random() < 0.5, rng.choice([0, 1 << 20])
    options: dict[str, Any] = {"adaptive": adaptive, "prefix_cache": prefixes, "clock": erratic_clock(rng)}
    batch = Batch(family.target, drafter, rows=rows, budget=budget, **options)
    steps: dict[int, list[Step]] = {}
    with family.stopping_at(stop):
        for case, limit in zip(cases, limits):
            steps[batch.add(case.prompt, max_new_tokens=limit, drafter=make(case))] = []
            for _ in range(rng.randrange(4)):  # the first reads the prompt
                for key, step in batch.step():
                    steps[key].append(step)
        while len(batch):
            for key, step in batch.step():
                steps[key].append(step)
    for case, limit, done in zip(cases, limits, steps.values(), strict=True):
        check(family, name, case, done, case.until(stop, limit))
    TALLY.budgets.add(budget)
    TALLY.rows.add(rows)


@pytest.mark.parametrize("name", ["always_right", *WITH_LOOKUP, *(n for n in KINDS if n.endswith("few tokens"))])
def test_drafts_are_accepted(name: str, family: Family) -> None:
    """A matrix of drafters that are never right would prove little. (Lookup alone depends on how an answer repeats.)"""
    drafter, make = maker(name, family)
    accepted = 0
    for case in family.cases[:8]:
        _, steps = run(family.target, make(case) or drafter, case.prompt, TOKENS, budget=24)
        check(family, name, case, steps, (case.answer, "length"))
        accepted += sum(step.accepted for step in steps)
    assert accepted >= (60 if name == "always_right" else 3), accepted


def test_prompts_of_every_length(family: Family) -> None:
    drafter = trained("eagle, few tokens", family)
    batch = Batch(family.target, drafter, rows=8, budget=9, adaptive=False)
    lengths = range(1, CONTEXT) if family.kind not in SHORT else range(1, CONTEXT, 7)
    cases = [case_of_length(family, length, tokens=4) for length in lengths]
    for start in range(0, len(cases), 8):
        group = cases[start : start + 8]
        steps: dict[int, list[Step]] = {batch.add(c.prompt, max_new_tokens=4): [] for c in group}
        while len(batch):
            for key, step in batch.step():
                steps[key].append(step)
        for case, done in zip(group, steps.values()):
            check(family, "eagle, few tokens", case, done, (case.answer, "length"))


def test_a_stop_token_at_every_place_of_an_accepted_run(family: Family) -> None:
    """The reference is generate with that token as its EOS; the draft runs on past it."""
    case = max(family.cases, key=lambda c: len(set(c.answer)))
    for stop in dict.fromkeys(case.answer):
        with family.stopping_at(stop):
            want = plain(family.target, case.prompt, TOKENS)
            assert (want, "stop") == case.until(stop, TOKENS)
            for budget, build in ((15, always_right), (4, always_right), (12, random_tree)):
                drafter = Scripted(build, case.prompt, case.answer, family.target.vocab_size)
                _, steps = run(family.target, drafter, case.prompt, TOKENS, budget=budget)
                check(family, build.__name__, case, steps, (want, "stop"))


def test_stop_strings_across_a_steps_border(family: Family) -> None:
    """A string of two tokens, the first of them the last of a step; found wherever the border lies."""
    tokenizer = family.target.tokenizer
    tried: list[int] = []
    for case in [*family.cases, *(case_of_length(family, length) for length in range(13, 29))]:
        if len(tried) >= 8 and max(tried) > 1:
            break
        for place in range(1, len(case.answer)):
            pair = case.answer[place - 1 : place + 1]
            stop = tokenizer.decode(pair)
            if len(stop) < 2 or "�" in stop or set(pair) & set(tokenizer.all_special_ids):
                continue
            if first_with(family.target, case.answer, [stop]) != place + 1:
                continue
            for depth in range(1, place):  # steps of depth + 1 tokens after the first one
                if (place - 1) % (depth + 1):
                    continue
                drafter = Scripted(always_right, case.prompt, case.answer, family.target.vocab_size)
                _, steps = run(family.target, drafter, case.prompt, TOKENS, budget=depth, stop=[stop])
                check(family, "always_right", case, steps, (case.answer[: place + 1], "stop"))
                assert len(steps[-1].tokens) == 1, "the border is not where it should be"
                tried.append(depth)
    assert len(tried) >= 3 and max(tried) > 1


@pytest.mark.parametrize("name", ["always_right", "random_tree", "lookup", "eagle, few tokens"])
def test_stop_strings_in_company(name: str, family: Family) -> None:
    """Rows of a batch end at stop strings of their own, of one token or two, while the others go on."""
    rng = random.Random(f"{family.kind} {name}")
    drafter, make = maker(name, family)
    batch = Batch(family.target, drafter, rows=8, budget=11, adaptive=False)
    steps: dict[int, list[Step]] = {}
    wanted: list[tuple[Case, tuple[list[int], str]]] = []
    for case in family.cases[:8]:
        pairs = [case.answer[place - 1 : place + 1] for place in range(1, len(case.answer))]
        texts = [family.target.tokenizer.decode(pair, skip_special_tokens=True) for pair in pairs]
        typed = [text for text in texts if text and "�" not in text]  # half a character nobody can type
        stops = ["never in there", *rng.sample(typed, min(1, len(typed)))]
        end = first_with(family.target, case.answer, stops)
        text = family.target.tokenizer.decode(case.answer[:end], skip_special_tokens=True)
        wanted.append((case, (case.answer[:end], "stop" if any(s in text for s in stops) else "length")))
        steps[batch.add(case.prompt, max_new_tokens=TOKENS, stop=stops, drafter=make(case))] = []
    while len(batch):
        for key, step in batch.step():
            steps[key].append(step)
    for (case, want), done in zip(wanted, steps.values(), strict=True):
        check(family, name, case, done, want)
    assert sum(finish == "stop" for _, (_, finish) in wanted) >= 4


def test_a_seed_gives_plain_decodings_sample(family: Family) -> None:
    case = family.cases[4]
    sampling = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=3)
    want, _ = run(family.target, NoDrafter(), case.prompt, TOKENS, sampling=sampling)
    drafters: list[Drafter] = [Scripted(random_tree, case.prompt, want, family.target.vocab_size)]
    drafters += [trained(name, family) for name in ("ctc, few tokens", "eagle")]
    for drafter in drafters:
        assert run(family.target, drafter, case.prompt, TOKENS, sampling=sampling, budget=13)[0] == want != case.answer
