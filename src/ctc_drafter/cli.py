"""The command line. Each command is a thin call into a module below, imported only when it runs."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import __version__
from .errors import UserError

if TYPE_CHECKING:
    from .acceptance import Sampling
    from .target import Target

app = typer.Typer(
    name="ctc-drafter",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BUDGET = 8


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command: a UserError is one sentence and exit code 2, Ctrl-C is exit code 130."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except UserError as error:
            _fail(str(error), 2)
        except KeyboardInterrupt:
            _fail("Interrupted.", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has seen enough
            sys.exit(141)
        except OSError as error:
            place = f"'{error.filename}'" if error.filename else "A file"
            _fail(f"{place} could not be read or written ({error.strerror or error}); what was finished is kept.", 2)

    return app.command()(guarded)


TargetName = Annotated[
    str | None, typer.Option("--target", help="Model folder or hub name. Default: the embedded target.")
]
DrafterName = Annotated[
    str | None,
    typer.Option("--drafter", help="Drafter folder, `ctc` (embedded, the default), `paper`, `lookup` or `none`."),
]
Budget = Annotated[int, typer.Option("--budget", min=1, help="Draft nodes scored per step.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="Sample from the k likeliest tokens; 0 is off.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens of this total mass.")]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens below this share of the likeliest one.")]
Repetition = Annotated[float, typer.Option("--repetition-penalty", help="1 is off.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of sampling.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: torch's own choice.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End the answer after this text; repeatable.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many prompts (of each file).")]
Raw = Annotated[bool, typer.Option("--raw", help="Give the text to the model as it is, without a chat template.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Recipe = Annotated[Path | None, typer.Option("--config", help="YAML recipe; the other options win over it.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe, e.g. drafter.layers=2; repeatable."),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ctc-drafter {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Lossless speculative decoding of frozen Hugging Face LLMs: the same text, sooner."""


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
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    trust_remote_code: Trust = False,
) -> None:
    """Watch one model answer twice, plainly and drafted: the same text, sooner.

    Ends with exit code 1 if an answer differs in float32.
    """
    from .bench.demo import run_demo
    from .bench.prompts import demo_prompts
    from .bench.report import report_console

    loaded = _load_target(target, dtype, device, threads, trust_remote_code)
    console = report_console()
    same = run_demo(
        loaded,
        _load_drafter(drafter, loaded),
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
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    raw: Raw = False,
    stats: Annotated[bool, typer.Option("--stats/--no-stats", help="Print speed and tau on standard error.")] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    trust_remote_code: Trust = False,
) -> None:
    """Stream the answer to one prompt."""
    sampling = _sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    text = _read_stdin() if prompt == "-" else prompt
    if not text.strip():
        raise UserError("The prompt is empty; give some text, or - to read it from standard input.")
    from .bench.measure import Answer, encode, timed
    from .bench.report import number
    from .decoding import generate as steps_of
    from .streaming import TextStream

    loaded = _load_target(target, dtype, device, threads, trust_remote_code)
    chosen = _load_drafter(drafter, loaded)
    ids = encode(loaded, [{"role": "user", "content": text}], raw)
    answer, stream = Answer(), TextStream(loaded.tokenizer)
    steps = steps_of(
        loaded, chosen, ids, max_new_tokens=max_new_tokens, budget=budget, sampling=sampling, stop=stop or ()
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
    prompts: Annotated[
        list[Path],
        typer.Option(
            "--prompts",
            help='JSONL of {"id","category","turns"}, or mt-bench, gsm8k, humaneval, spec-bench; may be repeated.',
        ),
    ],
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
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    raw: Raw = False,
    skip_too_long: Annotated[
        bool, typer.Option("--skip-too-long", help="Leave out prompts beyond the context.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="On a GPU: true time split, slower steps.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing result files.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure drafters against plain decoding on prompt files, interleaved prompt by prompt.

    --drafter and --budget may be repeated: every drafter is measured with every budget, in one run.
    """
    arguments = dict(locals())
    sampling = _sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    from .bench.command import run_bench

    run_bench(
        lambda: _load_target(target, dtype, device, threads, trust_remote_code),
        prompts,
        drafters=drafter or ["ctc"],
        budgets=budget or [BUDGET],
        output=json,
        overwrite=overwrite,
        limit=limit,
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
    """Turn result files into one Markdown page with tables and figures."""
    from .bench.markdown import run_report

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


@command
def distill(
    config: Recipe = None,
    target: TargetName = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompts", help="JSONL of prompts or chats; repeatable.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", help="JSONL to write; a rerun continues it.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Answers generated at once.")] = None,
    limit: Limit = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 is greedy.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="JSONL of prompts not to use; repeatable.")
    ] = None,
    api_base: Annotated[
        str | None, typer.Option("--api-base", help="Ask this OpenAI-compatible server, http://host:port/v1.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option("--api-key-env", help="Environment variable with the server's key.")
    ] = None,
    api_model: Annotated[str | None, typer.Option("--api-model", help="The target's name at the server.")] = None,
    api_chat: Annotated[
        bool | None, typer.Option("--api-chat/--api-tokens", help="Send messages, or (default) token ids.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", min=1, help="Requests at once.")] = None,
    settings: Settings = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write the target's own answers to prompts: what drafters are trained on."""
    from .config import load_recipe
    from .training.distill import DistillConfig
    from .training.distill import distill as run

    given: dict[str, Any] = {"target": target, "prompts": prompts, "output": output, "max_new_tokens": max_new_tokens}
    given |= {"batch": batch, "limit": limit, "temperature": temperature}
    given |= {"trust_remote_code": trust_remote_code or None}
    given |= {"exclude": exclude, "api_base": api_base, "api_key_env": api_key_env, "api_model": api_model}
    given |= {"api_chat": api_chat, "concurrency": concurrency}
    print(f"Answers: {run(load_recipe(DistillConfig, config, given, settings))}")


@command
def train(
    config: Recipe = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="JSONL of chats or texts; repeatable.")] = None,
    output: Annotated[str | None, typer.Option("--output", help="Drafter folder to write; a rerun resumes it.")] = None,
    target: TargetName = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Training steps.")] = None,
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved plan, sizes and an estimate, and stop.")
    ] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Send the curves to Weights & Biases.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Train a drafter for a target; on several devices: torchrun --nproc_per_node N -m ctc_drafter train ..."""
    from .config import load_recipe
    from .training.trainer import TrainConfig, check
    from .training.trainer import train as run

    given: dict[str, Any] = {"data": data, "output": output, "target": target, "steps": steps}
    given |= {"trust_remote_code": trust_remote_code or None}
    recipe = load_recipe(TrainConfig, config, given, settings)
    check(recipe)
    first = os.environ.get("RANK", "0") == "0"
    if dry_run and first:
        _print_recipe(recipe)
    folder = run(recipe, dry_run=dry_run, wandb=wandb)
    if not dry_run and first:
        print(f"Drafter: {folder}")


@command
def cache_features(
    config: Recipe = None,
    output: Annotated[str | None, typer.Option("--output", help="Folder to write; a rerun continues it.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Also if it takes more than half of the free disk.")] = False,
    settings: Settings = None,
    trust_remote_code: Trust = False,
) -> None:
    """Run the target once over the data of a train recipe and keep what drafters read: `features` of the recipe."""
    from .config import load_recipe
    from .training.features import cache_features as run
    from .training.trainer import TrainConfig

    recipe = load_recipe(TrainConfig, config, {"trust_remote_code": trust_remote_code or None}, settings)
    folder = output or recipe.features
    if not folder:
        raise UserError("Name the folder to write with --output, or as `features` in the recipe.")
    print(f"Features: {run(recipe, folder, yes=yes)}")


@command
def pretrain(
    config: Recipe = None,
    output: Annotated[str | None, typer.Option("--output", help="Model folder to write; a rerun resumes it.")] = None,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")] = False,
) -> None:
    """Train a small target from scratch, as the embedded one was."""
    from .config import load_recipe
    from .training.pretrain import PretrainConfig
    from .training.pretrain import pretrain as run

    recipe = load_recipe(PretrainConfig, config, {"output": output}, settings)
    if dry_run:
        _print_recipe(recipe)
    else:
        print(f"Target: {run(recipe)}")


def main() -> None:
    """Entry point of `ctc-drafter` and `python -m ctc_drafter`."""
    try:
        app()
    except KeyboardInterrupt:
        _fail("Interrupted.", 130)


# ---------------------------------------------------------------- shared by the commands


def _fail(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.exit(code)


def _load_target(name: str | None, dtype: str, device: str, threads: int | None, trust_remote_code: bool) -> Target:
    import torch
    from transformers.utils import logging

    from .target import Target

    logs: Any = logging
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    return Target.load(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def _load_drafter(name: str | None, target: Target) -> Any:
    from .drafters import load_drafter

    return load_drafter(name, target)


def _sampling(*values: Any) -> Sampling:
    from .acceptance import Sampling

    return Sampling(*values)


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


def _print_recipe(recipe: Any) -> None:
    from dataclasses import asdict

    import yaml

    print(yaml.safe_dump(asdict(recipe), sort_keys=False), end="")


from .serving import command as _serving  # noqa: E402, F401  (adds serve and chat; it needs the names above)
