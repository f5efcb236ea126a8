"""Prefix probabilities and the best tree, against enumeration of all slot paths."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_drafter.lattice import loss
from ctc_drafter.lattice.best_first import best_first, prefix_log_prob
from ctc_drafter.lattice.pool import LabelContext, Lattice, pool_lattice, pool_tokens
from ctc_drafter.lattice.prefix import best_prefixes, best_tree

from .slot_paths import enumerate_context_texts, enumerate_texts, prefix_mass, random_log_probs

TOPOLOGIES = ["merge", "plain", "context"]


def random_lattice(topology, batch=1, slots=4, vocab=3, pool=3, seed=0, scale=2.0, dtype=torch.float64):
    """A lattice over the ``pool`` likeliest of ``vocab`` tokens, and the (V+1, N, V+1) table it came from, per row."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, slots, vocab + 1, generator=generator, dtype=dtype)
    tokens = pool_tokens(logits, pool)
    if topology != "context":
        table = logits.log_softmax(-1).unsqueeze(1).expand(-1, vocab + 1, -1, -1)
        return pool_lattice(logits, tokens, merge=topology == "merge"), table
    keys, values = torch.randn(2, batch, pool + 1, 3, generator=generator, dtype=dtype)
    context = scale / 3**0.5 * keys @ values.transpose(1, 2)
    table = torch.zeros(batch, vocab + 1, vocab + 1, dtype=dtype)
    for row in range(batch):
        index = torch.cat([tokens[row], torch.tensor([vocab])])  # pool tokens, then blank (and root)
        table[row][index.unsqueeze(1), index] = context[row]
    lattice = pool_lattice(logits, tokens, (scale / 3**0.5 * keys, values))
    return lattice, (logits.unsqueeze(1) + table.unsqueeze(2)).log_softmax(-1)


def tree_paths(tree, row=0):
    """Token path of every node that is not padding."""
    paths = []
    for token, parent in zip(tree.tokens[row].tolist(), tree.parents[row].tolist(), strict=True):
        paths.append((paths[parent] if parent >= 0 else ()) + (token,))
    return [path for path, p in zip(paths, tree.log_probs[row].tolist(), strict=True) if p > -math.inf]


def sequences(tree, lattice, row=0):
    place = {token: m for m, token in enumerate(lattice.pool[row].tolist())}
    return [tuple(place[token] for token in path) for path in tree_paths(tree, row)]


def test_pool_tokens_are_the_likeliest_anywhere():
    logits = random_log_probs(2, 3, 9, seed=1) + torch.randn(2, 3, 1)  # not normalised
    best = logits.log_softmax(-1).exp()[..., :-1].max(1).values
    for row, tokens in enumerate(pool_tokens(logits, 4).tolist()):
        assert len(set(tokens)) == 4
        assert sorted(tokens) == sorted(sorted(range(8), key=lambda v: -best[row, v])[:4])
    for size in (0, 9):
        with pytest.raises(ValueError, match="pool size"):
            pool_tokens(logits, size)


def class_log_probs(lattice):
    """(B, U, N, C) log p_i(class | last emitted token u); U is 1 without context, else M + 1."""
    logits = lattice.logits.unsqueeze(1)
    if lattice.keys is not None:
        logits = logits + (lattice.keys @ lattice.values.transpose(1, 2)).unsqueeze(2)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("pool", [1, 4, 6])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_pool_lattice_matches_the_full_vocabulary(topology, pool):
    lattice, table = random_lattice(topology, batch=2, vocab=6, pool=pool, scale=5.0)
    for row in range(2):
        tokens = lattice.pool[row]
        full = table[row][torch.cat([tokens, torch.tensor([6])])]  # (M+1, N, V+1)
        full = full if topology == "context" else full[:1]
        outside = [v for v in range(6) if v not in tokens.tolist()]
        mass = torch.cat([full[..., tokens], full[..., -1:], full[..., outside].logsumexp(-1, keepdim=True)], -1)
        torch.testing.assert_close(class_log_probs(lattice)[row], mass)


