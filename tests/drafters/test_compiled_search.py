"""Drafters search in C++ once that is compiled, and in arrays without a compiler; the text is the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch._inductor.codecache import CppCodeCache

from ctc_drafter.decoding import generate
from ctc_drafter.drafters import load_drafter
from ctc_drafter.lattice.best_first import best_first_of_slots
from ctc_drafter.lattice.native import NativeSearch
from ctc_drafter.target import Target


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return Target.load(dtype="float32", device="cpu")


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_when_asked_and_found_after_that(embedded: Target) -> None:
    drafter = load_drafter("ctc+lookup", embedded)
    assert drafter.base._search is best_first_of_slots
    assert drafter.compile_search() > 0
    assert drafter.compile_search() == 0
    later = load_drafter("ctc", embedded)
    for each in (drafter.base, drafter.base.twin(), later):
        assert isinstance(each._search, NativeSearch)
    prompt = embedded.prompt_ids([{"role": "user", "content": "Count from one to ten."}])
    plain, *drafted = (
        [token for step in generate(embedded, each, prompt, max_new_tokens=48) for token in step.tokens]
        for each in (load_drafter("none", embedded), drafter, later)
    )
    assert drafted == [plain, plain]


def test_without_a_compiler_it_stays_as_it_is(embedded: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CppCodeCache, "load", lambda *args, **options: 1 / 0)
    drafter = load_drafter("paper", embedded)
    drafter.compile_search()
    assert drafter._search is best_first_of_slots
    assert load_drafter("none", embedded).compile_search() == 0


@pytest.mark.parametrize("name", ["ctc", "paper"])
def test_a_narrower_dtype_guesses_alike(name: str, embedded: Target) -> None:
    """Every word is the target's own in either; the trees differ by rounding."""
    wide, narrow = (load_drafter(name, embedded, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    prompt = embedded.prompt_ids([{"role": "user", "content": "Write a Python function that adds two numbers."}])
    answers, steps = [], []
    for drafter in (load_drafter("none", embedded), wide, narrow):
        passes = list(generate(embedded, drafter, prompt, max_new_tokens=96))
        answers.append([token for step in passes for token in step.tokens])
        steps.append(len(passes))
    assert answers[1] == answers[2] == answers[0]
    assert abs(steps[1] - steps[2]) <= 0.1 * steps[1]
