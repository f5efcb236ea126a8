"""What requests may say: pydantic models of the bodies, strict, and a reason in words for what is not supported."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from .errors import ApiError

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_LOG_PROBS = 20
LEAST_TEMPERATURE = 1e-4
"""Below it sampling is greedy up to ties, and logits divided by it would overflow; so it is done greedily."""


def _refuse(message: str) -> NoReturn:
    raise PydanticCustomError("value", "{message}", {"message": message})


# ---------------------------------------------------------------- parts with several forms


def _stop(value: Any) -> Any:
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        _refuse("must be a string or a list of strings, none of them empty")
    if len(stops) > MAX_STOPS or any(len(s) > MAX_STOP_LENGTH for s in stops):
        _refuse(f"may hold up to {MAX_STOPS} strings of up to {MAX_STOP_LENGTH} characters")
    return stops


def _content(value: Any) -> Any:
    """The text of a message, given as such or as parts of type text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        _refuse("must be a string or a list of parts {'type': 'text', 'text': ...}")
    texts = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            _refuse("must hold parts {'type': 'text', 'text': ...}")
        if part["type"] != "text":
            _refuse(f"holds a part of type '{part['type'][:40]}', but the model reads text only")
        if not isinstance(part.get("text"), str):
            _refuse("holds a part of type text whose text is not a string")
        texts.append(part["text"])
    return "".join(texts)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(t) is int for t in value)


def _prompts(value: Any) -> Any:
    """A list of prompts, each a text or token ids."""
    if isinstance(value, str) or _is_ids(value):
        value = [value]
    if not isinstance(value, list) or not value or not all((isinstance(p, str) and p) or _is_ids(p) for p in value):
        _refuse("must be a text, token ids, or a list of either, none of them empty")
    return value


_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_PARTS = {"type": "array", "items": {"type": "object", "properties": {"type": {"const": "text"}}}}
_IDS = {"type": "array", "items": {"type": "integer"}}
_PROMPT = {"anyOf": [{"type": "string"}, _IDS, {"type": "array", "items": {"anyOf": [{"type": "string"}, _IDS]}}]}

Stop = Annotated[list[str], BeforeValidator(_stop), WithJsonSchema({"anyOf": [*_TEXTS["anyOf"], {"type": "null"}]})]
Content = Annotated[str, BeforeValidator(_content), WithJsonSchema({"anyOf": [{"type": "string"}, _PARTS]})]
Prompts = Annotated[list[str | list[int]], BeforeValidator(_prompts), WithJsonSchema(_PROMPT)]
Number = Annotated[float, Field(allow_inf_nan=False)]


# ---------------------------------------------------------------- bodies


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class Extension(_Strict):
    """The field `ctc_drafter`: which drafter to use, and what to tell of every step."""

    model_config = ConfigDict(strict=True, extra="forbid")

    drafter: str | None = None
    """Name of one of the server's drafters; `none` is plain decoding."""
    steps: bool = False
    """Send a chunk for every step, with what the drafter had guessed of it."""
    tree: bool = False
    """Put the draft tree into it too."""


class StreamOptions(_Strict):
    include_usage: bool | None = None


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None
    """Handed to the chat template, which may know it."""

    @model_validator(mode="before")
    @classmethod
    def _empty_answer(cls, value: Any) -> Any:
        """An answer without text, as clients send it back, is an empty one."""
        if isinstance(value, dict) and value.get("role") == "assistant" and value.get("content", 0) is None:
            return {**value, "content": ""}
        return value


