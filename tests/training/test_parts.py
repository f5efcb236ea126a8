"""Small parts of training: schedule, optimizers, tokenizer, unlikelihood."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TEXTS
from ctc_drafter.errors import UserError
from ctc_drafter.target import Target
from ctc_drafter.training.checkpoint import load_training_state, save_training_state
from ctc_drafter.training.optim import learning_rate_factor, make_optimizers, set_learning_rates
from ctc_drafter.training.tokenizer import SPECIAL_TOKENS
from ctc_drafter.training.unlikelihood import _repetition_loss, repeated
from helpers import tokenizer


def test_schedule_is_a_trapezoid() -> None:
    factors = [learning_rate_factor(step, 20, 4, 10) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and set(factors[4:11]) == {1.0}
    assert factors[15] == 0.5 and factors[20] == 0.0
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_matrices_of_linear_layers_go_to_muon() -> None:
    inner = {"layers.0.q.weight": (4, 4), "layers.1.down.weight": (4, 6), "module.fuse.weight": (4, 8)}
    other = {"model.embed_tokens.weight": (9, 4), "lm_head.weight": (9, 4), "module.slot_embedding": (5, 4)}
    other |= {"blank": (1, 4), "layers.0.norm.weight": (4,)}
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in (inner | other).items()}
    muon, adam = make_optimizers(parameters, 1e-2, 1e-3, 0.0)
    assert [p.shape for p in muon.param_groups[0]["params"]] == list(inner.values())
    assert [p.shape for p in adam.param_groups[0]["params"]] == list(other.values())
    set_learning_rates([muon, adam], (1e-2, 1e-3), 0.5)
    assert [o.param_groups[0]["lr"] for o in (muon, adam)] == [5e-3, 5e-4]


def test_state_round_trip(tmp_path: Any) -> None:
    """Weights and both optimizers continue exactly where they were."""

    def fresh() -> tuple[dict[str, torch.Tensor], list[torch.optim.Optimizer]]:
        torch.manual_seed(0)
        shapes = {"layers.0.q.weight": (4, 4), "norm": (4,)}
        weights = {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}
        return weights, make_optimizers(weights, 1e-2, 1e-2, 0.1)

    def step(weights: dict[str, torch.Tensor], optimizers: list[torch.optim.Optimizer]) -> None:
        for w in weights.values():
            w.grad = (w.detach() - 1) * 2
        for optimizer in optimizers:
            optimizer.step()

    weights, optimizers = fresh()
    step(weights, optimizers), step(weights, optimizers)
    save_training_state(tmp_path / "s", weights, optimizers, {"step": 2, "history": [], "note": "x"})
    step(weights, optimizers)
    others = fresh()
    assert load_training_state(tmp_path / "s", *others) == {"step": 2, "history": [], "note": "x"}
    step(*others)
    assert all(torch.equal(others[0][name], w) for name, w in weights.items())


def test_state_of_other_optimizers_is_refused(tmp_path: Any) -> None:
    weights = {name: torch.randn(4, 4).requires_grad_() for name in ("layers.0.q.weight", "fuse")}
    optimizers = make_optimizers(weights, 1e-2, 1e-2, 0.0)
    for w in weights.values():
        w.grad = w.detach()
    for optimizer in optimizers:
        optimizer.step()
    save_training_state(tmp_path / "s", weights, optimizers, {"step": 1, "history": []})
    moved: list[torch.optim.Optimizer] = [torch.optim.Muon(list(weights.values()))]
    with pytest.raises(UserError, match=r"'fuse'.*start anew"):
        load_training_state(tmp_path / "s", weights, moved)


@pytest.mark.parametrize("text", [*TEXTS, "", " ", "\n\n\t x", "12345 1,000.5", "ﷺ\u0000\u200b"])
def test_tokenizer_loses_nothing(text: str) -> None:
    tok = tokenizer()
    assert tok.decode(tok(text)["input_ids"]) == text
    assert [tok.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 4))
def test_repeated_grams(tokens: list[int], n: int) -> None:
    grams = [tuple(tokens[i - n + 1 : i + 1]) if i >= n - 1 else None for i in range(len(tokens))]
    assert repeated(tokens, n) == [g is not None and g in grams[:i] for i, g in enumerate(grams)]


def test_repetition_loss_is_the_definition(target: Target) -> None:
    """Mean -log(1 - p) over the repeated tokens of each answer, whatever the lengths in the batch."""
    pairs = [([5, 6, 7], [9, 8, 7, 6] * 4), ([5], [3, 4] * 5), ([8, 9], [40, 41, 42, 43, 44])]
    with torch.no_grad():
        got = _repetition_loss(target.model, pairs)
        terms = []
        for question, answer in pairs:
            p = target.model(torch.tensor([question + answer])).logits[0].softmax(-1)
            for i, again in enumerate(repeated(answer)):
                if again:
                    terms.append(-torch.log1p(-p[len(question) + i - 1, answer[i]].clamp_max(1 - 1e-4)))
    assert len(terms) > 10
    torch.testing.assert_close(got, torch.stack(terms).mean(), rtol=1e-4, atol=1e-6)
