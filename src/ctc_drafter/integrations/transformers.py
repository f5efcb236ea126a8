"""Drafted decoding behind `model.generate(..., custom_generate=...)` of transformers: the same ids, sooner.

    accelerated = custom_generate("my-drafter")
    ids = model.generate(**inputs, max_new_tokens=100, custom_generate=accelerated)

Whatever would change the text and cannot be honoured exactly is refused in words.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..acceptance import Sampling
from ..batch import Batch
from ..drafters import Drafter, folder_argument, load_drafter
from ..errors import UserError
from ..target import Target
from .generation_config import check_mode, check_model_inputs, prompts_of, sampling_of

Ids = list[int]


def custom_generate(drafter: str | Path, budget: int = 8) -> CustomGenerate:
    """A callable for the argument `custom_generate` of transformers' `generate`.

    drafter: a drafter folder made for the model, an embedded one by its name, `lookup` or `none`; with `+lookup` behind
    a folder or name, prompt lookup beside it. budget: draft nodes scored per step. The model is tested and the drafter
    loaded at the first call, and again if the weights change. Raises UserError for a budget below 0; the callable
    raises it for a model that cannot take a draft tree, a drafter that does not fit, and for options of `generate` that
    it cannot honour exactly.
    """
    if budget < 0:
        raise UserError(f"budget must be at least 0, not {budget}.")
    return CustomGenerate(folder_argument(drafter) if isinstance(drafter, Path) else drafter, budget)


class CustomGenerate:
    """What `custom_generate` returns. It serves one model and one call at a time."""

    def __init__(self, drafter: str, budget: int) -> None:
        self.drafter, self.budget = drafter, budget
        self._guest: Guest | None = None

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        token_streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by `generate` with what it has prepared: input_ids (B, P) -> ids (B, P + new), like `generate`'s own.

        token_streamer: what the argument `streamer` of `generate` is in other modes; `generate` hands that one to no
        callable, but every argument that only the callable knows.
        """
        check_mode(model, generation_config)
        check_model_inputs(model_kwargs)
        prompts = prompts_of(input_ids, model_kwargs)
        padding = [input_ids.shape[1] - len(ids) for ids in prompts]
        sampling = sampling_of(logits_processor, bool(generation_config.do_sample), padding)
        stops, limit, criteria = _endings(stopping_criteria, len(prompts))
        if token_streamer is not None and len(prompts) > 1:
            raise UserError("A streamer can follow one sequence only; give one prompt, or no streamer.")
        if self._guest is None or not self._guest.serves(model):
            self._guest = None  # first free what the old one holds
            self._guest = Guest(model, self.drafter)
        with self._guest.at_work() as (target, drafter):
            target.stop_ids = stops
            limit = target.max_context if limit is None else limit - input_ids.shape[1]
            _warn_at_edge(target, prompts, limit)
            batch = Batch(target, drafter, rows=len(prompts), budget=self.budget, adaptive=len(prompts) > 1)
            keys = [batch.add(ids, max_new_tokens=limit, sampling=_seeded(sampling)) for ids in prompts]
            answers = _run(batch, keys, input_ids, criteria, token_streamer)
        sequences: Any = _joined(input_ids, answers, generation_config._pad_token_tensor)
        return (
            GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences
        )


def generate_from(drafter: str | Path, budget: int, model: Any, arguments: dict[str, Any]) -> Any:
    """`model.generate(**arguments)`, drafted: what an exported folder calls with the arguments of `generate`.

    Here `streamer`, and `stop_strings` with `tokenizer`, work as in other modes; `generate` keeps them from a callable.
    """
    streamer, tokenizer = arguments.pop("streamer", None), arguments.pop("tokenizer", None)
    for name in ("assistant_model", "prefix_allowed_tokens_fn", "negative_prompt_ids"):
        if arguments.get(name) is not None:
            raise UserError(f"'{name}' cannot be used together with a drafter.")
    texts = arguments.pop("stop_strings", None)
    config = arguments.get("generation_config")
    if texts is None and config is not None:
        texts = config.stop_strings
    if texts is not None:
        if tokenizer is None:
            raise UserError("stop_strings need the model's tokenizer; pass it as `tokenizer`.")
        own = StopStringCriteria(tokenizer=tokenizer, stop_strings=texts)
        arguments["stopping_criteria"] = StoppingCriteriaList([*(arguments.get("stopping_criteria") or []), own])
        if config is not None and config.stop_strings is not None:
            arguments["generation_config"] = type(config).from_dict({**config.to_dict(), "stop_strings": None})
    if streamer is not None:
        arguments["token_streamer"] = streamer
    global _kept
    if _kept is None or (_kept.drafter, _kept.budget) != (str(drafter), budget):
        _kept = custom_generate(drafter, budget)
    return model.generate(custom_generate=_kept, **arguments)


_kept: CustomGenerate | None = None
"""The last one of `generate_from`, so that a model is not tested at every call; it keeps that model in memory."""


