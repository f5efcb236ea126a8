"""The drafter that a recipe asks for."""

from __future__ import annotations

from typing import Any

from ..config import from_mapping
from ..drafters import DRAFTERS, TrainableDrafter
from ..errors import UserError
from ..target import Target
from .config import TrainConfig


def check(config: TrainConfig) -> None:
    """Raise UserError if there is no such drafter or its own config has a mistake; loads no model."""
    _class_and_config(config)


def new_drafter(config: TrainConfig, target: Target) -> TrainableDrafter:
    """With weights as they are before training. Raises UserError as `check` does."""
    cls, own = _class_and_config(config)
    drafter: TrainableDrafter = cls(own, target)
    return drafter


def _class_and_config(config: TrainConfig) -> tuple[Any, Any]:
    cls: Any = DRAFTERS.get(config.kind)
    if cls is None or not issubclass(cls, TrainableDrafter):
        raise UserError(f"There is no trainable drafter '{config.kind}'.")
    return cls, from_mapping(cls.config_class, dict(config.drafter), "drafter")
