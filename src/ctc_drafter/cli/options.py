"""What the commands share: the app, how a command fails, the options that several take, and loading by them."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

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


@contextmanager
def plain_errors() -> Iterator[None]:
    """End the process with one sentence: after a UserError with exit code 2, after Ctrl-C with 130."""
    try:
        yield
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


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command, whose errors are `plain_errors`.

    A parameter that is one of GROUPS stands for all options of that class.
    """
    hints = get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if hint in GROUPS}

    @functools.wraps(function)
    def guarded(**given: Any) -> None:
        own = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        with plain_errors():
            function(**given, **own)

    guarded.__signature__ = _spread(inspect.signature(function), hints)  # type: ignore[attr-defined]
    return app.command()(guarded)


def _spread(signature: inspect.Signature, hints: dict[str, Any]) -> inspect.Signature:
    """The signature as Typer is to see it, with the options of each group in its place."""
    spread: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        options = [(name, parameter.default, hints[name])]
        if hints[name] in GROUPS:
            own = get_type_hints(hints[name], include_extras=True)
            options = [(f.name, f.default, own[f.name]) for f in fields(hints[name])]
        for option, default, hint in options:
            spread.append(inspect.Parameter(option, parameter.KEYWORD_ONLY, default=default, annotation=hint))
    return inspect.Signature(spread)


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
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End the answer after this text; repeatable.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many prompts (of each file).")]
Raw = Annotated[bool, typer.Option("--raw", help="Give the text to the model as it is, without a chat template.")]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Compile the passes first: some seconds, then faster steps, plain and drafted."),
]
Adaptive = Annotated[
    bool,
    typer.Option(
        "--adaptive/--no-adaptive",
        help="Find out as it goes how much drafting is fastest, and draft so much, or nothing; else always the budget.",
    ),
]
MemoryLimit = Annotated[
    str | None, typer.Option("--memory-limit", help="The most memory for keys and values, e.g. 2GiB. Default: none.")
]
Quantize = Annotated[
    str | None, typer.Option("--quantize", help="int8, int4: the target's weights in so many bits, by torchao.")
]
Recipe = Annotated[Path | None, typer.Option("--config", help="YAML recipe; the other options win over it.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe, e.g. drafter.layers=2; repeatable."),
]


Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]


@dataclass
class Loading:
    """How a command loads the target."""

    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")] = "auto"
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads; default: torch's own choice.")
    ] = None
    trust_remote_code: Trust = False


@dataclass
class Drawing:
    """How a command draws tokens."""

    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0
    top_k: Annotated[int, typer.Option("--top-k", help="Sample from the k likeliest tokens; 0 is off.")] = 0
    top_p: Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens of this total mass.")] = 1.0
    min_p: Annotated[float, typer.Option("--min-p", help="Drop tokens below this share of the likeliest one.")] = 0.0
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty", help="1 is off.")] = 1.0
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of sampling.")] = None

    def sampling(self) -> Sampling:
        """As the loop takes it. Raises UserError for what cannot be."""
        from ..acceptance import Sampling

        return Sampling(**asdict(self))


GROUPS = (Loading, Drawing)


def fail(message: str, code: int) -> NoReturn:
    """Say why on standard error and exit with `code`."""
    sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.exit(code)


def bytes_of(text: str | None) -> int | None:
    """Bytes in the text of an option."""
    from ..memory import parse_bytes

    return None if text is None else parse_bytes(text)


def load_target(name: str | None, how: Loading, quantized: str | None = None) -> Target:
    """The target of the options, quietly."""
    import torch
    from transformers.utils import logging

    from ..target import Target

    logs: Any = logging
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    if how.threads is not None:
        torch.set_num_threads(how.threads)
    trust = how.trust_remote_code
    return Target.load(name, dtype=how.dtype, device=how.device, trust_remote_code=trust, quantized=quantized)


def load_drafter(name: str | None, target: Target) -> Any:
    """The drafter of the option, for `target`."""
    from ..drafters import load_drafter

    return load_drafter(name, target)
