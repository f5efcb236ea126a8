"""What was read of earlier prompts changes no token, stays within its bounds, and is not read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ctc_drafter.acceptance import Sampling
from ctc_drafter.batch import Batch
from ctc_drafter.drafters import Drafter, NoDrafter, load_drafter
from ctc_drafter.errors import UserError
from ctc_drafter.target import Target
from ctc_drafter.target.prefixes import Prefixes
from helpers import MIXED, save_model

SHARED = list(range(40, 80))
PROMPTS = [[*SHARED, 5, 6, 7], [*SHARED, 5, 6, 90, 91], SHARED, [*SHARED, 5, 6, 7], [9, *SHARED], SHARED[:20]]


def answers(target: Target, drafter: Drafter, prefix_cache: int, rows: int, sampling: Sampling) -> list[list[int]]:
    batch = Batch(target, drafter, rows=rows, budget=4, adaptive=False, prefix_cache=prefix_cache)
    out: dict[int, list[int]] = {}
    waiting = list(PROMPTS)
    while waiting or len(batch):
        while waiting and batch.free:
            out[batch.add(waiting.pop(0), max_new_tokens=12, sampling=sampling)] = []
        for key, step in batch.step():
            assert step.error is None
            out[key] += step.tokens
    if batch.prefixes is not None:
        assert 0 < batch.prefixes.nbytes <= prefix_cache
    return list(out.values())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=3)], ids=["greedy", "sampled"])
def test_answers_are_those_without(target: Target, drafter: Drafter, rows: int, sampling: Sampling) -> None:
    for used in (drafter, NoDrafter()):
        want = answers(target, used, 0, rows, sampling)
        assert answers(target, used, 10**8, rows, sampling) == want
        assert answers(target, used, 150_000, rows, sampling) == want  # room for a few prompts only


def test_answers_under_mixed_windows(tmp_path: Path) -> None:
    target = Target.load(save_model(tmp_path / "olmo3", "olmo3", **MIXED), dtype="float32", device="cpu")
    for rows in (1, 3):
        want = answers(target, NoDrafter(), 0, rows, Sampling())
        assert answers(target, NoDrafter(), 10**8, rows, Sampling()) == want


@torch.inference_mode()
def test_only_what_is_new_is_read(target: Target) -> None:
    target.capture((1,))
    prefixes, cache = Prefixes(10**8), target.new_cache(64)
    logits, features = target.prefill(PROMPTS[0], cache)
    prefixes.add(PROMPTS[0], (1,), cache, 0, features, 0)
    assert prefixes.find(PROMPTS[1], ()) is None  # other features
    known = prefixes.find(PROMPTS[1], (1,))
    assert known is not None and len(known.ids) == len(SHARED) + 2
    whole = prefixes.find(PROMPTS[0], (1,))
    assert whole is not None and len(whole.ids) == len(PROMPTS[0]) - 1
    read: list[int] = []
    again, same = target.prefill(PROMPTS[0], target.new_cache(64), on_read=read.append, known=whole)
    assert read == [len(PROMPTS[0])]
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same, features, rtol=1e-4, atol=1e-5)
    target.capture(())


def test_the_oldest_goes_first_and_the_limit_holds(target: Target) -> None:
    with torch.inference_mode():
        cache = target.new_cache(64)
        target.capture(())
        _, features = target.prefill(SHARED, cache)
        one = Prefixes(10**8)
        one.add(SHARED, (), cache, 0, features, 0)
        prefixes = Prefixes(2 * one.nbytes)
        others = [[i, *SHARED[1:]] for i in range(3)]
        for ids in others[:2]:
            prefixes.add(ids, (), cache, 0, features, 0)
        assert prefixes.find([*others[0], 1], ()) is not None  # used, so the other one is the oldest
        prefixes.add(others[2], (), cache, 0, features, 0)
        assert len(prefixes) == 2 and prefixes.nbytes <= prefixes.limit
        assert prefixes.find([*others[1], 1], ()) is None
        assert prefixes.find([*others[0], 1], ()) is not None
        small = Prefixes(one.nbytes - 1)
        small.add(SHARED, (), cache, 0, features, 0)
        assert len(small) == 0


def test_a_negative_size_is_refused(target: Target) -> None:
    with pytest.raises(UserError, match="prefix_cache"):
        Batch(target, NoDrafter(), prefix_cache=-1)


@pytest.mark.parametrize("name", ["paper", "lookup"])
def test_with_embedded_drafters(name: str) -> None:
    target = Target.load(dtype="float32", device="cpu")
    drafter = load_drafter(name, target)
    assert answers(target, drafter, 10**8, 2, Sampling()) == answers(target, drafter, 0, 2, Sampling())
