"""`ctc-drafter inspect`: what a folder is, and which damage it finds, without a target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conftest import build_drafter, build_target
from ctc_drafter.cli import app
from ctc_drafter.drafters import EMBEDDED_DRAFTERS, load_drafter
from ctc_drafter.errors import UserError
from ctc_drafter.target import Target


def inspect(*args: object) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, args)])


def told(*args: object, code: int = 0) -> dict[str, Any]:
    result = inspect(*args, "--json")
    assert result.exit_code == code, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def failed(report: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["note"] for check in report["checks"] if not check["ok"]}


@pytest.fixture
def copy(drafter_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drafter_folder, tmp_path / "copy"))


def test_a_drafter_is_told_without_its_target(drafter_folder: Path, target: Target) -> None:
    report = told(drafter_folder)
    assert report["what"] == "drafter" and report["kind"] == "ctc" and not failed(report)
    assert report["target"]["hidden_size"] == 64 and report["target"]["vocab_size"] == target.vocab_size
    assert report["proposed_tokens"] == 4 and report["kept_tokens"] == target.vocab_size
    assert report["parameters"] > 0 and report["bytes"] > 0 and report["training"] is None
    text = inspect(drafter_folder).stdout
    assert "made for" in text and "context_rank 8" in text and "BAD" not in text


@pytest.mark.parametrize("kind", ["parallel", "medusa", "hydra", "eagle"])
def test_every_kind_can_be_told(kind: str, target: Target, tmp_path: Path) -> None:
    report = told(build_drafter(tmp_path / kind, target, kind))
    assert report["kind"] == kind and not failed(report)


@pytest.mark.parametrize("name", EMBEDDED_DRAFTERS)
def test_what_ships_is_whole(name: str, tmp_path: Path) -> None:
    assert not failed(told(name))
    result = CliRunner().invoke(app, ["export", name, "--to", "transformers", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output


def test_a_training_summary_is_told(copy: Path) -> None:
    content = json.loads((copy / "config.json").read_text())
    content["training"] = {"steps": 20, "history": [{"step": 10, "held_out": 3.0}, {"step": 20, "held_out": 2.5}]}
    (copy / "config.json").write_text(json.dumps(content))
    (copy / "run.yaml").write_text("recipe: {data: [a.jsonl], seed: 7}\nversions: {git_commit: abc}\n")
    training = told(copy)["training"]
    assert training["steps"] == 20 and training["last"]["held_out"] == 2.5 and training["recipe"]["seed"] == 7
    text = inspect(copy).stdout
    assert "held_out 2.5" in text and "abc" in text


def test_damage_is_found(copy: Path) -> None:
    file = copy / "model.safetensors"
    weights = load_file(file)
    name = next(n for n, w in weights.items() if w.is_floating_point() and w.dim() == 2)

    assert not failed(told(copy))
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    assert "not the file that config.json was written with" in failed(told(copy, code=1))["digest"]
    save_file({**weights, name: torch.full_like(weights[name], torch.nan)}, file)
    assert name in failed(told(copy, code=1))["values"]
    save_file({**weights, name: weights[name][:-1].clone(), "stranger": torch.zeros(1)}, file)
    assert {"shape", "stranger"} <= set(failed(told(copy, code=1))["tensors"].replace("not expected", "").split())
    save_file({n: w for n, w in weights.items() if n != name}, file)
    assert f"{name} is missing" in failed(told(copy, code=1))["tensors"]
    save_file({**weights, "kept": weights["kept"].flip(0)}, file)
    assert "kept" in failed(told(copy, code=1))["values"]
    file.write_bytes(file.read_bytes()[:100])
    assert {"tensors", "values"} <= failed(told(copy, code=1)).keys()
    file.unlink()
    assert "no model.safetensors" in failed(told(copy, code=1))["tensors"]
    content = json.loads((copy / "config.json").read_text())
    content["drafter"]["slotss"] = 3
    (copy / "config.json").write_text(json.dumps(content))
    assert "slotss" in failed(told(copy, code=1))["config"]
    result = inspect(copy)
    assert result.exit_code == 1 and "BAD" in result.stdout


@pytest.mark.parametrize("fault", ["nan", "order", "probe", "kind"])
def test_inspection_and_loading_say_the_same(fault: str, copy: Path, target: Target) -> None:
    weights, content = load_file(copy / "model.safetensors"), json.loads((copy / "config.json").read_text())
    content.pop("weights_sha256")
    if fault == "nan":
        weights["blank"].fill_(torch.nan)
    elif fault == "order":
        weights["kept"] = weights["kept"].flip(0).contiguous()
    elif fault == "probe":
        content["speculators_config"]["verifier"]["probe"] = ["no number"]
    else:
        content["speculators_model_type"] = "stranger"
    save_file(weights, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as refusal:
        load_drafter(str(copy), target)
    if fault in ("nan", "order"):
        assert failed(told(copy, code=1))["values"] in str(refusal.value)
    else:  # it is no drafter that could be told of
        result = inspect(copy)
        assert result.exit_code == 2 and result.stderr.strip() == str(refusal.value)


def test_whether_a_drafter_fits_a_target(drafter_folder: Path, target_folder: Path, tmp_path: Path) -> None:
    assert not failed(told(drafter_folder, "--target", target_folder))
    other = build_target(tmp_path / "sibling", seed=5)
    assert "weights differ" in failed(told(drafter_folder, "--target", other, code=1))["fits 'sibling'"]


def test_a_target_is_told(target_folder: Path, target: Target, tmp_path: Path) -> None:
    report = told(target_folder)
    assert report["what"] == "target" and report["architectures"] == ["LlamaForCausalLM"] and report["chat_template"]
    assert report["layers"] == 2 and report["context"] == 192 and set(report["stop_ids"]) == set(target.stop_ids)
    assert report["parameters"] == sum(p.numel() for p in target.model.parameters()) and report["dtype"] == ["F32"]
    assert [check["name"] for check in told(target_folder, "--self-test")["checks"]] == [
        "configs",
        "weights",
        "tree self-test",
    ]
    assert not told(build_target(tmp_path / "base", chat=False))["chat_template"]


def test_parts_of_a_target_are_held_against_their_index(target_folder: Path, target: Target, tmp_path: Path) -> None:
    target.model.save_pretrained(tmp_path, max_shard_size="50KB")
    report = told(tmp_path)
    assert not failed(report) and report["parameters"] == told(target_folder)["parameters"]
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    shutil.copy(parts[1], parts[0])
    assert "tensors of the index are missing" in failed(told(tmp_path, code=1))["weights"]
    parts[0].unlink()
    assert f"1 of {len(parts)} parts" in failed(told(tmp_path, code=1))["weights"]


def test_a_result_is_one_line(tmp_path: Path) -> None:
    totals = {"answers": 3, "tokens": 90, "tau": 2.5, "tokens_per_second": 20.0, "plain_tokens_per_second": 10.0}
    totals |= {"speedup": 2.0, "efficiency": 0.8, "identical": 3}
    content = {
        "kind": "ctc-drafter bench",
        "complete": True,
        "target": {"name": "tiny", "dtype": "float32", "device": "cpu"},
        "drafter": {"name": "ctc", "budget": 8},
        "totals": totals,
    }
    file = tmp_path / "r.json"
    file.write_text(json.dumps(content))
    line = inspect(file).stdout
    assert line.count("\n") == 1 and "tau 2.50" in line and "3 of 3" in line
    assert told(file)["totals"] == totals
    file.write_text(json.dumps({**content, "totals": {}}))
    assert inspect(file).exit_code == 2


def test_what_is_refused(drafter_folder: Path, target_folder: Path, tmp_path: Path) -> None:
    broken, other = tmp_path / "broken", tmp_path / "other"
    for folder, text in ((broken, "{"), (other, '{"a": 1}')):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    cases: list[tuple[tuple[object, ...], str]] = [
        ((tmp_path / "no",), "no file or folder"),
        ((tmp_path,), "no config.json"),
        ((broken,), "is not valid JSON"),
        ((other,), "neither a drafter nor"),
        ((broken / "config.json",), "JSON"),
        ((other / "config.json",), "not a result file"),
        ((target_folder, "--target", target_folder), "--target is for drafters"),
        ((drafter_folder, "--self-test"), "--self-test is for targets"),
    ]
    for args, words in cases:
        result = inspect(*args)
        assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr
