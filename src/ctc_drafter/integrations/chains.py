"""Drafts for the requests of another engine, which tells after each of its passes what it computed: trees or chains."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..drafters import DRAFTERS, EMBEDDED_DRAFTERS, Drafter, drafter_folder
from ..drafters.base import read_config
from ..drafters.slots import SlotDrafter
from ..errors import UserError
from ..target import LAST
from ..tree import DraftTree

MIN_CAPACITY = 256
"""Positions that a request's context has room for at first; it doubles when they are full."""


@dataclass(frozen=True)
class Pass:
    """What a pass of the target computed for one request, without the positions of rejected drafts.

    features: (n, F * hidden_size), those of the positions start .. start + n - 1; next_tokens: (n,), the tokens at
    start + 1 .. start + n, on the features' device; longest: the longest path that is of use now, 0 if none is.
    """

    request: str
    start: int
    features: torch.Tensor
    next_tokens: torch.Tensor
    longest: int


@dataclass
class Context:
    """A twin of the drafter that has read the positions begin .. end - 1 of one request."""

    drafter: SlotDrafter
    begin: int
    end: int
    capacity: int


class TreeDrafter:
    """Keeps a drafter context for each request and drafts a tree for each.

    A pass that starts before the end of what was read (after a preemption) rewinds the context. One that starts behind
    it (its prefix was found in the engine's cache, so that no features of it were computed) begins a new context there:
    the drafter then sees less, which can cost accepted tokens and nothing else.
    """

    def __init__(self, drafter: SlotDrafter, budget: int, max_context: int) -> None:
        """budget: nodes of a tree; max_context: positions of the longest request."""
        self.drafter, self.budget, self.max_context = drafter, budget, max_context
        self._contexts: dict[str, Context] = {}

    def __len__(self) -> int:
        """Requests that have a context."""
        return len(self._contexts)

    def keep_only(self, requests: Collection[str]) -> None:
        """Drop the contexts of all other requests."""
        for request in [r for r in self._contexts if r not in requests]:
            del self._contexts[request]

    def trees(self, passes: Sequence[Pass]) -> list[DraftTree | None]:
        """Read what the target computed, all requests in one run of the module; a tree where one is of use."""
        trees: list[DraftTree | None] = [None] * len(passes)
        if not passes:
            return trees
        twins = [self._context_for(p).drafter for p in passes]
        pairs = [(p.features[None], p.next_tokens[None]) for p in passes]
        # Alone, `draft` is the faster way to the same.
        guesses: list[Any] = (
            [twins[0].draft(*pairs[0])] if len(passes) == 1 else self.drafter.draft_together(twins, pairs)
        )
        wanted = [i for i, p in enumerate(passes) if p.longest > 0]
        if wanted:
            made = self.drafter.trees_together([twins[i] for i in wanted], [guesses[i] for i in wanted], self.budget)
            for i, tree in zip(wanted, made):
                trees[i] = tree
        return trees

    def _context_for(self, new: Pass) -> Context:
        """The context of the request, rewound to where the pass starts and with room for what it brings."""
        count = len(new.next_tokens)
        context = self._contexts.get(new.request)
        if context is None or not context.begin <= new.start <= context.end:
            context = Context(self.drafter.twin(), new.start, new.start, 0)
            self._contexts[new.request] = context
        if new.start < context.end:
            context.drafter.rewind(new.start - context.begin)
        context.end = new.start + count
        size = context.end - context.begin
        if size > context.capacity:
            first = not context.capacity
            context.capacity = min(self.max_context, max(MIN_CAPACITY, 1 << (size - 1).bit_length()))
            (context.drafter.start if first else context.drafter.reserve)(context.capacity)
        return context


class ChainDrafter(TreeDrafter):
    """Drafts one chain for each request: the best path of its tree."""

    def draft(self, passes: Sequence[Pass]) -> list[list[int]]:
        """Read what the target computed; a chain for each request, maybe empty."""
        trees = self.trees(passes)
        return [[] if tree is None else tree.best_paths()[0][: p.longest] for tree, p in zip(trees, passes)]


def ordered_features(layers: Sequence[int], last: torch.Tensor, inner: Sequence[torch.Tensor] | None) -> torch.Tensor:
    """(T, F * hidden_size) in the order of the drafter's `layers`.

    last: (T, hidden_size) after the final norm; inner: the same of the other layers, in ascending order, maybe of more
    rows.
    """
    order = sorted({layer for layer in layers if layer != LAST})
    outputs = {LAST: last, **dict(zip(order, inner or []))}
    parts = [outputs[layer] for layer in layers]
    return parts[0] if len(parts) == 1 else torch.cat([part[: len(last)] for part in parts], -1)


# ---------------------------------------------------------------- which drafters can


def check_kind(kind: type[Drafter], name: str, engine: str) -> None:
    """Raise UserError if drafters of this class cannot run in `engine`; name: of the one in question."""
    if not issubclass(kind, SlotDrafter):
        able = ", ".join(each for each, cls in DRAFTERS.items() if issubclass(cls, SlotDrafter))
        raise UserError(
            f"Drafter '{name}' is of kind '{kind.kind}', which cannot run in {engine}; those "
            f"that fill all slots at once can ({able})."
        )


def drafter_layers(name: str, engine: str) -> tuple[int, ...]:
    """The feature layers of a drafter, of which no weight is read.

    Raises UserError if there is none of that name, or it is damaged or cannot run in `engine`.
    """
    folder = drafter_folder(name)
    if not folder.is_dir():
        raise UserError(f"There is no drafter '{name}': give a checkpoint folder, {' or '.join(EMBEDDED_DRAFTERS)}.")
    kind, config, _ = read_config(folder)
    check_kind(kind, name, engine)
    return tuple(config.feature_layers)
