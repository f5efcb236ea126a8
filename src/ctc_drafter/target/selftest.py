"""The test that every target passes at load: a tree scored in one pass gives what its branches give one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from ..tree import DraftTree
from .masks import layer_kinds

if TYPE_CHECKING:
    from .model import Target


@torch.inference_mode()
def self_test(target: Target) -> None:
    """Score a tree in one pass and branch by branch, also after compaction; raise UserError if they differ."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(min(max(target.vocab_size, 16), 1000), generator=generator)
    ids = (order[:16] % target.vocab_size).tolist()
    prompt, root, nodes, after = ids[:8], ids[8], ids[9:14], ids[14]
    paths = [[nodes[0], nodes[1], nodes[2]], [nodes[0], nodes[3]], [nodes[4]]]
    advice = "it can only be used by its own generate()"
    odd = layer_kinds(target.config) - {"full_attention", "sliding_attention", "global"}
    if odd:
        raise UserError(
            f"'{target.name}' ({target.config.model_type}) has layers of kind {', '.join(sorted(odd))}, which cannot "
            f"take a tree mask, so {advice}."
        )
    try:
        tree = DraftTree.from_paths([paths], budget=5, device=target.device)
        cache = target.new_cache(32)
        first = torch.tensor([[root]], device=target.device)
        target.prefill(prompt, cache)
        ancestors = tree.ancestor_mask()
        scored, _ = target.score(first, tree, ancestors, cache)
        pairs = [(scored[0, 0], prompt + [root])]
        tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
        for i in range(5):
            branch: list[int] = []
            node = i
            while node >= 0:
                branch.insert(0, tokens[node])
                node = parents[node]
            pairs.append((scored[0, i + 1], prompt + [root] + branch))
        second = tokens.index(nodes[3])
        cache.keep([[0, tokens.index(nodes[0]) + 1, second + 1]])
        empty = DraftTree.empty(1, target.device)
        last, _ = target.score(torch.tensor([[after]], device=target.device), empty, empty.ancestor_mask(), cache)
        pairs.append((last[0, 0], prompt + [root, nodes[0], nodes[3], after]))
        worst = max(_deviation(target, got, text) for got, text in pairs)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"'{target.name}' ({target.config.model_type}) cannot take a tree mask, so {advice}: {reason}"
        ) from None
    if not all(bool(got.isfinite().all()) for got, _ in pairs):
        raise UserError(
            f"'{target.name}' ({target.config.model_type}) gives logits that are not finite: its weights are damaged, "
            f"or too large for {str(target.dtype).removeprefix('torch.')}."
        )
    limit = 1e-3 if target.dtype == torch.float32 else 0.1
    if not worst < limit:
        raise UserError(
            f"'{target.name}' ({target.config.model_type}) scores a draft tree differently from its branches "
            f"(off by {worst:.2g} of the logits' spread, limit {limit:g}), so {advice}."
        )


def _deviation(target: Target, got: torch.Tensor, text: list[int]) -> float:
    want = target.model(input_ids=torch.tensor([text], device=target.device), use_cache=False).logits[0, -1].float()
    return float((got.float() - want).abs().max() / want.std().clamp_min(1e-6))
