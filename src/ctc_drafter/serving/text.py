"""The text of an answer as its steps arrive: never half a character, never a piece of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..steps import Step
from ..streaming import TextStream


class Piece(NamedTuple):
    """A run of text, and whether its tokens were draft tokens that the target accepted."""

    text: str
    accepted: bool


class AnswerText:
    """Turns steps into pieces of text, cut before the first stop string.

    Text that may yet turn out to begin a stop string is held back. What comes out does not depend on how the tokens
    are grouped in steps, so drafted and plain answers are cut alike.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._stream = TextStream(tokenizer)
        self._stop = [s for s in stop if s]
        self._held: list[Piece] = []
        self.stopped = False
        """Whether a stop string has been met; nothing comes out after it."""

    def push(self, step: Step) -> list[Piece]:
        """The pieces that the step has made certain, neighbours of one kind merged."""
        out: list[Piece] = []
        for i, token in enumerate(step.tokens):
            out += self._add(self._stream.push([token]), i < step.accepted)
        if step.finish is not None:
            out += self._add(self._stream.finish(), False)
            out += self._release(0)
        return merged(out)

    def _add(self, text: str, accepted: bool) -> list[Piece]:
        if self.stopped or not text:
            return []
        self._held.append(Piece(text, accepted))
        held = "".join(piece.text for piece in self._held)
        places = [at for s in self._stop if (at := held.find(s)) >= 0]
        if places:
            self.stopped = True
            out = self._release(len(held) - min(places))
            self._held = []
            return out
        return self._release(max((_overlap(held, s) for s in self._stop), default=0))

    def _release(self, keep: int) -> list[Piece]:
        """Take all but the last `keep` characters out of what is held."""
        count = sum(len(piece.text) for piece in self._held) - keep
        out, left = [], []
        for text, accepted in self._held:
            out.append(Piece(text[: max(count, 0)], accepted))
            left.append(Piece(text[max(count, 0) :], accepted))
            count -= len(text)
        self._held = [piece for piece in left if piece.text]
        return [piece for piece in out if piece.text]


def merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece."""
    out: list[Piece] = []
    for piece in pieces:
        if out and out[-1].accepted == piece.accepted:
            out[-1] = Piece(out[-1].text + piece.text, piece.accepted)
        else:
            out.append(piece)
    return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((k for k in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:k])), 0)
