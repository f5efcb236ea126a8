"""Embedding and LM head of a target that another engine runs, taken from its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ctc_drafter.drafters import load_drafter
from ctc_drafter.errors import UserError
from ctc_drafter.integrations.borrowed import borrow_target
from ctc_drafter.target import Target
from helpers import CAPABLE, save_model


def borrow(folder: Path, dtype: torch.dtype = torch.float32) -> Target:
    return borrow_target(str(folder), dtype=dtype, device=torch.device("cpu"), max_context=48)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("mixtral", CAPABLE["mixtral"])],
)
def test_it_is_known_as_the_whole_target_is(tmp_path: Path, kind: str, options: dict[str, object]) -> None:
    whole, part = Target.load(save_model(tmp_path / "m", kind, **options)), borrow(tmp_path / "m")
    assert part.probe() == whole.probe()
    assert torch.equal(part.embedding.weight, whole.embedding.weight)
    assert torch.equal(part.head.weight, whole.head.weight)
    assert (part.vocab_size, part.hidden_size, part.name) == (whole.vocab_size, whole.hidden_size, whole.name)
    assert part.max_context == 48
    held = sum(p.numel() for p in part.model.parameters())
    rest = sum(1 for _ in part.model.parameters())
    assert held <= whole.embedding.weight.numel() + whole.head.weight.numel() + 2 * rest


def test_a_drafter_guesses_on_it_as_on_the_whole_target(
    target: Target, target_folder: Path, drafter_folder: Path
) -> None:
    guesses = []
    for base in (target, borrow(target_folder)):
        drafter = load_drafter(str(drafter_folder), base)
        drafter.start(16)
        features = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(3))
        guesses.append(drafter.draft(features, torch.arange(5)[None])[0])
    assert torch.equal(*guesses)


def test_what_is_refused(tmp_path: Path, drafter_folder: Path) -> None:
    with pytest.raises(UserError, match="made for target 'tiny'"):
        load_drafter(str(drafter_folder), borrow(save_model(tmp_path / "other", "llama", hidden_size=64)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded for the drafter"):
        borrow(tmp_path / "empty")
