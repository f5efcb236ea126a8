"""Compiled passes give the numbers of the eager ones up to rounding, and the same greedy text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from conftest import CONTEXT
from ctc_drafter.decoding import Step, generate
from ctc_drafter.drafters import Drafter, NoDrafter, load_drafter
from ctc_drafter.errors import UserError
from ctc_drafter.target import Target
from ctc_drafter.tree import DraftTree
from helpers import MIXED, save_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # compiling takes half a minute on a free machine, minutes on a busy one
    pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"),
]
BUDGET = 5


def answer(target: Target, drafter: Drafter, prompt: list[int], budget: int = BUDGET) -> tuple[list[int], list[int]]:
    """Tokens, and the accepted lengths of the passes."""
    steps: list[Step] = list(generate(target, drafter, prompt, max_new_tokens=CONTEXT, budget=budget))
    return [t for step in steps for t in step.tokens], [step.accepted for step in steps]


def test_text_and_steps_are_those_of_eager_passes(target_folder: Path, drafter_folder: Path) -> None:
    """To the context's edge, so over several steps of the view, one of them cut by the cache's end."""
    eager = Target.load(target_folder, dtype="float32", device="cpu")
    target = Target.load(target_folder, dtype="float32", device="cpu")
    drafter = load_drafter(str(drafter_folder), target)
    assert target.compile(BUDGET, drafter.feature_layers) > 0
    assert target.compile(BUDGET, drafter.feature_layers) < 0.1  # there already
    for prompt in ([7, 8, 9], list(range(20, 90))):
        want = answer(eager, NoDrafter(), prompt)
        assert answer(target, NoDrafter(), prompt) == want
        drafted = answer(target, drafter, prompt)
        assert drafted[0] == want[0]
        assert drafted == answer(eager, load_drafter(str(drafter_folder), eager), prompt)
    # Another budget runs as it did.
    assert answer(target, drafter, [7, 8, 9], budget=3)[0] == answer(eager, NoDrafter(), [7, 8, 9])[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_under_mixed_windows(dtype: str, tmp_path: Path) -> None:
    target = Target.load(save_model(tmp_path / "olmo3", "olmo3", **MIXED), dtype=dtype, device="cpu")
    tree = DraftTree.from_paths([[[5, 6, 7], [5, 8], [9]]], budget=BUDGET)
    root = torch.tensor([[4]])

    @torch.inference_mode()
    def scores() -> tuple[torch.Tensor, torch.Tensor]:
        cache = target.new_cache(48)
        target.prefill(list(range(10, 22)), cache)
        target.capture((1, -1))
        target.score(root, tree, tree.ancestor_mask(), cache)
        cache.keep([[0, 1, 4]])  # so that the next pass reads what this one wrote
        return target.score(root, tree, tree.ancestor_mask(), cache)

    want = scores()
    target.compile(BUDGET, (1, -1))
    for got, expected in zip(scores(), want):
        scale = expected.float().abs().max()
        assert float((got - expected).abs().max() / scale) < (1e-5 if dtype == "float32" else 3e-2)


def test_a_pass_beyond_the_cache_is_refused(target_folder: Path) -> None:
    target = Target.load(target_folder, dtype="float32", device="cpu")
    target.compile(0)
    empty = DraftTree.empty(1)
    cache = target.new_cache(3)
    with torch.inference_mode():
        target.prefill([5, 6, 7], cache)
        with pytest.raises(RuntimeError, match="do not fit"):
            target.score(torch.tensor([[5]]), empty, empty.ancestor_mask(), cache)


def test_failure_to_compile_is_told(target_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.load(target_folder, dtype="float32", device="cpu")
    monkeypatch.setattr(torch, "compile", lambda *args, **options: 1 / 0)
    with pytest.raises(UserError, match="cannot be compiled here"):
        target.compile(BUDGET)
