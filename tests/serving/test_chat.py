"""The chat in the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ctc_drafter.acceptance import Sampling
from ctc_drafter.cli import app
from ctc_drafter.drafters import Drafter, NoDrafter
from ctc_drafter.errors import UserError
from ctc_drafter.serving import chat
from ctc_drafter.serving.chat import HELP, Conversation, talk
from ctc_drafter.target import Target
from live import text_of, tokens_of


def answer(target: Target, *texts: str) -> str:
    roles = ("user", "assistant")
    ids = target.prompt_ids([{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)])
    return text_of(target, tokens_of(target, NoDrafter(), ids, max_new_tokens=20))


def test_the_conversation_is_remembered_until_reset(target: Target, drafter: Drafter) -> None:
    conversation = Conversation(target, drafter, Sampling(), max_new_tokens=20)
    first = "".join(conversation.ask("Hello"))
    assert first == answer(target, "Hello")
    assert "".join(conversation.ask("And?")) == answer(target, "Hello", first, "And?")
    conversation.reset()
    assert "".join(conversation.ask("And?")) == answer(target, "And?")


def test_the_command_streams_answers_and_obeys_slashes(
    target: Target, target_folder: Path, drafter_folder: Path
) -> None:
    lines = "Hello\n\n/what\nAnd?\n/reset\nAnd?\n/exit\nnever asked\n"
    args = ["chat", "--target", str(target_folder), "--drafter", str(drafter_folder), "--max-new-tokens", "20"]
    result = CliRunner().invoke(app, args, input=lines)
    assert result.exit_code == 0, result.stderr
    first = answer(target, "Hello")
    want = [first, answer(target, "Hello", first, "And?"), answer(target, "And?")]
    assert result.stdout == "".join(f"{text}\n" for text in want)
    assert result.stderr.count("tokens/s, tau") == 3
    assert result.stderr.count("The conversation begins anew.") == 1
    assert result.stderr.count(HELP) == 2  # at the start, and for what is no command


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    target: Target, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(NoDrafter):
        count = 0

        def draft(self, *args: object) -> object:  # type: ignore[override]
            self.count += 1
            if self.count == 5:
                raise KeyboardInterrupt
            return args[0].device  # type: ignore[attr-defined]

    conversation = Conversation(target, Interrupted(), Sampling(), max_new_tokens=20)
    lines = iter(["Hello\n", None])
    monkeypatch.setattr(chat, "_read", lambda: next(lines))
    talk(conversation, stats=True)
    out, err = capsys.readouterr()
    said = conversation.messages[-1]["content"]
    assert said and answer(target, "Hello").startswith(said)
    assert out == said + "\n"
    assert "Stopped." in err
    assert "".join(conversation.ask("And?")) == answer(target, "Hello", said, "And?")


def test_a_conversation_that_outgrows_the_context_is_told_so(target: Target) -> None:
    conversation = Conversation(target, NoDrafter(), Sampling())
    with pytest.raises(UserError, match="/reset it"):
        list(conversation.ask("apple " * 400))
    assert conversation.messages == []
