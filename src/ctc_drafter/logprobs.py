"""The target's own log probabilities of the tokens that it chose, and of its most probable ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LogProb:
    """Of one emitted token, before temperature and all other processing; `top`: the most probable tokens, in order."""

    token: int
    value: float
    top: list[tuple[int, float]]


def log_probs_of(logits: torch.Tensor, tokens: list[int], top: int) -> list[LogProb]:
    """logits (n, V) from which the n tokens were chosen; top: how many of the most probable ones to name."""
    scores = logits.float().log_softmax(-1)
    own = scores.gather(-1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    values, ids = (part.tolist() for part in scores.topk(min(top, scores.shape[-1]), dim=-1))
    return [LogProb(t, v, list(zip(i, p))) for t, v, i, p in zip(tokens, own, ids, values)]
