"""Same text, sooner: lossless speculative decoding with drafters trained by CTC.

    from ctc_drafter import Target, generate, load_drafter

Names are resolved on first use, so that `import ctc_drafter` does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .acceptance import Sampling
    from .batch import Batch
    from .decoding import generate
    from .drafters import Drafter, load_drafter
    from .errors import UserError
    from .pace import Pace
    from .steps import Step
    from .target import Target
    from .tree import DraftTree

_HOMES = {
    "Batch": "batch",
    "DraftTree": "tree",
    "Drafter": "drafters",
    "Pace": "pace",
    "Sampling": "acceptance",
    "Step": "steps",
    "Target": "target",
    "UserError": "errors",
    "generate": "decoding",
    "load_drafter": "drafters",
}

__all__ = [
    "Batch",
    "DraftTree",
    "Drafter",
    "Pace",
    "Sampling",
    "Step",
    "Target",
    "UserError",
    "__version__",
    "generate",
    "load_drafter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
