"""The live view: one model answers the same prompts plainly and drafted, side by side, on the model's own clock."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..acceptance import Sampling
from ..decoding import generate
from ..drafters import Drafter, load_drafter
from ..files import write_text
from ..streaming import TextStream
from ..target import Target
from ..words import number
from .measure import WARM_UP_TOKENS, Answer, Row, compare, encode, timed, totals
from .prompts import Prompt

DRAFTED = "black on green"
FRAME = 1 / 15  # seconds between two pictures


@dataclass
class Stream:
    """One run of the target on a prompt, advanced step by step; its clock is the model's time alone."""

    target: Target
    drafter: Drafter
    ids: list[int]
    options: dict[str, Any]
    answer: Answer = field(default_factory=Answer)
    text: Text = field(default_factory=Text)

    def __post_init__(self) -> None:
        steps = generate(self.target, self.drafter, self.ids, **self.options)
        self._steps = timed(steps, self.answer, self.target)
        self._detokenizer = TextStream(self.target.tokenizer)

    @property
    def done(self) -> bool:
        return self.answer.finish is not None

    def advance(self) -> None:
        """Run one step of the model and append its text, the draft's tokens coloured."""
        step = next(self._steps)
        for i, token in enumerate(step.tokens):
            style = DRAFTED if i < step.accepted else ""
            self.text.append(self._detokenizer.push([token]), style)
        if self.done:
            self.text.append(self._detokenizer.finish())


def run_demo(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Prompt],
    console: Console,
    *,
    max_new_tokens: int = 128,
    budget: int = 8,
    live: bool = True,
    svg: Path | None = None,
) -> bool:
    """Answer all prompts greedily and show that; returns whether every drafted answer equals its plain twin.

    The run whose clock is behind goes next, so both columns show the same moment; pictures are drawn between steps,
    off the clock. Without `live` each prompt is printed once, when finished.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "budget": budget}
    header = _header(target, drafter, budget)
    console.print(header)
    rows: list[Row] = []
    picture: list[RenderableType] = [header]
    for i, prompt in enumerate(prompts):
        ids = encode(target, [{"role": "user", "content": prompt.turns[0]}])
        streams = [
            Stream(target, load_drafter("none", target), ids, {**options, "budget": 0}),
            Stream(target, drafter, ids, options),
        ]
        if not rows:
            _warm_up(streams)
        _race(prompt, streams, console, live, first=i % 2)
        row = {"id": prompt.id, "category": prompt.category}
        row |= compare(target, ids, streams[1].answer, streams[0].answer, Sampling())
        rows.append(row)
        view = _view(prompt, streams, row)
        console.print(view)
        if len(picture) < 4:
            picture.append(view)
    summary, closing = _summary(rows), _closing(rows)
    console.print(summary)
    console.print(closing)
    if svg is not None:
        _save_svg([*picture, summary, closing], svg)
        console.print(Text(f"Picture of the last screen: {svg}"), soft_wrap=True)
    return all(row["identical"] for row in rows)


def _warm_up(streams: Sequence[Stream]) -> None:
    for stream in streams:
        twin = Stream(stream.target, stream.drafter, stream.ids, {**stream.options, "max_new_tokens": WARM_UP_TOKENS})
        while not twin.done:
            twin.advance()


def _race(prompt: Prompt, streams: Sequence[Stream], console: Console, live: bool, first: int) -> None:
    """Advance both streams to their ends, the one whose model clock is behind first (ties: number `first`)."""
    order = [streams[first], streams[1 - first]]
    if not live:
        while pending := [s for s in order if not s.done]:
            min(pending, key=lambda s: s.answer.seconds).advance()
        return
    with Live(_view(prompt, streams), console=console, auto_refresh=False, transient=True) as screen:
        shown = time.perf_counter()
        while pending := [s for s in order if not s.done]:
            min(pending, key=lambda s: s.answer.seconds).advance()
            if time.perf_counter() - shown > FRAME:
                screen.update(_view(prompt, streams), refresh=True)
                shown = time.perf_counter()


# ---------------------------------------------------------------- pictures


def _header(target: Target, drafter: Drafter, budget: int) -> RenderableType:
    size, kind = target.num_parameters / 1e6, str(target.dtype).removeprefix("torch.")
    text = Text.assemble(
        ("ctc-drafter", "bold"),
        f"  target {target.name} ({size:.1f} M parameters, {kind}, {target.device}), "
        f"drafter {drafter.name} ({drafter.num_parameters / 1e6:.1f} M, budget {budget})\n",
        (" drafted and accepted ", DRAFTED),
        "  the other tokens are the target's own; both columns are the same model and should read the same",
    )
    return Group(text, Text())


def _view(prompt: Prompt, streams: Sequence[Stream], row: Row | None = None) -> RenderableType:
    question = Text.assemble(("> ", "bold cyan"), (" ".join(prompt.turns[0].split()), "cyan"))
    grid = Table.grid(expand=True, padding=0)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(*(_panel(name, stream) for name, stream in zip(("plain", "drafted"), streams)))
    parts: list[RenderableType] = [question, grid]
    if row is not None:
        verdict = _identical(row)
        faster = totals([row])["speedup"]
        parts.append(Text.assemble(f"  speedup {number(faster)}   identical: ", verdict, "\n"))
    return Group(*parts)


def _panel(name: str, stream: Stream) -> Panel:
    answer = stream.answer
    tau = "" if name == "plain" else f", tau {number(answer.tau)}"
    return Panel(
        stream.text,
        title=f"{name}: {number(answer.tokens_per_second, 0)} tokens/s{tau}",
        title_align="left",
        subtitle=f"{len(answer.tokens)} tokens in {number(answer.seconds)} s",
        subtitle_align="right",
        box=box.ROUNDED,
        border_style="green" if stream.done else "dim",
    )


def _identical(row: Row) -> tuple[str, str]:
    if row["identical"]:
        return "yes", "bold green"
    return f"no (first difference: {number(row['gap'], 4)} nat)", "bold red"


def _summary(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(("prompt", "tokens", "plain tokens/s", "drafted tokens/s", "speedup", "tau", "identical")):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*_summary_line(str(row["id"]), [row]), Text(*_identical(row)))
    table.add_section()
    same = sum(row["identical"] for row in rows)
    table.add_row(*_summary_line("all", rows), f"{same} of {len(rows)}", style="bold")
    return table


def _summary_line(name: str, rows: Sequence[Row]) -> list[str | Text]:
    t = totals(rows)
    rates = (number(t[key], 0) for key in ("plain_tokens_per_second", "tokens_per_second"))
    return [Text(name), str(t["tokens"]), *rates, number(t["speedup"]), number(t["tau"])]


def _closing(rows: Sequence[Row]) -> Text:
    t = totals(rows)
    speed = f"{number(t['speedup'])} times the speed of plain decoding"
    if t["identical"] == t["answers"]:
        every = "The answer is" if t["answers"] == 1 else f"All {t['answers']} answers are"
        return Text(f"{every} identical to plain decoding, at {speed}.", style="bold green")
    return Text(
        f"{t['answers'] - t['identical']} of {t['answers']} answers differ from plain decoding.", style="bold red"
    )


def _save_svg(parts: Sequence[RenderableType], path: Path) -> None:
    console = Console(record=True, width=132, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(*parts, sep="")
    write_text(path, console.export_svg(title="ctc-drafter demo"))
