"""Data parallelism: `torchrun --nproc_per_node N -m ctc_drafter train ...`, through accelerate.

Each process has the whole frozen target and the whole drafter, and does its share of every batch. All of them draw the
same problems from the same seed, so each knows the weight of its share without asking; the weighted gradients are
summed once per step. That is plain data parallelism without a wrapper around the drafter, whose training entry is
`train_loss` and not `forward`, and some of whose parameters may have no gradient. A target that one device cannot hold
is shared out (`shard`, FSDP2); the drafter, a few percent of its size, never needs to be.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch

from ..errors import UserError
from ..target import Target

PATIENCE = timedelta(hours=4)
"""How long the others wait for the first process, which alone reads tau and writes."""
GRACE = 10
"""Seconds in which the first process says why; torchrun ends all others as soon as one has gone."""


class Processes:
    """The processes of a run, one per device, and this one's place among them. A run alone is one of one."""

    def __init__(self, device: str) -> None:
        """`device` is the recipe's; in company it must leave the choice of the GPU to the launcher."""
        self.index, self.count, self.device = 0, 1, device
        self._accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return
        if device not in ("auto", "cpu", "cuda"):
            raise UserError(f"Each process has its own device: use auto, cpu or cuda, not {device}.")
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("Device 'cuda' cannot be used: there is no GPU that torch can see.")
        from accelerate import Accelerator, InitProcessGroupKwargs

        on_cpu = device == "cpu" or not torch.cuda.is_available()
        self._accelerator = Accelerator(
            cpu=on_cpu, mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
        )
        self.index, self.count = self._accelerator.process_index, self._accelerator.num_processes
        self.device = str(self._accelerator.device)
        if not self.first:
            _be_quiet()

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, evaluates and writes."""
        return self.index == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """A part of the work that ends for all if it ends for one: the first process raises the UserError."""
        message = ""
        try:
            yield
        except UserError as error:
            if self.count == 1:
                raise
            message = str(error)
        messages = [m for m in self.gather(message) if m]
        if messages:
            self.fail(messages[0])

    def fail(self, message: str) -> NoReturn:
        """End the run; called by all processes. The first raises a UserError, the others leave without a word."""
        if self.first:
            raise UserError(message)
        time.sleep(GRACE)
        raise SystemExit(2)

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, in their order."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes."""
        return value if self.count == 1 else self._accelerator.reduce(value, "sum")

    def sum_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Replace each gradient by its sum over all processes; a parameter without one in all of them stays so."""
        if self.count == 1:
            return
        parameters = list(parameters)
        present = self.total(torch.tensor([float(p.grad is not None) for p in parameters], device=self.device))
        for p, anywhere in zip(parameters, present.tolist()):
            if anywhere:
                p.grad = self.total(torch.zeros_like(p) if p.grad is None else p.grad)

    def shard(self, target: Target) -> None:
        """Share out the target's layers over the processes. Raises UserError in a run alone."""
        if self.count == 1:
            raise UserError("shard needs several processes: torchrun --nproc_per_node N -m ctc_drafter train ...")
        from torch.distributed.device_mesh import init_device_mesh

        target.shard(init_device_mesh(torch.device(self.device).type, (self.count,)))

    def close(self) -> None:
        """End the connection between the processes."""
        if self._accelerator is not None:
            self._accelerator.end_training()


def _be_quiet() -> None:
    from transformers.utils import logging as transformers_logging

    logs: Any = transformers_logging
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
