"""The `report` command: result files and training histories become one Markdown file with figures."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_text
from ..steps import PHASES
from ..words import counted, duration, number, percent, size
from .compare import (
    Comparison,
    Entry,
    Training,
    compare_files,
    machine_text,
    prompts_text,
    read_drafter_folder,
    read_history,
    target_text,
)
from .plots import check_plots, draw_all
from .results import check_output
from .sheets import FORMATS, Picture

REPORT = "report.md"


def run_report(
    results: Sequence[Path],
    *,
    histories: Sequence[Path] = (),
    drafter_folders: Sequence[Path] = (),
    output: Path,
    figures: bool = True,
    format: str = "png",
    allow_mixed: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write `report.md` and its figures into the folder `output`; returns the file. All input is checked first."""
    if format not in FORMATS:
        raise UserError(f"There is no figure format '{format}'; choose {' or '.join(FORMATS)}.")
    comparison = compare_files(results, allow_mixed)
    read = [*map(read_drafter_folder, drafter_folders), *map(read_history, histories)]
    trainings = list({training.drafter: training for training in read}.values())  # a history wins over the folder
    if figures:
        check_plots()
    path = output / REPORT
    if output.exists() and not output.is_dir():
        raise UserError(f"'{output}' is a file; choose a folder for the report.")
    check_output(path, overwrite)
    pictures = draw_all(comparison, trainings, output, format) if figures else []
    write_text(path, "\n".join(report_lines(comparison, trainings, pictures)) + "\n")
    return path


def report_lines(
    comparison: Comparison, trainings: Sequence[Training], pictures: Sequence[Picture] = ()
) -> Iterator[str]:
    """The report, line by line."""
    names = dict.fromkeys(target_text(entry.content) for entry in comparison.entries)
    yield f"# Speculative decoding of {', '.join(names)}"
    yield ""
    yield from facts(comparison)
    if comparison.mixed:
        yield from ["", "**Mixed files: these numbers were not measured alike.**", ""]
        yield from (f"- {sentence}" for sentence in comparison.mixed)
    yield from ["", "## Methods", ""]
    yield from methods_table(comparison, trainings)
    yield ""
    yield from remarks(comparison)
    drafters = {entry.drafter for entry in comparison.entries}
    strangers = [f"`{training.drafter}`" for training in trainings if training.drafter not in drafters]
    if strangers:
        yield f"- Trained, but in none of the result files: {', '.join(strangers)}."
    for picture in pictures:
        yield from ["", f"## {picture.title}", "", f"![{picture.title}]({picture.path.name})", "", picture.caption]
    yield from ["", "## In numbers", "", "Each method at its fastest budget.", ""]
    yield from category_table(comparison)
    yield from acceptance_table(comparison)
    yield from time_table(comparison)
    yield from ["## Result files", ""]
    for entry in comparison.entries:
        date = entry.content.get("date", "undated")
        yield f"- `{entry.path.name}` ({entry.label}; {date}): `{entry.content.get('command', 'command unknown')}`"


# ---------------------------------------------------------------- the head


def facts(comparison: Comparison) -> Iterator[str]:
    """What made the report and what the numbers were measured on; where files differ, all that occurs."""

    def every(values: Iterable[Any]) -> str:
        return "; ".join(dict.fromkeys(str(value) for value in values))

    contents = [entry.content for entry in comparison.entries]
    yield f"- Command: `{shlex.join(['ctc-drafter', *sys.argv[1:]])}`"
    yield f"- Machine: {every(map(machine_text, contents))}"
    names = {"python": "Python", "torch": "torch", "transformers": "transformers", "ctc_drafter": "ctc-drafter"}
    versions = (f"{names[part]} {every(content['versions'][part] for content in contents)}" for part in names)
    yield f"- Versions: {', '.join(versions)}"
    yield f"- Git commit: {every(content['versions']['git_commit'] or 'not a checkout' for content in contents)}"
    yield f"- Target: {every(map(target_text, contents))}, {every(content['target']['dtype'] for content in contents)}"
    files = every(os.path.basename(name) for content in contents for name in content["arguments"]["prompts"])
    yield f"- Prompts: {files} ({every(map(prompts_text, contents))})"
    tokens = every(content["arguments"]["max_new_tokens"] for content in contents)
    yield f"- Decoding: {every(map(_sampling, contents))}, at most {tokens} new tokens"


def _sampling(content: dict[str, Any]) -> str:
    temperature = content["arguments"].get("temperature")
    how = f"sampled at temperature {temperature:g}" if temperature else "greedy"
    return f"{how}, drafting as far as it pays" if content["arguments"].get("adaptive") else how


# ---------------------------------------------------------------- methods


