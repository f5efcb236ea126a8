"""What a model is loaded from, onto which device and in which dtype."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import WEIGHTS
from ..jsonl import read_object

GENERATION = "generation_config.json"
OPTIONAL = (GENERATION, "tokenizer_config.json", f"{WEIGHTS}.index.json")
"""Files of a model's folder that may be absent."""


def target_name(path: str | Path) -> str:
    """The name by which drafters know their target: a folder's own name, or the hub name."""
    return Path(path).resolve().name if Path(path).exists() else str(path)


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises UserError for a device torch does not have."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Device '{device}' cannot be used: {str(error).splitlines()[0]}") from None
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)  # clocks and memory counters read the current device
    return where


def resolve_dtype(dtype: str, device: torch.device) -> Any:
    """torch dtype for a name; `auto` is float32 on a CPU and the checkpoint's own elsewhere."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    names |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in names:
        raise UserError(f"Unknown dtype '{dtype}'; use auto, float32, bfloat16 or float16.")
    return names[dtype]


def check_folder(path: Path) -> None:
    """Raise UserError if `path` does not look like the folder of a Hugging Face model, or a JSON file of it is damaged.

    transformers takes a damaged generation_config.json for an absent one, and the stop tokens that it names are lost.
    """
    missing = f"Folder '{path}' has no config.json, so it is not a Hugging Face model."
    config = read_object(path / "config.json", missing)
    if "speculators_config" in config:
        raise UserError(f"'{path}' is a drafter, not a target; pass it with --drafter.")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            stop_tokens(part.get("eos_token_id"), f"'{path / 'config.json'}'")
    for name in OPTIONAL:
        if (path / name).exists():
            content = read_object(path / name, then="; restore it")
            if name == GENERATION:
                stop_tokens(content.get("eos_token_id"), f"'{path / name}'")


def stop_tokens(value: Any, where: str) -> list[int]:
    """The ids that an `eos_token_id` names. Raises UserError, with `where` it stands, if that is no id, ids or None."""
    ids = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids):
        raise UserError(
            f"{where} has the eos_token_id {repr(value)[:80]}, which must be a token id, a list of them or null; "
            "correct it, as answers end there."
        )
    return [int(i) for i in ids]
