"""Writing files so that an interruption leaves either the old content or the new, never half of it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError

WEIGHTS = "model.safetensors"
"""Of a drafter's folder and of a target's."""
RESULT_KIND = "ctc-drafter bench"
"""What a result file says that it is."""


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(folder)` on a fresh sibling folder, then put it in the place of `path` by renaming.

    An error (a full disk, Ctrl-C) leaves the old `path` untouched and removes the half-written sibling.
    """
    aside = path.with_name(f".{path.name}.writing")
    old = path.with_name(f".{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        write(aside)
        _swap(aside, path, old)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"'{path}' could not be written ({reason}); the earlier state is kept.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _swap(new: Path, path: Path, old: Path) -> None:
    """Put the folder `new` in the place of `path`; if that fails, put `path` back."""
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(file)` on a temporary sibling, then put it in the place of `path` by renaming.

    An error leaves the old `path` untouched and no sibling.
    """
    aside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"'{path}' could not be written ({reason}); the earlier files are kept.") from None
    finally:
        with suppress(OSError):
            aside.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, see `write_file`."""
    write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))
