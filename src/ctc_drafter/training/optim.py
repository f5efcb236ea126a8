"""Optimizers and schedule shared by targets and drafters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn


def make_optimizers(
    parameters: Mapping[str, torch.Tensor], lr_matrix: float, lr_other: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of linear layers, if there are any, and AdamW for everything else."""
    inner = {name for name, p in parameters.items() if p.ndim == 2 and _is_linear(name)}
    matrices = [p for name, p in parameters.items() if name in inner]
    others = [p for name, p in parameters.items() if name not in inner]
    adamw = torch.optim.AdamW(others, lr=lr_other, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if not matrices:
        return [adamw]
    return [torch.optim.Muon(matrices, lr=lr_matrix, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"), adamw]


def _is_linear(name: str) -> bool:
    """Whether a matrix of this name is of a linear layer inside: no table of tokens, and no parameter by itself."""
    return name.endswith(".weight") and not any(table in name for table in ("embed", "lm_head"))


def set_learning_rates(optimizers: list[torch.optim.Optimizer], rates: tuple[float, float], factor: float) -> None:
    """Set each optimizer's learning rate to its own of `rates` (matrices, others) times `factor`."""
    for optimizer, rate in zip(optimizers, rates[-len(optimizers) :], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor


def learning_rate_factor(step: int, steps: int, warmup: int, decay: int, schedule: str = "trapezoid") -> float:
    """Share of the full learning rate in `step` (from 0): linear warm-up, then by `schedule` down to zero at `steps`.

    trapezoid: constant, with a linear decay over the last `decay` steps. cosine: half a cosine from the warm-up's end.
    """
    if schedule == "cosine":
        done = max(0, step - warmup) / max(1, steps - warmup)
        return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return min(1.0, (step + 1) / max(1, warmup), max(0, steps - step) / max(1, decay))


def clip_gradients(parameters: Iterable[torch.Tensor], loss: torch.Tensor) -> tuple[float, str]:
    """Scale gradients down to a norm of 1; returns the loss, and what is not finite: `loss`, `gradient` or nothing.

    To be asked before the optimizer's step: an infinite norm makes weights that are no numbers. Loss and norm come to
    the host together, so the device is waited for once.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    value, size = torch.stack([loss.detach(), norm.to(loss)]).tolist()
    return value, "loss" if not math.isfinite(value) else "gradient" if not math.isfinite(size) else ""


def diverged(what: str, step: int, state: Path) -> str:
    """The error of a run that ends because `what` is not finite; names the state on disk if there is one."""
    kept = f" (the last good state is in '{state}')" if state.exists() else ""
    return f"The {what} is not finite at step {step}; start anew with a lower lr_matrix and lr_other{kept}."


def fp32_masters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Float32 copies of a low-precision model's parameters, for the optimizer to work on."""
    return {name: p.detach().float().clone().requires_grad_() for name, p in model.named_parameters()}


def gradients_to_masters(model: nn.Module, masters: Mapping[str, torch.Tensor]) -> None:
    """Move the model's gradients to its masters."""
    for name, p in model.named_parameters():
        masters[name].grad = None if p.grad is None else p.grad.float()
        p.grad = None


@torch.no_grad()
def masters_to_model(model: nn.Module, masters: Mapping[str, torch.Tensor]) -> None:
    """Round the masters into the model's own precision."""
    for name, p in model.named_parameters():
        p.copy_(masters[name])
