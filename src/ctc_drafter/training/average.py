"""The exponential moving average of a drafter's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Average:
    """mean <- d * mean + (1 - d) * weight after every step; with decay 0 it is the weights themselves.

    d is min(decay, (1 + step) / (10 + step)), so that the first, bad weights are soon forgotten.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], decay: float) -> None:
        self._weights, self._decay = weights, decay
        self.tensors = {name: w.detach().clone() for name, w in weights.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (from 0)."""
        d = min(self._decay, (1 + step) / (10 + step))
        for name, mean in self.tensors.items():
            mean.lerp_(self._weights[name].detach(), 1 - d)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The weights are the averages inside, and themselves again after it."""
        kept = {name: self._weights[name].detach().clone() for name in self.tensors}
        copy_weights(self.tensors, self._weights)
        try:
            yield
        finally:
            copy_weights(kept, self._weights)


@torch.no_grad()
def copy_weights(source: Mapping[str, torch.Tensor], to: Mapping[str, torch.Tensor]) -> None:
    """Copy all tensors of `source` into those of the same name."""
    for name, tensor in source.items():
        to[name].copy_(tensor)
