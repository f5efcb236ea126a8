"""Brute-force twins: enumerate every slot path, spell its text, add up its probability in float64."""

from __future__ import annotations

import itertools
from collections import defaultdict

import torch
from torch import Tensor

Texts = dict[tuple[int, ...], float]


def spell(path: tuple[int, ...], blank: int, merge: bool) -> tuple[int, ...]:
    text = []
    previous = None
    for symbol in path:
        if symbol != blank and not (merge and symbol == previous):
            text.append(symbol)
        previous = symbol
    return tuple(text)


def enumerate_texts(log_probs: Tensor, merge: bool) -> Texts:
    """(N, V+1) slots independent of context -> probability of each text."""
    slots, classes = log_probs.shape
    return enumerate_context_texts(log_probs.expand(classes, slots, classes), merge)


def enumerate_context_texts(log_probs: Tensor, merge: bool = False) -> Texts:
    """(V+1, N, V+1) by last emitted token (last row: root) -> probability of each text."""
    table = log_probs.double().exp().tolist()
    root, slots, classes = len(table) - 1, log_probs.shape[1], log_probs.shape[2]
    texts: Texts = defaultdict(float)
    for path in itertools.product(range(classes), repeat=slots):
        probability, last = 1.0, root
        for i, symbol in enumerate(path):
            probability *= table[last][i][symbol]
            last = symbol if symbol != classes - 1 else last
        texts[spell(path, classes - 1, merge)] += probability
    return texts


def prefix_mass(texts: Texts, prefix: tuple[int, ...]) -> float:
    return sum(p for text, p in texts.items() if text[: len(prefix)] == prefix)


def random_log_probs(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)
