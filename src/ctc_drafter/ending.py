"""Where an answer ends: at a stop id, after a stop string, at the token limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import UserError
from .target import Target


class Ending:
    """Cuts new tokens at a stop id, a stop string, or the token limit, and says which."""

    def __init__(self, target: Target, stop: Sequence[str], limit: int) -> None:
        self.limit = limit
        self._target = target
        self._stop = [s for s in stop if s]
        # Readers see no special tokens, so only a stop string that names one is sought in the text that has them.
        self._special = [s for s in self._stop if any(name in s for name in _special_tokens(target.tokenizer))]
        self._tokens: list[int] = []
        # A token holds at least one byte, and a stop string may begin inside an earlier token.
        self._window = max((len(s.encode()) for s in self._stop), default=0) + 8

    @classmethod
    def of(cls, target: Target, prompt_ids: list[int], max_new_tokens: int, stop: Sequence[str]) -> Ending:
        """The ending of an answer to this prompt. Raises UserError if it is empty or leaves no room in the context."""
        if not prompt_ids:
            raise UserError("The prompt is empty; give at least one token.")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
        room = target.max_context - len(prompt_ids)
        if room <= 0:
            raise UserError(
                f"The prompt has {len(prompt_ids)} tokens and "
                f"the context of '{target.name}' ends at {target.max_context}; shorten it."
            )
        return cls(target, stop, min(max_new_tokens, room))

    def cut(self, tokens: list[int]) -> tuple[list[int], str | None]:
        """The part of `tokens` that is emitted, and why generation ends there (None: it goes on)."""
        for i, token in enumerate(tokens, 1):
            self._tokens.append(token)
            if token in self._target.stop_ids or self._stopped():
                return tokens[:i], "stop"
            if len(self._tokens) >= self.limit:
                return tokens[:i], "length"
        return tokens, None

    def _stopped(self) -> bool:
        if not self._stop:
            return False
        tail, decode = self._tokens[-self._window :], self._target.tokenizer.decode
        shown = decode(tail, skip_special_tokens=True)
        if any(s in shown for s in self._stop):
            return True
        whole = decode(tail) if self._special else ""
        return any(s in whole for s in self._special)


def _special_tokens(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
