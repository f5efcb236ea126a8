"""The commands that answer others: serve and chat."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .options import (
    BUDGET,
    Adaptive,
    Budget,
    DrafterName,
    Drawing,
    Loading,
    MaxNewTokens,
    MemoryLimit,
    Quantize,
    TargetName,
    bytes_of,
    command,
    load_drafter,
    load_target,
)

if TYPE_CHECKING:
    from ..serving.scheduler import Scheduler
    from ..target import Target

EMBEDDED_NAME = "embedded"

Nodes = Annotated[
    int, typer.Option("--budget", min=1, help="Draft nodes of a step; from none to twice as many, as the clock tells.")
]

Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for a request, waiting included.")]
LongestAnswer = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Longest answer; requests for more end there.")
]
ModelName = Annotated[str | None, typer.Option("--model-name", help="By which clients ask. Default: the target's.")]
ApiKeyEnv = Annotated[
    str | None, typer.Option("--api-key-env", help="Environment variable with the key that clients must send.")
]
MaxContext = Annotated[
    int | None, typer.Option("--max-context", min=1, help="Tokens of a prompt and its answer. Default: the target's.")
]
PrefixCache = Annotated[
    str, typer.Option("--prefix-cache", help="Memory for prompts that others may begin with, e.g. 256MiB; 0: none.")
]


@command
def serve(
    target: TargetName = None,
    drafter: DrafterName = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8000,
    budget: Nodes = BUDGET,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Answers generated at once.")] = 8,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Answers that may wait for a slot.")] = 64,
    timeout: Timeout = 300,
    max_body: Annotated[int, typer.Option("--max-body", min=1, help="Bytes of a request.")] = 2**20,
    max_new_tokens: LongestAnswer = 1024,
    name: ModelName = None,
    api_key_env: ApiKeyEnv = None,
    max_context: MaxContext = None,
    memory_limit: MemoryLimit = None,
    prefix_cache: PrefixCache = "0",
    quantize: Quantize = None,
    *,
    how: Loading,
) -> None:
    """Serve the target by OpenAI's API, with a page to chat at."""
    _need_extra()
    from ..environment import key_in
    from ..serving.app import Limits, Service, create_app
    from ..serving.server import bind, run

    key = key_in(api_key_env)
    bound = bind(host, port)
    scheduler = load_scheduler(
        lambda: load_target(target, how, quantize),
        drafter,
        budget=budget,
        slots=slots,
        queue=queue,
        timeout=timeout,
        context=max_context,
        memory_limit=bytes_of(memory_limit),
        prefix_cache=bytes_of(prefix_cache) or 0,
    )
    loaded = scheduler.target
    loaded.max_context = scheduler.context  # what a request may ask for, and how it is refused, follows from this
    service = Service(
        loaded,
        scheduler,
        name=name or (EMBEDDED_NAME if target is None else loaded.name),
        drafter=scheduler.drafters[0],
        key=key,
        limits=Limits(max_body=max_body, max_new_tokens=max_new_tokens),
        local=key is None and ipaddress.ip_address(bound.getsockname()[0]).is_loopback,
    )

    def ready() -> None:
        shown = f"[{host}]" if ":" in host else host
        place = f"http://{shown}:{bound.getsockname()[1]}"
        print(f"Serving {service.name} with drafter {service.drafter}: page {place}/ API {place}/v1", flush=True)

    run(create_app(service), scheduler, bound, ready)


def load_scheduler(open_target: Callable[[], Target], drafter: str | None, **settings: Any) -> Scheduler:
    """A Scheduler for the drafter and plain decoding, whose models are loaded on the thread that runs them.

    Raises UserError as `load_target` and `load_drafter` do.
    """
    from ..serving.scheduler import Scheduler
    from ..serving.worker import Worker

    worker = Worker()

    def load() -> Scheduler:
        target = open_target()
        drafters = {d.name: d for d in (load_drafter(drafter, target), load_drafter("none", target))}
        for each in drafters.values():
            each.compile_search()
        return Scheduler(target, drafters, adaptive=True, worker=worker, **settings)

    return worker.do(load).result()


def _need_extra() -> None:
    """Raise UserError if a package of the extra `serve` is missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"`serve` needs {error.name}, which is not installed; run: pip install 'ctc-drafter[serve]'"
        ) from None


@command
def chat(
    target: TargetName = None,
    drafter: DrafterName = None,
    system: Annotated[str | None, typer.Option("--system", help="What to tell the model before all.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    budget: Budget = BUDGET,
    *,
    drawing: Drawing,
    adaptive: Adaptive = True,
    stats: Annotated[bool, typer.Option("--stats/--no-stats", help="Print speed and tau after each answer.")] = True,
    how: Loading,
) -> None:
    """Talk with the target in the terminal.

    /reset begins anew, /exit ends, Ctrl-C stops an answer.
    """
    sampling = drawing.sampling()
    from ..pace import Pace
    from ..serving.chat import Conversation, talk

    loaded = load_target(target, how)
    chosen = load_drafter(drafter, loaded)
    chosen.compile_search()
    conversation = Conversation(
        loaded,
        chosen,
        sampling,
        budget=budget,
        max_new_tokens=max_new_tokens,
        system=system,
        pace=Pace.up_to(budget) if adaptive else None,
    )
    talk(conversation, stats)
