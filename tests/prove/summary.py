"""At the end of a run, say what was compared; tests/conftest.py makes this a plugin, so that pytest-xdist knows it."""

from __future__ import annotations

from typing import Any

import pytest

from .tally import TALLY


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist sends its part to the process that sums up."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tally"] = vars(TALLY)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    TALLY.add(getattr(node, "workeroutput", {}).get("tally", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for sentence in TALLY.sentences():
        terminalreporter.write_line(sentence)
