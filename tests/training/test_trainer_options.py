"""Options of a recipe: parts of a batch, schedules, averages, the best tau, curves; and runs that must stop."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ctc_drafter.bench.measure import Answer, timed
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import load_drafter
from ctc_drafter.errors import UserError
from ctc_drafter.target import Target
from ctc_drafter.training import loop
from ctc_drafter.training.average import Average
from ctc_drafter.training.evaluate import evaluation_prompts
from ctc_drafter.training.optim import learning_rate_factor
from ctc_drafter.training.problems import read_sequences
from ctc_drafter.training.trainer import TrainConfig, train
from helpers import Killed, killed_at
from small_run import history, small_recipe, weights, write_data


@pytest.fixture(scope="module")
def data(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "train.jsonl", target)


@pytest.fixture
def recipe(target_folder: Path, data: Path, tmp_path: Path) -> TrainConfig:
    return small_recipe(target_folder, data, tmp_path / "drafter")


# ---------------------------------------------------------------- schedule, average


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(0, 100))
def test_cosine_rises_then_falls_to_nothing(steps: int, warmup: int) -> None:
    factors = [learning_rate_factor(i, steps, warmup, 7, "cosine") for i in range(steps + 1)]
    top = min(warmup, steps)
    assert all(0 <= f <= 1 + 1e-12 for f in factors)
    assert all(a >= b for a, b in pairwise(factors[top:]))
    if warmup < steps:
        assert factors[warmup] == 1.0 and factors[steps] == pytest.approx(0, abs=1e-12)
        middle = learning_rate_factor(warmup + (steps - warmup) // 2, steps, warmup, 7, "cosine")
        assert middle == pytest.approx(0.5 if (steps - warmup) % 2 == 0 else middle)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(0.1, 0.99))
def test_average_is_its_recursion(values: list[float], decay: float) -> None:
    weight = {"w": torch.tensor([1.0])}
    average, want = Average(weight, decay), 1.0
    for step, value in enumerate(values):
        weight["w"].fill_(value)
        average.update(step)
        d = min(decay, (1 + step) / (10 + step))
        want = d * want + (1 - d) * value
    assert average.tensors["w"].item() == pytest.approx(want, abs=1e-4)
    with average.in_place():
        assert weight["w"].item() == pytest.approx(want, abs=1e-4)
    assert weight["w"].item() == torch.tensor(values[-1]).item()


def test_the_average_is_what_is_kept(recipe: TrainConfig, tmp_path: Path) -> None:
    plain = train(replace(recipe, output=str(tmp_path / "plain")))
    averaged = train(replace(recipe, ema=0.9))
    state = load_file(Path(recipe.output).with_name("drafter.state") / "state.safetensors")
    for name, value in weights(averaged).items():
        if f"weight/{name}" in state:
            assert torch.equal(state[f"weight/{name}"], weights(plain)[name])
            assert torch.equal(state[f"weight/ema/{name}"], value)
    assert any(not torch.equal(value, weights(plain)[name]) for name, value in weights(averaged).items())
    assert history(averaged)[-1]["held_out"] != history(plain)[-1]["held_out"]


# ---------------------------------------------------------------- parts of a batch


@pytest.mark.parametrize("accumulate", [2, 3, 4])
@pytest.mark.parametrize(
    "config", [{}, {"vocabulary": 40}, {"topology": "merge", "objective": "label", "tree": "paths", "vocabulary": 60}]
)
def test_parts_give_the_same_step(accumulate: int, config: dict[str, Any], recipe: TrainConfig, tmp_path: Path) -> None:
    """Also where a small vocabulary leaves the parts with unequal numbers of anchors; a mean of means is 2e-3 off.

    Muon works in bfloat16, so rounding reaches the weights as some percent of the learning rate.
    """
    recipe = replace(recipe, drafter={**recipe.drafter, **config}, lr_matrix=5e-4, lr_other=5e-4)
    whole = train(replace(recipe, output=str(tmp_path / "whole")))
    parts = train(replace(recipe, accumulate=accumulate))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=0, atol=1e-4)
    for got, want in zip(history(parts), history(whole), strict=True):
        assert got == pytest.approx(want, abs=2e-4)


def test_a_drafter_names_its_own_weight(recipe: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are all in one part: the step is that part's alone."""
    from ctc_drafter.drafters import CTCDrafter

    calls: list[int] = []

    def only_the_first(self: Any, anchors: torch.Tensor, labels: torch.Tensor, possible: torch.Tensor) -> float:
        calls.append(len(anchors))
        return float(len(calls) % 2)

    monkeypatch.setattr(CTCDrafter, "loss_weight", only_the_first, raising=False)
    train(replace(recipe, accumulate=2, held_out=0.0))
    assert calls == [2] * 2 * recipe.steps


