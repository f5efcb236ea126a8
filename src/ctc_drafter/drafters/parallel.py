"""The parallel drafter without alignment: slot k is trained by cross-entropy on the k-th next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..lattice.loss import prefix_objective
from ..target import Target
from .base import register
from .slots import SlotConfig, SlotDrafter, expected_acceptance


@dataclass
class ParallelConfig(SlotConfig):
    """Shape and search of a drafter whose k-th slot is the k-th token."""

    label_context: bool = False
    """Let a slot's distribution depend on the token of the slot before it (a low-rank bigram, as in DSpark)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots != self.labels:
            raise ValueError("without blanks every slot is a label, so slots and labels must be equal")


@register("parallel")
class ParallelDrafter(SlotDrafter):
    """The attention draft module with cross-entropy: the ablation of CTC, and near to DFlash and DSpark.

    P(y_1 .. y_k) is the product of the slots' probabilities, p_i(y_i) or with label context p_i(y_i | y_(i-1)).
    """

    config_class = ParallelConfig
    config: ParallelConfig

    def __init__(self, config: ParallelConfig, target: Target) -> None:
        super().__init__(config, target, blank=False, context=config.label_context)

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
        (prefix,) = self.in_pieces(self.prefix_scores, slots, roots, labels, rows, lengths)
        loss = prefix_objective(prefix, self.config.decay, lengths, self.config.reach)
        usable, metrics = expected_acceptance(prefix, lengths)
        return (loss * usable).sum() / usable.sum().clamp_min(1), metrics

    def prefix_scores(
        self,
        logits: torch.Tensor,
        roots: torch.Tensor,
        labels: torch.Tensor,
        rows: torch.Tensor,
        lengths: torch.Tensor,
    ) -> tuple[torch.Tensor]:
        """Log probabilities of all label prefixes, (A, L), the only result.

        logits (A, L, K); roots (A,) and labels (A, L) are token ids, rows (A, L) the labels among the kept tokens.
        """
        if self.has_context:
            said = torch.cat([roots[:, None], labels[:, :-1]], 1)
            logits = logits + (self._context_key(said) @ self._context_value().T).float()
        conditional = logits.log_softmax(-1).gather(2, rows[..., None])[..., 0]
        counted = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
        return ((conditional * counted).cumsum(-1),)
