"""What a drafter needs of a target that another engine runs: its embedding and LM head, and a way to know it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import UserError
from ..target import Target
from ..target.loading import target_name


def borrow_target(
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_context: int,
    revision: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> Target:
    """A target that cannot run: of its weights only embedding and LM head are there, in `dtype` on `device`.

    Of every other parameter it holds the two values that `Target.probe` reads. path: a folder or a hub name;
    where the checkpoint names its parameters as transformers does, nothing else is read. Raises UserError if there is
    no checkpoint in safetensors that transformers can load.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        patterns = ["*.json", "*.safetensors", "*.py"]
        folder = (
            Path(path)
            if Path(path).is_dir()
            else Path(snapshot_download(path, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
        )
        model = _skeleton(folder, options)
        if not _fill(model, folder):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **options)
            _shrink(model)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"Embedding and LM head of '{path}' cannot be loaded for the drafter: {reason}") from None
    target = Target(model.to(device, dtype), None, target_name(path))
    target.max_context = max_context
    return target


def _skeleton(folder: Path, options: dict[str, Any]) -> Any:
    """The model of transformers without weights."""
    config = AutoConfig.from_pretrained(folder, **options)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, **options)
    model.tie_weights()
    return model


def _fill(model: Any, folder: Path) -> bool:
    """Read embedding and LM head, and two values of everything else. False if the checkpoint has other names."""
    whole = _borrowed(model)
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("*.safetensors"))]
        homes = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        parameters = dict(model.named_parameters())
        if not parameters.keys() <= homes.keys():
            return False
        read = {}
        for name, parameter in parameters.items():
            if id(parameter) in whole:
                read[id(parameter)] = homes[name].get_tensor(name)
            else:
                rows = homes[name].get_slice(name)
                if parameter.numel() and list(rows.get_shape()) != list(parameter.shape):
                    return False
                read[id(parameter)] = rows[:2].flatten()[:2].clone()
    _replace(model, read)
    return True


def _shrink(model: Any) -> None:
    """Keep embedding and LM head, and two values of everything else."""
    whole = _borrowed(model)
    _replace(model, {id(p): p.data if id(p) in whole else p.data.flatten()[:2].clone() for p in model.parameters()})


def _borrowed(model: Any) -> set[int]:
    return {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}


def _replace(model: nn.Module, values: dict[int, torch.Tensor]) -> None:
    """Put a new parameter wherever one of these stands (tied ones stay tied)."""
    fresh = {key: nn.Parameter(value, requires_grad=False) for key, value in values.items()}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = fresh[id(parameter)]
