"""From data files to drafting problems: sequences, the batch of a step, anchors and labels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from ..drafters.base import IGNORE
from ..errors import UserError
from ..jsonl import read_jsonl
from ..target import Target
from .config import TrainConfig
from .data import SPLIT, chat_ids, example_key, messages_of, text_key

Problems = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""ids (B, T), anchors (B, A), labels (B, A, L) and possible (B, T), as `make_problems` describes them."""


@dataclass
class Sequence:
    """Token ids, and a mask with 1 on the answer's tokens."""

    ids: list[int]
    mask: list[int]

    @property
    def prompt(self) -> list[int]:
        """The tokens before the answer; of a text without a question, its first half."""
        return self.ids[: self.mask.index(1) or len(self.ids) // 2]


def read_sequences(config: TrainConfig, target: Target) -> tuple[list[Sequence], list[Sequence]]:
    """Sequences to train on and held-out ones. Raises UserError for foreign rows and for less than one batch."""
    train_set: list[Sequence] = []
    held: list[Sequence] = []
    limit = min(config.max_tokens, target.max_context)
    for path in config.data:
        for line, row in read_jsonl(path):
            sequence, key = _sequence(row, target, f"{path}, line {line}")
            sequence = Sequence(sequence.ids[:limit], sequence.mask[:limit])
            if any(root and label for root, label in zip(sequence.mask[1:], sequence.mask[2:])):
                (held if key % SPLIT < config.held_out * SPLIT else train_set).append(sequence)
    if len(train_set) < config.batch:
        raise UserError(
            f"{', '.join(config.data)}: {len(train_set)} usable sequences, fewer than one batch of {config.batch}."
        )
    return train_set, held


def _sequence(row: dict[str, Any], target: Target, where: str) -> tuple[Sequence, int]:
    """A row as a sequence, and the hash of its prompt, by which all rows of one prompt go to one side of the split."""
    if "prompt_ids" in row and "answer_ids" in row:
        prompt, answer = _ids(row["prompt_ids"], where), _ids(row["answer_ids"], where)
        ids, mask = prompt + answer, [0] * len(prompt) + [1] * len(answer)
        own = re.fullmatch("[0-9a-f]{16}", str(row.get("id")))  # what `distill` writes is the prompt's hash
        key = int(own[0], 16) if own else text_key(str(prompt))
    elif "messages" in row:
        messages_of(row, where)
        try:
            ids, mask = chat_ids(target.tokenizer, row["messages"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        key = example_key(row)
    elif isinstance(row.get("text"), str):
        ids = list(target.tokenizer(row["text"], verbose=False)["input_ids"])
        mask, key = [1] * len(ids), example_key(row)
    else:
        raise UserError(f"{where}: expected prompt_ids and answer_ids, messages, or text.")
    if max(ids, default=0) >= target.vocab_size:
        raise UserError(f"{where}: token {max(ids)} is outside the vocabulary of '{target.name}'.")
    return Sequence(ids, mask), key


def _ids(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise UserError(f"{where}: prompt_ids and answer_ids must be lists of token ids.")
    return value


def answer_counts(sequences: list[Sequence], vocab_size: int) -> torch.Tensor:
    """How often each token occurs in the answers: (V,)."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for sequence in sequences:
        answer = torch.tensor(sequence.ids)[torch.tensor(sequence.mask, dtype=torch.bool)]
        counts += torch.bincount(answer, minlength=vocab_size)
    return counts


def batch_of(sequences: list[Sequence], step: int, config: TrainConfig) -> list[Sequence]:
    """The step's sequences, of similar length; the order follows from the seed alone, so that resuming repeats it."""
    per_epoch = len(sequences) // config.batch
    epoch, index = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed((config.seed * 1000 + epoch) % 2**64)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    window = 16 * config.batch
    start = index // 16 * window
    near = sorted(order[start : start + window], key=lambda i: len(sequences[i].ids))
    first_step = step - index % 16  # of this window
    generator = torch.Generator().manual_seed((config.seed + first_step) % 2**64)
    place = torch.randperm(len(near) // config.batch, generator=generator)
    first = int(place[index % 16]) * config.batch
    return [sequences[i] for i in near[first : first + config.batch]]


def make_problems(sequences: list[Sequence], anchors: int, labels: int, generator: torch.Generator) -> Problems:
    """Pad sequences and draw anchors: ids (B, T), anchors (B, A), labels (B, A, L) with -100 past the end.

    Anchor t: tokens up to t are read, t+1 is the root, t+2.. are the labels; root and first label lie in the answer.
    The last of the four, (B, T) bool, marks all positions that could be anchors.
    """
    width = max(len(s.ids) for s in sequences)
    ids = torch.zeros(len(sequences), width + labels + 2, dtype=torch.long)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    for i, s in enumerate(sequences):
        ids[i, : len(s.ids)] = torch.tensor(s.ids)
        valid[i, : len(s.ids)] = torch.tensor(s.mask, dtype=torch.bool)
    possible = (valid[:, 1:-1] & valid[:, 2:])[:, :width]
    # Without replacement where the answer is long enough; short answers repeat some of theirs.
    short = possible.sum(-1) < anchors
    chosen = torch.empty(len(sequences), anchors, dtype=torch.long)
    for group, repeats in ((~short, False), (short, True)):
        if group.any():
            drawn = torch.multinomial(possible[group].float(), anchors, replacement=repeats, generator=generator)
            chosen[group] = drawn
    index = chosen[..., None] + 2 + torch.arange(labels)
    rows = torch.arange(len(sequences))[:, None, None]
    target_labels = ids[rows, index].masked_fill(~valid[rows, index].cumprod(-1).bool(), IGNORE)
    return ids[:, :width], chosen, target_labels, possible


def split_problems(problems: Problems, parts: int) -> list[Problems]:
    """Deal the sequences out to `parts` groups in turn, so that long and short ones are spread evenly."""
    ids, anchors, labels, possible = problems
    return [(ids[i::parts], anchors[i::parts], labels[i::parts], possible[i::parts]) for i in range(parts)]
