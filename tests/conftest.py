"""Shared fixtures: a tiny random Llama with its own tokenizer and chat template, and drafters for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ctc_drafter.drafters import DRAFTERS, Drafter, LookupDrafter, NoDrafter, load_drafter
from ctc_drafter.target import Target
from ctc_drafter.training.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from openai import OpenAI

    from live import Live

pytest_plugins = ("faults.summary", "prove.summary")

CONTEXT = 192

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Nora picks twelve apples every morning and gives half of them to her neighbor.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "Déjà vu: naïve café, 你好世界, emoji 🙂🚀 and more.",
    "How many apples are left? There are 6 apples left. The answer is 6.",
]


def build_target(folder: Path, seed: int = 0, chat: bool = True, layers: int = 2, context: int = CONTEXT) -> Path:
    """Write a Llama with random weights and a byte-level tokenizer of 512 entries."""
    tokenizer = train_tokenizer(TEXTS * 8, 512, context)
    if not chat:
        tokenizer.chat_template = None
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_drafter(folder: Path, target: Target, kind: str = "ctc", **config: object) -> Path:
    """Write a drafter with random weights for `target`."""
    torch.manual_seed(1)
    cls: Any = DRAFTERS[kind]
    if kind == "ctc":
        config = {"slots": 5, "labels": 4, **config}
    cls(cls.config_class(**config), target).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_target(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def target(target_folder: Path) -> Target:
    return Target.load(target_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def drafter_folder(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_drafter(tmp_path_factory.mktemp("drafters") / "tiny-ctc", target, context_rank=8)


# ---------------------------------------------------------------- for tests/serving: a server around the tiny target


@pytest.fixture(scope="session")
def drafter(target: Target, drafter_folder: Path) -> Drafter:
    return load_drafter(str(drafter_folder), target)


@pytest.fixture(scope="module")
def server(target: Target, drafter: Drafter) -> Iterator[Live]:
    from live import live

    with live(target, {"tiny-ctc": drafter.twin(), "lookup": LookupDrafter(), "none": NoDrafter()}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Live) -> OpenAI:
    return server.client()
