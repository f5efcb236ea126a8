"""The optimization of a drafter: steps, checkpoints, and continuing as if nothing had happened."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..drafters import TrainableDrafter
from ..environment import versions
from ..errors import UserError
from ..files import write_text
from ..target import Target
from .average import Average, copy_weights
from .checkpoint import load_training_state, save_training_state
from .config import TrainConfig
from .evaluate import decoded_tau, evaluation_prompts, held_out_figures, problem_loss
from .features import CachedFeatures
from .logs import Logs
from .optim import clip_gradients, diverged, learning_rate_factor, make_optimizers, set_learning_rates
from .parallel import Processes
from .problems import Problems, Sequence, batch_of, make_problems, split_problems


@dataclass
class Setup:
    """All that a run consists of before its first step."""

    config: TrainConfig
    target: Target
    drafter: TrainableDrafter
    train_set: list[Sequence]
    held_set: list[Sequence]
    processes: Processes
    console: Console
    cached: CachedFeatures | None = None


class Training:
    """The state of a run: weights, optimizers, their average and the best of them, and the history."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config = setup, setup.config
        self.target, self.drafter = setup.target, setup.drafter
        config = self.config
        self.weights = dict(setup.drafter.named_parameters())
        self.optimizers = make_optimizers(self.weights, config.lr_matrix, config.lr_other, config.weight_decay)
        self.average = Average(self.weights, config.ema)
        self.prompts = evaluation_prompts(config, setup.target, setup.held_set)
        self.best = {name: w.detach().cpu().clone() for name, w in self.weights.items()} if self.prompts else {}
        self.kept: dict[str, float] = {"step": 0, "tau": -1.0}
        """Step and tau of `best`."""
        self.done = 0
        self.mean = math.nan
        """Running mean of the loss."""
        self.history: list[dict[str, float]] = []

    # ------------------------------------------------------------ steps

    def step(self, index: int) -> float:
        """One update of the weights; returns the loss of the whole batch.

        Raises UserError before the update if that loss or its gradient is not finite.
        """
        config = self.config
        set_learning_rates(self.optimizers, (config.lr_matrix, config.lr_other), self.learning_rate_factor(index))
        loss, wrong = clip_gradients(self.weights.values(), self._gradients(index))
        if wrong:
            self.setup.processes.fail(diverged(wrong, index, self.state_path))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.average.update(index)
        self.mean = loss if math.isnan(self.mean) else 0.98 * self.mean + 0.02 * loss
        self.done = index + 1
        return loss

    def learning_rate_factor(self, index: int) -> float:
        """Share of the full learning rates in step `index`."""
        config = self.config
        return learning_rate_factor(index, config.steps, config.warmup, config.decay, config.schedule)

    def _gradients(self, index: int) -> torch.Tensor:
        """Add up the gradients of the batch's loss over its parts here and in all processes; returns that loss."""
        config, processes = self.config, self.setup.processes
        seed = (config.seed * 10**6 + index) % 2**64
        torch.manual_seed(seed)  # whatever a drafter draws, a resumed run draws it too
        sequences = batch_of(self.setup.train_set, index, config)
        generator = torch.Generator().manual_seed(seed)
        problems = make_problems(sequences, config.anchors, self.drafter.proposed_labels, generator)
        parts = split_problems(problems, config.accumulate * processes.count)
        shares = self._shares(parts)
        loss = torch.zeros((), device=self.target.device)
        for part, share in list(zip(parts, shares))[processes.index :: processes.count]:
            value, _ = problem_loss(self.target, self.drafter, part, self.setup.cached)
            (value * share).backward()
            loss += value.detach() * share
        processes.sum_gradients(self.weights.values())
        return processes.total(loss)

    def _shares(self, parts: list[Problems]) -> list[float]:
        """Each part's weight in the mean over the whole batch; equal ones would favour the anchors of small parts."""
        if len(parts) == 1:
            return [1.0]
        weights = [self.drafter.loss_weight(*(t.to(self.target.device) for t in part[1:])) for part in parts]
        whole = sum(weights)
        return [w / whole if whole else 1 / len(parts) for w in weights]

    # ------------------------------------------------------------ checkpoints

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def state_path(self) -> Path:
        """The folder of the training state."""
        return self.output.with_name(self.output.name + ".state")

    @property
    def stored(self) -> torch.dtype:
        """What the drafter's weights are written in."""
        return self.target.dtype if self.config.store == "auto" else getattr(torch, self.config.store)

    @property
    def _saved(self) -> dict[str, torch.Tensor]:
        averages = {f"ema/{name}": tensor for name, tensor in self.average.tensors.items()}
        return {**self.weights, **averages, **{f"best/{name}": tensor for name, tensor in self.best.items()}}

    def resume(self) -> None:
        """Take up the saved state if there is one. Raises UserError if it does not fit or `output` is not its own."""
        if self.state_path.exists():
            meta = load_training_state(self.state_path, self._saved, self.optimizers)
            self.done, self.history = meta["step"], meta["history"]
            self.mean = meta.get("mean", math.nan)
            self.kept = meta.get("kept", self.kept)
            if self.done > self.config.steps:
                raise UserError(
                    f"'{self.state_path}' is of step {self.done} and steps is {self.config.steps}; raise that to at "
                    f"least {self.done}, or remove the state to start anew."
                )
        elif self.output.exists():
            raise UserError(
                f"'{self.output}' exists and has no training state beside it; choose another output folder."
            )

    def checkpoint(self, seconds: float) -> dict[str, float]:
        """Evaluate and save; returns the new row of the history, `seconds` being the run's time so far.

        With a shared-out target all processes evaluate, for its passes need them all; the first one saves.
        """
        config, target, drafter = self.config, self.target, self.drafter
        row = {"step": self.done, "loss": self.mean}
        with self.average.in_place():
            parts = config.accumulate * self.setup.processes.count
            row |= held_out_figures(config, target, drafter, self.setup.held_set, self.setup.cached, parts)
            tau = decoded_tau(config, target, drafter, self.prompts) if self.prompts else None
            if tau is not None:
                row["tau"] = tau
            if self.prompts and (tau or 0.0) > self.kept["tau"]:
                self.kept = {"step": self.done, "tau": tau or 0.0}
                copy_weights(self.weights, self.best)
        row["seconds"] = seconds
        self.history.append({k: round(v, 4) for k, v in row.items()})
        if not self.setup.processes.first:
            return self.history[-1]
        meta = {"step": self.done, "history": self.history, "mean": self.mean, "kept": self.kept}
        save_training_state(self.state_path, self._saved, self.optimizers, meta)
        self._write_history()
        return self.history[-1]

    def finish(self) -> None:
        """Write the drafter: the best weights by tau where that was measured, else the last (or their average)."""
        training: dict[str, Any] = {"history": self.history, "steps": self.config.steps}
        if self.prompts:
            training["kept"] = self.kept
        copy_weights(self.best or self.average.tensors, self.weights)
        self.drafter.save_pretrained(self.output, {"training": training}, self.stored)
        run: dict[str, Any] = {"command": shlex.join(["ctc-drafter", *sys.argv[1:]]), "recipe": asdict(self.config)}
        run |= {"processes": self.setup.processes.count, "versions": versions()}
        write_text(self.output / "run.yaml", yaml.safe_dump(run, sort_keys=False))
        self._write_history()

    def _write_history(self) -> None:
        write_text(self.output.with_name(self.output.name + ".history.json"), json.dumps(self.history, indent=1))


