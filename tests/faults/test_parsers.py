"""Any bytes where a prompt file or a recipe should be: read, or refused in one sentence."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ctc_drafter.cli import app

from .ledger import ATHERIS, CUT, HYPOTHESIS, LEDGER, NO_ATHERIS, one_sentence
from .parsers import READERS, Reader, read

LEAF = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["\ud800", "1e400", "~"])
)
VALUES = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)
JSON_WORDS = [b"{", b"[", b"]", b"}", b'{"turns":', b'["a"]', b'"\\ud800"', b"NaN", b"1e999", b"1" * 5000, b"[" * 1200]
YAML_WORDS = [b"&a ", b"*a", b"<<: ", b"!!int ", b"!!timestamp ", b"!!python/name:os.system ", b"2001-99-99", b".inf"]
YAML_WORDS += [b"steps: ", b"data: ", b"output: x\n", b"? ", b"|\n", b"%YAML 9.9\n", b"--- ", b"- ", b": ", b"'"]
WORDS = st.sampled_from([*JSON_WORDS, *YAML_WORDS, b"\n", b"\xff", b"\x00", b"\xef\xbb\xbf"])


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The content cut somewhere, and with bytes changed, put in and left out."""
    content = bytearray(whole[: draw(st.integers(0, len(whole)))] if draw(st.booleans()) else whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4) | WORDS)
    return bytes(content)


def changed(value: Any) -> st.SearchStrategy[Any]:
    """The value with some of it replaced, or anything: an object keeps its keys, so that what stands there is read."""
    if isinstance(value, dict) and value:
        keys = st.sampled_from(sorted(value))
        some = st.lists(keys, max_size=2, unique=True).flatmap(
            lambda names: st.fixed_dictionaries({name: changed(value[name]) for name in names})
        )
        return st.one_of(some.map(lambda new: {**value, **new}), VALUES, st.dictionaries(keys, VALUES, max_size=5))
    if isinstance(value, list) and value:
        return st.one_of(st.lists(changed(value[0]), max_size=3), VALUES)
    return VALUES


def contents(reader: Reader) -> st.SearchStrategy[bytes]:
    """Random bytes, words of the format in any order, well-formed files of another shape, and damaged right ones."""
    kinds = [st.binary(max_size=60), st.lists(WORDS, max_size=12).map(b"".join)]
    if reader.value is None:
        return st.one_of(*kinds, damaged(reader.whole))
    if ".jsonl" in reader.name:
        shaped = st.lists(st.sampled_from(reader.value).flatmap(changed), max_size=3).map(reader.text_of)
    else:
        shaped = changed(reader.value).map(reader.text_of)
    plain = st.one_of(*kinds, shaped, shaped, damaged(reader.text_of(reader.value)))
    return plain if reader.pack is bytes else st.one_of(plain.map(reader.pack), damaged(reader.whole))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def fuzz(what: str, examples: int, folder: Path) -> None:
    seen = Counter[str]()

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(contents(READERS[what]))
    @example(READERS[what].whole)
    def any_bytes(content: bytes) -> None:
        outcome = read(what, content, folder)
        seen[outcome] += 1
        LEDGER.saw(f"{what}: {HYPOTHESIS}", outcome)

    any_bytes()
    assert seen["refused"] and (seen["read"] > 1 or examples < 1000), f"beside the right file: {seen}"
    assert seen["read"], "even the right file is refused, so no reader behind the first check was tried"


@pytest.mark.parametrize("what", READERS)
def test_a_few_random_files(what: str, folder: Path) -> None:
    fuzz(what, 40, folder)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("what", READERS)
def test_many_random_files(what: str, folder: Path) -> None:
    fuzz(what, 1000, folder)


WHOLE = ("prompt file", "recipe of train", "distilled data set to go on with", "index of features")


@pytest.mark.parametrize("what", WHOLE)
def test_every_cut(what: str, folder: Path) -> None:
    whole = READERS[what].whole
    for length in range(len(whole)):
        LEDGER.saw(f"{what}: {CUT}", read(what, whole[:length], folder))


@pytest.mark.slow
@pytest.mark.parametrize("what", WHOLE)
def test_every_flipped_bit(what: str, folder: Path) -> None:
    whole = READERS[what].whole
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        LEDGER.saw(f"{what}: every bit flipped", read(what, bytes(content), folder))


HOPELESS = [b"\xff\xfe", b"[" * 9999, b"{", b'{"turns": ["\\ud800"]}', b"steps: 2001-99-99", b"data: &a [*a]"]


@pytest.mark.parametrize("content", HOPELESS)
def test_the_command_line_refuses_in_a_sentence(content: bytes, folder: Path) -> None:
    path, out = folder / "bad", folder / "out"
    path.write_bytes(content)
    for line in (
        ["bench", "--prompts", path, "--json", folder / "o.json"],
        ["train", "--config", path, "--output", out],
        ["distill", "--config", path, "--output", out],
    ):
        result = CliRunner().invoke(app, [str(word) for word in line])
        assert result.exit_code == 2, result.output
        one_sentence(result.stderr.strip())
        LEDGER.saw("unreadable file named on the command line", "refused, exit code 2")
    assert sorted(p.name for p in folder.iterdir() if p.name in ("out", "o.json")) == []


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_coverage_guided(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        LEDGER.saw(NO_ATHERIS, "left out, since atheris is not installed")
        pytest.skip("atheris is not installed")
    outcomes, tests = tmp_path / "outcomes.json", Path(__file__).parents[1]
    line = [sys.executable, "-m", "faults.coverage_guided", str(outcomes), "-runs=40000", "-max_len=1500", "-seed=1"]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i, reader in enumerate(READERS.values()):
        (corpus / str(i)).write_bytes(bytes([i]) + reader.whole)
        assert len(reader.whole) < 1500, "it would be cut"
    result = subprocess.run(
        [*line, f"-artifact_prefix={tmp_path}/", str(corpus)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    seen = json.loads(outcomes.read_text())
    assert {f"{what}/read" for what in READERS} <= seen.keys(), "a reader refused all, the right file too"
    for key, times in seen.items():
        what, outcome = key.split("/")
        LEDGER.saw(f"{what}: {ATHERIS}", outcome, times)
