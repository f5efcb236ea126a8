"""JSON that others wrote: a file of it, or lines, plain or compressed (.gz, .xz), of one object each."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each non-empty line. Raises UserError naming file and line."""
    path = Path(path)
    line_number = 0
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
            for line_number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {line_number}: expected a JSON object.")
                if "\\ud" in line.lower():  # half of an escaped pair is no character, and no tokenizer takes it
                    json.dumps(row, ensure_ascii=False).encode()
                yield line_number, row
    except FileNotFoundError:
        raise UserError(f"File '{path}' does not exist.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {line_number}: not valid JSON ({error.msg}).") from None
    except (UnicodeDecodeError, lzma.LZMAError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}, after line {line_number}: cannot be read ({error}).") from None
    except (ValueError, RecursionError) as error:  # thousands of digits or of brackets, a NUL in the path
        reason = "half of a surrogate pair" if isinstance(error, UnicodeEncodeError) else error
        raise UserError(f"{path}, line {line_number}: cannot be read ({reason}).") from None
    except OSError as error:
        raise UserError(f"File '{path}' cannot be read ({error.strerror or error}).") from None


def parse_json(text: str | bytes) -> Any:
    """What the JSON text says. Raises ValueError, with a reason in one line, whatever is wrong with it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        raise ValueError("it holds a number of thousands of digits") from None


def read_json(path: Path, missing: str | None = None, then: str = "") -> Any:
    """What the JSON file says. Raises UserError if it cannot be read.

    missing: the error where there is no such file; then: what follows from damage, with which the error ends.
    """
    try:
        return parse_json(path.read_bytes().decode("utf-8"))
    except OSError as error:
        if missing is not None and isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise UserError(missing) from None
        raise UserError(f"'{path}' cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise UserError(f"'{path}' is not valid JSON ({error}){then}.") from None


def read_object(path: Path, missing: str | None = None, then: str = "") -> dict[str, Any]:
    """The JSON object in a file, see `read_json`."""
    content = read_json(path, missing, then)
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds no JSON object{then}.")
    return content
