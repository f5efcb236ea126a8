"""Train a drafter on a frozen target's features, computed online, at many anchors per sequence."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import from_mapping
from ..drafters import DRAFTERS, TrainableDrafter
from ..drafters.base import IGNORE
from ..environment import versions
from ..errors import UserError
from ..files import write_text
from ..target import Target
from .checkpoint import check_recipe, load_training_state, save_training_state
from .data import chat_ids, messages_of, read_jsonl, text_key
from .optim import learning_rate_factor, make_optimizers, set_learning_rates

FREE = {"output", "device", "steps", "decay", "checkpoint_every", "trust_remote_code"}
"""What may change between a run and its continuation."""


@dataclass
class TrainConfig:
    """Recipe of a drafter."""

    data: list[str]
    """JSONL files of `ctc-drafter distill`, or rows of `messages` or `text`."""
    output: str
    target: str | None = None
    """Model folder or hub name; None: the embedded target."""
    kind: str = "ctc"
    drafter: dict[str, Any] = field(default_factory=dict)
    """The drafter's own config, for `ctc` the fields of CTCConfig."""
    steps: int = 1000
    batch: int = 16
    """Sequences in a step."""
    anchors: int = 64
    """Drafting problems drawn from each sequence."""
    max_tokens: int = 512
    """Longer sequences are cut."""
    lr_matrix: float = 2e-3
    lr_other: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 50
    decay: int = 400
    """Last steps, over which the learning rate falls linearly to zero."""
    held_out: float = 0.01
    """Share of the sequences kept for the held-out figures."""
    checkpoint_every: int = 100
    dtype: str = "bfloat16"
    device: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.anchors, self.checkpoint_every, self.max_tokens) < 1:
            raise ValueError("steps, batch, anchors, checkpoint_every and max_tokens must be at least 1")
        if not 0 <= self.held_out < 1:
            raise ValueError("held_out is a share, at least 0 and below 1")


@dataclass
class _Sequence:
    ids: list[int]
    mask: list[int]


def train(config: TrainConfig, *, dry_run: bool = False) -> Path:
    """Run or resume the recipe; returns the drafter's folder. `dry_run` prints the plan and trains nothing."""
    console = Console(stderr=True)
    if config.kind not in DRAFTERS or not issubclass(DRAFTERS[config.kind], TrainableDrafter):
        raise UserError(f"There is no trainable drafter '{config.kind}'.")
    cls: Any = DRAFTERS[config.kind]
    target = Target.load(
        config.target, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code
    )
    torch.manual_seed(config.seed)
    drafter: TrainableDrafter = cls(from_mapping(cls.config_class, dict(config.drafter), "drafter"), target)
    drafter.to(target.device)
    target.capture(drafter.feature_layers)
    train_set, held_set = _sequences(config, target)
    counts = torch.zeros(target.vocab_size, dtype=torch.long)
    for sequence in train_set:
        answer = torch.tensor(sequence.ids)[torch.tensor(sequence.mask, dtype=torch.bool)]
        counts += torch.bincount(answer, minlength=target.vocab_size)
    drafter.fit_vocabulary(counts.to(target.device))
    _print_plan(console, config, target, drafter, train_set, held_set)
    if not dry_run:
        _optimize(config, target, drafter, train_set, held_set, console)
    return Path(config.output)


def _print_plan(
    console: Console,
    config: TrainConfig,
    target: Target,
    drafter: TrainableDrafter,
    train_set: list[_Sequence],
    held: list[_Sequence],
) -> None:
    console.print(
        f"target   {target.name}: {sum(p.numel() for p in target.model.parameters()):,} parameters, {target.dtype}"
    )
    console.print(
        f"drafter  {config.kind}: {drafter.num_parameters:,} parameters, features of layers {drafter.feature_layers}"
    )
    console.print(
        f"data     {len(train_set):,} sequences, {sum(len(s.ids) for s in train_set):,} tokens; {len(held)} held out"
    )
    console.print(
        f"plan     {config.steps} steps x {config.batch} sequences x {config.anchors} anchors -> {config.output}"
    )


# ---------------------------------------------------------------- data


