"""At the end of a run, say what was survived, and write it to a page where one is asked for."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from .ledger import LEDGER


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", metavar="PAGE", help="Write the table of faults to this file if all is survived.")


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    for row in LEDGER.rows():
        terminalreporter.write_line(row)
    page = config.getoption("--reliability", None)
    if page and exitstatus == pytest.ExitCode.OK:
        command = shlex.join(["pytest", *config.invocation_params.args])
        Path(page).write_text(LEDGER.page(command), encoding="utf-8")
        terminalreporter.write_line(f"Written: {page}")
