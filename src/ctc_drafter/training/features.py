"""Features of the training sequences on disk: the target runs over them once, and drafters train from the shards.

A folder holds `index.json` and `hs_00000.safetensors`, ...; each shard has, for its S sequences of N tokens in all,
token_ids (N) int32, mask (N) uint8, offsets (S+1) int64, features (N, layers * hidden_size) in the target's dtype, and
checksums (S+1) int64: CRC-32 of each sequence's features and, last, of the first three.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import UserError
from ..files import write_file, write_text
from ..jsonl import read_object
from ..target import Target
from ..words import byte_size
from .config import TrainConfig
from .drafter import check, new_drafter
from .lock import locked
from .problems import Sequence, read_sequences

INDEX = "index.json"
SHARD_BYTES = 512 * 2**20
OPEN_SHARDS = 64
FORMAT = 1
DECIDING = ("format", "layers", "dtype", "max_tokens", "data")


def cache_features(config: TrainConfig, output: str | Path, *, yes: bool = False) -> Path:
    """Write the features of all sequences of a train recipe to the folder `output`; a rerun writes what is missing.

    Damaged shards are written anew. Raises UserError if the folder belongs to other features, or if it takes more than
    half of the free disk space and `yes` is not given.
    """
    check(config)
    folder, console = Path(output), Console(stderr=True, markup=False, emoji=False)  # paths are no markup
    target = Target.load(
        config.target, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code
    )
    layers = tuple(new_drafter(config, target).feature_layers)
    target.capture(layers)
    train_set, held_set = read_sequences(config, target)
    shards = _split(_distinct([*train_set, *held_set]), len(layers) * target.hidden_size * target.dtype.itemsize)
    index = _index(config, target, layers, shards)
    names = [shard["name"] for shard in index["shards"]]
    with locked(folder.absolute().with_name(folder.absolute().name + ".lock")):
        begun = _same_index(folder, index)
        missing = [i for i, name in enumerate(names) if not (begun and _is_whole(folder, index["shards"][i]))]
        if begun:
            console.print(f"{len(names) - len(missing)} of {len(names)} shards are there already")
        _announce(console, folder, index, [shards[i] for i in missing], yes)
        if not begun:
            write_text(folder / INDEX, json.dumps(index, indent=1))
        _write_shards(target, [(folder / names[i], shards[i]) for i in missing], config.batch, console)
    return folder


def _distinct(sequences: Iterable[Sequence]) -> list[Sequence]:
    """Each text once; of those that differ in trailing zeros alone the longest, which holds the others' features."""
    found: dict[bytes, Sequence] = {}
    for sequence in sequences:
        key = _key(sequence.ids)
        if key not in found or len(found[key].ids) < len(sequence.ids):
            found[key] = sequence
    return list(found.values())


def _key(ids: list[int]) -> bytes:
    """Identifies a text among padded ones, so trailing zeros do not count."""
    end = len(ids)
    while end and ids[end - 1] == 0:
        end -= 1
    return hashlib.blake2b(array("i", ids[:end]).tobytes(), digest_size=16).digest()


def _split(sequences: list[Sequence], bytes_per_token: int) -> list[list[Sequence]]:
    shards: list[list[Sequence]] = [[]]
    size = 0
    for sequence in sequences:
        if shards[-1] and size + len(sequence.ids) * bytes_per_token > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(sequence)
        size += len(sequence.ids) * bytes_per_token
    return shards


def _bytes(shards: list[list[Sequence]], bytes_per_token: int) -> int:
    """Size of the shards' files, with an ample header."""
    return sum(sum(len(s.ids) for s in shard) * (bytes_per_token + 5) + 16 * len(shard) + 512 for shard in shards)


def _index(
    config: TrainConfig, target: Target, layers: tuple[int, ...], shards: list[list[Sequence]]
) -> dict[str, Any]:
    data = hashlib.blake2b(digest_size=16)
    for shard in shards:
        for s in shard:
            data.update(_key(s.ids) + len(s.ids).to_bytes(4, "little"))
    listed = [{"name": f"hs_{i:05}.safetensors", "head": _crc(_head(shard))} for i, shard in enumerate(shards)]
    return {
        "format": FORMAT,
        "target": target.name,
        "probe": target.probe(),
        "hidden_size": target.hidden_size,
        "layers": list(layers),
        "dtype": _name(target.dtype),
        "max_tokens": config.max_tokens,
        "data": data.hexdigest(),
        "sequences": sum(map(len, shards)),
        "tokens": sum(len(s.ids) for shard in shards for s in shard),
        "shards": listed,
    }


