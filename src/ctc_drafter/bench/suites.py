"""Prompt suites by name, read through the `datasets` library: MT-bench, GSM8K, HumanEval, Spec-Bench."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import UserError
from .prompts import Prompt, prompt_of, read_prompts

Row = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """Where a suite lies, and how one of its rows reads as `{"id", "category", "turns"}`."""

    convert: Callable[[int, Row], Row]
    path: str
    """A dataset of the hub, or one of the library's own formats together with `data_files`."""
    config: str | None = None
    split: str = "train"
    data_files: str | None = None


def mt_bench(index: int, row: Row) -> Row:
    """Two turns, in the column `prompt`."""
    return {"id": row["prompt_id"], "category": row["category"], "turns": row["prompt"]}


def gsm8k(index: int, row: Row) -> Row:
    """The bare question; rows have no name, so they are counted from 0."""
    return {"id": index, "category": "math", "turns": [row["question"]]}


def humaneval(index: int, row: Row) -> Row:
    """The function's head and docstring as they are, without an instruction around them."""
    return {"id": row["task_id"], "category": "code", "turns": [row["prompt"]]}


def spec_bench(index: int, row: Row) -> Row:
    """A line of the published file, as text: its rows differ in their columns, which a table does not allow."""
    question = json.loads(row["text"])
    return {"id": question["question_id"], "category": question["category"], "turns": question["turns"]}


SPEC_BENCH = (
    "https://raw.githubusercontent.com/hemingkx/Spec-Bench/fd2c1cd7d2201ef71db4c5f4e455008f017967bf"
    "/data/spec_bench/question.jsonl"
)
SUITES = {
    "mt-bench": Suite(mt_bench, "HuggingFaceH4/mt_bench_prompts"),
    "gsm8k": Suite(gsm8k, "openai/gsm8k", "main", "test"),
    "humaneval": Suite(humaneval, "openai/openai_humaneval", "openai_humaneval", "test"),
    "spec-bench": Suite(spec_bench, "text", data_files=SPEC_BENCH),
}


def load_prompts(names: Iterable[str | Path], limit: int | None = None) -> list[Prompt]:
    """Prompts of all files and suites, the first `limit` of each. A file wins over a suite of the same name."""
    prompts: list[Prompt] = []
    for name in names:
        if Path(name).exists():
            prompts += read_prompts([name], limit)
        elif str(name) in SUITES:
            prompts += read_suite(str(name), limit)
        else:
            raise UserError(f"File '{name}' does not exist, and it is none of the suites {', '.join(SUITES)}.")
    return prompts


def read_suite(name: str, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a suite, downloaded once and then read from the cache of `datasets`."""
    suite = SUITES[name]
    place = suite.data_files or suite.path
    try:
        rows = [suite.convert(i, row) for i, row in enumerate(islice(_rows(name, suite), limit))]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"Suite '{name}' ({place}) has other columns than expected ({error}).") from None
    if not rows:
        raise UserError(f"Suite '{name}' ({place}) holds no rows.")
    return [prompt_of(row, f"Suite '{name}', row {i}", name, i) for i, row in enumerate(rows)]


def _rows(name: str, suite: Suite) -> Iterable[Row]:
    try:
        import datasets
        from huggingface_hub import logging
    except ImportError:
        raise UserError(
            f"Suite '{name}' needs the `datasets` library: pip install 'ctc-drafter[suites]', or give a file of "
            'JSON lines {"id","category","turns"} instead.'
        ) from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    hub_logging: Any = logging
    hub_logging.set_verbosity_error()  # the hub's client would print every retry
    place = suite.data_files or suite.path
    try:
        loaded: Any = datasets.load_dataset(suite.path, suite.config, split=suite.split, data_files=suite.data_files)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"Suite '{name}' could not be had from {place} ({reason}); without a network give a file of JSON lines "
            '{"id","category","turns"} instead.'
        ) from None
    rows: Iterable[Row] = loaded
    return rows
