"""Writing files so that an interruption leaves either the old content or the new, never half of it.

What stands at a path that is a symbolic link is written where the link leads, and the link stays. A folder takes two
renames: a kill between them leaves nothing at its path, and the old content beside it, which the next write, or
`recover_folder`, puts back.
"""

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
    place, aside, old = _places(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(place)
        aside.mkdir()
        write(aside)
        _swap(aside, place, old)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"'{path}' could not be written ({reason}); the earlier state is kept.") from None
    finally:
        _remove(aside)


def recover_folder(path: Path) -> bool:
    """Whether there is a folder at `path`; puts back the one that a kill between two renames has left beside it.

    What else a killed write has left there is removed.
    """
    place, aside, old = _places(path)
    if not place.exists() and old.is_dir() and not old.is_symlink():
        os.replace(old, place)
    for left in (old, aside):
        _remove(left)
    return place.exists()


def _places(path: Path) -> tuple[Path, Path, Path]:
    """Where `path` leads, and beside that where the new content is made and where the old one waits."""
    place = Path(os.path.realpath(path))
    return place, place.with_name(f".{place.name}.writing"), place.with_name(f".{place.name}.old")


def _swap(new: Path, path: Path, old: Path) -> None:
    """Put the folder `new` in the place of `path`; if that fails, put `path` back."""
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    with suppress(OSError):
        os.replace(old, new)  # half removed, it must not have the name under which it would be put back
    _remove(old)


def _remove(path: Path) -> None:
    """Remove whatever has this name, if anything has and can be removed; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(file)` on a temporary sibling, then put it in the place of `path` by renaming.

    An error leaves the old `path` untouched and no sibling.
    """
    place, aside, _ = _places(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        os.replace(aside, place)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"'{path}' could not be written ({reason}); the earlier files are kept.") from None
    finally:
        with suppress(OSError):
            aside.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, see `write_file`."""
    write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))
