"""A tiny model of a family with prompts of all lengths, and what its own generate answers to them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ctc_drafter.target import Target
from helpers import CAPABLE, CONTEXT, VOCAB, plain, save_model

from .tally import TALLY

TOKENS = 16
LENGTHS = (1, 2, 3, 5, 8, 12, 20, 33, 47, 56, CONTEXT - 2, CONTEXT - 1)
"""Of the prompts; the answers to the last ones are cut by the context's edge."""
ECHOING, UNTIED = ("gemma2", "gemma3_text"), {"tie_word_embeddings": False}
"""With random weights and tied embeddings these repeat the last token and nothing else."""
TRIES = 12
NEAR_TIE = 1e-4
"""Of the logits' spread; float32 rounds to about 1e-6 of it, whatever else is in the pass."""


@dataclass
class Family:
    """A target without stop tokens, and the cases that every drafter is asked."""

    kind: str
    target: Target
    cases: list[Case] = field(default_factory=list)

    @contextmanager
    def stopping_at(self, stop: int | None) -> Iterator[None]:
        """Meanwhile the target has this stop token."""
        self.target.stop_ids = frozenset() if stop is None else frozenset({stop})
        try:
            yield
        finally:
            self.target.stop_ids = frozenset()


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    answer: list[int]
    """The model's own, to the context's edge or TOKENS."""

    def until(self, stop: int | None, limit: int) -> tuple[list[int], str]:
        """The answer and its finish with a stop token and a limit."""
        end = self.answer.index(stop) + 1 if stop in self.answer else len(self.answer) + 1
        return (self.answer[:end], "stop") if end <= min(limit, len(self.answer)) else (self.answer[:limit], "length")


def build_family(kind: str, folder: Path) -> Family:
    config = {**CAPABLE[kind], **(UNTIED if kind in ECHOING else {})}
    target = Target.load(save_model(folder, kind, **config), dtype="float32", device="cpu")
    target.stop_ids = frozenset()
    family = Family(kind, target)
    family.cases = [case_of_length(family, length) for length in LENGTHS]
    return family


def case_of_length(family: Family, length: int, tokens: int = TOKENS) -> Case:
    """A prompt whose answer does not hang on rounding: at every token the two best logits are well apart.

    Of some prompts the first one with a lively answer is taken: models with tied embeddings like to repeat themselves.
    """
    rng = random.Random(f"{family.kind} {length}")
    target, liveliest = family.target, Case([], [])
    for _ in range(TRIES):
        prompt = prompt_of_length(length, rng)
        answer = plain(target, prompt, min(tokens, target.max_context - length))
        with torch.inference_mode():
            logits = target.model(torch.tensor([prompt + answer])).logits[0, length - 1 : -1]
        best = logits.topk(2).values
        if bool((best[:, 0] - best[:, 1] <= NEAR_TIE * logits.std(-1)).any()):
            TALLY.skipped += 1
        elif len(set(answer)) > len(set(liveliest.answer)):
            liveliest = Case(prompt, answer)
        if len(set(liveliest.answer)) >= min(5, len(answer)):
            break
    assert liveliest.prompt, "every answer hangs on rounding"
    return liveliest


def prompt_of_length(length: int, rng: random.Random) -> list[int]:
    """Any tokens, or few that repeat, which is where n-grams are found."""
    pool = [rng.randrange(2, VOCAB) for _ in range(3 if rng.random() < 0.5 else length)]
    return [rng.choice(pool) for _ in range(length)]
