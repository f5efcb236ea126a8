"""Drafters by name or folder."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..target import EMBEDDED, Target
from .base import DRAFTERS, Drafter, TrainableDrafter, load_trainable, register
from .ctc import CTCConfig, CTCDrafter
from .eagle import EagleConfig, EagleDrafter
from .hybrid import HybridDrafter
from .hydra import HydraConfig, HydraDrafter
from .lookup import LookupDrafter
from .medusa import MedusaConfig, MedusaDrafter
from .none import NoDrafter
from .parallel import ParallelConfig, ParallelDrafter

__all__ = [
    "DEFAULT",
    "DRAFTERS",
    "CTCConfig",
    "CTCDrafter",
    "Drafter",
    "EagleConfig",
    "EagleDrafter",
    "HydraConfig",
    "HydraDrafter",
    "LookupDrafter",
    "MedusaConfig",
    "MedusaDrafter",
    "NoDrafter",
    "ParallelConfig",
    "ParallelDrafter",
    "TrainableDrafter",
    "compile_passes",
    "drafter_folder",
    "load_drafter",
    "register",
]

EMBEDDED_DRAFTERS = ("ctc", "paper")
DEFAULT = "ctc+lookup"
LOOKUP = "+lookup"
"""After a drafter's name: with prompt lookup beside it."""


def drafter_folder(name: str) -> Path:
    """The folder of an embedded drafter, or that of the given path, which need not exist."""
    return EMBEDDED / name if name in EMBEDDED_DRAFTERS else Path(name)


def load_drafter(name_or_path: str | None, target: Target) -> Drafter:
    """A drafter for `target`: `none`, `lookup`, an embedded one (`ctc`, `paper`), or a checkpoint folder.

    NAME+lookup is any of these with lookup beside it, as in `ctc+lookup`, the default. Raises UserError if there is no
    such drafter or it was made for another target.
    """
    name = name_or_path or DEFAULT
    if name.endswith(LOOKUP):
        return HybridDrafter(load_drafter(name.removesuffix(LOOKUP), target))
    kind = DRAFTERS.get(name)
    if kind is not None and not issubclass(kind, TrainableDrafter):
        return kind()
    folder = drafter_folder(name)
    if not folder.is_dir():
        known = ", ".join(("none", "lookup", *EMBEDDED_DRAFTERS))
        raise UserError(f"There is no drafter '{name}': give a checkpoint folder or one of {known}.")
    drafter = load_trainable(folder, target)
    drafter.name = name if name in EMBEDDED_DRAFTERS else folder.resolve().name
    return drafter


def compile_passes(target: Target, drafter: Drafter, budget: int, *, adaptive: bool = False) -> float:
    """Compile all that a step of one row runs: the target's plain and drafted passes and the drafter's own.

    adaptive: the drafter may be left out of a pass, as a `Pace` does.
    Returns the seconds taken. Raises UserError where `Target.compile` does.
    """
    nodes = 0 if type(drafter) is NoDrafter else budget
    return target.compile(nodes, drafter.feature_layers, adaptive=adaptive) + drafter.compile_draft()
