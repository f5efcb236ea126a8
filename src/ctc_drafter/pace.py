"""How much to draft for the rows that run now: what gives the most tokens per second, by running averages."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Self

from .errors import UserError
from .steps import Step

WINDOW = 9
"""Passes over which the median time is taken: one that was disturbed does not count."""
MEMORY = 128
"""Rows of passes over which averages of tokens reach back, about, and comparisons of two budgets in the same passes."""
SHORTEST, LONGEST = 64, 512
"""Passes between two probes of what is not chosen; the distance doubles while the choice stands."""
BURST = 3
"""Passes of a probe. The time of the first does not count: the drafters catch up in it."""
FIRST, SURE = 8, 96
"""Rows of passes that a candidate is tried for before it is judged; and from which on its tokens are believed."""
TIMED = 4
"""Passes whose time is taken before a candidate is judged: with fewer, one that was disturbed counts."""
SHARE = 0.02
"""Part of the time that probes may lose, once all candidates are known."""
STAY = 1.08
"""Drafting begins again for what promises so many times as much: the drafters catch up then, which takes as long as
some passes and counts nowhere. It ends for any gain."""
ALIKE = 16
"""Passes whose row counts differ by no more than one in so many rows are timed together."""
NEAR = 1.25
"""A row count within this ratio of a measured one, but not between two, is judged in proportion to it."""


class Pace:
    """Chooses a budget for each pass from a few candidates, 0 (plain decoding) being one of them.

    Drafting pays while the pass is bound by memory traffic: the more rows run, the more a pass costs by its nodes. How
    much depends on machine, model and text, so it is measured as the passes go: seconds of a pass for each candidate
    and number of rows, and tokens per row for each candidate, whatever the number of rows. A pass also tells what
    smaller budgets would have brought, the best nodes of its tree, so that budgets are compared in the same places of
    the text. The best candidate runs; the others are probed now and then, at most BURST passes of SHORTEST + BURST, and
    as seldom as it takes for what that loses to stay within SHARE of the time. What is emitted does not depend on it.
    """

    def __init__(self, budgets: Sequence[int]) -> None:
        """budgets: the candidates, tried in this order where nothing is known."""
        self.budgets = tuple(budgets)
        self._seconds: dict[int, dict[int, deque[float]]] = {b: {} for b in self.budgets}
        self._tokens: dict[int, float] = {}
        """Per row and pass, of the passes that told."""
        self._counted: dict[int, int] = {}
        self._pairs: dict[int, tuple[float, float]] = {}
        """Of a candidate: its tokens and those of the next smaller one in the same passes, with falling weights."""
        self._last: int | None = None
        self._running = self.budgets[0]
        """What was chosen last, probes left out."""
        self._burst: tuple[int, int] = (0, 0)
        """The candidate that is probed, and the passes left of that."""
        self._patience: dict[int, int] = {}
        self._since: dict[int, int] = {}
        self._best: dict[int, int] = {}
        self._turn = 0
        self._allowance = 0.0
        """Seconds that probes may lose by now."""

    @classmethod
    def up_to(cls, budget: int, rows: int = 1, compiled: bool = False) -> Self:
        """Between nothing, a quarter, half and all of `budget`, for up to so many rows; several may use twice as much.

        compiled: passes are, and only those of the budget itself and of nothing.
        """
        if compiled or not budget:
            return cls([budget, 0] if budget else [0])
        parts = dict.fromkeys([budget, max(1, budget // 2), max(1, budget // 4), 0])
        return cls([*parts, *([2 * budget] if rows > 1 else [])])

    def choose(self, rows: int, most: int | None = None) -> int:
        """The budget of the next pass, which `rows` rows make; `most`: the largest that is allowed (None: any).

        Raises UserError if no candidate is allowed.
        """
        budgets = self.budgets if most is None else [b for b in self.budgets if b <= most]
        if not budgets:
            least = min(self.budgets)
            raise UserError(f"The least budget of this pace is {least}, and {most} is allowed; give it a smaller one.")
        probed, left = self._burst
        if left and probed in budgets:
            return probed
        unknown = [b for b in budgets if self.seconds(b, rows) is None or not self._is_known(b)]
        if unknown:
            return self._probe(unknown[0])
        best = max(budgets, key=lambda b: self.rate(b, rows) * (STAY if b == self._running == 0 else 1))
        if best != self._best.get(rows):
            self._best[rows], self._patience[rows], self._since[rows] = best, SHORTEST, 0
        self._since[rows] += 1
        if self._since[rows] > self._patience[rows] and len(budgets) > 1:
            others = [b for b in budgets if b != best]
            other = others[self._turn % len(others)]
            loss = self._loss(other, best, rows)
            if loss <= self._allowance:
                self._allowance -= loss
                self._since[rows], self._patience[rows] = 0, min(2 * self._patience[rows], LONGEST)
                self._turn += 1
                return self._probe(other)
        self._running = best
        return best

    def learn(self, budget: int, steps: Sequence[Step], seconds: float) -> None:
        """A pass with this budget has brought these steps, one for each row, in so many seconds."""
        smaller = [b for b in self.budgets if 0 < b < budget]
        told = [step.tokens_within(smaller) for step in steps]
        brought = {b: sum(each[b] for each in told) for b in smaller}
        self.record(len(steps), {**brought, budget: sum(len(step.tokens) for step in steps)}, seconds)

    def record(self, rows: int, told: Mapping[int, int], seconds: float) -> None:
        """A pass of `rows` rows with the largest budget of `told` took so many seconds.

        told: the tokens that it emitted in all, and those that it would have emitted with smaller budgets.
        """
        budget = max(told)
        probed, left = self._burst
        self._burst = (probed, max(0, left - 1))
        for b, tokens in told.items():
            old, self._counted[b] = self._tokens.get(b, 0.0), min(self._counted.get(b, 0) + rows, MEMORY)
            self._tokens[b] = old + (tokens / rows - old) * rows / max(rows, self._counted[b])
        drafted = sorted(b for b in told if b)
        for low, high in pairwise(drafted):
            more, less = self._pairs.get(high, (0.0, 0.0))
            kept = max(0.0, 1 - rows / MEMORY)
            self._pairs[high] = more * kept + told[high], less * kept + told[low]
        if budget == self._last:
            self._seconds[budget].setdefault(rows, deque(maxlen=WINDOW)).append(seconds)
        self._last = budget
        if not left:
            self._allowance += SHARE * seconds

    def tokens(self, budget: int) -> float:
        """Per row and pass: the latest average of the smallest candidate, times what larger ones bring in proportion.

        What runs tells of the smaller ones in every pass, and of a larger one nothing, whose own average is of the text
        where it last ran; how two budgets compare changes less. Without a comparison, that average.
        """
        smaller = max((b for b in self.budgets if 0 < b < budget), default=0)
        more, less = self._pairs.get(budget, (0.0, 0.0))
        return self.tokens(smaller) * more / less if smaller and less else self._tokens[budget]

    def _is_known(self, budget: int) -> bool:
        timed = sum(len(times) for times in self._seconds[budget].values())
        return timed >= TIMED and self._counted.get(budget, 0) >= FIRST

    def _loss(self, budget: int, best: int, rows: int) -> float:
        """Seconds that a probe of `budget` is expected to take longer than `best` would for the same tokens."""
        rate = self.rate(best, rows)
        if not rate:  # passes too short for the clock
            return 0.0
        return max(0.0, BURST * ((self.seconds(budget, rows) or 0.0) - rows * self.tokens(budget) / rate))

    def rate(self, budget: int, rows: int) -> float:
        """Tokens per second to expect of a budget, in doubt the higher number, so that it is tried; 0 if unmeasured."""
        seconds = self.seconds(budget, rows)
        if not seconds or budget not in self._counted:
            return 0.0
        return rows * self._hoped(budget) / seconds

    def _hoped(self, budget: int) -> float:
        """Tokens per row and pass; of few passes, so many more as may be: lengths spread by about 1, two errors."""
        count = self._counted[budget]
        return self.tokens(budget) + (2 / math.sqrt(count) if budget and count < SURE else 0.0)

    def seconds(self, budget: int, rows: int) -> float | None:
        """Of a pass: measured at about this number of rows, or between two others, or near to one; None if unknown."""
        known = self._seconds[budget]
        alike = [s * rows / r for r, times in known.items() if abs(r - rows) * ALIKE <= rows for s in times]
        if alike:
            return median(alike)
        below = max((r for r in known if r < rows), default=None)
        above = min((r for r in known if r > rows), default=None)
        if below is not None and above is not None:
            low, high = median(known[below]), median(known[above])
            return low + (high - low) * (rows - below) / (above - below)
        nearest = above if below is None else below
        if nearest is None or max(nearest, rows) > NEAR * min(nearest, rows):
            return None
        return median(known[nearest]) * rows / nearest

    def _probe(self, budget: int) -> int:
        self._burst = (budget, BURST)
        return budget
