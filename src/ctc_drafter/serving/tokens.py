"""Tokens with their log probabilities in OpenAI's two shapes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..logprobs import LogProb
from ..streaming import HALF, TextStream
from ..target import Target


def _byte_of() -> dict[str, int]:
    """Byte-level BPE writes each byte as a character: itself if it can be seen, else one of those from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = _byte_of()


class Told(NamedTuple):
    """A token's log probabilities, and how many characters of its answer come before it."""

    prob: LogProb
    offset: int


class Offsets:
    """Places the tokens of one answer in its text. End tokens are no part of that and are left out."""

    def __init__(self, target: Target) -> None:
        self._stream, self._ends = TextStream(target.tokenizer), target.stop_ids
        self._length = 0

    def push(self, probs: Sequence[LogProb]) -> list[Told]:
        """The next tokens; those of one character all begin where it does."""
        told = []
        for prob in probs:
            if prob.token not in self._ends:
                told.append(Told(prob, self._length))
            self._length += len(self._stream.push([prob.token]))
        return told


class TokenTexts:
    """Names tokens by their own text, or, where that is part of a character, by their bytes: `bytes:\\xe2\\x82`."""

    def __init__(self, target: Target) -> None:
        self._tokenizer = target.tokenizer

    def of_chat(self, told: Sequence[Told]) -> dict[str, Any]:
        """As in chat completions."""
        content = []
        for each in told:
            top = [self._entry(token, value) for token, value in each.prob.top]
            content.append(self._entry(each.prob.token, each.prob.value) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def of_text(self, told: Sequence[Told]) -> dict[str, Any]:
        """As in completions, where the chosen token stands among the top ones even if others are more probable."""
        top = []
        for prob, _ in told:
            top.append({self._name(t): v for t, v in reversed(prob.top)} | {self._name(prob.token): prob.value})
        return {
            "tokens": [self._name(each.prob.token) for each in told],
            "token_logprobs": [each.prob.value for each in told],
            "top_logprobs": top,
            "text_offset": [each.offset for each in told],
        }

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        own = self._bytes(token)
        return {"token": self._name(token), "logprob": value, "bytes": None if own is None else list(own)}

    def _name(self, token: int) -> str:
        text, own = self._text(token), self._bytes(token)
        if HALF not in text or own is None:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)

    def _text(self, token: int) -> str:
        """A token's text behind another token: at the beginning of a text some tokenizers leave out its space."""
        once, twice = (str(self._tokenizer.decode([token] * count)) for count in (1, 2))
        return once if HALF in once else twice[len(once) :]

    def _bytes(self, token: int) -> bytes | None:
        """None where a token is part of a character and the vocabulary does not tell its bytes."""
        text = self._text(token)
        if HALF not in text:
            return text.encode()
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if match := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes([int(match[1], 16)])
        return bytes(BYTE_OF[c] for c in piece) if all(c in BYTE_OF for c in piece) else None
