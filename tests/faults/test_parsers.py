"""Any bytes where a prompt file or a recipe should be: read, or refused in one sentence."""

from __future__ import annotations

import gzip
import importlib.util
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ctc_drafter.cli import app

from .ledger import LEDGER, one_sentence
from .parsers import READERS, read

RECIPE = "data: [a.jsonl]\noutput: out\nsteps: 10\nlr_matrix: 1e-3\ndrafter: {slots: 4, labels: 3}\nschedule: cosine\n"
ROWS = (
    '{"id": "a", "category": "b", "turns": ["How many?", "And now?"]}\n'
    '{"messages": [{"role": "user", "content": "caf\\u00e9 \\ud83d\\ude42"}], "turns": ["x"]}\n'
    '{"id": "0123456789abcdef", "answer_ids": [1, 2], "turns": ["y"]}\n'
)
DISTILLED = "".join(f'{{"id": "0123456789abcde{i}", "answer_ids": [{i}, 7]}}\n' for i in range(3))

LEAF = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["\ud800", "1e400", "~"])
)
VALUES = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)
ROW_KEYS = st.sampled_from(["id", "category", "turns", "messages", "role", "content", "text", "answer_ids"])
RECIPE_KEYS = st.sampled_from(
    ["data", "output", "steps", "lr_matrix", "drafter", "prompts", "mixture", "ema", "target"]
)
JSON_WORDS = [b"{", b"[", b"]", b"}", b'{"turns":', b'["a"]', b'"\\ud800"', b"NaN", b"1e999", b"1" * 5000, b"[" * 3000]
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


def contents(name: str) -> st.SearchStrategy[bytes]:
    """Random bytes, words of the format in any order, well-formed files of the wrong shape, and damaged right ones."""
    if name.endswith(".yaml"):
        shaped = st.dictionaries(RECIPE_KEYS, VALUES, max_size=5).map(
            lambda v: yaml.safe_dump(v).encode("utf-8", "replace")
        )
        whole = RECIPE.encode()
    else:
        rows = st.dictionaries(ROW_KEYS, VALUES, max_size=4)
        shaped = st.lists(rows, max_size=3).map(lambda v: "".join(json.dumps(row) + "\n" for row in v).encode())
        whole = ROWS.encode()
    pack: Any = gzip.compress if name.endswith(".gz") else lzma.compress if name.endswith(".xz") else bytes
    plain = st.one_of(st.binary(max_size=60), st.lists(WORDS, max_size=12).map(b"".join), shaped, damaged(whole))
    return plain if pack is bytes else st.one_of(plain.map(pack), damaged(pack(whole)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def fuzz(what: str, examples: int, folder: Path) -> None:
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(contents(READERS[what][1]))
    def any_bytes(content: bytes) -> None:
        LEDGER.saw(f"{what}: any bytes (hypothesis)", read(what, content, folder))

    any_bytes()


@pytest.mark.parametrize("what", READERS)
def test_a_few_random_files(what: str, folder: Path) -> None:
    fuzz(what, 40, folder)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("what", READERS)
def test_many_random_files(what: str, folder: Path) -> None:
    fuzz(what, 1000, folder)


WHOLE = {"prompt file": ROWS, "recipe of train": RECIPE, "distilled data set to go on with": DISTILLED}


@pytest.mark.parametrize("what", WHOLE)
def test_every_cut(what: str, folder: Path) -> None:
    whole = WHOLE[what].encode()
    for length in range(len(whole)):
        LEDGER.saw(f"{what}: cut at every length", read(what, whole[:length], folder))


@pytest.mark.slow
@pytest.mark.parametrize("what", WHOLE)
def test_every_flipped_bit(what: str, folder: Path) -> None:
    whole = WHOLE[what].encode()
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
def test_coverage_guided(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        LEDGER.saw("readers: coverage-guided (atheris)", "left out, since atheris is not installed")
        pytest.skip("atheris is not installed")
    outcomes, tests = tmp_path / "outcomes.json", Path(__file__).parents[1]
    line = [sys.executable, "-m", "faults.coverage_guided", str(outcomes), "-runs=30000", "-max_len=400", "-seed=1"]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i, name in enumerate(READERS):
        (corpus / str(i)).write_bytes(bytes([i]) + (RECIPE if "recipe" in name else ROWS).encode()[:300])
    result = subprocess.run(
        [*line, f"-artifact_prefix={tmp_path}/", str(corpus)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for key, times in json.loads(outcomes.read_text()).items():
        what, outcome = key.split("/")
        LEDGER.saw(f"{what}: coverage-guided (atheris)", outcome, times)
