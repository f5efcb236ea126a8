"""What the parallel drafters share: a module that fills N slots in one pass, label context, and the tree search."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..lattice.best_first import Search, best_first_of_slots
from ..lattice.native import FLAGS, SOURCE, NativeSearch
from ..lattice.pool import LabelContext
from ..lattice.prefix import best_tree
from ..target import LAST, Target
from ..target.packing import PATIENCE, PackedLinears, linear_of
from ..target.programs import library
from ..tree import DraftTree
from .attention import DraftModule, fit_shape
from .base import TrainableDrafter
from .compiled import CompiledDraft
from .heads import HeadsModule

MAX_LOGITS = 2**27
"""Logits that training holds at once; more are computed in pieces, and again for the gradient."""

Scores = Callable[..., tuple[torch.Tensor, ...]]


@dataclass
class SlotConfig:
    """Shape and search of a drafter that fills all its slots in one pass."""

    module: Literal["attention", "heads"] = "attention"
    """attention: slots attend to the context and to each other; heads: a residual block each on the newest feature."""
    hidden_size: int = 0
    """The target's, which 0 stands for; no other is possible."""
    intermediate_size: int = 0
    """0: twice the hidden size."""
    heads: int = 0
    """Attention heads; 0: one for every 64 of the hidden size."""
    kv_heads: int = 0
    """0: a third of the heads (at least one)."""
    layers: int = 1
    """Transformer layers of module `attention`."""
    slots: int = 5
    """Positions that one pass fills, N."""
    labels: int = 5
    """Next tokens that training looks at, and the longest proposal of the prefix tree."""
    context_rank: int = 128
    """Rank of the label context, where there is one."""
    feature_layers: list[int] = field(default_factory=lambda: [LAST])
    """Target layers whose outputs are read, counted from 1; -1 is what the LM head reads."""
    decay: float = 0.8
    """Weight of the k-th label in the loss: decay^(k-1) * P(labels before it)^reach."""
    reach: float = 0.0
    """See `decay`: above 0, a label counts for less where those before it are unlikely to be accepted."""
    pool: int = 256
    """Tokens that the tree search considers."""
    vocabulary: int = 0
    """Draft only the most frequent tokens of the training answers; 0: all. Exactness is untouched."""

    def __post_init__(self) -> None:
        if self.layers < 1 or self.slots < 1 or not 1 <= self.labels <= self.slots:
            raise ValueError("a parallel drafter needs layers >= 1 and 1 <= labels <= slots")
        if not self.feature_layers:
            raise ValueError("a drafter needs at least one of the target's layers in feature_layers")
        if self.module == "heads" and (self.feature_layers != [LAST] or self.layers != 1):
            raise ValueError("module 'heads' reads feature_layers [-1] only, and has layers 1")
        if self.module == "heads" and (self.heads or self.kv_heads or self.intermediate_size):
            raise ValueError("heads, kv_heads and intermediate_size belong to module 'attention'")
        if min(self.intermediate_size, self.heads, self.kv_heads, self.vocabulary, self.hidden_size) < 0:
            raise ValueError("sizes, heads, kv_heads and vocabulary must not be negative")
        if min(self.context_rank, self.pool) < 1:
            raise ValueError("context_rank and pool must be at least 1")
        if not 0 < self.decay <= 1:
            raise ValueError("decay must be in (0, 1]")
        if not 0 <= self.reach <= 1:
            raise ValueError("reach must be in [0, 1]")


