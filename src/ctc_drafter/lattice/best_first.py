"""The most probable prefixes by best-first search, on the host: the specification of ``lattice.prefix``, in arrays."""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from ctc_drafter.tree import ROOT, DraftTree

from .pool import MAX_BIAS, MIN_PROB, Lattice


class _Extensions:
    """All one-label extensions of a prefix: their probabilities, and where each would first emit its label."""

    def __init__(self, row: _Row, arrived: list[float], last: int | None) -> None:
        """arrived (N+1,): by position 0..N, the mass of the slot paths that first emit ``last`` there (0: no label)."""
        blank, self._weight = row.blank, None
        if row.keys is not None:
            bias = row.keys[row.size if last is None else last] @ row.values
            self._weight = np.exp(np.clip(bias, -MAX_BIAS, MAX_BIAS))
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

    def __init__(self, lattice: Lattice, row: int) -> None:
        self.merge, self.size = lattice.merge, lattice.pool.shape[1]
        self.probs: Any = lattice.logits[row].detach().softmax(-1).cpu().numpy()  # (N, C)
        self.labels, self.blank = self.probs[:, : self.size], self.probs[:, self.size]
        self.keys: Any = None if lattice.keys is None else lattice.keys[row].detach().cpu().numpy()
        self.values: Any = None if lattice.values is None else lattice.values[row].detach().T.contiguous().cpu().numpy()
        self.start = [1.0] + [0.0] * len(self.probs)


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
    table = _Row(lattice, row)
    arrived, last = table.start, None
    for label in sequence:
        arrived, last = _Extensions(table, arrived, last).arrived(label), label
    total = sum(arrived)
    return math.log(total) if total > 0 else -math.inf


def best_first(lattice: Lattice, budget: int, max_depth: int | None = None) -> DraftTree:
    """The ``budget`` most probable prefixes of every row as a draft tree, most probable first.

    Always extends the most probable prefix not yet extended, which is exact since a child is never more probable than
    its parent. Runs on the host: the fastest search for one sequence on a CPU. Missing candidates, and those below
    MIN_PROB, are padding. ``max_depth`` defaults to N.
    """
    levels = lattice.logits.shape[1] if max_depth is None else max_depth
    device = lattice.pool.device
    nodes = [_best_nodes(_Row(lattice, i), budget, levels) for i in range(len(lattice.pool))]
    labels, parents, depths = (
        torch.tensor([[node[k] for node in row] for row in nodes], device=device).view(-1, budget) for k in range(3)
    )
    log_probs = torch.tensor([[node[3] for node in row] for row in nodes], device=device).view(-1, budget)
    tokens = lattice.pool.gather(1, labels).masked_fill_(log_probs == -math.inf, 0)
    return DraftTree(tokens, parents, depths, log_probs)


def _best_nodes(row: _Row, budget: int, levels: int) -> list[tuple[int, int, int, float]]:
    """(pool index, parent, depth, log probability) of the best nodes, padded to the budget."""
    nodes: list[tuple[int, int, int, float]] = []
    candidates: list[tuple[float, int, int, int, _Extensions]] = []  # no more than can still be taken; best last
    parent, depth, arrived, last = ROOT, 1, row.start, None
    while len(nodes) < budget:
        left = budget - len(nodes)
        if depth <= levels:
            found = _Extensions(row, arrived, last)
            best = np.argpartition(found.probs, -left)[-left:] if left < row.size else np.arange(row.size)
            pairs = zip(found.probs[best].tolist(), best.tolist())
            candidates += [(p, label, parent, depth, found) for p, label in pairs if p > MIN_PROB]
            candidates.sort(key=itemgetter(0))
            del candidates[:-left]
        if not candidates:
            return nodes + [(0, ROOT, 1, -math.inf)] * left
        p, last, parent, depth, extensions = candidates.pop()
        arrived = extensions.arrived(last)
        nodes.append((last, parent, depth, math.log(p)))
        parent, depth = len(nodes) - 1, depth + 1
    return nodes
