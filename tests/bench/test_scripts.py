"""What the scripts of benchmarks/ compute beside timing things."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


Script = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Imports a script as Python itself runs it, with its folder first on the path."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.mark.parametrize("rates", [[], [1.0], [0.0, 0.0], [0.8, 0.5, 0.25]])
def test_replayed_lengths_have_the_recorded_rates(rates: list[float], script: Script) -> None:
    lengths = script("shapes").replayed(rates, 100)
    assert len(lengths) == 100
    for k, rate in enumerate(rates, 1):
        assert sum(length >= k for length in lengths) / 100 == pytest.approx(rate, abs=0.01)


def test_speedup_is_over_the_plain_loop_of_the_same_kind(script: Script) -> None:
    seconds = {"plain": 4.0, "plain, compiled": 2.0, "speculative": 2.0, "speculative, compiled": 1.6, "generate": 4.4}
    runs = {
        name: {"tokens": 33, "seconds": s, "steps": 8 if "spec" in name else 32, "identical": True}
        for name, s in seconds.items()
    }
    totals = script("engine").totals([{"runs": runs}], list(seconds))
    assert totals["speculative"]["tau"] == totals["speculative, compiled"]["tau"] == 4
    assert totals["speculative"]["speedup"] == pytest.approx(2.0)
    assert totals["speculative, compiled"]["speedup"] == pytest.approx(1.25)
    assert totals["speculative, compiled"]["efficiency"] == pytest.approx(1.25 / 4)
    assert totals["plain, compiled"]["over_generate_median"] == pytest.approx(2.2)
