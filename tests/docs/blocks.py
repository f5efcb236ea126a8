"""The fenced blocks of a page, and what their titles say about running them.

| title | what the tests do |
| --- | --- |
| none | run it; blocks of a page go on from one another, in one folder |
| `Terminal 1` | start it, wait until it serves, leave it running to the page's end |
| a file name | write the block to that file |
| `Output` (of a text block) | compare it with what the block before printed; `…` stands for anything |
| `Takes minutes …` | run it only in the slow test of the page |
| `Needs …`, `Takes hours …` | never run it; `test_not_run.py` looks whether its commands and options exist |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]

FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```[ \t]*$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    title: str
    code: str

    @property
    def runs(self) -> bool:
        return self.language in ("python", "bash") and not self.title.startswith(("Needs ", "Takes hours"))

    @property
    def is_slow(self) -> bool:
        return self.title.startswith("Takes minutes")

    @property
    def is_file(self) -> bool:
        return re.fullmatch(r"[\w-]+\.(yaml|json|jsonl|py)", self.title) is not None

    def __str__(self) -> str:
        return f"{self.page.name}, line {self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]*)"', match[2])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match[1], title[1] if title else "", match[3]))
    return found


def matches(expected: str, output: str) -> bool:
    """Whether the output is the expected one, line by line without trailing blanks; `…` stands for anything."""

    def tidy(text: str) -> str:
        return "\n".join(line.rstrip() for line in text.strip().splitlines())

    pattern = ".*".join(re.escape(part) for part in tidy(expected).split("…"))
    return re.fullmatch(pattern, tidy(output), re.S) is not None
