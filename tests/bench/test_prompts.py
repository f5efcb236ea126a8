from __future__ import annotations

from pathlib import Path

import pytest

from ctc_drafter.bench.prompts import Prompt, demo_prompts, read_prompts
from ctc_drafter.errors import UserError


def test_limit_is_per_file_and_takes_the_first(tmp_path: Path) -> None:
    for name in "ab":
        lines = [f'{{"id": "{name}{i}", "category": "{name}", "turns": ["q{i}"]}}\n' for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    found = read_prompts([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], limit=2)
    assert [p.id for p in found] == ["a0", "a1", "b0", "b1"]


def test_id_and_category_have_defaults(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('\n{"turns": ["Hi"]}\n')
    assert read_prompts([tmp_path / "mine.jsonl"]) == [Prompt(2, "mine", ("Hi",))]


@pytest.mark.parametrize(
    "line",
    [
        '{"id": 1}',
        '{"turns": []}',
        '{"turns": "Hi"}',
        '{"turns": [1]}',
        '{"turns": [" "]}',
        '{"turns": ["a"], "id": []}',
    ]
    + ["[1]", "{broken", '{"turns": ["a"], "category": 3}', '{"turns": ["half a pair: \\ud83d"]}']
    + ["[" * 100_000, '{"turns": ["a"], "id": ' + "1" * 5000 + "}"],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"turns": ["fine"]}}\n{line}\n')
    with pytest.raises(UserError, match="line 2"):
        read_prompts([path])


def test_escaped_pairs_are_characters(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"turns": ["\\ud83d\\ude42", "\\\\ud83d"]}\n')
    assert read_prompts([tmp_path / "p.jsonl"])[0].turns == ("\U0001f642", "\\ud83d")


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(["a\0b"])


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts([tmp_path / "p.jsonl"])


def test_demo_prompts_ship_with_the_package() -> None:
    prompts = demo_prompts()
    assert {"math", "general", "code"} == {p.category for p in prompts} and len(demo_prompts(2)) == 2