class SlotDrafter(TrainableDrafter):
    """One parallel pass gives N slot distributions over the kept tokens and the blank, if there is one.

    With label context the distribution of a slot depends on the last emitted token u:
    logits_i(. | u) = W (z_i + U silu(D e_u)), W being the target's LM head with a row for the blank, e_u the token's
    embedding, D and U of rank `context_rank`.
    """

    config: Any
    drafts_together = True

    def __init__(self, config: Any, target: Target, *, blank: bool, context: bool) -> None:
        super().__init__(config, target)
        width = target.hidden_size
        if config.hidden_size not in (0, width):
            raise UserError(f"hidden_size is {config.hidden_size}, but '{target.name}' has {width}; leave it out.")
        config.hidden_size = width
        self.feature_layers = tuple(config.feature_layers)
        self.module: Any = HeadsModule(width, config.slots) if config.module == "heads" else _attention(config, target)
        self.has_blank, self.has_context = blank, context
        if blank:
            self.blank = nn.Parameter(torch.zeros(1, width))
        self._packed: tuple[PackedLinears, ...] = ()
        self._linears: tuple[nn.Linear, ...] = ()  # of a pass
        self._compiled: tuple[CompiledDraft, ...] = ()
        self._search: Search = best_first_of_slots  # of a single row on a CPU
        self._head: tuple[nn.Linear, ...] = ()  # over the kept tokens, hidden from parameters() and state_dict()
        self._tables: tuple[torch.Tensor, ...] | None = None  # label context: keys of all tokens, of the kept, values
        if context:
            self.context_down = nn.Linear(width, config.context_rank, bias=False)
            self.context_up = nn.Linear(config.context_rank, width, bias=False)
            nn.init.zeros_(self.context_up.weight)

    @property
    def proposed_tokens(self) -> int:
        return int(self.config.labels)

    @property
    def proposed_labels(self) -> int:
        return int(self.config.labels)

    # ------------------------------------------------------------ distributions

    def head_rows(self) -> torch.Tensor:
        """The target's LM head on the kept tokens, and the blank row if there is one: (C, width)."""
        return torch.cat([self.kept_head(), self.blank]) if self.has_blank else self.kept_head()

    def _context_key(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (...) -> what they say to the next slot, (..., rank)."""
        embedded = self.embed(tokens)
        return F.silu(self.context_down(F.rms_norm(embedded, embedded.shape[-1:], eps=1e-6)))

    def _context_value(self) -> torch.Tensor:
        """How each kept token (and the blank) answers to a context key, (C, rank): the LM head seen through U."""
        return self.head_rows() @ self.context_up.weight

    # ------------------------------------------------------------ inference

    @torch.no_grad()
    def prepare(self) -> None:
        super().prepare()
        head = linear_of(self.module.fold(self.head_rows()))
        self._head = (head,)
        if self.has_context:
            keys = self._context_key(torch.arange(self.target.vocab_size, device=self.target.device))
            values = self._padded(self._context_value())
            if self.target.device.type == "cpu":
                keys, values = keys.float(), values.float()  # the search on the host knows no bfloat16
            self._tables = (keys, keys[self.kept] if self.config.vocabulary else keys, values)
        self._linears = head, *self.module.prepare()
        packed = PackedLinears(self._linears)
        packed.prepare(self.config.slots)
        self._packed = (packed,)
        found = library(SOURCE, FLAGS, make=False) if self.target.device.type == "cpu" else None
        if found is not None:
            self._search = NativeSearch(found)

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        """With a row for the blank, whether or not there is one."""
        return rows if self.has_blank else F.pad(rows, (0, 0, 0, 1))

    @torch.inference_mode()
    def compile_draft(self) -> float:
        if self._compiled or not isinstance(self.module, DraftModule):
            return self.compile_search()
        began = time.perf_counter()
        try:
            self._compiled = (CompiledDraft(self, list(self._linears)),)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"Drafter '{self.name}' cannot be compiled here, so leave that out: {reason}") from None
        self.compile_search()
        return time.perf_counter() - began

    def compile_search(self) -> float:
        if isinstance(self._search, NativeSearch) or self.target.device.type != "cpu":
            return 0.0
        began = time.perf_counter()
        with suppress(Exception):  # without a compiler, say: it goes on in arrays
            self._search = NativeSearch(library(SOURCE, FLAGS, make=True))
        return time.perf_counter() - began

    def start(self, capacity: int) -> None:
        self.module.start(capacity, self._head[0].weight)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` positions in all where `start` said fewer; those that are there stay."""
        self.module.reserve(capacity)

    def rewind(self, length: int) -> None:
        """Forget all positions but the first `length`, as if no more had come."""
        self.module.rewind(length)

    def draft(self, features: torch.Tensor, next_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slot logits (1, N, K + 1) over kept tokens and blank (-inf where there is none), and the root (1, 1)."""
        features = features.to(self.dtype)
        if self._compiled and next_tokens.shape[1] <= 3 * self._compiled[0].pairs:  # more take less time at once
            for part in zip(*(t.split(self._compiled[0].pairs, 1) for t in (features, next_tokens))):
                logits = self._compiled[0](self.module, *part)
            return logits, next_tokens[:, -1:]
        pairs = self.module.read(features, self.embed(next_tokens))
        return self.slot_logits(self.module.step(pairs)), next_tokens[:, -1:]

    def draft_together(
        self, twins: Sequence[Self], pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        features, tokens = (torch.cat(parts, 1) for parts in zip(*pairs))
        counts = [next_tokens.shape[1] for _, next_tokens in pairs]
        self._packed[0].prepare(len(twins) * self.config.slots, after=PATIENCE)
        read = self.module.read(features.to(self.dtype), self.embed(tokens))
        logits = self.slot_logits(self.module.together([twin.module for twin in twins], read, counts))
        return [(row, next_tokens[:, -1:]) for row, (_, next_tokens) in zip(logits.split(1), pairs)]

    def slot_logits(self, slots: torch.Tensor) -> torch.Tensor:
        """(B, N, width) -> (B, N, K + 1)."""
        logits: torch.Tensor = self._head[0](slots)
        return logits if self.has_blank else F.pad(logits, (0, 1), value=-torch.inf)

    def tree(self, guess: tuple[torch.Tensor, torch.Tensor], budget: int) -> DraftTree:
        return self.prefix_tree(*guess, budget)

    def trees_together(
        self, twins: Sequence[Self], guesses: Sequence[tuple[torch.Tensor, torch.Tensor]], budget: int
    ) -> list[DraftTree]:
        if guesses[0][0].device.type == "cpu":  # there a search for each on the host is faster
            return super().trees_together(twins, guesses, budget)
        logits, roots = (torch.cat(parts) for parts in zip(*guesses))
        return self.tree((logits, roots), budget).split()

    def prefix_tree(self, logits: torch.Tensor, root: torch.Tensor, budget: int, merge: bool = False) -> DraftTree:
        """The best trees for slot logits (B, N, K + 1) after the roots (B, 1)."""
        if budget == 0:
            return DraftTree.empty(len(logits), logits.device)
        context = None
        if self._tables is not None:
            keys, kept_keys, values = self._tables
            context = LabelContext(kept_keys, values, keys.index_select(0, root[:, 0]))
        return best_tree(
            logits,
            budget,
            pool=min(max(self.config.pool, budget), len(self.kept)),
            max_depth=self.config.labels,
            context=context,
            merge=merge,
            ids=self.kept if self.config.vocabulary else None,
            search=self._search,
        )

    # ------------------------------------------------------------ training

    def slots_at(
        self, features: torch.Tensor, token_ids: torch.Tensor, anchors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots (B * A, N, width) at the anchors (B, A), and the root tokens (B * A,)."""
        pairs = self.module.pairs(features[:, :-1], self.embed(token_ids[:, 1:]))
        return self.module(pairs, anchors).flatten(0, 1), token_ids.gather(1, anchors + 1).flatten()

    def in_pieces(self, scores: Scores, slots: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """scores(logits (A', N, C), *others) over all anchors, the first axis of every tensor; its results joined.

        No more than MAX_LOGITS are held at once; with more, they are computed again for the gradient.
        """
        head = self.head_rows()

        def piece(slots: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return scores(F.linear(slots, head).float(), *others)

        size = max(1, MAX_LOGITS // (len(head) * (slots.shape[1] + self.config.labels + 1)))
        if len(slots) <= size:
            return piece(slots, *others)
        pieces = zip(*(t.split(size) for t in (slots, *others)))
        done = [checkpoint(piece, *part, use_reentrant=False) for part in pieces]
        return tuple(torch.cat(parts) for parts in zip(*done))


def _attention(config: Any, target: Target) -> DraftModule:
    width = target.hidden_size
    fit_shape(config, width)
    return DraftModule(
        width,
        config.intermediate_size,
        config.heads,
        config.kv_heads,
        config.layers,
        config.slots,
        len(config.feature_layers),
        target.max_context,
    )


def expected_acceptance(
    prefix_log_probs: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weights (A,) of anchors that have a usable label, and the metrics of log P(prefix k), (A, L)."""
    counted = torch.arange(prefix_log_probs.shape[1], device=lengths.device) < lengths[:, None]
    accepted = prefix_log_probs.detach().exp() * counted
    return lengths > 0, {"expected_accepted": accepted.sum(-1).mean(), "first": accepted[:, 0].mean()}
