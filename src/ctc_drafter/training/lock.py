"""One run at a time in an output folder: a lock file that names its process, and outlives no process on its host."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..jsonl import parse_json

NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What file systems without hard links answer."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; it is removed at the end.

    The lock of a process that has died on this host is taken over. Raises UserError while its owner lives, or may live
    on another host.
    """
    mine = {"pid": os.getpid(), "host": platform.node(), "started": _start_time(os.getpid())}
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(mine), encoding="utf-8")
        try:
            while not _create(aside, path) and not _take_over(aside, path):
                pass  # it changed hands meanwhile
        finally:
            aside.unlink(missing_ok=True)
        _sweep(path)
    except OSError as error:
        raise UserError(f"Lock file '{path}' could not be written ({error.strerror or error}).") from None
    try:
        yield
    finally:
        with suppress(OSError):
            if _owner(path.read_bytes()) == mine:
                path.unlink()


def _sweep(path: Path) -> None:
    """Remove what processes that were killed on their way to the lock have left beside it."""
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with suppress(OSError):
            if not _alive(_owner(aside.read_bytes())):
                aside.unlink()


def _create(aside: Path, path: Path) -> bool:
    """Give the finished file its name unless that is taken; where links exist, nobody ever sees half of it."""
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(aside.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _take_over(aside: Path, path: Path) -> bool:
    """Put `aside` in the place of a dead process's lock; False if that lock is gone. Raises UserError if it holds."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # of several processes that find it dead, one replaces it
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return False
            owner = _owner(file.read())
            if _alive(owner):
                pid, host = (" ".join(str(owner.get(key)).split())[:80] for key in ("pid", "host"))
                raise UserError(
                    f"Another run (process {pid} on {host}) is writing here; "
                    f"wait for it, choose another output, or remove '{path}' if it has ended."
                )
            os.replace(aside, path)
            return True
    except FileNotFoundError:
        return False


def _owner(text: bytes) -> dict[str, Any]:
    try:
        owner = parse_json(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the process may still be running; only on this host can its death be known."""
    pid = owner.get("pid")
    if owner.get("host") != platform.node() or not (isinstance(pid, int) and 0 < pid < 2**31):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return owner.get("started") == _start_time(pid)  # else its number went to another process


def _start_time(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None where the system does not say or the process is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        fields = stat[stat.rindex(")") + 2 :].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
