"""Twins: drafters that share weights and serve a generation each, at the same time."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

import pytest

from conftest import build_drafter
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import DRAFTERS, Drafter, TrainableDrafter, load_drafter
from ctc_drafter.steps import Step
from ctc_drafter.target import Target

QUESTIONS = ["How many apples are left?", "def add(a, b):"]


def shape(steps: list[Step]) -> list[tuple[list[int], int, int]]:
    return [(s.tokens, s.accepted, s.drafted) for s in steps]


@pytest.mark.parametrize("kind", sorted(DRAFTERS))
def test_interleaved_generations_equal_their_one_by_one_answers(kind: str, target: Target, tmp_path: Path) -> None:
    trained = issubclass(DRAFTERS[kind], TrainableDrafter)
    drafter: Drafter = load_drafter(str(build_drafter(tmp_path / "d", target, kind)) if trained else kind, target)
    prompts = [target.prompt_ids([{"role": "user", "content": q}]) for q in QUESTIONS]
    alone = [list(generate(target, drafter, ids, max_new_tokens=40)) for ids in prompts]
    twin = drafter.twin()
    both: list[list[Step]] = [[], []]
    runs = [generate(target, d, ids, max_new_tokens=40) for d, ids in zip((drafter, twin), prompts, strict=True)]
    for pair in zip_longest(*runs):
        for steps, step in zip(both, pair, strict=True):
            if step is not None:
                steps.append(step)
    assert [shape(steps) for steps in both] == [shape(steps) for steps in alone]
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in drafter.parameters()]
    assert (twin.name, twin.kind) == (drafter.name, drafter.kind)


def test_a_step_carries_the_tree_that_was_scored(target: Target, drafter_folder: Path) -> None:
    drafter = load_drafter(str(drafter_folder), target)
    ids = target.prompt_ids([{"role": "user", "content": QUESTIONS[0]}])
    first, *others = generate(target, drafter, ids, max_new_tokens=20, budget=6)
    assert first.tree is None
    assert others
    for step in others:
        assert step.tree is not None
        assert step.tree.budget == step.drafted == 6
        step.tree.check()
