"""Exact prefix probabilities, and the most probable prefixes as a draft tree.

The probability of a prefix is the total mass of all slot paths whose text starts with it (recursions:
``lattice.loss``). It never rises from parent to child, so the most probable prefixes are closed under parents: they are
the tree with the largest expected accepted length. ``best_first`` says so in plain code; ``best_prefixes`` does the
same with fixed shapes.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ctc_drafter.tree import DraftTree

LOG_ZERO = -1e4
"""Stands in for log 0 where it is multiplied by 0: exp of it is 0."""
MIN_PROB = 1e-30
"""Less probable nodes become padding: near float32's smallest numbers a child could round to above its parent."""
CHILD_DISCOUNT = 1 - 1e-5
"""Selection factor per level, beyond rounding errors: a child never ties with its parent, so its parent is selected."""


@dataclass(frozen=True)
class Lattice:
    """Slot distributions restricted to a pool of M tokens, in log space; the mass missing from 1 is outside the pool.

    pool:  (B, M) long, distinct token ids.
    emit:  (B, U, N, M) log p_i(pool m | last emitted token u).
    blank: (B, U, N) log p_i(blank | u).
    merge: True: equal neighbours merge (standard CTC); False: every non-blank slot emits one token.
    U is 1 where emissions do not depend on the context, else M+1: u < M is pool token u, u = M is the root.
    """

    pool: Tensor
    emit: Tensor
    blank: Tensor
    merge: bool

    def __post_init__(self) -> None:
        batch, contexts, slots, size = self.emit.shape
        if self.pool.shape != (batch, size) or self.blank.shape != (batch, contexts, slots):
            raise ValueError(
                f"pool {tuple(self.pool.shape)}, emit {tuple(self.emit.shape)} and blank "
                f"{tuple(self.blank.shape)} do not belong together"
            )
        if contexts != 1 and (self.merge or contexts != size + 1):
            raise ValueError(f"{contexts} contexts do not fit a pool of {size} tokens with merge={self.merge}")

    def context(self, token: int) -> int:
        """Index on the U axis of the context in which pool token ``token`` was emitted last."""
        return token if self.emit.shape[1] > 1 else 0

    @property
    def root(self) -> int:
        """Index on the U axis of the root."""
        return self.emit.shape[1] - 1


def pool_tokens(slot_logits: Tensor, size: int) -> Tensor:
    """The ``size`` real tokens with the largest max_i log p_i(v): (B, N, V+1), blank last -> (B, size) distinct ids.

    Raises ValueError if size is not within 1..V.
    """
    vocab = slot_logits.shape[-1] - 1
    if not 1 <= size <= vocab:
        raise ValueError(f"pool size must be within 1..{vocab}, got {size}")
    return slot_logits.log_softmax(-1)[..., :-1].amax(1).topk(size, dim=-1).indices


def pool_lattice(slot_logits: Tensor, pool: Tensor, context_logits: Tensor | None, merge: bool) -> Lattice:
    """Distributions of the slots over the pool and the blank, in float32 or better.

    slot_logits: (B, N, V+1), blank last. pool: (B, M) distinct real tokens. context_logits: (B, M+1, M+1), the bias
    that context u (pool token u, last row the root) adds to pool token m (last column the blank), or None.
    Without context this is log_softmax gathered at the pool. With context the tokens outside the pool are one class
    without bias: exact when the pool is the whole vocabulary. Raises ValueError for a context in the merge topology.
    """
    logits = slot_logits.to(torch.promote_types(slot_logits.dtype, torch.float32))
    index = pool.unsqueeze(1).expand(-1, logits.shape[1], -1)
    if context_logits is None:
        total = logits.logsumexp(-1)
        emit = (logits.gather(2, index) - total.unsqueeze(-1)).unsqueeze(1)
        return Lattice(pool, emit, (logits[..., -1] - total).unsqueeze(1), merge)
    if merge:
        raise ValueError("the merge topology has no label context: its last label is not the last emission")
    rest = logits[..., :-1].scatter(2, index, float("-inf")).logsumexp(-1)
    pooled = torch.cat([logits.gather(2, index), logits[..., -1:]], dim=-1)
    # Slots are the last axis in memory because the search sums over them.
    classes = pooled.transpose(1, 2).unsqueeze(1) + context_logits.to(logits.dtype).unsqueeze(-1)  # (B, M+1, M+1, N)
    total = torch.logaddexp(classes.logsumexp(2), rest.unsqueeze(1))
    normal = classes - total.unsqueeze(2)
    return Lattice(pool, normal[:, :, :-1].transpose(2, 3), normal[:, :, -1], merge)


@dataclass(frozen=True)
class _State:
    """Mass of all slot paths that spell a prefix, in float64, by position 0..N = slots used.

    arrived: (N+1,) its last label is first emitted here (position 0: the empty prefix). last: that pool index, or None.
    """

    arrived: list[float]
    last: int | None


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf


