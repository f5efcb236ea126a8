"""Train a drafter on a frozen target's features, computed online, at many anchors per sequence."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from ..drafters import drafter_folder
from ..drafters.base import take_weights
from ..errors import UserError
from ..files import recover_folder
from ..target import Target
from .checkpoint import check_recipe
from .config import FREE, TrainConfig, recipe_defaults
from .drafter import check, new_drafter
from .features import open_features
from .lock import locked
from .logs import import_wandb
from .loop import Setup, Training, optimize
from .parallel import Processes
from .plan import print_estimate, print_plan
from .problems import answer_counts, read_sequences

__all__ = ["TrainConfig", "check", "train"]


def train(config: TrainConfig, *, dry_run: bool = False, wandb: bool = False) -> Path:
    """Run or resume the recipe; returns the drafter's folder.

    `dry_run` prints the plan and an estimate, and writes nothing. Under torchrun the processes share the work. Raises
    UserError for what cannot be done, also while another run is writing to the same output.
    """
    check(config)
    if wandb:
        import_wandb()
    output = Path(config.output)
    processes = Processes(config.device)
    # Paths and names are printed as they are: they are no markup, and hold no emoji.
    console = Console(stderr=True, quiet=not processes.first, markup=False, emoji=False)
    with ExitStack() as at_end:
        at_end.callback(processes.close)
        with processes.together():
            if config.batch < processes.count * config.accumulate:
                raise UserError(
                    f"A batch of {config.batch} cannot be split over {processes.count} processes in "
                    f"{config.accumulate} parts each; raise batch."
                )
            if processes.first and not dry_run:
                at_end.enter_context(locked(output.with_name(output.name + ".lock")))
            setup = _prepare(config, processes, console)
            print_plan(setup)
            training = Training(setup)
            if processes.first and not dry_run:
                recover_folder(training.state_path)
                recipe = output.with_name(output.name + ".recipe.json")
                made = (output, training.state_path)
                check_recipe(recipe, asdict(config), FREE, recipe_defaults(), belongs=made)
        if dry_run:
            print_estimate(training)
        else:
            optimize(training, wandb=wandb)
    return output


def _prepare(config: TrainConfig, processes: Processes, console: Console) -> Setup:
    """Load the target, build the drafter and read the data."""
    device = "cpu" if config.shard else processes.device
    target = Target.load(config.target, dtype=config.dtype, device=device, trust_remote_code=config.trust_remote_code)
    if config.shard:
        processes.shard(target)
    torch.manual_seed(config.seed)
    drafter = new_drafter(config, target)
    if config.init is not None:
        take_weights(drafter_folder(config.init), drafter)
    drafter.to(target.device)
    target.capture(drafter.feature_layers)
    train_set, held_set = read_sequences(config, target)
    cached = open_features(config, target, drafter.feature_layers, train_set, held_set, console)
    drafter.fit_vocabulary(answer_counts(train_set, target.vocab_size).to(target.device))
    return Setup(config, target, drafter, train_set, held_set, processes, console, cached)
