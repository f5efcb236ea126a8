"""Reading data, and the masks that say what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ctc_drafter.chat import prompt_ids
from ctc_drafter.errors import UserError
from ctc_drafter.training.data import Exclusion, chat_ids, copies, example_key
from helpers import tokenizer

# ---------------------------------------------------------------- chats

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many apples?"},
    {"role": "assistant", "content": "6 apples."},
    {"role": "user", "content": "And dogs?"},
    {"role": "assistant", "content": "The dog. One."},
]
WITHOUT_MARKS = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def trained_text(tok: Any, ids: list[int], mask: list[int]) -> list[str]:
    """The maximal runs of trained tokens, as text."""
    runs: list[list[int]] = []
    for i, (token, m) in enumerate(zip(ids, mask)):
        if m and (i == 0 or not mask[i - 1]):
            runs.append([])
        if m:
            runs[-1].append(token)
    return [tok.decode(run) for run in runs]


@pytest.fixture(params=["generation marks", "nesting"])
def chatty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    tok = tokenizer()
    if request.param == "nesting":
        monkeypatch.setattr(tok, "chat_template", WITHOUT_MARKS)
    return tok


def test_only_answers_are_trained(chatty: Any) -> None:
    ids, mask = chat_ids(chatty, CHAT)
    assert ids == list(chatty.apply_chat_template(CHAT, return_dict=True)["input_ids"])
    assert len(ids) == len(mask) and set(mask) == {0, 1}
    assert trained_text(chatty, ids, mask) == ["6 apples.<|end|>", "The dog. One.<|end|>"]


def test_a_prompt_is_the_beginning_of_its_chat(chatty: Any) -> None:
    ids, mask = chat_ids(chatty, CHAT[:3])
    prompt = prompt_ids(chatty, CHAT[:2])
    assert ids[: len(prompt)] == prompt and mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))


def test_chat_without_an_answer(chatty: Any) -> None:
    with pytest.raises(UserError, match="no assistant token"):
        chat_ids(chatty, CHAT[:2])


def test_template_that_rewrites_earlier_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    tok = tokenizer()
    rewriting = "{{ messages | length }}" + WITHOUT_MARKS
    monkeypatch.setattr(tok, "chat_template", rewriting)
    with pytest.raises(UserError, match="rewrites earlier turns"):
        chat_ids(tok, CHAT)


def test_no_template(monkeypatch: pytest.MonkeyPatch) -> None:
    tok = tokenizer()
    monkeypatch.setattr(tok, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        chat_ids(tok, CHAT)


# ---------------------------------------------------------------- splits


def test_answers_to_one_prompt_share_a_key() -> None:
    one, two = {"messages": CHAT[1:3]}, {"messages": [CHAT[1], CHAT[4]]}
    assert example_key(one) == example_key(two) != example_key({"text": "How many?"})


def test_copies_meet_their_rate() -> None:
    rows = [{"text": str(i)} for i in range(2000)]
    for rate in (0.0, 0.25, 1.0, 2.5):
        counts = [copies(r, rate) for r in rows]
        assert set(counts) <= {int(rate), int(rate) + 1}
        assert sum(counts) / len(rows) == pytest.approx(rate, abs=0.05)


# ---------------------------------------------------------------- exclusion

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts)]}


@pytest.fixture
def exclusion(tmp_path: Path) -> Exclusion:
    path = tmp_path / "eval.jsonl"
    system = {"role": "system", "content": "Be brief."}
    rows = [{"turns": [LONG, "Why?"]}, {"turns": ["What is  2+2?"]}, {"turns": ["Tell a joke.", LONG]}]
    rows += [{"messages": [system, *chat("Who are you?", "Nobody.")["messages"]]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Exclusion([path])


@pytest.mark.parametrize(
    ("row", "dropped"),
    [
        ({"text": f"Before. {LONG.upper()} after."}, True),
        (chat("Hello", f"He said: {LONG.replace(' ', chr(10))}"), True),
        ({"text": " ".join(LONG.split()[:12])}, False),  # only twelve words, and not the whole prompt
        (chat("what is 2+2?", "4"), True),
        (chat("Hi", "Hello", "WHAT IS\n2+2?", "4"), True),
        ({"text": "What is 2+2?"}, True),
        ({"text": "What is 2+2? It is 4."}, False),
        (chat("Please: what is 2+2?", "4"), False),
        (chat("2+2", "What is 2+2?"), False),  # the answer is no question
        (chat("Tell a joke.", "No."), True),  # the first of several turns
        (chat("Why?", "Because."), False),  # a later one, which anybody may ask
        (chat("Who are you?", "A model."), True),
        ({"messages": [{"role": "system", "content": "Be brief."}, *chat("Hi", "Hi")["messages"]]}, False),
    ],
)
def test_excluded_prompts(row: dict[str, Any], dropped: bool, exclusion: Exclusion) -> None:
    assert exclusion.dropped_by(row) is dropped


def test_no_exclusion_drops_nothing() -> None:
    assert not Exclusion([]).dropped_by({"text": ""}) and not Exclusion([]).dropped_by({"text": LONG})


def test_exclusion_files_need_questions(tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text('{"turns": ["fine"]}\n{"text": "What?"}\n')
    with pytest.raises(UserError, match="line 2: neither `turns` nor `messages`"):
        Exclusion([tmp_path / "eval.jsonl"])
