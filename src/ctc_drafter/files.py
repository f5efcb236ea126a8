"""Writing files so that an interruption leaves either the old content or the new, never half of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .errors import UserError


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(folder)` on a fresh sibling folder, then put it in the place of `path` by renaming.

    An error (a full disk, Ctrl-C) leaves the old `path` untouched and removes the half-written sibling.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        write(aside)
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"'{path}' could not be written ({error.strerror or error}); the earlier state is kept."
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` through a temporary sibling and a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(
            f"'{path}' could not be written ({error.strerror or error}); the earlier file is kept."
        ) from None
