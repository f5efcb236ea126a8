"""What the tests of this folder have compared, for the summary at their end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Counts over all greedy comparisons with the model's own generate."""

    families: set[str] = field(default_factory=set)
    drafters: set[str] = field(default_factory=set)
    budgets: set[int] = field(default_factory=set)
    rows: set[int] = field(default_factory=set)
    prompts: set[int] = field(default_factory=set)
    answers: int = 0
    tokens: int = 0
    accepted: int = 0
    skipped: int = 0
    """Prompts passed over since two tokens of the answer nearly tie, so that rounding decides."""
    draws: int = 0
    """Sampled answers that were tested against the exact distribution."""

    def add(self, part: Mapping[str, int | set[Any]]) -> None:
        """Take in what another process has counted: its `vars`."""
        for name, value in part.items():
            mine = getattr(self, name)
            setattr(self, name, mine | value if isinstance(value, set) else mine + value)

    def sentences(self) -> list[str]:
        out = []
        if self.answers:
            out += [
                f"greedy: {self.answers:,} answers, {self.tokens:,} tokens ({self.accepted:,} of them drafted), "
                "all equal to model.generate",
                f"  {len(self.families)} families, {len(self.drafters)} drafters, {_range(self.budgets)} draft nodes, "
                f"{_range(self.rows)} rows, prompts of {_range(self.prompts)} tokens; "
                f"{self.skipped} prompts passed over, their answers being near-ties",
            ]
        if self.draws:
            out.append(f"sampling: {self.draws:,} answers tested against the exact distribution")
        return out


def _range(numbers: set[int]) -> str:
    return f"{min(numbers)} to {max(numbers)} ({len(numbers)} values)" if numbers else "no"


TALLY = Tally()
