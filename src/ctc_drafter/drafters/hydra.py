"""The Hydra drafter: one small head per token ahead, each reading the tokens drafted before it (Ankner et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..lattice.loss import prefix_objective
from ..target import LAST, Target
from ..target.packing import PackedLinears, linear_of
from ..tree import DraftTree
from .base import TrainableDrafter, register
from .norm import RMSNorm
from .rollout import grow
from .slots import expected_acceptance


@dataclass
class HydraConfig:
    """Shape, objective and search of a Hydra drafter."""

    steps: int = 5
    """Heads: next tokens that are predicted, and the depth of the tree."""
    layers: int = 1
    """Residual blocks of each head."""
    decay: float = 0.8
    """Weight of the k-th head's loss: decay^(k-1)."""
    beam: int = 8
    """Nodes of each level that are expanded."""
    vocabulary: int = 0
    """Draft only the most frequent tokens of the training answers; 0: all. Exactness is untouched."""

    def __post_init__(self) -> None:
        if min(self.steps, self.layers, self.beam) < 1:
            raise ValueError("steps, layers and beam must be at least 1")
        if self.vocabulary < 0:
            raise ValueError("vocabulary must not be negative")
        if not 0 < self.decay <= 1:
            raise ValueError("decay must be in (0, 1]")


class HydraHead(nn.Module):
    """Head k: k + 1 normalised parts -> what the LM head reads for the k-th token after the root.

    The last norm lets a head set the scale of its logits, since the frozen LM head cannot.
    """

    def __init__(self, parts: int, width: int, layers: int) -> None:
        super().__init__()
        self.fuse = nn.Linear(parts * width, width, bias=False)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])
        self.norm = RMSNorm(width, 1e-6)

    def forward(self, parts: torch.Tensor) -> torch.Tensor:
        """(..., parts * width) -> (..., width)."""
        x = self.fuse(parts)
        for layer in self.layers:
            x = x + F.silu(layer(x))
        out: torch.Tensor = self.norm(x)
        return out


@register("hydra")
class HydraDrafter(TrainableDrafter):
    """Sequentially dependent heads: P(x_{t+1+k} | f_t, x_{t+1} .. x_{t+k}) = softmax(W head_k([f_t, e(x_{t+1}), ..])).

    W is the target's frozen LM head on the kept tokens, e its embedding; every part is RMS-normalised. Heads share no
    weights. Nothing is remembered between drafts: only the newest feature and the root are read.
    """

    config_class = HydraConfig
    config: HydraConfig
    feature_layers = (LAST,)
    stateless = True

    def __init__(self, config: HydraConfig, target: Target) -> None:
        super().__init__(config, target)
        width = target.hidden_size
        # Typed as what it holds; nn.ModuleList itself only knows Module.
        self.heads: Any = nn.ModuleList([HydraHead(k + 1, width, config.layers) for k in range(1, config.steps + 1)])
        self._ready: tuple[nn.Linear, ...] = ()  # the LM head, hidden from parameters() and state_dict()

    @property
    def proposed_tokens(self) -> int:
        return self.config.steps

    @property
    def proposed_labels(self) -> int:
        return self.config.steps

    def parts(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """features (..., width), the root and what follows it (..., k) -> head k's input (..., (k + 1) * width)."""
        together = torch.cat([features[..., None, :], self.embed(tokens)], -2)
        return F.rms_norm(together, together.shape[-1:], eps=1e-6).flatten(-2)

    # ------------------------------------------------------------ inference

    @torch.no_grad()
    def prepare(self) -> None:
        super().prepare()
        self._ready = (linear_of(self.kept_head()),)
        packed = PackedLinears([*self._ready, *(m for m in self.modules() if type(m) is nn.Linear)])
        packed.prepare(self.config.beam)

    def draft(self, features: torch.Tensor, next_tokens: torch.Tensor) -> torch.Tensor:
        """The first head's input at the root, (1, 1, 2 * width)."""
        return self.parts(features[:, -1:].to(self.dtype), next_tokens[:, -1:, None])

    def tree(self, guess: torch.Tensor, budget: int) -> DraftTree:
        if budget == 0:
            return DraftTree.empty(1, guess.device)

        def expand(
            state: tuple[torch.Tensor, int], parents: torch.Tensor, tokens: torch.Tensor
        ) -> tuple[torch.Tensor, tuple[torch.Tensor, int]]:
            before, depth = state
            before = before.gather(1, parents[..., None].expand(-1, -1, before.shape[2]))
            embedded = self.embed(tokens)
            inputs = torch.cat([before, F.rms_norm(embedded, embedded.shape[-1:], eps=1e-6)], -1)
            return self._log_probs(inputs, depth), (inputs, depth + 1)

        first = self._log_probs(guess, 0)[:, 0]
        config = self.config
        return grow(first, (guess, 1), expand, self.kept, budget=budget, levels=config.steps, beam=config.beam)

    def _log_probs(self, inputs: torch.Tensor, head: int) -> torch.Tensor:
        """Inputs (1, W, parts * width) of the head with this index -> (1, W, K)."""
        logits: torch.Tensor = self._ready[0](self.heads[head](inputs))
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
        """Cross-entropy of every head at the anchors, teacher-forced: weighted decay^(k-1)."""
        newest = features.gather(1, anchors[..., None].expand(-1, -1, features.shape[2])).flatten(0, 1)
        roots = token_ids.gather(1, anchors + 1).view(-1, 1)
        labels, rows, lengths = self.label_rows(labels)
        parts = self.parts(newest, torch.cat([roots, labels[:, :-1]], 1))
        width, weight = features.shape[2], self.kept_head()
        said = []
        for k, head in enumerate(self.heads):
            logits = F.linear(head(parts[:, : (k + 2) * width]), weight)
            said.append(-F.cross_entropy(logits.float(), rows[:, k], reduction="none"))
        prefix = torch.stack(said, 1).cumsum(1)
        loss = prefix_objective(prefix, self.config.decay, lengths)
        usable, metrics = expected_acceptance(prefix, lengths)
        return (loss * usable).sum() / usable.sum().clamp_min(1), metrics
