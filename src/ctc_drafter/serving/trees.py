"""The draft tree of a step as people can read it."""

from __future__ import annotations

import math
from typing import Any

from ..steps import Step
from ..tree import ROOT


def tree_nodes(step: Step, tokenizer: Any) -> list[dict[str, Any]]:
    """One entry per draft node, padding left out: text, parent (its place here; -1 is the root), accepted, log_prob.

    `accepted` marks the path that the target took, as far as its tokens were emitted.
    """
    tree = step.tree
    if tree is None:
        return []
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    log_probs = [None] * len(tokens) if tree.log_probs is None else tree.log_probs[0].tolist()
    taken = set(tree.path_of(step.tokens[: step.accepted]))
    places: dict[int, int] = {ROOT: ROOT}
    out: list[dict[str, Any]] = []
    for node, (token, parent, value) in enumerate(zip(tokens, parents, log_probs, strict=True)):
        if value == -math.inf or parent not in places:
            continue
        places[node] = len(out)
        entry = {"text": tokenizer.decode([token]), "parent": places[parent], "accepted": node in taken}
        out.append(entry | {"log_prob": None if value is None else round(value, 4)})
    return out
