"""What the commands share: the app, how a command fails, the options that several take, and loading by them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from ..acceptance import Sampling
    from ..target import Target

app = typer.Typer(
    name="ctc-drafter",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # loading rich takes as long as all the rest of --help
)

BUDGET = 8


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command: a UserError is one sentence and exit code 2, Ctrl-C is exit code 130."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except UserError as error:
            fail(str(error), 2)
        except KeyboardInterrupt:
            fail("Interrupted.", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has seen enough
            sys.exit(141)
        except OSError as error:
            place = f"'{error.filename}'" if error.filename else "A file"
            fail(f"{place} could not be read or written ({error.strerror or error}); what was finished is kept.", 2)

    return app.command()(guarded)


TargetName = Annotated[
    str | None, typer.Option("--target", help="Model folder or hub name. Default: the embedded target.")
]
DrafterName = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        help="Drafter folder, `ctc`, `paper`, `lookup`, `none`, or NAME+lookup for both; default: `ctc+lookup`.",
    ),
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
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Compile the passes first: some seconds, then faster steps, plain and drafted."),
]
MemoryLimit = Annotated[
    str | None, typer.Option("--memory-limit", help="The most memory for keys and values, e.g. 2GiB. Default: none.")
]
Quantize = Annotated[
    str | None, typer.Option("--quantize", help="int8: the target's weights in eight bits, which needs torchao.")
]
Recipe = Annotated[Path | None, typer.Option("--config", help="YAML recipe; the other options win over it.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe, e.g. drafter.layers=2; repeatable."),
]


def fail(message: str, code: int) -> NoReturn:
    """Say why on standard error and exit with `code`."""
    sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.exit(code)


def bytes_of(text: str | None) -> int | None:
    """Bytes in the text of an option."""
    from ..memory import parse_bytes

    return None if text is None else parse_bytes(text)


def load_target(
    name: str | None,
    dtype: str,
    device: str,
    threads: int | None,
    trust_remote_code: bool,
    quantized: str | None = None,
) -> Target:
    """The target of the options, quietly."""
    import torch
    from transformers.utils import logging

    from ..target import Target

    logs: Any = logging
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    more = {"trust_remote_code": trust_remote_code, "quantized": quantized}
    return Target.load(name, dtype=dtype, device=device, **more)  # type: ignore[arg-type]


def load_drafter(name: str | None, target: Target) -> Any:
    """The drafter of the option, for `target`."""
    from ..drafters import load_drafter

    return load_drafter(name, target)


def sampling_of(*values: Any) -> Sampling:
    """Temperature, top-k, top-p, min-p, repetition penalty and seed as the loop takes them."""
    from ..acceptance import Sampling

    return Sampling(*values)
