"""The readers of what people and other programs write: any bytes may get an answer or a refusal in one sentence."""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save, save_file

from ctc_drafter.bench.compare import NEEDED, ROW, compare_files, read_drafter_folder, read_history
from ctc_drafter.bench.kinds import Every, Maybe, Shape
from ctc_drafter.bench.markdown import duration, report_lines
from ctc_drafter.bench.prompts import read_prompts
from ctc_drafter.config import load_recipe
from ctc_drafter.drafters.base import read_config
from ctc_drafter.errors import UserError
from ctc_drafter.files import RESULT_KIND
from ctc_drafter.inspection import inspect_path, report_table, result_line
from ctc_drafter.jsonl import read_jsonl
from ctc_drafter.target.loading import check_folder
from ctc_drafter.training.checkpoint import check_recipe, load_training_state
from ctc_drafter.training.config import FREE, TrainConfig, recipe_defaults
from ctc_drafter.training.data import Exclusion, prompt_messages
from ctc_drafter.training.distill import DistillConfig, finished
from ctc_drafter.training.features import DECIDING, read_index
from ctc_drafter.training.lock import locked
from ctc_drafter.training.pretrain import PretrainConfig, read_blocks

from .ledger import one_sentence


@dataclass(frozen=True)
class Reader:
    """Of one kind of file."""

    read: Callable[[Path], object]
    name: str
    """Of such a file."""
    whole: bytes
    """One that is read."""
    value: Any = None
    """What `whole` says, if that is JSON or YAML; a list: of the objects in its lines."""

    @property
    def pack(self) -> Callable[[bytes], bytes]:
        """What is done to the text to make the file."""
        packs: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress}
        return packs.get(Path(self.name).suffix, bytes)

    def text_of(self, value: Any) -> bytes:
        """The text, before packing, of another value."""
        if self.name.endswith(".yaml"):
            return yaml.safe_dump(value).encode("utf-8", "replace")
        if ".jsonl" in self.name:
            return "".join(json.dumps(row) + "\n" for row in value).encode()
        return json.dumps(value).encode()


def _of(read: Callable[[Path], object], name: str, value: Any) -> Reader:
    """A reader of what `value` says as a file of that name."""
    bare = Reader(read, name, b"", value)
    return dataclasses.replace(bare, whole=bare.pack(bare.text_of(value)))


# ---------------------------------------------------------------- whole files

ROWS: list[Any] = [
    {"id": "a", "category": "b", "turns": ["How many?", "And now?"]},
    {"messages": [{"role": "user", "content": "café 🙂"}], "turns": ["x"]},
    {"id": "0123456789abcdef", "answer_ids": [1, 2], "turns": ["y"]},
]
DISTILLED = [{"id": f"0123456789abcde{i}", "answer_ids": [i, 7]} for i in range(3)]
HISTORY = [{"step": 3, "loss": 2.5, "seconds": 1.5, "tau": None}, {"step": 6, "loss": 2.25, "seconds": 3}]


def least(shape: Shape) -> Any:
    """The least value of a shape that has all its parts."""
    if isinstance(shape, Maybe):
        return least(shape.shape)
    if isinstance(shape, Every):
        return {"a": least(shape.shape)} if shape.of is dict else [least(shape.shape)] * (shape.length or 1)
    return {key: least(part) for key, part in shape.items()} if isinstance(shape, dict) else shape[0]()


NEEDS: dict[str, Any] = least(NEEDED)
RESULT = {
    **NEEDS,
    "totals": {**NEEDS["totals"], "tokens": 5},
    "kind": RESULT_KIND,
    "complete": True,
    "rows": [least(ROW)],
}
DRAFTER = {
    "speculators_model_type": "medusa",
    "speculators_config": {"verifier": {"name_or_path": "t", "hidden_size": 8, "vocab_size": 16, "probe": [0.5]}},
    "drafter": {"slots": 2, "labels": 2, "vocabulary": 4},
    "training": {"steps": 6, "history": HISTORY},
}
TARGET = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "eos_token_id": 2}
FEATURES = {**dict.fromkeys(DECIDING, 1), "layers": [-1], "probe": [0.5], "shards": [{"name": "a", "head": 1}]}
OWNER = {"pid": 2**22 + 1, "host": platform.node(), "started": 1}  # it has died
RECIPES: dict[str, Any] = {
    "train": TrainConfig(["a.jsonl"], "out", drafter={"slots": 4, "labels": 3}),
    "distill": DistillConfig(["a.jsonl"], "out", mixture={"a": 0.5}),
    "pretrain": PretrainConfig(["a.jsonl"], "out", mixture={"a": 2.0}),
}

