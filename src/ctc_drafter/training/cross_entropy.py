"""Cross-entropy of a language model over many positions, without holding all their logits at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..drafters.base import IGNORE

CHUNK = 512
"""Positions whose logits are held at once."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden @ weight.T against labels; its gradient has that of z_loss * lse^2 added.

    hidden (n, d), weight (V, d), labels (n) with -100 ignored. Gradients are formed chunk by chunk in the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_step: Any
    ) -> torch.Tensor:
        count = (labels != IGNORE).sum().clamp_min(1).float()
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        total = torch.zeros((), device=hidden.device)
        for i in range(0, hidden.shape[0], CHUNK):
            h, y = hidden[i : i + CHUNK], labels[i : i + CHUNK]
            loss, grad_hidden[i : i + CHUNK], part = chunk_step(h, weight, y, count)
            grad_weight += part
            total += loss
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], None, None


def chunk_step(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, count: torch.Tensor, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed loss / count of a chunk, and the gradients by hidden and weight of that plus z_loss * lse^2.

    hidden (n, d), weight (V, d), labels (n) with -100 ignored; count (): labels of all chunks.
    """
    logits = (hidden @ weight.T).float()
    lse = logits.logsumexp(-1, keepdim=True)
    counts = (labels != IGNORE)[:, None] / count
    hit = torch.arange(weight.shape[0], device=labels.device) == labels[:, None]
    loss = ((lse - (logits * hit).sum(-1, keepdim=True)) * counts).sum()
    grad = (((logits - lse).exp() * (1 + 2 * z_loss * lse) - hit.float()) * counts).to(hidden.dtype)
    return loss, grad @ weight, grad.T @ hidden


def block_loss(model: Any, body: Callable[..., Any], block: torch.Tensor, chunk_step: Any) -> torch.Tensor:
    """Mean loss of a causal LM on blocks (B, 2, T) of ids and labels (-100: none), token t + 1 told from t and before.

    body: the model below its LM head, which may be compiled; chunk_step: `chunk_step` with its `z_loss`, likewise.
    """
    block = block.to(model.device)
    hidden = body(input_ids=block[:, 0].long(), use_cache=False).last_hidden_state
    hidden = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    labels = block[:, 1, 1:].reshape(-1).long()
    padding = -len(labels) % CHUNK  # one chunk shape, one compilation
    hidden, labels = F.pad(hidden, (0, 0, 0, padding)), F.pad(labels, (0, padding), value=IGNORE)
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, model.lm_head.weight, labels, chunk_step)  # type: ignore[no-untyped-call]
    return loss
