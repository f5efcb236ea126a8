"""From steps to replies: what each choice says so far, whole replies and chunks in OpenAI's shapes."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .. import __version__
from ..bench.measure import Answer, tau_of
from ..logprobs import LogProb
from ..steps import Step
from ..target import Target
from .scheduler import Submission
from .text import AnswerText, Piece
from .tokens import Offsets, TokenTexts, Told
from .trees import tree_nodes


@dataclass(frozen=True)
class Call:
    """A request, checked: `n` choices for each of the prompts."""

    kind: Literal["chat", "text"]
    model: str
    drafter: str
    prompts: list[list[int]]
    n: int
    stop: list[str]
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    log_probs: bool = False
    steps: bool = False
    tree: bool = False


@dataclass(frozen=True)
class Said:
    """What one step added to a choice."""

    index: int
    step: Step
    pieces: list[Piece]
    finish: str | None
    at: float
    """time.monotonic() of the step."""
    told: list[Told]
    """Log probabilities of the tokens whose text is certain now, if they were asked for."""

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


class Choice:
    """One of the answers of a call."""

    def __init__(self, target: Target, stop: Sequence[str]) -> None:
        self._text, self._offsets = AnswerText(target.tokenizer, stop), Offsets(target)
        self.answer = Answer()
        self.text = ""
        self.finish: str | None = None
        self.told: list[Told] = []
        """Log probabilities of the tokens that the text consists of."""
        self._held: list[Told] = []

    def add(self, step: Step) -> list[Piece]:
        """Count a step; returns the text that it made certain."""
        self.answer.add(step)
        pieces = self._text.push(step)
        self.text += "".join(piece.text for piece in pieces)
        self.finish = "stop" if self._text.stopped else step.finish
        if step.log_probs:
            self._tell(step.log_probs)
        return pieces

    def _tell(self, probs: list[LogProb]) -> None:
        """Tell of tokens as their text becomes certain, so that none is told which a stop string cuts off."""
        self._held += self._offsets.push(probs)
        whole = self.finish is not None and not self._text.stopped
        certain = [each for each in self._held if whole or each.offset < len(self.text)]
        self.told += certain
        self._held = self._held[len(certain) :]


class Reply:
    """The answers to a call while they come in."""

    def __init__(self, call: Call, target: Target) -> None:
        self.call, self._target = call, target
        self.choices = [Choice(target, call.stop) for _ in range(len(call.prompts) * call.n)]
        prefix = {"chat": "chatcmpl", "text": "cmpl"}[call.kind]
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": call.model,
            "system_fingerprint": f"ctc-drafter-{__version__}",
        }

    async def follow(self, submission: Submission) -> AsyncIterator[Said]:
        """Count the events of the submission and pass them on as text; a stop string ends its choice."""
        async for event in submission:
            choice = self.choices[event.index]
            before = len(choice.told)
            pieces = choice.add(event.step)
            if choice.finish is not None and event.step.finish is None:
                submission.cancel(event.index)
            yield Said(event.index, event.step, pieces, choice.finish, event.at, choice.told[before:])

    # ------------------------------------------------------------ whole replies

    def whole(self) -> dict[str, Any]:
        """The reply without streaming."""
        chat = self.call.kind == "chat"
        choices = []
        for i, choice in enumerate(self.choices):
            content: dict[str, Any] = {"text": choice.text}
            if chat:
                content = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            told = self._log_probs(choice.told)
            content |= {"index": i, "logprobs": told, "finish_reason": choice.finish}
            if self.call.return_token_ids:
                content["token_ids"] = choice.answer.tokens
                content["prompt_token_ids"] = self._prompt(i)
            choices.append(content)
        kind = "chat.completion" if chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens, and under `draft` what drafting did for them: verification steps, accepted tokens, tau.

        Every token that the target chose counts, the end token and those of a stop string too.
        """
        answers = [choice.answer for choice in self.choices]
        prompt = sum(len(ids) for ids in self.call.prompts)
        written = sum(len(answer.tokens) for answer in answers)
        steps = sum(len(answer.accepted) for answer in answers)
        tau = tau_of(written, sum(bool(answer.tokens) for answer in answers), steps)
        draft = {
            "drafter": self.call.drafter,
            "steps": steps,
            "accepted": sum(sum(answer.accepted) for answer in answers),
            "tau": None if tau is None else round(tau, 4),
        }
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "draft": draft,
        }

    # ------------------------------------------------------------ chunks

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first text: in a chat the role of every choice."""
        if self.call.kind == "text":
            return []
        return [
            self._chunk([self._choice(i, {"delta": {"role": "assistant", "content": ""}})])
            for i in range(len(self.choices))
        ]

    def chunk(self, said: Said) -> dict[str, Any] | None:
        """The chunk of a step, None if it has nothing to tell."""
        chat, text = self.call.kind == "chat", said.text
        if not (text or said.finish or self.call.steps or self.call.return_token_ids or said.told):
            return None
        content: dict[str, Any] = {"delta": {"content": text} if text else {}} if chat else {"text": text}
        choice = self._choice(said.index, content, said.finish)
        choice["logprobs"] = self._log_probs(said.told)
        if self.call.return_token_ids:
            choice["token_ids"] = said.step.tokens
        chunk = self._chunk([choice])
        if self.call.steps:
            chunk["ctc_drafter"] = self._step(said)
        return chunk

    def closing(self) -> list[dict[str, Any]]:
        """The usage, if it was asked for."""
        return [{**self._chunk([]), "usage": self.usage()}] if self.call.include_usage else []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.call.kind == "chat" else "text_completion"
        chunk = {**self._head, "object": kind, "choices": choices}
        return {**chunk, "usage": None} if self.call.include_usage else chunk

    def _choice(self, index: int, content: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": finish}

    def _log_probs(self, told: list[Told]) -> dict[str, Any] | None:
        if not self.call.log_probs:
            return None
        tokens = TokenTexts(self._target)
        return tokens.of_chat(told) if self.call.kind == "chat" else tokens.of_text(told)

    def _step(self, said: Said) -> dict[str, Any]:
        """What the extension tells of a step; `pieces` join to the text of the chunk."""
        step = said.step
        told: dict[str, Any] = {
            "index": said.index,
            "tokens": len(step.tokens),
            "accepted": step.accepted,
            "drafted": step.drafted,
            "prefill": "prefill" in step.seconds,
            "seconds": round(sum(step.seconds.values()), 6),
            "pieces": [list(piece) for piece in said.pieces],
        }
        if self.call.tree and step.tree is not None:
            told["tree"] = tree_nodes(step, self._target.tokenizer)
        return told

    def _prompt(self, index: int) -> list[int]:
        return self.call.prompts[index // self.call.n]
