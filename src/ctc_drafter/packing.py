"""Weights packed once for the small matrix products of drafting and tree scoring on a CPU.

`F.linear` lets MKL (float32) or oneDNN (bfloat16) rearrange a weight on every call. Packed beforehand, a product with
a few rows runs up to twice as fast; numbers differ from `F.linear` by rounding only. In float32 a packed weight serves
one row count, and a single row reads the plain weight, which is faster; in bfloat16 one packed weight serves all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

MAX_BYTES = 2**30
MAX_ROWS = 64
PATIENCE = 8
"""Batched passes with the same number of rows before weights are packed for it."""
ANY = 0  # row count under which a weight packed for all row counts is kept


class PackedLinears:
    """Keeps the given linear layers packed for the row counts that `prepare` has seen, up to MAX_BYTES in all."""

    def __init__(self, layers: Iterable[nn.Linear]) -> None:
        self._layers = [layer for layer in layers if _packable(layer.weight)]
        self._bytes_each = sum(layer.weight.nbytes for layer in self._layers)
        self._packed: list[dict[int, torch.Tensor]] = [{} for _ in self._layers]
        self._rows: list[int] = []
        self._asked: Counter[int] = Counter()
        for layer, packed in zip(self._layers, self._packed):
            forward = _forward_float32 if layer.weight.dtype == torch.float32 else _forward_bfloat16
            layer.forward = forward(layer, packed)  # type: ignore[method-assign, assignment]

    def prepare(self, rows: int, after: int = 1) -> None:
        """Pack for products of `rows` rows, unless that is done or pointless; past MAX_BYTES the oldest copies go.

        after: in float32, the how-manieth call for these rows packs for them. Packing takes as long as several products
        do, and takes memory, so a row count that may not come again should wait.
        """
        if not self._layers:
            return
        low_precision = self._layers[0].weight.dtype == torch.bfloat16
        if not low_precision and not 1 < rows <= MAX_ROWS:
            return
        rows = ANY if low_precision else rows
        if rows in self._rows:
            return
        if self._bytes_each > MAX_BYTES:
            return
        self._asked[rows] += 1
        if self._asked[rows] < after and not low_precision:
            return
        while (len(self._rows) + 1) * self._bytes_each > MAX_BYTES:
            oldest = self._rows.pop(0)
            del self._asked[oldest]
            for packed in self._packed:
                del packed[oldest]
        for layer, packed in zip(self._layers, self._packed):
            weight = layer.weight.detach()
            if low_precision:
                packed[ANY] = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
            else:
                packed[rows] = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        self._rows.append(rows)


def linear_of(weight: torch.Tensor) -> nn.Linear:
    """A frozen linear layer that uses `weight` (out, in) as it is."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _packable(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu":
        return False
    if weight.dtype == torch.float32:
        return bool(torch.backends.mkl.is_available())
    return weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _forward_float32(layer: nn.Linear, packed: dict[int, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        if not torch.compiler.is_compiling() and rows in packed and torch.is_inference_mode_enabled():
            out: torch.Tensor = torch.ops.mkl._mkl_linear(x, packed[rows], layer.weight, layer.bias, rows)
            return out
        return F.linear(x, layer.weight, layer.bias)

    return forward


def _forward_bfloat16(layer: nn.Linear, packed: dict[int, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and ANY in packed and torch.is_inference_mode_enabled():
            weight = packed[ANY]
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")
            return out
        return F.linear(x, layer.weight, layer.bias)

    return forward
