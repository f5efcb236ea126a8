"""Training and distillation, killed at random moments again and again: they end as if unbroken.

Half of the kills come at a random time, the others just before a random touch of the file system by the run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctc_drafter.drafters import load_drafter
from ctc_drafter.jsonl import read_jsonl
from ctc_drafter.target import Target
from small_run import small_recipe, write_data

from .ledger import LEDGER, one_sentence
from .workers import left_by, outcome_of, run, start

Line = Callable[[Path], list[str]]
"""The command that writes into a folder."""


@pytest.fixture(scope="module")
def lines(target: Target, target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Line]:
    inputs = tmp_path_factory.mktemp("inputs")
    data = write_data(inputs / "train.jsonl", target)
    (inputs / "prompts.jsonl").write_text("".join(json.dumps({"turns": [f"Question {i}"]}) + "\n" for i in range(40)))

    def recipe(folder: Path, values: dict[str, Any]) -> list[str]:
        path = inputs / f"{folder.parent.name}-{folder.name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return ["--config", str(path)]

    def train(folder: Path) -> list[str]:
        changes = {"steps": 8, "checkpoint_every": 2, "ema": 0.9, "batch": 2}
        return ["train", *recipe(folder, asdict(small_recipe(target_folder, data, folder / "drafter", **changes)))]

    def distill(folder: Path) -> list[str]:
        values: dict[str, Any] = {"target": str(target_folder), "prompts": [str(inputs / "prompts.jsonl")], "batch": 2}
        values |= {"output": str(folder / "answers.jsonl"), "max_new_tokens": 6, "dtype": "float32", "device": "cpu"}
        return ["distill", *recipe(folder, values), "--temperature", "1.0"]

    return {"train": train, "distill": distill}


def made(folder: Path) -> dict[str, Any]:
    """What a run is for, and the names of all that it leaves; curves, times and versions are its own."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if ".logs" not in str(p))
    out: dict[str, Any] = {"names": names}
    for path in (folder / name for name in names):
        if path.suffix in (".safetensors", ".jsonl"):
            out[path.name] = path.read_bytes()
        elif path.name.endswith("history.json"):
            out[path.name] = [{**row, "seconds": 0} for row in json.loads(path.read_text())]
    return out


def moment(folder: Path) -> str:
    """Where a kill fell, as far as the files tell."""
    names = {p.name for p in folder.iterdir()}
    if any(name.endswith((".writing", ".old")) for name in names):
        return "while a file or folder was written or renamed"
    if {"drafter.state", "answers.jsonl"} & names:
        return "between two saves"
    return "before the first save"


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["train", "distill"])
@pytest.mark.timeout(1500)
def test_killed_runs_go_on_as_if_unbroken(what: str, kills: int, lines: dict[str, Line], tmp_path: Path) -> None:
    rng, line = random.Random(kills), lines[what]
    (tmp_path / "whole").mkdir()
    run(["--version"], tmp_path)  # the first process waits for the imports, which is not to be measured
    began = time.perf_counter()
    whole = run(line(tmp_path / "whole"), tmp_path / "whole")
    seconds = time.perf_counter() - began
    assert whole is not None and whole.code == 0, whole
    want, done, chain = made(tmp_path / "whole"), 0, 0
    while done < kills:
        folder = tmp_path / f"broken-{chain}"
        folder.mkdir()
        chain += 1
        for _ in range(rng.randint(1, 3)):
            at = rng.randint(1, whole.events) if done % 2 else 0
            process, pipe = start(line(folder), folder, kill_at=at)
            if not at:
                process.join(rng.uniform(0.05, 1) * seconds)
                process.kill()
            if outcome_of(process, pipe) is None:
                done += 1
                LEDGER.saw(f"{what}: killed at a random moment and resumed", f"{moment(folder)}: result as unbroken")
        last = run(line(folder), folder)
        assert last is not None and last.code == 0, last
        assert made(folder) == want


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["train", "distill"])
def test_two_and_more_writers(what: str, times: int, lines: dict[str, Line], tmp_path: Path) -> None:
    """Of three that start at once in one folder, those that find another one there say so and leave it alone."""
    (tmp_path / "whole").mkdir()
    assert run(lines[what](tmp_path / "whole"), tmp_path / "whole") is not None
    for i in range(times):
        folder = tmp_path / f"shared-{i}"
        folder.mkdir()
        outcomes = [outcome_of(*pair) for pair in [start(lines[what](folder), folder) for _ in range(3)]]
        for outcome in outcomes:
            assert outcome is not None and outcome.code in (0, 2), outcome
            if outcome.code:
                one_sentence(outcome.last_line)
                assert "is writing here" in outcome.last_line
            LEDGER.saw(f"{what}: three writers at once", "refused" if outcome.code else "finished, result as alone")
        assert any(outcome is not None and outcome.code == 0 for outcome in outcomes)
        assert made(folder) == made(tmp_path / "whole")


