"""Packed products are the plain ones up to rounding, and only stand in for them in inference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctc_drafter.target import packing
from ctc_drafter.target.packing import PackedLinears


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_equals_linear(dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 160, bias=bias).to(dtype).requires_grad_(False)
    packed = PackedLinears([layer])
    for rows in (7, 16):
        packed.prepare(rows)
    with torch.inference_mode():
        for rows in (1, 2, 7, 8, 9, 16, 33):
            x = torch.randn(rows, 1, 96).to(dtype) if rows == 9 else torch.randn(1, rows, 96).to(dtype)
            want = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
            got = layer(x)
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_gradients_flow_after_packing() -> None:
    layer = nn.Linear(8, 8)
    PackedLinears([layer]).prepare(4)
    layer(torch.randn(4, 8)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(8, 8)
    monkeypatch.setattr(packing, "MAX_BYTES", 2 * layer.weight.nbytes)
    packed = PackedLinears([layer])
    for rows in (2, 3, 4, 5):
        packed.prepare(rows)
    assert len(packed._rows) <= 2


def test_row_counts_that_may_not_return_wait() -> None:
    packed = PackedLinears([nn.Linear(8, 8)])
    for rows in (10, 3, 13, 16):
        packed.prepare(rows, after=4)
        assert packed._rows == []
    packed.prepare(9, after=4)
    assert packed._rows == [16]


def test_batches_of_all_sizes_share_a_few_copies() -> None:
    packed = PackedLinears([nn.Linear(8, 8)])
    for rows in range(1, 200):
        for _ in range(4):
            packed.prepare(rows, after=4)
    assert len(packed._rows) <= packing.MAX_ROWS / packing.GRAIN
