"""Draft trees as SGLang's verification takes them: one row of tokens and one mask for each request.

Node 0 is the root, and node i + 1 the tree's node i. From the mask SGLang itself derives positions and the links
that its verification walks: node j is an ancestor of node i if mask[i, j] and j < i, the largest such j is the parent,
and children are tried in ascending order. So parents must come before their children, as they do in a DraftTree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..tree import ROOT, DraftTree
from .chains import Pass


@dataclass(frozen=True)
class Draft:
    """The root of a request and its draft tree, on the host: nodes as in DraftTree, maybe none."""

    root: int
    tokens: list[int]
    parents: list[int]

    @classmethod
    def of(cls, root: int, tree: DraftTree | None) -> Draft:
        """Of a tree of one row; None is the tree without nodes. Syncs with the device."""
        if tree is None:
            return cls(root, [], [])
        return cls(root, tree.tokens[0].tolist(), tree.parents[0].tolist())


def packed(drafts: Sequence[Draft], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (B * size,) int64 and mask (B * size * size,) bool, flat as SGLang passes them; mask[i, j]: i sees j.

    Trees are cut at size - 1 nodes, or filled up with children of the root that guess token 0.
    """
    tokens = np.zeros((len(drafts), size), dtype=np.int64)
    mask = np.zeros((len(drafts), size, size), dtype=bool)
    for row, draft in enumerate(drafts):
        tokens[row, 0], mask[row, 0, 0] = draft.root, True
        for node in range(1, size):
            parent = draft.parents[node - 1] if node <= len(draft.tokens) else ROOT
            if node <= len(draft.tokens):
                tokens[row, node] = draft.tokens[node - 1]
            mask[row, node] = mask[row, parent + 1]
            mask[row, node, node] = True
    return tokens.reshape(-1), mask.reshape(-1)


def accepted_nodes(draft: Draft, accepted: Sequence[int], size: int) -> list[int]:
    """The nodes whose target passes chose the `accepted` tokens, 0 (the root) first: one for each token.

    Every token but the last was drafted; of equal siblings the first was taken. Raises ValueError if the tokens are no
    path of the tree.
    """
    nodes = [0]
    known = list(zip(draft.tokens, draft.parents))[: size - 1]
    known += [(0, ROOT)] * (size - 1 - len(known))
    for token in accepted[:-1]:
        here = nodes[-1] - 1
        node = next((i for i, (t, p) in enumerate(known) if t == token and p == here), None)
        if node is None:
            raise ValueError(f"token {token} is no child of node {nodes[-1]} of the draft tree")
        nodes.append(node + 1)
    return nodes


def verified(
    request: str, start: int, row: int, draft: Draft, accepted: Sequence[int], features: torch.Tensor, size: int
) -> Pass:
    """What a verification computed for one request.

    start: position of the root; row: that of the root in features (T, F * hidden_size); accepted: the chosen tokens.
    """
    rows = torch.tensor([row + node for node in accepted_nodes(draft, accepted, size)], device=features.device)
    chosen = torch.tensor(list(accepted), device=features.device)
    return Pass(request, start, features.index_select(0, rows), chosen, size - 1)


def prompt_read(
    request: str, start: int, row: int, ids: torch.Tensor, following: int, features: torch.Tensor, longest: int
) -> Pass:
    """What reading a prompt, or a chunk of one, computed for one request.

    ids: (n,) the tokens at the positions start .. start + n - 1; following: the one after them; their features stand
    in features (T, F * hidden_size) from `row` on.
    """
    after = torch.tensor([following], device=ids.device, dtype=ids.dtype)
    tokens = torch.cat([ids[1:], after]).to(features.device, torch.long)
    return Pass(request, start, features[row : row + len(ids)], tokens, longest)
