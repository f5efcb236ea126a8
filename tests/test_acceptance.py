"""What is accepted, against a walk in plain Python; what is sampled, against the exact distribution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_drafter.acceptance import Chooser, Sampling, accepted_paths
from ctc_drafter.errors import UserError
from ctc_drafter.tree import DraftTree
from distribution import SETTINGS, chi_square, chi_square_limit, processed
from helpers import chain, pack

# ---------------------------------------------------------------- the accepted path


def longest_agreeing(tokens: list[int], parents: list[int], chosen: list[int]) -> list[int]:
    """Of all nodes, the deepest one whose every step from the root is the first child with the chosen token."""
    best = [0]
    for node in range(len(tokens)):
        branch = [node]
        while parents[branch[0]] >= 0:
            branch.insert(0, parents[branch[0]])
        edges = list(zip(parents, tokens))
        agrees = all(tokens[i] == chosen[parents[i] + 1] and edges.index(edges[i]) == i for i in branch)
        if agrees and len(branch) >= len(best):
            best = [0, *(i + 1 for i in branch)]
    return best


def stacked(rows: list[tuple[list[int], list[int]]]) -> DraftTree:
    trees = [pack(*row) for row in rows]
    fields = ("tokens", "parents", "depths")
    return DraftTree(*(torch.cat([getattr(t, name) for t in trees]) for name in fields))


@st.composite
def trees_and_choices(draw: st.DrawFn) -> tuple[list[tuple[list[int], list[int]]], list[list[int]]]:
    size, batch = draw(st.integers(0, 14)), draw(st.integers(1, 4))
    token = st.integers(0, 2)  # few, so that siblings are often equal and paths often long
    rows = []
    for _ in range(batch):
        parents = [draw(st.integers(-1, i - 1)) for i in range(size)]
        rows.append(([draw(token) for _ in range(size)], parents))
    return rows, [[draw(token) for _ in range(size + 1)] for _ in range(batch)]


@settings(max_examples=300, deadline=None)
@given(trees_and_choices())
def test_the_accepted_path_is_the_deepest_agreeing_branch(
    case: tuple[list[tuple[list[int], list[int]]], list[list[int]]],
) -> None:
    rows, chosen = case
    got = accepted_paths(stacked(rows), torch.tensor(chosen))
    assert len(got) == len(rows)
    for (tokens, parents), drawn, (path, emitted) in zip(rows, chosen, got):
        assert path == longest_agreeing(tokens, parents, drawn)
        assert emitted == [drawn[i] for i in path]


def test_large_token_ids() -> None:
    tree = pack([200_000, 200_000, 1], [-1, 0, 0])
    [(path, emitted)] = accepted_paths(tree, torch.tensor([[200_000, 200_000, 5, 5]]))
    assert path == [0, 1, 2] and emitted == [200_000, 200_000, 5]


# ---------------------------------------------------------------- sampling is exact

VOCAB = 6
CONTEXT = [5, 3, 0]
LOGITS = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3)) * 1.5
"""LOGITS[u]: the target's logits after token u."""

TREES = {
    "most likely chain": chain([int(LOGITS[0].argmax()), int(LOGITS[LOGITS[0].argmax()].argmax())]),
    "all children": pack(list(range(VOCAB)), [-1] * VOCAB),
    # Equal siblings, the first without children.
    "equal siblings": pack([1, 1, 1, 4, 4, 2, 2, 0, 3, 5], [-1, -1, -1, -1, -1, 1, 2, 1, 4, 3]),
    "one token": pack([2] * 6, [-1, 0, 0, -1, 3, 4]),
}


def exact(sampling: Sampling, context: list[int]) -> list[float]:
    """The target's processed distribution of the token after `context`."""
    return processed(LOGITS[context[-1]].tolist(), context, sampling)


Accept = Callable[[DraftTree, torch.Tensor], list[tuple[list[int], list[int]]]]


def one_step(chooser: Chooser, tree: DraftTree, context: list[int], accept: Accept) -> list[int]:
    ancestors = tree.ancestor_mask()
    nodes = torch.cat([torch.tensor(context[-1:]), tree.tokens[0]])
    chosen = chooser.choose(LOGITS[nodes][None], tree, ancestors, context)
    [(_, emitted)] = accept(tree, chosen)
    return emitted


