"""Token ids in, text out as it becomes certain: never half a character, never a re-spaced word."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"
"""What decoding yields for an incomplete UTF-8 sequence."""


class TextStream:
    """Incremental detokenisation: each `push` returns the text that the new tokens completed.

    A small window of earlier tokens is decoded again each time, since a token's text can depend on its left
    neighbours (leading spaces, bytes of one character spread over tokens). Special tokens have no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # of the window
        self._read = 0  # tokens whose text is out

    def push(self, tokens: list[int]) -> str:
        """Add tokens; return the text that is now certain (empty while a character is incomplete)."""
        self._ids += tokens
        before, after = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        if after.endswith(HALF) or len(after) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        """The text still held back, incomplete bytes as the replacement character."""
        before, after = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        self._start = self._read = len(self._ids)
        return after[len(before) :]

    def _decode(self, start: int, stop: int) -> str:
        text = self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=True)
        assert isinstance(text, str)
        return text
