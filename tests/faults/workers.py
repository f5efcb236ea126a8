"""Commands in processes of their own, that are killed, on disks that are full, in folders that cannot be written.

The processes are forked from one that has imported everything, so that starting one takes little.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEW_MOUNTS = 0x20000  # CLONE_NEWNS
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
"""What Python announces before it touches a file system."""

CONTEXT: Any = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ctc_drafter.training.trainer", "ctc_drafter.training.distill", "typer.testing"])


@dataclass
class Outcome:
    """How a command ended, and the names of what it left in its folder (with their sizes)."""

    code: int
    stderr: str
    events: int
    left: dict[str, int]
    peak: int
    """The most KiB that its files took at once, by pages, as a disk in memory counts them."""
    mounted: bool
    """Whether the folder was a disk of its own."""

    @property
    def last_line(self) -> str:
        return self.stderr.strip().splitlines()[-1] if self.stderr.strip() else ""


def files_in(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def kib_of(sizes: Iterable[int]) -> int:
    """What files of these sizes take."""
    return sum(-(-size // 4096) * 4 for size in sizes)


def left_by(folder: Path) -> Path:
    """Where a run on a small disk leaves what was on it, since that disk ends with it."""
    return folder.with_name(folder.name + ".left")


def start(line: list[str], folder: Path, kill_at: int = 0, disk: int | None = None) -> tuple[Any, Any]:
    """A process that runs the command `line`, and the pipe on which its Outcome comes.

    kill_at: it kills itself before this event in `folder`; disk: the folder is a disk of so many KiB, or, for 0, one
    that cannot be written; see `left_by`.
    """
    mine, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_work, args=(line, str(folder), kill_at, disk, theirs))
    process.start()
    theirs.close()
    return process, mine


def outcome_of(process: Any, pipe: Any) -> Outcome | None:
    """Wait for it; None if it was killed."""
    try:
        outcome: Outcome | None = pipe.recv()
    except EOFError:
        outcome = None
    process.join()
    assert outcome is not None or process.exitcode == -signal.SIGKILL
    return outcome


def run(line: list[str], folder: Path, **options: Any) -> Outcome | None:
    return outcome_of(*start(line, folder, **options))


def _work(line: list[str], folder: str, kill_at: int, disk: int | None, pipe: Any) -> None:
    import torch
    from typer.testing import CliRunner

    from ctc_drafter.cli import app

    torch.set_num_threads(1)
    mounted = disk is not None and _limit(folder, disk)
    events = peak = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal events, peak
        if event in EVENTS and any(isinstance(a, (str, os.PathLike)) and str(a).startswith(folder) for a in arguments):
            events += 1
            if disk is None and not kill_at:
                peak = max(peak, kib_of(_sizes(folder)))
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    result = CliRunner().invoke(app, line)
    stderr = result.stderr if result.exception is None or isinstance(result.exception, SystemExit) else ""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        stderr = f"Traceback: {result.exception!r}"
    left = files_in(Path(folder))
    if disk:
        shutil.copytree(folder, left_by(Path(folder)))
    pipe.send(Outcome(result.exit_code, stderr, events, left, max(peak, kib_of(left.values())), mounted))


def _sizes(folder: str) -> Iterator[int]:
    """Of the files there, while others of the same run may come and go."""
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                yield os.lstat(os.path.join(place, name)).st_size


def _limit(folder: str, disk: int) -> bool:
    """Make the folder a small disk, or a read-only one; where mounts are not allowed, by limits and permissions.

    Returns whether it is a disk.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    own = libc.unshare(NEW_MOUNTS) == 0
    if own and subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode == 0:
        if disk:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={disk}k", "tmpfs", folder], check=True)
        else:
            subprocess.run(["mount", "--bind", folder, folder], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        return True
    if disk:
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk * 1024, resource.RLIM_INFINITY))
    else:
        Path(folder).chmod(0o555)
    return False