def test_pool_lattice_keeps_float32():
    logits = torch.randn(1, 2, 5, dtype=torch.bfloat16)
    pool, context = pool_tokens(logits, 2), torch.zeros(2, 1, 3, 4, dtype=torch.bfloat16)
    assert pool_lattice(logits, pool, tuple(context)).logits.dtype == torch.float32
    assert pool_lattice(logits, pool, merge=True).logits.dtype == torch.float32


@pytest.mark.parametrize("pool", [2, 3])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_prefix_log_prob_sums_over_all_paths(topology, pool):
    lattice, table = random_lattice(topology, batch=2, pool=pool, seed=3)
    for row in range(2):
        texts = enumerate_context_texts(table[row], lattice.merge)
        for length in range(5):
            for sequence in itertools.product(range(pool), repeat=length):
                mass = prefix_mass(texts, tuple(lattice.pool[row, list(sequence)].tolist()))
                expected = math.log(mass) if mass > 0 else -math.inf
                assert prefix_log_prob(lattice, sequence, row) == pytest.approx(expected, abs=1e-9)


def test_prefix_log_prob_agrees_with_the_loss():
    log_probs = random_log_probs(1, 5, 4, seed=4)
    labels = torch.tensor([[1, 1, 0]])
    lattice = pool_lattice(log_probs, torch.tensor([[0, 1, 2]]), merge=True)
    prefix, _ = loss.merge_prefix_log_probs(*loss.label_log_probs(log_probs, labels), labels)
    for k in range(1, 4):
        assert prefix_log_prob(lattice, (1, 1, 0)[:k]) == pytest.approx(prefix[0, k - 1].item())


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_best_first_finds_the_true_top_prefixes(topology):
    lattice, table = random_lattice(topology, seed=5)
    texts = enumerate_context_texts(table[0], lattice.merge)
    prefixes = {text[:k] for text in texts for k in range(1, len(text) + 1)}
    truth = sorted(((prefix_mass(texts, p), p) for p in prefixes), reverse=True)[:12]
    tree = best_first(lattice, 12)
    tree.check()
    assert tree_paths(tree) == [p for _, p in truth]
    assert tree.log_probs[0].tolist() == pytest.approx([math.log(mass) for mass, _ in truth])
    assert best_first(lattice, 12, max_depth=2).depths.max() == 2


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TOPOLOGIES),
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from([0.3, 2.0, 8.0]),
)
def test_wide_beam_is_best_first(topology, seed, batch, slots, pool, budget, max_depth, scale):
    lattice, _ = random_lattice(topology, batch, slots, 6, pool, seed, scale)
    tree, first = best_prefixes(lattice, budget, max_depth), best_first(lattice, budget, max_depth)
    tree.check()
    first.check()
    assert tree.tokens.shape == first.tokens.shape == (batch, budget)
    for row in range(batch):
        expected = [lp for lp in first.log_probs[row].tolist() if lp > math.log(1e-29)]
        real = tree.log_probs[row] > -math.inf
        found = sorted(tree.log_probs[row, real].tolist(), reverse=True)
        assert found[: len(expected)] == pytest.approx(expected, abs=1e-4)
        assert not tree.tokens[row, ~real].any()
        nodes = sequences(tree, lattice, row)
        assert len(set(nodes)) == len(nodes)
        own = [prefix_log_prob(lattice, node, row) for node in nodes]
        assert tree.log_probs[row, real].tolist() == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize("pool", [5, 24, 60])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_search_over_slots_is_the_search_over_their_lattice(topology, pool):
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(1, 7, 61, generator=generator)
    keys, values, root = (torch.randn(n, 6, generator=generator) for n in (60, 61, 1))
    context = LabelContext(keys, values, root) if topology == "context" else None
    merge = topology == "merge"
    tokens = pool_tokens(logits, pool)
    lattice = pool_lattice(logits, tokens, None if context is None else context.of_pool(tokens), merge)
    for depth, budget in ((None, 12), (3, 5)):
        tree = best_tree(logits, budget, pool=pool, max_depth=depth, context=context, merge=merge)
        tree.check()
        expected = best_first(lattice, budget, depth)
        assert tree_paths(tree) == tree_paths(expected)
        torch.testing.assert_close(tree.log_probs, expected.log_probs)
        on_device = best_prefixes(lattice, budget, depth)
        assert set(tree_paths(on_device)) == set(tree_paths(tree))
        ids = torch.randperm(100, generator=generator)[:60]
        named = best_tree(logits, budget, pool=pool, max_depth=depth, context=context, merge=merge, ids=ids)
        assert torch.equal(named.tokens, ids[tree.tokens])
        two = None if context is None else LabelContext(keys, values, root.expand(2, -1))
        both = best_tree(
            logits.expand(2, -1, -1), budget, pool=pool, max_depth=depth, context=two, merge=merge, ids=ids
        )
        assert set(tree_paths(both, 1)) == set(tree_paths(named))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_wide_beam_finds_the_same_nodes_at_working_size(topology):
    lattice, _ = random_lattice(topology, batch=2, slots=8, vocab=60, pool=24, scale=3.0, dtype=torch.float32)
    tree = best_prefixes(lattice, 16, 6, 16)
    for row in range(2):
        assert set(tree_paths(tree, row)) == set(tree_paths(best_first(lattice, 16, 6), row))
    assert tree.depths.max() > 1


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_prefix_probability_never_rises_from_parent_to_child(topology):
    tree = best_prefixes(random_lattice(topology, slots=6, vocab=8, pool=8)[0], 32)
    above = torch.nn.functional.pad(tree.log_probs, (1, 0)).gather(1, tree.parents + 1)
    assert (tree.log_probs <= above + 1e-5).all()
    assert tree.depths[0].tolist() == sorted(tree.depths[0].tolist())


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_narrow_beam_is_a_valid_worse_tree(topology):
    lattice, _ = random_lattice(topology, batch=4, slots=6, vocab=8, pool=8, scale=0.7)
    wide, narrow = best_prefixes(lattice, 16), best_prefixes(lattice, 16, beam=1)
    narrow.check()
    assert narrow.log_probs.exp().sum() < wide.log_probs.exp().sum()
    for row in range(4):
        chain = sequences(narrow, lattice, row)
        assert [len(s) for s in chain] == list(range(1, 7))
        for node in chain:
            siblings = [prefix_log_prob(lattice, (*node[:-1], m), row) for m in range(8)]
            assert node[-1] == max(range(8), key=siblings.__getitem__)


