"""Additive attention masks of a pass: everything committed, a query's own ancestors, nothing else.

`window` is a sliding window in positions, None for full attention. Masked is the smallest number of `dtype`.
"""

from __future__ import annotations

from typing import Any

import torch


def layer_kinds(config: Any) -> set[str]:
    """What kinds of layers the config names, if any; a short self-test cannot see all that they do to long texts."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    return set(kinds) if isinstance(kinds, (list, tuple)) else set()


def windows(config: Any) -> dict[str, int | None]:
    """Attention window (in positions) of each kind of layer; None is full attention."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = layer_kinds(config)
    if not kinds:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


def row_mask(
    window: int | None, positions: torch.Tensor, ancestors: torch.Tensor, length: int, dtype: torch.dtype
) -> torch.Tensor:
    """(1, 1, q, length + q) for one row: positions (1, q), ancestors (1, q, q) bool."""
    q, device = positions.shape[1], positions.device
    mask = torch.zeros(1, 1, q, length + q, dtype=dtype, device=device)
    low = torch.finfo(dtype).min
    if q > 1:
        mask[0, :, :, length:].masked_fill_(~ancestors, low)
    if window is not None and length + q > window:
        keys = torch.cat([torch.arange(length, device=device), positions[0]])
        mask.masked_fill_(positions[0, :, None] - keys >= window, low)
    return mask


def ragged_mask(
    window: int | None,
    positions: torch.Tensor,
    ancestors: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`row_mask` for rows of different lengths `starts` (B,): (B, 1, q, longest + q).

    Each row's new entries stand behind its own length. Every query sees at least itself, so no row of the softmax is
    empty.
    """
    (batch, q), device = positions.shape, positions.device
    size = longest + q
    slots = torch.arange(size, device=device).expand(batch, size)
    starts = starts[:, None]
    new = starts + torch.arange(q, device=device)
    seen = (slots < starts)[:, None].repeat(1, q, 1)
    seen.scatter_(2, new[:, None].expand(-1, q, -1), ancestors)
    if window is not None and size > window:
        keys = slots.scatter(1, new, positions)
        seen &= positions[:, :, None] - keys[:, None] < window
    mask = torch.zeros(batch, 1, q, size, dtype=dtype, device=device)
    return mask.masked_fill_(~seen[:, None], torch.finfo(dtype).min)


def slot_mask(
    window: int | None,
    positions: torch.Tensor,
    ancestors: torch.Tensor,
    length: torch.Tensor,
    size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`row_mask` over a view of `size` slots, (1, 1, q, size), with the length in a tensor: one graph for all lengths.

    positions (1, q), ancestors (1, q, q) bool, length () long; nothing sees the slots behind the queries' own.
    """
    q, device = positions.shape[1], positions.device
    slots = torch.arange(size, device=device)
    new = length + torch.arange(q, device=device)
    # Copied into its place, which also has a compiled pass write it down once, and not work it out in every layer.
    seen = (slots < length).repeat(q, 1).index_copy(1, new, ancestors[0])
    if window is not None:
        keys = slots.index_copy(0, new, positions[0])
        seen = seen & (positions[0, :, None] - keys < window)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[None, None]
