"""What was read of earlier prompts, so that a prompt that begins alike is read from where it differs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..cache import SlotCache

WORTH = 16
"""A prompt is kept if it has so many tokens that no kept one begins with."""


@dataclass(frozen=True)
class Prefix:
    """The first positions of a prompt: keys and values as `SlotCache.copy_of` gives them, and the target's features."""

    ids: tuple[int, ...]
    planes: tuple[torch.Tensor, ...]
    features: torch.Tensor
    """(1, P, F * hidden_size)."""

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes) + self.features.nbytes

    def cut(self, length: int) -> Prefix:
        """Its first `length` positions, without a copy."""
        planes = tuple(plane[:, :, :length] for plane in self.planes)
        return Prefix(self.ids[:length], planes, self.features[:, :length])


class Prefixes:
    """Keeps up to `limit` bytes of prompts; those that were not used for the longest time go first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._kept: OrderedDict[tuple[tuple[int, ...], tuple[int, ...]], Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, ids: Sequence[int], layers: tuple[int, ...]) -> Prefix | None:
        """The longest kept beginning of a prompt, read with the features of `layers`; never the whole of it.

        At least the last token stays to be read, since the first token of the answer comes from its logits.
        """
        best, length = None, 0
        for key in self._kept:
            if key[0] == layers and (common := _common(key[1], ids[:-1])) > length:
                best, length = key, common
        if best is None:
            return None
        self._kept.move_to_end(best)
        return self._kept[best].cut(length)

    def add(
        self,
        ids: Sequence[int],
        layers: tuple[int, ...],
        cache: SlotCache,
        row: int,
        features: torch.Tensor,
        known: int,
    ) -> None:
        """Keep a prompt that was just read into a row of the cache; `known`: how many of its tokens `find` gave."""
        if len(ids) - known < WORTH:
            return
        entry = Prefix(tuple(ids), cache.copy_of(row), features.clone())
        if entry.nbytes > self.limit:
            return
        key = (layers, entry.ids)
        if key in self._kept:
            self.nbytes -= self._kept.pop(key).nbytes
        self._kept[key] = entry
        self.nbytes += entry.nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    count = 0
    for one, other in zip(a, b):
        if one != other:
            break
        count += 1
    return count
