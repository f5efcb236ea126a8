"""The pass of a parallel drafter as a compiled program: an option, made together with the target's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..target import joint
from ..target.captured import Replayed, Run
from ..target.compiled import STEP
from ..target.joint import Joint, JointLinears, fastest_way
from ..target.programs import key_of, program
from . import attention, norm
from .attention import DraftModule

if TYPE_CHECKING:
    from .slots import SlotDrafter


class Draft(nn.Module):
    """`SlotDrafter.draft` for a fixed number R of pairs, of which the first `count` are real, as a function of tensors.

    The others are computed and left behind: what they write lies behind the cache's end and is masked.
    """

    def __init__(self, drafter: SlotDrafter, linears: list[nn.Linear]) -> None:
        super().__init__()
        self.module: DraftModule = drafter.module
        self.embedding = drafter.target.embedding
        single = self.module.asking
        several, dtype = [linear for linear in linears if linear is not single], single.weight.dtype
        self.joint = JointLinears([Joint([linear]) for linear in several], fastest_way(dtype, single=False))
        self.single = JointLinears([Joint([single])], fastest_way(dtype, single=True))
        self._drafter = [drafter]  # a list hides it from what is exported

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        """features (1, R, F * width), next tokens (1, R), count (), start (), slots (S,), then keys and values.

        Keys and values of each layer in turn, (1, kv_heads, capacity, dim), hold `start` pairs; the first S slots are
        read. Returns the slot logits, (1, N, K + 1).
        """
        features, tokens, count, start, slots, *planes = arguments
        module, device = self.module, tokens.device
        rows, size, queries = tokens.shape[1], slots.shape[0], torch.arange(module.slots, device=device)
        pairs = start + torch.arange(rows, device=device)
        own = start + count + queries
        with self.joint.used(), self.single.used():
            read = module.read(features, self.embedding(tokens).to(features.dtype))
            context, x = module.fused(read), module.ask(read[0].index_select(0, (count - 1)[None]))
            positions = torch.cat([pairs, own]) + 1
            cos, sin = module.cos[positions], module.sin[positions]
            mask = torch.zeros(size, dtype=context.dtype, device=device)
            mask = mask.masked_fill(slots >= start + count + module.slots, torch.finfo(context.dtype).min)
            for layer, k_all, v_all in zip(module.layers, planes[::2], planes[1::2]):
                q, k, v = layer.heads_of(torch.cat([context, x], 1), cos, sin)
                for plane, new in ((k_all, k), (v_all, v)):
                    plane.index_copy_(2, pairs, new[:, :, :rows])
                    plane.index_copy_(2, own, new[:, :, rows:])  # over what the pairs that are not real have left
                grouped = q[:, :, rows:].reshape(1, layer.kv_heads, -1, layer.dim)
                seen = mask.expand(1, 1, grouped.shape[2], size)
                attended = F.scaled_dot_product_attention(grouped, k_all[:, :, :size], v_all[:, :, :size], seen)
                attended = attended.reshape(1, layer.heads, module.slots, layer.dim)
                x = layer.update(x, attended.transpose(1, 2).flatten(-2))
            return self._drafter[0].slot_logits(module.normed(x))


class CompiledDraft:
    """`SlotDrafter.draft` for up to `pairs` new pairs."""

    def __init__(self, drafter: SlotDrafter, linears: list[nn.Linear]) -> None:
        """Raises what torch raises if that cannot be compiled."""
        target, module = drafter.target, drafter.module
        self.pairs = drafter.proposed_tokens + 1
        self._slots = torch.empty(0, dtype=torch.long, device=target.device)
        made = Draft(drafter, linears)
        width = target.hidden_size * len(drafter.feature_layers)
        self._features = torch.zeros(1, self.pairs, width, dtype=drafter.dtype, device=target.device)
        self._tokens = torch.zeros(1, self.pairs, dtype=torch.long, device=target.device)
        kind = type(drafter)
        dtypes = str(target.dtype), str(drafter.dtype)
        facts = (drafter.config.__dict__, *dtypes, str(target.device), target.vocab_size, len(module.cos))
        ways = made.joint.way, made.single.way
        key = key_of([kind, *kind.__mro__[1:3], Draft, attention, norm, joint], kind.__name__, *facts, *ways)
        drafter.start(STEP)
        arguments = self._arguments(module, self._features, self._tokens)
        free: Any = torch.export.Dim.DYNAMIC
        dynamic = [None] * 4 + [{0: free}] + [{2: free}] * (len(arguments) - 5)
        self._program = program(made, arguments, dynamic, key)
        self._run: Run = self._program.run
        if target.device.type == "cuda":
            self._run = Replayed(self._run, changing=5)

    def _arguments(self, module: DraftModule, features: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
        count, device = tokens.shape[1], tokens.device
        if count < self.pairs:
            # What the places behind the real pairs hold does not matter, as long as it is finite.
            self._features[:, :count], self._tokens[:, :count] = features, tokens
            features, tokens = self._features, self._tokens
        start, planes = module.held()
        capacity = planes[0].shape[2]
        needed = start + self.pairs + module.slots
        size = min(-(-needed // STEP) * STEP, capacity)
        if len(self._slots) != size:
            self._slots = torch.arange(size, device=device)
        numbers = torch.tensor([count, start], device=device)
        return [features, tokens, numbers[0], numbers[1], self._slots, *planes]

    def __call__(self, module: DraftModule, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Slot logits (1, N, K + 1) after these pairs, 1 to `pairs` of them, which `module` then holds."""
        arguments = self._arguments(module, features, tokens)
        module.grow(tokens.shape[1])
        logits: torch.Tensor = self._run(arguments)[0]
        return logits
