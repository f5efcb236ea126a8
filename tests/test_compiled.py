"""Compiled passes give the numbers of the eager ones up to rounding, and the same greedy text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CONTEXT
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import Drafter, NoDrafter, compile_passes, load_drafter
from ctc_drafter.drafters import compiled as compiled_drafts
from ctc_drafter.errors import UserError
from ctc_drafter.pace import Pace
from ctc_drafter.steps import Step
from ctc_drafter.target import Target, compiled, model
from ctc_drafter.tree import DraftTree
from helpers import MIXED, save_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # compiling takes half a minute on a free machine, minutes on a busy one
    pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"),
]
BUDGET = 5
KINDS = [
    ("float32", "transposed"),
    ("float32", "packed"),
    *(("bfloat16", way) for way in ("packed", "tiles", "transposed")),
]
"""dtype, and how products of several rows are made: on another processor that is slow, but no other."""


def choose_way(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    alone = "transposed" if way == "transposed" else "loops"
    for place in (model, compiled_drafts):
        monkeypatch.setattr(place, "fastest_way", lambda dtype, single: alone if single else way)


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
    drafter.compile_draft()
    assert target.compile(BUDGET, drafter.feature_layers) < 0.1  # there already
    for prompt in ([7, 8, 9], list(range(20, 90))):
        want = answer(eager, NoDrafter(), prompt)
        assert answer(target, NoDrafter(), prompt) == want
        drafted = answer(target, drafter, prompt)
        assert drafted[0] == want[0]
        assert drafted == answer(eager, load_drafter(str(drafter_folder), eager), prompt)
    # Another budget runs as it did.
    assert answer(target, drafter, [7, 8, 9], budget=3)[0] == answer(eager, NoDrafter(), [7, 8, 9])[0]


def test_a_pass_that_drafts_nothing_for_a_drafter_is_compiled_too(
    target_folder: Path, drafter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target.load(target_folder, dtype="float32", device="cpu")
    drafter = load_drafter(str(drafter_folder), target)
    compile_passes(target, drafter, BUDGET, adaptive=True)
    want = answer(target, NoDrafter(), [7, 8, 9])[0]
    pace = Pace.up_to(BUDGET, compiled=True)
    prefill = target.prefill

    def then_compiled(*args: Any, **options: Any) -> Any:
        read = prefill(*args, **options)
        monkeypatch.setattr(target, "forward", lambda *a, **k: pytest.fail("an eager pass"))
        return read

    monkeypatch.setattr(target, "prefill", then_compiled)
    steps = list(generate(target, drafter, [7, 8, 9], max_new_tokens=CONTEXT, budget=BUDGET, pace=pace))
    assert {step.drafted for step in steps[1:]} == {0, BUDGET}
    assert [token for step in steps for token in step.tokens] == want


@pytest.mark.parametrize(("dtype", "way"), KINDS)
def test_numbers_under_mixed_windows(dtype: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_way(monkeypatch, way)
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


def test_failure_to_compile_is_told(target_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.export, "export", lambda *args, **options: 1 / 0)
    target = Target.load(target_folder, dtype="float32", device="cpu")
    with pytest.raises(UserError, match="cannot be compiled here"):
        target.compile(BUDGET)
    drafter = load_drafter("ctc", Target.load(dtype="float32", device="cpu"))
    with pytest.raises(UserError, match="cannot be compiled here"):
        drafter.compile_draft()


@pytest.mark.parametrize(("dtype", "way"), KINDS)
def test_the_drafters_pass_gives_the_eager_numbers(dtype: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every number of new pairs that a pass may bring, in any order, for the drafter and for a twin of it."""
    choose_way(monkeypatch, way)
    target = Target.load(dtype=dtype, device="cpu")
    eager, compiled = load_drafter("ctc", target, dtype=dtype), load_drafter("ctc", target, dtype=dtype)
    assert compiled.compile_draft() > 0
    assert compiled.compile_draft() == 0  # there already
    generator = torch.Generator().manual_seed(0)
    width = target.hidden_size * len(eager.feature_layers)
    with torch.inference_mode():
        for used in (compiled, compiled.twin()):
            eager.start(128)
            used.start(128)
            for count in (50, 3, 1, 7, 12, 2, 5, 4, 8, 6, 3, 1, 7, 7, 7, 5):  # 128 in all: to the end of the cache
                features = torch.randn(1, count, width, generator=generator).to(target.dtype)
                tokens = torch.randint(target.vocab_size, (1, count), generator=generator)
                (want, root), (got, same) = eager.draft(features, tokens), used.draft(features, tokens)
                assert torch.equal(root, same)
                scale = want.float().abs().max()
                bound = 1e-5 if dtype == "float32" else 3e-2
                assert float((got - want).float().abs().max() / scale) < bound


