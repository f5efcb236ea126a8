"""The three masks of a pass say the same; what stands behind a row's own entries is never seen."""

from __future__ import annotations

import pytest
import torch

from ctc_drafter.target.masks import ragged_mask, row_mask, slot_mask
from ctc_drafter.tree import DraftTree

TREE = DraftTree.from_paths([[[5, 6, 7], [5, 8], [9]]], budget=6)
LOW = torch.finfo(torch.float32).min


@pytest.mark.parametrize("window", [None, 3, 7])
@pytest.mark.parametrize("length", [1, 4, 11])
def test_slot_mask_is_row_mask_and_hides_the_rest(window: int | None, length: int) -> None:
    positions, ancestors = TREE.offsets() + length, TREE.ancestor_mask()
    want = row_mask(window, positions, ancestors, length, torch.float32)
    got = slot_mask(window, positions, ancestors, torch.tensor(length), 32, torch.float32)
    assert torch.equal(got[..., : want.shape[-1]], want)
    assert bool((got[..., want.shape[-1] :] == LOW).all())


@pytest.mark.parametrize("window", [None, 3, 7])
def test_ragged_mask_is_row_mask_in_each_row(window: int | None) -> None:
    lengths = [4, 11]
    starts, q = torch.tensor(lengths), TREE.budget + 1
    positions, ancestors = TREE.offsets() + starts[:, None], TREE.ancestor_mask().repeat(2, 1, 1)
    got = ragged_mask(window, positions, ancestors, starts, max(lengths), torch.float32)
    for row, length in enumerate(lengths):
        want = row_mask(window, positions[row : row + 1], ancestors[:1], length, torch.float32)
        assert torch.equal(got[row : row + 1, ..., : length + q], want)
        assert bool((got[row, ..., length + q :] == LOW).all())