class _Row:
    """One row of a lattice as plain float64 lists: the recursion in its most readable form."""

    def __init__(self, lattice: Lattice, row: int) -> None:
        self.lattice = lattice
        self.emit: list[list[list[float]]] = lattice.emit[row].double().exp().tolist()
        self.blank: list[list[float]] = lattice.blank[row].double().exp().tolist()
        self.slots, self.size = lattice.emit.shape[2:]

    def start(self) -> _State:
        return _State([1.0] + [0.0] * self.slots, None)

    def child(self, state: _State, token: int) -> _State:
        """Extend by one label, which may be entered at any slot after the last label's."""
        context = self.lattice.root if state.last is None else self.lattice.context(state.last)
        arrived = [0.0] * (self.slots + 1)
        run = rest = 0.0  # mass whose last slot emitted the last label / whose last slot was a blank
        for i in range(self.slots):
            if self.lattice.merge and state.last is not None:
                run += state.arrived[i]
                from_run = run if token != state.last else 0.0
                arrived[i + 1] = (rest + from_run) * self.emit[0][i][token]
                run, rest = run * self.emit[0][i][state.last], (run + rest) * self.blank[0][i]
            else:
                rest += state.arrived[i]
                arrived[i + 1] = rest * self.emit[context][i][token]
                rest *= self.blank[context][i]
        return _State(arrived, token)


def prefix_log_prob(lattice: Lattice, sequence: tuple[int, ...], row: int = 0) -> float:
    """log P(the text starts with ``sequence``), pool indices, by the forward recursion. Slow and plain: a reference."""
    table = _Row(lattice, row)
    state = table.start()
    for token in sequence:
        state = table.child(state, token)
    return _log(sum(state.arrived))


def best_first(
    lattice: Lattice, budget: int, row: int = 0, max_depth: int | None = None
) -> list[tuple[tuple[int, ...], float]]:
    """The ``budget`` most probable non-empty prefixes (pool indices) with their log P, most probable first.

    A heap search that expands the most probable prefix first; exact since a child is never more probable than its
    parent. Returns fewer where fewer have positive probability. Slow and plain: the specification of ``best_prefixes``.
    """
    table = _Row(lattice, row)
    depth_limit = table.slots if max_depth is None else max_depth
    found: list[tuple[tuple[int, ...], float]] = []
    heap: list[tuple[float, tuple[int, ...], _State]] = [(-1.0, (), table.start())]
    while heap and len(found) < budget:
        negative, sequence, state = heapq.heappop(heap)
        if sequence:
            found.append((sequence, _log(-negative)))
        if len(sequence) == depth_limit:
            continue
        for token in range(table.size):
            child = table.child(state, token)
            mass = sum(child.arrived)
            if mass > 0:
                # Rounding must not let a child overtake its parent.
                heapq.heappush(heap, (max(-mass, negative), (*sequence, token), child))
    return found


def best_prefixes(lattice: Lattice, budget: int, max_depth: int | None = None, beam: int | None = None) -> DraftTree:
    """The ``budget`` most probable prefixes of every row as a draft tree, nodes ordered by depth, ``log_probs`` filled.

    A level-synchronous beam with fixed shapes and no host sync. ``beam`` (default: ``budget``) nodes of each level are
    extended; from ``budget`` on the result is exact, since no level of the best tree holds more nodes. ``max_depth``
    defaults to N. Probabilities are float32; nodes below 1e-30 (or NaN) become padding wherever they stand, missing
    candidates padding at the end. Not differentiable. Raises ValueError if budget is negative, or beam or max_depth is
    below 1.
    """
    batch, _, slots, size = lattice.emit.shape
    levels = slots if max_depth is None else min(max_depth, slots)
    width = budget if beam is None else min(beam, budget)
    if budget < 0 or levels < 1 or (budget and width < 1):
        raise ValueError(f"budget {budget}, max_depth {max_depth} and beam {beam} do not describe a tree")
    if budget == 0:
        return DraftTree.empty(batch, lattice.pool.device)
    levels = min(levels, budget)
    with torch.no_grad():
        probs, index = _beam(lattice, levels, width)
        return _pack(lattice.pool, probs, index, budget, _widths(size, levels, width))


def _widths(size: int, levels: int, width: int) -> tuple[int, ...]:
    """Nodes kept at each level."""
    return tuple(min(width, size**level) for level in range(1, levels + 1))


