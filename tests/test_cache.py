"""The slot cache against a naive one that concatenates."""

from __future__ import annotations

import random

import pytest
import torch

from ctc_drafter.cache import SlotCache

EQUAL = [(2, 4, 4)] * 3
KEYS_UNLIKE_VALUES = [(2, 6, 3)] * 2
MIXED = [(2, 4, 4), (1, 8, 8), (2, 4, 4), (1, 8, 5)]
"""(heads, key width, value width) of each layer."""


class NaiveCache:
    def __init__(self, shapes: list[tuple[int, int, int]]) -> None:
        self.kept = [[torch.zeros(1, h, 0, k), torch.zeros(1, h, 0, v)] for h, k, v in shapes]

    def seen(self, layer: int, new: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat([old, fresh], 2) for old, fresh in zip(self.kept[layer], new)]

    def keep(self, passed: list[list[torch.Tensor]], offsets: list[int]) -> None:
        for kept, new in zip(self.kept, passed):
            for i in range(2):
                kept[i] = torch.cat([kept[i], new[i][:, :, offsets]], 2)


@pytest.mark.parametrize("shapes", [EQUAL, KEYS_UNLIKE_VALUES, MIXED])
@pytest.mark.parametrize("seed", range(4))
def test_passes_and_compactions(shapes: list[tuple[int, int, int]], seed: int) -> None:
    """Random passes, each followed by keeping a random subset in order: every layer sees exactly what was kept."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    cache, naive = SlotCache(len(shapes), 80), NaiveCache(shapes)
    while cache.length < 60:
        q = rng.randint(1, 12)
        passed = [[torch.randn(1, h, q, k), torch.randn(1, h, q, v)] for h, k, v in shapes]
        for layer, new in enumerate(passed):
            got = cache.update(*new, layer)
            for mine, want in zip(got, naive.seen(layer, new)):
                assert torch.equal(mine, want)
        assert cache.get_seq_length() == naive.kept[0][0].shape[2]  # a pass alone commits nothing
        offsets = sorted(rng.sample(range(q), rng.randint(1, q)))
        cache.keep([offsets])
        naive.keep(passed, offsets)
        assert cache.length == cache.get_seq_length() == naive.kept[0][0].shape[2]


def test_layers_of_one_shape_share_one_tensor() -> None:
    cache = SlotCache(3, 10)
    for layer in range(3):
        cache.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), layer)
    assert cache.nbytes == 3 * 2 * 2 * 10 * 4 * 4
    assert len(cache._planes) == 1


def test_keeping_a_prefix_copies_nothing() -> None:
    cache = SlotCache(1, 8)
    keys = torch.arange(3.0).reshape(1, 1, 3, 1)
    cache.update(keys, keys, 0)
    before = cache._planes[0]._version
    cache.keep([[0, 1]])
    assert cache.length == 2 and cache._planes[0]._version == before
    assert torch.equal(cache.update(keys[:, :, :1], keys[:, :, :1], 0)[0].flatten(), torch.tensor([0.0, 1.0, 0.0]))


def test_a_full_cache_raises() -> None:
    cache = SlotCache(1, 4)
    five = torch.zeros(1, 1, 5, 1)
    with pytest.raises(RuntimeError):
        cache.update(five, five, 0)


def test_caches_are_independent() -> None:
    first, second = SlotCache(1, 4), SlotCache(1, 4)
    one = torch.ones(1, 1, 1, 1)
    first.update(one, one, 0)
    first.keep([[0]])
    assert second.length == 0
    assert torch.equal(second.update(2 * one, one, 0)[0], 2 * one)
    assert torch.equal(first.update(3 * one, one, 0)[0].flatten(), torch.tensor([1.0, 3.0]))


class Rows:
    """Naive caches of their own for the rows of a cache."""

    def __init__(self, shapes: list[tuple[int, int, int]], capacity: int) -> None:
        self.shapes, self.cache = shapes, SlotCache(len(shapes), capacity)
        self.naive = [NaiveCache(shapes)]

    def random_pass(self, q: int, rng: random.Random, row: int | None = None) -> None:
        """A pass of all rows, or of one, and then keep in each something else."""
        mine = self.naive if row is None else [self.naive[row]]
        passed = [[torch.randn(len(mine), h, q, w) for w in (k, v)] for h, k, v in self.shapes]
        for layer, new in enumerate(passed):
            got = self.cache.update(*new, layer)
            for i, naive in enumerate(mine):
                own = naive.seen(layer, [t[i : i + 1] for t in new])
                for all_slots, want in zip(got, own):
                    assert torch.equal(all_slots[i : i + 1, :, : want.shape[2]], want)
            assert all(bool(t.isfinite().all()) for t in got)
        paths = [sorted(rng.sample(range(q), rng.randint(1, q))) for _ in mine]
        self.cache.keep(paths)
        for i, (naive, path) in enumerate(zip(mine, paths)):
            naive.keep([[t[i : i + 1] for t in new] for new in passed], path)


@pytest.mark.parametrize("shapes", [EQUAL, KEYS_UNLIKE_VALUES, MIXED])
@pytest.mark.parametrize("seed", range(6))
def test_rows_that_come_and_go(shapes: list[tuple[int, int, int]], seed: int) -> None:
    """Each row sees what it kept itself, whatever the others do."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows = Rows(shapes, 40)
    for _ in range(60):
        count = len(rows.naive)
        if rng.random() < 0.3 and count < 6:
            need = rng.choice([40, 45, 200])
            assert rows.cache.claim(need, 6) == count
            rows.naive.append(NaiveCache(shapes))
            with rows.cache.only(count):
                rows.random_pass(rng.randint(1, 8), rng, count)
        full = [i for i, length in enumerate(rows.cache.lengths) if length > 28]
        for i in sorted(full or ([rng.randrange(count)] if rng.random() < 0.2 else []), reverse=True):
            if len(rows.naive) > 1:
                rows.cache.release(i)
                last = rows.naive.pop()
                if i < len(rows.naive):
                    rows.naive[i] = last
        if max(rows.cache.lengths) <= 28:
            rows.random_pass(rng.randint(1, 12), rng)
        assert rows.cache.lengths == [n.kept[0][0].shape[2] for n in rows.naive]
        assert rows.cache.get_seq_length() == max(rows.cache.lengths)
        assert len(rows.cache.lengths) <= rows.cache._rows <= 6 and 40 <= rows.cache.capacity <= 200


def test_a_full_row_raises_and_spares_its_neighbor() -> None:
    cache = SlotCache(1, 4)
    three = torch.ones(1, 2, 3, 1)
    cache.update(three, three, 0)
    cache.keep([[0, 1, 2]])
    cache.claim(4)
    cache.update(torch.ones(2, 2, 1, 1), torch.ones(2, 2, 1, 1), 0)
    before = cache._planes[0].clone()
    with pytest.raises(RuntimeError, match="5 entries do not fit into a cache with 4 slots a row"):
        cache.update(torch.ones(2, 2, 2, 1), torch.ones(2, 2, 2, 1), 0)
    assert torch.equal(cache._planes[0], before)
