"""The commands that make a drafter: distill, train, cache-features, pretrain."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from ..errors import UserError
from .options import (
    Recipe,
    Settings,
    TargetName,
    Trust,
    command,
)


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
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Only the first so many prompts that fit, of all files together."),
    ] = None,
    turns: Annotated[
        int | None, typer.Option("--turns", min=1, help="Questions of a row to ask, one after another; 1 unless given.")
    ] = None,
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
    """Write the target's own answers, to train drafters on."""
    from ..config import load_recipe
    from ..training.distill import DistillConfig
    from ..training.distill import distill as run

    given: dict[str, Any] = {"target": target, "prompts": prompts, "output": output, "max_new_tokens": max_new_tokens}
    given |= {"batch": batch, "limit": limit, "turns": turns, "temperature": temperature}
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
    """Train a drafter for a target.

    On several devices: torchrun --nproc_per_node N -m ctc_drafter train ...
    """
    from ..training.allocation import keep_memory

    keep_memory()
    from ..config import load_recipe
    from ..drafters import folder_argument
    from ..training.trainer import TrainConfig, check
    from ..training.trainer import train as run

    given: dict[str, Any] = {"data": data, "output": output, "target": target, "steps": steps}
    given |= {"trust_remote_code": trust_remote_code or None}
    recipe = load_recipe(TrainConfig, config, given, settings)
    check(recipe)
    first = os.environ.get("RANK", "0") == "0"
    if dry_run and first:
        print_recipe(recipe)
    folder = run(recipe, dry_run=dry_run, wandb=wandb)
    if not dry_run and first:
        print(f"Drafter: {folder_argument(folder)}")


@command
def cache_features(
    config: Recipe = None,
    output: Annotated[str | None, typer.Option("--output", help="Folder to write; a rerun continues it.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Also if it takes more than half of the free disk.")] = False,
    settings: Settings = None,
    trust_remote_code: Trust = False,
) -> None:
    """Run the target once over the data of a train recipe.

    What drafters read is kept in the folder that the recipe names as `features`.
    """
    from ..config import load_recipe
    from ..training.features import cache_features as run
    from ..training.trainer import TrainConfig

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
    """Train a small target from scratch.

    So the embedded one was made.
    """
    from ..training.allocation import keep_memory

    keep_memory()
    from ..config import load_recipe
    from ..training.pretrain import PretrainConfig
    from ..training.pretrain import pretrain as run

    recipe = load_recipe(PretrainConfig, config, {"output": output}, settings)
    if dry_run:
        print_recipe(recipe)
    else:
        print(f"Target: {run(recipe)}")


def print_recipe(recipe: Any) -> None:
    from dataclasses import asdict

    import yaml

    print(yaml.safe_dump(asdict(recipe), sort_keys=False), end="")
