"""A target with weights in eight bits: speculative text is its own plain text; what does not go is said."""

from __future__ import annotations

import sys

import pytest
import torch

from ctc_drafter.decoding import generate
from ctc_drafter.drafters import Drafter, NoDrafter, load_drafter
from ctc_drafter.errors import UserError
from ctc_drafter.target import Target

CHATS = ["What is the capital of France?", "Tom has 3 apples and buys 5 more. How many are there?"]


def text(target: Target, drafter: Drafter, ids: list[int]) -> tuple[list[int], int]:
    steps = list(generate(target, drafter, ids, max_new_tokens=40, budget=8))
    return [token for step in steps for token in step.tokens], len(steps)


@pytest.mark.parametrize(("kind", "dtype"), [("int8", "float32"), ("int8", "bfloat16"), ("int4", "auto")])
def test_speculative_text_is_the_quantized_targets_own(kind: str, dtype: str) -> None:
    pytest.importorskip("torchao")
    target = Target.load(dtype=dtype, device="cpu", quantized=kind)
    drafter = load_drafter("ctc", target)
    assert target.num_parameters == Target.load(device="cpu").num_parameters
    assert target.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
    for chat in CHATS:
        ids = target.prompt_ids([{"role": "user", "content": chat}])
        plain, passes = text(target, NoDrafter(), ids)
        drafted, fewer = text(target, drafter, ids)
        if dtype == "float32":
            assert drafted == plain
        assert fewer < passes
    if (kind, dtype) != ("int8", "bfloat16"):
        with pytest.raises(UserError, match="is quantized, and can be compiled in int8"):
            target.compile(4)


@pytest.mark.parametrize(("kind", "worst"), [("int8", 0.02), ("int4", 0.2)])
def test_a_row_does_not_depend_on_the_others(kind: str, worst: float) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    exact = Target.load(dtype="bfloat16", device="cpu").model.model.layers[1].mlp.down_proj
    layer = Target.load(device="cpu", quantized=kind).model.model.layers[1].mlp.down_proj
    x = torch.randn(17, exact.in_features, dtype=torch.bfloat16)
    with torch.inference_mode():
        together, alone = layer(x), torch.cat([layer(row[None]) for row in x])
        near = exact(x)
    assert torch.equal(together, alone)
    assert 0 < float((together - near).norm() / near.norm()) < worst


@pytest.mark.slow
def test_eight_bits_compiled() -> None:
    pytest.importorskip("torchao")
    target = Target.load(device="cpu", quantized="int8")
    ids = target.prompt_ids([{"role": "user", "content": CHATS[1]}])
    before, _ = text(target, NoDrafter(), ids)
    assert target.compile(0) > 0
    assert text(target, NoDrafter(), ids)[0] == before


def test_four_bits_are_for_bfloat16() -> None:
    pytest.importorskip("torchao")
    with pytest.raises(UserError, match="--dtype bfloat16"):
        Target.load(dtype="float32", device="cpu", quantized="int4")


def test_without_torchao_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"ctc-drafter\[quantize\]"):
        Target.load(quantized="int8")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="int8"):
        Target.load(quantized="int3")
