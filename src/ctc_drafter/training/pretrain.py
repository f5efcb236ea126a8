"""Train a small target from scratch: corpus -> tokenizer -> packed blocks -> Llama weights.

This is what made the embedded target. Muon for the matrices of the layers, AdamW for the embedding and norms,
a trapezoid learning rate (warm-up, constant, linear decay), bf16 weights with fp32 masters.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ..chat import prompt_ids
from ..drafters.base import IGNORE
from ..errors import UserError
from ..files import recover_folder, write_file, write_folder
from ..jsonl import read_jsonl, read_object
from ..target.loading import resolve_device
from .checkpoint import check_recipe, load_training_state, save_training_state
from .cross_entropy import block_loss, chunk_step
from .data import Exclusion, chat_ids, copies, example_key, messages_of, prompt_messages, row_text, text_key
from .first import check_first, load_model
from .lock import locked
from .optim import (
    clip_gradients,
    diverged,
    fp32_masters,
    gradients_to_masters,
    learning_rate_factor,
    make_optimizers,
    masters_to_model,
    set_learning_rates,
)
from .pretrain_config import FREE, PretrainConfig
from .tokenizer import load_tokenizer, train_tokenizer
from .unlikelihood import unlikelihood

__all__ = ["PretrainConfig", "pretrain"]

HELD_OUT = 100  # one prompt in a hundred is never trained on
HELD_TOKENS = 36_864
"""Of those that are not trained on, over which a loss is taken."""
SHORT_BLOCK = 256
"""Tokens up to which plain attention, compiled, is faster on a CPU than torch's flash attention, whose backward pass
takes a quarter of a step there; at 512 the two are equal."""
LONGEST_QUESTION = 256
"""Tokens of a prompt that is answered to learn against loops."""


def pretrain(config: PretrainConfig) -> Path:
    """Run or resume the recipe; returns the folder of the finished target (a Hugging Face model folder)."""
    output = Path(config.output)
    if output.exists() and not (output / "pretrain.json").is_file():
        raise UserError(f"'{output}' exists and was not written by pretrain; choose another output.")
    before = None
    if config.init is not None and (Path(config.init) / "pretrain.json").is_file():
        before = read_object(Path(config.init) / "pretrain.json", then="; restore it, or remove it")
    work = output.with_name(output.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    with locked(output.with_name(output.name + ".lock")), Progress() as progress:
        defaults = asdict(PretrainConfig([], ""))
        check_recipe(work / "recipe.json", asdict(config), FREE, defaults, belongs=[work])
        tokenizer = _tokenizer(config, work, progress)
        blocks, held = _blocks(config, tokenizer, work, progress)
        if len(blocks) < config.batch or not len(held):
            raise UserError(
                f"{', '.join(config.data)}: {len(blocks)} training and {len(held)} held-out blocks of {config.block} "
                f"tokens; it takes at least {config.batch} and 1."
            )
        questions = _questions(config, tokenizer) if config.unlikelihood_steps else []
        model, history = _optimize(config, tokenizer, blocks, held, work, progress)
        stop = tokenizer.eos_token_id
        loops = _against_loops(config, model, questions, stop, blocks, work, progress) if questions else []
        model = model.to(torch.bfloat16)
        final = _held_out_loss(model, held, config)
    card = {"recipe": asdict(config), "tokens": config.steps * config.batch * config.block, "history": history}
    card |= {"unlikelihood": loops, "held_out_loss": final}
    if before is not None:
        card["before"] = before

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "pretrain.json").write_text(json.dumps(card, indent=1))

    write_folder(output, write)
    return output


# ---------------------------------------------------------------- data


def _rows(config: PretrainConfig) -> Iterator[dict[str, Any]]:
    for path in config.data:
        for line, row in read_jsonl(path):
            if "messages" in row:
                messages_of(row, f"{path}, line {line}")
            elif not isinstance(row.get("text"), str):
                raise UserError(f"{path}, line {line}: expected `messages` or `text`.")
            yield row


def _rate(config: PretrainConfig, row: dict[str, Any]) -> float:
    return config.mixture.get(row.get("source", ""), 1.0)


def _tokenizer(config: PretrainConfig, work: Path, progress: Progress) -> Any:
    folder = work / "tokenizer"
    if config.init is not None:
        folder = Path(config.init)
        check_first(folder)
    elif not folder.exists():
        task = progress.add_task("tokenizer", total=None)

        def texts() -> Iterator[str]:
            for row in _rows(config):
                if example_key(row) % 5 == 0 and _rate(config, row) >= 0.1:
                    yield row_text(row)

        fresh = train_tokenizer(texts(), config.vocab_size, config.context)
        write_folder(folder, lambda f: fresh.save_pretrained(f))
        progress.remove_task(task)
    then = "remove that folder, and a rerun makes it anew" if config.init is None else "restore its files"
    return load_tokenizer(folder, then)


def _encode(config: PretrainConfig, tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    if "messages" in row:
        ids, mask = chat_ids(tokenizer, row["messages"])
        return ids, mask if row.get("source", "") in config.answers_only else [1] * len(ids)
    if row.get("source", "") in config.as_answers:
        return chat_ids(tokenizer, [{"role": "assistant", "content": row["text"].strip()}])
    ids = [tokenizer.bos_token_id, *tokenizer(row["text"], verbose=False)["input_ids"], tokenizer.eos_token_id]
    return ids, [1] * len(ids)


def _blocks(
    config: PretrainConfig, tokenizer: Any, work: Path, progress: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed training and held-out blocks: int32 (n, 2, block): token ids, and labels with -100 where masked."""
    path = work / "blocks.safetensors"
    if not path.exists():
        banned = Exclusion(config.exclude)
        streams: dict[str, list[list[list[int]]]] = {"train": [], "held": []}
        rows = sorted(_rows(config), key=lambda r: text_key(json.dumps(r) + str(config.seed)))
        task = progress.add_task("tokenizing", total=len(rows))
        dropped = 0
        for row in rows:
            progress.advance(task)
            key = example_key(row)
            held = key % HELD_OUT == 0
            rate = _rate(config, row)
            count = copies(row, 1.0 if held and rate else rate)
            if not count:
                continue
            if banned.dropped_by(row):
                dropped += 1
                continue
            ids, mask = _encode(config, tokenizer, row)
            pair = [ids, [i if m else IGNORE for i, m in zip(ids, mask)]]
            streams["held" if held else "train"].extend([pair] * count)
        progress.console.print(
            f"{dropped} training rows dropped for an overlap with {len(config.exclude)} prompt files"
        )
        packed = {name: _pack(stream, config.block, config.seed) for name, stream in streams.items()}
        write_file(path, partial(save_file, packed))
    blocks = read_blocks(path, config.block)
    progress.console.print(f"{len(blocks[0]):,} training blocks of {config.block} tokens")
    return blocks


