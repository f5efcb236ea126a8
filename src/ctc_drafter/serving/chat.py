"""A conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field

from ..acceptance import Sampling
from ..bench.measure import Answer, timed
from ..decoding import generate
from ..drafters import Drafter
from ..errors import UserError
from ..pace import Pace
from ..streaming import TextStream
from ..target import Target
from ..words import number

HELP = "/reset begins anew, /exit (or Ctrl-D) ends, Ctrl-C stops an answer."


@dataclass
class Conversation:
    """Messages so far, and who answers them."""

    target: Target
    drafter: Drafter
    sampling: Sampling
    budget: int = 8
    max_new_tokens: int = 512
    system: str | None = None
    pace: Pace | None = None
    """Chooses how much to draft; None: the budget."""
    messages: list[dict[str, str]] = field(default_factory=list)
    answer: Answer = field(default_factory=Answer)
    """The last answer's numbers."""

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str) -> Generator[str]:
        """Stream the answer. What was said of it is remembered, also if the reader stops; a refusal changes nothing.

        Raises UserError if the conversation has outgrown the context or the chat template refuses it.
        """
        question = {"role": "user", "content": text}
        ids = self.target.prompt_ids([*self.messages, question])
        if len(ids) >= self.target.max_context:
            raise UserError(
                f"The conversation has {len(ids)} tokens, but the context ends at {self.target.max_context}; /reset it."
            )
        self.answer = Answer()
        steps = generate(
            self.target,
            self.drafter,
            ids,
            max_new_tokens=self.max_new_tokens,
            budget=self.budget,
            sampling=self.sampling,
            pace=self.pace,
        )
        stream, said = TextStream(self.target.tokenizer), ""
        try:
            for step in timed(steps, self.answer, self.target):
                piece = stream.push(step.tokens)
                said += piece
                yield piece
            piece = stream.finish()
            said += piece
            yield piece
        finally:
            self.messages += [question, {"role": "assistant", "content": said}]


def talk(conversation: Conversation, stats: bool) -> None:
    """Read questions from standard input until it ends; prompts and numbers go to standard error."""
    _tell(f"{conversation.target.name} with drafter {conversation.drafter.name}. {HELP}")
    while (line := _read()) is not None:
        text = line.strip()
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            conversation.reset()
            _tell("The conversation begins anew.")
        elif text.startswith("/"):
            _tell(HELP)
        elif text:
            _answer(conversation, text, stats)


def _read() -> str | None:
    """The next line; None at the end of the input. Ctrl-C here ends the command, as everywhere."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
        try:
            return input("> ")
        except EOFError:
            _tell("")
            return None
    try:
        return sys.stdin.readline() or None
    except UnicodeDecodeError:
        raise UserError("Standard input is not UTF-8 text; convert it first.") from None


def _answer(conversation: Conversation, text: str, stats: bool) -> None:
    pieces = conversation.ask(text)
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except UserError as error:
        _tell(str(error))
        return
    except KeyboardInterrupt:
        pieces.close()  # remembers what was said
        print()
        _tell("Stopped.")
        return
    print(flush=True)
    answer = conversation.answer
    if stats:
        tau = "" if conversation.drafter.name == "none" else f", tau {number(answer.tau)}"
        _tell(f"[{len(answer.tokens)} tokens, {number(answer.tokens_per_second, 1)} tokens/s{tau}]")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
