"""What a run will do, before it does it; `print_estimate`: how long it will take and how much it will store."""

from __future__ import annotations

import time

import torch
from torch.distributed.tensor import DTensor

from ..drafters.dtypes import stored_dtype
from ..words import byte_size, duration
from .loop import Setup, Training
from .problems import batch_of


def print_plan(setup: Setup) -> None:
    """Sizes of target, drafter, data and run."""
    config, target, drafter, console = setup.config, setup.target, setup.drafter, setup.console
    tokens = sum(len(s.ids) for s in setup.train_set)
    console.print(f"target   {target.name}: {target.num_parameters:,} parameters, {target.dtype}")
    console.print(
        f"drafter  {config.kind}: {drafter.num_parameters:,} parameters, features of layers {drafter.feature_layers}"
    )
    console.print(f"data     {len(setup.train_set):,} sequences, {tokens:,} tokens; {len(setup.held_set)} held out")
    console.print(
        f"plan     {config.steps} steps x {config.batch} sequences x {config.anchors} anchors -> {config.output}"
    )
    if setup.processes.count > 1:
        console.print(f"parallel {setup.processes.count} processes, each on 1/{setup.processes.count} of a batch")
    if config.shard:
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in target.model.parameters())
        console.print(f"sharded  each process holds {held:,} parameters of the target")


def print_estimate(training: Training) -> None:
    """Work, storage and time of the whole run; the time from one step really done, on a batch of middle size."""
    setup = training.setup
    config, console = setup.config, setup.console
    mean = sum(len(s.ids) for s in setup.train_set) / len(setup.train_set)
    sequences, passes = config.steps * config.batch, config.steps * config.accumulate
    seconds = _seconds_per_step(training)  # all processes take part
    target = f"{passes:,} forward passes of the target in each process"
    if setup.cached is not None:
        target = f"features from '{setup.cached.folder}', so no forward pass of the target"
    console.print(
        f"work     {sequences:,} sequences, about {round(sequences * mean):,} tokens; {target}; "
        f"{len(training.prompts)} prompts for tau"
    )
    console.print(
        f"storage  drafter {byte_size(_drafter_bytes(training))}, training state {byte_size(_state_bytes(training))}"
    )
    console.print(
        f"time     {seconds:.3g} s a step, about {duration(seconds * config.steps)} in all, evaluation not counted"
    )


def _seconds_per_step(training: Training) -> float:
    """Wall time of a step; the first one, which warms up, is not timed."""
    config, setup = training.config, training.setup
    steps = range(min(16, config.steps))
    middle = sorted(steps, key=lambda i: max(len(s.ids) for s in batch_of(setup.train_set, i, config)))[len(steps) // 2]
    training.step(middle)
    began = time.perf_counter()
    training.step(middle)  # ends with the loss on the host, so the GPU's forward and backward are waited for
    if setup.target.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _drafter_bytes(training: Training) -> int:
    tensors = training.drafter.state_dict().values()
    return sum(t.numel() * stored_dtype(t, training.stored).itemsize for t in tensors)


def _state_bytes(training: Training) -> int:
    tensors = [*training.weights.values(), *training.average.tensors.values(), *training.best.values()]
    for optimizer in training.optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(t.nbytes for t in tensors)
