"""Prompt lookup: guess that the text goes on as it did after the same n-gram before (Saxena 2023). Nothing to train."""

from __future__ import annotations

from collections import defaultdict

import torch

from ..tree import DraftTree
from .base import Drafter, register

MAX_NGRAM = 4
MAX_LENGTH = 10
"""Longest continuation that is copied."""
NEAREST = 8
"""Places among which `longest` chooses."""


@register("lookup")
class LookupDrafter(Drafter):
    """The continuations of the longest suffix that occurred before, latest occurrence first, as one tree."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "lookup"
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], list[int]] = {}
        """Where the text goes on after each n-gram, in order of occurrence."""

    def start(self, capacity: int) -> None:
        self._tokens, self._after = [], defaultdict(list)

    def draft(self, features: torch.Tensor, next_tokens: torch.Tensor) -> torch.device:
        """Remember the new tokens (1, n)."""
        for token in next_tokens[0].tolist():
            for n in range(1, min(MAX_NGRAM, len(self._tokens)) + 1):
                self._after[tuple(self._tokens[-n:])].append(len(self._tokens))
            self._tokens.append(token)
        return next_tokens.device

    def tree(self, guess: torch.device, budget: int) -> DraftTree:
        latest = reversed(self._places()[-budget:])
        return DraftTree.from_paths([[self._tokens[i : i + MAX_LENGTH] for i in latest]], budget, guess)

    def _places(self) -> list[int]:
        """Where the text went on after its longest suffix that occurred before, in order of occurrence."""
        for n in range(min(MAX_NGRAM, len(self._tokens)), 0, -1):
            places = self._after.get(tuple(self._tokens[-n:]), [])
            if places:
                return places
        return []

    def longest(self, limit: int) -> tuple[int, list[int]]:
        """How many tokens before the text's end stand before some earlier place too, and what follows there.

        The longest such match among the last NEAREST places, the latest first; it is not followed beyond `limit`
        tokens. 0 and an empty list if the last token is new.
        """
        tokens, best, place = self._tokens, 0, 0
        for i in reversed(self._places()[-NEAREST:]):
            n = 1
            while n < min(i, limit) and tokens[i - 1 - n] == tokens[-1 - n]:
                n += 1
            if n > best:
                best, place = n, i
        return best, tokens[place : place + MAX_LENGTH] if best else []
