"""A drafter with lookup beside it: whose turn it is, what the other one sees meanwhile, and the mixed tree."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_drafter.batch import Batch
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import Drafter, HybridDrafter, LookupDrafter, NoDrafter, load_drafter
from ctc_drafter.drafters.hybrid import REACHED, WEIGHT, Promise, with_path
from ctc_drafter.drafters.lookup import MAX_LENGTH, NEAREST
from ctc_drafter.pace import Pace
from ctc_drafter.steps import Step
from ctc_drafter.target import Target
from ctc_drafter.tree import ROOT, DraftTree


def paths_of(tree: DraftTree) -> dict[tuple[int, ...], float]:
    """Tokens from the root to each node that is no padding, with its probability."""
    assert tree.log_probs is not None
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens[0].tolist(), tree.parents[0].tolist()):
        found.append((found[parent] if parent != ROOT else ()) + (token,))
    probs = tree.log_probs[0].exp().tolist()
    return {path: p for path, p in zip(found, probs) if p > 0}


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    """Up to ten nodes, most probable first, children no more probable than their parents; some end in padding."""
    generator = random.Random(draw(st.integers(0, 10**6)))
    nodes: list[tuple[int, int, int, float]] = []
    taken = set()
    for _ in range(draw(st.integers(0, 10))):
        parent = generator.randrange(-1, len(nodes))
        token = generator.randrange(4)
        if (parent, token) not in taken:
            taken.add((parent, token))
            above = 1.0 if parent == ROOT else nodes[parent][3]
            depth = 1 if parent == ROOT else nodes[parent][2] + 1
            nodes.append((token, parent, depth, above * generator.uniform(0.05, 0.95)))
    budget = len(nodes) + draw(st.integers(0, 3))
    nodes += [(0, ROOT, 1, 0.0)] * (budget - len(nodes))
    tokens, parents, depths, probs = zip(*nodes) if nodes else ((), (), (), ())
    rows = [torch.tensor([row], dtype=torch.long).reshape(1, budget) for row in (tokens, parents, depths)]
    return DraftTree(*rows, torch.tensor([probs]).reshape(1, budget).log())


@settings(max_examples=300, deadline=None)
@given(trees(), st.lists(st.integers(0, 3), max_size=6), st.data())
def test_the_mixed_tree_holds_the_likeliest_of_both(tree: DraftTree, path: list[int], data: st.DataObject) -> None:
    chances, p = [], 1.0
    for _ in path:
        p *= data.draw(st.floats(0.05, 0.99))
        chances.append(p)
    mixed = with_path(tree, path, chances)
    mixed.check()
    assert mixed.budget == tree.budget
    every = paths_of(tree)
    for k, p in enumerate(chances, 1):
        every[tuple(path[:k])] = max(p, every.get(tuple(path[:k]), 0.0))
    got = paths_of(mixed)
    best = sorted(every.values(), reverse=True)[: tree.budget]
    assert sorted(got.values(), reverse=True) == pytest.approx(best, rel=1e-5)
    assert all(p == pytest.approx(every[path], rel=1e-5) for path, p in got.items())


def test_a_tree_without_probabilities_stays() -> None:
    tree = DraftTree.from_paths([[[1, 2]]], 3)
    assert with_path(tree, [1, 3], [0.9, 0.8]) is tree


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 12))
def test_the_longest_match_is_that_of_a_plain_search(text: list[int], limit: int) -> None:
    lookup = LookupDrafter()
    lookup.start(64)
    lookup.draft(torch.empty(1, len(text), 0), torch.tensor([text]))
    length, path = lookup.longest(limit)

    def match(place: int) -> int:
        return next((n for n in range(place) if text[place - 1 - n] != text[-1 - n]), place)

    # Lookup knows a suffix by at most four tokens, so only places that share so much are compared beyond.
    known = max((min(match(i), 4) for i in range(1, len(text))), default=0)
    places = [i for i in range(1, len(text)) if known and match(i) >= known][-NEAREST:]
    if not places:
        assert (length, path) == (0, [])
        return
    assert length == max(min(match(i), max(limit, 1)) for i in places)
    assert path == text[(start := [i for i in places if min(match(i), limit) == length][-1]) : start + MAX_LENGTH]


@settings(max_examples=300, deadline=None)
@given(trees(), st.lists(st.integers(0, 3), max_size=8))
def test_what_was_accepted_is_read_off_the_tree(tree: DraftTree, tokens: list[int]) -> None:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens[0].tolist(), tree.parents[0].tolist()):
        paths.append((*(paths[parent] if parent != ROOT else ()), token))
    assert len(tree.path_of(tokens)) == max(n for n in range(len(tokens) + 1) if not n or tuple(tokens[:n]) in paths)


class Given(Pace):
    """The budgets of each pass as they are told."""

    def __init__(self, budgets: list[int]) -> None:
        super().__init__([0])
        self._next = iter(budgets)

    def choose(self, rows: int, most: int | None = None) -> int:
        return next(self._next, 0)

    def record(self, *args: object) -> None: ...


def test_passes_without_a_draft_promise_nothing(target: Target, drafter_folder: Path) -> None:
    """All their tokens come at once when drafting begins again; none of them was drafted."""
    hybrid = load_drafter(f"{drafter_folder}+lookup", target)
    assert isinstance(hybrid, HybridDrafter)
    pace = Given([5] * 8 + [0] * 20 + [5] * 8)
    steps = list(generate(target, hybrid, [7, 8, 9], max_new_tokens=80, budget=5, pace=pace))
    reached = [step.accepted for step in steps if step.drafted]
    assert len(reached) > 8
    promise = hybrid._promise
    assert promise._accepted - WEIGHT * REACHED <= sum(reached)
    assert promise._accepted / promise._steps <= max(5, REACHED)


def test_promises_follow_the_text() -> None:
    promise = Promise()
    first = promise.chances(4, 8)
    assert all(a > b for a, b in pairwise(first))
    for _ in range(20):
        promise.looked_up(4, [1, 2, 3], [1, 2, 3])
    assert promise.chances(4, 3)[2] > first[2] and promise.is_better(promise.chances(4, 8))
    for _ in range(200):
        promise.looked_up(4, [1], [2])
    assert promise.chances(4, 1)[0] < 0.15
    assert not promise.is_better(promise.chances(4, 8))
    for _ in range(200):
        promise.drafted(0)  # now the other drafter gets nothing accepted at all
    assert promise.is_better(promise.chances(16, 8))


class Recorder(NoDrafter):
    """Drafts nothing, and keeps what it is given."""

    stateless = False

    def start(self, capacity: int) -> None:
        self.seen: list[torch.Tensor] = []

    def draft(self, features: torch.Tensor, next_tokens: torch.Tensor) -> Any:
        self.seen.append(next_tokens[0])
        return super().draft(features, next_tokens)


def test_a_text_that_repeats_itself_lets_the_other_drafter_rest_but_miss_nothing() -> None:
    base = Recorder()
    drafter = HybridDrafter(base)
    drafter.start(100)
    period = [5, 6, 7, 8, 9, 10, 11]
    text = torch.tensor([period * 6 + [1, 2, 3, 4]])
    rested = 0
    for token in text.split(1, 1):
        rested += isinstance(drafter.draft(torch.empty(1, 1, 0), token), list)
    assert 25 < rested <= len(period) * 5
    assert torch.equal(torch.cat(base.seen), text[0])


def answers(steps: list[Step]) -> list[list[int]]:
    return [step.tokens for step in steps]


@pytest.mark.parametrize("budget", [1, 5, 16])
def test_it_changes_no_word(budget: int, target: Target, drafter_folder: Path) -> None:
    hybrid = load_drafter(f"{drafter_folder}+lookup", target)
    assert hybrid.name == f"{drafter_folder.name}+lookup"
    ids = target.prompt_ids([{"role": "user", "content": "one two three one two three one two"}])
    plain = [t for s in generate(target, load_drafter("none", target), ids, max_new_tokens=60) for t in s.tokens]
    steps = list(generate(target, hybrid, ids, max_new_tokens=60, budget=budget))
    assert [t for s in steps for t in s.tokens] == plain
    for step in steps[1:]:
        assert step.tree is not None and step.tree.budget == budget
        step.tree.check()


def test_rows_of_a_batch_draft_as_each_alone(target: Target, drafter_folder: Path) -> None:
    hybrid: Drafter = load_drafter(f"{drafter_folder}+lookup", target)
    texts = ["one two one two one two", "What is it?", "def add(a, b): return a + b", "a a a a a a"]
    prompts = [target.prompt_ids([{"role": "user", "content": text}]) for text in texts]
    alone = [list(generate(target, hybrid, ids, max_new_tokens=40, budget=6)) for ids in prompts]
    batch = Batch(target, hybrid, rows=4, budget=6, adaptive=False)
    keys = [batch.add(ids, max_new_tokens=40) for ids in prompts]
    steps: dict[int, list[Step]] = {key: [] for key in keys}
    while len(batch):
        for key, step in batch.step():
            steps[key].append(step)
    assert [answers(steps[key]) for key in keys] == [answers(each) for each in alone]


def test_probabilities_of_a_mixed_tree_stay_logarithms() -> None:
    tree = DraftTree(*(torch.tensor([[v]]) for v in (3, ROOT, 1)), torch.tensor([[math.log(0.2)]]))
    mixed = with_path(tree, [4], [0.5])
    assert mixed.tokens.tolist() == [[4]] and mixed.log_probs is not None
    assert mixed.log_probs.exp().item() == pytest.approx(0.5)
