"""Memory that a training process keeps."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from ctc_drafter.training.allocation import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
import torch
least = 2**24
for _ in range(64):  # small blocks fall between the freed ones by chance: it takes up to some 20 tensors until one fits
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24)
    least = min(least, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    if least < 100:
        break
print(least)
"""


def faults(how: str, **environment: str) -> int:
    """Page faults of a tensor of 64 MiB as large as those that were freed before."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_", "LD_PRELOAD"))}
    line = [sys.executable, "-c", FAULTS, how]
    run = subprocess.run(line, env={**own, **environment}, capture_output=True, text=True, check=True, timeout=120)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own settings")
def test_freed_memory_is_used_again_without_the_system() -> None:
    assert faults("keep") < 100
    assert faults("no") > 5000  # what this is for: 16,384 pages of 4 KiB, or torch has begun to do it itself
    assert faults("keep", MALLOC_MMAP_MAX_="65536", THP_MEM_ALLOC_ENABLE="0") > 5000  # as the user said
