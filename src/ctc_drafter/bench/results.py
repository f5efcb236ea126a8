"""Result files: one JSON per run, with the machine, the versions and the command that made it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..errors import UserError
from ..files import write_text
from .measure import Result


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "memory_gb": round(pages / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str | None]:
    """Python, torch, transformers, this package, and its git commit where it runs from a checkout."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ctc_drafter": __version__,
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Commit of the checkout that this package lies in (`-dirty` if changed); None outside of one."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", here, *args], capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()
    except (OSError, subprocess.SubprocessError):
        return None


def document(result: Result, target: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The JSON document of one result."""
    return {
        "kind": "ctc-drafter bench",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "complete": result.complete,
        "command": shlex.join(["ctc-drafter", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(),
        "arguments": arguments,
        "target": target,
        "drafter": {"name": result.name, "budget": result.budget, "parameters": result.parameters},
        "totals": result.totals,
        "skipped": result.skipped,
        "rows": result.rows,
    }


def check_output(path: Path, overwrite: bool) -> None:
    """Raise UserError, before any work, if `path` exists (unless `overwrite`) or cannot be written."""
    if path.is_dir() or (path.exists() and not overwrite):
        raise UserError(f"'{path}' exists already and is left as it is; choose another name or pass --overwrite.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Folder '{path.parent}' cannot be made ({error.strerror}); choose another place.") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"Folder '{path.parent}' is not writable; choose another place.")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` atomically, its rows one per line so that the file stays readable."""
    rows = content.get("rows", [])
    head = json.dumps({k: v for k, v in content.items() if k != "rows"}, indent=1)
    lines = ",\n  ".join(json.dumps(_rounded(row)) for row in rows)
    write_text(path, f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 7)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return value


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
