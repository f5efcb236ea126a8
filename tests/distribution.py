"""Processed distributions from the definitions, and tests of samples against them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ctc_drafter.acceptance import Sampling

SETTINGS = {
    "plain": Sampling(temperature=1.0),
    "temperature": Sampling(temperature=0.6),
    "top_k": Sampling(temperature=1.0, top_k=3),
    "top_p": Sampling(temperature=1.2, top_p=0.8),
    "min_p": Sampling(temperature=1.5, min_p=0.15),
    "repetition_penalty": Sampling(temperature=0.9, repetition_penalty=1.7),
    "all": Sampling(temperature=1.3, top_k=5, top_p=0.95, min_p=0.05, repetition_penalty=1.3),
}
"""Each processor alone, then all of them."""


def processed(logits: Sequence[float], context: Iterable[int], sampling: Sampling) -> list[float]:
    """The distribution of the token after `context` under `sampling`, in double precision and plain Python."""
    scores = [float(s) for s in logits]
    for token in set(context):
        s, penalty = scores[token], sampling.repetition_penalty
        scores[token] = s / penalty if s > 0 else s * penalty
    scores = [s / sampling.temperature for s in scores]
    ranked = sorted(range(len(scores)), key=lambda t: -scores[t])
    kept = ranked[: sampling.top_k or len(scores)]

    def softmax() -> dict[int, float]:
        total = sum(math.exp(scores[t]) for t in kept)
        return {t: math.exp(scores[t]) / total for t in kept}

    p = softmax()
    kept = [t for i, t in enumerate(kept) if i == 0 or sum(p[u] for u in kept[:i]) < sampling.top_p]
    p = softmax()
    kept = [t for t in kept if p[t] >= sampling.min_p * max(p.values())]
    p = softmax()
    return [p.get(t, 0.0) for t in range(len(scores))]


def chi_square(counts: Counter[Any], exact: Mapping[Any, float]) -> tuple[float, int]:
    """Pearson's statistic of the counts against the exact probabilities, and its degrees of freedom.

    What is expected fewer than five times shares one cell, so that the statistic follows its distribution.
    """
    draws = counts.total()
    cells = [(counts[key], p * draws) for key, p in exact.items() if p * draws >= 5]
    rest = (draws - sum(c for c, _ in cells), draws - sum(e for _, e in cells))
    if rest[1] > 1:
        cells.append(rest)
    return sum((c - e) ** 2 / e for c, e in cells), len(cells) - 1


def chi_square_limit(freedom: int) -> float:
    """The 1 - 1e-5 quantile of chi-square (Wilson and Hilferty)."""
    a = 2 / (9 * freedom)
    return freedom * (1 - a + 4.265 * math.sqrt(a)) ** 3


def kolmogorov(values: Sequence[float]) -> float:
    """The largest distance between the values' empirical distribution and the uniform one on [0, 1]."""
    n = len(values)
    return max(max((i + 1) / n - v, v - i / n) for i, v in enumerate(sorted(values)))


def kolmogorov_limit(count: int) -> float:
    """The 1 - 1e-5 quantile of `kolmogorov` for so many values, from its limit distribution."""
    return math.sqrt(math.log(2 / 1e-5) / 2 / count)
