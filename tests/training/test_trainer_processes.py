"""Training in processes of their own: several on one batch, one that is killed, two in one folder."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from ctc_drafter.errors import UserError
from ctc_drafter.target import Target
from ctc_drafter.training.trainer import TrainConfig, train
from small_run import ONE_THREAD, command, history, run, small_recipe, weights, write_data


@pytest.fixture(scope="module")
def data(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "train.jsonl", target)


@pytest.fixture
def recipe(target_folder: Path, data: Path, tmp_path: Path) -> TrainConfig:
    return small_recipe(target_folder, data, tmp_path / "drafter", lr_matrix=5e-4, lr_other=5e-4)


def start(recipe: TrainConfig) -> subprocess.Popen[str]:
    return subprocess.Popen(command(recipe), env=ONE_THREAD, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait as long as the process lives; a test that hangs is ended by its own limit."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def steps_saved(recipe: TrainConfig) -> int:
    """The step of the state on disk; 0 while there is none."""
    try:
        return int(json.loads((Path(recipe.output + ".state") / "state.json").read_text())["step"])
    except FileNotFoundError:
        return 0


# ---------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_what_one_does(accumulate: int, recipe: TrainConfig, tmp_path: Path) -> None:
    """Losses and weights to 1e-4, though a small vocabulary gives the two unequal numbers of anchors."""
    recipe = replace(recipe, drafter={**recipe.drafter, "vocabulary": 40}, evaluate_prompts=2, evaluate_tokens=8)
    recipe = replace(recipe, accumulate=accumulate)
    alone = replace(recipe, output=str(tmp_path / "alone"), accumulate=1)
    assert run(alone).returncode == 0
    result = run(recipe, processes=2)
    assert result.returncode == 0, result.stderr
    folder, whole = Path(recipe.output), Path(alone.output)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(folder)[name], value, rtol=0, atol=1e-4)
    for got, want in zip(history(folder), history(whole), strict=True):
        assert got == pytest.approx(want, abs=2e-4)
    assert yaml.safe_load((folder / "run.yaml").read_text())["processes"] == 2
    assert result.stdout == f"Drafter: {folder}\n"
    assert result.stderr.count("target   tiny") == result.stderr.count("step 3") == 1


@pytest.mark.slow
def test_a_shared_out_target_trains_what_a_whole_one_does(recipe: TrainConfig, target: Target, tmp_path: Path) -> None:
    """Losses, tau and weights to 1e-4, while each process holds half of the layers' weights."""
    recipe = replace(recipe, evaluate_prompts=2, evaluate_tokens=8, checkpoint_every=2)
    alone = replace(recipe, output=str(tmp_path / "alone"))
    assert run(alone).returncode == 0
    result = run(replace(recipe, shard=True), processes=2)
    assert result.returncode == 0, result.stderr
    for name, value in weights(Path(alone.output)).items():
        torch.testing.assert_close(weights(Path(recipe.output))[name], value, rtol=0, atol=1e-4)
    for got, want in zip(history(Path(recipe.output)), history(Path(alone.output)), strict=True):
        assert got == pytest.approx(want, abs=2e-4)
    layers = sum(p.numel() for p in target.model.get_decoder().layers.parameters())
    whole = sum(p.numel() for p in target.model.parameters())
    assert f"each process holds {whole - layers // 2:,} parameters" in " ".join(result.stderr.split())


def test_sharding_alone_is_refused(recipe: TrainConfig) -> None:
    with pytest.raises(UserError, match="shard needs several processes"):
        train(replace(recipe, shard=True))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(recipe: TrainConfig, tmp_path: Path) -> None:
    alone = replace(recipe, output=str(tmp_path / "alone"))
    assert run(alone).returncode == 0
    assert run(replace(recipe, steps=3, decay=1), processes=2).returncode == 0  # before the decay of the whole
    assert run(recipe).returncode == 0
    for got, want in zip(history(Path(recipe.output)), history(Path(alone.output)), strict=True):
        assert got == pytest.approx(want, abs=2e-4)


@pytest.mark.slow
def test_an_error_in_company_is_one_sentence(recipe: TrainConfig) -> None:
    result = run(replace(recipe, batch=30), processes=2)
    assert result.returncode != 0
    assert result.stderr.count("fewer than one batch of 30") == 1
    assert not Path(recipe.output + ".lock").exists()
    missing = run(replace(recipe, batch=1), processes=2)
    assert missing.stderr.count("A batch of 1 cannot be split over 2 processes") == 1


# ---------------------------------------------------------------- kills and company


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_unbroken(recipe: TrainConfig, tmp_path: Path) -> None:
    """kill -9 in the middle: the same weights and loss curve to the last bit. While it lives, nobody else gets in."""
    recipe = replace(recipe, steps=300, checkpoint_every=20, decay=100, ema=0.9)
    whole = replace(recipe, output=str(tmp_path / "whole"))
    assert run(whole).returncode == 0
    process = start(recipe)
    wait_for(lambda: steps_saved(recipe) >= 40, process)
    process.send_signal(signal.SIGSTOP)  # it lives, but does not finish meanwhile
    second = run(recipe)
    assert second.returncode == 2 and f"process {process.pid} on" in second.stderr
    assert second.stdout == "" and len(second.stderr.strip().splitlines()) == 1
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and steps_saved(recipe) < recipe.steps
    assert Path(recipe.output + ".lock").exists() and not Path(recipe.output).exists()
    resumed = run(recipe)
    assert resumed.returncode == 0, resumed.stderr
    assert not Path(recipe.output + ".lock").exists()
    assert history(Path(recipe.output)) == history(Path(whole.output))
    mine, want = weights(Path(recipe.output)), weights(Path(whole.output))
    assert all(torch.equal(mine[name], value) for name, value in want.items())


def test_a_real_dry_run(recipe: TrainConfig) -> None:
    result = run(recipe, "--dry-run", "--set", "steps=1000", "--set", "drafter.layers=2", "--set", "lr_matrix=1e-3")
    assert result.returncode == 0, result.stderr
    printed = yaml.safe_load(result.stdout)
    assert printed["drafter"]["layers"] == 2 and printed["steps"] == 1000 and printed["lr_matrix"] == 0.001
    said = " ".join(result.stderr.split())
    assert "4,000 sequences" in said and "s a step, about" in said
    assert not Path(recipe.output + ".state").exists() and not Path(recipe.output + ".lock").exists()


def test_wandb_that_is_missing(recipe: TrainConfig) -> None:
    code = "import sys; sys.modules['wandb'] = None; from ctc_drafter.cli import main; main()"
    line = [sys.executable, "-c", code, *command(recipe, "--wandb")[3:]]
    result = subprocess.run(line, env=ONE_THREAD, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stderr == (
        "--wandb needs the package wandb, which is not installed: pip install wandb.\n"
    )
