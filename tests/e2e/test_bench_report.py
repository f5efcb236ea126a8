"""A real `bench` of several drafters and budgets, and the page that `report` makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ctc_drafter.cli import app


@pytest.mark.slow
def test_bench_then_report(target_folder: Path, drafter_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"category": c, "turns": [f"Hello {c}"]}) + "\n" for c in "abc"))
    command: list[object] = ["bench", "--prompts", prompts, "--limit", 2, "--target", target_folder]
    command += ["--drafter", drafter_folder, "--drafter", "none", "--budget", 2, "--budget", 4]
    bench = CliRunner().invoke(app, [*map(str, command), "--max-new-tokens", "8", "--json", str(tmp_path / "r.json")])
    assert bench.exit_code == 0, bench.stderr
    assert "params" in bench.stdout and "draft share" in bench.stdout
    results = sorted(tmp_path.glob("r-*.json"))
    assert len(results) == 4

    out = tmp_path / "page"
    figures = [] if find_spec("matplotlib") else ["--no-figures"]
    report = subprocess.run(
        [sys.executable, "-m", "ctc_drafter", "report", *map(str, results), "--output", str(out), *figures],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert report.returncode == 0, report.stderr
    assert report.stdout == f"Report: {out / 'report.md'}\n"
    text = (out / "report.md").read_text()
    assert f"Command: `ctc-drafter report {results[0]}" in text
    assert text.count("| 2 of 2 |") == 4 and "`none`" in text and "`tiny-ctc`" in text
    assert all(path.name in text for path in out.iterdir() if path.suffix == ".png")


def test_help_says_what_may_be_repeated() -> None:
    text = " ".join(CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"}).stdout.split())
    assert "--drafter and --budget may be repeated" in text and "spec-bench" in text
