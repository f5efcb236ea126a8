"""Tokens with their log probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..logprobs import LogProb
from ..target import Target

_HALF = "\ufffd"


class TokenTexts:
    """Names tokens by their own text. End tokens are no part of an answer's text and are left out."""

    def __init__(self, target: Target) -> None:
        self._decode = target.tokenizer.decode
        self._ends = target.stop_ids

    def of_chat(self, told: Sequence[LogProb]) -> dict[str, Any]:
        """As in chat completions."""
        content = []
        for each in self._inside(told):
            top = [self._entry(token, value) for token, value in each.top]
            content.append(self._entry(each.token, each.value) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def of_text(self, told: Sequence[LogProb]) -> dict[str, Any]:
        """As in completions; offsets are counted from the first of these tokens."""
        inside = self._inside(told)
        texts = [self._text(each.token) for each in inside]
        offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [each.value for each in inside],
            "top_logprobs": [{self._text(token): value for token, value in reversed(each.top)} for each in inside],
            "text_offset": offsets,
        }

    def _inside(self, told: Sequence[LogProb]) -> list[LogProb]:
        return [each for each in told if each.token not in self._ends]

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        text = self._text(token)
        # Where a token is part of a character, its bytes cannot be told from its text.
        return {"token": text, "logprob": value, "bytes": None if _HALF in text else list(text.encode())}

    def _text(self, token: int) -> str:
        return str(self._decode([token]))
