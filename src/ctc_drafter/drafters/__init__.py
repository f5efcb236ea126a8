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
    "folder_argument",
    "load_drafter",
    "register",
]

EMBEDDED_DRAFTERS = ("ctc", "paper")
NAMES = ("none", "lookup", *EMBEDDED_DRAFTERS)
"""What is no folder where a drafter is chosen."""
DEFAULT = "ctc+lookup"
LOOKUP = "+lookup"
"""After a drafter's name: with prompt lookup beside it."""


def drafter_folder(name: str) -> Path:
    """The folder of an embedded drafter, or that of the given path, which need not exist.

    `ctc` is the embedded drafter and `./ctc` a folder. Raises UserError for the first where both are there.
    """
    _refuse_two_meanings(name)
    return _folder(name)


def folder_argument(folder: str | Path) -> str:
    """What chooses the drafter in this folder: its path, `./ctc` where `ctc` would choose another."""
    return f"./{folder}" if str(folder) in NAMES else str(folder)


def load_drafter(name_or_path: str | None, target: Target, dtype: str = "auto") -> Drafter:
    """A drafter for `target`: `none`, `lookup`, an embedded one (`ctc`, `paper`), or a checkpoint folder.

    NAME+lookup is any of these with lookup beside it, as in `ctc+lookup`, the default. A folder of such a name is
    chosen by `./ctc`.

    dtype: in which it computes, as for `Target.load`; auto is the fastest beside the target, see `drafting_dtype`. It
    changes guesses, never the text. Raises UserError if there is no such drafter, if it was made for another target,
    and for a plain `ctc` where there is a folder of that name too.
    """
    if name_or_path:  # the default is ours wherever it is asked for
        _refuse_two_meanings(name_or_path.removesuffix(LOOKUP))
    return _load(name_or_path or DEFAULT, target, dtype)


def _folder(name: str) -> Path:
    return EMBEDDED / name if name in EMBEDDED_DRAFTERS else Path(name)


def _refuse_two_meanings(name: str) -> None:
    """After `train --output ctc`, `bench --drafter ctc` would measure ours without a word."""
    here = Path(name)
    if name in EMBEDDED_DRAFTERS and (here / "config.json").is_file() and not here.samefile(EMBEDDED / name):
        raise UserError(
            f"'{name}' is the embedded drafter and here a folder too; give './{name}' for the folder, or rename it to "
            "use the embedded one."
        )


def _load(name: str, target: Target, dtype: str) -> Drafter:
    if name.endswith(LOOKUP):
        return HybridDrafter(_load(name.removesuffix(LOOKUP), target, dtype))
    kind = DRAFTERS.get(name)
    if kind is not None and not issubclass(kind, TrainableDrafter):
        return kind()
    folder = _folder(name)
    if not folder.is_dir():
        raise UserError(f"There is no drafter '{name}': give a checkpoint folder or one of {', '.join(NAMES)}.")
    drafter = load_trainable(folder, target, dtype)
    drafter.name = name if name in EMBEDDED_DRAFTERS else folder.resolve().name
    return drafter


def compile_passes(target: Target, drafter: Drafter, budget: int, *, adaptive: bool = False) -> float:
    """Compile all that a step of one row runs: the target's plain and drafted passes and the drafter's own.

    adaptive: the drafter may be left out of a pass, as a `Pace` does.
    Returns the seconds taken. Raises UserError where `Target.compile` does.
    """
    nodes = 0 if type(drafter) is NoDrafter else budget
    return target.compile(nodes, drafter.feature_layers, adaptive=adaptive) + drafter.compile_draft()
