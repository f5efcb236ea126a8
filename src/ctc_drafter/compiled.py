"""Passes of the target over one row as compiled graphs, one for each number of nodes: an option, never taken unasked.

On a small model most of a pass is the dispatch of its operations; compiled, all that lies between the matrix products
runs in a few fused kernels. The number of slots is a dynamic dimension, so a graph serves texts of any length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._inductor import config
from transformers.cache_utils import Cache, CacheLayerMixin

from .cache import SlotCache
from .errors import UserError
from .masks import slot_mask
from .packing import MAX_BYTES
from .tree import DraftTree

if TYPE_CHECKING:
    from .target import Target

STEP = 64
"""A pass sees the cache in steps of so many slots, so that its views are seldom cut anew; the rest is masked."""


class _ViewLayer(CacheLayerMixin):
    """One layer's slots inside a graph: new entries go to `slots`, attention reads the whole view."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.slots = keys, values, slots
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise RuntimeError("the slots are there before the pass")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.slots, key_states)
        self.values.index_copy_(2, self.slots, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        return 0  # positions are given

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2]


class CompiledPass:
    """`Target.score` of one row with a fixed number of nodes and the feature layers that are captured now.

    The graph is made at the first call. On a CPU it may hold a copy of the weights, arranged for its products as
    `packing` does it: in float32 for several nodes (a single one is faster with plain weights), in bfloat16 always.
    """

    def __init__(self, target: Target, budget: int) -> None:
        weights = sum(p.nbytes for p in target.model.parameters())
        rearranged = budget > 0 or target.dtype == torch.bfloat16
        self._frozen = target.device.type == "cpu" and rearranged and weights <= MAX_BYTES
        self._made = False

        def run(
            root: torch.Tensor,
            nodes: torch.Tensor,
            depths: torch.Tensor,
            ancestors: torch.Tensor,
            length: torch.Tensor,
            views: Sequence[tuple[torch.Tensor, torch.Tensor]],
        ) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = torch.cat([root, nodes], 1)
            slots = length + torch.arange(tokens.shape[1], device=tokens.device)
            positions = (length + torch.nn.functional.pad(depths, (1, 0))).clamp(max=target.max_context - 1)
            size, dtype = views[0][0].shape[2], target.dtype
            mask = target.mask_for(lambda window: slot_mask(window, positions, ancestors, length, size, dtype))
            cache = Cache(layers=[_ViewLayer(keys, values, slots) for keys, values in views])
            options = {"position_ids": positions, "attention_mask": mask, target.cache_name: cache}
            return target.forward(tokens, use_cache=True, **options)

        # torch counts recompilations by code object; each pass has its own.
        run.__code__ = run.__code__.replace()
        self._run: Any = torch.compile(run, fullgraph=True, dynamic=False, options={"guard_filter_fn": _of_shapes})

    def __call__(
        self, root: torch.Tensor, tree: DraftTree, ancestors: torch.Tensor, cache: SlotCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `Target.score` returns."""
        needed = cache.length + tree.budget + 1
        if needed > cache.capacity:
            raise RuntimeError(f"{needed} entries do not fit into a cache with {cache.capacity} slots a row")
        views = cache.views(min(-(-needed // STEP) * STEP, cache.capacity))
        length = torch.tensor(cache.length, device=root.device)
        arguments = (root, tree.tokens, tree.depths, ancestors, length, views)
        out: tuple[torch.Tensor, torch.Tensor]
        if self._made:
            out = self._run(*arguments)
        else:
            with config.patch(freezing=self._frozen):
                out = self._run(*arguments)
            self._made = True
        return out


@torch.inference_mode()
def compiled_pass(target: Target, budget: int, layers: tuple[int, ...]) -> CompiledPass:
    """Make the graph for `budget` nodes and the features of `layers`. Raises UserError if that cannot be done."""
    before = target.layers
    target.capture(layers)
    try:
        made = CompiledPass(target, budget)
        cache = target.new_cache(2 * STEP + budget)
        target.prefill([0], cache)
        nothing = torch.zeros(1, budget, dtype=torch.long, device=target.device)
        tree = DraftTree(nothing, nothing - 1, nothing + 1)
        made(nothing.new_zeros(1, 1), tree, tree.ancestor_mask(), cache)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{target.name}' cannot be compiled here, so leave that out: {reason}") from None
    finally:
        target.capture(before)
    return made


def _of_shapes(guards: Sequence[Any]) -> list[bool]:
    """Keep the guards on dynamic shapes: to check that no weight was replaced takes a tenth of a small model's pass."""
    return [guard.guard_type == "SHAPE_ENV" for guard in guards]
