"""Chats into token ids through the tokenizer's own template; what goes wrong there is said in one sentence."""

from __future__ import annotations

from typing import Any

from .errors import UserError


def check_template(tokenizer: Any) -> None:
    """Raise UserError if the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"The tokenizer of '{tokenizer.name_or_path}' has no chat template; give plain text (--raw), "
            "or rows of `text` to train on."
        )


def render_chat(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Any:
    """`apply_chat_template` as a dict with `input_ids`. Raises UserError where the template refuses the messages."""
    check_template(tokenizer)
    try:
        # What is too long for a context is said by us; transformers would warn of it where nothing is passed on.
        quietly = {"verbose": False}
        return tokenizer.apply_chat_template(messages, return_dict=True, tokenizer_kwargs=quietly, **options)
    except Exception as error:  # templates raise what they like, jinja2's errors among it
        reason = " ".join(str(error).split())[:200]
        roles = ", ".join(dict.fromkeys(m["role"] for m in messages))
        raise UserError(
            f"The chat template of '{tokenizer.name_or_path}' cannot render messages of {roles}: {reason}"
        ) from None


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a chat with the generation prompt. Raises UserError without a chat template that takes it."""
    return list(render_chat(tokenizer, messages, add_generation_prompt=True)["input_ids"])
