"""What was broken on purpose, how often, and what was seen; the page that tells it."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections import Counter, defaultdict

from ctc_drafter.environment import versions

PAGE = """# Faults tried

Written by `{command}` (`make faults` runs it), which fails if any of this is not survived; do not edit. {versions}.

*Refused* is one sentence that says what and where (a `UserError`; exit code 2 of the command line), with no traceback
and nothing half-written left behind.

| fault | tries | seen |
| --- | --- | --- |
{rows}
"""


class Ledger:
    """Outcomes of each fault, counted."""

    def __init__(self) -> None:
        self.outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def saw(self, fault: str, outcome: str, times: int = 1) -> None:
        self.outcomes[fault][outcome] += times

    def rows(self) -> list[str]:
        return [
            f"| {fault} | {seen.total():,} | {'; '.join(f'{n:,} {what}' for what, n in seen.most_common())} |"
            for fault, seen in sorted(self.outcomes.items())
        ]

    def page(self, command: str) -> str:
        known = {"python": sys.version.split()[0], **versions()}
        for name in ("hypothesis", "atheris"):
            try:
                known[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                known[name] = "not installed"
        told = ", ".join(f"{name} {version}" for name, version in known.items())
        return PAGE.format(command=command, versions=f"{platform.system()}, {told}", rows="\n".join(self.rows()))


LEDGER = Ledger()


def one_sentence(text: str) -> None:
    """What a refusal must be."""
    assert text and "\n" not in text and "Traceback" not in text and len(text) < 1000, text