SHARES = (0.05, 0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.1)
"""Of what the files of an unbroken run take at their most."""


@pytest.mark.parametrize("shares", [(0.3, 0.8, 1.1), pytest.param(SHARES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["train", "distill"])
def test_full_disks(
    what: str, shares: tuple[float, ...], lines: dict[str, Line], target: Target, tmp_path: Path
) -> None:
    """What is left on the disk can be used, and a rerun where there is room goes on from it and ends as if unbroken."""
    (tmp_path / "whole").mkdir()
    whole = run(lines[what](tmp_path / "whole"), tmp_path / "whole")
    assert whole is not None and whole.code == 0, whole
    want, moments, fits, mounted = made(tmp_path / "whole"), set(), 0, True
    for disk in sorted({4 * max(1, round(whole.peak * share / 4)) for share in shares}):
        folder = tmp_path / str(disk)
        folder.mkdir()
        outcome = run(lines[what](folder), folder, disk=disk)
        assert outcome is not None and outcome.code in (0, 2), (disk, outcome)
        assert not [name for name in outcome.left if ".writing" in name or ".lock" in name], outcome
        shutil.rmtree(folder)
        left_by(folder).rename(folder)
        check_what_is_left(folder, target)
        mounted, seen = outcome.mounted, "fits, and is finished as on a large disk"
        if outcome.code:
            one_sentence(outcome.last_line)
            moments.add(moment(folder))
            seen = f"refused {moment(folder)}; with room, result as unbroken"
            again = run(lines[what](folder), folder)
            assert again is not None and again.code == 0, again
        fits += not outcome.code
        assert made(folder) == want
        LEDGER.saw(f"{what}: {'full disk' if mounted else 'limit to the size of a file'}", seen)
    assert fits
    assert not mounted or "between two saves" in moments  # else only the first save was tried


def check_what_is_left(folder: Path, target: Target) -> None:
    """Raise UserError if a drafter or answers there are damaged; a state is read when the run goes on."""
    if (folder / "drafter").exists():
        load_drafter(str(folder / "drafter"), target)
    if (folder / "answers.jsonl").exists():
        assert (folder / "answers.jsonl").read_bytes()[-1:] in (b"\n", b"")
        assert all(row["answer_ids"] is not None for _, row in read_jsonl(folder / "answers.jsonl"))


@pytest.mark.parametrize("what", ["train", "distill"])
def test_read_only_folders(what: str, lines: dict[str, Line], tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    outcome = run(lines[what](folder), folder, disk=0)
    if outcome is not None and not outcome.mounted and os.geteuid() == 0:
        pytest.skip("nothing can be mounted here, and root may write to any folder")
    assert outcome is not None and outcome.code == 2, outcome
    one_sentence(outcome.last_line)
    assert outcome.left == {}
    LEDGER.saw(f"{what}: read-only folder", "refused, exit code 2")
