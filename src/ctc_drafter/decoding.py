"""The loop: draft, score, accept, commit. Plain decoding is this loop with an empty tree; there is no other one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .acceptance import Chooser, Sampling, accepted_paths
from .errors import UserError
from .target import Target
from .tree import DraftTree

if TYPE_CHECKING:
    from .drafters import Drafter

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
    """`stop` or `length` on the last step."""
    tree: DraftTree | None = None
    """The draft tree that was scored; None for the first step, which reads the prompt."""


class _Clock:
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


class _Sequence:
    """What one generation carries from pass to pass: the cache, the features not yet drafted from, and the root."""

    def __init__(self, target: Target, drafter: Drafter, sampling: Sampling, capacity: int) -> None:
        self.target, self.drafter = target, drafter
        self.chooser = Chooser(sampling, target.device)
        self.cache = target.new_cache(capacity)
        self._ticket = object()
        self.context: list[int] = []
        """All ids up to the root."""
        self.features = self.next_tokens = torch.empty(0)
        """(1, n, F * hidden_size) and (1, n): the pairs of feature and next token that the drafter has not seen."""

    def prefill(self, prompt_ids: list[int]) -> list[int]:
        """Read the prompt; returns the first token."""
        target = self.target
        self.drafter.start(self.cache.capacity)
        self.drafter.serves = self._ticket
        target.capture(self.drafter.feature_layers)
        logits, self.features = target.prefill(prompt_ids, self.cache)
        empty = DraftTree.empty(1, target.device)
        root = self.chooser.choose(logits[:, None], empty, empty.ancestor_mask(), prompt_ids)
        known = torch.tensor([prompt_ids[1:]], dtype=torch.long, device=target.device)
        self.next_tokens = torch.cat([known, root], 1)
        tokens: list[int] = root[0].tolist()
        self.context = prompt_ids + tokens
        return tokens

    def step(self, budget: int, clock: _Clock) -> tuple[list[int], DraftTree]:
        """Draft, score, accept, commit; returns the new tokens (the accepted ones and one more) and the tree."""
        target, drafter = self.target, self.drafter
        if drafter.serves is not self._ticket and not drafter.stateless:
            raise UserError("Another generation has begun with this drafter; load one drafter for each at a time.")
        guess = drafter.draft(self.features, self.next_tokens)
        clock.lap("draft")
        tree = drafter.tree(guess, budget)
        clock.lap("tree")
        ancestors = tree.ancestor_mask()
        target.capture(drafter.feature_layers)  # another generation may have run since the last yield
        logits, features = target.score(self.next_tokens[:, -1:], tree, ancestors, self.cache)
        clock.lap("score")
        chosen = self.chooser.choose(logits, tree, ancestors, self.context)
        [(offsets, tokens)] = accepted_paths(tree, chosen)
        clock.lap("accept")
        self.cache.keep(offsets)
        kept = torch.tensor(offsets, device=target.device)
        self.features, self.next_tokens = features.index_select(1, kept), chosen.index_select(1, kept)
        self.context += tokens
        clock.lap("commit")
        return tokens, tree


@torch.inference_mode()
def generate(
    target: Target,
    drafter: Drafter,
    prompt_ids: list[int],
    *,
    max_new_tokens: int = 128,
    budget: int = 8,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    profile: bool = False,
) -> Iterator[Step]:
    """Generate tokens after `prompt_ids`, one Step per pass of the target.

    Ends at one of the target's stop ids (emitted), after a `stop` string, after `max_new_tokens`, or at the context's
    edge. Greedy output equals the target's own, sampled output has its distribution, whatever the drafter.
    `profile` waits for the GPU at each phase, so that the times of the phases are true there. Raises UserError for an
    empty or too long prompt.
    """
    if not prompt_ids:
        raise UserError("The prompt is empty; give at least one token.")
    room = target.max_context - len(prompt_ids)
    if room <= 0:
        raise UserError(
            f"The prompt has {len(prompt_ids)} tokens and "
            f"the context of '{target.name}' ends at {target.max_context}; shorten it."
        )
    if max_new_tokens < 1 or budget < 0:
        raise UserError("max_new_tokens must be at least 1 and budget at least 0.")
    ending = _Ending(target, stop, min(max_new_tokens, room))
    capacity = len(prompt_ids) + ending.limit + budget + 1
    sequence = _Sequence(target, drafter, sampling or Sampling(), capacity)

    clock = _Clock(target.device, profile)
    tokens = sequence.prefill(prompt_ids)
    clock.lap("prefill")
    emitted, finish = ending.cut(tokens)
    yield Step(emitted, 0, 0, clock.seconds, finish)
    while finish is None:
        clock = _Clock(target.device, profile)
        tokens, tree = sequence.step(budget, clock)
        emitted, finish = ending.cut(tokens)
        yield Step(emitted, min(len(emitted), len(tokens) - 1), tree.budget, clock.seconds, finish, tree)


class _Ending:
    """Cuts new tokens at a stop id, a stop string, or the token limit, and says which."""

    def __init__(self, target: Target, stop: Sequence[str], limit: int) -> None:
        self.limit = limit
        self._target = target
        self._stop = [s for s in stop if s]
        self._tokens: list[int] = []
        # A token holds at least one byte, and a stop string may begin inside an earlier token.
        self._window = max((len(s.encode()) for s in self._stop), default=0) + 8

    def cut(self, tokens: list[int]) -> tuple[list[int], str | None]:
        """The part of `tokens` that is emitted, and why generation ends there (None: it goes on)."""
        for i, token in enumerate(tokens, 1):
            self._tokens.append(token)
            if token in self._target.stop_ids or self._stopped():
                return tokens[:i], "stop"
            if len(self._tokens) >= self.limit:
                return tokens[:i], "length"
        return tokens, None

    def _stopped(self) -> bool:
        if not self._stop:
            return False
        text = self._target.tokenizer.decode(self._tokens[-self._window :])
        return any(s in text for s in self._stop)