def read_blocks(path: Path, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_blocks` has written. Raises UserError if it is damaged."""
    try:
        packed = load_file(path)
        for name in ("train", "held"):
            if packed[name].dtype != torch.int32 or packed[name].shape[1:] != (2, block):
                raise ValueError(f"{name} is not of blocks of {block} tokens")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"'{path}' is damaged ({error}); remove it, and a rerun makes it anew.") from None
    return packed["train"], packed["held"]


def _pack(pairs: list[Any], block: int, seed: int) -> torch.Tensor:
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = torch.tensor([t for i in order for t in pairs[i][0]], dtype=torch.int32)
    labels = torch.tensor([t for i in order for t in pairs[i][1]], dtype=torch.int32)
    n = ids.numel() // block
    return torch.stack([ids[: n * block].view(n, block), labels[: n * block].view(n, block)], dim=1)


# ---------------------------------------------------------------- optimization


def _new_model(config: PretrainConfig, tokenizer: Any) -> Any:
    if config.init is not None:
        return load_model(Path(config.init))
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _optimize(
    config: PretrainConfig,
    tokenizer: Any,
    blocks: torch.Tensor,
    held: torch.Tensor,
    work: Path,
    progress: Progress,
) -> tuple[Any, list[dict[str, float]]]:
    model = _new_model(config, tokenizer)
    model = model.to(resolve_device(config.device))
    masters = fp32_masters(model)
    model = model.to(getattr(torch, config.dtype))
    per_chunk: Any = partial(chunk_step, z_loss=config.z_loss)
    body: Any = model.model
    if config.compile:
        if model.device.type == "cpu" and config.block <= SHORT_BLOCK:
            model.set_attn_implementation("eager")
        body, per_chunk = torch.compile(body), torch.compile(per_chunk)
    optimizers = make_optimizers(masters, config.lr_matrix, config.lr_other, config.weight_decay)
    start, history, mean = 0, [], math.nan
    if recover_folder(work / "state"):
        meta = load_training_state(work / "state", masters, optimizers)
        start, history, mean = meta["step"], meta["history"], meta.get("mean", math.nan)
        if start > config.steps:
            raise UserError(f"'{work / 'state'}' is of step {start}; set steps to at least that, or remove '{work}'.")
    masters_to_model(model, masters)
    task = progress.add_task("training", total=config.steps, completed=start)
    began = time.time()
    for step in range(start, config.steps):
        factor = learning_rate_factor(step, config.steps, config.warmup, config.decay)
        set_learning_rates(optimizers, (config.lr_matrix, config.lr_other), factor)
        loss = block_loss(model, body, _batch(blocks, step, config), per_chunk)
        loss.backward()
        gradients_to_masters(model, masters)
        value, wrong = clip_gradients(masters.values(), loss)
        if wrong:
            raise UserError(diverged(wrong, step, work / "state"))
        for optimizer in optimizers:
            optimizer.step()
        masters_to_model(model, masters)
        mean = value if math.isnan(mean) else 0.98 * mean + 0.02 * value
        progress.update(task, advance=1, description=f"training, loss {mean:.3f}")
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            held_loss = _held_out_loss(model, held, config)
            history.append({"step": step + 1, "loss": round(mean, 4), "held_out": round(held_loss, 4)})
            rate = (step + 1 - start) * config.batch * config.block / (time.time() - began)
            progress.console.print(f"step {step + 1}: loss {mean:.3f}, held-out {held_loss:.3f}, {rate:,.0f} tokens/s")
            save_training_state(
                work / "state", masters, optimizers, {"step": step + 1, "history": history, "mean": mean}
            )
    model.set_attn_implementation("sdpa")
    return model, history


def _questions(config: PretrainConfig, tokenizer: Any) -> list[list[int]]:
    """Ids of the prompts of unlikelihood training, none held out, in an order drawn from the seed."""
    chats = (r for r in _rows(config) if "messages" in r and _rate(config, r) > 0)
    rows = (r for r in chats if r["messages"][0]["role"] != "assistant")
    prompts = {example_key(r): r for r in rows}
    keys = sorted((k for k in prompts if k % HELD_OUT), key=lambda k: text_key(f"{k} {config.seed}"))
    found = [prompt_ids(tokenizer, prompt_messages(prompts[k], "unlikelihood")) for k in keys]
    short = [ids for ids in found if len(ids) <= LONGEST_QUESTION]
    if not short:
        raise UserError(
            f"{', '.join(config.data)}: no `messages` with a question of at most {LONGEST_QUESTION} tokens, which "
            "unlikelihood_steps needs; set that to 0, or add such rows."
        )
    return short


def _against_loops(
    config: PretrainConfig,
    model: Any,
    questions: list[list[int]],
    stop_id: int,
    blocks: torch.Tensor,
    work: Path,
    progress: Progress,
) -> list[dict[str, float]]:
    def language_loss(step: int) -> torch.Tensor:
        block = _batch(blocks, config.steps + step, config)[: max(1, config.batch // 2)]
        return block_loss(model, model.model, block, partial(chunk_step, z_loss=config.z_loss))

    history = unlikelihood(
        model,
        questions,
        language_loss,
        stop_id=stop_id,
        steps=config.unlikelihood_steps,
        batch=config.unlikelihood_batch,
        max_new_tokens=config.unlikelihood_tokens,
        lr=config.unlikelihood_lr,
        weight=config.unlikelihood_weight,
        progress=progress,
        log=work / "unlikelihood.json",
    )
    return history


def _batch(blocks: torch.Tensor, step: int, config: PretrainConfig) -> torch.Tensor:
    """The `step`-th batch: epochs are permutations drawn from the seed, so a resumed run sees the same data."""
    per_epoch = blocks.shape[0] // config.batch
    epoch, index = divmod(step, per_epoch)
    seed = (config.seed * 1000 + epoch) % 2**64
    order = torch.randperm(blocks.shape[0], generator=torch.Generator().manual_seed(seed))
    return blocks[order[index * config.batch : (index + 1) * config.batch]]


@torch.no_grad()
def _held_out_loss(model: Any, held: torch.Tensor, config: PretrainConfig) -> float:
    losses = [
        block_loss(model, model.model, held[i : i + config.batch], partial(chunk_step, z_loss=0.0)).item()
        for i in range(0, min(max(1, HELD_TOKENS // config.block), len(held)), config.batch)
    ]
    return sum(losses) / len(losses)
