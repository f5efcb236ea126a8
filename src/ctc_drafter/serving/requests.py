"""A parsed body against this server: names of model and drafter, token ids, room in the context, and its jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..acceptance import Sampling
from .answers import Call
from .errors import ApiError
from .protocol import LEAST_TEMPERATURE, Body, ChatRequest, CompletionRequest
from .scheduler import Job

if TYPE_CHECKING:
    from .app import Service

COMPLETION_TOKENS = 16
"""Longest answer of /v1/completions where the request does not say, as at OpenAI."""


SHRINKING = 4
"""How many characters of a text a tokenizer that normalizes may make one of, at most."""


def read_call(body: Body, service: Service) -> Call:
    """What the request asks for. Raises ApiError or UserError; takes as long as tokenizing does."""
    if body.model != service.name:
        raise ApiError(
            404,
            f"There is no model '{body.model[:80]}'; this is '{service.name}'.",
            param="model",
            code="model_not_found",
        )
    _check_stop_ids(body, service)
    extension, n = body.ctc_drafter, body.n or 1
    _check_count((len(body.prompt) if isinstance(body, CompletionRequest) else 1) * n, service)
    return Call(
        kind="chat" if isinstance(body, ChatRequest) else "text",
        model=service.name,
        drafter=_drafter(body, service),
        prompts=_prompts(body, service),
        n=n,
        stop=body.stop,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        return_token_ids=bool(body.return_token_ids),
        log_probs=body.log_probs is not None,
        steps=extension is not None and (extension.steps or extension.tree),
        tree=extension is not None and extension.tree,
    )


def jobs_of(call: Call, body: Body, service: Service) -> list[Job]:
    """One job for each choice; choice i of a prompt samples with seed + i, so that n choices differ and repeat."""
    longest = service.limits.max_new_tokens
    default = longest if call.kind == "chat" else COMPLETION_TOKENS
    asked = min(longest, default if body.length is None else body.length)
    jobs = []
    for ids in call.prompts:
        limit = min(asked, service.target.max_context - len(ids))
        jobs += [
            Job(ids, limit, _sampling(body, i), tuple(call.stop), call.drafter, body.log_probs) for i in range(call.n)
        ]
    return jobs


def _sampling(body: Body, choice: int) -> Sampling:
    temperature = 1.0 if body.temperature is None else body.temperature
    if body.top_p == 0:  # of all probability none, so the first token alone
        temperature = 0.0
    values: dict[str, Any] = {
        "temperature": 0.0 if temperature < LEAST_TEMPERATURE else temperature,
        "top_k": max(body.top_k or 0, 0),
        "top_p": body.top_p or 1.0,
        "min_p": body.min_p or 0.0,
        "repetition_penalty": 1.0 if body.repetition_penalty is None else body.repetition_penalty,
        "seed": None if body.seed is None else (body.seed + choice) % 2**63,
    }
    return Sampling(**values)


def _prompts(body: Body, service: Service) -> list[list[int]]:
    target = service.target
    if isinstance(body, ChatRequest):
        # `developer` is the newer name of `system`, which templates do not know yet.
        roles = {"developer": "system"}
        messages = [
            {"role": roles.get(m.role, m.role), "content": m.content, **({"name": m.name} if m.name else {})}
            for m in body.messages
        ]
        _check_length("messages", sum(len(m.content) for m in body.messages), service)
        return [_fitting(target.prompt_ids(messages), "messages", service)]
    assert isinstance(body, CompletionRequest)
    return [_fitting(_ids(prompt, service), "prompt", service) for prompt in body.prompt]


def _fitting(ids: list[int], param: str, service: Service) -> list[int]:
    if not ids:
        raise ApiError(400, f"'{param}' holds no tokens.", param=param, code="invalid_value")
    if len(ids) >= service.target.max_context:
        raise _too_long(param, f"{len(ids)} tokens", service)
    return ids


def _check_length(param: str, characters: int, service: Service) -> None:
    """Refuse what cannot fit before it is tokenized, which takes seconds for a text of megabytes."""
    if characters > SHRINKING * service.longest_token * service.target.max_context:
        raise _too_long(param, f"{characters} characters", service)


def _too_long(param: str, size: str, service: Service) -> ApiError:
    return ApiError(
        400,
        f"The prompt has {size}, but the context of {service.target.max_context} tokens must hold the answer too; "
        "shorten it.",
        param=param,
        code="context_length_exceeded",
    )


def _ids(prompt: str | list[int], service: Service) -> list[int]:
    if isinstance(prompt, str):
        _check_length("prompt", len(prompt), service)
        return list(service.target.tokenizer(prompt, verbose=False)["input_ids"])
    vocabulary = service.target.vocab_size
    wrong = next((t for t in prompt if not 0 <= t < vocabulary), None)
    if wrong is not None:
        raise ApiError(
            400,
            f"'prompt' holds a token id outside 0..{vocabulary - 1}.",
            param="prompt",
            code="invalid_value",
        )
    return prompt


def _check_count(count: int, service: Service) -> None:
    room = service.scheduler.slots + service.scheduler.queue
    if count > room:
        raise ApiError(
            400,
            f"The request asks for {count} answers at once, but slots and queue hold {room}; ask for fewer.",
            param="n",
            code="invalid_value",
        )


def _check_stop_ids(body: Body, service: Service) -> None:
    others = set(body.stop_token_ids or []) - service.target.stop_ids
    if others:
        raise ApiError(
            400,
            "'stop_token_ids' is not supported beyond the model's own end tokens; use 'stop'.",
            param="stop_token_ids",
            code="unsupported_parameter",
        )


def _drafter(body: Body, service: Service) -> str:
    name = body.ctc_drafter.drafter if body.ctc_drafter is not None else None
    if name is None:
        return service.drafter
    if name not in service.scheduler.drafters:
        known = ", ".join(service.scheduler.drafters)
        raise ApiError(
            400,
            f"There is no drafter '{name[:80]}' here; known are {known}.",
            param="ctc_drafter.drafter",
            code="invalid_value",
        )
    return name