def _same_index(folder: Path, index: dict[str, Any]) -> bool:
    """Whether `folder` holds these very features (perhaps not all); raises UserError if it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    old = read_index(folder)
    changed = [key for key in DECIDING if old[key] != index[key]]
    changed += [] if old["probe"] == index["probe"] else ["target"]
    changed = changed or (["shards"] if old["shards"] != index["shards"] else [])
    if changed:
        raise UserError(f"'{folder}' holds other features ({', '.join(changed)} differ); choose another output.")
    return True


def _announce(console: Console, folder: Path, index: dict[str, Any], shards: list[list[Sequence]], yes: bool) -> None:
    """Say how much the shards will take; raise UserError if that is much for the disk and was not agreed to."""
    size = _bytes(shards, len(index["layers"]) * index["hidden_size"] * getattr(torch, index["dtype"]).itemsize)
    place = folder
    while not place.exists():
        place = place.absolute().parent
    free = shutil.disk_usage(place).free
    console.print(
        f"{index['sequences']:,} sequences, {index['tokens']:,} tokens, layers {index['layers']} of "
        f"{index['hidden_size']} x {index['dtype']}: {byte_size(size)} will be written to {folder}, "
        f"{byte_size(free)} are free"
    )
    if size > free / 2 and not yes:
        raise UserError(
            f"{byte_size(size)} of features are more than half of the {byte_size(free)} that are free for '{folder}'; "
            "give --yes to write them anyway."
        )


# ---------------------------------------------------------------- writing


def _write_shards(target: Target, work: list[tuple[Path, list[Sequence]]], batch: int, console: Console) -> None:
    columns = (TextColumn("features"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(len(s.ids) for _, shard in work for s in shard))
        for path, shard in work:
            tensors = _shard(target, shard, batch, lambda tokens: progress.update(task, advance=tokens))
            write_file(path, partial(save_file, tensors))


@torch.inference_mode()
def _shard(target: Target, sequences: list[Sequence], batch: int, advance: Any) -> dict[str, torch.Tensor]:
    """Run the target over the sequences; returns the tensors of a shard."""
    head = _head(sequences)
    offsets = head["offsets"]
    features: torch.Tensor | None = None
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))
    for first in range(0, len(order), batch):
        group = order[first : first + batch]
        ids = torch.zeros(len(group), len(sequences[group[-1]].ids), dtype=torch.long)
        for row, i in enumerate(group):
            ids[row, : len(sequences[i].ids)] = torch.tensor(sequences[i].ids)
        # The padding follows each text, and no token sees what follows it.
        _, out = target.forward(ids.to(target.device), use_cache=False, logits_to_keep=1)
        if features is None:
            features = torch.empty(int(offsets[-1]), out.shape[-1], dtype=target.dtype)
        out = out.to("cpu", target.dtype)
        for row, i in enumerate(group):
            features[offsets[i] : offsets[i + 1]] = out[row, : len(sequences[i].ids)]
        advance(sum(len(sequences[i].ids) for i in group))
    assert features is not None
    sums = [_crc({"features": features[offsets[i] : offsets[i + 1]]}) for i in range(len(sequences))]
    return {**head, "features": features, "checksums": torch.tensor([*sums, _crc(head)])}


def _head(sequences: list[Sequence]) -> dict[str, torch.Tensor]:
    """A shard's small tensors, which say what its features belong to."""
    return {
        "token_ids": torch.tensor([t for s in sequences for t in s.ids], dtype=torch.int32),
        "mask": torch.tensor([m for s in sequences for m in s.mask], dtype=torch.uint8),
        "offsets": torch.tensor([0, *(len(s.ids) for s in sequences)]).cumsum(0),
    }


def _crc(tensors: dict[str, torch.Tensor]) -> int:
    value = 0
    for tensor in tensors.values():
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, value)
    return value


# ---------------------------------------------------------------- reading


class _Shard:
    """An open shard whose small tensors have the checksum `head`; raises one of _DAMAGE if it is damaged."""

    def __init__(self, path: Path, head: int) -> None:
        self.file: Any = safe_open(path, framework="pt")
        tensors = {name: self.file.get_tensor(name) for name in ("token_ids", "mask", "offsets")}
        self.ids: torch.Tensor = tensors["token_ids"]
        self.offsets: list[int] = tensors["offsets"].tolist()
        self.checksums: list[int] = self.file.get_tensor("checksums").tolist()
        if _crc(tensors) != head:
            raise ValueError("its checksum is wrong")

    def features(self, i: int) -> torch.Tensor:
        """Features (n, layers * hidden_size) of sequence `i`."""
        rows: torch.Tensor = self.file.get_slice("features")[self.offsets[i] : self.offsets[i + 1]]
        if _crc({"features": rows}) != self.checksums[i]:
            raise ValueError(f"the checksum of sequence {i} is wrong")
        return rows

    def check(self) -> None:
        """Read everything."""
        for i in range(len(self.offsets) - 1):
            self.features(i)


_DAMAGE = (OSError, SafetensorError, ValueError, KeyError, IndexError, RuntimeError)


def _is_whole(folder: Path, listed: dict[str, Any]) -> bool:
    try:
        _Shard(folder / listed["name"], listed["head"]).check()
    except _DAMAGE:
        return False
    return True


