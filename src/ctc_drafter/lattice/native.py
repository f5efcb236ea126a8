"""The best-first search in C++ (`search.cpp`): where there is a compiler, a fraction of the time of that in arrays."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctc_drafter.tree import DraftTree

from .best_first import best_first_of_slots
from .pool import LabelContext

SOURCE = Path(__file__).with_name("search.cpp")
FLAGS = ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno", "-ffp-contract=fast"]
"""Sums in any order. Not -ffast-math, with which linkers make the whole process take tiny numbers for zero."""


class NativeSearch:
    """`best_first_of_slots`, but for rounding, as machine code of this processor."""

    def __init__(self, library: Any) -> None:
        """library: of SOURCE, as `ctypes` loads it."""
        self._search = library.ctc_drafter_best_first
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        self._search.argtypes = [pointer, *[number] * 6, *[pointer] * 3, number, *[pointer] * 3]
        self._search.restype = number

    def __call__(
        self,
        slot_logits: Tensor,
        size: int,
        budget: int,
        max_depth: int | None = None,
        context: LabelContext | None = None,
        merge: bool = False,
        ids: Tensor | None = None,
    ) -> DraftTree:
        """The tree for slot_logits (1, N, V+1) on the host, blank last, see `best_first_of_slots`.

        Raises ValueError if the size is not within 1..V, or tables do not fit.
        """
        _check(slot_logits.shape[2] - 1, size, context, ids)
        probs = slot_logits[0].softmax(-1, dtype=torch.float32).contiguous()
        nodes, log_probs = torch.empty(3, 1, budget, dtype=torch.long), torch.empty(1, budget)
        keys = root = values = None
        if context is not None:
            keys, root, values = (t.contiguous() for t in (context.keys, context.root, context.values))
        found = self._search(
            _address(probs),
            *probs.shape,
            size,
            budget,
            len(probs) if max_depth is None else max_depth,
            merge,
            *map(_address, (keys, root, values)),
            0 if keys is None else keys.shape[1],
            *map(_address, (ids, nodes, log_probs)),
        )
        if found < 0:  # what is not a number is left to the specification
            return best_first_of_slots(slot_logits, size, budget, max_depth, context, merge, ids)
        tokens, parents, depths = nodes
        return DraftTree(tokens, parents, depths, log_probs)


def _check(vocabulary: int, size: int, context: LabelContext | None, ids: Tensor | None) -> None:
    """Of what machine code reads unchecked."""
    if not 1 <= size <= vocabulary:
        raise ValueError(f"pool size must be within 1..{vocabulary}, got {size}")
    if ids is not None and (ids.dtype != torch.long or len(ids) != vocabulary or not ids.is_contiguous()):
        raise ValueError(f"ids must be {vocabulary} contiguous integers")
    if context is not None:
        keys, values, root = context
        rank = root.shape[1]
        fits = keys.shape == (vocabulary, rank) and values.shape == (vocabulary + 1, rank)
        if not fits or any(t.dtype != torch.float32 for t in context):
            raise ValueError("a context needs float32 keys (V, r), values (V+1, r) and root (1, r)")


def _address(table: Tensor | None) -> int | None:
    return None if table is None else table.data_ptr()
