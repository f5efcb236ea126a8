"""Training curves: TensorBoard event files beside the drafter where that is installed, and wandb when asked for."""

from __future__ import annotations

import importlib.util
import secrets
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_text


class Logs:
    """Writes named numbers under a step. `folder` is made when the first logger opens."""

    def __init__(self, folder: Path, name: str, recipe: dict[str, Any], start: int, *, wandb: bool = False) -> None:
        """`start`: the step that comes next; what a killed run wrote beyond it is struck out."""
        self._board: Any = None
        self._run: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=start + 1)
        if wandb:
            folder.mkdir(parents=True, exist_ok=True)
            options = {"id": _run_id(folder / "wandb.txt"), "name": name, "config": recipe, "dir": str(folder)}
            self._run = import_wandb().init(project="ctc-drafter", resume="allow", **options)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add `values` under `step`, counted from 1."""
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)
        if self._run is not None:
            self._run.log(values, step=step)

    def flush(self) -> None:
        """Make everything so far visible to readers of the event files."""
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Finish all loggers."""
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish()


def import_wandb() -> Any:
    """The wandb package. Raises UserError if it is missing."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package wandb, which is not installed: pip install wandb.") from None
    return wandb


def _run_id(path: Path) -> str:
    """The id under which a resumed run continues its curves."""
    if not path.exists():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()
