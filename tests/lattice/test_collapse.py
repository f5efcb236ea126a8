"""The paper's CTC transform, against enumeration of all slot paths."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_drafter.lattice.collapse import collapse, collapsed_tree, top_paths

from .slot_paths import enumerate_texts, prefix_mass, random_log_probs, spell


def test_collapse_by_hand():
    assert collapse([1, 1, 9, 1, 2, 2, 9], blank=9) == [1, 1, 2]
    assert collapse([9, 9], blank=9) == [] and collapse([], blank=9) == []


@given(st.lists(st.integers(0, 3), max_size=7))
def test_collapse_spells_as_the_definition_does(path):
    assert collapse(path, 3) == list(spell(tuple(path), 3, merge=True))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 40), st.integers(1, 4))
def test_top_paths_are_the_most_probable(seed, slots, count, top_k):
    log_probs = random_log_probs(slots, 4, seed=seed)
    allowed = log_probs.topk(top_k).indices.tolist()
    score = {path: sum(log_probs[i, s].item() for i, s in enumerate(path)) for path in itertools.product(*allowed)}
    best = sorted(score, key=score.__getitem__, reverse=True)[:count]
    paths, scores = top_paths(log_probs, count, top_k)
    assert [tuple(p) for p in paths.tolist()] == best
    assert scores.tolist() == pytest.approx([score[p] for p in best])


@pytest.mark.parametrize(("count", "top_k"), [(0, 1), (1, 0)])
def test_top_paths_refuses_nothing(count, top_k):
    with pytest.raises(ValueError, match="at least 1"):
        top_paths(random_log_probs(2, 3), count, top_k)


@pytest.mark.parametrize("count", [1, 5, 20])
def test_collapsed_tree_ranks_prefixes_by_the_mass_of_their_paths(count):
    log_probs = random_log_probs(2, 4, 4, seed=6)
    tree = collapsed_tree(log_probs, budget=6, count=count, top_k=4)
    tree.check()
    for row in range(2):
        values = log_probs[row].tolist()
        score = {p: sum(values[i][s] for i, s in enumerate(p)) for p in itertools.product(range(4), repeat=4)}
        weights = defaultdict(float)
        for path in sorted(score, key=score.__getitem__, reverse=True)[:count]:
            text = spell(path, 3, merge=True)
            for k in range(1, len(text) + 1):
                weights[text[:k]] += math.exp(score[path])
        best = sorted(weights.values(), reverse=True)[:6]
        expected = [math.log(w) for w in best] + [-math.inf] * (6 - len(best))
        assert tree.log_probs[row].tolist() == pytest.approx(expected)
        node_path = []
        nodes = (t[row].tolist() for t in (tree.tokens, tree.parents, tree.log_probs))
        for token, parent, log_prob in zip(*nodes, strict=True):
            node_path.append((node_path[parent] if parent >= 0 else ()) + (token,))
            if log_prob > -math.inf:
                assert log_prob == pytest.approx(math.log(weights[node_path[-1]]))


def test_collapsed_tree_of_all_paths_is_exact():
    log_probs = random_log_probs(1, 4, 4, seed=8)
    texts = enumerate_texts(log_probs[0], merge=True)
    prefixes = {text[:k] for text in texts for k in range(1, len(text) + 1)}
    truth = sorted((prefix_mass(texts, p) for p in prefixes), reverse=True)[:10]
    assert collapsed_tree(log_probs, 10, 4**4, 4).log_probs[0].exp().tolist() == pytest.approx(truth)
