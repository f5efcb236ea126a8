"""Weights packed once for the small matrix products of drafting and tree scoring on a CPU.

`F.linear` lets MKL (float32) or oneDNN (bfloat16) rearrange a weight on every call. Packed beforehand, a product with
a few rows runs up to twice as fast; numbers differ from `F.linear` by rounding only. What oneDNN packs serves all row
counts. It does so in float32 too where it is the faster library (`prefers_onednn`), as on processors that are not
Intel's. What MKL packs serves one row count, and a single row reads the plain weight, which is faster. Batches, whose
row counts come and go, then have their rows filled up with zeros to a multiple of GRAIN, so that a few copies serve all
of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

MAX_BYTES = 2**30
MAX_ROWS = 64
GRAIN = 8
"""Rows of batched passes are filled up to a multiple of it: that costs less than what packing gains."""
PATIENCE = 8
"""Batched passes of a size before weights are packed for it."""
ANY = 0  # row count under which a weight packed for all row counts is kept
TYPICAL = 16  # rows that oneDNN packs a weight for; others take as long as with their own


class PackedLinears:
    """Keeps the given linear layers packed for the row counts that `prepare` has seen, up to MAX_BYTES in all."""

    def __init__(self, layers: Iterable[nn.Linear]) -> None:
        packable = [layer for layer in layers if _packable(layer.weight)]
        self._layers = [layer for layer in packable if layer.weight.dtype == packable[0].weight.dtype]
        self._bytes_each = sum(layer.weight.nbytes for layer in self._layers)
        self._packed: list[dict[int, torch.Tensor]] = [{} for _ in self._layers]
        self._rows: list[int] = []
        self._asked: Counter[int] = Counter()
        # What was made in inference mode counts no changes, and is ours alone.
        self._counting = [layer.weight for layer in self._layers if not layer.weight.is_inference()]
        self._versions = [weight._version for weight in self._counting]
        floats = bool(self._layers) and self._layers[0].weight.dtype == torch.float32
        self._by_onednn = not floats or prefers_onednn(torch.get_num_threads())
        for layer, packed in zip(self._layers, self._packed):
            forward = _forward_onednn if self._by_onednn else _forward_mkl
            layer.forward = forward(layer, packed)  # type: ignore[method-assign, assignment]

    def prepare(self, rows: int, after: int = 1) -> None:
        """Pack for products of `rows` rows, unless that is done or pointless; past MAX_BYTES the oldest copies go.

        after: for MKL, the how-manieth call packs. Packing takes as long as several products do, and takes memory, so a
        row count that may not come again should wait; with more than 1 it is done for the next multiple of GRAIN, which
        serves the counts below it too.
        """
        if not self._layers or self._bytes_each > MAX_BYTES:
            return
        versions = [weight._version for weight in self._counting]
        if versions != self._versions:
            self._forget(versions)
        if self._by_onednn:
            self._pack(ANY)
            return
        rows = rows if after == 1 or rows > MAX_ROWS else filled(rows)
        if not 1 < rows <= MAX_ROWS or rows in self._rows:
            return
        self._asked[rows] += 1
        if self._asked[rows] < after:
            return
        while (len(self._rows) + 1) * self._bytes_each > MAX_BYTES:
            oldest = self._rows.pop(0)
            del self._asked[oldest]
            for packed in self._packed:
                del packed[oldest]
        self._pack(rows)

    def _forget(self, versions: list[int]) -> None:
        """Drop copies of weights that have been changed in place since."""
        self._versions = versions
        self._rows.clear()
        self._asked.clear()
        for packed in self._packed:
            packed.clear()

    def _pack(self, rows: int) -> None:
        if rows in self._rows:
            return
        for layer, packed in zip(self._layers, self._packed):
            weight = layer.weight.detach()
            if rows == ANY:
                packed[ANY] = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL)
            else:
                packed[rows] = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        self._rows.append(rows)


@cache
def prefers_onednn(threads: int) -> bool:
    """Whether oneDNN multiplies a few rows of float32 clearly faster than MKL does, on this machine; tried out once.

    MKL keeps its best code for Intel's processors: on an AMD EPYC (Zen 5) oneDNN takes two fifths of its time, on an
    Intel Xeon one and a half times of it (`benchmarks/products.py`). A clear lead decides, so that two processes on one
    machine choose, and round, alike.

    threads: those of torch, which the answer may depend on.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return False
    weight = torch.zeros(1024, 768)
    few, one = torch.zeros(9, 768), torch.zeros(1, 768)
    by_mkl = torch.ops.mkl._mkl_reorder_linear_weight(weight, len(few))
    by_onednn = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL)

    def mkl() -> None:
        torch.ops.mkl._mkl_linear(few, by_mkl, weight, None, len(few))
        F.linear(one, weight)

    def onednn() -> None:
        for x in few, one:
            torch.ops.mkldnn._linear_pointwise(x, by_onednn, None, "none", [], "")

    best = {mkl: float("inf"), onednn: float("inf")}
    for _ in range(16):
        for run in best:
            began = time.perf_counter()
            run()
            best[run] = min(best[run], time.perf_counter() - began)
    return best[onednn] < 0.75 * best[mkl]


def filled(rows: int) -> int:
    """The next multiple of GRAIN."""
    return -(-rows // GRAIN) * GRAIN


def linear_of(weight: torch.Tensor) -> nn.Linear:
    """A frozen linear layer that uses `weight` (out, in) as it is."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _packable(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or type(weight) is not nn.Parameter:  # quantized weights bring their own products
        return False
    if weight.dtype == torch.float32:
        return bool(torch.backends.mkl.is_available())
    return weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _forward_mkl(layer: nn.Linear, packed: dict[int, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        if rows < 2 or torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return F.linear(x, layer.weight, layer.bias)
        out: torch.Tensor
        if rows in packed:
            out = torch.ops.mkl._mkl_linear(x, packed[rows], layer.weight, layer.bias, rows)
            return out
        size = filled(rows)
        if size not in packed:
            return F.linear(x, layer.weight, layer.bias)
        x_filled = F.pad(x.reshape(rows, -1), (0, 0, 0, size - rows))
        out = torch.ops.mkl._mkl_linear(x_filled, packed[size], layer.weight, layer.bias, size)
        return out[:rows].view(*x.shape[:-1], -1)

    return forward


def _forward_onednn(layer: nn.Linear, packed: dict[int, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and ANY in packed and torch.is_inference_mode_enabled():
            weight = packed[ANY]
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")
            return out
        return F.linear(x, layer.weight, layer.bias)

    return forward
