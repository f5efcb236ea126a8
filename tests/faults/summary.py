"""At the end of a run, say what was survived, and write it to a page where one is asked for.

tests/conftest.py makes this a plugin, so that pytest-xdist knows it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from .ledger import LEDGER


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reliability", metavar="PAGE", help="Write the table of faults to this file, if all were tried and survived."
    )
    parser.addoption("--ledger", metavar="JSON", help="Go on in this file, so that a run can be made in parts.")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist sends its part to the process that sums up."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = {
            test: {fault: dict(outcomes) for fault, outcomes in seen.items()} for test, seen in LEDGER.tests.items()
        }


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    LEDGER.add(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    page, ledger = config.getoption("--reliability", None), config.getoption("--ledger", None)
    if exitstatus == pytest.ExitCode.OK and (page or ledger):
        command = shlex.join(["pytest", *_without_files(config.invocation_params.args)])
        if ledger:
            LEDGER.go_on_in(Path(ledger), command)
        else:
            LEDGER.commands = [command]
    for row in LEDGER.rows():
        terminalreporter.write_line(row)
    if page and exitstatus == pytest.ExitCode.OK:
        from .parsers import READERS  # late, since it imports all that reads

        terminalreporter.write_line(LEDGER.write(Path(page), READERS))


def _without_files(arguments: Iterable[str]) -> list[str]:
    """The command line without where the outcomes are written."""
    values = iter(arguments)
    return [value for value in values if value not in ("--ledger", "--reliability") or not next(values)]
