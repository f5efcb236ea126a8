"""What was broken on purpose, how often, and what was seen; the page that tells it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from ctc_drafter.environment import versions
from ctc_drafter.files import write_text

PAGE = """# Faults tried

Written by `make faults`, which fails if any of this is not survived; do not edit. {versions}. The run:

{commands}

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
        self.commands: list[str] = []

    def saw(self, fault: str, outcome: str, times: int = 1) -> None:
        self.outcomes[fault][outcome] += times

    def add(self, part: Mapping[str, Mapping[str, int]]) -> None:
        """Take in the outcomes that another process has seen."""
        for fault, seen in part.items():
            self.outcomes[fault].update(seen)

    def go_on_in(self, path: Path, command: str) -> None:
        """Add what another part of the run has written to the file, and write it there, together with this part."""
        if path.exists():
            part = json.loads(path.read_text(encoding="utf-8"))
            self.commands = part["commands"]
            self.add(part["outcomes"])
        self.commands.append(command)
        write_text(path, json.dumps({"commands": self.commands, "outcomes": self.outcomes}, indent=1))

    def rows(self) -> list[str]:
        return [
            f"| {fault} | {seen.total():,} | {'; '.join(f'{n:,} {what}' for what, n in seen.most_common())} |"
            for fault, seen in sorted(self.outcomes.items())
        ]

    def page(self) -> str:
        known = {"python": sys.version.split()[0], **versions()}
        for name in ("hypothesis", "atheris"):
            try:
                known[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                known[name] = "not installed"
        told = ", ".join(f"{name} {version}" for name, version in known.items())
        commands = "\n".join(f"* `{command}`" for command in self.commands)
        return PAGE.format(commands=commands, versions=f"{platform.system()}, {told}", rows="\n".join(self.rows()))


LEDGER = Ledger()


def one_sentence(text: str) -> None:
    """What a refusal must be."""
    assert text and "\n" not in text and "Traceback" not in text and len(text) < 1000, text
