"""The recipe of a target."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ..acceptance import SEEDS

POSITIVE = (
    *("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "context"),
    *("block", "batch", "steps", "checkpoint_every", "unlikelihood_batch", "unlikelihood_tokens"),
)
NOT_NEGATIVE = (
    *("warmup", "decay", "lr_matrix", "lr_other", "weight_decay", "z_loss"),
    *("unlikelihood_steps", "unlikelihood_lr", "unlikelihood_weight"),
)

FREE = {"output", "device", "dtype", "compile", "steps", "decay", "checkpoint_every"} | {
    f"unlikelihood_{name}" for name in ("steps", "batch", "tokens", "lr", "weight")
}
"""What may change between a run and its continuation; the rest decides the data and the weights."""


@dataclass
class PretrainConfig:
    """Recipe of a target trained from scratch."""

    data: list[str]
    """JSONL files with `messages` or `text` rows."""
    output: str
    mixture: dict[str, float] = field(default_factory=dict)
    """Copies of each row by its `source` (0.25: a quarter of the rows, 2.0: all of them twice); 1.0 if absent.
    Held-out text is every source once, but for those at 0."""
    answers_only: list[str] = field(default_factory=list)
    """Sources whose prompts carry no loss (the same few prompts many times over)."""
    as_answers: list[str] = field(default_factory=list)
    """Sources of `text` rows that are answers without their question: rendered as an assistant turn."""
    exclude: list[str] = field(default_factory=list)
    """Prompt files; a row that shares 13 consecutive words with one of them, or asks a shorter one, is dropped."""
    init: str | None = None
    """Folder of a target to train on from; its tokenizer and shape are used, and the shape below is not."""
    vocab_size: int = 6144
    hidden_size: int = 384
    intermediate_size: int = 1024
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    context: int = 1024
    block: int = 768
    """Tokens in a training sequence."""
    batch: int = 12
    steps: int = 3000
    warmup: int = 100
    decay: int = 1000
    """Last steps, over which the learning rate falls linearly to zero."""
    lr_matrix: float = 3e-3
    lr_other: float = 3e-3
    weight_decay: float = 0.1
    z_loss: float = 1e-4
    compile: bool = True
    device: str = "auto"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the passes, whichever the machine is faster in; the optimizer works in float32, the result is bfloat16."""
    unlikelihood_steps: int = 0
    """Steps of fine-tuning against repeating loops, after the last of `steps`."""
    unlikelihood_batch: int = 32
    unlikelihood_tokens: int = 128
    unlikelihood_lr: float = 2e-4
    unlikelihood_weight: float = 1.0
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for names, least in ((POSITIVE, 1), (NOT_NEGATIVE, 0)):
            if wrong := [name for name in names if not least <= getattr(self, name) < math.inf]:
                raise ValueError(f"{' and '.join(wrong)} must be finite and at least {least}")
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ValueError("hidden_size must be a multiple of heads, and heads of kv_heads")
        if self.seed not in SEEDS:
            raise ValueError("seed must be at least -2**63 and below 2**64")
        if not all(0 <= rate < math.inf for rate in self.mixture.values()):
            raise ValueError("the rates of mixture must be finite and not negative")
