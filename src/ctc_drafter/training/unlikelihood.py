"""Teach a small target not to run in circles: sequence-level unlikelihood (Welleck et al. 2020).

The model answers training prompts greedily; where more than half of an answer repeats itself, each token that completes
an n-gram already written is made less likely, -log(1 - p). A batch of the corpus in every step keeps the language
intact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ..errors import UserError
from ..loops import ends_in_loop
from .answers import batched_answers
from .optim import clip_gradients, fp32_masters, gradients_to_masters, masters_to_model

NGRAM = 4


def repeated(tokens: list[int], n: int = NGRAM) -> list[bool]:
    """Whether each token completes an n-gram that occurred before it."""
    seen: set[tuple[int, ...]] = set()
    out = []
    for i in range(len(tokens)):
        gram = tuple(tokens[max(0, i - n + 1) : i + 1])
        out.append(len(gram) == n and gram in seen)
        seen.add(gram)
    return out


def unlikelihood(
    model: Any,
    questions: Sequence[list[int]],
    language_loss: Callable[[int], torch.Tensor],
    *,
    stop_id: int,
    steps: int,
    batch: int,
    max_new_tokens: int,
    lr: float,
    weight: float,
    progress: Progress,
    log: Path,
) -> list[dict[str, float]]:
    """Fine-tune `model` (bf16, with fp32 masters) in place on its greedy answers to the `questions` (ids).

    `language_loss(step)` is the corpus loss of a batch. Returns, for every tenth step, the share of answers that looped
    and both losses; also written to `log`. Raises UserError before a step whose loss or gradient is not finite.
    """
    masters = fp32_masters(model)
    optimizer = torch.optim.AdamW(masters.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    task = progress.add_task("unlikelihood", total=steps)
    history: list[dict[str, float]] = []
    looped, seen, mean = 0, 0, 0.0
    for step in range(steps):
        group = [questions[(step * batch + i) % len(questions)] for i in range(batch)]
        answers = batched_answers(model, group, pad=stop_id, stop_ids=[stop_id], max_new_tokens=max_new_tokens)
        bad = [(q, a) for q, a in zip(group, answers) if sum(repeated(a)) > len(a) / 2]
        looped, seen = looped + sum(map(ends_in_loop, answers)), seen + batch
        for rate in optimizer.param_groups:
            rate["lr"] = lr * min(1.0, (step + 1) / 10, (steps - step) / max(1, steps // 3))
        loss = language_loss(step)
        mean += loss.item() / 10
        if bad:
            loss = loss + weight * _repetition_loss(model, bad) * len(bad) / batch
        loss.backward()
        gradients_to_masters(model, masters)
        _, wrong = clip_gradients(masters.values(), loss)
        if wrong:
            raise UserError(f"The {wrong} against loops is not finite at step {step}; lower unlikelihood_lr.")
        optimizer.step()
        masters_to_model(model, masters)
        progress.update(task, advance=1, description=f"unlikelihood, {looped / seen:.0%} of answers loop")
        if (step + 1) % 10 == 0:
            history.append({"step": step + 1, "looped": round(looped / seen, 4), "loss": round(mean, 4)})
            log.write_text(json.dumps(history))
            looped, seen, mean = 0, 0, 0.0
    return history


def _repetition_loss(model: Any, pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean -log(1 - p) over the repeated tokens of looping answers."""
    width = max(len(q) + len(a) for q, a in pairs)
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    marks = torch.zeros(len(pairs), width, dtype=torch.bool)
    for i, (question, answer) in enumerate(pairs):
        ids[i, : len(question) + len(answer)] = torch.tensor(question + answer)
        marks[i, len(question) : len(question) + len(answer)] = torch.tensor(repeated(answer))
    ids, marks = ids.to(model.device), marks.to(model.device)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][marks[:, 1:]]
    log_p = model.lm_head(hidden).float().log_softmax(-1).gather(1, ids[:, 1:][marks[:, 1:]][:, None])[:, 0]
    return -torch.log1p(-log_p.exp().clamp_max(1 - 1e-4)).mean()
