"""The page of faults: each test counted once, and nothing written of a part of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from .ledger import ATHERIS, HYPOTHESIS, NEEDED, NO_ATHERIS, Ledger


def part(monkeypatch: pytest.MonkeyPatch, test: str, fault: str, times: int) -> Ledger:
    """What a process that has run one test holds."""
    ledger = Ledger()
    monkeypatch.setenv("PYTEST_CURRENT_TEST", f"{test} (call)")
    ledger.saw(fault, "refused", times)
    return ledger


def test_a_part_that_runs_again_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for test, times in (("a.py::b[1 2]", 3), ("a.py::b[1 3]", 4), ("a.py::b[1 2]", 5)):
        ledger = part(monkeypatch, test, "fault", times)
        ledger.go_on_in(tmp_path / "l.json", f"pytest {test}")
    assert ledger.commands == ["pytest a.py::b[1 3]", "pytest a.py::b[1 2]"]
    assert ledger.rows() == ["| fault | 9 | 9 refused |"]


@pytest.mark.parametrize("installed", [True, False])
def test_the_page_is_of_the_whole_run_only(installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, whole = tmp_path / "page.md", Ledger()
    everything = {**NEEDED, f"x: {HYPOTHESIS}": 1000, **({f"x: {ATHERIS}": 10} if installed else {NO_ATHERIS: 1})}
    for fault, times in everything.items():
        assert "left as it is" in (said := whole.write(page, ["x"])) and "\n" not in said and not page.exists()
        if times > 1:
            whole.add(part(monkeypatch, "quick cut", fault, times - 1).tests)
            assert fault in whole.missing(["x"])
        whole.add(part(monkeypatch, f"test of {fault}", fault, times).tests)
    assert whole.write(page, ["x"]) == f"Written: {page}" and "| drafter: a tensor NaN | " in page.read_text()
