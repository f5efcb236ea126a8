"""What the target chooses at each node of a draft tree, and which path of the tree agrees with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .errors import UserError
from .tree import ROOT, DraftTree

SEEDS = range(-(2**63), 2**64)
"""What torch takes for a seed. It counts them modulo 2**64, and so does what is computed from one."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; the other fields mean what they mean in transformers.

    Raises UserError for a value that is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be finite and not negative, not {self.temperature}.")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (off) or a positive count, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], not {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be in [0, 1], not {self.min_p}.")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty must be positive and finite, not {self.repetition_penalty}.")
        if self.seed is not None and self.seed not in SEEDS:
            raise UserError("seed must be at least -2**63 and below 2**64; choose a smaller one.")

    def processors(self) -> LogitsProcessorList:
        """The processors in the order in which `generate` of transformers applies them."""
        out = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            out.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature > 0:
            if self.temperature != 1.0:
                out.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k:
                out.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1.0:
                out.append(TopPLogitsWarper(self.top_p))
            if self.min_p > 0:
                out.append(MinPLogitsWarper(self.min_p))
        return out


class Chooser:
    """Chooses the target's own next token after the root and after every node of the tree.

    A sample is argmax(scores + g) with Gumbel noise g, which is a draw from softmax(scores) (the Gumbel-max trick). The
    noise belongs to a position of the text and is drawn in the order of positions; all nodes at one depth share it. So
    the emitted text is the one that plain decoding samples with this seed, whatever trees are scored.
    """

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self._processors: Any = sampling.processors()
        self._generator = None
        self._noise: list[torch.Tensor] = []
        """(V,) for each position from that of the next token on."""
        self._position: int | None = None
        if sampling.temperature > 0:
            self._generator = torch.Generator(device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    @property
    def is_argmax(self) -> bool:
        """Whether the choice is the largest logit and nothing else."""
        return not self._processors and self._generator is None

    def choose(
        self, logits: torch.Tensor, tree: DraftTree, ancestors: torch.Tensor, context: list[int]
    ) -> torch.Tensor:
        """logits (1, M+1, V), ancestors (1, M+1, M+1) bool, context: ids up to the root -> chosen tokens (1, M+1).

        From call to call the context must grow, by no more than M + 1 tokens.
        """
        return largest(self.scores(logits, tree, ancestors, context))

    def scores(
        self, logits: torch.Tensor, tree: DraftTree, ancestors: torch.Tensor, context: list[int]
    ) -> torch.Tensor:
        """What `choose` takes the largest of, (1, M+1, V): the logits, processed and with noise where there is any."""
        if self.is_argmax:
            return logits
        scores = logits[0].float()
        if self._processors:
            prefix = torch.tensor(context, device=scores.device)
            nodes = torch.cat([prefix[-1:], tree.tokens[0]])
            own = torch.where(ancestors[0], nodes, prefix[-1])  # a repeated token changes nothing in any processor
            ids = torch.cat([prefix.expand(scores.shape[0], -1), own], dim=1)
            scores = self._processors(ids, scores)
        if self._generator is not None:
            scores = scores + self._noise_of(scores[0], tree, len(context))
        return scores[None]

    def _noise_of(self, like: torch.Tensor, tree: DraftTree, position: int) -> torch.Tensor:
        """(M+1, V): the noise of the token after the root, which stands at `position`, and of those after the nodes."""
        past = 0 if self._position is None else position - self._position
        assert 0 <= past <= len(self._noise)
        del self._noise[:past]
        self._position = position
        while len(self._noise) < tree.budget + 1:
            # One call for each position: the numbers must not depend on how many are drawn at once.
            drawn = torch.empty_like(like).exponential_(generator=self._generator)
            self._noise.append(drawn.clamp_min_(torch.finfo(drawn.dtype).tiny).log_().neg_())
        return torch.stack(self._noise[: tree.budget + 1])[tree.offsets()[0]]


def largest(logits: torch.Tensor) -> torch.Tensor:
    """Index of the largest on the last axis, the first of equals like argmax, which is slower in bfloat16."""
    return logits.max(-1).indices


def accepted_paths(
    tree: DraftTree, chosen: torch.Tensor, budgets: Sequence[int] | None = None
) -> list[tuple[list[int], list[int]]]:
    """For each row, the path from the root on which every node carries the token chosen at its parent.

    Of equal siblings only the first counts. chosen (B, M+1); budgets: of each row's nodes only so many count (None:
    all). Returns for each row the path's indices into root + nodes, 0 (the root) first, and the tokens chosen at them:
    the accepted ones and one more. One copy from device to host; the walk is a few dictionary lookups.
    """
    size = tree.budget
    host: list[list[int]] = torch.cat([tree.tokens, tree.parents, chosen], 1).tolist()
    counts = [size] * len(host) if budgets is None else budgets
    return [_walk(row[:n], row[size : size + n], row[2 * size :]) for row, n in zip(host, counts)]


def _walk(tokens: list[int], parents: list[int], chosen: list[int]) -> tuple[list[int], list[int]]:
    child: dict[tuple[int, int], int] = {}
    for node, edge in enumerate(zip(parents, tokens)):
        child.setdefault(edge, node)
    path, here = [0], ROOT
    while (step := child.get((here, chosen[here + 1]))) is not None:
        path.append(step + 1)
        here = step
    return path, [chosen[i] for i in path]
