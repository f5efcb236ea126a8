"""Prompt files: JSON lines of `{"id", "category", "turns": [question, follow-up, ...]}`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..jsonl import read_jsonl


@dataclass(frozen=True)
class Prompt:
    """One conversation to measure: its user turns, in order."""

    id: str | int
    category: str
    turns: tuple[str, ...]


def read_prompts(paths: Iterable[str | Path], limit: int | None = None) -> list[Prompt]:
    """Prompts of all files, the first `limit` of each. Raises UserError naming file and line of what is wrong."""
    prompts: list[Prompt] = []
    for path in paths:
        found: list[Prompt] = []
        for line, row in read_jsonl(path):
            if limit is not None and len(found) >= limit:
                break
            found.append(prompt_of(row, f"{path}, line {line}", Path(path).name.split(".")[0], line))
        if not found:
            raise UserError(f"File '{path}' holds no prompts; each line must be an object with a list 'turns'.")
        prompts += found
    return prompts


def demo_prompts(limit: int | None = None) -> list[Prompt]:
    """The prompts of `ctc-drafter demo`, written for it; none is in an evaluation set."""
    with as_file(files("ctc_drafter.bench") / "demo_prompts.jsonl") as path:
        return read_prompts([path], limit)


def prompt_of(row: dict[str, Any], where: str, category: str, name: str | int) -> Prompt:
    """A row checked; `where` names it in errors, `category` and `name` are its defaults."""
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise UserError(f"{where}: 'turns' must be a non-empty list of strings.")
    if not all(turn.strip() for turn in turns):
        raise UserError(f"{where}: a turn is empty; remove the line or fill it in.")
    name, category = row.get("id", name), row.get("category", category)
    if isinstance(name, bool) or not isinstance(name, (str, int)) or not isinstance(category, str):
        raise UserError(f"{where}: 'id' must be a string or a number and 'category' a string.")
    return Prompt(name, category, tuple(turns))
