"""Reading JSON lines, whole and damaged."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctc_drafter.errors import UserError
from ctc_drafter.jsonl import read_jsonl, read_object

WRITERS: dict[str, Callable[[Path, bytes], Any]] = {
    ".jsonl": Path.write_bytes,
    ".gz": lambda p, b: p.write_bytes(gzip.compress(b)),
    ".xz": lambda p, b: p.write_bytes(lzma.compress(b)),
}


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[bytes], Path]:
    def to_file(content: bytes) -> Path:
        path = tmp_path / f"data{request.param}"
        WRITERS[request.param](path, content)
        return path

    return to_file


def test_lines_are_numbered_and_empty_ones_skipped(write: Callable[[bytes], Path]) -> None:
    path = write('{"a": "ü"}\n\n  \n{"b": 2}'.encode())
    assert list(read_jsonl(path)) == [(1, {"a": "ü"}), (4, {"b": 2})]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"a": 1}\n{"a": \n{"a": 2}\n', "line 2: not valid JSON"),
        (b'{"a": 1}\n\n[1]\n', "line 3: expected a JSON object"),
        (b'{"a": 1}\n"\xff"\n', r"after line \d: cannot be read"),
    ],
)
def test_bad_lines_are_named(content: bytes, match: str, write: Callable[[bytes], Path]) -> None:
    path = write(content)
    with pytest.raises(UserError, match=match) as error:
        list(read_jsonl(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


DAMAGES = [lambda b: b[: len(b) // 2], lambda b: b"plain" + b, lambda b: b[:30] + b"\0\1" + b[30:]]


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_archives(suffix: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    WRITERS[suffix](path, b"".join(b'{"a": %d}\n' % (i * 7919) for i in range(500)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"cannot be read|not valid JSON"):
        list(read_jsonl(path))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": 1', "is not valid JSON"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b"[" * 9999, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "thousands of digits"),
        (b"5", "holds no JSON object"),
        (b"null", "holds no JSON object"),
    ],
)
def test_files_without_an_object(content: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=match) as error:
        read_object(path, then="; make it anew")
    assert str(path) in str(error.value) and str(error.value).endswith("; make it anew.")


def test_a_file_with_an_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes('{"a": "ü"}'.encode())
    assert read_object(path) == {"a": "ü"}
    with pytest.raises(UserError, match="cannot be read"):
        read_object(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_object(tmp_path / "b.json")
    with pytest.raises(UserError, match=r"^Nothing here\.$"):
        read_object(path / "b.json", "Nothing here.")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        list(read_jsonl(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="cannot be read"):
        list(read_jsonl(tmp_path))
