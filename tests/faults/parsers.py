"""The readers of what people write by hand, and what each may do with any bytes: answer, or refuse in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ctc_drafter.bench.prompts import read_prompts
from ctc_drafter.config import load_recipe
from ctc_drafter.errors import UserError
from ctc_drafter.jsonl import read_jsonl
from ctc_drafter.training.config import TrainConfig
from ctc_drafter.training.data import Exclusion, prompt_messages
from ctc_drafter.training.distill import DistillConfig, _finished
from ctc_drafter.training.pretrain import PretrainConfig

from .ledger import one_sentence

Reader = Callable[[Path], object]


def _recipe(cls: type) -> Reader:
    return lambda path: load_recipe(cls, path)


def _chats(path: Path) -> object:
    return [prompt_messages(row, f"{path}, line {line}") for line, row in read_jsonl(path)]


READERS: dict[str, tuple[Reader, str]] = {
    "prompt file": (lambda path: read_prompts([path]), "p.jsonl"),
    "gzipped prompt file": (lambda path: read_prompts([path]), "p.jsonl.gz"),
    "xz-compressed prompt file": (lambda path: read_prompts([path]), "p.jsonl.xz"),
    "file of chats": (_chats, "c.jsonl"),
    "file of excluded prompts": (lambda path: Exclusion([path]), "e.jsonl"),
    "distilled data set to go on with": (_finished, "d.jsonl"),
    "recipe of train": (_recipe(TrainConfig), "t.yaml"),
    "recipe of distill": (_recipe(DistillConfig), "d.yaml"),
    "recipe of pretrain": (_recipe(PretrainConfig), "p.yaml"),
}
"""By what they read: the reader, and a file name for it."""


def read(what: str, content: bytes, folder: Path) -> str:
    """Let the reader have the content: `read` or `refused`; any other exception comes through."""
    reader, name = READERS[what]
    path = folder / name
    path.write_bytes(content)
    try:
        reader(path)
    except UserError as error:
        one_sentence(str(error))
        return "refused"
    return "read"