def statistic(sampling: Sampling, tree: DraftTree, accept: Accept, draws: int) -> tuple[float, int]:
    """Pearson's chi-square of the first two emitted tokens against the exact joint distribution; degrees of freedom."""
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(draws):
        chooser = Chooser(replace(sampling, seed=seed), torch.device("cpu"))
        out = one_step(chooser, tree, CONTEXT, accept)
        while len(out) < 2:
            out += one_step(chooser, tree, CONTEXT + out, accept)
        counts[tuple(out[:2])] += 1
    first = exact(sampling, CONTEXT)
    joint = {(a, b): first[a] * exact(sampling, [*CONTEXT, a])[b] for a, b in product(range(VOCAB), repeat=2)}
    assert all(joint[pair] > 0 for pair in counts), "a token outside the processed distribution was emitted"
    return chi_square(counts, joint)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_sampled_tokens_have_the_targets_distribution(sampling: Sampling, tree: DraftTree) -> None:
    found, freedom = statistic(sampling, tree, accepted_paths, 1500)
    assert found < chi_square_limit(freedom)


def eager_to_accept(tree: DraftTree, chosen: torch.Tensor) -> list[tuple[list[int], list[int]]]:
    """Wrong: now and then take the first guess although the target chose another token."""
    if int(chosen[0, 0]) == 3:
        chosen[0, 0] = tree.tokens[0, 0]
    return accepted_paths(tree, chosen)


def test_the_distribution_test_has_power() -> None:
    found, freedom = statistic(SETTINGS["plain"], TREES["equal siblings"], eager_to_accept, 1500)
    assert found > chi_square_limit(freedom)


def test_the_sample_does_not_depend_on_the_trees() -> None:
    """Trees of any size, in any order, draw the same tokens from the same seed, and siblings that are equal agree."""

    def sample(trees: list[DraftTree]) -> list[int]:
        chooser, out = Chooser(SETTINGS["all"], torch.device("cpu")), list[int]()
        assert chooser._generator is not None
        chooser._generator.manual_seed(5)
        for i in range(40):
            out += one_step(chooser, trees[i % len(trees)], CONTEXT + out, accepted_paths)
        return out[:40]

    want = sample([DraftTree.empty(1)])
    assert len(set(want)) > 3
    assert sample(list(TREES.values())) == sample([TREES["one token"], DraftTree.empty(1)]) == want
    tree = TREES["equal siblings"]
    nodes = torch.tensor([0, *tree.tokens[0].tolist()])
    chooser = Chooser(SETTINGS["all"], torch.device("cpu"))
    chosen = chooser.choose(LOGITS[nodes][None], tree, tree.ancestor_mask(), CONTEXT)[0].tolist()
    assert chosen[1] == chosen[2] == chosen[3] and chosen[6] == chosen[7]


def test_penalty_counts_only_the_nodes_own_branch() -> None:
    """A node's repetition penalty sees the context and its ancestors, not its siblings."""
    tree = pack([1, 2, 4], [-1, -1, 1])
    chooser = Chooser(Sampling(repetition_penalty=1e6), torch.device("cpu"))
    logits = torch.arange(VOCAB, 0, -1.0).expand(1, 4, -1)  # the lowest id not yet written wins
    chosen = chooser.choose(logits, tree, tree.ancestor_mask(), [5, 0])
    assert chosen.tolist() == [[1, 2, 1, 1]]


def test_greedy_is_argmax() -> None:
    chooser = Chooser(Sampling(top_k=2, top_p=0.5, min_p=0.5), torch.device("cpu"))
    logits = torch.randn(1, 5, VOCAB)
    tree = pack([1, 2, 3, 4], [-1, 0, 1, 1])
    assert torch.equal(chooser.choose(logits, tree, tree.ancestor_mask(), [0]), logits.argmax(-1))


def test_a_seed_repeats_the_sample() -> None:
    def sample(seed: int | None) -> list[int]:
        chooser = Chooser(Sampling(temperature=1.0, seed=seed), torch.device("cpu"))
        tree = TREES["all children"]
        out: list[int] = []
        while len(out) < 20:
            out += one_step(chooser, tree, CONTEXT + out, accepted_paths)
        return out[:20]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(None) != sample(None)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("seed", 10**30),
    ],
)
def test_impossible_settings(field: str, bad: float) -> None:
    with pytest.raises(UserError, match=field):
        Sampling(**{field: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**64 - 1])
def test_every_seed_that_torch_takes_is_one(seed: int) -> None:
    Chooser(Sampling(temperature=1.0, seed=seed), torch.device("cpu"))
