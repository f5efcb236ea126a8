"""The CTC drafter: slots over vocabulary + blank in one pass, trained over all alignments (Wen, Gui, Feng 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError
from ..lattice.collapse import collapsed_tree
from ..lattice.loss import (
    context_log_normalizers,
    context_prefix_log_probs,
    ctc_loss,
    label_log_probs,
    merge_prefix_log_probs,
    prefix_objective,
)
from ..lattice.pool import pool_lattice, pool_tokens
from ..lattice.prefix import best_tree
from ..packing import PackedLinears
from ..target import LAST, Target
from ..tree import DraftTree
from .attention import DraftModule
from .base import IGNORE, TrainableDrafter, linear_of, register


@dataclass
class CTCConfig:
    """Shape, topology, objective and search of a CTC drafter."""

    hidden_size: int = 0
    """0: the target's."""
    intermediate_size: int = 0
    """0: twice the hidden size."""
    heads: int = 0
    """0: one for every 64 of the hidden size."""
    kv_heads: int = 0
    """0: a third of the heads (at least one)."""
    layers: int = 1
    slots: int = 8
    labels: int = 6
    """Next tokens that training looks at, and the longest proposal of the prefix tree."""
    topology: Literal["merge", "label-context"] = "label-context"
    context_rank: int = 128
    feature_layers: list[int] = field(default_factory=lambda: [LAST])
    """Target layers whose outputs are read, counted from 1; -1 is what the LM head reads."""
    objective: Literal["prefix", "label"] = "prefix"
    decay: float = 0.8
    """Weight of the k-th label in the prefix objective: decay^(k-1)."""
    tree: Literal["prefix", "paths"] = "prefix"
    """Best exact prefixes, or the paper's: most probable slot paths, collapsed."""
    pool: int = 256
    """Tokens that the prefix search considers."""
    vocabulary: int = 0
    """Draft only the most frequent tokens of the training answers; 0: all. Exactness is untouched."""
    path_count: int = 64
    path_top_k: int = 8

    def __post_init__(self) -> None:
        if self.layers < 1 or self.slots < 1 or not 1 <= self.labels <= self.slots:
            raise ValueError("a CTC drafter needs layers >= 1 and 1 <= labels <= slots")
        if not self.feature_layers:
            raise ValueError("a CTC drafter needs at least one of the target's layers in feature_layers")
        if min(self.context_rank, self.pool, self.path_count, self.path_top_k) < 1:
            raise ValueError("context_rank, pool, path_count and path_top_k must be at least 1")
        if not 0 < self.decay <= 1:
            raise ValueError("decay must be in (0, 1]")
        if self.topology == "label-context" and self.tree == "paths":
            raise ValueError("tree 'paths' collapses independent slots, so it needs topology 'merge'")


