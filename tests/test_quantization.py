"""A target with weights in eight bits: speculative text is its own plain text; what does not go is said."""

from __future__ import annotations

import sys

import pytest

from ctc_drafter.decoding import generate
from ctc_drafter.drafters import Drafter, NoDrafter, load_drafter
from ctc_drafter.errors import UserError
from ctc_drafter.target import Target

CHATS = ["What is the capital of France?", "Tom has 3 apples and buys 5 more. How many are there?"]


def text(target: Target, drafter: Drafter, ids: list[int]) -> tuple[list[int], int]:
    steps = list(generate(target, drafter, ids, max_new_tokens=40, budget=8))
    return [token for step in steps for token in step.tokens], len(steps)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speculative_text_is_the_quantized_targets_own(dtype: str) -> None:
    pytest.importorskip("torchao")
    target = Target.load(dtype=dtype, device="cpu", quantized="int8")
    drafter = load_drafter("ctc", target)
    exact = Target.load(dtype=dtype, device="cpu")
    assert type(target.model.model.layers[0].mlp.up_proj.weight) is not type(
        exact.model.model.layers[0].mlp.up_proj.weight
    )
    for chat in CHATS:
        ids = target.prompt_ids([{"role": "user", "content": chat}])
        plain, passes = text(target, NoDrafter(), ids)
        drafted, fewer = text(target, drafter, ids)
        if dtype == "float32":
            assert drafted == plain
        assert fewer < passes
    with pytest.raises(UserError, match="quantized and cannot be compiled"):
        target.compile(4)


def test_without_torchao_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"ctc-drafter\[quantize\]"):
        Target.load(quantized="int8")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="int8"):
        Target.load(quantized="int3")
