"""Each script of benchmarks/ as its user runs it, in miniature: it ends well, and what it wrote is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import TEXTS, build_target
from ctc_drafter.target import Target
from small_run import write_data

ROOT = Path(__file__).parents[2]
SIZES = "--prompts {prompts} --limit 2 --max-new-tokens 10"
SCRIPTS = {
    "adaptive": f"{SIZES} --drafter lookup --budgets 2 4 --dtype float32",
    "batches": f"{SIZES} --sizes 1 2 --rounds 1 --dtype float32",
    "budgets": f"{SIZES} --budgets 2 4",
    "curves": "--longest 256 --tokens 4 --figure {folder}/step.svg",
    "engine": f"{SIZES} --dtype float32 --memory",
    "overhead": "",
    "prefixes": "--prompts 2 --tokens 4",
    "products": "--rows 1 4 --rounds 1",
    "serving": "--prompts {prompts} --limit 1 --clients 2 --slots 2 --seconds 3 --max-tokens 12",
    "shapes": "--shape llama-3.1-8b --scale 0.0625 --layers 1 --steps 4 --context 32 --dtype float32",
}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": i, "category": "math", "turns": [f"What is {i} and {i + 3}? {TEXTS[i]}"]} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, f"benchmarks/{name}.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": "src"}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)


def result_of(name: str, path: Path, *arguments: object) -> dict[str, Any]:
    """What the script wrote to `path`."""
    done = run(name, *arguments, "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Result: {path}" in done.stdout
    content: dict[str, Any] = json.loads(path.read_text())
    assert content["command"].startswith(f"python benchmarks/{name}.py")
    assert content["machine"] and content["versions"]
    return content


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_and_keeps_its_result(name: str, prompts: Path, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    arguments = SCRIPTS[name].format(prompts=prompts, folder=tmp_path).split()
    result_of(name, path, *arguments)
    before = path.read_bytes()
    again = run(name, *arguments, "--json", path)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr and "Traceback" not in again.stderr
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_family_of_targets(prompts: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    chats = [
        [{"role": "user", "content": f"Say {i}. {TEXTS[i % 5]}"}, {"role": "assistant", "content": TEXTS[-i % 5] * 3}]
        for i in range(600)
    ]
    corpus.write_text("".join(json.dumps({"messages": chat, "source": "own"}) + "\n" for chat in chats))
    recipe = {"data": [str(corpus)], "output": "x", "vocab_size": 400, "block": 32, "batch": 4, "compile": False}
    (tmp_path / "target.yaml").write_text(yaml.safe_dump({**recipe, "warmup": 2}))
    recipe = {"prompts": [str(corpus)], "output": "x", "limit": 20, "max_new_tokens": 12}
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(recipe))
    work, path, figure = tmp_path / "work", tmp_path / "result.json", tmp_path / "scaling.svg"
    own = ("--config", tmp_path / "target.yaml", "--distill", tmp_path / "distill.yaml", "--prompts", prompts)
    small = ("--sizes", "2m", "5m", "--steps", 4, "--drafter-steps", 2, "--jobs", 2, "--budgets", 4, "--limit", 1)
    content = result_of("scaling", path, *own, *small, "--work", work, "--figure", figure)
    assert [(row["size"], row["drafter"]) for row in content["rows"]] == [
        (size, drafter) for size in ("2m", "5m") for drafter in ("ctc", "ctc+lookup", "lookup")
    ]
    assert all(row["identical"] == row["answers"] == 1 for row in content["rows"])
    assert content["rows"][0]["parameters"] < content["rows"][-1]["parameters"]
    assert "<svg" in figure.read_text()


@pytest.mark.slow
def test_every_method_of_the_field(prompts: Path, tmp_path: Path) -> None:
    target = build_target(tmp_path / "target", layers=5)
    data = write_data(tmp_path / "data.jsonl", Target.load(target))
    path = tmp_path / "results" / "table.json"
    own = ("--target", target, "--data", data, "--eval", tmp_path, "--files", prompts.name, "--work", tmp_path / "work")
    content = result_of("methods", path, "table", *own, "--steps", 2, "--jobs", 2, "--budgets", 4, "--limit", 1)
    methods = {"lookup", "medusa", "hydra", "eagle", "paper", "ctc", "ctc-three-layers", "parallel"}
    assert {row["method"] for row in content["rows"]} == methods
    assert {f.name for f in path.parent.glob("table-*.json")} == {f"table-{name}-4.json" for name in methods}
