"""The rows of a batch: their steps are those of one alone, none touches another, and each ends by itself."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from conftest import TEXTS, build_drafter
from ctc_drafter.batch import Batch
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import LOOKUP, NoDrafter, load_drafter
from ctc_drafter.errors import UserError
from ctc_drafter.steps import Step
from ctc_drafter.target import Target
from ctc_drafter.tree import DraftTree
from helpers import (
    CAPABLE,
    CONTEXT,
    Build,
    ScriptedForMany,
    always_right,
    joined,
    random_tree,
    right_leaf_last,
    save_model,
)

TOKENS = 24
BUDGET = 5


# ---------------------------------------------------------------- steps, not only tokens


@pytest.fixture
def endless(target: Target, monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setattr(target, "stop_ids", frozenset())
    return target


def prompts_of(target: Target) -> list[list[int]]:
    return [target.tokenizer(text)["input_ids"][: 3 + 4 * i] for i, text in enumerate(TEXTS)]


def shape(steps: list[Step]) -> list[tuple[list[int], int, int, str | None]]:
    return [(s.tokens, s.accepted, s.drafted, s.finish) for s in steps]


def run_all(batch: Batch, keys: list[int]) -> list[list[Step]]:
    steps: dict[int, list[Step]] = {key: [] for key in keys}
    while len(batch):
        for key, step in batch.step():
            steps[key].append(step)
    return [steps[key] for key in keys]


@pytest.mark.parametrize("kind", ["none", "lookup", "ctc", "ctc+lookup", "eagle", "hydra", "medusa", "parallel"])
def test_the_steps_are_those_of_generate(kind: str, endless: Target, tmp_path: Path) -> None:
    trained = kind not in ("none", "lookup")
    base = kind.removesuffix(LOOKUP)
    folder = f"{build_drafter(tmp_path / 'd', endless, base)}{kind.removeprefix(base)}" if trained else kind
    drafter = load_drafter(folder, endless)
    prompts = prompts_of(endless)
    want = [shape(list(generate(endless, drafter, p, max_new_tokens=TOKENS, budget=BUDGET))) for p in prompts]
    batch = Batch(endless, drafter, rows=8, budget=BUDGET, adaptive=False)
    got = run_all(batch, [batch.add(p, max_new_tokens=TOKENS) for p in prompts])
    assert [shape(steps) for steps in got] == want


@pytest.mark.parametrize("build", [always_right, right_leaf_last, random_tree])
@pytest.mark.parametrize("place", [0, 1, 4, 7])
def test_a_stop_token_inside_an_accepted_run(
    build: Build, place: int, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(target)[:3]
    monkeypatch.setattr(target, "stop_ids", frozenset())
    answers = [joined(list(generate(target, NoDrafter(), p, max_new_tokens=TOKENS)))[0] for p in prompts]
    stop = answers[1][place]
    monkeypatch.setattr(target, "stop_ids", frozenset({stop}))
    drafter = ScriptedForMany(build, {tuple(p): a for p, a in zip(prompts, answers)}, target.vocab_size)
    batch = Batch(target, drafter, rows=3, budget=6, adaptive=False)
    for steps, answer in zip(run_all(batch, [batch.add(p, max_new_tokens=TOKENS) for p in prompts]), answers):
        ends = stop in answer
        want = answer[: answer.index(stop) + 1] if ends else answer
        assert joined(steps) == (want, "stop" if ends else "length")


def test_rows_without_a_draft_beside_others(endless: Target, drafter_folder: Path) -> None:
    drafter = load_drafter(str(drafter_folder), endless)
    prompts = prompts_of(endless)
    batch = Batch(endless, drafter, rows=5, budget=BUDGET, adaptive=False)
    keys = [batch.add(p, max_new_tokens=TOKENS, drafter=None if i % 2 else NoDrafter()) for i, p in enumerate(prompts)]
    for i, (steps, prompt) in enumerate(zip(run_all(batch, keys), prompts)):
        alone = drafter if i % 2 else NoDrafter()
        assert shape(steps) == shape(list(generate(endless, alone, prompt, max_new_tokens=TOKENS, budget=BUDGET)))


# ---------------------------------------------------------------- no influence between rows


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gemma3_text"])
def test_garbage_of_other_rows_changes_nothing(kind: str, tmp_path: Path) -> None:
    """Huge but finite numbers in all slots that a row has not committed, and in all of another row."""
    target = Target.load(save_model(tmp_path / kind, kind, **CAPABLE[kind]), dtype="float32", device="cpu")
    prompts = [[5, 9, 31], [7] * 20, [40, 3, 22, 118, 9, 9, 2]]
    tree = DraftTree.from_paths([[[4, 5], [6]], [[8, 9, 10]], [[2], [3]]], budget=3)
    roots = torch.tensor([[11], [12], [13]])

    def scores(poison: float) -> torch.Tensor:
        with torch.inference_mode():
            cache = target.new_cache(CONTEXT)
            for i, prompt in enumerate(prompts):
                target.prefill(prompt, cache, i and cache.claim(CONTEXT))
            for plane in cache._planes:
                for row, length in enumerate(cache.lengths):
                    plane[:, row, :, 0 if row == 1 else length :] += poison
            return target.score(roots, tree, tree.ancestor_mask(), cache)[0]

    clean, poisoned = scores(0.0), scores(1e4)
    assert torch.equal(clean[[0, 2]], poisoned[[0, 2]]) and not torch.allclose(clean[1], poisoned[1])


def test_one_row_runs_on_slices(endless: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that batches need is done for a single row, also when it is what is left of a batch."""
    prompts = prompts_of(endless)[:2]
    batch = Batch(endless, NoDrafter(), rows=4, budget=0)
    first, second = (batch.add(p, max_new_tokens=TOKENS) for p in prompts)
    batch.step(), batch.step()
    batch.cancel(first)

    def forbidden(*args: Any) -> Any:
        raise AssertionError("meant for batches")

    from ctc_drafter.cache import SlotCache

    for name in ("write", "starts", "_keep_in_each"):
        monkeypatch.setattr(SlotCache, name, forbidden)
    monkeypatch.setattr("ctc_drafter.target.model.ragged_mask", forbidden)
    [(key, _)] = batch.step()
    assert key == second
    list(generate(endless, load_drafter("lookup", endless), prompts[1], max_new_tokens=TOKENS))


