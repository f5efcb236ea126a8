"""Medusa-1: independent residual heads on the last hidden state (Cai et al. 2024), on the target's own LM head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .base import register
from .parallel import ParallelConfig, ParallelDrafter


@dataclass
class MedusaConfig(ParallelConfig):
    """Shape and search of Medusa heads; the tree holds the best products of the heads' probabilities."""

    module: Literal["attention", "heads"] = "heads"
    slots: int = 5
    labels: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.module != "heads" or self.label_context:
            raise ValueError("medusa is module 'heads' without label_context; kind 'parallel' has the variants")


@register("medusa")
class MedusaDrafter(ParallelDrafter):
    """Head k guesses the k-th token after the root from the newest feature alone; it sees neither root nor context."""

    config_class = MedusaConfig
    config: MedusaConfig
