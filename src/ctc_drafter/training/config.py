"""The recipe of a drafter."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..acceptance import SEEDS

FREE = {
    *("output", "device", "features", "skip_bad_shards", "steps", "decay", "accumulate", "checkpoint_every"),
    *("trust_remote_code", "store", "shard"),
}
"""What may change between a run and its continuation."""


@dataclass
class TrainConfig:
    """Recipe of a drafter."""

    data: list[str]
    """JSONL files of `ctc-drafter distill`, or rows of `messages` or `text`."""
    output: str
    target: str | None = None
    """Model folder or hub name; None: the embedded target."""
    kind: str = "ctc"
    drafter: dict[str, Any] = field(default_factory=dict)
    """The drafter's own config, for `ctc` the fields of CTCConfig."""
    init: str | None = None
    """Drafter to train on from, as `bench` names it: of the same kind and shape, whatever target it was made for."""
    steps: int = 1000
    """Updates of the weights."""
    batch: int = 16
    """Sequences in a step, of all processes together."""
    accumulate: int = 1
    """Parts in which each process does its share of a batch, one after another: less memory, the same step."""
    anchors: int = 64
    """Drafting problems drawn from each sequence."""
    max_tokens: int = 512
    """Longer sequences are cut."""
    shard: bool = False
    """Under torchrun: share out the target's layers over the processes (FSDP2), if it is too large for one device."""
    features: str | None = None
    """Folder of `ctc-drafter cache-features`; None: the target runs in every step."""
    skip_bad_shards: bool = False
    """Go on without the sequences in damaged shards of `features`."""
    lr_matrix: float = 4e-3
    """Learning rate of the matrices of linear layers, by Muon."""
    lr_other: float = 1e-3
    """Learning rate of everything else, by AdamW."""
    weight_decay: float = 0.0
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"
    warmup: int = 20
    """First steps, over which the learning rate rises linearly."""
    decay: int = 400
    """Last steps, over which the trapezoid's learning rate falls linearly to zero."""
    ema: float = 0.0
    """Above 0: keep (and evaluate) the exponential moving average of the weights with this decay, such as 0.999."""
    held_out: float = 0.01
    """Share of the sequences kept for the held-out figures."""
    evaluate_prompts: int = 0
    """Held-out prompts answered at each checkpoint, for tau; the weights with the best are kept. 0: the last are."""
    evaluate_tokens: int = 64
    """Longest answer to them."""
    evaluate_budget: int = 8
    """Draft nodes in each step of these answers."""
    checkpoint_every: int = 100
    """Steps between two evaluations, each of which saves the state that a stopped run goes on from."""
    dtype: str = "bfloat16"
    store: Literal["auto", "bfloat16", "float16", "float32", "float8_e4m3fn"] = "auto"
    """Of the written weights; auto: as `dtype`. In eight bits only matrices are, what is smaller stays in bfloat16."""
    device: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.anchors, self.checkpoint_every, self.max_tokens) < 1:
            raise ValueError("steps, batch, anchors, checkpoint_every and max_tokens must be at least 1")
        if min(self.accumulate, self.evaluate_tokens) < 1 or min(self.evaluate_prompts, self.evaluate_budget) < 0:
            raise ValueError(
                "accumulate and evaluate_tokens must be at least 1, evaluate_prompts and evaluate_budget at least 0"
            )
        if not all(0 <= rate < math.inf for rate in (self.lr_matrix, self.lr_other, self.weight_decay)):
            raise ValueError("lr_matrix, lr_other and weight_decay must be finite and not negative")
        if not 0 <= self.held_out < 1:
            raise ValueError("held_out is a share, at least 0 and below 1")
        if not 0 <= self.ema < 1:
            raise ValueError("ema is a decay, at least 0 and below 1")
        if self.seed not in SEEDS:
            raise ValueError("seed must be at least -2**63 and below 2**64")


def recipe_defaults() -> dict[str, Any]:
    """What a recipe written before a key existed meant by leaving it out."""
    return {f.name: f.default for f in dataclasses.fields(TrainConfig) if f.default is not dataclasses.MISSING}
