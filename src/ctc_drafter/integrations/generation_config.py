"""What transformers' `generate` has prepared, in the words of the loop; what has no exact counterpart is refused."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..acceptance import Sampling
from ..errors import UserError

FIELDS: dict[type, tuple[str, str]] = {
    RepetitionPenaltyLogitsProcessor: ("penalty", "repetition_penalty"),
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}
"""Processor: its attribute and the field of Sampling, in the order in which Sampling applies them."""

CACHES = ("past_key_values", "cache")
"""How transformers calls the cache: before 5.24, and since."""
IGNORED = {"use_cache", "logits_to_keep", "cache_position", "attention_mask", "position_ids", *CACHES}
"""Inputs of the model that the target makes itself; mask, positions and cache are checked."""


def check_mode(model: Any, config: Any) -> None:
    """Raise UserError for a way of generating that is not one greedy or sampled continuation."""
    if model.config.is_encoder_decoder:
        raise UserError("An encoder-decoder model cannot be drafted for; only causal language models can.")
    mode = str(config.get_generation_mode().value)
    if mode not in ("greedy_search", "sample"):
        raise UserError(f"Generation mode '{mode}' cannot be drafted; only greedy search and sampling can.")
    if config.return_dict_in_generate:
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(config, name, None):
                raise UserError(f"'{name}' cannot be given: the loop hands out tokens only.")
    if config.cache_implementation == "quantized":
        raise UserError("A quantized cache changes the text and is not supported; leave cache_implementation out.")


def check_model_inputs(inputs: dict[str, Any]) -> None:
    """Raise UserError for model inputs beside the text, and for a cache that holds text already or is to be filled."""
    for name, value in inputs.items():
        if name not in IGNORED and value is not None and value is not False:
            raise UserError(
                f"Model input '{name}' cannot be used with a drafter; only input_ids and attention_mask can."
            )
    for name in CACHES:
        cache = inputs.get(name)
        if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0):
            raise UserError(
                "A cache of your own (past_key_values) cannot be used with a drafter; pass the whole text each time."
            )


def prompts_of(input_ids: torch.Tensor, inputs: dict[str, Any]) -> list[list[int]]:
    """The rows of input_ids (B, P) without their left padding, which attention_mask (B, P) tells.

    Raises UserError for other masks, for empty rows, and for position_ids that do not count the tokens from 0.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise UserError("A drafter needs input_ids with at least one token; inputs_embeds cannot be used.")
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    positions = inputs.get("position_ids")
    prompts = []
    for row, (ids, seen) in enumerate(zip(input_ids, mask.bool().to(input_ids.device))):
        count = int(seen.sum())
        if count == 0 or not bool(seen[-count:].all()):
            raise UserError(f"Row {row} is empty or not padded on the left; use padding_side='left'.")
        if positions is not None:
            own = positions.expand(len(input_ids), -1)[row, -count:]
            if not torch.equal(own, torch.arange(count, device=own.device, dtype=own.dtype)):
                raise UserError("position_ids of your own cannot be used with a drafter; leave them out.")
        prompts.append(ids[-count:].tolist())
    return prompts


def sampling_of(processors: Any, do_sample: bool, padding: list[int]) -> Sampling:
    """What the prepared logits processors say. Raises UserError for one that the loop does not have.

    padding: how much each prompt has on the left, where the repetition penalty of the loop does not look.
    """
    values: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0}
    order = list(FIELDS)
    last = -1
    for processor in processors:
        kind = type(processor)
        if kind not in FIELDS or order.index(kind) <= last or not _is_plain(processor, padding):
            raise UserError(f"{kind.__name__} cannot be honoured exactly with a drafter; leave out what asks for it.")
        last = order.index(kind)
        attribute, name = FIELDS[kind]
        if name != "repetition_penalty" and not do_sample:
            raise UserError(f"{kind.__name__} is for sampling; pass do_sample=True, or leave it out.")
        values[name] = float(getattr(processor, attribute)) if name != "top_k" else int(getattr(processor, attribute))
    return Sampling(**values)


def _is_plain(processor: Any, padding: list[int]) -> bool:
    """Whether it drops tokens altogether, keeps at least one, and looks at the whole prompt but not at its padding."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, torch.Tensor):
        ignored = ignored.tolist()
    return (
        getattr(processor, "filter_value", -torch.inf) == -torch.inf
        and getattr(processor, "min_tokens_to_keep", 1) == 1
        and (type(processor) is not RepetitionPenaltyLogitsProcessor or (ignored or [0] * len(padding)) == padding)
    )
