"""Packed products are the plain ones up to rounding, and only stand in for them in inference."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctc_drafter.target import packing
from ctc_drafter.target.packing import PackedLinears


@pytest.fixture
def by_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where MKL is the faster library."""
    monkeypatch.setattr(packing, "prefers_onednn", lambda threads: False)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_equals_linear(
    dtype: torch.dtype, tolerance: float, bias: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "prefers_onednn", lambda threads: onednn)
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


@pytest.mark.parametrize("onednn", [False, True])
def test_weights_changed_in_place_are_packed_again(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "prefers_onednn", lambda threads: onednn)
    layer = nn.Linear(32, 48)
    packed = PackedLinears([layer])
    packed.prepare(9)
    with torch.no_grad():
        layer.weight.mul_(2)
    packed.prepare(9)
    with torch.inference_mode():
        x = torch.randn(9, 32)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_one_copy_by_onednn_serves_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "prefers_onednn", lambda threads: True)
    packed = PackedLinears([nn.Linear(8, 8)])
    for rows in (1, 2, 9, 100):
        packed.prepare(rows, after=4)
    assert packed._rows == [packing.ANY]


def test_the_faster_library_is_found() -> None:
    """By products of the sizes of a real layer, timed beside each other: the choice is not the slower one."""
    weight = torch.randn(1536, 512)
    x = torch.randn(9, 512)
    mkl = torch.ops.mkl._mkl_reorder_linear_weight(weight, 9)
    onednn = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(50):
        for by_onednn in times:
            began = time.perf_counter()
            if by_onednn:
                torch.ops.mkldnn._linear_pointwise(x, onednn, None, "none", [], "")
            else:
                torch.ops.mkl._mkl_linear(x, mkl, weight, None, 9)
            times[by_onednn].append(time.perf_counter() - began)
    chosen = packing.prefers_onednn(torch.get_num_threads())
    assert min(times[chosen]) < 2 * min(times[not chosen])


@pytest.mark.usefixtures("by_mkl")
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(8, 8)
    monkeypatch.setattr(packing, "MAX_BYTES", 2 * layer.weight.nbytes)
    packed = PackedLinears([layer])
    for rows in (2, 3, 4, 5):
        packed.prepare(rows)
    assert len(packed._rows) <= 2


@pytest.mark.usefixtures("by_mkl")
def test_row_counts_that_may_not_return_wait() -> None:
    packed = PackedLinears([nn.Linear(8, 8)])
    for rows in (10, 3, 13, 16):
        packed.prepare(rows, after=4)
        assert packed._rows == []
    packed.prepare(9, after=4)
    assert packed._rows == [16]


@pytest.mark.usefixtures("by_mkl")
def test_batches_of_all_sizes_share_a_few_copies() -> None:
    packed = PackedLinears([nn.Linear(8, 8)])
    for rows in range(1, 200):
        for _ in range(4):
            packed.prepare(rows, after=4)
    assert len(packed._rows) <= packing.MAX_ROWS / packing.GRAIN
