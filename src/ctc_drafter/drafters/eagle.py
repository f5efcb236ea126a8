"""The EAGLE drafter: one decoder layer that predicts the target's next feature from the last one (Li et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..lattice.loss import ctc_loss
from ..target import LAST, Target
from ..target.packing import PackedLinears, linear_of
from ..tree import DraftTree
from .attention import DraftLayer, fit_shape, rope_table, rotate
from .base import IGNORE, TrainableDrafter, register
from .rollout import grow
from .slots import MAX_LOGITS, expected_acceptance

FEATURE_WEIGHT, TOKEN_WEIGHT = 1.0, 0.1
"""Weights of EAGLE-1's two losses."""
CTC_SLOTS, CTC_LABELS = 6, 3
"""Consecutive positions and labels of the auxiliary CTC loss, as in the released code of CTC-drafter."""


@dataclass
class EagleConfig:
    """Shape, objective and search of an EAGLE drafter."""

    intermediate_size: int = 0
    """0: twice the hidden size."""
    heads: int = 0
    """0: one for every 64 of the hidden size."""
    kv_heads: int = 0
    """0: a third of the heads (at least one)."""
    steps: int = 5
    """Depth of the tree: features predicted one after another."""
    beam: int = 8
    """Nodes of each level that are expanded."""
    noise: float = 0.1
    """Bound of the uniform noise on trained features, in units of each one's root mean square (EAGLE-1: absolute)."""
    ctc_weight: float = 0.0
    """Weight of the auxiliary CTC loss (0.01 in the released code of CTC-drafter); 0: none, and no blank."""
    vocabulary: int = 0
    """Draft only the most frequent tokens of the training answers; 0: all. Exactness is untouched."""

    def __post_init__(self) -> None:
        if min(self.steps, self.beam) < 1:
            raise ValueError("steps and beam must be at least 1")
        if min(self.intermediate_size, self.heads, self.kv_heads, self.vocabulary) < 0:
            raise ValueError("intermediate_size, heads, kv_heads and vocabulary must not be negative")
        if self.noise < 0 or self.ctc_weight < 0:
            raise ValueError("noise and ctc_weight must not be negative")


class _Level(NamedTuple):
    """The expanded nodes of a level: predicted features (1, W, width), and which expanded nodes each sees (1, W, S)."""

    features: torch.Tensor
    seen: torch.Tensor
    depth: int


