"""The attention draft module: N slots in one parallel pass over the target's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError
from ..target.packing import linear_of
from .norm import RMSNorm, fold_norm, unit_norm


def fit_shape(config: Any, width: int) -> None:
    """Fill in what a config leaves open: `intermediate_size`, `heads`, `kv_heads`. Raises UserError for a misfit."""
    config.intermediate_size = config.intermediate_size or 2 * width
    config.heads = config.heads or max(1, width // 64)
    config.kv_heads = config.kv_heads or next(g for g in (config.heads // 3, 1) if g and config.heads % g == 0)
    if width % config.heads or width // config.heads % 2 or config.heads % config.kv_heads:
        raise UserError(
            f"A drafter of width {width} cannot have {config.heads} heads with {config.kv_heads} kv_heads: "
            "heads must divide the width into parts of even size, and kv_heads must divide heads."
        )


def rope_table(positions: int, dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (positions, dim), of rotary position embedding (Su et al. 2021), half-rotation layout.

    The sign of the rotation is in the first half of sin, so that `rotate` need not negate.
    """
    frequency = theta ** (-torch.arange(0, dim, 2).float() / dim)
    angle = torch.outer(torch.arange(positions).float(), frequency)
    return torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary embedding to x (..., dim) with cos, sin of `rope_table`, broadcastable to it."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, torch.cat([x[..., half:], x[..., :half]], -1), sin)