@register("ctc")
class CTCDrafter(TrainableDrafter):
    """One parallel pass gives N slot distributions; collapsed, they are the draft tree.

    Topology `merge` is standard CTC: equal neighbours merge, blanks drop. In `label-context` every non-blank slot emits
    a label and its distribution depends on the last emitted token u: logits_i(. | u) = W (z_i + U silu(D e_u)), W being
    the target's LM head with a row for blank, e_u the token's embedding, D and U of rank `context_rank`.
    """

    config_class = CTCConfig
    config: CTCConfig

    def __init__(self, config: CTCConfig, target: Target) -> None:
        super().__init__(config, target)
        width = target.hidden_size
        config.hidden_size = config.hidden_size or width
        config.intermediate_size = config.intermediate_size or 2 * width
        config.heads = config.heads or max(1, width // 64)
        config.kv_heads = config.kv_heads or next(g for g in (config.heads // 3, 1) if g and config.heads % g == 0)
        if width % config.heads or width // config.heads % 2 or config.heads % config.kv_heads:
            raise UserError(
                f"A drafter of width {width} cannot have {config.heads} heads with {config.kv_heads} kv_heads: "
                "heads must divide the width into parts of even size, and kv_heads must divide heads."
            )
        self.feature_layers = tuple(config.feature_layers)
        self.module = DraftModule(
            width,
            config.intermediate_size,
            config.heads,
            config.kv_heads,
            config.layers,
            config.slots,
            len(config.feature_layers),
            target.max_context,
        )
        self.blank = nn.Parameter(torch.zeros(1, width))
        self.keep_tokens(config.vocabulary)
        self._ready: Any = None
        self.has_context = config.topology == "label-context"
        if self.has_context:
            self.context_down = nn.Linear(width, config.context_rank, bias=False)
            self.context_up = nn.Linear(config.context_rank, width, bias=False)
            nn.init.zeros_(self.context_up.weight)

    @property
    def proposed_tokens(self) -> int:
        return self.config.labels if self.config.tree == "prefix" else self.config.slots

    @property
    def proposed_labels(self) -> int:
        return self.config.labels

    # ------------------------------------------------------------ distributions

    def head_rows(self) -> torch.Tensor:
        """The target's LM head on the kept tokens, and the blank row: (K + 1, width)."""
        return torch.cat([self.kept_head(), self.blank])

    def _context_key(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (...) -> what they say to the next slot, (..., rank)."""
        embedded = self.target.embedding(tokens)
        return F.silu(self.context_down(F.rms_norm(embedded, embedded.shape[-1:], eps=1e-6)))

    def _context_value(self) -> torch.Tensor:
        """How each kept token and blank answer to a context key, (K + 1, rank): the LM head seen through U."""
        return self.head_rows() @ self.context_up.weight

    # ------------------------------------------------------------ inference

    @torch.no_grad()
    def prepare(self) -> None:
        super().prepare()
        head = linear_of(self.head_rows())
        vocabulary = torch.arange(self.target.vocab_size, device=self.target.device)
        tables = (self._context_key(vocabulary), self._context_value()) if self.has_context else None
        self._ready = (head, tables)
        packed = PackedLinears([head, *(m for m in self.module.modules() if type(m) is nn.Linear)])
        packed.prepare(self.config.slots)

    def start(self, capacity: int) -> None:
        self.module.start(capacity, self.blank)

    def draft(self, features: torch.Tensor, next_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slot logits (1, N, K + 1) over kept tokens and blank, and the root (1, 1)."""
        context = self.module.context(features, self.target.embedding(next_tokens))
        head, _ = self._ready
        return head(self.module.step(context)), next_tokens[:, -1:]

    def tree(self, guess: tuple[torch.Tensor, torch.Tensor], budget: int) -> DraftTree:
        logits, root = guess
        logits = logits.float()
        if self.config.tree == "paths":
            tree = collapsed_tree(logits.log_softmax(-1), budget, self.config.path_count, self.config.path_top_k)
            return replace(tree, tokens=self.kept[tree.tokens])
        if budget == 0:
            return DraftTree.empty(1, logits.device)
        rows = pool_tokens(logits, min(max(self.config.pool, budget), len(self.kept)))
        pool = self.kept[rows]
        context = None
        if self.has_context:
            _, (keys, values) = self._ready
            blank = torch.full_like(root, len(self.kept))
            context = keys[torch.cat([pool, root], 1)], values[torch.cat([rows, blank], 1)]
        lattice = replace(pool_lattice(logits, rows, context, merge=not self.has_context), pool=pool)
        return best_tree(lattice, budget, self.config.labels)

    # ------------------------------------------------------------ training

    def train_loss(
        self,
        features: torch.Tensor,
        token_ids: torch.Tensor,
        anchors: torch.Tensor,
        labels: torch.Tensor,
        possible: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        embedded = self.target.embedding(token_ids[:, 1:])
        context = self.module.context(features[:, :-1], embedded)
        slots = self.module(context, anchors).flatten(0, 1)
        logits = F.linear(slots, self.head_rows()).float()
        roots = token_ids.gather(1, anchors + 1).flatten()
        labels = labels.flatten(0, 1)
        valid = labels != IGNORE
        labels = labels.clamp_min(0)
        rows = self.place[labels]
        lengths = (valid & (rows >= 0)).cumprod(-1).sum(-1)  # up to the first token that cannot be drafted
        prefix, label_loss = self._scores(logits, roots, labels, rows.clamp_min(0), lengths)
        loss = prefix_objective(prefix, self.config.decay, lengths) if self.config.objective == "prefix" else label_loss
        counted = torch.arange(labels.shape[1], device=labels.device) < lengths[:, None]
        accepted = prefix.detach().exp() * counted
        expected, first = accepted.sum(-1).mean(), accepted[:, 0].mean()
        loss = loss * (lengths > 0)
        return loss.sum() / (lengths > 0).sum().clamp_min(1), {
            "expected_accepted": expected,
            "first": first,
        }

    def _scores(
        self,
        logits: torch.Tensor,
        roots: torch.Tensor,
        labels: torch.Tensor,
        rows: torch.Tensor,
        lengths: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log probabilities of all label prefixes (A, L), and the whole-label CTC loss per label token (A,).

        logits (A, N, K + 1); roots (A,) and labels (A, L) are token ids, rows (A, L) the labels among the kept tokens.
        """
        if not self.has_context:
            log_probs = logits.log_softmax(-1)
            emit, blank = label_log_probs(log_probs, rows)
            prefix, _ = merge_prefix_log_probs(emit, blank, rows)
            loss = ctc_loss(log_probs, rows, lengths) if self.config.objective == "label" else prefix[:, 0]
            return prefix, loss / lengths.clamp_min(1)
        said = torch.cat([roots[:, None], labels], 1)
        context = (self._context_key(said) @ self._context_value().T).float()
        normalizers = context_log_normalizers(logits, context)
        index = rows[:, None].expand(-1, logits.shape[1], -1)
        emit = logits.gather(2, index) - normalizers[:, :, :-1]
        emit = emit + context[:, :-1].gather(2, rows[..., None]).transpose(1, 2)
        blank = logits[:, :, -1:] + context[:, None, :, -1] - normalizers
        prefix, whole = context_prefix_log_probs(emit, blank, lengths)
        return prefix, -whole / lengths.clamp_min(1)
