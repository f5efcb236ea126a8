"""Optimizers and schedule shared by targets and drafters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def make_optimizers(
    parameters: Mapping[str, torch.Tensor], lr_matrix: float, lr_other: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for matrices inside layers, AdamW for everything else."""
    inner = {name for name, p in parameters.items() if "layers." in name and p.ndim == 2}
    matrices = [p for name, p in parameters.items() if name in inner]
    others = [p for name, p in parameters.items() if name not in inner]
    return [
        torch.optim.Muon(matrices, lr=lr_matrix, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr_other, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def set_learning_rates(optimizers: list[torch.optim.Optimizer], rates: tuple[float, float], factor: float) -> None:
    """Set each optimizer's learning rate to its own rate times `factor`."""
    for optimizer, rate in zip(optimizers, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor


def learning_rate_factor(step: int, steps: int, warmup: int, decay: int) -> float:
    """Trapezoid: linear warm-up, constant, linear decay to zero at `steps`."""
    return min(1.0, (step + 1) / max(1, warmup), max(0, steps - step) / max(1, decay))


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
