"""From data files to drafting problems: sequences, the batch of a step, anchors and labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..drafters.base import IGNORE
from ..errors import UserError
from ..target import Target
from .config import TrainConfig
from .data import chat_ids, messages_of, read_jsonl, text_key

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
            if "prompt_ids" in row and "answer_ids" in row:
                ids, mask = (
                    row["prompt_ids"] + row["answer_ids"],
                    [0] * len(row["prompt_ids"]) + [1] * len(row["answer_ids"]),
                )
                key = text_key(str(row.get("id", line)))
            elif "messages" in row:
                messages = messages_of(row, f"{path}, line {line}")
                ids, mask = chat_ids(target.tokenizer, messages)
                key = text_key(messages[0]["content"])
            elif isinstance(row.get("text"), str):
                ids = list(target.tokenizer(row["text"], verbose=False)["input_ids"])
                mask, key = [1] * len(ids), text_key(row["text"])
            else:
                raise UserError(f"{path}, line {line}: expected prompt_ids and answer_ids, messages, or text.")
            if not ids:
                continue
            if max(ids) >= target.vocab_size:
                raise UserError(f"{path}, line {line}: token {max(ids)} is outside the vocabulary of '{target.name}'.")
            sequence = Sequence(ids[:limit], mask[:limit])
            if any(root and label for root, label in zip(sequence.mask[1:], sequence.mask[2:])):
                (held if key % 10_000 < config.held_out * 10_000 else train_set).append(sequence)
    if len(train_set) < config.batch:
        raise UserError(
            f"{', '.join(config.data)}: {len(train_set)} usable sequences, fewer than one batch of {config.batch}."
        )
    return train_set, held


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
    generator = torch.Generator().manual_seed(config.seed * 1000 + epoch)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    window = 16 * config.batch
    start = index // 16 * window
    near = sorted(order[start : start + window], key=lambda i: len(sequences[i].ids))
    first_step = step - index % 16  # of this window
    place = torch.randperm(len(near) // config.batch, generator=torch.Generator().manual_seed(config.seed + first_step))
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
    few = possible.sum(-1).min() < anchors
    chosen = torch.multinomial(possible.float(), anchors, replacement=bool(few), generator=generator)
    index = chosen[..., None] + 2 + torch.arange(labels)
    rows = torch.arange(len(sequences))[:, None, None]
    target_labels = ids[rows, index].masked_fill(~valid[rows, index].cumprod(-1).bool(), IGNORE)
    return ids[:, :width], chosen, target_labels, possible


def split_problems(problems: Problems, parts: int) -> list[Problems]:
    """Deal the sequences out to `parts` groups in turn, so that long and short ones are spread evenly."""
    ids, anchors, labels, possible = problems
    return [(ids[i::parts], anchors[i::parts], labels[i::parts], possible[i::parts]) for i in range(parts)]