def _beam(lattice: Lattice, levels: int, width: int) -> tuple[Tensor, Tensor]:
    """All beam nodes, root first, then level by level: probability, (parent's place in its level) * M + pool index."""
    batch, _, _, size = lattice.emit.shape
    row, root_prob, root_index = _row_constants(batch, lattice.pool.device)
    masses, kernel, emission = _tables(lattice)  # masses: (B, candidates, S), by slot of first emission
    states, contexts = masses.shape[2], kernel.shape[0] // batch
    probs, indices = [root_prob], [root_index]
    for kept in _widths(size, levels, width):
        value, index = masses.sum(-1).topk(kept)
        probs.append(value)
        indices.append(index)
        if len(indices) > levels:
            break
        nodes = (index + row * masses.shape[1]).view(-1)
        context = (index % size + row * contexts).view(-1)
        mass = masses.view(-1, 1, states).index_select(0, nodes)
        arrive = torch.bmm(mass, kernel.index_select(0, context)[:, -states:])  # (B*W, 1, S)
        masses = (arrive * emission.index_select(0, context)).view(batch, kept * size, states)
    return torch.cat(probs, 1), torch.cat(indices, 1)


def _tables(lattice: Lattice) -> tuple[Tensor, Tensor, Tensor]:
    """Root children and the two factors of a level step, for all contexts at once, in probability space.

    Returns first (B, M, S): mass with which each child of the root is first emitted at each slot; kernel (B*U', R, S),
    whose last S rows take the first-emission masses of a prefix that ends in context u to the mass that may emit the
    next label at each slot; emission (B*U', M, S): probability that it does. So child = (mass @ kernel[u]) *
    emission[u, child]. S = N, but 2N for merge, whose second half is the mass that may emit the same label again (only
    through a blank).
    """
    _, contexts, slots, size = lattice.emit.shape
    emit = lattice.emit.transpose(2, 3).float()  # (B, U, M, N)
    prob = emit.exp().contiguous()
    stay = _silence(lattice.blank.float())  # (B, U, N+1, N)
    first = stay[:, -1, :1] * prob[:, -1]
    if not lattice.merge:
        if contexts == 1:
            stay, prob = (t.expand(-1, size, -1, -1) for t in (stay, prob))
        return first, stay.reshape(-1, slots + 1, slots), prob.reshape(-1, size, slots)
    run = _silence(emit.squeeze(1))[:, :, 1:]  # (B, M, N, N): only the last label again, from its first slot on
    later, same_half = _merge_constants(slots, size, emit.device)
    same = run @ (stay[:, :, :-1] * later)  # a run, then at least one blank
    step = torch.cat([same + run, same], dim=-1)
    kernel = torch.cat([step, step], dim=-2).view(-1, 2 * slots, 2 * slots)
    emission = (prob.unsqueeze(-2) * same_half).view(-1, size, 2 * slots)
    return F.pad(first, (0, slots)), kernel, emission


def _silence(log_prob: Tensor) -> Tensor:
    """(B, U, N) -> (B, U, N+1, N): [i', i-1] = product of exp(log_prob) over slots between i' and i; 0 if i <= i'."""
    batch, contexts, slots = log_prob.shape
    between, bias = _silence_constants(slots, log_prob.device)
    flat = log_prob.reshape(-1, slots).clamp_min(LOG_ZERO)
    return torch.addmm(bias, flat, between).exp().view(batch, contexts, slots + 1, slots)


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
def _row_constants(batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers (B, 1), and the root as a beam node: a probability above any other, index 0."""
    row = torch.arange(batch, device=device).unsqueeze(1)
    return row, torch.full((batch, 1), 2.0, device=device), torch.zeros_like(row)


@lru_cache(maxsize=64)
def _silence_constants(slots: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which slots lie strictly between two positions, (N, (N+1)*N), and log 0 for pairs out of order."""
    start = torch.arange(slots + 1, device=device).view(1, -1, 1)
    end = torch.arange(1, slots + 1, device=device).view(1, 1, -1)
    slot = torch.arange(1, slots + 1, device=device).view(-1, 1, 1)
    between = ((start < slot) & (slot < end)).float().view(slots, -1)
    return between, ((start >= end).float() * LOG_ZERO).view(-1)


@lru_cache(maxsize=64)
def _merge_constants(slots: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, N) 1 where at least one slot lies between; (M, M, 2, 1) the half of the state label m uses after label u."""
    later = torch.ones(slots, slots, device=device).triu(1)
    same = torch.eye(size, device=device)
    return later, torch.stack([1 - same, same], dim=-1).unsqueeze(-1)


@lru_cache(maxsize=64)
def _pack_constants(widths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each beam node, root first: beam index where its parent's level begins, depth, selection factor."""
    sizes = (1, *widths)
    begins = [sum(sizes[:level]) for level in range(len(sizes))]
    parent = [begins[max(level - 1, 0)] for level, n in enumerate(sizes) for _ in range(n)]
    depth = torch.tensor([level for level, n in enumerate(sizes) for _ in range(n)], device=device)
    return torch.tensor(parent, device=device), depth, torch.pow(CHILD_DISCOUNT, depth.double()).float()