class Body(_Strict):
    """What chat and text completions share."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.1, le=10)] | None = None
    stop_token_ids: list[int] | None = None
    return_token_ids: bool | None = None
    ctc_drafter: Extension | None = None

    @property
    def length(self) -> int | None:
        """The longest answer that the request asks for, in tokens."""
        return self.max_tokens

    @property
    def log_probs(self) -> int | None:
        """How many of the most probable tokens to name beside each token; None: no probabilities."""
        raise NotImplementedError


class ChatRequest(Body):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOG_PROBS)] | None = None

    @property
    def log_probs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def length(self) -> int | None:
        given = [n for n in (self.max_tokens, self.max_completion_tokens) if n is not None]
        return min(given, default=None)


class CompletionRequest(Body):
    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOG_PROBS)] | None = None

    @property
    def log_probs(self) -> int | None:
        return self.logprobs


# ---------------------------------------------------------------- what is not supported

HARMLESS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
"""Accepted and without effect here, as their meaning allows."""

Neutral = Callable[[Any], bool]
_off: Neutral = lambda value: value is False  # noqa: E731
_zero: Neutral = lambda value: type(value) in (int, float) and value == 0  # noqa: E731
_empty: Neutral = lambda value: value in ([], {}, "")  # noqa: E731
_no_tools: Neutral = lambda value: value in ("none", "auto")  # noqa: E731
_PENALTY = "the loop knows repetition_penalty only"
_TOOLS = "the server does not parse tool calls"

UNSUPPORTED: dict[str, tuple[Neutral, str]] = {
    "frequency_penalty": (_zero, _PENALTY),
    "presence_penalty": (_zero, _PENALTY),
    "logit_bias": (_empty, "the decoding loop takes no bias"),
    "top_logprobs": (_zero, "it belongs to chat completions; here `logprobs` is the number"),
    "prompt_logprobs": (_off, "the prompt is read, not scored"),
    "echo": (_off, "the prompt is not sent back"),
    "suffix": (_empty, "the model continues texts and does not fill gaps"),
    "best_of": (lambda value: value == 1 and type(value) is int, "answers are not ranked"),
    "tools": (_empty, _TOOLS),
    "tool_choice": (_no_tools, _TOOLS),
    "parallel_tool_calls": (lambda value: isinstance(value, bool), _TOOLS),
    "functions": (_empty, _TOOLS),
    "function_call": (_no_tools, _TOOLS),
    "response_format": (lambda value: value == {"type": "text"}, "answers are free text"),
    "modalities": (lambda value: value == ["text"], "the model writes text only"),
    "store": (_off, "the server stores nothing"),
    "service_tier": (lambda value: value in ("auto", "default"), "there is one tier"),
    "stream_options.include_obfuscation": (_off, "chunks are not padded"),
    "ignore_eos": (_off, "an answer ends where the model ends it"),
    "skip_special_tokens": (lambda value: value is True, "special tokens are never part of the text"),
}
"""Known fields that only a value without effect may have, and why."""


def check_extra(body: BaseModel, place: str = "") -> None:
    """Raise ApiError for the first field that would have an effect which the server does not give it."""
    for name, value in (body.model_extra or {}).items():
        param = place + name
        if value is None or param in HARMLESS:
            continue
        neutral, why = UNSUPPORTED.get(param, (None, ""))
        if neutral is None:
            raise ApiError(400, f"Unknown field '{param[:80]}'; remove it.", param=param[:80], code="unknown_parameter")
        if not neutral(value):
            raise ApiError(
                400, f"'{param}' is not supported: {why}; remove it.", param=param, code="unsupported_parameter"
            )


def _check_message(message: Message, place: str) -> None:
    for name, value in (message.model_extra or {}).items():
        if value not in (None, [], {}):  # the SDK sends back refusal, tool_calls, annotations, ... of an answer
            param = f"{place}.{name[:80]}"
            raise ApiError(
                400, f"'{param}' is not supported in messages; remove it.", param=param, code="unsupported_parameter"
            )


# ---------------------------------------------------------------- reading


def parse_json(content: bytes) -> Any:
    """The JSON value in a body. Raises ApiError, also for NaN, infinities and half characters."""

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(content.decode("utf-8"), parse_constant=constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(
            400, "The body holds half of a surrogate pair (\\ud800 to \\udfff alone).", code="invalid_json"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise ApiError(400, f"The body is not JSON: {reason}.", code="invalid_json") from None
    return value


def parse_body(kind: type[Body], content: bytes) -> Any:
    """A body as an instance of `kind`. Raises ApiError with one sentence about the first thing that is wrong."""
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_type")
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = _place(first["loc"])
        what = {"missing": "is missing", "extra_forbidden": "is not known"}.get(first["type"], first["msg"])
        message = f"'{param}' {what[:1].lower() + what[1:]}."
        raise ApiError(400, message, param=param, code=_code(first["type"])) from None
    check_extra(body)
    if body.stream_options is not None:
        check_extra(body.stream_options, "stream_options.")
        if not body.stream:
            raise ApiError(400, "'stream_options' is for streams only; set stream.", param="stream_options")
    if isinstance(body, ChatRequest):
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "'top_logprobs' needs logprobs; set it to true.", param="top_logprobs")
        for i, each in enumerate(body.messages):
            _check_message(each, f"messages[{i}]")
    return body


def _place(loc: tuple[int | str, ...]) -> str:
    out = ""
    for part in loc:
        out += f"[{part}]" if isinstance(part, int) else f".{part[:80]}" if out else part[:80]
    return out


def _code(kind: str) -> str:
    if kind == "missing":
        return "missing_required_parameter"
    return "invalid_type" if kind.endswith("_type") else "invalid_value"
