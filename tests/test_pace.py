"""The pace finds what is fastest, stays with it, and notices when that changes; time is simulated."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from ctc_drafter.errors import UserError
from ctc_drafter.pace import Pace

BUDGETS = (8, 4, 0)


class Machine:
    """A pass costs `base` and something for every token that it scores; drafts are accepted at a given rate."""

    def __init__(self, per_token: float, acceptance: float, noise: float = 0.1, seed: int = 0) -> None:
        self.per_token, self.acceptance, self.noise = per_token, acceptance, noise
        self.random = random.Random(seed)
        self.now, self.tokens, self.changes = 0.0, 0, 0

    def cost(self, rows: int, budget: int) -> float:
        return 1.0 + self.per_token * rows * (budget + 1)

    def expected(self, budget: int) -> float:
        return sum(self.acceptance**k for k in range(budget + 1))

    def best(self, rows: int) -> int:
        return max(BUDGETS, key=lambda b: self.expected(b) / self.cost(rows, b))

    def share(self, used: Counter[int], rows: int, budgets: Sequence[int]) -> float:
        """Tokens per second of passes with these budgets, of the best constant one's."""
        tokens = sum(n * self.expected(b) for b, n in used.items())
        seconds = sum(n * self.cost(rows, b) for b, n in used.items())
        return tokens / seconds / max(self.expected(b) / self.cost(rows, b) for b in budgets)

    def run(self, pace: Pace, steps: int, rows: Callable[[int], int]) -> Counter[int]:
        """Passes with each budget."""
        used: Counter[int] = Counter()
        before = None
        for i in range(steps):
            budget = pace.choose(rows(i))
            used[budget] += 1
            self.changes += before not in (None, budget)
            before = budget
            told = dict.fromkeys((b for b in pace.budgets if 0 < b < budget), rows(i))
            told[budget] = rows(i)
            for _ in range(rows(i)):
                accepted = 0
                while accepted < budget and self.random.random() < self.acceptance:
                    accepted += 1
                for b in told:
                    told[b] += min(accepted, b)
            seconds = self.cost(rows(i), budget) * (1 + self.noise * self.random.random())
            if self.random.random() < 0.02:
                seconds *= 10  # something else ran
            self.now, self.tokens = self.now + seconds, self.tokens + told[budget]
            pace.record(rows(i), told, seconds)
        return used


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("per_token", "acceptance"), [(0.02, 0.7), (0.05, 0.5), (0.2, 0.6), (0.5, 0.1), (0.01, 0.95)])
def test_the_best_budget_runs_almost_always(per_token: float, acceptance: float, rows: int) -> None:
    machine = Machine(per_token, acceptance)
    pace = Pace(BUDGETS)
    machine.run(pace, 300, lambda i: rows)
    used = machine.run(pace, 1000, lambda i: rows)
    assert machine.share(used, rows, BUDGETS) > 0.92


def test_one_candidate_needs_no_choice() -> None:
    pace = Pace.up_to(0)
    assert Machine(0.1, 0.5).run(pace, 300, lambda i: 1) == {0: 300}


def test_drafting_stops_where_it_no_longer_pays() -> None:
    """One pace for all numbers of rows: each has a choice of its own."""
    machine, pace = Machine(0.06, 0.6), Pace(BUDGETS)
    assert machine.best(1) > 0 and machine.best(16) == 0
    for _ in range(3):
        for rows in (1, 2, 4, 8, 16):
            machine.run(pace, 100, lambda i, rows=rows: rows)
    assert machine.run(pace, 60, lambda i: 1).most_common(1)[0][0] > 0
    assert machine.run(pace, 60, lambda i: 16).most_common(1)[0][0] == 0


def test_never_much_slower_than_plain() -> None:
    """Where drafting is hopeless, what probing costs stays small, from the start and with rows that come and go."""
    machine, pace = Machine(0.3, 0.02), Pace(BUDGETS)
    rows = [machine.random.randint(4, 8) for _ in range(4000)]
    machine.run(pace, 4000, lambda i: rows[i])
    machine.noise = 0
    plain = sum(rows) / sum(machine.cost(r, 0) for r in rows)
    assert machine.tokens / machine.now > 0.94 * plain / 1.23  # the simulated disturbances cost 23 % by themselves


