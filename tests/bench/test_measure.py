"""The metrics, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ctc_drafter.acceptance import Sampling
from ctc_drafter.bench.measure import (
    Answer,
    Contender,
    Row,
    acceptance_at,
    calibration,
    compare,
    expected_length,
    first_gap,
    measure,
    timed,
    totals,
)
from ctc_drafter.bench.prompts import Prompt
from ctc_drafter.drafters import load_drafter
from ctc_drafter.errors import UserError
from ctc_drafter.loops import ends_in_loop
from ctc_drafter.pace import Pace
from ctc_drafter.steps import Step
from ctc_drafter.target import Target
from ctc_drafter.tree import DraftTree

PHASES = {"draft": 0.1, "tree": 0.1, "score": 0.6, "accept": 0.15, "commit": 0.05}
STEPS = [
    Step([7], 0, 0, {"prefill": 0.5}),
    Step([1, 2, 3], 2, 4, PHASES),
    Step([4], 0, 4, PHASES),
    Step([5, 6], 1, 4, PHASES, "stop"),
]


def answer(tokens: list[int], accepted: list[int], seconds: float) -> Answer:
    return Answer(tokens, accepted, seconds, {name: s * len(accepted) for name, s in PHASES.items()}, "stop")


def row(target: Target, category: str, drafted: Answer, plain: Answer) -> Row:
    return {"id": 1, "category": category, "turn": 0, **compare(target, [1, 2], drafted, plain)}


def test_answer_counts_steps_without_the_prefill(target: Target) -> None:
    seen = Answer()
    assert list(timed(iter(STEPS), seen, target)) == STEPS
    assert seen.tokens == [7, 1, 2, 3, 4, 5, 6]
    assert seen.accepted == [2, 0, 1]
    assert seen.expected == [None, None, None]  # these trees say no probabilities
    assert seen.tau == pytest.approx(6 / 3)  # = 1 + accepted / steps
    assert seen.parts["score"] == pytest.approx(1.8) and seen.parts["prefill"] == 0.5
    assert seen.finish == "stop"


def test_clock_stands_still_while_the_consumer_works(target: Target) -> None:
    import time

    seen = Answer()
    for _ in timed(iter(STEPS), seen, target):
        time.sleep(0.02)
    assert seen.seconds < 0.02


def test_totals_are_ratios_of_sums(target: Target) -> None:
    rows = [
        row(target, "a", answer([1] * 11, [4, 4, 0], 1.0), answer([1] * 11, [0] * 10, 2.0)),  # 2.0 times
        row(target, "b", answer([2] * 3, [0, 0], 3.0), answer([2] * 3, [0, 0], 3.0)),  # 1.0 times
    ]
    t = totals(rows)
    assert (t["prompts"], t["answers"], t["tokens"], t["steps"]) == (2, 2, 14, 5)
    assert t["tau"] == pytest.approx((10 + 2) / 5)
    assert t["acceptance_at"] == pytest.approx([2 / 5] * 4)
    assert t["tokens_per_second"] == pytest.approx(14 / 4)
    assert t["plain_tokens_per_second"] == pytest.approx(14 / 5)
    assert t["speedup"] == pytest.approx(5 / 4)  # not (2.0 + 1.0) / 2
    assert t["efficiency"] == pytest.approx(5 / 4 / (12 / 5))
    assert (t["identical"], t["looped"], t["largest_gap"]) == (2, 0, 0.0)
    assert t["split"]["score"] == pytest.approx(0.6)
    assert t["split"]["microseconds"] == pytest.approx({**{k: 1e6 * v for k, v in PHASES.items()}, "step": 1e6})


def test_totals_of_nothing_have_no_ratios() -> None:
    t = totals([])
    assert t["tokens"] == 0 and t["tau"] is None and t["speedup"] is None and t["efficiency"] is None


def test_acceptance_is_unconditional() -> None:
    assert acceptance_at([3, 1, 0, 1]) == [0.75, 0.25, 0.25]
    assert acceptance_at([0, 0]) == []


def test_a_difference_is_found_and_its_gap_is_the_targets(target: Target) -> None:
    ids = [5, 6, 7]
    first = int(
        target.model(input_ids=target.model.get_input_embeddings().weight.new_tensor([ids]).long())
        .logits[0, -1]
        .argmax()
    )
    other = (first + 1) % target.vocab_size
    result = compare(target, ids, answer([other, 1], [0], 1.0), answer([first, 1], [0], 1.0))
    assert result["identical"] is False
    assert result["gap"] == pytest.approx(first_gap(target, ids, [first], [other])) and result["gap"] > 0
    assert first_gap(target, ids, [first], [first, 1]) is None
    sampled = compare(target, ids, answer([other], [0], 1.0), answer([first], [0], 1.0), Sampling(temperature=1.0))
    assert sampled["identical"] is None and sampled["gap"] is None


@pytest.mark.parametrize(
    ("tokens", "looped"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8] * 4, True),  # the same 8 tokens four times over
        ([1, 2, 3, 4, 5, 6, 7, 8] * 3, False),
        ([9] * 32, True),
        ([9] * 31, False),
        (list(range(50)) + [1, 2, 3] * 11, True),
        (list(range(9)) * 4, True),
        (list(range(9)) * 3 + list(range(8)), False),
        ([1, 2] * 16 + [3], False),
        (list(range(100)), False),
        ([], False),
    ],
)
def test_ends_in_loop(tokens: list[int], looped: bool) -> None:
    assert ends_in_loop(tokens) is looped


def test_measure_interleaves_and_stays_identical(target: Target, drafter_folder: Path) -> None:
    drafter = load_drafter(str(drafter_folder), target)
    prompts = [Prompt("x", "a", ("Hello there", "And again?")), Prompt("y", "b", ("How many apples?",))]
    seen: list[tuple[int, Row]] = []
    contenders = [Contender("ctc", drafter, 4), Contender("ctc", drafter, 9)]
    results = measure(
        target, contenders, prompts, max_new_tokens=16, on_row=lambda r, row: seen.append((r.budget, row))
    )
    assert [budget for budget, _ in seen] == [4, 9] * 3
    for result in results:
        assert result.complete and not result.skipped
        assert [(r["id"], r["turn"]) for r in result.rows] == [("x", 0), ("x", 1), ("y", 0)]
        assert all(r["identical"] for r in result.rows)
        assert all(r["tokens"] == 1 + r["steps"] + sum(r["accepted"]) for r in result.rows)
        assert set(result.totals["categories"]) == {"a", "b"}
    # all contenders share one plain run
    assert [r["plain_seconds"] for r in results[0].rows] == [r["plain_seconds"] for r in results[1].rows]


def test_a_pace_learns_over_all_prompts(target: Target, drafter_folder: Path) -> None:
    """With the compiled passes' two choices, to see both of them: all of the budget, and nothing."""
    contender = Contender("ctc", load_drafter(str(drafter_folder), target), 4, Pace.up_to(4, compiled=True))
    prompts = [Prompt(i, "a", (text,)) for i, text in enumerate(["Hello there", "How many apples?"])]
    (result,) = measure(target, [contender], prompts, max_new_tokens=16)
    assert all(row["identical"] for row in result.rows)
    assert contender.pace is not None and all(contender.pace.seconds(budget, 1) for budget in (4, 0))


