"""In which dtype a drafter computes, and in which it is stored."""

from __future__ import annotations

import torch

from ..target import Target
from ..target.joint import has_tiles, multiplies_bfloat16


def drafting_dtype(target: Target) -> torch.dtype:
    """The dtype in which a drafter beside `target` is fastest: the target's own, or a narrower one.

    In bfloat16 it reads half the bytes, and guesses as well. Where a CPU multiplies bfloat16 in its vectors (an AMD
    EPYC) that is faster than float32; in tiles (an Intel Xeon) a few rows take as long, so there it stays as it is.
    """
    if target.dtype == torch.float32 and target.device.type == "cpu" and multiplies_bfloat16() and not has_tiles():
        return torch.bfloat16
    return target.dtype


def stored_dtype(weight: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """How `save_pretrained` writes a weight when asked for `dtype`."""
    if dtype is None or not weight.is_floating_point():
        return weight.dtype
    if dtype == torch.float8_e4m3fn and (weight.ndim < 2 or min(weight.shape) < 16):
        return torch.bfloat16  # norms, embeddings of slots, the blank: eight bits would save nothing there
    return dtype
