"""The commands that run a drafter, and tell how it did: demo, generate, bench, report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .options import (
    BUDGET,
    Adaptive,
    Budget,
    Compile,
    DrafterName,
    Drawing,
    Limit,
    Loading,
    MaxNewTokens,
    MemoryLimit,
    Quantize,
    Raw,
    Stop,
    TargetName,
    bytes_of,
    command,
    load_drafter,
    load_target,
)

Prompts = Annotated[
    list[Path],
    typer.Option(
        "--prompts",
        help='JSONL of {"id","category","turns"}, or mt-bench, gsm8k, humaneval, spec-bench; may be repeated.',
    ),
]
SkipTooLong = Annotated[bool, typer.Option("--skip-too-long", help="Leave out prompts beyond the context.")]


@command
def demo(
    target: TargetName = None,
    drafter: DrafterName = None,
    max_new_tokens: MaxNewTokens = 128,
    budget: Budget = BUDGET,
    limit: Limit = None,
    live: Annotated[
        bool, typer.Option("--live/--no-live", help="Stream both runs, or print each when finished.")
    ] = True,
    svg: Annotated[Path | None, typer.Option("--svg", help="Save a picture of the last screen.")] = None,
    *,
    how: Loading,
) -> None:
    """Watch one model answer twice: plain and drafted.

    Ends with exit code 1 if an answer differs in float32.
    """
    from ..bench.demo import run_demo
    from ..bench.prompts import demo_prompts
    from ..bench.report import report_console

    loaded = load_target(target, how)
    console = report_console()
    same = run_demo(
        loaded,
        load_drafter(drafter, loaded),
        demo_prompts(limit),
        console,
        max_new_tokens=max_new_tokens,
        budget=budget,
        live=live and console.is_terminal,
        svg=svg,
    )
    if not same and str(loaded.dtype) == "torch.float32":
        raise typer.Exit(1)


@command
def generate(
    prompt: Annotated[str, typer.Argument(help="The question, or - to read it from standard input.")],
    target: TargetName = None,
    drafter: DrafterName = None,
    max_new_tokens: MaxNewTokens = 256,
    budget: Budget = BUDGET,
    *,
    drawing: Drawing,
    stop: Stop = None,
    raw: Raw = False,
    adaptive: Adaptive = False,
    stats: Annotated[bool, typer.Option("--stats/--no-stats", help="Print speed and tau on standard error.")] = True,
    compile: Compile = False,
    memory_limit: MemoryLimit = None,
    quantize: Quantize = None,
    how: Loading,
) -> None:
    """Stream the answer to one prompt."""
    sampling = drawing.sampling()
    text = _read_stdin() if prompt == "-" else prompt
    if not text.strip():
        raise UserError("The prompt is empty; give some text, or - to read it from standard input.")
    from ..bench.measure import Answer, encode, timed
    from ..decoding import generate as steps_of
    from ..drafters import compile_passes
    from ..pace import Pace
    from ..streaming import TextStream
    from ..words import number

    limit = bytes_of(memory_limit)
    loaded = load_target(target, how, quantize)
    chosen = load_drafter(drafter, loaded)
    if compile:
        taken = compile_passes(loaded, chosen, budget, adaptive=adaptive)
        print(f"compiled in {number(taken, 1)} s", file=sys.stderr)
    ids = encode(loaded, [{"role": "user", "content": text}], raw)
    answer, stream = Answer(), TextStream(loaded.tokenizer)
    steps = steps_of(
        loaded,
        chosen,
        ids,
        max_new_tokens=max_new_tokens,
        budget=budget,
        sampling=sampling,
        stop=stop or (),
        on_read=_reading(len(ids)),
        memory_limit=limit,
        pace=Pace.up_to(budget, compiled=compile) if adaptive else None,
    )
    for step in timed(steps, answer, loaded):
        _write(stream.push(step.tokens))
    _write(stream.finish() + "\n")
    if stats:
        tau = "" if chosen.name == "none" else f", tau {number(answer.tau)} in {len(answer.accepted)} steps"
        rate = number(answer.tokens_per_second, 1)
        print(f"{len(answer.tokens)} tokens in {answer.seconds:.2f} s, {rate} tokens/s{tau}", file=sys.stderr)


@command
def bench(
    prompts: Prompts,
    json: Annotated[
        Path | None, typer.Option("--json", help="Result file; one per drafter and budget if several.")
    ] = None,
    target: TargetName = None,
    drafter: Annotated[list[str] | None, typer.Option("--drafter", help="As for generate; may be repeated.")] = None,
    budget: Annotated[
        list[int] | None, typer.Option("--budget", min=1, help="Draft nodes per step; may be repeated.")
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    limit: Limit = None,
    *,
    drawing: Drawing,
    stop: Stop = None,
    raw: Raw = False,
    skip_too_long: SkipTooLong = False,
    profile: Annotated[bool, typer.Option("--profile", help="On a GPU: true time split, slower steps.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing result files.")] = False,
    adaptive: Adaptive = False,
    compile: Compile = False,
    quantize: Quantize = None,
    how: Loading,
) -> None:
    """Measure drafters against plain decoding on prompts.

    The runs alternate prompt by prompt, in one process.
    --drafter and --budget may be repeated: every drafter is measured with every budget, in one run.
    """
    arguments = dict(locals())
    arguments |= asdict(arguments.pop("drawing")) | asdict(arguments.pop("how"))
    sampling = drawing.sampling()
    from ..bench.command import run_bench

    run_bench(
        lambda: load_target(target, how, quantize),
        prompts,
        drafters=drafter or [],
        budgets=budget or [BUDGET],
        output=json,
        overwrite=overwrite,
        limit=limit,
        adaptive=adaptive,
        compile=compile,
        arguments={k: _plain(v) for k, v in arguments.items()},
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop or (),
        raw=raw,
        skip_too_long=skip_too_long,
        profile=profile,
    )


@command
def report(
    results: Annotated[list[Path], typer.Argument(help="Result files of `bench`.", metavar="RESULT.json")],
    output: Annotated[Path, typer.Option("--output", help="Folder for report.md and the figures.")],
    history: Annotated[
        list[Path] | None, typer.Option("--history", help="<drafter>.history.json of `train`; may be repeated.")
    ] = None,
    drafter_folder: Annotated[
        list[Path] | None, typer.Option("--drafter-folder", help="Drafter whose training to tell; may be repeated.")
    ] = None,
    figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Draw them, or write text alone.")] = True,
    format: Annotated[str, typer.Option("--format", help="Of the figures: png or svg.")] = "png",
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Put files side by side that were not measured alike, and say so.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
) -> None:
    """Turn result files into a Markdown page with figures."""
    from ..bench.markdown import run_report

    path = run_report(
        results,
        histories=history or [],
        drafter_folders=drafter_folder or [],
        output=output,
        figures=figures,
        format=format,
        allow_mixed=allow_mixed,
        overwrite=overwrite,
    )
    print(f"Report: {path}")


def _reading(count: int) -> Callable[[int], None] | None:
    """Tells in a terminal how much of a prompt of `count` tokens is read, if that takes more than a pass."""
    from ..target import CHUNK

    if count <= CHUNK or not sys.stderr.isatty():
        return None

    def tell(read: int) -> None:
        end = "\r" + " " * 40 + "\r" if read == count else "\r"
        print(f"\rreading {read} of {count} tokens", end=end, file=sys.stderr, flush=True)

    return tell


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise UserError("Standard input is not UTF-8 text; convert it first.") from None


def _write(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _plain(value: Any) -> Any:
    """An argument as JSON holds it."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