# ---------------------------------------------------------------- limits and ends


def test_rows_are_limited(endless: Target) -> None:
    batch = Batch(endless, NoDrafter(), rows=2, budget=0)
    keys = [batch.add([5, 6]), batch.add([7])]
    assert batch.free == 0 and len(batch) == 2
    with pytest.raises(UserError, match="All 2 rows of the batch are taken"):
        batch.add([8])
    batch.step()
    with pytest.raises(UserError, match="All 2 rows"):
        batch.add([8])
    batch.cancel(keys[0])
    assert batch.free == 1
    batch.add([8])
    assert [[key for key, _ in batch.step()] for _ in range(3)] == [[2], [3], [2, 3]]


@pytest.mark.parametrize(
    ("prompt", "options", "match"),
    [
        ([], {}, "prompt is empty"),
        ([3] * 192, {}, "has 192 tokens and the context of 'tiny' ends at 192"),
        ([3], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([3] * 30, {"max_new_tokens": 3}, "30 tokens and an answer of up to 3 do not fit into the 32 positions"),
    ],
)
def test_impossible_requests(prompt: list[int], options: dict[str, int], match: str, target: Target) -> None:
    batch = Batch(target, NoDrafter(), rows=1, context=32)
    with pytest.raises(UserError, match=match):
        batch.add(prompt, **options)  # type: ignore[arg-type]
    assert batch.free == 1


@pytest.mark.parametrize("sizes", [{"rows": 0}, {"budget": -1}, {"context": 0}])
def test_impossible_sizes(sizes: dict[str, int], target: Target) -> None:
    with pytest.raises(UserError, match="at least"):
        Batch(target, NoDrafter(), **sizes)  # type: ignore[arg-type]


def test_memory_follows_the_rows(endless: Target) -> None:
    """A long row makes all rows long while it is there, and no longer."""
    prompt = prompts_of(endless)[2]
    want = joined(list(generate(endless, NoDrafter(), prompt, max_new_tokens=TOKENS)))
    batch = Batch(endless, NoDrafter(), rows=8, budget=0)
    short = batch.add(prompt, max_new_tokens=TOKENS)
    steps = [step for _, step in batch.step()]
    alone = batch.nbytes
    long = batch.add([9] * 100, max_new_tokens=50)
    steps += [step for key, step in batch.step() if key == short]
    assert batch.nbytes > 4 * alone
    batch.cancel(long)
    assert batch.nbytes <= 2 * alone
    while len(batch):
        steps += [step for _, step in batch.step()]
    assert joined(steps) == want


def test_an_idle_batch_holds_no_memory(endless: Target, drafter_folder: Path) -> None:
    batch = Batch(endless, load_drafter(str(drafter_folder), endless), rows=4, budget=4)
    assert batch.nbytes == 0
    keys = [batch.add([5 + i, 9], max_new_tokens=50) for i in range(3)]
    for _ in keys:
        batch.step()
    lent = [weakref.ref(row.drafter) for row in batch._rows.values()]
    held = batch.nbytes
    batch.step()
    assert batch.nbytes == held > 0
    for key in keys:
        batch.cancel(key)
    batch.cancel(keys[0])
    assert batch.nbytes == 0 and batch.free == 4 and batch.step() == []
    gc.collect()
    assert len(lent) == 3 and all(twin() is None for twin in lent)  # what a row's drafter remembered is gone with it


def test_a_prompt_that_fails_ends_its_row_alone(endless: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(endless)[:3]
    want = [joined(list(generate(endless, NoDrafter(), p, max_new_tokens=TOKENS))) for p in prompts]
    batch = Batch(endless, NoDrafter(), rows=3, budget=0)
    first = batch.add(prompts[0], max_new_tokens=TOKENS)
    steps: dict[int, list[Step]] = {first: [step for _, step in batch.step()]}
    bad, last = (batch.add(p, max_new_tokens=TOKENS) for p in prompts[1:])
    steps[last] = []
    original = Target.prefill

    def prefill(self: Target, ids: list[int], cache: Any, row: int = 0, **options: Any) -> Any:
        if ids == prompts[1]:
            raise RuntimeError("no memory")
        return original(self, ids, cache, row, **options)

    monkeypatch.setattr(Target, "prefill", prefill)
    steps[bad] = []
    while len(batch):
        for key, step in batch.step():
            steps[key].append(step)
    [failed] = steps[bad]
    assert failed.finish == "error" and str(failed.error) == "no memory" and not failed.tokens
    assert joined(steps[first]) == want[0] and joined(steps[last]) == want[2]


def test_a_pass_that_fails_loses_the_running_rows_only(endless: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(endless, NoDrafter(), rows=3, budget=0)
    batch.add([5, 6])
    batch.step()
    waiting: list[int] = []
    failing = True

    def score(*args: Any) -> Any:
        if failing:
            waiting.append(batch.add([9, 31]))
            raise ZeroDivisionError
        return original(*args)

    original = Target.score
    monkeypatch.setattr(Target, "score", score)
    [(_, lost)] = batch.step()
    assert isinstance(lost.error, ZeroDivisionError) and lost.finish == "error"
    failing = False
    assert len(batch) == 1 and [[key for key, _ in batch.step()] for _ in range(2)] == [waiting, waiting]


def test_a_new_prompt_waits_for_no_pass(endless: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each first token is told before the next prompt is read; then all take part in the pass."""
    batch = Batch(endless, NoDrafter(), rows=4, budget=0)
    first = batch.add([5, 6])
    batch.step()
    done: list[str] = []
    for name in ("prefill", "score"):
        real = getattr(Target, name)

        def noted(*args: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            done.append(name)
            return real(*args, **options)

        monkeypatch.setattr(Target, name, noted)
    added = [batch.add([7 + i]) for i in range(3)]
    for key in added:
        assert [one for one, _ in batch.step()] == [key]
    assert done == ["prefill"] * 3
    assert [key for key, _ in batch.step()] == [first, *added] and done[3:] == ["score"]


@pytest.mark.parametrize("phase", ["draft", "tree"])
def test_a_drafter_that_fails_ends_its_row_alone(phase: str, endless: Target) -> None:
    class Broken(NoDrafter):
        def draft(self, features: torch.Tensor, next_tokens: torch.Tensor) -> Any:
            assert phase != "draft", "broken on purpose"
            return super().draft(features, next_tokens)

        def tree(self, guess: Any, budget: int) -> DraftTree:
            assert phase != "tree", "broken on purpose"
            return super().tree(guess, budget)

    prompts = prompts_of(endless)[:3]
    batch = Batch(endless, load_drafter("lookup", endless), rows=3, budget=4, adaptive=False)
    keys = [batch.add(p, max_new_tokens=TOKENS, drafter=Broken() if i == 1 else None) for i, p in enumerate(prompts)]
    for i, (steps, prompt) in enumerate(zip(run_all(batch, keys), prompts)):
        if i == 1:
            assert [step.finish for step in steps] == [None, "error"] and isinstance(steps[1].error, AssertionError)
        else:
            assert joined(steps) == joined(list(generate(endless, NoDrafter(), prompt, max_new_tokens=TOKENS)))


def test_drafters_of_one_batch_read_the_same_layers(endless: Target, tmp_path: Path) -> None:
    both = [
        load_drafter(str(build_drafter(tmp_path / f"d{i}", endless, feature_layers=layers)), endless)
        for i, layers in enumerate(([-1], [1, -1]))
    ]
    batch = Batch(endless, both[0], rows=3)
    with pytest.raises(UserError, match=r"reads the layers \[1, -1\] of the target and the batch's reads \[-1\]"):
        batch.add([5, 6], drafter=both[1])
    batch.add([5, 6], drafter=load_drafter("lookup", endless))
    assert len(batch) == 1 and len(batch.step()) == 1


# ---------------------------------------------------------------- pace


def test_drafting_stops_where_the_clock_says_so(endless: Target) -> None:
    """A clock by which a pass costs what it scores: drafts that are never accepted end, perfect ones go on."""
    prompts = prompts_of(endless)[:2]
    answers = {tuple(p): joined(list(generate(endless, NoDrafter(), p, max_new_tokens=150)))[0] for p in prompts}

    def drafted_last(build: Build, per_node: float) -> int:
        time = [0.0]
        drafter = ScriptedForMany(build, answers, endless.vocab_size)
        batch = Batch(endless, drafter, rows=2, budget=4, clock=lambda: time[0])
        loop_step = batch._loop.step

        def step(budget: int, clock: Any) -> list[Any]:
            time[0] += 1 + per_node * budget * len(batch)
            return loop_step(budget, clock)

        batch._loop.step = step  # type: ignore[method-assign]
        all_steps = run_all(batch, [batch.add(list(p), max_new_tokens=150) for p in prompts])
        assert [joined(steps)[0] for steps in all_steps] == list(answers.values())
        return sum(step.drafted > 0 for steps in all_steps for step in steps[-10:])

    from helpers import always_wrong

    assert drafted_last(always_right, 0.01) == 20
    assert drafted_last(always_right, 10.0) == 0
    assert drafted_last(always_wrong, 0.01) <= 6  # a probe may fall into them


def test_a_drafter_without_features_may_wait_among_others_that_read_them(target: Target, tmp_path: Path) -> None:
    """Passes without drafts keep what a row's drafter will be shown; others' features do not belong to it."""
    ctc = load_drafter(str(build_drafter(tmp_path / "d", target, "ctc")), target)
    lookup = load_drafter("lookup", target)
    ids = target.prompt_ids([{"role": "user", "content": TEXTS[0]}])
    alone = [t for step in generate(target, NoDrafter(), ids, max_new_tokens=TOKENS) for t in step.tokens]
    batch = Batch(target, ctc, rows=2, budget=BUDGET, adaptive=True)
    answers: dict[int, list[int]] = {batch.add(ids, max_new_tokens=TOKENS): []}
    answers[batch.add(ids, max_new_tokens=TOKENS, drafter=lookup)] = []
    assert batch._pace is not None
    with patch.object(batch._pace, "choose", side_effect=[0, 0, 0, *[BUDGET] * TOKENS]):
        while len(batch):
            for key, step in batch.step():
                assert step.error is None
                answers[key] += step.tokens
    assert list(answers.values()) == [alone, alone]


def test_after_an_interrupted_pass_the_batch_is_empty(target: Target) -> None:
    batch = Batch(target, NoDrafter(), rows=2, budget=0)
    batch.add([1, 2, 3], max_new_tokens=TOKENS)
    batch.step()
    with patch.object(Target, "score", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        batch.step()
    assert len(batch) == 0 and batch.free == 2
