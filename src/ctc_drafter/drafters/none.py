"""No drafting: an empty tree, so that the decoding loop is plain decoding."""

from __future__ import annotations

from typing import Any

import torch

from ..tree import DraftTree
from .base import Drafter, register


@register("none")
class NoDrafter(Drafter):
    """Plain decoding: the baseline of every measurement."""

    name = "none"
    stateless = True

    def draft(self, features: torch.Tensor, next_tokens: torch.Tensor) -> Any:
        return next_tokens.device

    def tree(self, guess: Any, budget: int) -> DraftTree:
        return DraftTree.empty(1, guess)
