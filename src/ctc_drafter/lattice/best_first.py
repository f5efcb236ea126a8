"""The most probable prefixes by best-first search, on the host in arrays: the specification of ``lattice.prefix``."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctc_drafter.tree import ROOT, DraftTree

from .pool import MAX_BIAS, MIN_PROB, LabelContext, Lattice

Search = Callable[[Tensor, int, int, int | None, LabelContext | None, bool, Tensor | None], DraftTree]
"""What `best_first_of_slots` is."""
_Node = tuple[int, int, int, float]
"""Pool index, parent, depth, log probability."""


class _Extensions:
    """All one-label extensions of a prefix: their probabilities, and where each would first emit its label."""

    def __init__(self, row: _Row, arrived: list[float], last: int | None) -> None:
        """arrived (N+1,): by position 0..N, the mass of the slot paths that first emit ``last`` there (0: no label)."""
        blank, self._weight = row.blank, None
        if row.key is not None:
            bias = row.values @ row.key(last)
            np.minimum(np.maximum(bias, -MAX_BIAS, out=bias), MAX_BIAS, out=bias)
            self._weight = np.exp(bias, out=bias)
            normalizer = row.probs @ self._weight
            blank = blank * self._weight[row.size] / normalizer
        repeat = row.labels[:, last].tolist() if row.merge and last is not None else None
        other, again = _may_emit(arrived, blank.tolist(), repeat)
        self._labels, self._last = row.labels, last
        self._other = np.array(other, dtype=row.probs.dtype)
        self._again = None if repeat is None else np.array(again, dtype=row.probs.dtype)
        if self._weight is not None:
            self._other /= normalizer
        self.probs = self._other @ row.labels
        """(M,) prefix probability of each extension."""
        if self._weight is not None:
            self.probs *= self._weight[: row.size]
        if self._again is not None:
            self.probs[last] = self._again @ row.labels[:, last]

    def arrived(self, label: int) -> list[float]:
        """`arrived` of the extension by one label."""
        share = self._again if self._again is not None and label == self._last else self._other
        mass = share * self._labels[:, label]
        if self._weight is not None:
            mass *= self._weight[label]
        return [0.0, *mass.tolist()]


class _Row:
    """One row of a lattice as arrays."""

    def __init__(self, probs: Any, key: Callable[[int | None], Any] | None, values: Any, merge: bool) -> None:
        """probs (N, C); key of a pool token, or of the root for None, (r,), and values (C, r), if there is context."""
        self.merge, self.size = merge, probs.shape[1] - 2
        self.probs: Any = probs
        self.labels, self.blank = np.ascontiguousarray(probs[:, : self.size]), probs[:, self.size]
        self.key, self.values = key, values
        self.start = [1.0] + [0.0] * len(probs)

    @classmethod
    def of(cls, lattice: Lattice, row: int) -> _Row:
        probs = lattice.logits[row].detach().softmax(-1).cpu().numpy()
        if lattice.keys is None or lattice.values is None:
            return cls(probs, None, None, lattice.merge)
        keys, values = (t[row].detach().cpu().numpy() for t in (lattice.keys, lattice.values))
        return cls(probs, lambda last: keys[-1 if last is None else last], values, lattice.merge)


def _may_emit(arrived: list[float], blank: list[float], repeat: list[float] | None) -> tuple[list[float], list[float]]:
    """Mass that may emit the next label at each slot: another than the last one, and the last one again.

    blank (N,): P(blank) after the last label; repeat (N,): P(that label) where equal neighbours merge, else None.
    """
    other, again = [], []
    run = rest = 0.0  # mass whose last slot emitted the last label and could merge / that passed a blank or cannot
    for i, silent in enumerate(blank):
        if repeat is None:
            rest += arrived[i]
        else:
            run += arrived[i]
        other.append(run + rest)
        again.append(rest)
        run, rest = run * repeat[i] if repeat else 0.0, (run + rest) * silent
    return other, again


def prefix_log_prob(lattice: Lattice, sequence: tuple[int, ...], row: int = 0) -> float:
    """log P(the text starts with ``sequence``), pool indices, by the forward recursion."""
    table = _Row.of(lattice, row)
    arrived, last = table.start, None
    for label in sequence:
        arrived, last = _Extensions(table, arrived, last).arrived(label), label
    total = sum(arrived)
    return math.log(total) if total > 0 else -math.inf


def best_first(lattice: Lattice, budget: int, max_depth: int | None = None) -> DraftTree:
    """The ``budget`` most probable prefixes of every row as a draft tree, most probable first.

    Always extends the most probable prefix not yet extended, which is exact since a child is never more probable than
    its parent. Missing candidates, and those below MIN_PROB, are padding. ``max_depth`` defaults to N.
    """
    levels = lattice.logits.shape[1] if max_depth is None else max_depth
    nodes = [_best_nodes(_Row.of(lattice, i), budget, levels) for i in range(len(lattice.pool))]
    return _packed(nodes, lattice.pool.cpu().numpy(), lattice.pool.device)


def best_first_of_slots(
    slot_logits: Tensor,
    size: int,
    budget: int,
    max_depth: int | None = None,
    context: LabelContext | None = None,
    merge: bool = False,
    ids: Tensor | None = None,
) -> DraftTree:
    """`best_first` over the lattice that `pool_tokens` and `pool_lattice` would make, all of it in arrays.

    slot_logits (1, N, V+1), blank last; the pool has ``size`` tokens; ids (V,): the token of each class, if not the
    class itself. The fastest search for one sequence on a CPU: on arrays of this size most of a tensor operation's
    time is its dispatch.
    """
    every = slot_logits[0].float().softmax(-1).numpy()
    peak = every[:, :-1].max(0)
    pool = np.argpartition(peak, -size)[-size:] if size < len(peak) else np.arange(len(peak))
    probs = np.empty((len(every), size + 2), dtype=every.dtype)
    np.take(every, pool, axis=1, out=probs[:, :size])
    probs[:, size] = every[:, -1]
    np.maximum(1 - probs[:, : size + 1].sum(1), 0, out=probs[:, size + 1])
    key = values = None
    if context is not None:
        keys, root = context.keys.numpy(), context.root[0].numpy()
        values = np.empty((size + 2, len(root)), dtype=root.dtype)
        np.take(context.values.numpy(), pool, axis=0, out=values[:size])
        values[size] = context.values[-1].numpy()
        values[size + 1] = 0

        def key(last: int | None) -> Any:
            return root if last is None else keys[pool[last]]

    levels = len(every) if max_depth is None else max_depth
    nodes = _best_nodes(_Row(probs, key, values, merge), budget, levels)
    return _packed([nodes], (pool if ids is None else ids.numpy()[pool])[None], slot_logits.device)


def _packed(nodes: list[list[_Node]], pools: Any, device: torch.device) -> DraftTree:
    """The nodes of B rows as a tree; pools (B, M): the tokens of the labels."""
    rows: list[Any] = []
    log_probs: list[Any] = []
    for row, pool in zip(nodes, pools):
        labels, above, levels, scores = zip(*row)
        found = zip(pool.take(labels).tolist(), scores)
        rows.append([[token if p > -math.inf else 0 for token, p in found], above, levels])
        log_probs.append(scores)
    # By way of numpy, which takes lists in a fraction of the time.
    tokens, parents, depths = torch.from_numpy(np.array(rows, dtype=np.int64)).to(device).unbind(1)
    return DraftTree(tokens, parents, depths, torch.from_numpy(np.array(log_probs, dtype=np.float32)).to(device))


def _best_nodes(row: _Row, budget: int, levels: int) -> list[_Node]:
    """The best nodes, padded to the budget."""
    nodes: list[_Node] = []
    candidates: list[tuple[float, int, int, int, _Extensions]] = []  # no more than can still be taken; best last
    parent, depth, arrived, last = ROOT, 1, row.start, None
    while len(nodes) < budget:
        left = budget - len(nodes)
        if depth <= levels:
            found = _Extensions(row, arrived, last)
            least = candidates[0][0] if len(candidates) == left else MIN_PROB
            better = np.flatnonzero(found.probs > least)
            if len(better) > left:
                better = better[np.argpartition(found.probs[better], -left)[-left:]]
            if len(better):
                pairs = zip(found.probs[better].tolist(), better.tolist())
                candidates += [(p, label, parent, depth, found) for p, label in pairs]
                candidates.sort(key=itemgetter(0))
                del candidates[:-left]
        if not candidates:
            return nodes + [(0, ROOT, 1, -math.inf)] * left
        p, last, parent, depth, extensions = candidates.pop()
        arrived = extensions.arrived(last)
        nodes.append((last, parent, depth, math.log(p)))
        parent, depth = len(nodes) - 1, depth + 1
    return nodes
