"""An attention function for transformers that spares the copy of repeated key/value heads under an explicit mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "ctc_drafter_sdpa"


def packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, query (B, H, q, d), key (B, G, n, d), value (B, G, n, dv) -> (B, q, H, dv).

    With grouped queries and a mask, transformers copies keys and values H / G times; here the queries of a group stand
    one after another over the same keys instead, which gives the same numbers and touches the cache once.
    """
    heads, groups, q = query.shape[1], key.shape[1], query.shape[2]
    if (
        attention_mask is None
        or heads == groups
        or attention_mask.shape[1] != 1
        or options.get("position_bias") is not None
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    share = heads // groups
    packed = query.reshape(query.shape[0], groups, share * q, query.shape[3])
    mask = attention_mask if q == 1 else _tiled(attention_mask, share)
    out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(query.shape[0], heads, q, value.shape[3]).transpose(1, 2).contiguous(), None


def _tiled(mask: torch.Tensor, share: int) -> torch.Tensor:
    """mask (B, 1, q, n) -> (B, 1, share * q, n), made once for all layers of a pass."""
    tiled: torch.Tensor | None = getattr(mask, "_tiled", None)
    if tiled is None:
        tiled = mask.repeat(1, 1, share, 1)
        mask._tiled = tiled  # type: ignore[attr-defined]
    return tiled


AttentionInterface.register(NAME, packed_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)
