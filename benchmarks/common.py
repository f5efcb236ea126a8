"""What the scripts of this folder share."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ctc_drafter.drafters import Drafter, load_drafter
from ctc_drafter.environment import machine, versions
from ctc_drafter.target import Target

T = TypeVar("T")
FILES = ("mt_bench.jsonl", "gsm8k_test.jsonl", "humaneval.jsonl")
"""Of the folder that --eval names."""


def about() -> dict[str, Any]:
    """With what a result was made: the first keys of every result file."""
    return {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "versions": versions()}


def ready_drafter(name: str | None, target: Target) -> Drafter:
    """The drafter as `bench` and `serve` have it: its search compiled."""
    drafter = load_drafter(name, target)
    drafter.compile_search()
    return drafter


def command(*arguments: object, threads: int | None = None) -> None:
    """Run a command of the package in a process of its own; its failure ends this script too."""
    print("+", "ctc-drafter", *map(str, arguments), flush=True)
    own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    line = [sys.executable, "-m", "ctc_drafter", *map(str, arguments)]
    code = subprocess.run(line, env={**os.environ, **own}).returncode
    if code:
        sys.exit(code)


def timed(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What `run` returns and its seconds, the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    done = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return done, time.perf_counter() - began


def add_common(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Add --dtype, --device, --json and --overwrite."""
    parser.add_argument("--dtype", default=dtype)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
