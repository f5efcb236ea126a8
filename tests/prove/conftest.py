"""At the end of a run, say what was compared."""

from __future__ import annotations

from typing import Any

from .tally import TALLY


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for sentence in TALLY.sentences():
        terminalreporter.write_line(sentence)
