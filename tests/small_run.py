"""A data set and a recipe that train within a second, and what such a run leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from conftest import TEXTS
from ctc_drafter.target import Target
from ctc_drafter.training.trainer import TrainConfig


def write_data(path: Path, target: Target) -> Path:
    """Answers of both kinds, distilled rows and chats, of different lengths."""
    rows: list[dict[str, Any]] = []
    for i in range(24):
        ids = target.tokenizer(TEXTS[i % 5])["input_ids"]
        rows.append({"id": str(i), "prompt_ids": ids[: 2 + i % 3], "answer_ids": ids[2 + i % 3 :]})
    for i in range(8):
        messages = [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": TEXTS[i % 5]}]
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def small_recipe(target: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    """Six steps with two checkpoints."""
    values: dict[str, Any] = {
        "target": str(target),
        "data": [str(data)],
        "output": str(output),
        "drafter": {"slots": 4, "labels": 3, "context_rank": 8},
        "steps": 6,
        "batch": 4,
        "anchors": 6,
        "warmup": 2,
        "decay": 3,
        "held_out": 0.2,
        "checkpoint_every": 3,
        "dtype": "float32",
        "device": "cpu",
    }
    return TrainConfig(**{**values, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


def history(folder: Path) -> list[dict[str, float]]:
    """Rows of the history without their times."""
    rows = json.loads(folder.with_name(folder.name + ".history.json").read_text())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def command(recipe: TrainConfig, *options: str, processes: int = 1) -> list[str]:
    """The command line that runs `recipe`, written beside its output; through torchrun for several processes."""
    path = Path(recipe.output).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(asdict(recipe)))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    launcher = torchrun if processes > 1 else []
    return [sys.executable, "-m", *launcher, "ctc_drafter", "train", "--config", str(path), *options]


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(recipe: TrainConfig, *options: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    line = command(recipe, *options, processes=processes)
    return subprocess.run(line, env=ONE_THREAD, capture_output=True, text=True, timeout=280)
