"""The CTC drafter: slots over vocabulary + blank in one pass, trained over all alignments (Wen, Gui, Feng 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional as F

from ..lattice.collapse import collapsed_tree
from ..lattice.loss import (
    context_log_normalizers,
    context_prefix_log_probs,
    ctc_loss,
    label_log_probs,
    merge_prefix_log_probs,
    prefix_objective,
)
from ..target import Target
from ..tree import DraftTree
from .base import register
from .slots import SlotConfig, SlotDrafter, expected_acceptance


@dataclass
class CTCConfig(SlotConfig):
    """Shape, topology, objective and search of a CTC drafter."""

    slots: int = 8
    labels: int = 6
    topology: Literal["merge", "label-context"] = "label-context"
    """What a path of slots says, see CTCDrafter."""
    objective: Literal["prefix", "label"] = "prefix"
    """Trained on the probability of every prefix of the next tokens (see `decay` and `reach`); or of all at once."""
    tree: Literal["prefix", "paths", "slots"] = "prefix"
    """Best exact prefixes; or the paper's: most probable slot paths, collapsed; or every slot a token, no collapse."""
    path_count: int = 64
    """Slot paths that tree `paths` collapses."""
    path_top_k: int = 8
    """Tokens of each slot in these paths."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.path_count, self.path_top_k) < 1:
            raise ValueError("path_count and path_top_k must be at least 1")
        if self.topology == "label-context" and self.tree == "paths":
            raise ValueError("tree 'paths' collapses independent slots, so it needs topology 'merge'")


@register("ctc")
class CTCDrafter(SlotDrafter):
    """One parallel pass gives N slot distributions; collapsed, they are the draft tree.

    Topology `merge` is standard CTC: equal neighbours merge, blanks drop. In `label-context` every non-blank slot emits
    a label, and its distribution depends on the last emitted token (see SlotDrafter).
    """

    config_class = CTCConfig
    config: CTCConfig

    def __init__(self, config: CTCConfig, target: Target) -> None:
        super().__init__(config, target, blank=True, context=config.topology == "label-context")

    @property
    def proposed_tokens(self) -> int:
        return self.config.slots if self.config.tree == "paths" else self.config.labels

    def tree(self, guess: tuple[torch.Tensor, torch.Tensor], budget: int) -> DraftTree:
        logits, root = guess
        if self.config.tree == "paths":
            log_probs = logits.float().log_softmax(-1)
            tree = collapsed_tree(log_probs, budget, self.config.path_count, self.config.path_top_k)
            return replace(tree, tokens=self.kept[tree.tokens])
        if self.config.tree == "slots":
            silent = torch.full_like(logits[..., :1], -torch.inf)
            return self.prefix_tree(torch.cat([logits[..., :-1], silent], -1), root, budget)
        return self.prefix_tree(logits, root, budget, merge=not self.has_context)

    # ------------------------------------------------------------ training

    def train_loss(
        self,
        features: torch.Tensor,
        token_ids: torch.Tensor,
        anchors: torch.Tensor,
        labels: torch.Tensor,
        possible: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        slots, roots = self.slots_at(features, token_ids, anchors)
        labels, rows, lengths = self.label_rows(labels)
        prefix, label_loss = self.in_pieces(self._scores, slots, roots, labels, rows, lengths)
        loss = label_loss
        if self.config.objective == "prefix":
            loss = prefix_objective(prefix, self.config.decay, lengths, self.config.reach)
        usable, metrics = expected_acceptance(prefix, lengths)
        return (loss * usable).sum() / usable.sum().clamp_min(1), metrics

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
        # Labels and blank by one gather each: the gradient of every indexing is as large as the logits.
        named = F.pad(rows, (0, 1), value=logits.shape[2] - 1)
        of_slots = logits.gather(2, named[:, None].expand(-1, logits.shape[1], -1))
        of_contexts = context.gather(2, torch.stack([named, torch.full_like(named, logits.shape[2] - 1)], -1))
        emit = of_slots[:, :, :-1] - normalizers[:, :, :-1] + of_contexts[:, None, :-1, 0]
        blank = of_slots[:, :, -1:] + of_contexts[:, None, :, 1] - normalizers
        prefix, whole = context_prefix_log_probs(emit, blank, lengths)
        return prefix, -whole / lengths.clamp_min(1)
