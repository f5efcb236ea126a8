"""RMS norm (Zhang and Sennrich 2019) for the few rows of a draft, its weight folded into the product that follows."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6


class RMSNorm(nn.RMSNorm):
    """Its weight is rounded to what it norms: where the two differ, under autocast, torch warns and is slower."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def unit_norm(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum(x^2) + width * EPS) over the last axis: RMS norm but for its weight and the factor sqrt(width).

    On a CPU F.rms_norm is made of six operations, which for a few rows cost their dispatch; these are three.
    """
    if torch.compiler.is_compiling():  # one kernel, whatever it is made of, and no constant to keep
        return (x * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + x.shape[-1] * EPS)).to(x.dtype)
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.hypot(norms, _constant((x.shape[-1] * EPS) ** 0.5, x.dtype, x.device))


def fold_norm(weight: torch.Tensor, norm_weight: torch.Tensor) -> torch.Tensor:
    """The weight (out, n * width) that a product after RMS norms needs if these are `unit_norm`s.

    norm_weight (width,), or (n, width) if n normed parts stand side by side.
    """
    scale: torch.Tensor = norm_weight * norm_weight.shape[-1] ** 0.5
    return weight * scale.flatten()


@lru_cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, device=device)
