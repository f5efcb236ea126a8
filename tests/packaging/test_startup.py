"""The command line answers before torch would have been loaded."""

from __future__ import annotations

import subprocess
import sys
from resource import RUSAGE_CHILDREN, getrusage

import pytest

LIMIT = 0.2
"""Seconds that `--help` may take."""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["generate", "--help"]])
def test_help_loads_neither_torch_nor_rich(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from ctc_drafter.cli import app\n"
        "try:\n    app(sys.argv[1:])\n"
        "finally:\n    print(*sorted({'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip()
    assert done.stderr.strip() == ""


def test_help_is_quick_and_cuts_no_line() -> None:
    """Processor time, the best of several tries: what else the machine does must not decide."""
    command = [sys.executable, "-m", "ctc_drafter", "--help"]
    tries = []
    for _ in range(3):
        before = getrusage(RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        after = getrusage(RUSAGE_CHILDREN)
        tries.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(tries) < LIMIT
    assert "..." not in done.stdout.split("Commands:")[1]
