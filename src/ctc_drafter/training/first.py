"""The target that pretraining goes on from."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..errors import UserError
from ..jsonl import read_object
from ..target.loading import check_folder


def check_first(folder: Path) -> None:
    """Before any data is read: raise UserError if the folder does not look like that of a Llama."""
    check_folder(folder)
    kind = read_object(folder / "config.json").get("model_type")
    if kind != LlamaConfig.model_type:  # whose sizes transformers would not find, and take those of a Llama of 7B
        raise UserError(f"'{folder}' holds a model of type '{kind}', and init must name one of type 'llama'.")


def load_model(folder: Path) -> LlamaForCausalLM:
    """The model in a folder, in float32. Raises UserError if it cannot be read."""
    try:
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"The model in '{folder}' cannot be loaded ({reason}); restore its files.") from None
    return model
