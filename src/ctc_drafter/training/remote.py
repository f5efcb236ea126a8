"""The target's answers from an OpenAI-compatible server (vLLM, SGLang, ...): no weights are loaded here.

Prompts go out as token ids (`/completions`) or as messages (`/chat/completions`). vLLM and SGLang return the token ids
of the answer when asked by `return_token_ids`; from other servers the text comes back and is tokenized again.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from ..environment import key_in
from ..errors import UserError
from ..target import EMBEDDED, stop_ids
from ..target.loading import check_folder, target_name
from .client import Refused, Server, Stopped
from .data import Prompt

if TYPE_CHECKING:
    from .distill import DistillConfig

OPTIONAL = {"top_p", "top_k", "min_p", "repetition_penalty", "return_token_ids", "stop_token_ids", "seed"}
"""Fields of a request that are left out for a server that refuses them by name."""


@dataclass
class Tally:
    """What a run should tell at its end."""

    written: int = 0
    unsure: int = 0
    """Answers whose text does not give back the tokens that the server generated."""
    other_prompts: int = 0
    """Prompts that the server rendered differently from the target's own chat template."""
    refused: int = 0
    last_refusal: str = ""
    unsupported: set[str] = field(default_factory=set)
    """Request options that the server does not know."""

    def sentences(self) -> list[str]:
        """What is worth a line, if anything."""
        out = []
        if self.unsure:
            out.append(
                f"{self.unsure:,} of {self.written:,} answers do not survive decoding and encoding, so their token ids "
                "may differ from the generated ones."
            )
        if self.other_prompts:
            out.append(
                f"{self.other_prompts:,} of {self.written:,} prompts were rendered differently by the server's "
                "chat template."
            )
        if self.refused:
            out.append(f"{self.refused:,} prompts were left out; of the last the server said: {self.last_refusal}.")
        if self.unsupported:
            out.append(f"The server does not know {', '.join(sorted(self.unsupported))}; it used its own settings.")
        return out