def test_candidates_that_are_alike_do_not_take_turns() -> None:
    """Each change to drafting costs what no pass shows, so of two that seem equal one runs."""
    machine, pace = Machine(0.0075, 0.6), Pace((8, 0))
    assert machine.expected(8) / machine.cost(30, 8) == pytest.approx(machine.expected(0) / machine.cost(30, 0), 0.02)
    rows = [machine.random.randint(28, 32) for _ in range(3000)]
    machine.run(pace, 3000, lambda i: rows[i])
    assert machine.changes < 150


def test_a_change_of_the_text_is_noticed() -> None:
    machine, pace = Machine(0.05, 0.02), Pace(BUDGETS)
    assert machine.run(pace, 1000, lambda i: 4).most_common(1)[0][0] == 0
    machine.acceptance = 0.9
    machine.run(pace, 4000, lambda i: 4)
    assert machine.run(pace, 500, lambda i: 4)[0] < 50


@pytest.mark.parametrize("seed", range(3))
def test_a_large_budget_is_left_where_the_text_becomes_hard(seed: int) -> None:
    machine, pace = Machine(0.06, 0.95, seed=seed), Pace((16, 8, 4, 0))
    assert machine.run(pace, 2000, lambda i: 1)[16] > 1800
    machine.acceptance = 0.5
    used = machine.run(pace, 2000, lambda i: 1)
    assert machine.share(used, 1, pace.budgets) > 0.85


def test_budgets_compare_by_the_passes_that_tell_of_both() -> None:
    """A larger budget that ran in easy text brings in proportion what it brought beside the smaller one there."""
    pace = Pace((8, 4))
    for _ in range(200):
        pace.record(1, {8: 6, 4: 4}, 1.0)
    assert (pace.tokens(8), pace.tokens(4)) == (pytest.approx(6), pytest.approx(4))
    for _ in range(1000):
        pace.record(1, {4: 2}, 1.0)
    assert pace.tokens(4) == pytest.approx(2, rel=0.01) and pace.tokens(8) == pytest.approx(3, rel=0.01)


def test_candidates_are_parts_of_the_budget() -> None:
    assert Pace.up_to(16).budgets == (16, 8, 4, 0)
    assert Pace.up_to(16, rows=4).budgets == (16, 8, 4, 0, 32)
    assert Pace.up_to(2).budgets == (2, 1, 0) and Pace.up_to(1).budgets == (1, 0)
    assert Pace.up_to(16, rows=4, compiled=True).budgets == (16, 0) and Pace.up_to(0, rows=4).budgets == (0,)


def test_a_pace_without_a_budget_that_is_allowed_says_so() -> None:
    with pytest.raises(UserError, match="least budget of this pace is 4, and 2 is allowed"):
        Pace((8, 4)).choose(1, 2)


def test_a_clock_that_stands_still_chooses_all_the_same() -> None:
    pace = Pace((4, 0))
    for _ in range(500):
        budget = pace.choose(1)
        pace.record(1, {budget: budget + 1}, 0.0)


def test_rows_between_measured_ones_need_no_probe() -> None:
    pace = Pace((8, 0))
    for rows in (2, 8):
        for budget, seconds in ((8, 1.0 + rows), (0, 1.0)):
            for _ in range(9):
                pace.record(rows, {budget: 2 * rows}, seconds)
    assert pace.seconds(8, 5) == pytest.approx(6.0) and pace.seconds(0, 5) == pytest.approx(1.0)
    assert pace.seconds(8, 9) == pytest.approx(9 * 9 / 8) and pace.seconds(8, 20) is None


def test_no_more_than_is_left_over() -> None:
    """A budget above the limit is not even probed, and may be the best where it is allowed."""
    machine, pace = Machine(0.001, 0.9), Pace((4, 0, 8))
    for _ in range(300):
        budget = pace.choose(4, 4)
        assert budget <= 4
        pace.record(4, {budget: 4 * budget + 4}, machine.cost(4, budget))
        budget = pace.choose(2, 8)
        pace.record(2, {budget: 2 * budget + 2}, machine.cost(2, budget))
    assert pace.choose(2, 8) == 8
