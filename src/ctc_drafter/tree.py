"""The draft tree: candidate continuations of the root, packed in fixed-shape tensors.

The root (the last token the target chose) is not stored. Node indices count draft nodes from 0; the parent of a child
of the root is -1, and every parent comes before its children. Functions that include the root put it at index 0 and
shift the nodes by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROOT = -1
"""Parent index of a child of the root."""
FEW = 33
"""Rows of a mask that a loop on the host fills sooner than a few tensor operations do."""


@dataclass(frozen=True)
class DraftTree:
    """``budget`` draft nodes for each of B rows; a budget of 0 is plain decoding.

    tokens:    (B, M) long, the guessed token of each node.
    parents:   (B, M) long, index of the parent node, below the node's own; -1 is the root.
    depths:    (B, M) long, distance from the root, from 1: a node's position is the root's position + depth.
    log_probs: (B, M) float or None, the drafter's log P(the path from the root to this node); -inf on padding.

    Padding nodes are children of the root with token 0. They are guesses like any other, so they can never make the
    output wrong.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    log_probs: Tensor | None = None

    @property
    def budget(self) -> int:
        """Number of draft nodes in each row, root not counted."""
        return self.tokens.shape[1]

    @classmethod
    def empty(cls, batch: int, device: torch.device | str | None = None) -> DraftTree:
        """The tree without draft nodes: (batch, 0) tensors."""
        none = torch.zeros(batch, 0, dtype=torch.long, device=device)
        return cls(none, none, none)

    def path_of(self, tokens: Sequence[int]) -> list[int]:
        """The nodes that carry `tokens`, as far as they go down this tree of one row; of equal siblings the first."""
        node_of: dict[tuple[int, int], int] = {}
        for node, edge in enumerate(zip(self.parents[0].tolist(), self.tokens[0].tolist())):
            node_of.setdefault(edge, node)
        here, path = ROOT, []
        for token in tokens:
            below = node_of.get((here, token))
            if below is None:
                break
            here = below
            path.append(here)
        return path

    @classmethod
    def from_paths(
        cls, paths: Sequence[Sequence[Sequence[int]]], budget: int, device: torch.device | str | None = None
    ) -> DraftTree:
        """The trie of each row's token paths, in insertion order, cut at ``budget`` nodes and padded up to it.

        paths: for each row a list of token paths that start below the root. Shared prefixes are one node. A path that
        meets the full budget keeps the prefix that fitted. Raises ValueError if budget < 0.
        """
        if budget < 0:
            raise ValueError(f"budget must not be negative, got {budget}")
        rows = [_trie(row, budget) for row in paths]
        packed = torch.tensor(rows, dtype=torch.long, device=device).reshape(len(rows), 3, budget)
        tokens, parents, depths = packed.unbind(1)
        return cls(tokens, parents, depths)

    @classmethod
    def stack(cls, trees: Sequence[DraftTree]) -> DraftTree:
        """Trees of one row each as the rows of one tree, padded to the largest budget; without ``log_probs``."""
        if len(trees) == 1:
            return trees[0]
        budget = max(tree.budget for tree in trees)

        def rows(name: str, fill: int) -> Tensor:
            return torch.cat([_padded(getattr(tree, name), budget, fill) for tree in trees])

        return cls(rows("tokens", 0), rows("parents", ROOT), rows("depths", 1))

    def split(self) -> list[DraftTree]:
        """Each row as a tree of its own."""
        fields = [self.tokens, self.parents, self.depths] + ([] if self.log_probs is None else [self.log_probs])
        return [DraftTree(*(t[i : i + 1] for t in fields)) for i in range(len(self.tokens))]

    def ancestor_mask(self) -> Tensor:
        """Who sees whom: (B, M+1, M+1) bool, row = query, column = key, index 0 = root.

        True where the key is the query itself, one of its ancestors, or the root. With P[q, parent(q)] = 1 this is
        I + P + P^2 + ... = (I - P)^-1, and since parents come first, I - P is unit lower triangular: one triangular
        solve, exact in floating point because every entry of the solution is 0 or 1.
        """
        size = self.budget + 1
        if size <= FEW and len(self.tokens) == 1 and self.tokens.device.type == "cpu":
            return _ancestors(self.parents)
        identity = torch.eye(size, device=self.tokens.device)
        system = identity.repeat(self.tokens.shape[0], 1, 1)
        system[:, 1:].scatter_(2, (self.parents + 1).unsqueeze(2), -1.0)
        closure: Tensor = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
        return closure > 0.5

    def offsets(self) -> Tensor:
        """Position of root and nodes relative to the root: (B, M+1) long, the root's 0 first."""
        return torch.nn.functional.pad(self.depths, (1, 0))

    def best_paths(self) -> list[list[int]]:
        """For each row the tokens of the path from the root with the largest expected accepted length.

        That is the sum of the probabilities of its nodes, so the path goes on as long as the tree does; padding is no
        part of it. Raises ValueError without ``log_probs``. Syncs with the device.
        """
        if self.log_probs is None:
            raise ValueError("best_paths needs a tree with log_probs")
        rows = zip(self.tokens.tolist(), self.parents.tolist(), self.log_probs.float().exp().tolist())
        return [_best_path(*row) for row in rows]

    def check(self) -> None:
        """Raise ValueError, with the reason, if the tensors do not describe a tree. Syncs with the device."""
        shape = self.tokens.shape
        if len(shape) != 2 or any(t.shape != shape for t in (self.parents, self.depths)):
            raise ValueError(
                f"tokens, parents and depths must share one (B, M) shape, got {tuple(shape)}, "
                f"{tuple(self.parents.shape)}, {tuple(self.depths.shape)}"
            )
        if any(t.dtype != torch.long for t in (self.tokens, self.parents, self.depths)):
            raise ValueError("tokens, parents and depths must be of dtype long")
        if self.log_probs is not None and self.log_probs.shape != shape:
            raise ValueError(f"log_probs must be {tuple(shape)}, got {tuple(self.log_probs.shape)}")
        if bool((self.tokens < 0).any()):
            raise ValueError("tokens must not be negative")
        own = torch.arange(shape[1], device=self.parents.device)
        if bool(((self.parents < ROOT) | (self.parents >= own)).any()):
            raise ValueError("a parent must be -1 (the root) or come before its child")
        if not torch.equal(self.offsets().gather(1, self.parents + 1) + 1, self.depths):
            raise ValueError("a node's depth must be its parent's depth + 1")


