"""DraftTree: packing, the ancestor mask, validation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_drafter.tree import DraftTree


def tree_of(parents):
    """A tree from rows of parents, tokens all 1."""
    depths = []
    for row in parents:
        depth = []
        for parent in row:
            depth.append(1 + (depth[parent] if parent >= 0 else 0))
        depths.append(depth)
    shape = (len(parents), len(parents[0]))
    packed = [torch.tensor(x, dtype=torch.long).reshape(shape) for x in (parents, depths)]
    return DraftTree(torch.ones(shape, dtype=torch.long), *packed)


def ancestors_by_walking(parents):
    size = len(parents) + 1
    mask = torch.zeros(size, size, dtype=torch.bool)
    for query in range(size):
        node = query - 1
        while node >= 0:
            mask[query, node + 1] = True
            node = parents[node]
        mask[query, 0] = True
    return mask


rows = st.integers(0, 40).flatmap(
    lambda m: st.lists(st.tuples(*(st.integers(-1, i - 1) for i in range(m))).map(list), min_size=1, max_size=3)
)


@settings(max_examples=60, deadline=None)
@given(rows)
def test_ancestor_mask_is_walking_up(parents):
    tree = tree_of(parents)
    tree.check()
    mask = tree.ancestor_mask()
    assert mask.dtype == torch.bool and mask.shape == (len(parents), len(parents[0]) + 1, len(parents[0]) + 1)
    for row, expected in enumerate(parents):
        assert torch.equal(mask[row], ancestors_by_walking(expected))
    assert torch.equal(mask.sum(-1) - 1, tree.offsets())


@pytest.mark.parametrize("size", [1, 300, 1000])
def test_ancestor_mask_of_a_long_chain_is_causal(size):
    chain = tree_of([list(range(-1, size - 1))])
    assert torch.equal(chain.ancestor_mask()[0], torch.ones(size + 1, size + 1).tril().bool())


def test_empty_tree_is_plain_decoding():
    tree = DraftTree.empty(3)
    tree.check()
    assert tree.budget == 0 and tree.ancestor_mask().tolist() == [[[True]]] * 3 and tree.offsets().tolist() == [[0]] * 3


def test_from_paths_merges_shared_prefixes_in_insertion_order():
    tree = DraftTree.from_paths([[[5, 6, 7], [5, 8], [9]], [[1]]], budget=6)
    tree.check()
    assert tree.tokens.tolist() == [[5, 6, 7, 8, 9, 0], [1, 0, 0, 0, 0, 0]]
    assert tree.parents.tolist() == [[-1, 0, 1, 0, -1, -1], [-1] * 6]
    assert tree.depths.tolist() == [[1, 2, 3, 2, 1, 1], [1] * 6]
    assert tree.offsets().tolist()[0] == [0, 1, 2, 3, 2, 1, 1]


def test_from_paths_stops_at_the_budget():
    tree = DraftTree.from_paths([[[5, 6], [5, 7, 8], [9]]], budget=3)
    assert tree.tokens.tolist() == [[5, 6, 7]] and tree.parents.tolist() == [[-1, 0, 0]]
    assert DraftTree.from_paths([[[1]], []], budget=0).tokens.shape == (2, 0)
    with pytest.raises(ValueError, match="negative"):
        DraftTree.from_paths([[]], budget=-1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=6), min_size=1, max_size=3))
def test_from_paths_holds_exactly_the_prefixes(paths):
    tree = DraftTree.from_paths(paths, budget=24)
    tree.check()
    for row, own in enumerate(paths):
        wanted = {tuple(path[:k]) for path in own for k in range(1, len(path) + 1)}
        found = []
        for token, parent in zip(tree.tokens[row].tolist(), tree.parents[row].tolist(), strict=True):
            found.append((found[parent] if parent >= 0 else ()) + (token,))
        assert set(found[: len(wanted)]) == wanted
        assert found[len(wanted) :] == [(0,)] * (24 - len(wanted))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.ones(1, 3, dtype=torch.long)}, "one .B, M. shape"),
        ({"tokens": torch.ones(1, 2)}, "dtype long"),
        ({"tokens": torch.tensor([[1, -1]])}, "negative"),
        ({"parents": torch.tensor([[-1, 1]])}, "before its child"),
        ({"parents": torch.tensor([[-2, 0]])}, "before its child"),
        ({"depths": torch.tensor([[1, 3]])}, "depth"),
        ({"depths": torch.tensor([[0, 1]])}, "depth"),
        ({"log_probs": torch.zeros(1, 3)}, "log_probs"),
    ],
)
def test_check_names_what_is_wrong(change, message):
    good = {"tokens": torch.tensor([[4, 5]]), "parents": torch.tensor([[-1, 0]]), "depths": torch.tensor([[1, 2]])}
    DraftTree(**good).check()
    with pytest.raises(ValueError, match=message):
        DraftTree(**{**good, **change}).check()


def test_stacked_trees_keep_their_rows():
    trees = [DraftTree.from_paths([paths], n) for paths, n in (([[5, 6], [7]], 3), ([], 0), ([[8]], 1))]
    stacked = DraftTree.stack(trees)
    stacked.check()
    assert stacked.tokens.tolist() == [[5, 6, 7], [0, 0, 0], [8, 0, 0]]
    masks = stacked.ancestor_mask()
    for mask, tree in zip(masks, trees):
        assert torch.equal(mask[: tree.budget + 1, : tree.budget + 1], tree.ancestor_mask()[0])
    assert DraftTree.stack(trees[:1]) is trees[0]
    again = DraftTree.stack(stacked.split())
    assert torch.equal(again.tokens, stacked.tokens) and torch.equal(again.parents, stacked.parents)
    assert DraftTree.stack([DraftTree.empty(1)] * 2).tokens.shape == (2, 0)


@settings(max_examples=60, deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_no_path_is_expected_to_be_accepted_further_than_the_best(parents, random):
    tree = tree_of(parents)
    tokens = torch.arange(tree.tokens.numel()).view(tree.tokens.shape)
    probs: list[list[float]] = []
    for row in parents:
        probs.append([])
        for parent in row:  # never more than its parent's
            probs[-1].append(random.choice([0.0, random.random()]) * (probs[-1][parent] if parent >= 0 else 1.0))
    tree = DraftTree(tokens, tree.parents, tree.depths, torch.tensor(probs).log().view(tokens.shape))
    for path, row, chances, names in zip(tree.best_paths(), parents, probs, tokens.tolist(), strict=True):
        worths = {}
        for node, parent in enumerate(row):
            worths[node] = chances[node] + worths.get(parent, 0.0)
        nodes = [names.index(token) for token in path]
        assert [row[node] for node in nodes] == [-1, *nodes][: len(nodes)]
        assert sum(chances[node] for node in nodes) == pytest.approx(max([0.0, *worths.values()]))


def test_best_paths_need_probabilities():
    with pytest.raises(ValueError, match="log_probs"):
        tree_of([[-1, 0]]).best_paths()
