"""A drafter without numbers: what a config describes, looked at before memory is taken for it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..errors import UserError
from ..files import WEIGHTS

if TYPE_CHECKING:
    from ..target import Target
    from .base import TrainableDrafter

MAX_TENSORS = 2_000
AMPLE = 2**22
"""Numbers that any drafter may have, however small its file."""


class TooLarge(ValueError):
    """The sizes in a config are not those of its weights."""


def shell(cls: Any, config: Any, verifier: dict[str, Any], folder: Path) -> TrainableDrafter:
    """The drafter that the config describes, on torch's meta device, and on a stand-in for its target.

    Raises UserError if there can be none, or if it would be far larger than the folder's weights are.
    """
    width, vocabulary = verifier.get("hidden_size"), verifier.get("vocab_size")
    if type(width) is not int or type(vocabulary) is not int:
        raise UserError(f"{folder / 'config.json'}: hidden_size or vocab_size of the target is missing.")
    with _told(folder), torch.device("meta"):
        stand_in = SimpleNamespace(
            name=verifier.get("name_or_path"),
            dtype=torch.float32,
            hidden_size=width,
            vocab_size=vocabulary,
            max_context=1,
            embedding=nn.Embedding(vocabulary, width),
            head=nn.Linear(width, vocabulary, bias=False),
        )
        with _limited(folder):
            drafter: TrainableDrafter = cls(config, stand_in)
    return drafter


def build(cls: Any, config: Any, target: Target, folder: Path) -> TrainableDrafter:
    """The drafter that the config describes, for `target`, its weights yet to be loaded. Raises UserError as `shell`.

    A damaged size would otherwise take all memory, or add layers without end.
    """
    with _told(folder):
        try:
            with torch.device("meta"), _limited(folder):
                cls(config, target)
        except TooLarge:
            raise
        except Exception:
            pass  # what needs its target's numbers cannot be tried so; all else fails again now
        drafter: TrainableDrafter = cls(config, target)
    return drafter


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Make a UserError of whatever fails: sizes do so in as many ways as modules use them."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{folder / 'config.json'}' describes a drafter that cannot be built ({reason}).") from None


@contextmanager
def _limited(folder: Path) -> Iterator[None]:
    """Let modules of this thread have about as many tensors and numbers as the weights; more raise TooLarge."""
    weights = folder / WEIGHTS
    most = AMPLE + 8 * weights.stat().st_size if weights.is_file() else math.inf
    tensors, numbers, here = 0, 0, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal tensors, numbers
        if threading.get_ident() == here:
            tensors, numbers = tensors + 1, numbers + parameter.numel()
            if tensors > MAX_TENSORS or numbers > most:
                raise TooLarge("its sizes ask for far more than its weights file holds")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