def optimize(training: Training, *, wandb: bool = False) -> None:
    """Run the remaining steps, with a progress bar and curves, and write the drafter."""
    setup, config, first = training.setup, training.config, training.setup.processes.first
    with setup.processes.together():
        training.resume()
    if len(set(setup.processes.gather(training.done))) > 1:
        setup.processes.fail(f"Not all processes see '{training.state_path}'; put it where all of them can read it.")
    start, output = training.done, training.output
    logs = None
    if first and start < config.steps:
        folder = output.with_name(output.name + ".logs")
        logs = Logs(folder, output.name, asdict(config), start, wandb=wandb)
    began = time.time() - (training.history[-1]["seconds"] if training.history else 0.0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=setup.console, disable=not first) as progress:
            task = progress.add_task("training", total=config.steps, completed=start)
            for index in range(start, config.steps):
                loss = training.step(index)
                progress.update(task, advance=1, description=f"training, loss {training.mean:.3f}")
                if logs is not None:
                    rate = training.learning_rate_factor(index)
                    logs.write(index + 1, {"train/loss": loss, "train/learning_rate_factor": rate})
                due = (index + 1) % config.checkpoint_every == 0 or index + 1 == config.steps
                if due and (first or config.shard):
                    row = training.checkpoint(time.time() - began)
                    progress.console.print("  ".join(f"{k} {v:g}" for k, v in row.items()))
                    if logs is not None:
                        logs.write(index + 1, {f"checkpoint/{k}": v for k, v in row.items() if k != "step"})
                        logs.flush()
    finally:
        if logs is not None:
            logs.close()
    if first:
        training.finish()
