"""Distillation: the target's own greedy answers, once each, also after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import build_target
from ctc_drafter.cli import app
from ctc_drafter.drafters import NoDrafter
from ctc_drafter.errors import UserError
from ctc_drafter.target import Target
from ctc_drafter.training.data import SPLIT
from ctc_drafter.training.distill import DistillConfig, distill
from helpers import refused, run

TOKENS = 12


@pytest.fixture
def recipe(target_folder: Path, tmp_path: Path) -> DistillConfig:
    questions = [f"Question {i}" + " and more" * (i % 4) for i in range(40)]
    rows: list[dict[str, Any]] = [{"turns": [q], "category": "a"} for q in questions]
    for chat in ([("system", "Be brief."), ("user", "Hi")], [("user", "Ho"), ("assistant", "!")]):
        rows.append({"messages": [{"role": role, "content": text} for role, text in chat], "source": "b"})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, rows[3]]))
    return DistillConfig(
        prompts=[str(tmp_path / "prompts.jsonl")],
        output=str(tmp_path / "out" / "answers.jsonl"),
        target=str(target_folder),
        max_new_tokens=TOKENS,
        batch=2,
        dtype="float32",
        device="cpu",
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_plain_greedy_decoding(recipe: DistillConfig, target: Target) -> None:
    rows = rows_of(distill(recipe))
    assert len(rows) == 42 == len({r["id"] for r in rows})
    assert {r["source"] for r in rows} == {"a", "b"}
    assert target.prompt_ids([{"role": "user", "content": "Ho"}]) in [r["prompt_ids"] for r in rows]
    for row in rows:
        assert row["answer_ids"] == run(target, NoDrafter(), row["prompt_ids"], TOKENS)[0]
        assert row["answer"] == target.tokenizer.decode(row["answer_ids"], skip_special_tokens=True)


def test_a_models_own_generation_settings_do_not_leak_in(recipe: DistillConfig, tmp_path: Path) -> None:
    folder = build_target(tmp_path / "opinionated")
    own = {"do_sample": True, "temperature": 0.5, "top_p": 0.3, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    (folder / "generation_config.json").write_text(json.dumps(own))
    target = Target.load(folder, dtype="float32", device="cpu")
    for row in rows_of(distill(replace(recipe, target=str(folder), limit=6))):
        assert row["answer_ids"] == run(target, NoDrafter(), row["prompt_ids"], TOKENS)[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kept", [0, 1, 2, 17, 40, 42])
def test_resuming_after_a_kill(kept: int, temperature: float, recipe: DistillConfig) -> None:
    """A run killed in the middle of a line goes on as if nothing had happened."""
    recipe = replace(recipe, temperature=temperature)
    output = distill(recipe)
    lines = output.read_text().splitlines(keepends=True)
    kept -= kept % recipe.batch if temperature else 0  # sampling repeats whole batches only
    output.write_text("".join(lines[:kept]) + "".join(lines[kept:])[:23])
    distill(recipe)
    assert output.read_text() == "".join(lines)
    distill(recipe)
    assert output.read_text() == "".join(lines)


@pytest.fixture
def chats(recipe: DistillConfig, tmp_path: Path) -> DistillConfig:
    """Rows of one to three questions, as turns and as messages with answers of somebody else."""
    said = [("user", "Ho"), ("assistant", "!"), ("user", "And?"), ("assistant", "!"), ("user", "So?")]
    rows: list[dict[str, Any]] = [{"turns": [f"Question {i}", "Why?", "Really?"][: 1 + i % 3]} for i in range(9)]
    rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(recipe, prompts=[str(tmp_path / "chats.jsonl")], turns=3)


def test_later_questions_come_after_the_targets_own_answers(chats: DistillConfig, target: Target) -> None:
    rows = rows_of(distill(chats))
    assert len(rows) == 10 + 7 + 4 == len({row["id"] for row in rows})
    messages = [{"role": "user", "content": "Ho"}]
    for question in ("And?", "So?", None):
        [row] = [row for row in rows if row["prompt_ids"] == target.prompt_ids(messages)]
        assert row["answer_ids"] == run(target, NoDrafter(), row["prompt_ids"], TOKENS)[0]
        messages += [{"role": "assistant", "content": row["answer"]}, {"role": "user", "content": question or ""}]
    assert rows[:10] == rows_of(distill(replace(chats, turns=1, output=chats.output + "1")))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kept", [4, 10, 14, 17, 20])
def test_later_turns_resume_after_a_kill(kept: int, temperature: float, chats: DistillConfig) -> None:
    chats = replace(chats, temperature=temperature, batch=1)
    output = distill(chats)
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:kept]) + lines[kept][:23])
    distill(chats)
    assert output.read_text() == "".join(lines)


def test_more_turns_go_on_from_fewer(chats: DistillConfig) -> None:
    once = distill(replace(chats, output=chats.output + "1")).read_text()
    distill(replace(chats, turns=1))
    assert distill(chats).read_text() == once


def test_all_turns_of_a_chat_are_held_out_together(chats: DistillConfig) -> None:
    rows = rows_of(distill(chats))
    firsts = {int(row["id"], 16) % SPLIT for row in rows[:10]}
    assert len(firsts) == 10 and all(int(row["id"], 16) % SPLIT in firsts for row in rows[10:])


def test_later_questions_may_be_excluded_and_too_long(chats: DistillConfig, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text('{"turns": ["Really?"]}\n')
    rows = rows_of(distill(replace(chats, exclude=[str(tmp_path / "eval.jsonl")])))
    assert len(rows) == 7 + 4 + 1  # the three rows that ask it are gone, those with other questions stay
    longest = max(len(row["prompt_ids"]) for row in rows[:7])
    few = rows_of(distill(replace(chats, max_prompt_tokens=longest, output=chats.output + "2")))
    assert len(few) < 21 and all(len(row["prompt_ids"]) <= longest for row in few)


def test_sampling_depends_on_the_seed(recipe: DistillConfig, tmp_path: Path) -> None:
    def answers(seed: int, name: str) -> list[Any]:
        out = distill(replace(recipe, temperature=1.0, seed=seed, output=str(tmp_path / name), limit=4))
        return [r["answer_ids"] for r in rows_of(out)]

    assert answers(1, "a") == answers(1, "b") != answers(2, "c")


@pytest.mark.parametrize("seed", [1_700_000_000_123_456_789, 2**64 - 1, -(2**63)])
def test_every_seed_that_torch_takes_is_one(seed: int, recipe: DistillConfig) -> None:
    assert len(rows_of(distill(replace(recipe, temperature=1.0, seed=seed, limit=4)))) == 4


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"request_timeout": 0.0}, "request_timeout more than 0"),
        ({"api_base": None, "api_chat": True}, "api_"),
        ({"seed": 2**64}, "seed must be at least"),
        ({"turns": 0}, "turns must be positive"),
        ({"mixture": {"a": -0.5}}, "shares of mixture must be finite and not negative"),
        ({"mixture": {"a": float("nan")}}, "shares of mixture must be finite and not negative"),
    ],
)
def test_impossible_recipes(change: dict[str, Any], match: str, recipe: DistillConfig) -> None:
    with pytest.raises(ValueError, match=match):
        replace(recipe, **change)


def test_sampling_leaves_the_callers_random_state_usable(recipe: DistillConfig) -> None:
    distill(replace(recipe, limit=2))
    assert not torch.is_inference_mode_enabled()


def test_mixture_and_limit(recipe: DistillConfig, tmp_path: Path) -> None:
    only_b = distill(replace(recipe, mixture={"a": 0.0}, output=str(tmp_path / "b")))
    assert [r["source"] for r in rows_of(only_b)] == ["b", "b"]
    assert len(rows_of(distill(replace(recipe, limit=5, output=str(tmp_path / "five"))))) == 5


def test_the_limit_is_of_all_files_as_its_help_says(recipe: DistillConfig, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"turns": ["One more"]}\n{"turns": ["And one"]}\n')
    prompts = [str(tmp_path / "more.jsonl"), *recipe.prompts]
    assert len(rows_of(distill(replace(recipe, prompts=prompts, limit=5)))) == 5
    said = " ".join(CliRunner().invoke(app, ["distill", "--help"]).stdout.split())
    assert "that fit, of all files together" in said and "of each file" not in said


def test_excluded_prompts_are_left_out(
    recipe: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {r["id"] for r in rows_of(distill(recipe))}
    (tmp_path / "eval.jsonl").write_text('{"turns": ["question  0"]}\n{"turns": ["ho"]}\n{"turns": ["hi ho"]}\n')
    exclude = [str(tmp_path / "eval.jsonl")]
    rows = rows_of(distill(replace(recipe, exclude=exclude, output=str(tmp_path / "clean"))))
    assert len(rows) == 40 and {r["id"] for r in rows} < asked
    assert "2 prompts dropped for an overlap with 1 prompt files" in capsys.readouterr().out


def test_long_prompts_are_left_out(recipe: DistillConfig, target: Target) -> None:
    assert all(len(r["prompt_ids"]) <= 14 for r in rows_of(distill(replace(recipe, max_prompt_tokens=14))))
    with pytest.raises(UserError, match="No usable prompt"):
        distill(replace(recipe, max_new_tokens=target.max_context, output=recipe.output + "2"))


@pytest.mark.parametrize(
    "content", ['{"turns": ["mine"]}\n', '{"turns": ["mine"]}', "my notes\n", "my notes", '{"id": 3}\n']
)
def test_other_files_are_not_touched(content: str, recipe: DistillConfig) -> None:
    Path(recipe.output).parent.mkdir()
    Path(recipe.output).write_text(content)
    refused(distill, recipe)
    assert Path(recipe.output).read_text() == content


def test_row_without_a_question(recipe: DistillConfig) -> None:
    with Path(recipe.prompts[0]).open("a") as file:
        file.write('{"messages": [{"role": "assistant", "content": "Hello"}]}\n')
    assert "line 44: neither `turns` nor `messages`" in refused(distill, recipe)
    assert not Path(recipe.output).exists()


def test_target_without_chat_template(recipe: DistillConfig, tmp_path: Path) -> None:
    assert "chat template" in refused(distill, replace(recipe, target=str(build_target(tmp_path / "raw", chat=False))))