def test_measure_keeps_finished_rows_on_ctrl_c(target: Target, drafter_folder: Path) -> None:
    def interrupt(result: object, row: Row) -> None:
        if row["id"] == 2:
            raise KeyboardInterrupt

    prompts = [Prompt(i, "a", ("Hello",)) for i in range(5)]
    contender = Contender("ctc", load_drafter(str(drafter_folder), target), 4)
    (result,) = measure(target, [contender], prompts, max_new_tokens=4, on_row=interrupt)
    assert not result.complete and [r["id"] for r in result.rows] == [0, 1, 2]


def test_prompts_beyond_the_context(target: Target, drafter_folder: Path) -> None:
    contender = Contender("ctc", load_drafter(str(drafter_folder), target), 4)
    long = "word " * target.max_context
    with pytest.raises(UserError, match="Prompt 'long' has"):
        measure(target, [contender], [Prompt("long", "a", (long,))], max_new_tokens=4)
    prompts = [Prompt("long", "a", (long,)), Prompt("later", "a", ("Hello", long, "lost", "too"))]
    told: list[int] = []
    results = measure(
        target,
        [contender, Contender("twin", contender.drafter, 2)],
        prompts,
        max_new_tokens=4,
        skip_too_long=True,
        on_row=lambda result, row: told.append(1),
        on_skip=told.append,
    )
    for result in results:
        assert [(s["id"], s["turn"]) for s in result.skipped] == [("long", 0), ("later", 1), ("later", 2), ("later", 3)]
        assert [(r["id"], r["turn"]) for r in result.rows] == [("later", 0)]
    assert sum(told) == 2 * (1 + 4)  # every turn of each contender, so a bar is full at the end


def test_calibration_compares_what_was_expected_with_what_came() -> None:
    steps = [(0.5, 1), (0.25, 0), (None, 7), (2.5, 3), (2.0, 2)]
    got = calibration(steps)
    assert got == {"steps": 4, "expected": 1.3125, "accepted": 1.5, "bins": [[2, 0.375, 0.5], [2, 2.25, 2.5]]}
    assert calibration([(None, 3)]) is None and calibration([]) is None


def test_nothing_is_expected_of_the_step_that_the_end_cuts(target: Target) -> None:
    tree = DraftTree(*(torch.tensor([row]) for row in ([5, 6], [-1, 0], [1, 2])), torch.tensor([[0.5, 0.25]]).log())
    seen = Answer()
    steps = [Step([1, 2], 1, 2, PHASES, tree=tree), Step([3], 1, 2, PHASES, "length", tree=tree)]
    assert list(timed(iter(steps), seen, target)) == steps
    assert seen.accepted == [1, 1] and seen.expected == [pytest.approx(0.75), None]


def test_a_tree_expects_the_sum_of_its_probabilities() -> None:
    rows = [torch.tensor([row]) for row in ([5, 6, 0], [-1, 0, -1], [1, 2, 1])]
    probs = torch.tensor([[0.5, 0.25, 0.0]])
    assert expected_length(DraftTree(*rows, probs.log())) == pytest.approx(0.75)
    assert expected_length(DraftTree(*rows)) is None and expected_length(None) is None