class DraftLayer(nn.Module):
    """A transformer layer whose slots attend to the context and to each other; the context itself is not updated.

    Keys and values of context and slots come from the same projection, so a committed pair costs one row of it.
    """

    def __init__(self, width: int, inner: int, heads: int, kv_heads: int, eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.norm = RMSNorm(width, eps)
        self.q = nn.Linear(width, heads * self.dim, bias=False)
        self.kv = nn.Linear(width, 2 * kv_heads * self.dim, bias=False)
        self.out = nn.Linear(heads * self.dim, width, bias=False)
        self.mlp_norm = RMSNorm(width, eps)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self._ready: tuple[nn.Linear, ...] = ()

    def prepare(self) -> list[nn.Linear]:
        """Join q, k, v in one product, fold the norms, for `heads_of` and `update`; the linear layers of these."""
        qkv = fold_norm(torch.cat([self.q.weight, self.kv.weight]), self.norm.weight)
        self._ready = linear_of(qkv), linear_of(fold_norm(self.gate_up.weight, self.mlp_norm.weight))
        return [*self._ready, self.out, self.down]

    def heads_of(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (1, n, width) -> queries (1, heads, n, dim), keys and values (1, kv_heads, n, dim), turned to positions."""
        every = self._ready[0](unit_norm(x)).unflatten(-1, (-1, self.dim)).transpose(1, 2)
        turned = rotate(every[:, : -self.kv_heads], cos, sin)
        return turned[:, : self.heads], turned[:, self.heads :], every[:, -self.kv_heads :]

    def update(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """`finish` with what `prepare` has folded."""
        x = x + self.out(attended)
        gate, up = self._ready[1](unit_norm(x)).chunk(2, -1)
        out: torch.Tensor = x + self.down(F.silu(gate) * up)
        return out

    def queries(self, normed: torch.Tensor) -> torch.Tensor:
        """(B, n, width) -> (B, heads, n, dim)."""
        heads: torch.Tensor = self.q(normed).unflatten(-1, (self.heads, self.dim))
        return heads.transpose(1, 2)

    def keys_values(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, n, width) -> keys and values, each (B, kv_heads, n, dim)."""
        both = self.kv(normed).unflatten(-1, (2 * self.kv_heads, self.dim)).transpose(1, 2)
        return both[:, : self.kv_heads], both[:, self.kv_heads :]

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Residual, output projection and MLP: x, attended (B, n, width) -> (B, n, width)."""
        x = x + self.out(attended)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        out: torch.Tensor = x + self.down(F.silu(gate) * up)
        return out


class DraftModule(nn.Module):
    """Fuse (feature, next token) pairs into a context, and run N slot queries over it.

    The pair j stands at position j + 1, that of its token; slot i of anchor t at position t + 2 + i. Of the newest pair
    p (which holds the root) the context is F p, and slot i starts from (F + A_i) p + e_i: the layers after it are the
    same for all slots, so that with e_i alone they tell the slots apart too little.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self, width: int, inner: int, heads: int, kv_heads: int, layers: int, slots: int, features: int, positions: int
    ) -> None:
        super().__init__()
        eps = 1e-6
        self.slots, self.features = slots, features
        self.feature_norm = nn.Parameter(torch.ones(features, width))
        self.fuse = nn.Linear((features + 1) * width, width, bias=False)
        self.slot_embedding = nn.Parameter(torch.randn(slots, width) * 0.02)
        own = [nn.Linear(self.fuse.in_features, width, bias=False) for _ in range(slots)]
        self.slot_layers: Any = nn.ModuleList(own)
        for linear in own:
            nn.init.zeros_(linear.weight)
        self.register_load_state_dict_pre_hook(_without_slot_layers)  # type: ignore[no-untyped-call]
        # Typed as what it holds; nn.ModuleList itself only knows Module.
        self.layers: Any = nn.ModuleList([DraftLayer(width, inner, heads, kv_heads, eps) for _ in range(layers)])
        self.norm = RMSNorm(width, eps)
        cos, sin = rope_table(positions + slots + 2, width // heads, 10_000.0)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._keys_values: torch.Tensor = torch.empty(0)
        self._length = 0
        self._ready: tuple[nn.Linear, ...] = ()

    def pairs(self, features: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """features (B, n, F * width), embeddings of the next tokens (B, n, width) -> (B, n, (F + 1) * width)."""
        parts = self._parts(features, embedded)
        return (F.rms_norm(parts, parts.shape[-1:], eps=1e-6) * self._gain()).flatten(-2)

    def _parts(self, features: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """(B, n, F + 1, width)."""
        parts: torch.Tensor = torch.cat([features, embedded], -1).unflatten(-1, (self.features + 1, -1))
        return parts

    def _gain(self) -> torch.Tensor:
        """Weight of each feature's norm, and 1 for that of the token: (F + 1, width)."""
        return F.pad(self.feature_norm, (0, 0, 0, 1), value=1.0)

    # ------------------------------------------------------------ inference

    def prepare(self) -> list[nn.Linear]:
        """Fold norms into the products after them, for the methods below; returns the linear layers that these use."""
        of_slots = torch.cat([self.fuse.weight + layer.weight for layer in self.slot_layers])
        self._ready = tuple(linear_of(fold_norm(weight, self._gain())) for weight in (self.fuse.weight, of_slots))
        return [*self._ready, *(linear for layer in self.layers for linear in layer.prepare())]

    def read(self, features: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """`pairs`, for the methods below, which know their norms."""
        return unit_norm(self._parts(features, embedded)).flatten(-2)

    def fused(self, pairs: torch.Tensor) -> torch.Tensor:
        """Pairs (..., (F + 1) * width) -> the context, (..., width)."""
        out: torch.Tensor = self._ready[0](pairs)
        return out

    @property
    def asking(self) -> nn.Linear:
        """What `ask` goes through, half of the weights, for the newest pair alone."""
        return self._ready[1]

    def ask(self, newest: torch.Tensor) -> torch.Tensor:
        """The newest pairs (B, (F + 1) * width) -> where their slots start, (B, N, width)."""
        of_slots: torch.Tensor = self.asking(newest).unflatten(-1, (self.slots, -1))
        return of_slots + self.slot_embedding

    def fold(self, head: torch.Tensor) -> torch.Tensor:
        """The weight (C, width) of an LM head that reads what `step` and `together` return."""
        return fold_norm(head, self.norm.weight)

    def start(self, capacity: int, like: torch.Tensor) -> None:
        """Make an empty key/value cache of `capacity` pairs in the dtype and on the device of `like`."""
        layer = self.layers[0]
        shape = (len(self.layers), 2, 1, layer.kv_heads, capacity + self.slots, layer.dim)
        self._keys_values = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self._length = 0

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` pairs in all; those that are there stay."""
        missing = capacity + self.slots - self._keys_values.shape[4]
        if missing > 0:
            self._keys_values = F.pad(self._keys_values, (0, 0, 0, missing))

    def rewind(self, length: int) -> None:
        """Forget all pairs but the first `length`."""
        self._length = length

    def held(self) -> tuple[int, list[torch.Tensor]]:
        """How many pairs the cache holds; keys and values of each layer in turn, (1, kv_heads, capacity, dim)."""
        return self._length, [plane for both in self._keys_values for plane in both]

    def grow(self, count: int) -> None:
        """`count` pairs more are in the cache, written there by another than `step`."""
        self._length += count

    @staticmethod
    def normed(x: torch.Tensor) -> torch.Tensor:
        """Slots after the last layer -> what `step` returns."""
        return unit_norm(x)

    def step(self, pairs: torch.Tensor) -> torch.Tensor:
        """Append pairs (1, n, .) of `read` to the cache and run slots after it: (1, N, width), for a head of `fold`."""
        start, n = self._length, pairs.shape[1]
        end = start + n + self.slots
        context, x = self.fused(pairs), self.ask(pairs[:, -1])
        cos, sin = self.cos[start + 1 : end + 1], self.sin[start + 1 : end + 1]
        for layer, (k_all, v_all) in zip(self.layers, self._keys_values):
            q, k, v = layer.heads_of(torch.cat([context, x], 1), cos, sin)
            k_all[:, :, start:end] = k
            v_all[:, :, start:end] = v
            q = q[:, :, n:]
            # The queries of a group stand one after another over the same keys, so that no key is copied.
            grouped = q.reshape(1, layer.kv_heads, -1, layer.dim)
            attended = F.scaled_dot_product_attention(grouped, k_all[:, :, :end], v_all[:, :, :end])
            x = layer.update(x, attended.reshape(q.shape).transpose(1, 2).flatten(-2))
        self._length = start + n
        return self.normed(x)

    def together(self, modules: Sequence[DraftModule], pairs: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """`step` of several modules that share weights: (B, N, width).

        pairs (1, sum of counts, .): each one's new pairs, one module after the other. Products with weights run
        over all of them at once; attention reads each one's own cache, so it goes one by one and nothing is padded.
        """
        size, slots, device = sum(counts), self.slots, pairs.device
        ends = [module._length + n for module, n in zip(modules, counts)]
        spans = [(end - n, end) for end, n in zip(ends, counts)] + [(end, end + slots) for end in ends]
        positions = torch.cat([torch.arange(a + 1, b + 1, device=device) for a, b in spans])
        cos, sin = self.cos[positions], self.sin[positions]
        context = self.fused(pairs)
        x = self.ask(pairs[0, torch.tensor(counts, device=device).cumsum(0) - 1])
        for index, layer in enumerate(self.layers):
            q, k, v = layer.heads_of(torch.cat([context, x.flatten(0, 1)[None]], 1), cos, sin)
            pieces = zip(
                modules,
                *(t[:, :, :size].split(list(counts), 2) for t in (k, v)),
                *(t[:, :, size:].split(slots, 2) for t in (k, v)),
                q[:, :, size:].split(slots, 2),
            )
            attended = torch.cat([module._attend_own(index, *piece) for module, *piece in pieces])
            x = layer.update(x, attended)
        for module, end in zip(modules, ends):
            module._length = end
        return self.normed(x)

    def _attend_own(
        self,
        index: int,
        k: torch.Tensor,
        v: torch.Tensor,
        k_slots: torch.Tensor,
        v_slots: torch.Tensor,
        q: torch.Tensor,
    ) -> torch.Tensor:
        """Append new pairs (1, G, n, d) to this layer's cache; the slots (1, ., N, d) attend -> (1, N, H * d)."""
        cache, start = self._keys_values[index], self._length
        middle = start + k.shape[2]
        end = middle + self.slots
        for all_slots, new, own in zip(cache, (k, v), (k_slots, v_slots)):
            all_slots[:, :, start:middle] = new
            all_slots[:, :, middle:end] = own
        grouped = q.reshape(1, k.shape[1], -1, k.shape[3])
        attended = F.scaled_dot_product_attention(grouped, cache[0, :, :, :end], cache[1, :, :, :end])
        return attended.reshape(q.shape).transpose(1, 2).flatten(-2)

    # ------------------------------------------------------------ training

    def forward(self, pairs: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """pairs (B, T, .), anchors (B, A) -> slots (B, A, N, width); the same numbers as `step`, many at once."""
        length, count = pairs.shape[1], anchors.shape[1]
        context = self.fuse(pairs)
        newest = pairs.gather(1, anchors[..., None].expand(-1, -1, pairs.shape[2]))
        own = torch.stack([layer(newest) for layer in self.slot_layers], -2)
        x = self.fuse(newest)[:, :, None] + own + self.slot_embedding
        positions = anchors[..., None] + 2 + torch.arange(self.slots, device=anchors.device)
        cos, sin = (t[positions].flatten(1, 2)[:, None] for t in (self.cos, self.sin))
        seen = torch.arange(length, device=anchors.device) <= anchors[..., None]
        for layer in self.layers:
            k_context, v_context = layer.keys_values(layer.norm(context))
            k_context = rotate(k_context, self.cos[1 : length + 1], self.sin[1 : length + 1])
            normed = layer.norm(x).flatten(1, 2)
            q = rotate(layer.queries(normed), cos, sin)
            k, v = layer.keys_values(normed)
            attended = _attend(q, k_context, v_context, rotate(k, cos, sin), v, seen)
            x = layer.finish(x, attended.unflatten(1, (count, self.slots)))
        out: torch.Tensor = self.norm(x)
        return out


def _without_slot_layers(module: DraftModule, weights: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Checkpoints from before `slot_layers` mean zeros by not having them."""
    if f"{prefix}slot_embedding" in weights and not any(name.startswith(f"{prefix}slot_layers.") for name in weights):
        for i, layer in enumerate(module.slot_layers):
            weights[f"{prefix}slot_layers.{i}.weight"] = torch.zeros_like(layer.weight)


def _attend(
    q: torch.Tensor,
    k_context: torch.Tensor,
    v_context: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    """Each anchor's slots over the context it has seen and over each other.

    q (B, H, A*N, d); k_context, v_context (B, G, T, d); k, v (B, G, A*N, d); seen (B, A, T) bool -> (B, A*N, H*d).
    """
    batch, heads, rows, dim = q.shape
    groups, count = k.shape[1], seen.shape[1]
    slots = rows // count
    q = q.view(batch, groups, heads // groups, count, slots, dim) * dim**-0.5
    k, v = (t.view(batch, groups, 1, count, slots, dim) for t in (k, v))
    far = torch.einsum("bghand,bgtd->bghant", q, k_context)
    far = far.masked_fill(~seen[:, None, None, :, None], -torch.inf)
    near = q @ k.transpose(-1, -2)
    weights = torch.cat([far, near], -1).float().softmax(-1).to(q.dtype)
    far, near = weights.split([far.shape[-1], slots], -1)
    out: torch.Tensor = torch.einsum("bghant,bgtd->bghand", far, v_context) + near @ v
    return out.permute(0, 3, 4, 1, 2, 5).reshape(batch, rows, heads * dim)
