"""The paper's CTC transform: slot paths collapse into candidate continuations, which form a draft tree.

Wen, Gui and Feng (NeurIPS 2024) take the most probable slot paths and collapse each: merge equal neighbours, then drop
blanks. It sees only the mass of the paths it enumerates; ``lattice.prefix`` sums over all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ctc_drafter.tree import DraftTree


def collapse(path: Sequence[int], blank: int) -> list[int]:
    """Merge equal neighbours, then drop blanks: a a - a b b -> a a b."""
    return [symbol for i, symbol in enumerate(path) if symbol != blank and (i == 0 or symbol != path[i - 1])]


def top_paths(log_probs: Tensor, count: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``count`` most probable paths of independent slots: (N, V+1) -> paths (C, N), log probs (C,), best first.

    Only the ``top_k`` symbols of each slot are considered; with top_k >= min(count, V+1) that loses nothing, since a
    path that has a slot's r-th symbol is at best the r-th path. Extending the ``count`` best partial paths slot by slot
    is exact for the same reason. C = min(count, top_k^N). Raises ValueError if count or top_k is below 1.
    """
    if count < 1 or top_k < 1:
        raise ValueError(f"count and top_k must be at least 1, got {count} and {top_k}")
    values, symbols = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1)
    width = values.shape[1]
    scores = values.new_zeros(1)
    paths = symbols.new_zeros(1, 0)
    for value, symbol in zip(values, symbols, strict=True):
        total = (scores.unsqueeze(1) + value).view(-1)
        scores, best = total.topk(min(count, total.numel()))
        paths = torch.cat([paths[best // width], symbol[best % width].unsqueeze(1)], dim=1)
    return paths, scores


def collapsed_tree(log_probs: Tensor, budget: int, count: int, top_k: int) -> DraftTree:
    """The draft tree of the ``count`` most probable slot paths: (B, N, V+1) log probabilities, blank last.

    Paths that collapse to the same text add up; a prefix weighs the sum of the paths that share it, and the ``budget``
    heaviest prefixes are the nodes, heaviest first (a prefix is at least as heavy as its continuations, so parents come
    first). log_probs hold the log of those weights: lower bounds of the true prefix probabilities.
    """
    blank = log_probs.shape[-1] - 1
    ranked = []
    for row in log_probs.detach():
        paths, scores = top_paths(row, count, top_k)
        weights: dict[tuple[int, ...], float] = {}
        for path, probability in zip(paths.tolist(), scores.double().exp().tolist(), strict=True):
            text = collapse(path, blank)
            for length in range(1, len(text) + 1):
                prefix = tuple(text[:length])
                weights[prefix] = weights.get(prefix, 0.0) + probability
        reachable = [(prefix, weight) for prefix, weight in weights.items() if weight > 0]
        ranked.append(sorted(reachable, key=lambda item: (-item[1], len(item[0])))[:budget])
    tree = DraftTree.from_paths([[prefix for prefix, _ in row] for row in ranked], budget, log_probs.device)
    padded = [[math.log(weight) for _, weight in row] + [-math.inf] * (budget - len(row)) for row in ranked]
    filled = torch.tensor(padded, dtype=torch.float32, device=log_probs.device).reshape(len(ranked), budget)
    return dataclasses.replace(tree, log_probs=filled)
