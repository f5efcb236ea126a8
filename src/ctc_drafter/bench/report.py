"""Results as tables for the terminal.

Names of drafters and categories are the user's own, so all text is given to rich as such: it is no markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..steps import PHASES
from ..words import counted, number, percent, size
from .measure import Result


def report_console() -> Console:
    """A console on standard output, wide enough for the tables when that is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=110)


def share(part: int | None, whole: int) -> Text:
    """`n of m`, green when all; a dash for sampled answers, which cannot be compared token by token."""
    if part is None:
        return Text("-")
    return Text(f"{part} of {whole}", "green" if part == whole else "red")


def print_report(console: Console, results: Sequence[Result]) -> None:
    """Totals, categories, acceptance and time split of every contender; what was left out is said."""
    if not any(result.rows for result in results):
        console.print("No answer was finished.")
        return
    console.print(totals_table(results))
    for result in results:
        if len(result.totals["categories"]) > 1:
            console.print(category_table(result))
    console.print(acceptance_table(results))
    console.print(split_table(results))
    console.print(f"Peak memory of the process: {number(results[0].totals['peak_memory_mb'], 0)} MB.")
    for result in results:
        label, totals = _label(result), result.totals
        if line := calibration_line(result):
            console.print(Text(line))
        if totals["identical"] is not None and totals["identical"] < totals["answers"]:
            differing = totals["answers"] - totals["identical"]
            gap = number(totals["largest_gap"], 4)
            line = (
                f"{label}: {differing} answers differ from plain decoding; the largest gap between the two tokens at a "
                f"first difference is {gap} nat."
            )
            console.print(Text(line))
        if totals["looped"]:
            line = f"{label}: {totals['looped']} of {totals['answers']} answers end in a loop, which flatters tau."
            console.print(Text(line))
    if results[0].skipped:
        console.print(f"{counted(len(results[0].skipped), 'turn')} left out for lack of room in the context.")
    if not results[0].complete:
        console.print(Text("Interrupted: the numbers cover the answers finished so far.", "yellow"))


def totals_table(results: Sequence[Result]) -> Table:
    """One line per contender, in the order given; the draft share is that of a step's time."""
    columns = ("budget", "params", "tau", "tokens/s", "plain", "speedup", "efficiency", "identical", "looped")
    table = _table("drafter", *columns, "draft share")
    for result in results:
        first = [result.name, str(result.budget), size(result.parameters)]
        _add(table, *_line(first, result.totals), percent(result.totals["split"]["draft"]))
    return table


def category_table(result: Result) -> Table:
    """One line per category of one contender."""
    table = _table(
        _label(result), "answers", "tau", "tokens/s", "plain", "speedup", "efficiency", "identical", "looped"
    )
    for name, totals in result.totals["categories"].items():
        _add(table, *_line([name, str(totals["answers"])], totals))
    return table


def acceptance_table(results: Sequence[Result]) -> Table:
    """Share of steps that accepted the k-th draft token."""
    longest = max(len(result.totals["acceptance_at"]) for result in results)
    shown = min(longest, 8)
    table = _table("acceptance at", *(str(k) for k in range(1, shown + 1)))
    for result in results:
        rates = result.totals["acceptance_at"][:shown]
        _add(table, _label(result), *(percent(rate, 1) for rate in rates), *["-"] * (shown - len(rates)))
    return table


def calibration_line(result: Result) -> str | None:
    """What the drafter expected to be accepted beside what was; None if it says no probabilities."""
    known = result.totals["calibration"]
    if known is None:
        return None
    return (
        f"{_label(result)}: {known['accepted']:.2f} draft tokens accepted a step, "
        f"{known['expected']:.2f} expected ({known['steps']:,} steps)."
    )


def split_table(results: Sequence[Result]) -> Table:
    """Where a verification step's time goes."""
    table = _table("time of a step", *PHASES, "microseconds")
    for result in results:
        split = result.totals["split"]
        shares = (percent(split[part], 1) for part in PHASES)
        _add(table, _label(result), *shares, number(split["microseconds"]["step"], 0))
    return table


def _line(first: list[str], totals: dict[str, Any]) -> list[str | Text]:
    return [
        *first,
        number(totals["tau"]),
        number(totals["tokens_per_second"], 1),
        number(totals["plain_tokens_per_second"], 1),
        number(totals["speedup"]),
        number(totals["efficiency"]),
        share(totals["identical"], totals["answers"]),
        str(totals["looped"]),
    ]


def _label(result: Result) -> str:
    return f"{result.name}, budget {result.budget}"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i == 0 else "right")
    return table


def _add(table: Table, *cells: str | Text) -> None:
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