def certain_lattice(merge, tokens, slots=4):
    """Slot i emits token tokens[i] with probability 1."""
    logits = torch.full((1, slots, 5), -math.inf)
    for i, token in enumerate(tokens):
        logits[0, i, token] = 0.0
    return Lattice(torch.tensor([[7, 8, 9]]), logits, None, None, merge)


def test_ties_and_zeros_keep_parents():
    lattice = certain_lattice(False, [0, 1, 1, 2])
    tree = best_prefixes(lattice, 3)
    assert tree_paths(tree) == [(7,), (7, 8), (7, 8, 8)] and tree.log_probs.tolist() == [[0.0] * 3]
    tree = best_prefixes(lattice, 6)
    tree.check()
    assert tree_paths(tree) == [(7,), (7, 8), (7, 8, 8), (7, 8, 8, 9)]
    padding = tree.log_probs[0] == -math.inf
    assert padding.sum() == 2 and tree.parents[0, padding].tolist() == [-1, -1]
    merged = best_prefixes(certain_lattice(True, [0, 1, 1, 2]), 4)
    assert tree_paths(merged) == [(7,), (7, 8), (7, 8, 9)]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_rounding_never_separates_a_child_from_its_parent(topology):
    for seed in range(40):  # almost certain slots: child and parent differ by rounding only
        lattice, _ = random_lattice(topology, slots=10, vocab=3, pool=2, seed=seed, scale=60, dtype=torch.float32)
        tree = best_prefixes(lattice, 18)
        tree.check()
        above = torch.nn.functional.pad(tree.log_probs, (1, 0)).gather(1, tree.parents + 1)
        assert ((tree.log_probs <= above + 1e-5) & (above > -math.inf) | (tree.log_probs == -math.inf)).all()


