"""Answers of a model to many prompts at once, by its own batched generate."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch


@torch.inference_mode()
def batched_answers(
    model: Any,
    prompts: list[list[int]],
    *,
    pad: int,
    stop_ids: Collection[int],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[list[int]]:
    """Token ids of one answer to each prompt (token ids), its stop token included; temperature 0 is greedy.

    Prompts are padded with `pad` on the left. Other settings of the model's own generation_config are switched off:
    what they ask for is not what a drafter is measured on.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    if temperature > 0:
        sampling |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": None}
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=sorted(stop_ids) or None,
        **sampling,
    )
    answers = []
    for row in out[:, width:].tolist():
        end = next((i + 1 for i, t in enumerate(row) if t in stop_ids), len(row))
        answers.append(row[:end])
    return answers
