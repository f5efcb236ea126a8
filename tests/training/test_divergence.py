"""A loss or a gradient that is no number ends a run before it reaches the weights, and what was saved stays."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ctc_drafter.target import Target
from ctc_drafter.training import loop, pretrain
from ctc_drafter.training.optim import clip_gradients
from ctc_drafter.training.pretrain import PretrainConfig
from ctc_drafter.training.trainer import TrainConfig, train
from helpers import refused
from small_run import small_recipe, weights, write_data

Spoil = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def no_number(loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return loss * math.nan


def steep(loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same loss, with an infinite gradient."""
    one = weight.flatten()[0].float()
    return loss + (one - one.detach()).sqrt()


SPOILT: Any = pytest.mark.parametrize(("spoil", "what"), [(no_number, "loss"), (steep, "gradient")])


@pytest.fixture
def recipe(target: Target, target_folder: Path, tmp_path: Path) -> TrainConfig:
    return small_recipe(target_folder, write_data(tmp_path / "train.jsonl", target), tmp_path / "drafter")


def spoilt_at(step: int, spoil: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = loop.problem_loss, iter(range(100))

    def loss(target: Any, drafter: Any, *rest: Any) -> Any:
        value, metrics = real(target, drafter, *rest)
        return (spoil(value, next(drafter.parameters())) if next(calls) == step else value), metrics

    monkeypatch.setattr(loop, "problem_loss", loss)


@SPOILT
def test_the_run_ends_with_its_last_good_state(
    spoil: Spoil, what: str, recipe: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        spoilt_at(5, spoil, patch)
        said = refused(train, recipe)
    state = tmp_path / "drafter.state"
    assert f"The {what} is not finite at step 5" in said and str(state) in said and not Path(recipe.output).exists()
    assert json.loads((state / "state.json").read_text())["step"] == 3
    assert all(bool(tensor.float().isfinite().all()) for tensor in weights(train(recipe)).values())


@SPOILT
def test_no_state_is_named_where_there_is_none(
    spoil: Spoil, what: str, recipe: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt_at(1, spoil, monkeypatch)
    assert refused(train, recipe) == (
        f"The {what} is not finite at step 1; start anew with a lower lr_matrix and lr_other."
    )


@SPOILT
def test_pretraining_ends_too(spoil: Spoil, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its steps, before its state is named and after, and in those against loops."""
    rows = [{"messages": [{"role": r, "content": f"{i} {r}"} for r in ("user", "assistant")]} for i in range(400)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "layers": 1, "heads": 2, "kv_heads": 1}
    run = {"context": 64, "block": 16, "batch": 4, "steps": 4, "checkpoint_every": 2, "compile": False}
    against = {"unlikelihood_steps": 2, "unlikelihood_batch": 2, "unlikelihood_tokens": 4}
    config = PretrainConfig([str(tmp_path / "data.jsonl")], str(tmp_path / "model"), **sizes, **run, **against)
    real = pretrain.block_loss

    def spoilt(step: int) -> str:
        calls = iter(range(100))

        def loss(model: Any, body: Any, *rest: Any) -> Any:
            value = real(model, body, *rest)
            first = next(model.parameters())
            return spoil(value, first) if torch.is_grad_enabled() and next(calls) == step else value

        monkeypatch.setattr(pretrain, "block_loss", loss)
        return refused(pretrain.pretrain, config)

    state = tmp_path / "model.work" / "state"
    assert spoilt(1) == f"The {what} is not finite at step 1; start anew with a lower lr_matrix and lr_other."
    assert f"The {what} is not finite at step 3" in (said := spoilt(3)) and str(state) in said
    assert json.loads((state / "state.json").read_text())["step"] == 2
    assert f"The {what} against loops is not finite at step 1; lower unlikelihood_lr" in spoilt(3)
    assert not Path(config.output).exists()


def test_loss_and_norm_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy to the host; and the clipped gradients have a norm of 1."""
    weight = torch.nn.Parameter(torch.ones(4))
    (loss := (3 * weight).sum()).backward()
    copies: list[int] = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (copies.append(self.numel()), real(self))[1])
    assert clip_gradients([weight], loss) == (12.0, "") and copies == [2]
    assert weight.grad is not None and weight.grad.norm() == pytest.approx(1, abs=1e-4)
