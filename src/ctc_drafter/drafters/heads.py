"""Residual heads: every slot is a block of its own on the target's newest feature (Medusa, Cai et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class HeadsModule(nn.Module):
    """z_i = f + silu(A_i f + b_i) for slots i = 1..N, f being what the LM head reads; A_i and b_i start at zero.

    It offers what `DraftModule` offers, but keeps no context: a slot sees the newest feature only.
    """

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.blocks = nn.Linear(width, slots * width)
        nn.init.zeros_(self.blocks.weight)
        nn.init.zeros_(self.blocks.bias)

    def pairs(self, features: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """The features (B, n, width) themselves; the next tokens are not seen."""
        return features

    def prepare(self) -> list[nn.Linear]:
        """Its linear layers."""
        return [self.blocks]

    def read(self, features: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """`pairs`."""
        return self.pairs(features, embedded)

    def fold(self, head: torch.Tensor) -> torch.Tensor:
        """The LM head itself."""
        return head

    def start(self, capacity: int, like: torch.Tensor) -> None:
        """There is no cache."""

    def reserve(self, capacity: int) -> None:
        """There is no cache."""

    def rewind(self, length: int) -> None:
        """There is no cache."""

    def step(self, pairs: torch.Tensor) -> torch.Tensor:
        """Slots after the newest of the features `pairs` (1, n, width): (1, N, width)."""
        return self._slots(pairs[:, -1])

    def together(self, modules: Sequence[HeadsModule], pairs: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """`step` for several at once, see `DraftModule.together`."""
        return self._slots(pairs[0, torch.tensor(counts, device=pairs.device).cumsum(0) - 1])

    def forward(self, pairs: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """pairs (B, T, width), anchors (B, A) -> slots (B, A, N, width)."""
        return self._slots(pairs.gather(1, anchors[..., None].expand(-1, -1, pairs.shape[-1])))

    def _slots(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., None, :] + F.silu(self.blocks(x).unflatten(-1, (self.slots, -1)))
