"""Result files: one JSON per run, with the machine, the versions and the command that made it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..environment import machine, versions
from ..errors import UserError
from ..files import RESULT_KIND, write_text
from .measure import Result


def document(result: Result, target: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The JSON document of one result."""
    return {
        "kind": RESULT_KIND,
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
    if path.is_dir():
        raise UserError(f"'{path}' is a folder and a file is to be written; choose another name.")
    if path.exists() and not overwrite:
        raise UserError(f"'{path}' exists already and is left as it is; choose another name or pass --overwrite.")
    folder = Path(os.path.realpath(path)).parent  # a link is written where it leads
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Folder '{folder}' cannot be made ({error.strerror}); choose another place.") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"Folder '{folder}' is not writable; choose another place.")


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