def test_a_batch_too_small_for_its_parts(recipe: TrainConfig) -> None:
    with pytest.raises(UserError, match="cannot be split"):
        train(replace(recipe, accumulate=5))


# ---------------------------------------------------------------- the best tau


def measured(folder: Path, target: Target, prompts: list[list[int]], tokens: int, budget: int) -> float:
    """Tau by its definition: tokens after the prefill's, over verification steps."""
    drafter = load_drafter(str(folder), target)
    answers = []
    for ids in prompts:
        answers.append(Answer())
        for _ in timed(generate(target, drafter, ids, max_new_tokens=tokens, budget=budget), answers[-1], target):
            pass
    return sum(len(a.tokens) - 1 for a in answers) / sum(len(a.accepted) for a in answers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_best_tau_is_kept(dtype: str, recipe: TrainConfig, tmp_path: Path) -> None:
    """Training that ruins the drafter after its best checkpoint: the folder holds the best one, not the last."""
    recipe = replace(recipe, dtype=dtype, steps=40, checkpoint_every=5, lr_matrix=1e-2, lr_other=1e-2, held_out=0.3)
    recipe = replace(recipe, evaluate_prompts=3, evaluate_tokens=20, evaluate_budget=4)
    folder = train(recipe)
    rows = history(folder)
    best = max(rows, key=lambda row: row["tau"])
    kept = json.loads((folder / "config.json").read_text())["training"]["kept"]
    assert kept["step"] == best["step"] and kept["tau"] == pytest.approx(best["tau"], abs=1e-4)
    target = Target.load(recipe.target, dtype=dtype, device="cpu")
    prompts = evaluation_prompts(recipe, target, read_sequences(recipe, target)[1])
    assert len(prompts) == 3
    assert measured(folder, target, prompts, 20, 4) == pytest.approx(best["tau"], abs=1e-4)
    unmeasured = train(replace(recipe, evaluate_prompts=0, output=str(tmp_path / "plain")))
    assert [{k: v for k, v in row.items() if k != "tau"} for row in rows] == history(unmeasured)


def test_the_best_is_kept_over_a_break(recipe: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(recipe, steps=12, ema=0.5, evaluate_prompts=2, evaluate_tokens=8, held_out=0.3)
    taus = iter([1.5, 1.25, 1.125, 1.0, 1.5, 1.25, 1.125, 1.0])
    monkeypatch.setattr(loop, "decoded_tau", lambda *_: next(taus))
    whole = train(replace(recipe, output=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        killed_at(4, patch)
        with pytest.raises(Killed):
            train(recipe)
    third = load_file(Path(recipe.output).with_name("drafter.state") / "state.safetensors")
    resumed = train(recipe)
    last = load_file(Path(recipe.output).with_name("drafter.state") / "state.safetensors")
    kept = {name: value for name, value in weights(resumed).items() if f"weight/{name}" in third}
    assert all(torch.equal(value, third[f"weight/ema/{name}"]) for name, value in kept.items())
    assert any(not torch.equal(value, last[f"weight/ema/{name}"]) for name, value in kept.items())
    assert json.loads((resumed / "config.json").read_text())["training"]["kept"] == {"step": 3, "tau": 1.5}
    assert history(resumed) == history(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())


def test_tau_needs_held_out_sequences(recipe: TrainConfig) -> None:
    with pytest.raises(UserError, match="evaluate_prompts needs held-out sequences"):
        train(replace(recipe, evaluate_prompts=2, held_out=0.0))


# ---------------------------------------------------------------- runs that stop


def test_a_kill_between_the_renames_of_a_save(recipe: TrainConfig) -> None:
    """The state before is all there is; the run goes on from it instead of from nothing."""
    folder = train(recipe)
    before, state = weights(folder), folder.with_name("drafter.state")
    state.rename(state.with_name(".drafter.state.old"))
    assert all(torch.equal(value, before[name]) for name, value in weights(train(recipe)).items())


def test_leftovers_of_a_kill_after_the_last_save_are_removed(recipe: TrainConfig) -> None:
    folder = train(recipe)
    names = {p.name for p in folder.parent.iterdir()}
    for left in (".drafter.state.old", ".drafter.state.writing"):
        (folder.parent / left).mkdir()
        (folder.parent / left / "state.json").write_text("{}")
    train(recipe)
    assert {p.name for p in folder.parent.iterdir()} == names


def test_a_recipe_older_than_its_keys_goes_on(recipe: TrainConfig) -> None:
    folder = train(recipe)
    path = folder.with_name("drafter.recipe.json")
    old = json.loads(path.read_text())
    for key in ("accumulate", "schedule", "ema", "evaluate_prompts", "evaluate_tokens", "evaluate_budget"):
        del old[key]
    path.write_text(json.dumps(old))
    train(recipe)
    path.write_text(json.dumps(old))
    with pytest.raises(UserError, match="ema differ"):
        train(replace(recipe, ema=0.5))


# ---------------------------------------------------------------- curves


def test_event_files_hold_every_step_once(recipe: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        killed_at(5, patch)
        with pytest.raises(Killed):
            train(recipe)
    folder = train(recipe)
    events = EventAccumulator(str(folder.with_name("drafter.logs")))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    rows = [(e.step, pytest.approx(e.value, abs=1e-4)) for e in events.Scalars("checkpoint/held_out")]
    assert rows == [(row["step"], row["held_out"]) for row in history(folder)]


def test_without_tensorboard_there_are_no_curves(recipe: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not train(recipe).with_name("drafter.logs").exists()


def test_wandb_is_told_when_asked(recipe: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    started: list[dict[str, Any]] = []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)

    def init(**options: Any) -> Any:
        started.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    train(recipe, wandb=True)
    assert [step for step, values in logged if "train/loss" in values] == [1, 2, 3, 4, 5, 6]
    assert [step for step, values in logged if "checkpoint/held_out" in values] == [3, 6]
    train(replace(recipe, steps=8, decay=4), wandb=True)
    assert started[0]["id"] == started[1]["id"] and started[0]["config"]["batch"] == 4


def test_wandb_that_is_missing_is_said_before_any_work(recipe: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        train(replace(recipe, target="nowhere"), wandb=True)


# ---------------------------------------------------------------- training on


def test_init_takes_the_weights_of_another_run(recipe: TrainConfig, tmp_path: Path) -> None:
    first = train(recipe)
    still = replace(recipe, output=str(tmp_path / "second"), init=str(first), lr_matrix=0.0, lr_other=0.0, seed=3)
    mine, theirs = weights(train(still)), weights(first)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, msg=name)


def test_weights_are_written_as_the_recipe_says(recipe: TrainConfig, target: Target) -> None:
    full = weights(train(recipe))
    small = weights(train(replace(recipe, store="bfloat16")))  # the same run, finished: only written again
    for name, tensor in full.items():
        assert torch.equal(small[name], tensor.bfloat16() if tensor.is_floating_point() else tensor), name
    load_drafter(recipe.output, target)
    smaller = weights(train(replace(recipe, store="float8_e4m3fn")))
    eight = {name for name, tensor in smaller.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {"module.fuse.weight", "module.layers.0.q.weight", "module.slot_layers.0.weight"} <= eight
    assert not any("norm" in name or "embedding" in name or "blank" in name for name in eight)
    for name in eight:
        torch.testing.assert_close(smaller[name].float(), full[name], rtol=0.07, atol=0.001, msg=name)
    load_drafter(recipe.output, target)


def test_init_that_does_not_fit_is_refused(recipe: TrainConfig, tmp_path: Path) -> None:
    first = train(recipe)
    other = replace(recipe, output=str(tmp_path / "second"), init=str(first))
    wider = {**recipe.drafter, "context_rank": 9}
    for changes in ({"drafter": wider}, {"kind": "medusa", "drafter": {}}, {"init": str(tmp_path / "none")}):
        with pytest.raises(UserError, match="cannot be trained on from"):
            train(replace(other, **changes))
    assert not (tmp_path / "second").exists()
