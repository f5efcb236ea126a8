"""The models that ship with the package: small enough, lossless, and worth drafting for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ctc_drafter import Target, generate, load_drafter
from ctc_drafter.bench.measure import Contender, measure
from ctc_drafter.bench.prompts import demo_prompts
from ctc_drafter.target import EMBEDDED

MAX_BYTES = 32_000_000


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.load(dtype="float32")


def test_size() -> None:
    files = [f for f in EMBEDDED.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= MAX_BYTES
    assert not [f for f in files if f.suffix in {".bin", ".pt", ".pkl", ".pickle"}]


def test_the_card_tells_of_these_weights(tmp_path: Path) -> None:
    copy = tmp_path / "embedded"
    shutil.copytree(EMBEDDED, copy, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    script = Path(__file__).parents[1] / "benchmarks" / "model_card.py"
    subprocess.run([sys.executable, str(script), str(copy)], check=True)
    assert (copy / "README.md").read_text() == (EMBEDDED / "README.md").read_text()


def test_target_has_the_promised_size(target: Target) -> None:
    parameters = sum(p.numel() for p in target.model.parameters())
    assert 10_000_000 <= parameters <= 30_000_000
    assert target.config.model_type == "llama"


@pytest.mark.parametrize(("name", "least_tau"), [("ctc", 1.6), ("paper", 1.2)])
def test_drafted_equals_plain_and_drafting_helps(target: Target, name: str, least_tau: float) -> None:
    drafter = load_drafter(name, target)
    (result,) = measure(target, [Contender(name, drafter, 16)], demo_prompts(3), max_new_tokens=64)
    assert result.totals["identical"] == result.totals["answers"] == 3
    assert result.totals["tau"] > least_tau


@pytest.mark.parametrize("name", ["ctc", "ctc+lookup", "lookup", "paper"])
def test_a_step_tells_what_smaller_budgets_would_have_brought(target: Target, name: str) -> None:
    """The first drafted step of a text, with one budget and with others: they begin in the same place."""
    drafter, smaller, apart = load_drafter(name, target), [1, 2, 3, 5, 8], 0
    for prompt in demo_prompts(6):
        ids = target.prompt_ids([{"role": "user", "content": prompt.turns[0]}])
        steps = list(generate(target, drafter, ids, max_new_tokens=24, budget=16))
        told = steps[1].tokens_within(smaller)
        for budget in smaller:
            assert told[budget] == len(list(generate(target, drafter, ids, max_new_tokens=24, budget=budget))[1].tokens)
        for step in steps:
            counts = list(step.tokens_within([*smaller, 16]).values())
            assert counts == sorted(counts) and counts[-1] == len(step.tokens)
            apart += counts[0] < counts[-1]
    assert apart > 5


def test_plain_equals_transformers(target: Target) -> None:
    import torch

    ids = target.prompt_ids([{"role": "user", "content": demo_prompts(1)[0].turns[0]}])
    plain = [t for s in generate(target, load_drafter("none", target), ids, max_new_tokens=64) for t in s.tokens]
    with torch.inference_mode():
        theirs = target.model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :].tolist()
    assert plain == theirs
