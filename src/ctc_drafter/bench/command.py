"""The `bench` command: check everything first, measure with a progress bar, report, write the result files."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..drafters import DEFAULT, compile_passes, load_drafter
from ..errors import UserError
from ..pace import Pace
from ..target import Target
from ..words import number
from .measure import Contender, Result, Row, measure, totals
from .report import print_report, report_console
from .results import check_output, document, write_json
from .suites import load_prompts

LOG_SECONDS = 60


def run_bench(
    load_target: Callable[[], Target],
    prompt_files: Sequence[Path],
    *,
    drafters: Sequence[str],
    budgets: Sequence[int],
    output: Path | None,
    overwrite: bool,
    limit: int | None,
    arguments: dict[str, Any],
    adaptive: bool = False,
    compile: bool = False,
    **options: Any,
) -> None:
    """Measure each drafter with each budget; `options` go to `measure`. Raises KeyboardInterrupt again at the end.

    drafters: none is the default one, whatever folders are here.
    adaptive: let each draft as much as it finds to be fastest, up to the budget; it learns over all the prompts.
    compile: run plain and drafted passes as compiled graphs; the seconds that this takes are printed, and not counted.
    """
    names = list(dict.fromkeys(drafters)) or [DEFAULT]
    pairs = [(name, budget) for name in names for budget in dict.fromkeys(budgets)]
    outputs = output_files(output, pairs)
    for path in outputs:
        check_output(path, overwrite)
    prompts = load_prompts(prompt_files, limit)
    target = load_target()
    loaded = {name: load_drafter(name if drafters else None, target) for name in names}
    contenders = [
        Contender(
            loaded[name].name,
            loaded[name],
            budget,
            Pace.up_to(budget, compiled=compile) if adaptive else None,
        )
        for name, budget in pairs
    ]
    about: dict[str, Any] = {
        "name": target.name,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
    }
    for drafter in loaded.values():
        drafter.compile_search()
    if compile:
        about["compile_seconds"] = _compile(target, contenders, adaptive)
    with _Watch(contenders, sum(len(prompt.turns) for prompt in prompts)) as watch:
        results = measure(target, contenders, prompts, on_row=watch.on_row, on_skip=watch.on_skip, **options)
    about["parameters"] = target.num_parameters
    written: list[Path] = []
    for path, result in zip(outputs, results):
        if result.rows:
            write_json(path, document(result, about, arguments))
            written.append(path)
    # The files first: what is measured must not be lost to a reader that closes the pipe.
    print_report(report_console(), results)
    for path in written:
        print(f"Result: {path}")
    if not all(result.complete for result in results):
        raise KeyboardInterrupt


def _compile(target: Target, contenders: Sequence[Contender], adaptive: bool) -> float:
    """Compile the passes of each; the seconds that it took."""
    taken = sum(compile_passes(target, c.drafter, c.budget, adaptive=adaptive) for c in contenders)
    print(f"compiled in {number(taken, 1)} s", file=sys.stderr)
    return round(taken, 1)


class _Watch:
    """A progress bar with the running tau and speedup; in a log file instead a line now and then."""

    def __init__(self, contenders: Sequence[Contender], turns: int) -> None:
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=self._console, disable=not self._console.is_terminal
        )
        self._total = turns * len(contenders)
        self._task = self._bar.add_task("warming up", total=self._total)
        self._done = 0
        self._said = -math.inf

    def __enter__(self) -> _Watch:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_row(self, result: Result, row: Row) -> None:
        """Count one row."""
        t = totals(result.rows)
        text = f"{result.name}, budget {result.budget}: tau {number(t['tau'])}, speedup {number(t['speedup'])}"
        self._done += 1
        self._bar.update(self._task, advance=1, description=text)
        if not self._console.is_terminal and time.monotonic() - self._said > LOG_SECONDS:
            self._said = time.monotonic()
            print(f"{self._done}/{self._total}  {text}", file=sys.stderr, flush=True)

    def on_skip(self, answers: int) -> None:
        """Count answers that are left out."""
        self._done += answers
        self._bar.update(self._task, advance=answers)


def output_files(output: Path | None, pairs: Sequence[tuple[str, int]]) -> list[Path]:
    """One result file per (drafter, budget): `output` itself, or with `-<drafter>-<budget>` before its suffix."""
    if output is None:
        return []
    if output.suffix != ".json":
        raise UserError(f"'{output}' must end in .json.")
    if len(pairs) == 1:
        return [output]
    labels = [f"{re.sub(r'[^A-Za-z0-9_.]+', '-', Path(name).name)}-{budget}" for name, budget in pairs]
    if len(set(labels)) < len(labels):
        raise UserError(
            "Two of the drafters have the same folder name, so their result files would collide; rename one."
        )
    return [output.with_name(f"{output.stem}-{label}.json") for label in labels]