class RemoteTarget:
    """A target that runs elsewhere: its tokenizer and config here, its answers from `config.api_base`."""

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        path = EMBEDDED / "target" if config.target is None else config.target
        options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
        if Path(path).is_dir():
            check_folder(Path(path))
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, **options)
            whole = AutoConfig.from_pretrained(path, **options)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"The tokenizer of '{path}' cannot be loaded: {reason}") from None
        try:
            generation = GenerationConfig.from_pretrained(path)
        except Exception:  # many models have none
            generation = None
        text = whole.get_text_config()
        self.vocab_size = max(text.vocab_size, len(self.tokenizer))
        self.stop_ids = stop_ids(SimpleNamespace(config=whole, generation_config=generation), self.tokenizer)
        self.server = Server(config.api_base or "", key_in(config.api_key_env), config.request_timeout)
        self.model, served_context = self._choose_model(target_name(path))
        self.max_context = min(getattr(text, "max_position_embeddings", None) or 2**20, served_context or 2**20)
        self.tally = Tally()
        self._lock = threading.Lock()

    def _choose_model(self, name: str) -> tuple[str, int | None]:
        """Name of the model at the server, and its context there if the server tells."""
        wanted, listed = self.config.api_model, self.server.models()
        if not listed:
            if wanted is None:
                raise UserError(f"The server at {self.server.base} lists no models; name one with --api-model.")
            return wanted, None
        models = {m["id"]: m.get("max_model_len") for m in listed}
        own = {self.config.target or name, name}
        fits = [m for m in models if m in own or m.rsplit("/", 1)[-1] == name]
        chosen = wanted or (next(iter(models)) if len(models) == 1 else fits[0] if len(fits) == 1 else None)
        if chosen is None or chosen not in models:
            known = ", ".join(f"'{m}'" for m in sorted(models)[:20])
            problem = "several models" if chosen is None else f"no model '{chosen}'"
            raise UserError(f"The server at {self.server.base} has {problem}; give one of {known} with --api-model.")
        context = models[chosen]
        return chosen, context if isinstance(context, int) and context > 0 else None

    def answers(self, prompts: Iterable[Prompt]) -> Generator[list[dict[str, Any]]]:
        """Rows of a distilled data set in the order in which the answers come, `config.concurrency` at a time."""
        jobs, results = iter(prompts), queue.SimpleQueue[Any]()
        self.server.stopped.clear()

        def work() -> None:
            try:
                while not self.server.stopped.is_set():
                    with self._lock:
                        prompt = next(jobs, None)
                    if prompt is None:
                        break
                    results.put(self._answer(prompt))
            except Stopped:
                pass
            except BaseException as error:
                results.put(error)
            results.put(None)

        # Daemons, for Ctrl-C must not wait for replies that may take minutes.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(self.config.concurrency)]
        for thread in threads:
            thread.start()
        try:
            running = len(threads)
            while running:
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                running -= result is None
                if isinstance(result, dict):
                    yield [result]
                elif isinstance(result, str):
                    self._note_refusal(result)
        finally:
            self.server.stopped.set()

    def _note_refusal(self, reason: str) -> None:
        """A bad prompt is left out; if too many come before the first answer, the request itself must be wrong."""
        self.tally.refused += 1
        self.tally.last_refusal = reason
        if self.tally.refused > 2 * self.config.concurrency:
            self.check_answered()

    def check_answered(self) -> None:
        """Raise UserError if the server has refused all prompts."""
        if self.tally.refused and not self.tally.written:
            raise UserError(f"The server at {self.server.base} refuses to answer: {self.tally.last_refusal}.")

    def _answer(self, prompt: Prompt) -> dict[str, Any] | str:
        """The finished row, or why there is none."""
        path = "/chat/completions" if self.config.api_chat else "/completions"
        while True:
            body = self._body(prompt)
            try:
                reply = self.server.request(path, body)
            except Refused as error:
                named = {key for key in OPTIONAL & body.keys() if key in str(error)}
                if error.status in (400, 422) and named:
                    self.tally.unsupported |= named
                    continue
                if error.status in (404, 405):
                    raise UserError(
                        f"{self.server.base}{path} cannot be used: {error} (status {error.status})."
                    ) from None
                return str(error)
            return self._row(prompt, reply, path)

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        config = self.config
        body: dict[str, Any] = {"model": self.model, "max_tokens": config.max_new_tokens}
        body |= {"messages": prompt.messages} if config.api_chat else {"prompt": prompt.ids}
        # All that a server would otherwise take from the model's generation_config.
        body |= {"temperature": config.temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        body |= {"return_token_ids": True, "stop_token_ids": sorted(self.stop_ids)}
        if config.temperature > 0:
            body["seed"] = (int(prompt.key, 16) + config.seed) % 2**31
        return {key: value for key, value in body.items() if key not in self.tally.unsupported}

    def _row(self, prompt: Prompt, reply: dict[str, Any], path: str) -> dict[str, Any] | str:
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] if self.config.api_chat else choice["text"]
            ids, usage = choice.get("token_ids"), reply.get("usage") or {}
            asked = choice.get("prompt_token_ids") or reply.get("prompt_token_ids")
            counts = usage.get("completion_tokens"), usage.get("prompt_tokens")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self.server.malformed(path, "holds no answer") from None
        if ids is None and not isinstance(text, str):
            return "an answer came without text"
        if not all(_is_ids(value) for value in (ids, asked) if value is not None):
            raise self.server.malformed(path, "holds token ids that are none")
        wrong = [t for t in (ids or []) + (asked or []) if not 0 <= t < self.vocab_size]
        if wrong:
            raise UserError(
                f"The server at {self.server.base} gave token {wrong[0]}, which '{self.tokenizer.name_or_path}' does "
                "not have; does it run the same model?"
            )
        answer, sure = self._tokens(ids, text, counts[0])
        answer += self._missing_stop(choice, answer)
        self._count(sure, asked == prompt.ids if asked else counts[1] in (None, len(prompt.ids)))
        return prompt.row(answer, self.tokenizer.decode(answer, skip_special_tokens=True), asked)

    def _tokens(self, ids: list[int] | None, text: str | None, generated: int | None) -> tuple[list[int], bool]:
        """Token ids of the answer, and whether they are known to be those that the server generated."""
        if ids is not None:
            end = next((i + 1 for i, t in enumerate(ids) if t in self.stop_ids), len(ids))
            said = self.tokenizer.decode(ids, skip_special_tokens=True)
            return ids[:end], (text or "").strip() in said  # a parser of the server may have taken parts out of it
        encoded = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        same_length = generated in (None, len(encoded), len(encoded) + 1)  # the stop token counts
        return encoded, same_length and self.tokenizer.decode(encoded, skip_special_tokens=True) == text

    def _missing_stop(self, choice: dict[str, Any], answer: list[int]) -> list[int]:
        """[stop token] if the answer was ended by one and does not hold it."""
        if choice.get("finish_reason") != "stop" or not self.stop_ids or (answer and answer[-1] in self.stop_ids):
            return []
        for stop in (choice.get("stop_reason"), choice.get("matched_stop"), self.tokenizer.eos_token_id):
            if isinstance(stop, int) and stop in self.stop_ids:
                return [stop]
        return [min(self.stop_ids)]

    def _count(self, sure: bool, own_prompt: bool) -> None:
        with self._lock:
            self.tally.written += 1
            self.tally.unsure += not sure
            self.tally.other_prompts += not own_prompt


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in value)
