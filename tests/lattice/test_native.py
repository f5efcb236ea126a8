"""The search in C++ finds the tree of the search in arrays."""

from __future__ import annotations

import shutil

import pytest
import torch

from ctc_drafter.lattice.best_first import best_first_of_slots
from ctc_drafter.lattice.native import FLAGS, SOURCE, NativeSearch
from ctc_drafter.lattice.pool import LabelContext
from ctc_drafter.target.programs import library

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)


@pytest.fixture(scope="module")
def search() -> NativeSearch:
    return NativeSearch(library(SOURCE, FLAGS, make=True))


def case(topology, seed, slots=6, vocab=40, scale=3.0, rank=5):
    """Slot logits (1, N, V+1), and the options of a search over them."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(1, slots, vocab + 1, generator=generator)
    options = {"merge": topology == "merge"}
    if topology == "context":
        keys, values = torch.randn(2, vocab + 1, rank, generator=generator)
        options["context"] = LabelContext(keys[:-1], values, keys[3:4])
    return logits, options


def assert_same_tree(tree, other):
    tree.check()
    assert torch.equal(tree.tokens, other.tokens)
    assert torch.equal(tree.parents, other.parents)
    assert torch.equal(tree.depths, other.depths)
    torch.testing.assert_close(tree.log_probs, other.log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("topology", ["merge", "plain", "context"])
@pytest.mark.parametrize(("pool", "budget", "depth"), [(40, 1, None), (40, 7, 6), (12, 16, 4), (16, 64, 1), (3, 30, 6)])
def test_tree_is_that_of_the_search_in_arrays(search, topology, pool, budget, depth):
    for seed in range(20):
        logits, options = case(topology, seed)
        assert_same_tree(
            search(logits, pool, budget, depth, **options), best_first_of_slots(logits, pool, budget, depth, **options)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_named_classes(search, dtype):
    ids = torch.arange(40).flip(0) * 7
    for seed in range(20):
        logits, options = case("context", seed)
        logits = logits.to(dtype)
        want = best_first_of_slots(logits.float(), 40, 9, ids=ids, **options)
        assert_same_tree(search(logits, 40, 9, ids=ids, **options), want)


def test_logits_in_any_layout(search):
    logits, options = case("context", 2)
    turned = logits.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same_tree(search(turned, 30, 12, **options), search(logits, 30, 12, **options))


def test_slots_without_a_blank(search):
    for seed in range(20):
        logits, options = case("context", seed)
        logits[..., -1] = -torch.inf
        assert_same_tree(search(logits, 30, 20, **options), best_first_of_slots(logits, 30, 20, **options))


def test_what_can_never_be_is_padding(search):
    logits = torch.full((1, 3, 9), -torch.inf)
    logits[0, :, 2] = 0
    tree = search(logits, 8, 5)
    assert_same_tree(tree, best_first_of_slots(logits, 8, 5))
    assert tree.depths.tolist() == [[1, 2, 3, 1, 1]]
    assert tree.log_probs.tolist()[0][3:] == [-torch.inf] * 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_does_no_harm(search, bad):
    logits, options = case("context", 0)
    logits[0, 2, 5] = bad
    search(logits, 30, 6, **options).check()
    logits[:] = bad
    search(logits, 30, 6, **options).check()


def test_large_biases_are_bounded(search):
    logits, options = case("context", 1)
    keys, values, root = options["context"]
    for scale in (30.0, 1e4):
        context = LabelContext(keys * scale, values * scale, root * scale)
        search(logits, 30, 12, context=context).check()


def test_what_does_not_fit_is_refused(search):
    logits, options = case("context", 0)
    keys, values, root = options["context"]
    with pytest.raises(ValueError, match="pool size"):
        search(logits, 41, 5)
    with pytest.raises(ValueError, match="ids"):
        search(logits, 40, 5, ids=torch.arange(39))
    for context in ((keys[1:], values, root), (keys, values.double(), root), (keys[:, 1:], values, root)):
        with pytest.raises(ValueError, match="context"):
            search(logits, 40, 5, context=LabelContext(*context))


def test_found_by_whoever_comes_later_unless_others_could_have_put_it_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert library(SOURCE, FLAGS, make=False) is None
    library(SOURCE, FLAGS, make=True)
    [path] = tmp_path.rglob("search-*.so")
    path.write_bytes(path.read_bytes()[:100])  # cut off, before it was ever loaded from there
    assert library(SOURCE, FLAGS, make=False) is None
    library(SOURCE, FLAGS, make=True)
    path.chmod(0o777)
    assert library(SOURCE, FLAGS, make=False) is None
    path.chmod(0o755)
    found = NativeSearch(library(SOURCE, FLAGS, make=False))
    logits, options = case("plain", 0)
    assert_same_tree(found(logits, 9, 4, **options), best_first_of_slots(logits, 9, 4, **options))
