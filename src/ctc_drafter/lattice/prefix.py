"""Exact prefix probabilities, and the most probable prefixes as a draft tree.

The probability of a prefix is the total mass of all slot paths whose text starts with it (recursions:
``lattice.loss``). It never rises from parent to child, so the most probable prefixes are closed under parents: they are
the tree with the largest expected accepted length. ``lattice.best_first`` finds them one by one; ``best_prefixes`` does
the same in fixed shapes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ctc_drafter.tree import DraftTree

from .best_first import Search, best_first_of_slots
from .pool import MAX_BIAS, MIN_PROB, LabelContext, Lattice, pool_lattice, pool_tokens

LOG_ZERO = -1e4
"""Stands in for log 0 where it is multiplied by 0: exp of it is 0."""
CHILD_DISCOUNT = 1 - 1e-5
"""Selection factor per level, beyond rounding errors: a child never ties with its parent, so its parent is selected."""


def best_tree(
    slot_logits: Tensor,
    budget: int,
    *,
    pool: int,
    max_depth: int | None = None,
    context: LabelContext | None = None,
    merge: bool = False,
    ids: Tensor | None = None,
    search: Search = best_first_of_slots,
) -> DraftTree:
    """The draft tree with the largest expected accepted length, over the ``pool`` likeliest tokens.

    slot_logits (B, N, V+1), blank last; ids (V,): the token of each class, if not the class itself. `search` for one
    row on a CPU, `best_prefixes` elsewhere.
    """
    if slot_logits.device.type == "cpu" and slot_logits.shape[0] == 1:
        return search(slot_logits, pool, budget, max_depth, context, merge, ids)
    classes = pool_tokens(slot_logits, pool)
    lattice = pool_lattice(slot_logits, classes, None if context is None else context.of_pool(classes), merge)
    lattice = lattice if ids is None else replace(lattice, pool=ids[classes])
    return best_prefixes(lattice, budget, max_depth)


def best_prefixes(lattice: Lattice, budget: int, max_depth: int | None = None, beam: int | None = None) -> DraftTree:
    """The ``budget`` most probable prefixes of every row as a draft tree, nodes ordered by depth, ``log_probs`` filled.

    A level-synchronous beam with fixed shapes and no host sync. ``beam`` (default: ``budget``) nodes of each level are
    extended; from ``budget`` on the result is exact, since no level of the best tree holds more nodes. ``max_depth``
    defaults to N. Probabilities are float32; nodes below 1e-30 (or NaN) become padding wherever they stand, missing
    candidates padding at the end. Not differentiable. Raises ValueError if budget is negative, or beam or max_depth is
    below 1.
    """
    (batch, size), slots = lattice.pool.shape, lattice.logits.shape[1]
    levels = slots if max_depth is None else min(max_depth, slots)
    width = budget if beam is None else min(beam, budget)
    if budget < 0 or levels < 1 or (budget and width < 1):
        raise ValueError(f"budget {budget}, max_depth {max_depth} and beam {beam} do not describe a tree")
    if budget == 0:
        return DraftTree.empty(batch, lattice.pool.device)
    levels = min(levels, budget)
    widths = _widths(size, levels, width)
    with torch.no_grad():
        probs, index = _beam(lattice, widths)
        return _pack(F.pad(lattice.pool, (0, 2)), probs, index, budget, widths)


def _widths(size: int, levels: int, width: int) -> tuple[int, ...]:
    """Nodes kept at each level."""
    return tuple(min(width, size**level) for level in range(1, levels + 1))


def _beam(lattice: Lattice, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """All beam nodes, root first, then level by level: probability, (parent's place in its level) * C + class."""
    batch, size = lattice.pool.shape
    classes = size + 2
    step = _Step(lattice)
    root_prob, zero, mass, last = _root_constants(batch, lattice.logits.shape[1], size, lattice.pool.device)
    probs, indices = [root_prob], [zero]
    for kept in widths:
        value, index = step.children(mass, last).topk(kept)
        probs.append(value)
        indices.append(index)
        if len(indices) <= len(widths):
            last = index % classes
            mass = step.arrived(index, index // classes, last)
    return torch.cat(probs, 1), torch.cat(indices, 1)


class _Step:
    """Extends the W prefixes of a level by every class at once, in probability space.

    A prefix is the class of its last label and mass (B, W, N+1): by position, that of the slot paths which first emit
    this label there (position 0: the empty prefix). Contexts are kept as factors: the weight exp(keys[u] @ values[c])
    of class c after label u multiplies the class's own exp(logit), and the normalizer of slot i is the product of both
    summed over classes, so that no (context, class, slot) table is ever made.
    """

    def __init__(self, lattice: Lattice) -> None:
        logits = lattice.logits.float()
        self.merge, self.size = lattice.merge, lattice.pool.shape[1]
        self.probs = logits.softmax(-1)  # (B, N, C)
        self.by_class = self.probs.transpose(1, 2)
        self.labels = self.probs * _label_constants(self.size, logits.device)  # nothing for blank and the rest
        self.label_by_class = self.labels.transpose(1, 2)
        self.blank = self.probs[..., self.size].unsqueeze(1)
        # A row more, so that a choice among NaNs stays within bounds.
        self.keys = None if lattice.keys is None else F.pad(lattice.keys.float(), (0, 0, 0, 1))
        self.values = None if lattice.values is None else lattice.values.float().transpose(1, 2)

    def children(self, mass: Tensor, last: Tensor) -> Tensor:
        """(B, W * C): the prefix probability of each child; 0 for blank and rest."""
        self.last, self.weight = last, None
        blank = self.blank.expand(-1, last.shape[1], -1)
        if self.keys is not None and self.values is not None:
            bias = torch.bmm(_rows(self.keys, last), self.values)
            self.weight = bias.clamp_(-MAX_BIAS, MAX_BIAS).exp_()
            normalizer = torch.bmm(self.weight, self.by_class)  # (B, W, N)
            blank = blank * self.weight[..., self.size, None] / normalizer
        stay = _silence(blank)
        if self.merge:
            self._may_emit_after_run(mass, last, stay)
        else:
            self.share = (mass.unsqueeze(2) @ stay).squeeze(2)  # mass that may emit the next label at each slot
        if self.weight is not None:
            self.share = self.share / normalizer
        out = torch.bmm(self.share, self.labels)
        if self.weight is not None:
            out = out * self.weight
        if self.merge:
            same = (self.again * _rows(self.label_by_class, last)).sum(-1, keepdim=True)
            out = out.scatter(2, last.unsqueeze(2), same)
        return out.flatten(1)

    def _may_emit_after_run(self, mass: Tensor, last: Tensor, stay: Tensor) -> None:
        """Where equal neighbours merge, a label may follow a run of itself only through a blank."""
        later = _later_constant(stay.shape[3], stay.device)
        run = _silence(_rows(self.label_by_class, last))[:, :, 1:]  # (B, W, N, N): only the last label again
        same = run @ (stay[:, :, :-1] * later)
        start, rest = mass[..., :1], mass[..., 1:].unsqueeze(2)
        self.again = (rest @ same).squeeze(2)
        self.share = self.again + (rest @ run).squeeze(2) + start * stay[:, :, 0]

    def arrived(self, index: Tensor, parent: Tensor, label: Tensor) -> Tensor:
        """The masses (B, K, N+1) of the chosen children: index (B, K) into W * C, parent (B, K) into W."""
        mass = _rows(self.share, parent)
        if self.weight is not None:
            mass = mass * self.weight.flatten(1).gather(1, index).unsqueeze(2)
        if self.merge:
            mass = torch.where((self.last.gather(1, parent) == label).unsqueeze(2), _rows(self.again, parent), mass)
        return F.pad(mass * _rows(self.label_by_class, label), (1, 0))


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """table (B, n, d), index (B, k) -> (B, k, d)."""
    if table.shape[0] == 1:
        return table[0].index_select(0, index[0]).unsqueeze(0)
    return table.gather(1, index.unsqueeze(2).expand(-1, -1, table.shape[2]))


def _silence(prob: Tensor) -> Tensor:
    """(B, W, N) -> (B, W, N+1, N): [i', i-1] = product of prob over the slots between i' and i; 0 if i <= i'."""
    between, bias = _silence_constants(prob.shape[2], prob.device)
    flat = prob.log().clamp_min_(LOG_ZERO).flatten(0, 1)
    return torch.addmm(bias, flat, between).exp_().view(*prob.shape[:2], prob.shape[2] + 1, prob.shape[2])


def _pack(pool: Tensor, probs: Tensor, index: Tensor, budget: int, widths: tuple[int, ...]) -> DraftTree:
    """Keep the best ``budget`` of the beam's nodes, remap their parents, pad."""
    parent_level, depth_of, discount = _pack_constants(widths, pool.device)
    chosen = min(budget, probs.shape[1] - 1)
    # The beam is laid out level after level, so ascending order puts parents before children; the root comes first.
    selected = (probs * discount).topk(chosen + 1).indices.sort().values
    nodes = selected[:, 1:]
    index, prob = index.gather(1, nodes), probs.gather(1, nodes)
    size = pool.shape[1]
    parents = torch.searchsorted(selected, parent_level.take(nodes) + index // size) - 1
    padding = ~(prob > MIN_PROB)
    packed = (
        pool.gather(1, index % size).masked_fill(padding, 0),
        parents.masked_fill(padding, -1),
        depth_of.take(nodes).masked_fill(padding, 1),
        prob.log().masked_fill(padding, float("-inf")),
    )
    if chosen == budget:
        return DraftTree(*packed)
    fill = (0, -1, 1, -math.inf)
    return DraftTree(*(F.pad(t, (0, budget - chosen), value=v) for t, v in zip(packed, fill, strict=True)))


@lru_cache(maxsize=64)
def _root_constants(batch: int, slots: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The root as a beam node: a probability above any other and index 0, (B, 1); its mass (B, 1, N+1), its class."""
    prob = torch.full((batch, 1), 2.0, device=device)
    mass = torch.zeros(batch, 1, slots + 1, device=device)
    mass[..., 0] = 1.0
    last = torch.full((batch, 1), size, device=device)
    return prob, torch.zeros_like(last), mass, last


@lru_cache(maxsize=64)
def _label_constants(size: int, device: torch.device) -> Tensor:
    """(C,) 1 for the tokens of the pool, 0 for blank and rest."""
    return (torch.arange(size + 2, device=device) < size).float()


@lru_cache(maxsize=64)
def _silence_constants(slots: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which slots lie strictly between two positions, (N, (N+1)*N), and log 0 for pairs out of order."""
    start = torch.arange(slots + 1, device=device).view(1, -1, 1)
    end = torch.arange(1, slots + 1, device=device).view(1, 1, -1)
    slot = torch.arange(1, slots + 1, device=device).view(-1, 1, 1)
    between = ((start < slot) & (slot < end)).float().view(slots, -1)
    return between, ((start >= end).float() * LOG_ZERO).view(-1)


@lru_cache(maxsize=64)
def _later_constant(slots: int, device: torch.device) -> Tensor:
    """(N, N) 1 where at least one slot lies between."""
    return torch.ones(slots, slots, device=device).triu(1)


@lru_cache(maxsize=64)
def _pack_constants(widths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each beam node, root first: beam index where its parent's level begins, depth, selection factor."""
    sizes = (1, *widths)
    begins = [sum(sizes[:level]) for level in range(len(sizes))]
    parent = [begins[max(level - 1, 0)] for level, n in enumerate(sizes) for _ in range(n)]
    depth = torch.tensor([level for level, n in enumerate(sizes) for _ in range(n)], device=device)
    return torch.tensor(parent, device=device), depth, torch.pow(CHILD_DISCOUNT, depth.double()).float()
