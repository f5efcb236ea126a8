"""Replaying over fixed buffers gives what running gives; what a recording is, a GPU's driver or a call, is put in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ctc_drafter.target import Target
from ctc_drafter.target.captured import MAX_GRAPHS, Replayed
from ctc_drafter.target.compiled import Pass
from ctc_drafter.tree import DraftTree


class Recording:
    """Runs again what a graph would replay, into the same results, and counts."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, run: Callable[[], list[torch.Tensor]]) -> tuple[Callable[[], None], list[torch.Tensor]]:
        self.made += 1
        results = run()

        def replay() -> None:
            for result, new in zip(results, run()):
                result.copy_(new)

        return replay, results


@torch.inference_mode()
def test_the_step_that_is_captured_gives_what_score_gives(target: Target) -> None:
    """The function that programs are made of, over several passes of one cache and a second cache."""
    target.capture((1, -1))
    step, record = Pass(target, 5), Recording()
    run = Replayed(lambda arguments: list(step(*arguments)), changing=6, capture=record)
    tree = DraftTree.from_paths([[[5, 6, 7], [5, 8], [9]]], budget=5)
    for _ in range(2):
        caches = target.new_cache(64), target.new_cache(64)
        for cache in caches:
            target.prefill(list(range(10, 22)), cache)
        mine, theirs = caches
        before: list[torch.Tensor] = []
        for root, path in ((4, [0, 1, 4]), (9, [0]), (3, [0, 2])):
            tokens, ancestors = torch.tensor([[root]]), tree.ancestor_mask()
            want = target.score(tokens, tree, ancestors, theirs)
            length = torch.tensor(mine.length)
            got = run([tokens, tree.tokens, tree.depths, ancestors, length, torch.arange(32), *mine.planes()])
            for one, other in zip(got, want):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            if before:  # the results of the pass before are still there
                torch.testing.assert_close(before[0], before[1])
            before = [got[1], got[1].clone()]
            mine.keep([path])
            theirs.keep([path])
    target.capture(())
    assert record.made == 4  # two sets of buffers for each cache


def test_recordings_are_bounded() -> None:
    record = Recording()
    run = Replayed(lambda arguments: [arguments[0] + arguments[1]], changing=1, capture=record)
    planes = [torch.full((2,), float(i)) for i in range(3 * MAX_GRAPHS)]
    for i, plane in enumerate(planes):
        assert torch.equal(run([torch.ones(2), plane])[0], plane + 1), i
    assert record.made == len(planes) and len(run._graphs) <= MAX_GRAPHS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_text_is_the_same() -> None:
    from ctc_drafter.decoding import generate
    from ctc_drafter.drafters import NoDrafter, compile_passes, load_drafter

    eager, target = (Target.load(dtype="float32", device="cuda") for _ in range(2))
    drafter = load_drafter("ctc", target)
    compile_passes(target, drafter, 8)
    ids = target.prompt_ids([{"role": "user", "content": "What is the capital of France?"}])
    want = [t for s in generate(eager, NoDrafter(), ids, max_new_tokens=200) for t in s.tokens]
    for used in (NoDrafter(), drafter):
        assert [t for s in generate(target, used, ids, max_new_tokens=200, budget=8) for t in s.tokens] == want
