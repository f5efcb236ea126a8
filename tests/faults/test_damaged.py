"""Checkpoints that are cut, flipped, of wrong shapes or full of NaN: refused in a sentence, or the text stays right."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from conftest import build_drafter
from ctc_drafter.cli import app
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import NoDrafter, load_drafter
from ctc_drafter.errors import UserError
from ctc_drafter.target import Target
from ctc_drafter.training.checkpoint import load_training_state, save_training_state

from .ledger import CUT, FLIPPED, LEDGER, one_sentence

PROMPT = [3, 9, 4]


@pytest.fixture(scope="module")
def small() -> Target:
    """Of eight numbers a token, so that a checkpoint has few enough bytes to try them all."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = LlamaConfig(vocab_size=16, max_position_embeddings=32, initializer_range=0.4, **sizes, **ends)
    return Target.of(LlamaForCausalLM(config).float(), None, "small")


@pytest.fixture
def medusa(small: Target, tmp_path: Path) -> Path:
    return build_drafter(tmp_path / "medusa", small, "medusa", slots=1, labels=1, vocabulary=4)


def said(target: Target, drafter: Any) -> list[int]:
    return [t for step in generate(target, drafter, PROMPT, max_new_tokens=6, budget=3) for t in step.tokens]


def outcome(folder: Path, target: Target, want: list[int]) -> str:
    """Load and run a drafter: only a UserError may come, and what loads must leave the text as it is."""
    try:
        drafter = load_drafter(str(folder), target)
    except UserError as error:
        one_sentence(str(error))
        return "refused"
    assert said(target, drafter) == want
    return "loaded, and the text is the target's own"


def damages(whole: bytes, flips: int, cuts: int) -> list[tuple[str, bytes]]:
    """Every cut and one flipped bit in every byte, or so many of them."""
    rng = random.Random(0)
    lengths = range(len(whole)) if cuts >= len(whole) else sorted(rng.sample(range(len(whole)), cuts))
    out = [("cut", whole[:length]) for length in lengths]
    for place in range(len(whole)) if flips >= len(whole) else rng.sample(range(len(whole)), flips):
        content = bytearray(whole)
        content[place] ^= 1 << rng.randrange(8)
        out.append(("flipped", bytes(content)))
    return out


@pytest.mark.parametrize("amount", [40, pytest.param(10**6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_drafters(name: str, amount: int, medusa: Path, small: Target) -> None:
    """A weights file is refused whatever happens to it; a config may still say what makes sense."""
    want = said(small, NoDrafter())
    whole = (medusa / name).read_bytes()
    for kind, content in damages(whole, amount, amount):
        (medusa / name).write_bytes(content)
        seen = outcome(medusa, small, want)
        assert seen == "refused" or (name == "config.json" and kind == "flipped"), f"{kind}: {content!r}"
        LEDGER.saw(f"drafter, {name}: {CUT if kind == 'cut' else FLIPPED}", seen)


@pytest.mark.parametrize("amount", [40, pytest.param(10**6, marks=pytest.mark.slow)])
def test_drafters_without_a_digest(amount: int, medusa: Path, small: Target) -> None:
    """As others write them: what cannot be noticed must not matter."""
    content = json.loads((medusa / "config.json").read_text())
    del content["weights_sha256"]
    (medusa / "config.json").write_text(json.dumps(content))
    want = said(small, NoDrafter())
    for kind, damaged in damages((medusa / "model.safetensors").read_bytes(), amount, 0):
        (medusa / "model.safetensors").write_bytes(damaged)
        LEDGER.saw(f"drafter without a digest, model.safetensors: a bit {kind}", outcome(medusa, small, want))


SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a row less": lambda t: t[1:].clone(),
    "a dimension more": lambda t: t[None].clone(),
    "empty": lambda t: t[:0].clone(),
    "NaN": lambda t: torch.full_like(t.float(), torch.nan),
    "infinite": lambda t: torch.full_like(t.float(), torch.inf),
}


@pytest.mark.parametrize("what", SHAPES)
def test_wrong_tensors(what: str, medusa: Path, small: Target) -> None:
    file = medusa / "model.safetensors"
    weights = load_file(file)
    content = json.loads((medusa / "config.json").read_text())
    del content["weights_sha256"]
    (medusa / "config.json").write_text(json.dumps(content))
    for name in weights:
        save_file({**weights, name: SHAPES[what](weights[name])}, file)
        assert outcome(medusa, small, []) == "refused"
        LEDGER.saw(f"drafter: a tensor {what}", "refused")


@pytest.mark.parametrize("amount", [25, pytest.param(10**6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_training_states(name: str, amount: int, tmp_path: Path) -> None:
    """A flipped digit of the step cannot be told from another step; all else is refused."""
    layer = torch.nn.Linear(2, 2)
    weights = dict(layer.named_parameters())
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(layer.parameters())]
    layer(torch.ones(2)).sum().backward()
    optimizers[0].step()
    save_training_state(tmp_path / "s", weights, optimizers, {"step": 3, "history": []})
    for kind, content in damages((tmp_path / "s" / name).read_bytes(), amount, amount):
        (tmp_path / "s" / name).write_bytes(content)
        seen = "refused"
        try:
            load_training_state(tmp_path / "s", weights, optimizers)
            seen = "read"
        except UserError as error:
            one_sentence(str(error))
        assert seen == "refused" or (name == "state.json" and kind == "flipped"), f"{kind}: {content!r}"
        LEDGER.saw(f"training state, {name}: {CUT if kind == 'cut' else 'a bit flipped'}", seen)


INDEX = "model.safetensors.index.json"
TARGET_FILES = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    INDEX,
)


@pytest.mark.parametrize("amount", [2, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TARGET_FILES)
def test_targets(name: str, amount: int, target_folder: Path, tmp_path: Path) -> None:
    """Their folders have no digest; whatever loads has passed the self-test."""
    folder = Path(shutil.copytree(target_folder, tmp_path / "t"))
    if name == INDEX:
        (folder / "model.safetensors").unlink()
        LlamaForCausalLM.from_pretrained(target_folder).save_pretrained(folder, max_shard_size="200KB")
    for kind, content in damages((folder / name).read_bytes(), amount, amount):
        (folder / name).write_bytes(content)
        seen = "refused"
        try:
            Target.load(folder, dtype="float32", device="cpu")
            seen = "loaded, and scores trees as branches"
        except UserError as error:
            one_sentence(str(error))
        assert seen == "refused" or kind == "flipped", f"{kind}: {len(content)}"
        LEDGER.saw(f"target, {name}: {'cut' if kind == 'cut' else 'a bit flipped'}", seen)


def test_the_command_line_refuses_in_a_sentence(target_folder: Path, drafter_folder: Path, tmp_path: Path) -> None:
    for name, keep in (("model.safetensors", 999), ("config.json", 99), ("model.safetensors", 0)):
        for folder, option in ((target_folder, "--target"), (drafter_folder, "--drafter")):
            copy = Path(shutil.copytree(folder, tmp_path / f"{name}-{keep}{option}"))
            (copy / name).write_bytes((copy / name).read_bytes()[:keep])
            pair = {"--target": str(target_folder), "--drafter": "none", option: str(copy)}
            line = ["generate", "Hi", *(word for words in pair.items() for word in words), "--max-new-tokens", "2"]
            result = CliRunner().invoke(app, line)
            assert result.exit_code == 2, result.output
            one_sentence(result.stderr.strip())
            LEDGER.saw("damaged folder named on the command line", "refused, exit code 2")
