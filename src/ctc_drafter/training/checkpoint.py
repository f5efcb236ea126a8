"""Training state on disk: safetensors and JSON in one folder, written aside and renamed, never pickled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..errors import UserError
from ..files import file_digest, write_folder, write_text
from ..jsonl import read_object

Optimizers = list[torch.optim.Optimizer]


def check_recipe(
    path: Path,
    recipe: dict[str, Any],
    free: set[str],
    defaults: Mapping[str, Any] | None = None,
    *,
    belongs: Iterable[Path] = (),
) -> None:
    """Write `recipe` to `path`, or compare the two; raise UserError if a key that is not in `free` differs.

    A key that the file lacks, being older than the key, counts as its default. `belongs`: what else was made by the
    recipe, for the error to name.
    """
    everything = " and ".join(f"'{p}'" for p in (*(p for p in belongs if p.exists()), path))
    if path.exists():
        old = {**(defaults or {}), **read_object(path, then=f"; remove {everything} to start anew")}
        changed = [key for key in recipe if key not in free and old.get(key) != recipe[key]]
        if changed:
            raise UserError(
                f"'{path}' belongs to another recipe ({', '.join(changed)} differ); "
                f"remove {everything}, or choose another output."
            )
    write_text(path, json.dumps(recipe, indent=1))


def save_training_state(
    path: Path, weights: Mapping[str, torch.Tensor], optimizers: Optimizers, meta: dict[str, Any]
) -> None:
    """Write weights, optimizer tensors and `meta` (JSON) under the folder `path`, atomically."""
    tensors = {f"weight/{name}": tensor.detach().contiguous() for name, tensor in weights.items()}
    for i, optimizer in enumerate(optimizers):
        names = _names(weights, optimizer)
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer/{i}/{names[index]}/{key}"] = torch.as_tensor(value).detach().contiguous()

    def write(folder: Path) -> None:
        save_file(tensors, folder / "state.safetensors")
        digest = file_digest(folder / "state.safetensors")
        (folder / "state.json").write_text(json.dumps({**meta, "sha256": digest}, indent=1))

    write_folder(path, write)


def load_training_state(path: Path, weights: Mapping[str, torch.Tensor], optimizers: Optimizers) -> dict[str, Any]:
    """Copy a state written by `save_training_state` into `weights` and `optimizers` in place; return its meta."""
    try:
        meta = read_object(path / "state.json")
        if not (isinstance(meta.get("step"), int) and isinstance(meta.get("history"), list)):
            raise ValueError("state.json lacks step or history")
        if meta.pop("sha256", None) not in (None, file_digest(path / "state.safetensors")):
            raise ValueError("state.safetensors is not the file that state.json was written with")
        tensors = load_file(path / "state.safetensors")
        with torch.no_grad():
            for name, tensor in weights.items():
                tensor.copy_(tensors[f"weight/{name}"])
        _load_optimizers(tensors, weights, optimizers)
    except Exception as error:
        raise UserError(
            f"Training state '{path}' does not fit or is damaged ({error}); remove it to start anew."
        ) from None
    return meta


def _names(weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> list[str]:
    """Of what the optimizer updates, in its own order."""
    name_of = {id(w): name for name, w in weights.items()}
    return [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _load_optimizers(
    tensors: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], optimizers: Optimizers
) -> None:
    names = [_names(weights, optimizer) for optimizer in optimizers]
    states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
    for entry, tensor in tensors.items():
        if entry.startswith("optimizer/"):
            _, number, name, key = entry.split("/")
            i = int(number)
            if i >= len(names) or name not in names[i]:
                raise ValueError(f"another version of ctc-drafter gave '{name}' to another optimizer")
            states[i].setdefault(names[i].index(name), {})[key] = tensor
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