def test_a_second_process_finds_the_programs(target_folder: Path, tmp_path: Path) -> None:
    """And makes them again where a file is damaged."""
    code = f"""
from ctc_drafter.target import Target
target = Target.load({str(target_folder)!r}, dtype="float32", device="cpu")
print(target.compile(2))
"""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def seconds() -> float:
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    first = seconds()
    programs = sorted((tmp_path / "ctc_drafter").glob("*"))
    assert len(programs) == 2  # plain and drafted, and nothing left aside
    assert seconds() < first / 3
    programs[0].write_bytes(programs[0].read_bytes()[:1000])
    assert seconds() > 0
    assert sorted((tmp_path / "ctc_drafter").glob("*")) == programs
    assert programs[0].stat().st_size > 1000


def test_a_program_that_gives_other_numbers_is_made_anew(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that was made of code that has changed since."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    shutil.copytree(target_folder, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    programs = tmp_path / "cache" / "ctc_drafter"
    Target.load(target_folder, dtype="float32", device="cpu").compile(0)
    [own] = programs.iterdir()
    Target.load(tmp_path / "other", dtype="float32", device="cpu").compile(0)
    [other] = set(programs.iterdir()) - {own}
    shutil.copy(other, own)
    target = Target.load(target_folder, dtype="float32", device="cpu")
    target.compile(0)
    assert own.read_bytes() != other.read_bytes()
    want = answer(Target.load(target_folder, dtype="float32", device="cpu"), NoDrafter(), [7, 8, 9])
    assert answer(target, NoDrafter(), [7, 8, 9]) == want


def test_numbers_that_are_none_are_refused(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    made = compiled.CompiledPass.__call__
    monkeypatch.setattr(
        compiled.CompiledPass, "__call__", lambda *arguments: tuple(t * torch.nan for t in made(*arguments))
    )
    with pytest.raises(UserError, match="other numbers"):
        Target.load(target_folder, dtype="float32", device="cpu").compile(0)
    assert not list((tmp_path / "ctc_drafter").iterdir())


def test_a_program_serves_other_weights_of_the_same_shape(target_folder: Path) -> None:
    target = Target.load(target_folder, dtype="float32", device="cpu")
    target.compile(0)
    other = Target.load(target_folder, dtype="float32", device="cpu")
    with torch.no_grad():
        for i, p in enumerate(other.model.parameters()):
            p.mul_(1 + 0.1 * (i % 3))
    plain = NoDrafter()
    want = answer(other, plain, [7, 8, 9])
    began = time.perf_counter()
    other.compile(0)
    assert time.perf_counter() - began < 5
    assert answer(other, plain, [7, 8, 9]) == want
    assert answer(target, plain, [7, 8, 9]) == answer(Target.load(target_folder, dtype="float32"), plain, [7, 8, 9])


def test_the_embedded_pair_says_the_same_compiled() -> None:
    eager, target = (Target.load(dtype="float32", device="cpu") for _ in range(2))
    drafter = load_drafter("ctc", target)
    compile_passes(target, drafter, 7)
    for chat in ("What is the capital of France?", "Tom has 3 apples and buys 5 more. How many are there?"):
        ids = target.prompt_ids([{"role": "user", "content": chat}])
        want = [t for s in generate(eager, NoDrafter(), ids, max_new_tokens=100) for t in s.tokens]
        for used in (NoDrafter(), drafter):
            assert [t for s in generate(target, used, ids, max_new_tokens=100, budget=7) for t in s.tokens] == want
