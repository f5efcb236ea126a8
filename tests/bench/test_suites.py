"""Suites by name: the mapping of their rows, and what happens without library, network or the expected columns."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ctc_drafter.bench.prompts import Prompt
from ctc_drafter.bench.suites import SUITES, gsm8k, humaneval, load_prompts, mt_bench, read_suite, spec_bench
from ctc_drafter.errors import UserError

MT_BENCH = {"category": "math", "prompt": ["A triangle?", "Its circle?"], "prompt_id": 7, "reference": []}
GSM8K = {"question": "Tom has 3 apples?", "answer": "#### 3"}
HUMANEVAL = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "", "test": "", "entry_point": "f"}
SPEC_BENCH = {"question_id": 201, "category": "qa", "turns": ["Who?"], "reference": ["x"]}


def test_rows_become_prompts() -> None:
    assert mt_bench(0, MT_BENCH) == {"id": 7, "category": "math", "turns": ["A triangle?", "Its circle?"]}
    assert gsm8k(5, GSM8K) == {"id": 5, "category": "math", "turns": ["Tom has 3 apples?"]}
    assert humaneval(0, HUMANEVAL) == {"id": "HumanEval/0", "category": "code", "turns": ["def f():\n"]}
    assert spec_bench(0, {"text": json.dumps(SPEC_BENCH)}) == {"id": 201, "category": "qa", "turns": ["Who?"]}


def as_local(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    monkeypatch.setitem(SUITES, name, dataclasses.replace(SUITES[name], **changes))


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("cached")
def test_a_dataset_folder_reads_as_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "gsm"
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps({**GSM8K, "question": f"q{i}"}) + "\n" for i in range(3)))
    as_local(monkeypatch, "gsm8k", path=str(folder), config=None)
    assert load_prompts(["gsm8k"], limit=2) == [Prompt(0, "math", ("q0",)), Prompt(1, "math", ("q1",))]
    assert len(load_prompts([Path("gsm8k")])) == 3
    as_local(monkeypatch, "humaneval", path=str(folder), config=None)
    with pytest.raises(UserError, match=r"Suite 'humaneval' .* other columns than expected \('task_id'\)"):
        read_suite("humaneval")


@pytest.mark.usefixtures("cached")
def test_spec_bench_rows_may_differ_in_their_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [SPEC_BENCH, {"question_id": 1, "category": "rag", "turns": ["a\u2028b", "c"], "reference": 3}]
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    as_local(monkeypatch, "spec-bench", data_files=str(path))
    assert read_suite("spec-bench") == [Prompt(201, "qa", ("Who?",)), Prompt(1, "rag", ("a\u2028b", "c"))]


def test_an_existing_file_wins_over_a_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gsm8k").write_text('{"turns": ["mine"]}\n')
    assert load_prompts(["gsm8k"])[0].turns == ("mine",)


def test_an_unknown_name_is_no_file_and_no_suite() -> None:
    with pytest.raises(UserError, match="'mtbench' does not exist, and it is none of the suites mt-bench, gsm8k"):
        load_prompts(["mtbench"])


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ctc-drafter\[suites\]', or give a file"):
        read_suite("mt-bench")


def test_without_a_network_the_local_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"'mt-bench' could not be had .*\(Couldn't reach the Hub\); without a network"):
        read_suite("mt-bench")
