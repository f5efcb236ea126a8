"""Result files and training histories, read back and checked: what stands in one table must be comparable."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import RESULT_KIND
from ..jsonl import read_json
from ..steps import PHASES
from ..words import counted
from .kinds import ANY, COUNT, NUMBER, REAL, TEXT, Every, Maybe, Shape, flaw

HISTORY_SUFFIX = ".history.json"
NEEDED: dict[str, Shape] = {
    "target": {"name": TEXT, "dtype": TEXT, "device": TEXT, "parameters": COUNT},
    "drafter": {"name": TEXT, "budget": COUNT, "parameters": COUNT},
    "machine": {"cpu": TEXT, "cores": (int, type(None)), "threads": COUNT, "gpu": (str, type(None))},
    "versions": dict.fromkeys(("python", "torch", "transformers", "ctc_drafter", "git_commit"), ANY),
    "arguments": {"prompts": Every(list, TEXT), "max_new_tokens": COUNT, "temperature": Maybe(REAL)},
    "totals": {
        **dict.fromkeys(("prompts", "answers", "looped"), COUNT),
        **dict.fromkeys(("tau", "tokens_per_second", "plain_tokens_per_second", "speedup", "efficiency"), NUMBER),
        **{"acceptance_at": Every(list, REAL), "identical": (int, type(None)), "largest_gap": NUMBER},
        "split": {"draft": NUMBER, "microseconds": {**dict.fromkeys(PHASES, Maybe(REAL)), "step": NUMBER}},
        "categories": Every(dict, {"tau": NUMBER, "speedup": NUMBER}),
        "calibration": Maybe({"bins": Every(list, Every(list, REAL, length=3))}),
    },
    "skipped": Maybe(Every(list, ANY)),
}
"""What the report reads of each part of a result file."""
ROW: Shape = {"id": (str, int), "category": TEXT, "turn": COUNT, "plain_tokens": COUNT}
"""And of each answer."""

ARGUMENTS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "raw", "profile"),
    *("adaptive", "compile", "quantize"),
)
"""The arguments of `bench` that change what is generated or how long a step takes."""


@dataclass
class Entry:
    """One result file: a method (a drafter) with a budget."""

    path: Path
    content: dict[str, Any]
    method: str
    """The drafter's name, with what tells it from others of that name where files are mixed."""

    @property
    def drafter(self) -> str:
        return str(self.content["drafter"]["name"])

    @property
    def budget(self) -> int:
        return int(self.content["drafter"]["budget"])

    @property
    def parameters(self) -> int:
        return int(self.content["drafter"]["parameters"])

    @property
    def totals(self) -> dict[str, Any]:
        totals: dict[str, Any] = self.content["totals"]
        return totals

    @property
    def label(self) -> str:
        return f"{self.method}, budget {self.budget}"

    @property
    def rank(self) -> float:
        """The speedup to sort by; results without one come last."""
        speedup = self.totals["speedup"]
        return -math.inf if speedup is None else float(speedup)


@dataclass
class Training:
    """How a drafter was trained."""

    drafter: str
    history: list[dict[str, float]]
    """One row per checkpoint: step, loss, seconds and held-out figures."""

    @property
    def steps(self) -> int:
        return int(self.history[-1]["step"])

    @property
    def seconds(self) -> float | None:
        """Of the whole run; None if the history does not say."""
        seconds = self.history[-1].get("seconds", math.nan)
        return seconds if math.isfinite(seconds) else None

    def curve(self, *keys: str) -> tuple[list[float], list[float]]:
        """Steps and values of the first of `keys` that the history has; both empty if it has none."""
        for key in keys:
            points = [(row["step"], row[key]) for row in self.history if math.isfinite(row.get(key, math.nan))]
            if points:
                return [x for x, _ in points], [y for _, y in points]
        return [], []


@dataclass
class Comparison:
    """All entries, in the order given, and what is mixed in them."""

    entries: list[Entry]
    mixed: list[str] = field(default_factory=list)
    """Differences that were let through, in words."""

    def methods(self) -> dict[str, list[Entry]]:
        """Entries by method, the fastest method first, each method's budgets in ascending order."""
        names = dict.fromkeys(entry.method for entry in self.entries)
        groups = [sorted((e for e in self.entries if e.method == n), key=lambda e: e.budget) for n in names]
        return {group[0].method: group for group in sorted(groups, key=lambda g: -max(e.rank for e in g))}

    def best(self) -> list[Entry]:
        """The fastest budget of each method, fastest first."""
        return [max(group, key=lambda entry: entry.rank) for group in self.methods().values()]

    def categories(self) -> list[str]:
        """All categories, in the order of the files."""
        return list(dict.fromkeys(name for entry in self.entries for name in entry.totals["categories"]))


def compare_files(paths: Iterable[Path], allow_mixed: bool = False) -> Comparison:
    """Read result files. Raises UserError naming the file that is unreadable, foreign, or not comparable."""
    contents = {path: read_result(path) for path in dict.fromkeys(paths)}
    entries = [Entry(path, content, str(content["drafter"]["name"])) for path, content in contents.items()]
    comparison = Comparison(entries)
    for entry in entries[1:]:
        found = list(differences(entries[0].content, entry.content))
        if found and not allow_mixed:
            raise UserError(
                f"'{entry.path}' cannot be compared with '{entries[0].path}': {'; '.join(found)}; "
                "leave it out or pass --allow-mixed."
            )
        if found:
            comparison.mixed.append(f"`{entry.path.name}` beside `{entries[0].path.name}`: {'; '.join(found)}.")
    _name_methods(entries, allow_mixed)
    return comparison


