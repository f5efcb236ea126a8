"""The lattice: what a parallel drafter says about its slots, cut down to a pool of likely tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_BIAS = 60.0
"""Bound of a context's bias, far beyond what is learned: its exponential must stay a float32 number."""
MIN_PROB = 1e-30
"""Less probable nodes become padding: near float32's smallest numbers a child could round to above its parent."""


class LabelContext(NamedTuple):
    """How the last emitted token u biases the next label c of a vocabulary of V: keys[u] @ values[c].

    keys (V, r); values (V+1, r), the blank's last; root (B, r): the key of each row's root. In float32 on a CPU.
    """

    keys: Tensor
    values: Tensor
    root: Tensor

    def of_pool(self, pool: Tensor) -> tuple[Tensor, Tensor]:
        """For `pool_lattice`: keys of pool (B, M) and root, values of pool and blank, both (B, M+1, r)."""
        blank = torch.full_like(pool[:, :1], len(self.values) - 1)
        return torch.cat([self.keys[pool], self.root.unsqueeze(1)], 1), self.values[torch.cat([pool, blank], 1)]


@dataclass(frozen=True)
class Lattice:
    """Slot logits over C = M + 2 classes: a pool of M tokens, the blank, and all other tokens as one class.

    pool:   (B, M) long, distinct token ids.
    logits: (B, N, C) slot logits in float32 or better; the last class holds the logsumexp of the tokens outside.
    keys:   (B, M+1, r) and
    values: (B, C, r): context u (pool token u, or the root for u = M) adds keys[u] @ values[c] to the logit of class c;
            both None where the slots do not depend on the last emitted token.
    merge:  True: equal neighbours merge (standard CTC); False: every non-blank slot emits one token.
    """

    pool: Tensor
    logits: Tensor
    keys: Tensor | None
    values: Tensor | None
    merge: bool

    def __post_init__(self) -> None:
        batch, size = self.pool.shape
        if self.logits.shape[0] != batch or self.logits.shape[2] != size + 2:
            raise ValueError(f"pool {tuple(self.pool.shape)} and logits {tuple(self.logits.shape)} do not fit")
        if (self.keys is None) != (self.values is None) or (self.merge and self.keys is not None):
            raise ValueError("a context needs keys and values, and cannot merge: its last label is its last emission")
        shapes = [(batch, size + 1 + i) if t is None else t.shape[:2] for i, t in enumerate((self.keys, self.values))]
        if shapes != [(batch, size + 1), (batch, size + 2)]:
            raise ValueError(f"keys and values of {shapes} rows do not fit a pool of {size} tokens")


def pool_tokens(slot_logits: Tensor, size: int) -> Tensor:
    """The ``size`` real tokens with the largest max_i log p_i(v): (B, N, V+1), blank last -> (B, size) distinct ids.

    Raises ValueError if size is not within 1..V.
    """
    vocab = slot_logits.shape[-1] - 1
    if not 1 <= size <= vocab:
        raise ValueError(f"pool size must be within 1..{vocab}, got {size}")
    return slot_logits.log_softmax(-1)[..., :-1].amax(1).topk(size, dim=-1).indices


def pool_lattice(
    slot_logits: Tensor, pool: Tensor, context: tuple[Tensor, Tensor] | None = None, merge: bool = False
) -> Lattice:
    """The lattice of slot logits (B, N, V+1), blank last, over a pool (B, M) of distinct real tokens.

    context: keys (B, M+1, r) of the pool tokens and the root, values (B, M+1, r) of the pool tokens and the blank. The
    tokens outside the pool share one class without context: exact without context, or when the pool is everything.
    """
    logits = slot_logits.to(torch.promote_types(slot_logits.dtype, torch.float32))
    index = pool.unsqueeze(1).expand(-1, logits.shape[1], -1)
    rest = logits[..., :-1].scatter(2, index, float("-inf")).logsumexp(-1, keepdim=True)
    classes = torch.cat([logits.gather(2, index), logits[..., -1:], rest], dim=-1)
    if context is None:
        return Lattice(pool, classes, None, None, merge)
    keys, values = (part.to(logits.dtype) for part in context)
    return Lattice(pool, classes, keys, F.pad(values, (0, 0, 0, 1)), merge)
