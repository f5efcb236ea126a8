"""Preallocated key/value slots, with a length for each row, compacted in place after each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class _SlotLayer(CacheLayerMixin):
    """One model layer's view of the cache: new keys and values go to the slots behind each row's length."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache
        self._places = ((0, 0), (0, 0))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shared = key_states.shape == value_states.shape
        self._places = self.cache.place(key_states, shared), self.cache.place(value_states, shared)
        self.is_initialized = True
        self.bind()

    def bind(self) -> None:
        """Look at the rows that the cache's passes see, each (B, heads, capacity, width)."""
        if self.is_initialized:
            self.keys, self.values = (self.cache.in_view(*place) for place in self._places)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start = self.cache.length
        end = start + key_states.shape[-2]
        if key_states.shape[0] == 1:
            self.keys[:, :, start:end] = key_states
            self.values[:, :, start:end] = value_states
        elif end > self.cache.capacity:
            raise RuntimeError(f"{end} entries do not fit into a cache with {self.cache.capacity} slots a row")
        else:
            self.cache.write(self.keys, key_states)
            self.cache.write(self.values, value_states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return self.cache.capacity


class SlotCache(Cache):
    """A transformers cache with `capacity` slots per layer for each of its rows: one row at first, more by `claim`.

    A forward pass sees all rows, or the `only` one. It writes the q new entries of each to the slots behind the row's
    own length without changing that; `keep` then makes some of them permanent. Rows stand without gaps: when one is
    released the last one moves into its place, so that a pass reads slices and nothing is computed for idle rows.

    Layers of equal shape share one tensor (planes, rows, heads, capacity, head_dim), a plane for each layer's keys and
    values, so that compaction is one gather and one copy for the whole model. All numbers in it are finite at any time:
    what a row has not committed is masked, and a masked slot still takes part in sums with weight 0. Memory follows the
    rows: it grows with what they need and shrinks when most of it is idle.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity = capacity
        self._needs = [capacity]  # slots of each row
        self.lengths = [0]
        """Committed entries of each row."""
        self.length = 0
        """Committed entries of the longest row that a pass sees."""
        self._view = (0, 1)
        self._rows = 1  # allocated
        self._indices: dict[Any, torch.Tensor] = {}  # index tensors of the coming pass
        self._seen: list[torch.Tensor] = []
        self._planes: list[torch.Tensor] = []
        self._used: list[int] = []
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])

    # ------------------------------------------------------------ rows

    def claim(self, capacity: int, limit: int | None = None) -> int:
        """Add an empty row that needs `capacity` slots; returns its index. There will be no more than `limit` rows."""
        count = len(self.lengths) + 1
        rows = self._rows if count <= self._rows else max(count, min(2 * self._rows, limit or 2 * self._rows))
        self._resize(rows, max(capacity, self.capacity))
        self.lengths.append(0)
        self._needs.append(capacity)
        self._see(0, count)
        return count - 1

    def release(self, row: int) -> None:
        """Drop a row, of several; the last row takes its index."""
        last = len(self.lengths) - 1
        length, need = self.lengths.pop(), self._needs.pop()
        if row != last:
            for plane in self._planes:
                plane[:, row, :, :length] = plane[:, last, :, :length]
            self.lengths[row], self._needs[row] = length, need
        most = max(self._needs)
        capacity = most if 2 * most <= self.capacity else self.capacity
        with suppress(RuntimeError):  # without memory for a smaller copy it stays as large
            self._resize(2 * last if 4 * last <= self._rows else self._rows, capacity)
        self._see(0, last)

    def _resize(self, rows: int, capacity: int) -> None:
        if (rows, capacity) == (self._rows, self.capacity):
            return
        count, longest = len(self.lengths), max(self.lengths)
        resized = []
        for plane in self._planes:
            planes, _, heads, _, width = plane.shape
            resized.append(plane.new_zeros(planes, rows, heads, capacity, width))
            resized[-1][:, :count, :, :longest] = plane[:, :count, :, :longest]
        self._planes, self._rows, self.capacity = resized, rows, capacity  # all or, without memory for it, nothing

    def copy_of(self, row: int) -> tuple[torch.Tensor, ...]:
        """A copy of what a row has committed: for each tensor of planes (planes, heads, length, width)."""
        return tuple(plane[:, row, :, : self.lengths[row]].clone() for plane in self._planes)

    def fill(self, row: int, planes: Sequence[torch.Tensor]) -> None:
        """Put into an empty row what `copy_of` gave of a row of this or another cache of the same model."""
        length = planes[0].shape[2]
        for i, entries in enumerate(planes):
            if i == len(self._planes):  # no pass has been made yet: the layers will find their places in it
                count, heads, _, width = entries.shape
                self._planes.append(entries.new_zeros(count, self._rows, heads, self.capacity, width))
                self._used.append(0)
            self._planes[i][:, row, :, :length] = entries
        self.lengths[row] = length
        self._see(*self._view)

    @contextmanager
    def only(self, row: int) -> Iterator[None]:
        """Meanwhile passes and `keep` see this row alone."""
        if len(self.lengths) == 1:
            yield
            return
        self._see(row, row + 1)
        try:
            yield
        finally:
            self._see(0, len(self.lengths))

    def _see(self, first: int, stop: int) -> None:
        self._view = first, stop
        self._indices.clear()
        self._seen = []
        self.length = max(self.lengths[first:stop])
        for layer in self.layers:
            assert isinstance(layer, _SlotLayer)
            layer.bind()

    def in_view(self, plane: int, index: int) -> torch.Tensor:
        """What a pass sees of a plane: (B, heads, capacity, width)."""
        return self._planes[plane][index][self._view[0] : self._view[1]]

    # ------------------------------------------------------------ passes

    def planes(self) -> list[torch.Tensor]:
        """Keys and values of each layer in turn, all slots of what passes see, (B, heads, capacity, width)."""
        if not self._seen:
            for layer in self.layers:
                assert isinstance(layer, _SlotLayer) and layer.keys is not None and layer.values is not None
                self._seen += [layer.keys, layer.values]
        return self._seen

    def starts(self, device: torch.device) -> torch.Tensor:
        """(B,) lengths of the rows that a pass sees."""
        if device not in self._indices:
            self._indices[device] = torch.tensor(self.lengths[self._view[0] : self._view[1]], device=device)
        return self._indices[device]

    def write(self, slots: torch.Tensor, states: torch.Tensor) -> None:
        """Put states (B, heads, q, width) behind the rows' own lengths in slots (B, heads, capacity, width)."""
        batch, heads, q, width = states.shape
        if (heads, q) not in self._indices:
            planes = torch.arange(batch * heads, device=states.device).view(batch, heads, 1) * self.capacity
            new = self.starts(states.device)[:, None, None] + torch.arange(q, device=states.device)
            self._indices[heads, q] = (planes + new).flatten()
        slots.view(-1, width).index_copy_(0, self._indices[heads, q], states.reshape(-1, width))

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep of each row in view the entries at its length + offsets (ascending) of the last pass; drop the others.

        paths: the offsets of each row, which need not be equally many.
        """
        first = self._view[0]
        if len(paths) == 1:
            self._keep_in_one(first, paths[0])
        else:
            self._keep_in_each(paths)
        for row, offsets in enumerate(paths, first):
            self.lengths[row] += len(offsets)
        self.length = max(self.lengths[first : self._view[1]])
        self._indices.clear()

    def _keep_in_one(self, row: int, offsets: Sequence[int]) -> None:
        count = len(offsets)
        if offsets[-1] != count - 1:
            for plane in self._planes:
                index = torch.tensor(offsets, device=plane.device).add_(self.length)
                mine = plane[:, row]
                mine[:, :, self.length : self.length + count] = mine.index_select(2, index)

    def _keep_in_each(self, paths: Sequence[Sequence[int]]) -> None:
        """All rows at once, whatever their numbers: only the entries that move are touched."""
        begin = self.lengths[self._view[0] : self._view[1]]
        moves = [
            (row, begin[row] + old, begin[row] + new)
            for row, offsets in enumerate(paths, self._view[0])
            for new, old in enumerate(offsets)
            if new != old
        ]
        for plane in self._planes if moves else ():
            count, _, heads, capacity, width = plane.shape
            rows, old, new = torch.tensor(moves, device=plane.device).T[..., None]
            lines = (rows * heads + torch.arange(heads, device=plane.device)) * capacity
            flat = plane.view(count, -1, width)
            flat.index_copy_(1, (lines + new).flatten(), flat.index_select(1, (lines + old).flatten()))

    # ------------------------------------------------------------ memory

    def place(self, states: torch.Tensor, shared: bool) -> tuple[int, int]:
        """Tensor and plane for a layer's states (B, heads, q, width); `shared`: keys and values are of one shape."""
        shape = (states.shape[1], self.capacity, states.shape[3])
        for i, plane in enumerate(self._planes):
            if self._used[i] < plane.shape[0] and plane.shape[2:] == shape and plane.dtype == states.dtype:
                self._used[i] += 1
                return i, self._used[i] - 1
        planes = len(self.layers) * (2 if shared else 1)
        self._planes.append(states.new_zeros(planes, self._rows, *shape))
        self._used.append(1)
        return len(self._planes) - 1, 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(plane.nbytes for plane in self._planes)