def _sequences(config: TrainConfig, target: Target) -> tuple[list[_Sequence], list[_Sequence]]:
    train_set: list[_Sequence] = []
    held: list[_Sequence] = []
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
            sequence = _Sequence(ids[:limit], mask[:limit])
            if any(root and label for root, label in zip(sequence.mask[1:], sequence.mask[2:])):
                (held if key % 10_000 < config.held_out * 10_000 else train_set).append(sequence)
    if len(train_set) < config.batch:
        raise UserError(
            f"{', '.join(config.data)}: {len(train_set)} usable sequences, fewer than one batch of {config.batch}."
        )
    return train_set, held


def _batch(sequences: list[_Sequence], step: int, config: TrainConfig) -> list[_Sequence]:
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


def make_problems(
    sequences: list[_Sequence], anchors: int, labels: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
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


# ---------------------------------------------------------------- optimization


def _loss(
    config: TrainConfig, target: Target, drafter: TrainableDrafter, sequences: list[_Sequence], seed: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    problems = make_problems(sequences, config.anchors, drafter.proposed_labels, torch.Generator().manual_seed(seed))
    ids, anchors, labels, possible = (t.to(target.device) for t in problems)
    with torch.no_grad():
        _, features = target.forward(ids, use_cache=False, logits_to_keep=1)
    with torch.autocast(target.device.type, torch.bfloat16, enabled=target.dtype != torch.float32):
        return drafter.train_loss(features, ids, anchors, labels, possible)


def _optimize(
    config: TrainConfig,
    target: Target,
    drafter: TrainableDrafter,
    train_set: list[_Sequence],
    held: list[_Sequence],
    console: Console,
) -> None:
    output = Path(config.output)
    state = output.with_name(output.name + ".state")
    parameters = dict(drafter.named_parameters())
    optimizers = make_optimizers(parameters, config.lr_matrix, config.lr_other, config.weight_decay)
    start, history = 0, []
    check_recipe(output.with_name(output.name + ".recipe.json"), asdict(config), FREE)
    if state.exists():
        meta = load_training_state(state, parameters, optimizers)
        start, history = meta["step"], meta["history"]
    elif output.exists():
        raise UserError(f"'{output}' exists and has no training state beside it; choose another output folder.")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began, mean = time.time() - (history[-1]["seconds"] if history else 0.0), math.nan
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=config.steps, completed=start)
        for step in range(start, config.steps):
            factor = learning_rate_factor(step, config.steps, config.warmup, config.decay)
            set_learning_rates(optimizers, (config.lr_matrix, config.lr_other), factor)
            loss, _ = _loss(config, target, drafter, _batch(train_set, step, config), config.seed * 10**6 + step)
            if not math.isfinite(loss.item()):
                raise UserError(f"The loss is not finite at step {step}; the last good state is in '{state}'.")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
            progress.update(task, advance=1, description=f"training, loss {mean:.3f}")
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                row = {"step": step + 1, "loss": mean, **_held_out(config, target, drafter, held)}
                row["seconds"] = time.time() - began
                history.append({k: round(v, 4) for k, v in row.items()})
                progress.console.print("  ".join(f"{k} {v:g}" for k, v in history[-1].items()))
                save_training_state(state, parameters, optimizers, {"step": step + 1, "history": history})
    drafter.save_pretrained(output, {"training": {"history": history, "steps": config.steps}}, target.dtype)
    write_text(output / "run.yaml", yaml.safe_dump({"recipe": asdict(config), "versions": versions()}, sort_keys=False))
    write_text(output.with_name(output.name + ".history.json"), json.dumps(history, indent=1))


@torch.no_grad()
def _held_out(
    config: TrainConfig, target: Target, drafter: TrainableDrafter, held: list[_Sequence], limit: int = 4
) -> dict[str, float]:
    sums: dict[str, float] = {}
    count = 0
    for i in range(0, min(len(held), limit * config.batch), config.batch):
        loss, metrics = _loss(config, target, drafter, held[i : i + config.batch], i)
        count += 1
        for key, value in {"held_out": loss, **metrics}.items():
            sums[key] = sums.get(key, 0.0) + float(value)
    return {key: value / count for key, value in sums.items()}
