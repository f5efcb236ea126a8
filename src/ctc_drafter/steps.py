"""What one pass of the target produced, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .logprobs import LogProb
from .tree import DraftTree

PHASES = ("draft", "tree", "score", "accept", "commit")


@dataclass
class Step:
    """What one pass of the target produced."""

    tokens: list[int]
    """New tokens, the last one not from the draft; cut at a stop."""
    accepted: int
    """Emitted tokens that the draft had guessed."""
    drafted: int
    """Draft nodes scored."""
    seconds: dict[str, float]
    """Time by phase: `prefill` for the first step, else those of PHASES."""
    finish: str | None = None
    """`stop` or `length` on the last step; `error` if a row of a batch could not go on."""
    tree: DraftTree | None = None
    """The draft tree that was scored; None for the first step, which reads the prompt."""
    error: Exception | None = None
    """Why, if `finish` is `error`."""
    log_probs: list[LogProb] | None = None
    """Of each of `tokens`, if they were asked for."""
    nodes: Sequence[int] = ()
    """Of `tree`, those that came true, from the root down; with a stop among `tokens` some may be behind it."""

    @property
    def ranks(self) -> list[int]:
        """The places of `nodes` among all of the tree by falling probability; without probabilities, the nodes."""
        if self.tree is None or self.tree.log_probs is None:
            return list(self.nodes)
        worth = self.tree.log_probs[0].tolist()
        return [sum(p > worth[node] for p in worth) + worth[:node].count(worth[node]) for node in self.nodes]

    def tokens_within(self, budgets: Sequence[int]) -> dict[int, int]:
        """How many `tokens` there would be with only the best so many nodes of the tree, for each of the budgets."""
        # A parent comes before its child and is no less probable, so ranks rise along the path.
        ranks, most = self.ranks, len(self.tokens)
        return {b: min(most, 1 + sum(rank < b for rank in ranks)) for b in budgets}

    @classmethod
    def failed(cls, error: Exception) -> Step:
        """The last step of a row that cannot go on."""
        return cls([], 0, 0, {}, "error", error=error)


class Clock:
    """Seconds between laps; waits for a GPU only when asked to, since waiting costs time itself."""

    def __init__(self, device: torch.device, wait: bool) -> None:
        self._wait = wait and device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def _now(self) -> float:
        if self._wait:
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] = now - self._last
        self._last = now