def _name_methods(entries: Sequence[Entry], allow_mixed: bool) -> None:
    """Name methods so that one name stands for one drafter measured in one way, at each budget once.

    The target and the dtype go into the names if they are mixed, and the file's name where that is not enough.
    """
    for part in ("name", "dtype"):
        if len({entry.content["target"][part] for entry in entries}) > 1:
            for entry in entries:
                entry.method += f" ({entry.content['target'][part]})"
    groups: dict[str, list[list[Entry]]] = {}
    for entry in entries:
        alike = groups.setdefault(entry.method, [])
        for group in alike:
            twin = next((other for other in group if other.budget == entry.budget), None)
            if twin and not allow_mixed:
                raise UserError(
                    f"'{entry.path}' and '{twin.path}' both hold drafter '{entry.drafter}' with budget {entry.budget}; "
                    "leave one out or pass --allow-mixed."
                )
            if not twin and not any(differences(group[0].content, entry.content)):
                group.append(entry)
                break
        else:
            alike.append([entry])
    for alike in groups.values():
        for group in alike[1:]:
            stem = group[0].path.stem
            for entry in group:
                entry.method += f" [{stem}]"


def differences(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """In words, why result `b` should not stand beside result `a`; nothing if it may."""
    for name, fact in (("target", target_text), ("dtype", _dtype), ("machine", machine_text)):
        if fact(a) != fact(b):
            yield f"{name} {fact(b)} instead of {fact(a)}"
    for name in ARGUMENTS:
        mine, theirs = (content["arguments"].get(name) for content in (a, b))
        if (mine or None) != (theirs or None):
            yield f"--{name.replace('_', '-')} {theirs} instead of {mine}"
    plain = [_plain_lengths(content) for content in (a, b)]
    if plain[0].keys() != plain[1].keys():
        same_size = len(plain[0]) == len(plain[1])
        whole = "" if b.get("complete") else " (interrupted)"
        yield "other prompts" if same_size else f"{prompts_text(b)}{whole} instead of {prompts_text(a)}"
    elif target_text(a) == target_text(b) and _dtype(a) == _dtype(b) and _greedy(a) and plain[0] != plain[1]:
        yield "other plain answers, so another target of the same name or another state of the machine"


def target_text(content: dict[str, Any]) -> str:
    """Name and size of the target."""
    return f"{content['target']['name']} ({content['target']['parameters'] / 1e6:,.1f} M parameters)"


def machine_text(content: dict[str, Any]) -> str:
    """The device that ran the target."""
    machine, device = content["machine"], str(content["target"]["device"])
    if machine["gpu"] and device.startswith("cuda"):
        return f"{machine['gpu']} (host {machine['cpu']})"
    return f"{machine['cpu']}, {counted(machine['cores'], 'core')}, {counted(machine['threads'], 'thread')}"


def prompts_text(content: dict[str, Any]) -> str:
    """How many prompts were asked and answers given."""
    totals = content["totals"]
    return f"{counted(totals['prompts'], 'prompt')}, {counted(totals['answers'], 'answer')}"


def _dtype(content: dict[str, Any]) -> str:
    return str(content["target"]["dtype"])


def _greedy(content: dict[str, Any]) -> bool:
    return not content["arguments"].get("temperature")


def _plain_lengths(content: dict[str, Any]) -> dict[tuple[Any, ...], int]:
    """Answers by prompt and turn, each with the length of its plain twin."""
    return {(row["category"], row["id"], row["turn"]): row["plain_tokens"] for row in content["rows"]}


# ---------------------------------------------------------------- reading


def read_result(path: Path) -> dict[str, Any]:
    """One result file of `bench`. Raises UserError if it is anything else."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != RESULT_KIND:
        raise UserError(f"'{path}' is not a result file of `ctc-drafter bench`.")
    wrong = flaw(content, NEEDED, "")
    if wrong is None and (not content.get("rows") or flaw(content["rows"], Every(list, ROW), "rows")):
        wrong = "its 'rows' are not the answers of a run"
    if wrong is not None:
        raise UserError(f"'{path}' is damaged or of another version: {wrong}.")
    return content


def read_history(path: Path) -> Training:
    """A `<drafter>.history.json` that `train` writes beside a drafter."""
    if not path.name.endswith(HISTORY_SUFFIX):
        raise UserError(f"'{path}' is not named <drafter>{HISTORY_SUFFIX}, so it cannot be told whose history it is.")
    return Training(path.name.removesuffix(HISTORY_SUFFIX), _history(read_json(path), path))


def read_drafter_folder(folder: Path) -> Training:
    """The training that a drafter's own `config.json` tells of."""
    path = folder / "config.json"
    content = read_json(path)
    training = content.get("training") if isinstance(content, dict) else None
    if not isinstance(training, dict):
        raise UserError(f"'{path}' tells nothing of a training; leave the folder out.")
    return Training(folder.resolve().name, _history(training.get("history"), path))


def _history(rows: Any, path: Path) -> list[dict[str, float]]:
    try:
        history = [{key: float(value) for key, value in row.items() if value is not None} for row in rows]
        if history and all("loss" in row and math.isfinite(row["step"]) for row in history):
            return history
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        pass  # it is something else
    raise UserError(f"'{path}' holds no training history, a list of rows with numbers, 'step' and 'loss' among them.")