class EagleModule(nn.Module):
    """Pairs (f_j, x_{j+1}) in, predicted features of x_{j+1} out; pair j stands at position j and sees pairs 0..j.

    A drafted token is a pair too, with the feature that was predicted for its parent in place of the target's own.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, width: int, inner: int, heads: int, kv_heads: int, positions: int) -> None:
        super().__init__()
        self.fuse = nn.Linear(2 * width, width, bias=False)
        # Typed as what it holds; nn.ModuleList itself only knows Module.
        self.layers: Any = nn.ModuleList([DraftLayer(width, inner, heads, kv_heads, 1e-6)])
        cos, sin = rope_table(positions, width // heads, 10_000.0)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._keys_values = torch.empty(0)
        self.length = 0
        """Committed pairs in the cache."""

    def pairs(self, features: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """features and embeddings of the next tokens, each (..., width) -> (..., width)."""
        normed = F.rms_norm(embedded, embedded.shape[-1:], eps=1e-6)
        out: torch.Tensor = self.fuse(torch.cat([normed, features], -1))
        return out

    # ------------------------------------------------------------ inference

    def prepare(self) -> list[nn.Linear]:
        """Prepare the layer; returns the linear layers that the methods below use."""
        return [self.fuse, *self.layers[0].prepare()]

    def start(self, capacity: int, drafted: int, like: torch.Tensor) -> None:
        """Make an empty key/value cache of `capacity` pairs and `drafted` nodes, of the dtype and device of `like`."""
        layer = self.layers[0]
        shape = (2, 1, layer.kv_heads, capacity + drafted, layer.dim)
        self._keys_values = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.length = 0

    def append(self, pairs: torch.Tensor) -> torch.Tensor:
        """Commit pairs (1, n, width); returns the feature predicted from the newest, (1, 1, width).

        With a single layer nothing reads the outputs of earlier pairs, so only the newest asks, and it may see all.
        """
        begin, self.length = self.length, self.length + pairs.shape[1]
        rope = slice(begin, self.length)
        return self._run(pairs, begin, self.cos[rope], self.sin[rope], 1, None)

    def branch(self, pairs: torch.Tensor, depth: int, seen: torch.Tensor) -> torch.Tensor:
        """Predicted features (1, W, width) of W nodes at `depth`: pairs (1, W, width), seen (1, W, S) bool.

        The S nodes of this roll-out lie behind the committed pairs, which every node sees; the next roll-out or commit
        overwrites them.
        """
        width, nodes = seen.shape[1:]
        rope = slice(self.length + depth - 1, self.length + depth)
        mask = F.pad(seen, (self.length, 0), value=True)
        begin = self.length + nodes - width
        return self._run(pairs, begin, self.cos[rope], self.sin[rope], width, mask)

    def _run(
        self,
        pairs: torch.Tensor,
        begin: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        asking: int,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write pairs (1, n, width) at `begin` of the cache; the last `asking` of them attend to all under `mask`."""
        layer, end = self.layers[0], begin + pairs.shape[1]
        k_all, v_all = self._keys_values
        q, k, v = layer.heads_of(pairs, cos, sin)
        k_all[:, :, begin:end] = k
        v_all[:, :, begin:end] = v
        q = q[:, :, -asking:]
        # The queries of a group stand one after another over the same keys, so that no key is copied.
        share = layer.heads // layer.kv_heads
        grouped = q.reshape(1, layer.kv_heads, share * asking, layer.dim)
        tiled = None if mask is None else mask.repeat(1, share, 1)[:, None]
        attended = F.scaled_dot_product_attention(grouped, k_all[:, :, :end], v_all[:, :, :end], attn_mask=tiled)
        out: torch.Tensor = layer.update(pairs[:, -asking:], attended.reshape(q.shape).transpose(1, 2).flatten(-2))
        return out

    # ------------------------------------------------------------ training

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        """pairs (B, T, width) -> the feature predicted from each, (B, T, width); the same numbers as `append`."""
        layer, length = self.layers[0], pairs.shape[1]
        normed = layer.norm(pairs)
        k, v = layer.keys_values(normed)
        q, k = (rotate(t, self.cos[:length], self.sin[:length]) for t in (layer.queries(normed), k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: torch.Tensor = layer.finish(pairs, attended.transpose(1, 2).flatten(-2))
        return out

    def follow(
        self, pairs: torch.Tensor, features: torch.Tensor, anchors: torch.Tensor, said: torch.Tensor
    ) -> list[torch.Tensor]:
        """Roll out along given tokens: the same numbers as `branch`, at many anchors and one branch each.

        pairs (B, T, width): committed; anchors (B, A); features (B, A, width): predicted there; said (B, A, n, width):
        embeddings of the tokens after the root. Returns the features predicted from the root and from each of them.
        """
        layer, length = self.layers[0], pairs.shape[1]
        k_far, v_far = layer.keys_values(layer.norm(pairs))
        far = rotate(k_far, self.cos[:length], self.sin[:length]), v_far
        seen = torch.arange(length, device=anchors.device) <= anchors[..., None]
        out: list[torch.Tensor] = [features]
        near: list[tuple[torch.Tensor, torch.Tensor]] = []
        for depth, embedded in enumerate(said.unbind(2), 1):
            x = self.pairs(out[-1], embedded)
            normed = layer.norm(x)
            cos, sin = (t[anchors + depth][:, None] for t in (self.cos, self.sin))
            k, v = layer.keys_values(normed)
            near.append((rotate(k, cos, sin), v))
            attended = _attend_branch(rotate(layer.queries(normed), cos, sin), far, near, seen)
            out.append(layer.finish(x, attended))
        return out


def _attend_branch(
    q: torch.Tensor,
    far: tuple[torch.Tensor, torch.Tensor],
    near: list[tuple[torch.Tensor, torch.Tensor]],
    seen: torch.Tensor,
) -> torch.Tensor:
    """Each anchor's newest node over the context it has seen and over its own branch: q (B, H, A, d) -> (B, A, H * d).

    far: keys and values (B, G, T, d); near: of each node of the branch, (B, G, A, d); seen (B, A, T) bool.
    """
    k_near, v_near = (torch.stack(parts, 3) for parts in zip(*near))
    grouped = q.unflatten(1, (k_near.shape[1], -1)) * q.shape[-1] ** -0.5
    away = torch.einsum("bgsad,bgtd->bgsat", grouped, far[0]).masked_fill(~seen[:, None, None], -torch.inf)
    own = torch.einsum("bgsad,bgand->bgsan", grouped, k_near)
    weights = torch.cat([away, own], -1).float().softmax(-1).to(q.dtype)
    away, own = weights.split([away.shape[-1], own.shape[-1]], -1)
    out = torch.einsum("bgsat,bgtd->bgsad", away, far[1]) + torch.einsum("bgsan,bgand->bgsad", own, v_near)
    return out.flatten(1, 2).transpose(1, 2).flatten(-2)


@register("eagle")
class EagleDrafter(TrainableDrafter):
    """Autoregression over features: f'_{j+1} = layer(f_0..f_j, x_1..x_{j+1}), P(x_{j+2} | ..) = softmax(W f'_{j+1}).

    W is the target's frozen LM head on the kept tokens. The tree is grown as in EAGLE-2, with tree attention.
    """

    config_class = EagleConfig
    config: EagleConfig
    feature_layers = (LAST,)

    def __init__(self, config: EagleConfig, target: Target) -> None:
        super().__init__(config, target)
        width = target.hidden_size
        fit_shape(config, width)
        positions = target.max_context + config.steps + 2
        self.module = EagleModule(width, config.intermediate_size, config.heads, config.kv_heads, positions)
        if config.ctc_weight:
            self.blank = nn.Parameter(torch.zeros(1, width))
        self._ready: tuple[nn.Linear, ...] = ()  # the LM head, hidden from parameters() and state_dict()

    @property
    def proposed_tokens(self) -> int:
        return self.config.steps

    @property
    def proposed_labels(self) -> int:
        return self.config.steps

    # ------------------------------------------------------------ inference

    @torch.no_grad()
    def prepare(self) -> None:
        super().prepare()
        self._ready = (linear_of(self.kept_head()),)
        packed = PackedLinears([*self._ready, *self.module.prepare()])
        packed.prepare(self.config.beam)

    def start(self, capacity: int) -> None:
        self.module.start(capacity, self.config.beam * (self.config.steps - 1), self.module.fuse.weight)

    def draft(self, features: torch.Tensor, next_tokens: torch.Tensor) -> torch.Tensor:
        """The root's predicted feature, (1, 1, width)."""
        return self.module.append(self.module.pairs(features.to(self.dtype), self.embed(next_tokens)))

    def tree(self, guess: torch.Tensor, budget: int) -> DraftTree:
        if budget == 0:
            return DraftTree.empty(1, guess.device)
        root = _Level(guess, torch.ones(1, 1, 0, dtype=torch.bool, device=guess.device), 0)
        first, config = self._log_probs(guess)[:, 0], self.config
        return grow(first, root, self._expand, self.kept, budget=budget, levels=config.steps, beam=config.beam)

    def _expand(self, level: _Level, parents: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, _Level]:
        """Read the chosen children of a level, siblings unseen by each other; see `rollout.Expand`."""
        features, seen = (t.gather(1, parents[..., None].expand(-1, -1, t.shape[2])) for t in level[:2])
        own = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)[None]
        seen, depth = torch.cat([seen, own], 2), level.depth + 1
        features = self.module.branch(self.module.pairs(features, self.embed(tokens)), depth, seen)
        return self._log_probs(features), _Level(features, seen, depth)

    def _log_probs(self, features: torch.Tensor) -> torch.Tensor:
        """(1, W, width) -> (1, W, K)."""
        logits: torch.Tensor = self._ready[0](features)
        return logits.float().log_softmax(-1)

    # ------------------------------------------------------------ training

    def train_loss(
        self,
        features: torch.Tensor,
        token_ids: torch.Tensor,
        anchors: torch.Tensor,
        labels: torch.Tensor,
        possible: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """EAGLE-1's loss on all `possible` positions: Smooth-L1 of the feature and soft cross-entropy of the token.

        The metric `expected_accepted` needs a roll-out, so it is given only where no gradient is taken.
        """
        wanted, positions = features[:, 1:], possible[:, :-1]
        embedded, head = self.embed(token_ids[:, 1:]), self.kept_head()
        pairs = self.module.pairs(self._noisy(features[:, :-1], anchors), embedded)
        predicted = self.module(pairs)
        mine, theirs = predicted[positions], wanted[positions]
        count = max(1, len(mine))
        loss = FEATURE_WEIGHT * F.smooth_l1_loss(mine, theirs, reduction="none").mean(-1).sum() / count
        loss = loss + TOKEN_WEIGHT * _soft_cross_entropy(mine, theirs, head) / count
        if self.config.ctc_weight:
            loss = loss + self.config.ctc_weight * self._ctc_loss(predicted, token_ids, anchors, positions, head)
        return loss, self._metrics(pairs, predicted, anchors, labels, head, deep=not torch.is_grad_enabled())

    def loss_weight(self, anchors: torch.Tensor, labels: torch.Tensor, possible: torch.Tensor) -> float:
        return float(possible[:, :-1].sum())

    def _noisy(self, features: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Features as a roll-out might predict them; the noise depends on the anchors, so that resuming repeats it."""
        if not (self.config.noise and torch.is_grad_enabled()):
            return features
        generator = torch.Generator(features.device).manual_seed(int(anchors.sum()))
        noise = 2 * torch.rand(features.shape, generator=generator, device=features.device) - 1
        scale = self.config.noise * features.float().pow(2).mean(-1, keepdim=True).sqrt()
        return features + (noise * scale).to(features.dtype)

    def _ctc_loss(
        self,
        predicted: torch.Tensor,
        token_ids: torch.Tensor,
        anchors: torch.Tensor,
        positions: torch.Tensor,
        head: torch.Tensor,
    ) -> torch.Tensor:
        """CTC of teacher-forced predictions at six positions from each anchor, all in the answer, against three tokens.

        predicted (B, T - 1, width); positions (B, T - 1) bool. Returns the mean over anchors of nats per label. The
        released code does this at every position, with the target's choices for labels and <unk> for blank.
        """
        index = anchors[..., None] + torch.arange(CTC_SLOTS, device=anchors.device)
        rows = torch.arange(len(anchors), device=anchors.device)[:, None, None]
        whole = F.pad(positions, (0, CTC_SLOTS))[rows, index].all(-1).flatten()
        index = index.clamp_max(positions.shape[1] - 1)
        logits = F.linear(predicted[rows, index].flatten(0, 1), torch.cat([head, self.blank]))
        labels = self.place[token_ids[:, 2:][rows, index[..., :CTC_LABELS].clamp_max(token_ids.shape[1] - 3)]]
        labels = labels.flatten(0, 1)
        lengths = (labels >= 0).cumprod(-1).sum(-1) * whole  # up to the first token that cannot be drafted
        loss = ctc_loss(logits.float().log_softmax(-1), labels.clamp_min(0), lengths) / lengths.clamp_min(1)
        used = lengths > 0
        return (loss * used).sum() / used.sum().clamp_min(1)

    @torch.no_grad()
    def _metrics(
        self,
        pairs: torch.Tensor,
        predicted: torch.Tensor,
        anchors: torch.Tensor,
        labels: torch.Tensor,
        head: torch.Tensor,
        deep: bool,
    ) -> dict[str, torch.Tensor]:
        """Mean probability of the first label; if `deep`, also the mean accepted length of rolling out along all."""
        labels, said = labels if deep else labels[..., :1], labels[..., :-1].clamp_min(0)
        rows = self.place[labels.clamp_min(0)]
        lengths = ((labels != IGNORE) & (rows >= 0)).cumprod(-1).sum(-1)  # up to the first that cannot be drafted
        features = predicted.gather(1, anchors[..., None].expand(-1, -1, predicted.shape[2]))
        along = self.module.follow(pairs, features, anchors, self.embed(said)) if deep else [features]
        log_probs = [
            F.linear(f, head).float().log_softmax(-1).gather(2, row[..., None].clamp_min(0))[..., 0]
            for f, row in zip(along, rows.unbind(2), strict=True)
        ]
        _, metrics = expected_acceptance(torch.stack(log_probs, 2).cumsum(2).flatten(0, 1), lengths.flatten())
        return metrics if deep else {"first": metrics["first"]}


def _soft_cross_entropy(mine: torch.Tensor, theirs: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Sum over positions of the cross-entropy of head(mine) against head(theirs): both (P, width), head (K, width)."""

    def piece(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        wanted = F.linear(theirs, head).float().softmax(-1)
        return -(wanted * F.linear(mine, head).float().log_softmax(-1)).sum()

    size = max(1, MAX_LOGITS // len(head))
    if len(mine) <= size:
        return piece(mine, theirs)
    pieces = zip(mine.split(size), theirs.split(size))
    return torch.stack([checkpoint(piece, *each, use_reentrant=False) for each in pieces]).sum()
