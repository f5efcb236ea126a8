"""What the scripts of benchmarks/ compute beside timing things."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from ctc_drafter.bench.command import output_files

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


def bench_writes(arguments: tuple[object, ...]) -> None:
    """A result file for each pair, where `bench` would put them."""
    given = [str(argument) for argument in arguments]
    told = {name: [b for a, b in pairwise(given) if a == name] for name in ("--drafter", "--budget", "--json")}
    pairs = [(name, int(budget)) for name in told["--drafter"] for budget in told["--budget"]]
    for (name, budget), path in zip(pairs, output_files(Path(told["--json"][0]), pairs)):
        totals = {"answers": 1, "identical": 1, "looped": 0, "tau": float(budget), "speedup": 1.0, "efficiency": 1.0}
        totals |= {"plain_tokens_per_second": 1.0, "split": {"draft": 0.1}}
        drafter = {"name": Path(name).name, "budget": budget, "parameters": 1}
        path.write_text(json.dumps({"totals": totals, "drafter": drafter, "target": {"parameters": 1}}))


@pytest.mark.parametrize("drafters", [["ours"], ["ours-seed0", "ours-seed1"], ["lookup", "ours"]])
@pytest.mark.parametrize("budgets", [[4], [4, 8]])
def test_methods_are_told_of_this_run_alone(
    drafters: list[str], budgets: list[int], script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is one result, which `bench` calls otherwise than one of several."""
    methods = script("methods")
    monkeypatch.setattr(methods, "command", lambda *arguments, **_: bench_writes(arguments))
    options = argparse.Namespace(json=tmp_path / "out.json", budgets=budgets, target="t", dtype="float32", limit=1)
    options.max_new_tokens, options.files, options.eval, options.overwrite = 4, [], tmp_path, False
    options.steps, options.batch, options.seeds = 2, 16, [0]
    methods.summary(methods.measure([str(tmp_path / name) for name in drafters], options), options)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    names = {name.removesuffix("-seed0").removesuffix("-seed1") for name in drafters}
    assert {(row["method"], row["budget"]) for row in rows} == {(name, b) for name in names for b in budgets}
    assert all(row["runs"] == len(drafters) / len(names) and row["mean_tau"] == row["budget"] for row in rows)
    results = {path.name for path in tmp_path.glob("out-*.json")}
    assert results == {f"out-{name}-{budget}.json" for name in drafters for budget in budgets}


def test_a_family_is_told_of_this_run_alone(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an earlier run with other budgets left in the folder."""
    scaling = script("scaling")
    monkeypatch.setattr(scaling, "command", lambda *arguments, **_: bench_writes(arguments))
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "pretrain.json").write_text(json.dumps({"tokens": 1, "held_out_loss": 2.0}))
    for budgets in ([4, 8], [8]):
        options = argparse.Namespace(dtype="float32", limit=1, prompts=["p.jsonl"], budgets=budgets)
        rows = scaling.measure(tmp_path, options)
        assert sorted(row["budget"] for row in rows) == sorted(budgets * 3)


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