def test_fewer_candidates_than_budget_are_padded():
    lattice, _ = random_lattice("plain", batch=2, slots=1, vocab=2, pool=2)
    tree = best_prefixes(lattice, 10)
    tree.check()
    assert tree.tokens.shape == (2, 10) and (tree.log_probs > -math.inf).sum(1).tolist() == [2, 2]


def test_broken_drafter_still_gives_a_tree():
    lattice, _ = random_lattice("context", batch=2)
    for part in ("logits", "keys", "values"):
        poisoned = getattr(lattice, part).clone()
        poisoned[0, :2] = math.nan
        for search in (best_prefixes, best_first):
            broken = search(replace(lattice, **{part: poisoned}), 8)
            broken.check()
            torch.testing.assert_close(broken.log_probs[1], search(lattice, 8).log_probs[1])


def test_rows_do_not_influence_each_other():
    for topology in TOPOLOGIES:
        lattice, _ = random_lattice(topology, batch=3, slots=5, vocab=7, pool=5)
        together = best_prefixes(lattice, 9)
        for row in range(3):
            fields = (lattice.pool, lattice.logits, lattice.keys, lattice.values)
            one = Lattice(*(f if f is None else f[row : row + 1] for f in fields), lattice.merge)
            alone = best_prefixes(one, 9)
            assert tree_paths(alone) == tree_paths(together, row)


def test_budget_zero_and_bad_arguments():
    lattice, _ = random_lattice("merge")
    assert best_prefixes(lattice, 0).budget == 0
    for bad in ({"budget": -1}, {"budget": 4, "beam": 0}, {"budget": 4, "max_depth": 0}):
        with pytest.raises(ValueError, match="do not describe a tree"):
            best_prefixes(lattice, **bad)


def test_lattice_refuses_shapes_that_do_not_match():
    pool, logits = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 2, 5)
    keys, values = torch.zeros(1, 4, 6), torch.zeros(1, 5, 6)
    Lattice(pool, logits, keys, values, False)
    with pytest.raises(ValueError, match="do not fit"):
        Lattice(pool[:, :2], logits, keys, values, False)
    with pytest.raises(ValueError, match="cannot merge"):
        Lattice(pool, logits, keys, values, True)
    with pytest.raises(ValueError, match="keys and values"):
        Lattice(pool, logits, keys, None, False)
    with pytest.raises(ValueError, match="do not fit a pool"):
        Lattice(pool, logits, keys[:, :3], values, False)


def test_constants_made_in_inference_mode_serve_everywhere():
    lattice, _ = random_lattice("merge", slots=7, vocab=11, pool=11)
    with torch.inference_mode():
        inside = best_prefixes(lattice, 13)
    trainable = replace(lattice, logits=lattice.logits.clone().requires_grad_())
    outside = best_prefixes(trainable, 13)
    assert torch.equal(inside.tokens, outside.tokens) and not outside.log_probs.requires_grad


def test_merging_needs_a_blank_between_repeats():
    log_probs = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64).log()  # one token, three slots
    texts = enumerate_texts(log_probs, merge=True)
    assert texts[0, 0] == 0.125  # only "a - a"
    lattice = pool_lattice(log_probs.unsqueeze(0), torch.tensor([[0]]), merge=True)
    assert best_prefixes(lattice, 2).log_probs.exp().tolist() == [pytest.approx([0.875, 0.125])]
