"""What was broken on purpose, how often, and what was seen; the page that tells it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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

CUT, FLIPPED = "cut at every length", "a bit of every byte flipped"
HYPOTHESIS, ATHERIS = "any bytes (hypothesis)", "coverage-guided (atheris)"
NO_ATHERIS = f"readers: {ATHERIS}"
"""The fault that stands for all of atheris where that is not installed."""

NEEDED = {
    **{f"{what}: killed at a random moment and resumed": 50 for what in ("train", "distill")},
    **{f"{what}: three writers at once": 30 for what in ("train", "distill")},
    "train: full disk": 10,
    "distill: full disk": 5,
    **{f"{what}: read-only folder": 1 for what in ("train", "distill")},
    **{f"drafter, {name}: {fault}": 500 for name in ("config.json", "model.safetensors") for fault in (CUT, FLIPPED)},
    "drafter without a digest, model.safetensors: a bit flipped": 500,
    "drafter: a tensor NaN": 3,
    **{f"training state, {name}: {CUT}": 100 for name in ("state.json", "state.safetensors")},
    **{f"target, {name}: cut": 40 for name in ("config.json", "generation_config.json", "model.safetensors")},
    **{f"{what}: {CUT}": 100 for what in ("prompt file", "recipe of train", "distilled data set to go on with")},
    "damaged folder named on the command line": 6,
    "unreadable file named on the command line": 18,
}
"""The page is of these at least: fault and the fewest tries. `Ledger.missing` adds those of each reader."""

Seen = Mapping[str, Mapping[str, int]]
"""By fault: how often each outcome was seen."""


class Ledger:
    """Outcomes of each fault, counted, by the test that saw them: one that runs again replaces what it saw before."""

    def __init__(self) -> None:
        self.tests: dict[str, Any] = {}
        self.commands: list[str] = []

    def saw(self, fault: str, outcome: str, times: int = 1) -> None:
        """Called by a test, whose name pytest tells."""
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        seen = self.tests.setdefault(test, defaultdict(Counter))
        seen[fault][outcome] += times

    def add(self, part: Mapping[str, Seen]) -> None:
        """Take in what tests in another process have seen."""
        self.tests.update(part)

    def go_on_in(self, path: Path, command: str) -> None:
        """Add what another part of the run has written to the file, and write it there, together with this part."""
        if path.exists():
            part = json.loads(path.read_text(encoding="utf-8"))
            self.commands = [earlier for earlier in part["commands"] if earlier != command]
            self.tests = {**part["tests"], **self.tests}
        self.commands.append(command)
        write_text(path, json.dumps({"commands": self.commands, "tests": self.tests}, indent=1))

    def outcomes(self) -> dict[str, Counter[str]]:
        """By fault, over all tests."""
        found: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for seen in self.tests.values():
            for fault, outcomes in seen.items():
                found[fault].update(outcomes)
        return dict(sorted(found.items()))

    def missing(self, readers: Iterable[str]) -> list[str]:
        """The faults without which the page would be of a part only, or of the quick cut: each of `readers` has two."""
        found = self.outcomes()
        needed = NEEDED | {f"{name}: {HYPOTHESIS}": 1000 for name in readers}
        needed |= {NO_ATHERIS: 1} if NO_ATHERIS in found else {f"{name}: {ATHERIS}": 10 for name in readers}
        return [fault for fault, fewest in needed.items() if found.get(fault, Counter()).total() < fewest]

    def rows(self) -> list[str]:
        return [
            f"| {fault} | {seen.total():,} | {'; '.join(f'{n:,} {what}' for what, n in seen.most_common())} |"
            for fault, seen in self.outcomes().items()
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

    def write(self, page: Path, readers: Iterable[str]) -> str:
        """Write the page unless something is missing; returns a sentence that says so."""
        missing = self.missing(readers)
        if not missing:
            write_text(page, self.page())
            return f"Written: {page}"
        named = "; ".join(missing[:5]) + (f"; and {len(missing) - 5} more" if len(missing) > 5 else "")
        return (
            f"'{page}' is left as it is, for this run is a part: these faults were not tried, or too seldom: {named}."
        )


LEDGER = Ledger()


def one_sentence(text: str) -> None:
    """What a refusal must be."""
    assert text and "\n" not in text and "Traceback" not in text and len(text) < 1000, text
