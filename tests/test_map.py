"""The map of CONTRIBUTING.md is true: every module is on it, imports run downward, rooms have not outgrown it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "ctc_drafter"
MAX_LINES, MAX_FUNCTION = 400, 60
SOURCES = [
    path
    for folder in ("src", "tests", "benchmarks", "recipes")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".css", ".js")
]


def rooms() -> dict[str, int]:
    """By name, as `cli` or `tree`: the row of the map, from the top."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The map")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`[^|]*) \|", text, re.M)
    return {
        name.removesuffix("/").removesuffix(".py"): row
        for row, cell in enumerate(first_cells)
        for name in re.findall(r"`([^`]+)`", cell)
    }


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str) -> Iterator[str]:
    """What the module imports, at once or later; not what only its annotations name."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            home = ".".join([*base, *filter(None, [node.module])])
            for name in node.names:
                yield f"{home}.{name.name}" if f"{home}.{name.name}" in MODULES else home
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return walk(ast.parse(path.read_text(encoding="utf-8")))


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_module_is_on_the_map_and_nothing_else() -> None:
    assert {room_of(module) for module in MODULES} == set(rooms())


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward(module: str) -> None:
    rows = rooms()
    upward = [
        other
        for other in imports(module)
        if other in MODULES and room_of(other) != "__init__" and rows[room_of(other)] < rows[room_of(module)]
    ]
    assert not upward, f"{module} is below what it imports: {upward}"


def test_no_module_imports_itself_by_a_detour() -> None:
    TopologicalSorter({module: set(imports(module)) & set(MODULES) - {module} for module in MODULES}).prepare()


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) in ("lattice", "tree")])
def test_the_mathematics_needs_only_torch_and_numpy(module: str) -> None:
    others = {other.split(".")[0] for other in imports(module) if room_of(other) not in ("lattice", "tree")}
    assert others <= {"torch", "numpy", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_can_be_read_at_once(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES, "a room is missing"
    for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
            # The options of a command are its signature, which is a list.
            assert node.end_lineno - node.body[0].lineno < MAX_FUNCTION, f"{node.name} does too much"