class Guest:
    """A target around a model that is the caller's: what we change in it is undone while we are not at work."""

    def __init__(self, model: Any, drafter: str) -> None:
        if model.training:
            raise UserError("The model is in training mode, where dropout changes the text; call model.eval() first.")
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            raise UserError("The model is spread over several devices; a drafter needs it on one.")
        self.model, self._state = model, _state_of(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        before = _changeable(model)
        try:
            self.target = Target.of(model, None, model.name_or_path or type(model).__name__)
            self.drafter = load_drafter(drafter, self.target)
            self._ours = _changeable(model)
        finally:
            _put(before)
            for parameter in trained:
                parameter.requires_grad_(True)

    def serves(self, model: Any) -> bool:
        """Whether this is the model, and its weights are those that were tested and packed."""
        return model is self.model and _state_of(model) == self._state

    @contextmanager
    def at_work(self) -> Iterator[tuple[Target, Drafter]]:
        """Lend target and drafter; the model is as it was before and afterwards."""
        if self.model.training:
            raise UserError("The model is in training mode, where dropout changes the text; call model.eval() first.")
        before = _changeable(self.model)
        try:
            _put(self._ours)
            yield self.target, self.drafter
        finally:
            with self.target.turn:
                self.target.capture(())
            _put(before)


Changeable = tuple[list[tuple[Any, str]], list[tuple[nn.Module, Any]]]


def _changeable(model: Any) -> Changeable:
    """What `Target` sets in a model: the attention of its configs, and the forward of its linear layers."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    attention = [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation")]
    return attention, [(m, m.__dict__.get("forward")) for m in model.modules() if type(m) is nn.Linear]


def _put(state: Changeable) -> None:
    for config, attention in state[0]:
        if config._attn_implementation != attention:
            config._attn_implementation = attention
    for module, forward in state[1]:
        if forward is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = forward


def _state_of(model: Any) -> int:
    """Changes whenever a weight is written in place, replaced, moved or converted."""
    return hash(tuple((p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in model.parameters()))


# ---------------------------------------------------------------- one call


def _endings(criteria: Any, rows: int) -> tuple[frozenset[int], int | None, StoppingCriteriaList]:
    """The stop ids, the longest sequence, and the criteria that are left to be asked after every token."""
    stops: set[int] = set()
    lengths: list[int] = []
    asked = StoppingCriteriaList()
    for one in criteria:
        if type(one) is EosTokenCriteria:
            stops.update(one.eos_token_id.flatten().tolist())
        elif type(one) is MaxLengthCriteria:
            lengths.append(one.max_length)
        elif rows > 1 and type(one) not in (StopStringCriteria, MaxTimeCriteria):
            raise UserError(f"{type(one).__name__} may look at the whole batch; use it with one prompt at a time.")
        else:
            asked.append(one)
    if rows > 1 and asked and not stops:
        raise UserError("Without an eos_token_id a batch cannot end row by row; give one, or one prompt at a time.")
    return frozenset(stops), min(lengths, default=None), asked


def _warn_at_edge(target: Target, prompts: list[Ids], limit: int) -> None:
    longest = max(map(len, prompts))
    if longest + limit > target.max_context:
        warnings.warn(
            f"The context of '{target.name}' ends at {target.max_context} tokens; an answer that reaches it ends there "
            f"({longest} tokens of prompt and {limit} new ones were asked for).",
            stacklevel=2,
        )


def _seeded(sampling: Sampling) -> Sampling:
    """With a seed from torch's global generator, so that `torch.manual_seed` decides, as it does in `generate`."""
    if sampling.temperature == 0:
        return sampling
    return Sampling(**{**vars(sampling), "seed": int(torch.randint(2**62, ()))})


def _run(batch: Batch, keys: Ids, input_ids: torch.Tensor, criteria: Any, streamer: Any) -> list[Ids]:
    """Step the batch until all rows have ended; the new tokens of each. Every token passes the criteria."""
    answers: dict[int, Ids] = {key: [] for key in keys}
    row_of = {key: row for key, row in zip(keys, input_ids)}
    if streamer is not None:
        streamer.put(input_ids.cpu())
    try:
        while len(batch):
            for key, step in batch.step():
                if step.error is not None:
                    raise step.error
                for token in step.tokens:
                    answers[key].append(token)
                    if streamer is not None:
                        streamer.put(torch.tensor([token]))
                    if criteria and _is_done(criteria, row_of[key], answers[key]):
                        batch.cancel(key)
                        break
    finally:
        for key in keys:
            batch.cancel(key)
        if streamer is not None:
            streamer.end()
    return [answers[key] for key in keys]


def _is_done(criteria: Any, prompt: torch.Tensor, answer: Ids) -> bool:
    text = torch.cat([prompt, torch.tensor(answer, device=prompt.device)])[None]
    return bool(torch.as_tensor(criteria(text, None)).any())


def _joined(input_ids: torch.Tensor, answers: list[Ids], pad: torch.Tensor | None) -> torch.Tensor:
    """(B, P + longest answer), the shorter ones padded on the right."""
    longest = max(map(len, answers))
    fill = 0 if pad is None else int(pad)
    rows = [answer + [fill] * (longest - len(answer)) for answer in answers]
    return torch.cat([input_ids, torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)], 1)