def methods_table(comparison: Comparison, trainings: Sequence[Training]) -> Iterator[str]:
    """All methods and budgets, the fastest method first, its fastest budget in bold."""
    trained = {training.drafter: training for training in trainings}
    header = ["method", "budget", "parameters", "tau", "speedup", "efficiency", "tokens/s", "plain tokens/s"]
    header += ["draft share", "identical", "looped", *(["training steps", "training time"] if trained else [])]
    best, rows = comparison.best(), []
    for group in comparison.methods().values():
        for entry in group:
            row = _method_cells(entry)
            if any(entry is other for other in best):
                row = [f"**{cell}**" if i in (1, 4) else cell for i, cell in enumerate(row)]
            if trained:
                training = trained.get(entry.drafter)
                row += [f"{training.steps:,}", duration(training.seconds)] if training else ["-", "-"]
            rows.append(row)
    yield from table(header, rows)
    yield "Bold: the fastest budget of each method. Draft share: the drafter's part of a verification step's time."
    yield "Speedup: tokens per second over those of plain decoding in the same run. Tau: tokens per target pass."


def _method_cells(entry: Entry) -> list[str]:
    t = entry.totals
    same = "-" if t["identical"] is None else f"{t['identical']} of {t['answers']}"
    return [
        *(f"`{entry.method}`", str(entry.budget), size(entry.parameters)),
        *(number(t[key]) for key in ("tau", "speedup", "efficiency")),
        *(number(t[key], 1) for key in ("tokens_per_second", "plain_tokens_per_second")),
        *(percent(t["split"]["draft"], 1), same, str(t["looped"])),
    ]


def remarks(comparison: Comparison) -> Iterator[str]:
    """In words: who is fastest, and all that speaks against a number in the table."""
    fastest = comparison.best()[0]
    if fastest.rank > 1:
        yield (
            f"- Fastest: `{fastest.method}` with budget {fastest.budget}, {number(fastest.totals['speedup'])} times "
            f"the speed of plain decoding at {number(fastest.totals['tau'])} tokens per target pass."
        )
    else:
        yield "- **No method is faster than plain decoding.**"
    entries = [entry for group in comparison.methods().values() for entry in group]
    flaws = [list(_flaws(entry)) for entry in entries]
    shared = [flaw for flaw in flaws[0] if len(entries) > 1 and all(flaw in others for others in flaws)]
    if shared:
        yield f"- All: {'; '.join(shared)}."
    for entry, found in zip(entries, flaws):
        if own := "; ".join(flaw for flaw in found if flaw not in shared):
            yield f"- `{entry.method}`, budget {entry.budget}: {own}."
    on_gpu = [e.content["arguments"] for e in entries if str(e.content["target"]["device"]).startswith("cuda")]
    if not all(arguments.get("profile") for arguments in on_gpu):
        yield "- On a GPU the phases of a step are told apart only with `bench --profile`; here some were not."


def _flaws(entry: Entry) -> Iterator[str]:
    t, content = entry.totals, entry.content
    if t["speedup"] is not None and t["speedup"] < 1:
        yield f"**slower than plain decoding** ({number(t['speedup'], 3)} times its speed)"
    if t["identical"] is None:
        yield "sampled answers, which cannot be compared with plain ones token by token"
    elif t["identical"] < t["answers"]:
        gap = "" if t["largest_gap"] is None else f", by at most {number(t['largest_gap'], 4)} nat where they first do"
        differing = t["answers"] - t["identical"]
        yield f"**not identical to plain decoding**: {differing} of {t['answers']} answers differ{gap}"
    if t["looped"]:
        yield f"{t['looped']} of {t['answers']} answers end in a repeating loop, which flatters tau"
    if content.get("skipped"):
        yield f"{counted(len(content['skipped']), 'turn')} left out for lack of room in the context"
    if not content.get("complete"):
        yield "**the run was interrupted**; the numbers cover the answers finished until then"


# ---------------------------------------------------------------- further tables


def category_table(comparison: Comparison) -> Iterator[str]:
    """Tau and speedup of each method in each category."""
    best = comparison.best()
    rows = []
    for name in comparison.categories():
        cells = [entry.totals["categories"].get(name) for entry in best]
        rows.append([name, *("-" if c is None else f"{number(c['tau'])} / {number(c['speedup'])}" for c in cells)])
    yield from table(["tau / speedup", *(f"`{entry.method}`" for entry in best)], rows)


def acceptance_table(comparison: Comparison) -> Iterator[str]:
    """The share of steps that accepted their k-th draft token."""
    best = comparison.best()
    longest = max(len(entry.totals["acceptance_at"]) for entry in best)
    rows = []
    for entry in best:
        rates = [*entry.totals["acceptance_at"], *[None] * longest][:longest]
        rows.append([f"`{entry.method}`", *(percent(rate, 1) for rate in rates)])
    yield from table(["acceptance rate at k =", *map(str, range(1, longest + 1))], rows)


def time_table(comparison: Comparison) -> Iterator[str]:
    """Microseconds of a step, by phase."""
    rows = []
    for entry in comparison.best():
        micro = entry.totals["split"]["microseconds"]
        rows.append([f"`{entry.method}`", *(number(micro.get(phase), 0) for phase in (*PHASES, "step"))])
    yield from table(["microseconds per step", *PHASES, "all"], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table, names to the left and numbers to the right, and an empty line."""
    yield f"| {' | '.join(header)} |"
    yield f"| --- |{' ---: |' * (len(header) - 1)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
    yield ""
