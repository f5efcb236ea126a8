"""Write function-completion chats from the Python source of installed packages: training rows for the embedded target.

    pip install --no-deps --target PACKAGES -r recipes/python_functions.txt
    python recipes/python_functions.py PACKAGES runs/embedded/functions.jsonl

Each documented function becomes one row: the question is its signature with the first paragraph and the first examples
of its docstring, the answer is the function without docstring in a code fence. Source texts keep their packages'
licences (BSD, MIT or Apache-2.0; see the model card).
"""

from __future__ import annotations

import ast
import json
import random
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

MAX_ANSWER = 900  # characters
MAX_QUESTION = 900
MAX_EXAMPLES = 6  # lines


def short_docstring(text: str) -> str:
    """First paragraph, then the first doctest examples."""
    lines = textwrap.dedent(text.expandtabs()).strip().splitlines()
    first = next((i for i, line in enumerate(lines) if not line.strip()), len(lines))
    out = lines[:first]
    start = next((i for i, line in enumerate(lines) if line.lstrip().startswith(">>>")), None)
    if start is not None:
        examples = []
        for line in lines[start:]:
            if not line.strip() or len(examples) == MAX_EXAMPLES:
                break
            examples.append(line.strip())
        if "import" not in examples[0]:
            out += examples
    return "\n".join(line.strip() for line in out)


def question_and_answer(source: str, node: ast.FunctionDef) -> tuple[str, str] | None:
    """The two texts of a function, or None if it has no docstring, no body beside it, or is too long."""
    docstring = ast.get_docstring(node, clean=False)
    arguments = node.args.posonlyargs + node.args.args
    if docstring is None or len(node.body) < 2 or (arguments and arguments[0].arg in ("self", "cls")):
        return None
    lines = source.splitlines()
    before = lines[node.lineno - 1 : node.body[0].lineno - 1]
    after = lines[node.body[0].end_lineno : node.end_lineno]
    head, body = textwrap.dedent("\n".join(before)), textwrap.dedent("\n".join(before + after))
    text = short_docstring(docstring)
    question = head + "\n" + textwrap.indent('"""\n' + text + '\n"""', "    ") + "\n"
    answer = "```python\n" + "\n".join(line for line in body.splitlines() if line.strip()) + "\n```"
    if not text.isascii() or len(question) > MAX_QUESTION or len(answer) > MAX_ANSWER or ":" not in head:
        return None
    return question, answer


def functions(folder: Path) -> Iterator[dict[str, object]]:
    """Rows of all source files below `folder`, in a fixed order, each function once."""
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        if "tests" in path.parts or path.name.startswith("test_"):
            continue
        try:
            source = path.read_text()
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            pair = question_and_answer(source, node) if isinstance(node, ast.FunctionDef) else None
            if pair is not None and pair[1] not in seen:
                seen.add(pair[1])
                messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair)]
                yield {"source": "functions", "messages": messages}


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python_functions.py FOLDER_OF_PACKAGES OUTPUT.jsonl")
    rows = list(functions(Path(sys.argv[1])))
    random.Random(0).shuffle(rows)
    Path(sys.argv[2]).parent.mkdir(parents=True, exist_ok=True)
    Path(sys.argv[2]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} functions written to {sys.argv[2]}")
