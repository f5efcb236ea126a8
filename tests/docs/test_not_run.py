"""What no test can run is read at least: its commands exist, and take the options that the page gives them."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer

from blocks import PAGES, ROOT, Block, blocks_of
from ctc_drafter.cli import app

LEFT = [b for page in PAGES for b in blocks_of(page) if b.language in ("python", "bash") and not (b.runs or b.is_file)]
SHIMS = ("ctc-drafter", "python", "pip", "make", "vllm", "source", "cp", ".venv-vllm/bin/python", "benchmarks/gpu.sh")


@pytest.mark.parametrize("block", [b for b in LEFT if b.language == "bash"], ids=str)
def test_commands_of_a_block_are_there(block: Block, tmp_path: Path) -> None:
    for words in commands_of(block.code, tmp_path):
        check(words)


@pytest.mark.parametrize("block", [b for b in LEFT if b.language == "python"], ids=str)
def test_names_of_a_block_are_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ctc_drafter"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


def commands_of(code: str, folder: Path) -> list[list[str]]:
    """The commands as the shell starts them, variables and braces resolved; none does anything."""
    log = folder / "log"
    for name in SHIMS:
        place = folder / name if "/" in name else folder / "bin" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f'#!/bin/sh\nprintf "%s\\0" "{name}" "$@" >> "{log}"; printf "\\n" >> "{log}"\n')
        place.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    code = f'source() {{ {folder}/bin/source "$@"; }}\n{code}'
    subprocess.run(["bash", "-euc", code], cwd=folder, env=environment, check=True, timeout=60)
    return [line.rstrip("\0").split("\0") for line in log.read_text().splitlines()]


def check(words: list[str]) -> None:
    """Fail unless the command exists and knows the options."""
    name, *rest = words
    options = {word.partition("=")[0] for word in rest if word.startswith("--")}
    if name == "ctc-drafter":
        group = typer.main.get_command(app)
        with group.make_context(name, rest[:1], resilient_parsing=True) as context:
            command = group.get_command(context, rest[0])  # type: ignore[attr-defined]
            assert command is not None, rest[0]
            command.make_context(rest[0], rest[1:], parent=context).close()
    elif name == "make":
        goals = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in rest if "=" not in word} <= set(goals), rest
    elif name.endswith("python") and rest[0].startswith("benchmarks/"):
        script = ROOT / rest[0]
        known = "".join(path.read_text() for path in (script, script.with_name("common.py")))
        assert options <= set(re.findall(r'"(--[\w-]+)"', known)), (rest[0], options)
    elif name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = {extra for word in rest for found in re.findall(r"^\.\[(.*)\]$", word) for extra in found.split(",")}
        assert asked <= set(extras), rest
    elif "/" in name:
        assert name.startswith(".venv") or (ROOT / name).is_file(), name


def test_a_wrong_option_is_seen(tmp_path: Path) -> None:
    for code in ("ctc-drafter bench --no-such-option", "python benchmarks/scaling.py --no-such", "make no-such"):
        [words] = commands_of(code, tmp_path)
        with pytest.raises(Exception, match=r"no-such|No such"):
            check(words)
        (tmp_path / "log").unlink()
