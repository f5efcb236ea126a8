"""The folded RMS norm against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from ctc_drafter.drafters.norm import fold_norm, unit_norm


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e-3, 1.0, 1e4])
def test_product_of_a_unit_norm_with_a_folded_weight(scale: float) -> None:
    """It is the product of the RMS norm, for rows as small as eps and for zeros too."""
    x, gain, weight = torch.randn(2, 3, 24) * scale, torch.rand(24) + 0.5, torch.randn(5, 24)
    want = F.linear(F.rms_norm(x, (24,), gain, 1e-6), weight)
    torch.testing.assert_close(F.linear(unit_norm(x), fold_norm(weight, gain)), want)


def test_parts_that_are_normed_side_by_side() -> None:
    x, gain, weight = torch.randn(2, 3, 8), torch.rand(3, 8) + 0.5, torch.randn(5, 24)
    want = F.linear((F.rms_norm(x, (8,), eps=1e-6) * gain).flatten(-2), weight)
    torch.testing.assert_close(F.linear(unit_norm(x).flatten(-2), fold_norm(weight, gain)), want)