# ---------------------------------------------------------------- readers


def _prompts(path: Path) -> object:
    return read_prompts([path])


def _chats(path: Path) -> object:
    return [prompt_messages(row, f"{path}, line {line}") for line, row in read_jsonl(path)]


def _recipe(what: str) -> Reader:
    recipe = RECIPES[what]
    return _of(lambda path: load_recipe(type(recipe), path), f"{what}.yaml", dataclasses.asdict(recipe))


def _never(name: str) -> Any:
    raise AssertionError("nothing is loaded")


def _result(path: Path) -> object:
    comparison = compare_files([path])
    return list(report_lines(comparison, [])), result_line(inspect_path(path, _never))


def _history(path: Path) -> object:
    training = read_history(path)
    return training.steps, duration(training.seconds), training.curve("tau", "loss")


def _state(path: Path) -> object:
    save_file({}, path.with_name("state.safetensors"))
    return load_training_state(path.parent, {}, [])


def _begun(path: Path) -> None:
    check_recipe(path, dataclasses.asdict(RECIPES["train"]), FREE, recipe_defaults())


def _generation(path: Path) -> None:
    path.with_name("config.json").write_text("{}")
    check_folder(path.parent)


def _lock(path: Path) -> None:
    with locked(path):
        pass


BLOCKS = save({name: torch.zeros(1, 2, 3, dtype=torch.int32) for name in ("train", "held")})


READERS: dict[str, Reader] = {
    "prompt file": _of(_prompts, "p.jsonl", ROWS),
    "gzipped prompt file": _of(_prompts, "p.jsonl.gz", ROWS),
    "xz-compressed prompt file": _of(_prompts, "p.jsonl.xz", ROWS),
    "file of chats": _of(_chats, "c.jsonl", ROWS),
    "file of excluded prompts": _of(lambda path: Exclusion([path]), "e.jsonl", ROWS),
    "distilled data set to go on with": _of(finished, "d.jsonl", DISTILLED),
    "recipe of train": _recipe("train"),
    "recipe of distill": _recipe("distill"),
    "recipe of pretrain": _recipe("pretrain"),
    "recipe that a run began with": _of(_begun, "begun.json", dataclasses.asdict(RECIPES["train"])),
    "state of a training": _of(_state, "state.json", {"step": 3, "history": HISTORY}),
    "lock": _of(_lock, "x.lock", OWNER),
    "index of features": _of(lambda path: read_index(path.parent), "index.json", FEATURES),
    "blocks of pretraining": Reader(lambda path: read_blocks(path, 3), "blocks.safetensors", BLOCKS),
    "config of a drafter": _of(lambda path: read_config(path.parent), "drafter/config.json", DRAFTER),
    "training in a drafter's config": _of(lambda path: read_drafter_folder(path.parent), "told/config.json", DRAFTER),
    "folder to inspect": _of(
        lambda path: report_table(inspect_path(path.parent, _never)), "inspected/config.json", DRAFTER
    ),
    "config of a target": _of(lambda path: check_folder(path.parent), "target/config.json", TARGET),
    "generation config of a target": _of(_generation, "generation/generation_config.json", {"eos_token_id": [1, 2]}),
    "result file": _of(_result, "result.json", RESULT),
    "history of a training": _of(_history, "x.history.json", HISTORY),
}
"""By what they read."""


def read(what: str, content: bytes, folder: Path) -> str:
    """Let the reader have the content: `read` or `refused`; any other exception comes through."""
    path = folder / READERS[what].name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    try:
        READERS[what].read(path)
    except UserError as error:
        one_sentence(str(error))
        return "refused"
    return "read"
