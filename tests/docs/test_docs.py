"""Every block of the documentation does what the page says. What is run, and how, is told in `blocks.py`."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from blocks import PAGES, ROOT, Block, blocks_of, matches
from conftest import build_target
from ctc_drafter.drafters import DRAFTERS

WARM = Path(__file__).with_name("warm.py")
NOT_RUN = 16
"""Blocks in all pages that may need what a test has not: the network, a GPU, another library, hours."""

RUNNABLE = [page for page in PAGES if any(block.runs for block in blocks_of(page))]
SLOW = [page for page in RUNNABLE if any(block.is_slow for block in blocks_of(page))]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`my-model` of the pages: a Llama with random weights, four layers, a context of 1,024 tokens."""
    return build_target(tmp_path_factory.mktemp("docs") / "my-model", layers=4, context=1024)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of the shell blocks: `ctc-drafter`, `python` and `torchrun` are those of this environment."""
    place = tmp_path_factory.mktemp("bin")
    path = str(place / "warm.socket")
    for name, kind in (("ctc-drafter", "run"), ("python", "python")):
        command = f'exec "{sys.executable}" -S -E "{WARM}" {kind} "{path}" "$@"'
        (place / name).write_text(f"#!/bin/sh\n{command}\n")
        (place / name).chmod(0o755)
    (place / "torchrun").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
    (place / "torchrun").chmod(0o755)
    clean = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    clean["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen([sys.executable, str(WARM), "serve", path], env=clean, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield clean
    process.kill()
    process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Reading:
    """Runs the blocks of one page in order, in one folder."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.output = ""
        self.running: list[subprocess.Popen[bytes]] = []
        self.port = free_port()

    def read(self, block: Block) -> None:
        if block.language == "bash" and block.code.startswith("curl ") and not shutil.which("curl"):
            pytest.skip(f"{block} needs curl")
        code = block.code.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        if block.is_file:
            (self.folder / block.title).write_text(code, encoding="utf-8")
        elif block.title == "Output":
            assert matches(code, self.output), f"{block} expects\n{code}\nbut the output is\n{self.output}"
        elif block.language == "python" and block.runs:
            self.output = self._python(block, code)
        elif block.title.startswith("Terminal"):
            self._serve(block, code)
        elif block.language == "bash" and block.runs:
            self.output = self._bash(block, code)

    def _python(self, block: Block, code: str) -> str:
        out = io.StringIO()
        padded = "\n" * block.line + code  # so that a traceback names the page's own lines
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(out):
            exec(compile(padded, str(block.page), "exec"), self.names)
        return out.getvalue()

    def _bash(self, block: Block, code: str) -> str:
        command = ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=2400 if block.is_slow else 280,
        )
        assert done.returncode == 0, f"{block}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _serve(self, block: Block, code: str) -> None:
        """Start a server that the page lets run on, on a free port of this machine alone."""
        port = free_port() if self.running else self.port
        code = re.sub(r"^ctc-drafter serve\b", f"exec ctc-drafter serve --port {port}", code, flags=re.M)
        code = code.replace("0.0.0.0", "127.0.0.1")
        log = self.folder / f"server-{len(self.running)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-euc", code], cwd=self.folder, env=self.environment, stdout=file, stderr=subprocess.STDOUT
            )
        self.running.append(process)
        deadline = time.monotonic() + 100
        while "Serving" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, f"{block}: {log.read_text()}"
            time.sleep(0.05)

    def close(self) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait(timeout=60)


@pytest.fixture
def reading(
    tmp_path: Path, model: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Reading]:
    shutil.copytree(model, tmp_path / "my-model")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.syspath_prepend(tmp_path)  # a page may write a module and import it
    known = DRAFTERS.copy()
    reading = Reading(tmp_path, environment)
    yield reading
    reading.close()
    DRAFTERS.clear()
    DRAFTERS.update(known)
    for module in tmp_path.glob("*.py"):
        sys.modules.pop(module.stem, None)


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_blocks_of_a_page(page: Path, reading: Reading) -> None:
    for block in blocks_of(page):
        if not block.is_slow:
            reading.read(block)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", SLOW, ids=lambda page: page.stem)
def test_blocks_of_a_page_with_those_that_take_minutes(page: Path, reading: Reading) -> None:
    for block in blocks_of(page):
        reading.read(block)


def test_few_blocks_are_not_run_and_say_why() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page)]
    code = [block for block in blocks if block.language in ("python", "bash", "sh", "shell", "console")]
    assert all(block.language in ("python", "bash") for block in code), "name shell blocks bash, so that they are run"
    assert sum(not block.runs for block in code) <= NOT_RUN
    known = ("Needs ", "Takes ", "Terminal", "Output")
    odd = [str(block) for block in blocks if block.title and not block.is_file and not block.title.startswith(known)]
    assert not odd, odd


def test_the_page_on_extending_keeps_its_word() -> None:
    [drafter] = [block for block in blocks_of(ROOT / "docs" / "extending.md") if block.title == "bigram.py"]
    assert len(drafter.code.splitlines()) < 60


def test_the_recipe_of_the_page_is_the_one_of_the_package() -> None:
    [recipe] = [block for block in blocks_of(ROOT / "docs" / "train.md") if block.is_file]
    assert yaml.safe_load(recipe.code) == yaml.safe_load((ROOT / "recipes" / "ctc.yaml").read_text())


def test_the_training_time_quoted_is_the_recorded_one() -> None:
    """The model card is written by the run itself."""
    said = re.search(r"took ([\d,]+) seconds for ([\d,]+) steps", (ROOT / "docs" / "train.md").read_text())
    card = (ROOT / "src" / "ctc_drafter" / "embedded" / "README.md").read_text()
    assert said and re.search(rf"^\| {said[2]} \|.* \| {said[1]} \|$", card, re.M)


def test_no_block_hides_behind_an_indent() -> None:
    for page in PAGES:
        hidden = re.findall(r"^[ \t]+```(?:python|bash)", page.read_text(encoding="utf-8"), re.M)
        assert not hidden, f"{page.name}: an indented block would not be run"
