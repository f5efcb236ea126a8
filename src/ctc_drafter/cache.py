"""Preallocated key/value slots for one sequence, compacted in place after each step."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class _SlotLayer(CacheLayerMixin):
    """One model layer's view of the cache: new keys and values go to the slots after `cache.length`."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shared = key_states.shape == value_states.shape
        self.keys = self.cache.row(key_states, shared)
        self.values = self.cache.row(value_states, shared)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start = self.cache.length
        end = start + key_states.shape[-2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return self.cache.capacity


class SlotCache(Cache):
    """A transformers cache with `capacity` slots per layer, for batch size 1.

    A forward pass writes its q new entries to slots length .. length+q-1 without changing `length`; `keep` then makes
    some of them permanent. Layers of equal shape share one tensor (rows, 1, heads, capacity, head_dim), a row for each
    layer's keys and values, so that compaction is one gather and one copy for the whole model.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self._planes: list[torch.Tensor] = []
        self._used: list[int] = []
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])

    def row(self, states: torch.Tensor, shared: bool) -> torch.Tensor:
        """The next free row (1, heads, capacity, head_dim) for states (1, heads, q, head_dim)."""
        shape = (states.shape[1], self.capacity, states.shape[3])
        for i, plane in enumerate(self._planes):
            if self._used[i] < plane.shape[0] and plane.shape[2:] == shape and plane.dtype == states.dtype:
                self._used[i] += 1
                return plane[self._used[i] - 1]
        rows = len(self.layers) * (2 if shared else 1)
        self._planes.append(states.new_zeros(rows, 1, *shape))
        self._used.append(1)
        return self._planes[-1][0]

    def keep(self, offsets: list[int]) -> None:
        """Keep the entries at length + offsets (ascending) of the last pass, in that order, and drop the others."""
        count = len(offsets)
        if offsets[-1] != count - 1:
            for plane in self._planes:
                index = torch.tensor(offsets, device=plane.device).add_(self.length)
                plane[:, :, :, self.length : self.length + count] = plane.index_select(3, index)
        self.length += count

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(plane.nbytes for plane in self._planes)
