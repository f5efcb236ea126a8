"""Rows of training data, and chats and texts turned into token ids with a loss mask."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from ..chat import check_template, prompt_ids, render_chat
from ..errors import UserError
from ..jsonl import read_jsonl

OVERLAP = 13
"""Words in a row that a text may not share with an excluded prompt."""
SPLIT = 10_000
"""Rows are held out by their key's remainder after division by this."""


def messages_of(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    """The `messages` of a row, checked: a list of {role, content} texts. `where` names the row in errors."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: `messages` must be a list that is not empty.")
    for message in messages:
        fields = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not all(isinstance(field, str) for field in fields):
            raise UserError(f"{where}: each message needs a `role` and a `content`, both texts.")
    return messages


class Prompt(NamedTuple):
    """A question for the target, and the row that its answer becomes."""

    key: str
    """Its id in the distilled data set."""
    source: str
    messages: list[dict[str, str]]
    ids: list[int]
    """The chat with the generation prompt."""
    later: tuple[str, ...] = ()
    """Questions to ask after the answer, one after another."""

    def row(self, answer_ids: list[int], answer: str, prompt_ids: list[int] | None = None) -> dict[str, Any]:
        """One line of a distilled data set; `prompt_ids` are those that were answered, if not this prompt's own."""
        ids = self.ids if prompt_ids is None else prompt_ids
        return {"id": self.key, "source": self.source, "prompt_ids": ids, "answer_ids": answer_ids, "answer": answer}


def prompt_messages(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    """The first question of a row: its first turn, or its messages up to the first answer."""
    if "turns" in row:
        return [{"role": "user", "content": _turns(row, where)[0]}]
    messages: list[dict[str, str]] = []
    for message in messages_of(row, where) if "messages" in row else []:
        if message["role"] == "assistant":
            break
        messages.append(message)
    if not messages:
        raise UserError(f"{where}: neither `turns` nor `messages` that begin with a question.")
    return messages


def later_questions(row: dict[str, Any], where: str) -> list[str]:
    """The questions of a row after that of `prompt_messages`: its later turns, or what users say after an answer."""
    if "turns" in row:
        return _turns(row, where)[1:]
    after = dropwhile(lambda m: m["role"] != "assistant", messages_of(row, where))
    return [m["content"] for m in after if m["role"] == "user"]


def _turns(row: dict[str, Any], where: str) -> list[str]:
    turns = row["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise UserError(f"{where}: `turns` must be a list of texts that is not empty.")
    return turns


class Exclusion:
    """Prompts that may not be trained on: `dropped_by(row)` says whether a row holds one of them.

    A prompt is all its turns. Words are compared in lower case. A row holds a prompt if both share OVERLAP words in a
    row, or, for a shorter prompt (or first turn), if one of the row's questions, all of them together, or its whole
    text says the same.
    """

    def __init__(self, files: Iterable[str | Path]) -> None:
        self._grams: set[int] = set()
        self._short: set[tuple[str, ...]] = set()
        for path in files:
            for line, row in read_jsonl(path):
                where = f"{path}, line {line}"
                turns = _turns(row, where) if "turns" in row else _questions(prompt_messages(row, where))
                self._grams |= _ngrams(" ".join(turns))
                for words in (" ".join(turns).lower().split(), turns[0].lower().split()):
                    if 0 < len(words) < OVERLAP:
                        self._short.add(tuple(words))

    def dropped_by(self, row: dict[str, Any]) -> bool:
        """Whether a `messages` or `text` row overlaps."""
        if self._grams and not self._grams.isdisjoint(_ngrams(row_text(row))):
            return True
        if not self._short:
            return False
        asked = _questions(row["messages"]) if "messages" in row else [row["text"]]
        return any(tuple(text.lower().split()) in self._short for text in (*asked, " ".join(asked)))


def _questions(messages: list[dict[str, str]]) -> list[str]:
    return [m["content"] for m in messages if m["role"] == "user"] or [m["content"] for m in messages]


def _ngrams(text: str) -> set[int]:
    words = text.lower().split()
    return {hash(tuple(words[i : i + OVERLAP])) for i in range(len(words) - OVERLAP + 1)}


def text_key(text: str) -> int:
    """A stable 64-bit hash of a text; splits and samples are made by it, so that they survive any reordering."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def example_key(row: dict[str, Any]) -> int:
    """Hash of all messages before the first answer (or of the whole text): all answers to one prompt share it."""
    if "messages" not in row:
        return text_key(row["text"])
    messages = row["messages"]
    asked = list(takewhile(lambda m: m["role"] != "assistant", messages)) or messages[:1]
    if len(asked) == 1:
        return text_key(asked[0]["content"])
    return text_key(json.dumps([[m["role"], m["content"]] for m in asked]))


def row_text(row: dict[str, Any]) -> str:
    """All text of a `messages` or `text` row."""
    text: str = "\n".join(m["content"] for m in row["messages"]) if "messages" in row else row["text"]
    return text


def copies(row: dict[str, Any], rate: float) -> int:
    """How often a row is used at `rate` copies on average: the fraction is decided by the row's own hash."""
    return int(rate) + ((text_key(json.dumps(row)) % 10_000) / 10_000 < rate % 1)


def chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of a chat and its loss mask (1 on the assistant's tokens, the end-of-turn token included).

    The mask comes from the template's own `{% generation %}` marks; without them, from rendering the chat up to each
    answer (the generation prompt) and through it, which must nest. Raises UserError if no token would be trained.
    """
    check_template(tokenizer)
    if "{% generation" in str(tokenizer.chat_template) or "{%- generation" in str(tokenizer.chat_template):
        out = render_chat(tokenizer, messages, return_assistant_tokens_mask=True)
        ids, mask = list(out["input_ids"]), list(out["assistant_masks"])
    else:
        ids, mask = _ids_by_nesting(tokenizer, messages)
    if not any(mask):
        raise UserError("A chat has no assistant token to train on; check the chat template and the messages.")
    return ids, mask


def _ids_by_nesting(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    mask: list[int] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = prompt_ids(tokenizer, messages[:i])
        through = list(render_chat(tokenizer, messages[: i + 1])["input_ids"])
        if through[: len(before)] != before or before[: len(ids)] != ids:
            raise UserError(
                "The chat template rewrites earlier turns, so answers cannot be located; add generation marks."
            )
        mask += [0] * (len(before) - len(ids)) + [1] * (len(through) - len(before))
        ids = through
    return ids, mask