def _ancestors(parents: Tensor) -> Tensor:
    """`DraftTree.ancestor_mask` for one row on the host: a node sees what its parent sees, and itself."""
    above = parents[0].tolist()
    seen = np.eye(len(above) + 1, dtype=bool)
    seen[:, 0] = True
    for node, parent in enumerate(above, 1):
        seen[node] |= seen[parent + 1]
    return torch.from_numpy(seen)[None]


def _best_path(tokens: list[int], parents: list[int], probs: list[float]) -> list[int]:
    worth: list[float] = []
    for parent, prob in zip(parents, probs):
        worth.append(prob + (worth[parent] if parent != ROOT else 0.0))
    node = max(range(len(worth)), key=worth.__getitem__, default=ROOT)
    if node != ROOT and worth[node] <= 0:
        return []
    path: list[int] = []
    while node != ROOT:
        path.append(tokens[node])
        node = parents[node]
    return path[::-1]


def _padded(row: Tensor, budget: int, fill: int) -> Tensor:
    missing = budget - row.shape[1]
    return torch.nn.functional.pad(row, (0, missing), value=fill) if missing else row


def _trie(paths: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """One row of ``from_paths``: [tokens, parents, depths], each of length ``budget``."""
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    node_of: dict[tuple[int, int], int] = {}
    for path in paths:
        parent = ROOT
        for depth, token in enumerate(path, start=1):
            node = node_of.get((parent, token))
            if node is None:
                if len(tokens) == budget:
                    break
                node = node_of[parent, token] = len(tokens)
                tokens.append(token)
                parents.append(parent)
                depths.append(depth)
            parent = node
    missing = budget - len(tokens)
    return [tokens + [0] * missing, parents + [ROOT] * missing, depths + [1] * missing]