class CachedFeatures:
    """Features from the folder `config.features`, looked up by the token ids of each sequence."""

    def __init__(self, config: TrainConfig, target: Target, layers: tuple[int, ...], console: Console) -> None:
        self.folder = Path(config.features or "")
        index = read_index(self.folder)
        _check(self.folder, index, config, target, layers)
        places, width = [index["layers"].index(layer) for layer in layers], target.hidden_size
        self._columns = [slice(p * width, (p + 1) * width) for p in places]
        self._whole = places == list(range(len(index["layers"])))
        self._width, self._dtype = width * len(layers), target.dtype
        self._open: OrderedDict[Path, _Shard] = OrderedDict()
        self._where: dict[bytes, tuple[Path, int, int]] = {}
        self._heads: dict[Path, int] = {}
        self._bad: list[str] = []
        for shard in index["shards"]:
            path = self.folder / shard["name"]
            try:
                self._add(path, shard["head"], config.skip_bad_shards)
            except _DAMAGE as error:
                if not config.skip_bad_shards:
                    raise _damaged(path, error) from None
                self._bad.append(shard["name"])
        if self._bad:
            console.print(f"skipped  {len(self._bad)} bad shards: {', '.join(self._bad)}")

    def _add(self, path: Path, head: int, thorough: bool) -> None:
        shard = _Shard(path, head)
        if thorough:  # what is bad must show before training begins: later there is no way around it
            shard.check()
        ids = shard.ids.tolist()
        for i, (start, end) in enumerate(zip(shard.offsets, shard.offsets[1:])):
            self._where[_key(ids[start:end])] = path, i, end - start
        self._heads[path] = head

    def available(self, sequences: list[Sequence], what: str) -> list[Sequence]:
        """The sequences that lie in good shards. Raises UserError if one is missing for no bad shard's sake."""
        found = [s for s in sequences if self._where.get(_key(s.ids), (None, 0, 0))[2] >= len(s.ids)]
        if len(found) < len(sequences) and not self._bad:
            raise UserError(
                f"'{self.folder}' lacks the features of {len(sequences) - len(found)} of {len(sequences)} {what} "
                "sequences; it was made from other data, so run cache-features into another folder."
            )
        return found

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T), padded with zeros -> features (B, T, layers * hidden_size), zero in the padding; on the CPU."""
        out = torch.zeros(*ids.shape, self._width, dtype=self._dtype)
        for i, row in enumerate(ids.tolist()):
            path, place, length = self._where[_key(row)]
            try:
                rows = self._shard(path).features(place)[: ids.shape[1]]
            except _DAMAGE as error:
                raise _damaged(path, error) from None
            part = rows if self._whole else torch.cat([rows[:, c] for c in self._columns], -1)
            out[i, : min(length, ids.shape[1])] = part
        return out

    def _shard(self, path: Path) -> _Shard:
        if path not in self._open:
            self._open[path] = _Shard(path, self._heads[path])
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]


def open_features(
    config: TrainConfig,
    target: Target,
    layers: tuple[int, ...],
    train_set: list[Sequence],
    held_set: list[Sequence],
    console: Console,
) -> CachedFeatures | None:
    """The recipe's cached features, None without any. With `skip_bad_shards`, both lists lose what cannot be read.

    Raises UserError for features of another target, layers, length or data, and for a damaged shard.
    """
    if config.features is None:
        return None
    cached = CachedFeatures(config, target, layers, console)
    train_set[:] = cached.available(train_set, "training")
    held_set[:] = cached.available(held_set, "held-out")
    if len(train_set) < config.batch:
        raise UserError(
            f"'{cached.folder}': {len(train_set)} sequences in good shards, fewer than one batch of {config.batch}."
        )
    return cached


def read_index(folder: Path) -> dict[str, Any]:
    """What the index of a folder of features says. Raises UserError if it is absent or damaged."""
    then = "; run cache-features into another folder"
    index = read_object(folder / INDEX, f"'{folder}' has no {INDEX}, so it does not come from cache-features.", then)
    if {*DECIDING, "probe", "shards"} <= index.keys():
        shards = index["shards"] if isinstance(index["shards"], list) else [None]
        listed = all(isinstance(s, dict) and isinstance(s.get("name"), str) and "head" in s for s in shards)
        if listed and isinstance(index["layers"], list):
            return index
    raise UserError(f"'{folder / INDEX}' is damaged{then}.")


def _check(folder: Path, index: dict[str, Any], config: TrainConfig, target: Target, layers: tuple[int, ...]) -> None:
    made = {"format": index["format"], "dtype": index["dtype"], "max_tokens": index["max_tokens"]}
    now = {"format": FORMAT, "dtype": _name(target.dtype), "max_tokens": config.max_tokens}
    problems = [f"{key} {made[key]} instead of {now[key]}" for key in made if made[key] != now[key]]
    lacking = [str(layer) for layer in layers if layer not in index["layers"]]
    problems += [f"layers {index['layers']} without {', '.join(lacking)}"] if lacking else []
    problems += [] if index["probe"] == target.probe() else [f"another target, '{index.get('target')}'"]
    if problems:
        raise UserError(f"'{folder}' does not fit the recipe, for it was made with {' and '.join(problems)}.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:150] or type(error).__name__
    return UserError(
        f"Shard '{path}' cannot be used ({reason}); run cache-features again to repair it, or set skip_bad_shards."
    )
