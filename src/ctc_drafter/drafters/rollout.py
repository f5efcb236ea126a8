"""Growing a draft tree level by level, for drafters that predict one token at a time (EAGLE-2, Li et al. 2024).

The most probable nodes of a level are expanded; at the end the most probable nodes of all levels are the tree. Shapes
depend on sizes alone, never on values: nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F

from ..tree import ROOT, DraftTree

State = TypeVar("State")
Expand = Callable[[State, torch.Tensor, torch.Tensor], tuple[torch.Tensor, State]]
"""(state of the W nodes expanded before, parents (B, W'), tokens (B, W')) -> log probabilities (B, W', K), new state.

parents: each chosen node's place among the W nodes expanded before (the root alone at first); tokens: their ids. The
log probabilities are those of the next token after each chosen node.
"""


def grow(
    log_probs: torch.Tensor,
    state: State,
    expand: Expand[State],
    kept: torch.Tensor,
    *,
    budget: int,
    levels: int,
    beam: int,
) -> DraftTree:
    """The ``budget`` most probable nodes that expanding the ``beam`` most probable of each level finds.

    log_probs (B, K): of the first token after the root, over the tokens kept (K,); state: the root's. From a beam of
    ``budget`` on, the nodes are the most probable of all prefixes with at most ``levels`` tokens, since no level of
    the best tree holds more. Nodes are ordered by depth, within a depth by probability; what has probability 0 (or NaN)
    is padding. Raises ValueError if budget is negative, or levels or beam is below 1.
    """
    if budget < 0 or levels < 1 or beam < 1:
        raise ValueError(f"budget {budget}, levels {levels} and beam {beam} do not describe a tree")
    batch, device = log_probs.shape[0], log_probs.device
    if budget == 0:
        return DraftTree.empty(batch, device)
    level, expanded = log_probs[:, None], log_probs.new_zeros(batch, 1)
    places = torch.full((batch, 1), ROOT, device=device)  # of the expanded nodes, among all candidates
    found: list[tuple[torch.Tensor, ...]] = []
    count = 0
    for depth in range(1, min(levels, budget) + 1):
        values, parents, rows = _children(level, expanded, budget)
        tokens = kept[rows]
        found.append((values, tokens, places.gather(1, parents), torch.full_like(tokens, depth)))
        if depth == min(levels, budget):
            break
        # The candidates stand by falling probability, so that the first ones are those to expand.
        width = min(beam, values.shape[1])
        expanded = values[:, :width]
        places = torch.arange(count, count + width, device=device).expand(batch, -1)
        count += values.shape[1]
        level, state = expand(state, parents[:, :width], tokens[:, :width])
    values, tokens, parents, depths = (torch.cat(parts, 1) for parts in zip(*found))
    return _select(values, tokens, parents, depths, budget)


def _children(
    log_probs: torch.Tensor, expanded: torch.Tensor, budget: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best children of a level: log_probs (B, W, K) and the parents' own (B, W) -> value, parent, row, each (B, C).

    C = min(budget, W * K): no level of the tree holds more. A value is the whole path's log probability.
    """
    clean = torch.where(log_probs.isnan(), -math.inf, log_probs)
    best, rows = clean.topk(min(budget, clean.shape[2]))
    per_parent = best.shape[2]
    paths = (expanded[..., None] + best).flatten(1)
    values, index = paths.topk(min(budget, paths.shape[1]))
    return values, index // per_parent, rows.flatten(1).gather(1, index)


def _select(
    values: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, depths: torch.Tensor, budget: int
) -> DraftTree:
    """Keep the most probable ``budget`` of all candidates, each (B, C) and level after level; remap parents, pad."""
    # A child is never more probable than its parent, and a stable sort lets the parent win a tie: closed under parents.
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :budget]
    chosen = order.sort(1).values
    values, tokens, parents, depths = (t.gather(1, chosen) for t in (values, tokens, parents, depths))
    moved = torch.searchsorted(chosen, parents.contiguous())
    padding = values == -math.inf
    packed = (
        tokens.masked_fill(padding, 0),
        torch.where(padding | (parents == ROOT), ROOT, moved),
        depths.masked_fill(padding, 1),
        values,
    )
    missing = budget - chosen.shape[1]
    fill = (0, ROOT, 1, -math.inf)
    return DraftTree(*(F.pad(t, (0, missing), value=v) for t, v in zip(packed, fill, strict=True)))
