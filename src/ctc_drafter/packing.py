"""Packed weights for the few-row matrix products of drafting and tree scoring on a CPU in float32.

A product with 2 to 64 rows through `F.linear` lets MKL rearrange the weight on every call; packed once for that row
count it runs up to twice as fast. Numbers differ from `F.linear` by rounding only. A single row reads the plain weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

MAX_BYTES = 2**30
MAX_ROWS = 64


class PackedLinears:
    """Keeps the given linear layers packed for the row counts that `prepare` has seen, up to MAX_BYTES in all."""

    def __init__(self, layers: Iterable[nn.Linear]) -> None:
        self._layers = [layer for layer in layers if _packable(layer)]
        self._bytes_each = sum(layer.weight.nbytes for layer in self._layers)
        self._packed: list[dict[int, torch.Tensor]] = [{} for _ in self._layers]
        self._rows: set[int] = set()
        for layer, packed in zip(self._layers, self._packed):
            layer.forward = _forward(layer, packed)  # type: ignore[method-assign, assignment]

    def prepare(self, rows: int) -> None:
        """Pack for products of `rows` rows, unless that is done, pointless or would take too much memory."""
        if rows in self._rows or not 1 < rows <= MAX_ROWS or not self._layers:
            return
        if (len(self._rows) + 1) * self._bytes_each > MAX_BYTES:
            return
        for layer, packed in zip(self._layers, self._packed):
            packed[rows] = torch.ops.mkl._mkl_reorder_linear_weight(layer.weight.detach(), rows)
        self._rows.add(rows)


def _packable(layer: nn.Linear) -> bool:
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkl.is_available()


def _forward(layer: nn.Linear, packed: dict[int, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        if rows in packed and torch.is_inference_mode_enabled():
            out: torch.Tensor = torch.ops.mkl._mkl_linear(x, packed[rows], layer.weight, layer.bias, rows)
            return out
        return F.linear(x, layer.weight, layer.bias)

    return forward
