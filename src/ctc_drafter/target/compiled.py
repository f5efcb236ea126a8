"""Passes of the target over one row as compiled programs, one for each number of nodes: an option, never taken unasked.

On a small model most of a pass is the dispatch of its operations; compiled, all that lies between the matrix products
runs in a few fused kernels, and nothing of a pass is Python. The number of slots is a dynamic dimension, so a program
serves texts of any length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ..cache import SlotCache
from ..errors import UserError
from ..tree import DraftTree
from . import attention, joint, masks, quantization
from .captured import Replayed, Run
from .masks import slot_mask
from .programs import key_of, program

if TYPE_CHECKING:
    from .model import Target

STEP = 64
"""A pass sees the cache in steps of so many slots, so that its views are seldom cut anew; the rest is masked."""


class _ViewLayer(CacheLayerMixin):
    """One layer's slots inside a pass: new entries go to `slots`, attention reads the first `size` of all."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.slots, self.size = keys, values, slots, size
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise RuntimeError("the slots are there before the pass")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.slots, key_states)
        self.values.index_copy_(2, self.slots, value_states)
        return self.keys[:, :, : self.size], self.values[:, :, : self.size]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.size, 0

    def get_seq_length(self) -> int:
        return 0  # positions are given

    def get_max_length(self) -> int:
        return self.size


class Pass(nn.Module):
    """`Target.score` of one row as a function of tensors alone: the step that is compiled, or captured on a GPU."""

    def __init__(self, target: Target, budget: int) -> None:
        super().__init__()
        self.model = target.model
        self._target = [target]  # a list hides it from what is exported
        self.joint = target.joint(single=budget == 0)

    def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """root (1, 1), nodes and depths (1, M), ancestors (1, M+1, M+1), length (), slots (S,), then planes.

        planes: keys and values of each layer in turn, (1, heads, capacity, width); the first S slots are read.
        Returns what `Target.score` does.
        """
        root, nodes, depths, ancestors, length, slots, *planes = arguments
        target = self._target[0]
        tokens, size = torch.cat([root, nodes], 1), slots.shape[0]
        new = length + torch.arange(tokens.shape[1], device=tokens.device)
        positions = (length + F.pad(depths, (1, 0))).clamp(max=target.max_context - 1)
        mask = target.mask_for(lambda window: slot_mask(window, positions, ancestors, length, size, target.dtype))
        cache = Cache(layers=[_ViewLayer(k, v, new, size) for k, v in zip(planes[::2], planes[1::2])])
        options = {"position_ids": positions, "attention_mask": mask, target.cache_name: cache, "use_cache": True}
        if self.joint is None:
            return target.forward(tokens, **options)
        with self.joint.used():
            return target.forward(tokens, **options)


class CompiledPass:
    """`Target.score` of one row with a fixed number of nodes and the feature layers that are captured now."""

    def __init__(self, target: Target, budget: int, cache: SlotCache) -> None:
        config = target.model.config
        module = Pass(target, budget)
        facts = (config.to_json_string(), str(target.dtype), str(target.device), budget, target.layers)
        products = None if module.joint is None else module.joint.way
        limits = (target.max_context, target.cache_name, products, target.quantized)
        code = [type(target.model), type(target), Pass, DraftTree, attention, joint, masks, quantization]
        key = key_of(code, *facts, *limits)
        self._slots = torch.empty(0, dtype=torch.long, device=target.device)
        arguments = self._arguments(*_no_nodes(budget, target.device), cache)
        free = torch.export.Dim.DYNAMIC
        dynamic = [None] * 5 + [{0: free}] + [{2: free}] * (len(arguments) - 6)
        self._program = program(module, arguments, dynamic, key)
        self._run: Run = self._program.run
        if target.device.type == "cuda":
            self._run = Replayed(self._run, changing=6)

    @property
    def found(self) -> bool:
        """Whether the program was on disk already."""
        return self._program.found

    def forget(self) -> None:
        """Remove the program from disk."""
        self._program.path.unlink(missing_ok=True)

    def _arguments(
        self, root: torch.Tensor, tree: DraftTree, ancestors: torch.Tensor, cache: SlotCache
    ) -> list[torch.Tensor]:
        needed = cache.length + tree.budget + 1
        if needed > cache.capacity:
            raise RuntimeError(f"{needed} entries do not fit into a cache with {cache.capacity} slots a row")
        size = min(-(-needed // STEP) * STEP, cache.capacity)
        if len(self._slots) != size:
            self._slots = torch.arange(size, device=root.device)
        length = torch.tensor(cache.length, device=root.device)
        return [root, tree.tokens, tree.depths, ancestors, length, self._slots, *cache.planes()]

    def __call__(
        self, root: torch.Tensor, tree: DraftTree, ancestors: torch.Tensor, cache: SlotCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `Target.score` returns."""
        logits, features = self._run(self._arguments(root, tree, ancestors, cache))
        return logits, features


@torch.inference_mode()
def compiled_pass(target: Target, budget: int, layers: tuple[int, ...]) -> CompiledPass:
    """Make the program for `budget` nodes and the features of `layers`. Raises UserError if that cannot be done."""
    before = target.layers
    target.capture(layers)
    try:
        cache = target.new_cache(2 * STEP + budget)
        target.prefill([0, 1, 2], cache)
        made = CompiledPass(target, budget, cache)
        if not _agrees(target, made, budget, cache) and made.found:
            made.forget()  # of a compiler or a library that has changed since
            made = CompiledPass(target, budget, cache)
        if not _agrees(target, made, budget, cache):
            made.forget()
            raise UserError(f"'{target.name}' gives other numbers when it is compiled here, so leave that out.")
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{target.name}' cannot be compiled here, so leave that out: {reason}") from None
    finally:
        target.capture(before)
    return made


def _agrees(target: Target, made: CompiledPass, budget: int, cache: SlotCache) -> bool:
    """Whether a branching tree scores as it does eagerly: compilers err, too."""
    parents = [(i - 1) // 2 for i in range(budget)]
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    tokens = [(3 + i) % target.vocab_size for i in range(budget)]
    tree = DraftTree(
        *(torch.tensor([row], dtype=torch.long, device=target.device) for row in (tokens, parents, depths))
    )
    root = torch.full((1, 1), 2, device=target.device)
    arguments = root, tree, tree.ancestor_mask(), cache
    bound = 1e-3 if target.dtype == torch.float32 else 0.1
    # Spelled so that what is not a number is not within the bound.
    return all(
        float((one - other).abs().max()) <= bound * float(other.abs().max())
        for one, other in zip(made(*arguments), target.score(*arguments))
        if other.numel()
    )


def _no_nodes(budget: int, device: torch.device) -> tuple[torch.Tensor, DraftTree, torch.Tensor]:
    """A root and a tree of padding."""
    nothing = torch.zeros(1, budget, dtype=torch.long, device=device)
    tree = DraftTree(nothing, nothing - 1, nothing + 1)
    return nothing.new_zeros(1, 1), tree, tree.ancestor_mask()
