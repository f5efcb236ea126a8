"""Another drafter and prompt lookup at once: what the text repeats is copied, and the rest is drafted.

Lookup costs nothing and is nearly always right while a text copies itself; a draft module takes a fifth of a step and
sees ahead everywhere. So each step weighs what lookup promises against what the module has reached in this text. If
lookup wins, the module rests and reads the new pairs later; if not, lookup's tokens stand in the module's tree where
they are likelier than its worst nodes. SuffixDecoding (Oliaro et al. 2024) mixes drafters by a score in like manner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch

from ..tree import ROOT, DraftTree
from .base import Drafter
from .lookup import LookupDrafter

REST = 0.2
"""Share of a step that is saved when the other drafter rests."""
REACH = 8
"""Tokens over which the accepted length is expected."""
HITS = {1: 0.34, 2: 0.55, 3: 0.64, 4: 0.75, 5: 0.8, 6: 0.82, 8: 0.86, 12: 0.9, 16: 0.97}
"""Chance that the next token of a match of so many tokens comes true, at first; the text's own hits soon outweigh it.
Counted on 400 distilled answers of the embedded target, which are no evaluation prompts."""
REACHED = 2.0
"""Tokens that the other drafter gets accepted in a step, at first."""
WEIGHT = 4.0
"""Trials that these two count for."""
CLASSES = sorted(HITS)


class Promise:
    """What lookup and the other drafter have reached in one text."""

    def __init__(self) -> None:
        self._hits = [WEIGHT * HITS[n] for n in CLASSES]
        self._trials = [WEIGHT] * len(CLASSES)
        self._accepted, self._steps = WEIGHT * REACHED, WEIGHT

    def chances(self, match: int, count: int) -> list[float]:
        """Probability that the first 1, 2, ... `count` tokens after a match of `match` tokens all come true."""
        chances, p = [], 1.0
        for n in range(match, match + count):
            kind = _class(n)
            p *= self._hits[kind] / self._trials[kind]
            chances.append(p)
        return chances

    def is_better(self, chances: list[float]) -> bool:
        """Whether a step by lookup alone brings more tokens for its time than one of the other drafter."""
        return 1 + sum(chances[:REACH]) >= (1 + self._accepted / self._steps) * (1 - REST)

    def looked_up(self, match: int, path: list[int], came: list[int]) -> None:
        """The text went on with `came` where lookup had said `path`."""
        for n, (said, token) in enumerate(zip(path, came), match):
            self._trials[_class(n)] += 1
            if said != token:
                return
            self._hits[_class(n)] += 1

    def drafted(self, accepted: int) -> None:
        """A tree of the other drafter had so many tokens accepted."""
        self._accepted += accepted
        self._steps += 1


def _class(match: int) -> int:
    return max(i for i, n in enumerate(CLASSES) if n <= match)


class HybridDrafter(Drafter):
    """Drafts by `base`, or by lookup in the steps that this promises to make faster. Nothing to train."""

    kind = "hybrid"
    drafts_together = True
    base: Drafter
    lookup: LookupDrafter

    def __init__(self, base: Drafter) -> None:
        super().__init__()
        self.base, self.lookup = base, LookupDrafter()
        self.feature_layers = base.feature_layers
        self.name = f"{base.name}+lookup"

    def twin(self) -> Self:
        other = super().twin()
        other.base, other.lookup = self.base.twin(), self.lookup.twin()
        return other

    @property
    def position_bytes(self) -> int:
        return self.base.position_bytes

    def compile_draft(self) -> float:
        return self.base.compile_draft()

    def compile_search(self) -> float:
        return self.base.compile_search()

    def start(self, capacity: int) -> None:
        self.base.start(capacity)
        self.lookup.start(capacity)
        self._promise = Promise()
        self._unseen: list[tuple[torch.Tensor, torch.Tensor]] = []  # pairs that `base` has not seen
        self._found: tuple[int, list[int]] = (0, [])  # match and path of the last step
        self._chances: list[float] = []
        self._resting: bool | None = None  # whether `base` rested in the last step; None: there was none
        self._tree = DraftTree.empty(1)  # of the last step in which `base` drafted

    def draft(self, features: torch.Tensor, next_tokens: torch.Tensor) -> Any:
        """What `base.draft` returns, or a list with the path of lookup."""
        path = self._look(features, next_tokens)
        return self.base.draft(*self._pairs()) if path is None else path

    def draft_together(self, twins: Sequence[Self], pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Any]:
        guesses: list[Any] = [twin._look(*pair) for twin, pair in zip(twins, pairs)]
        awake = [i for i, guess in enumerate(guesses) if guess is None]
        bases, unseen = [twins[i].base for i in awake], [twins[i]._pairs() for i in awake]
        if len(awake) > 1 and self.base.drafts_together:
            found = self.base.draft_together(bases, unseen)
        else:
            found = [base.draft(*pair) for base, pair in zip(bases, unseen)]
        for i, guess in zip(awake, found):
            guesses[i] = guess
        return guesses

    def tree(self, guess: Any, budget: int) -> DraftTree:
        if self._resting:
            tree = DraftTree.from_paths([[guess]], budget, self._device)
            probs = [*self._chances, *[0.0] * budget][:budget]
            return replace(tree, log_probs=torch.tensor([probs], device=self._device).log())
        self._tree = with_path(self.base.tree(guess, budget), self._found[1], self._chances)
        return self._tree

    def trees_together(self, twins: Sequence[Self], guesses: Sequence[Any], budget: int) -> list[DraftTree]:
        trees = {twin: twin.tree(guess, budget) for twin, guess in zip(twins, guesses) if twin._resting}
        awake = [(twin, guess) for twin, guess in zip(twins, guesses) if not twin._resting]
        if awake:
            drafted = self.base.trees_together([twin.base for twin, _ in awake], [guess for _, guess in awake], budget)
            for (twin, _), tree in zip(awake, drafted):
                trees[twin] = twin._tree = with_path(tree, twin._found[1], twin._chances)
        return [trees[twin] for twin in twins]

    # ------------------------------------------------------------

    def _look(self, features: torch.Tensor, next_tokens: torch.Tensor) -> list[int] | None:
        """Take the new pairs; the path of lookup if it promises more than the other drafter, else None."""
        self._unseen.append((features, next_tokens))
        tokens = next_tokens[0].tolist()
        if self._resting is not None:
            self._promise.looked_up(*self._found, tokens)
        if self._resting is False:
            # The tokens may be those of several passes, but what the first one chose last was in no node.
            self._promise.drafted(len(self._tree.path_of(tokens)))
        self._device = self.lookup.draft(features, next_tokens)
        match, path = self._found = self.lookup.longest(CLASSES[-1])
        self._chances = self._promise.chances(match, len(path))
        self._resting = bool(path) and self._promise.is_better(self._chances)
        return path if self._resting else None

    def _pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        pairs, self._unseen = self._unseen, []
        if len(pairs) == 1:
            return pairs[0]
        features, tokens = zip(*pairs)
        return torch.cat(features, 1), torch.cat(tokens, 1)


def with_path(tree: DraftTree, path: list[int], chances: list[float]) -> DraftTree:
    """The best nodes of a tree of one row and of `path`, whose first k tokens come true with probability chances[k-1].

    The budget stays. A node that both have keeps the larger probability. A tree without log_probs stays as it is.
    """
    if tree.log_probs is None or not path or not tree.budget:
        return tree
    probs = tree.log_probs[0].exp().tolist()
    if chances[0] <= min(probs):
        return tree
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    node_of = {(parent, token): i for i, (parent, token, p) in enumerate(zip(parents, tokens, probs)) if p > 0}
    above = ROOT
    for token, p in zip(path, chances):
        node = node_of.get((above, token))
        if node is None:
            node = len(tokens)
            tokens.append(token)
            parents.append(above)
            probs.append(p)
        probs[node] = max(probs[node], p)
        above = node
    # A parent comes before its child and is no less probable, so the best nodes hold the parents of each.
    best = sorted(sorted(range(len(tokens)), key=lambda i: -probs[i])[: tree.budget])
    place = {ROOT: ROOT} | {node: i for i, node in enumerate(best)}
    depths = [0] * len(best)
    for i, node in enumerate(best):
        above = place[parents[node]]
        depths[i] = 1 if above == ROOT else depths[above] + 1
    rows = [[tokens[i] for i in best], [place[parents[i]] for i in best], depths]
    device = tree.tokens.device
    nodes, parents_of, depths_of = torch.tensor(rows, device=device)[:, None]
    return DraftTree(nodes, parents_of, depths_of, torch.tensor([[probs[i] for i in best]], device=device).log())
