"""The target's own answers to prompts: what a drafter has to predict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import UserError
from ..target import Target
from .answers import batched_answers
from .data import copies, example_key, messages_of, read_jsonl


@dataclass
class DistillConfig:
    """Recipe of a distilled data set."""

    prompts: list[str]
    """JSONL files with `messages` (all up to the first answer is the prompt) or `turns` (the first one is)."""
    output: str
    """JSONL file of {id, source, prompt_ids, answer_ids, answer}; continued if it exists."""
    target: str | None = None
    """Model folder or hub name; None: the embedded target."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Share of each `source` (0..1) to use; 1.0 if absent."""
    limit: int = 0
    """Only the first so many prompts that fit; 0: all."""
    max_prompt_tokens: int = 512
    max_new_tokens: int = 192
    batch: int = 64
    temperature: float = 0.0
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if min(self.batch, self.max_new_tokens, self.max_prompt_tokens) < 1 or self.limit < 0 or self.temperature < 0:
            raise ValueError(
                "batch, max_new_tokens and max_prompt_tokens must be positive, limit and temperature not negative"
            )


@torch.inference_mode()
def distill(config: DistillConfig) -> Path:
    """Generate what is missing from `config.output`; returns its path. A killed run continues where it stopped."""
    output = Path(config.output)
    done = _finished(output)
    target = Target.load(
        config.target, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code
    )
    prompts = list(_prompts(config, target))
    if not prompts and not done:
        raise UserError(f"No usable prompt in {', '.join(config.prompts)}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("distilling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
    )
    with Progress(*columns) as progress, output.open("a", encoding="utf-8") as out:
        task = progress.add_task("", total=len(prompts), completed=sum(p[0] in done for p in prompts), tokens=0)
        total = 0
        for start in range(0, len(prompts), config.batch * 16):
            window = sorted(prompts[start : start + config.batch * 16], key=lambda p: len(p[2]))
            for i in range(0, len(window), config.batch):
                group = [p for p in window[i : i + config.batch] if p[0] not in done]
                if not group:
                    continue
                torch.manual_seed(config.seed * 10**6 + start + i)  # a resumed run samples what an unbroken one does
                answers = _answers(target, [p[2] for p in group], config)
                for (key, source, ids), answer in zip(group, answers):
                    text = target.tokenizer.decode(answer, skip_special_tokens=True)
                    row = {"id": key, "source": source, "prompt_ids": ids, "answer_ids": answer, "answer": text}
                    out.write(json.dumps(row) + "\n")
                    total += len(answer)
                out.flush()
                progress.update(task, advance=len(group), tokens=f"{total:,}")
    return output


def _finished(output: Path) -> set[str]:
    """Ids already in the file; a last line cut by a kill is removed."""
    if not output.exists():
        return set()
    content = output.read_bytes()
    end = content.rfind(b"\n") + 1
    foreign = UserError(f"'{output}' exists and is not a distilled data set; choose another output.")
    try:
        rows = [json.loads(line) for line in content[:end].splitlines()]
    except ValueError:
        raise foreign from None
    if not all(isinstance(row, dict) and {"id", "answer_ids"} <= row.keys() for row in rows):
        raise foreign
    tail = content[end:]
    if tail:
        start = b'{"id": "'
        key = tail[len(start) : len(start) + 16]
        if not tail.startswith(start[: len(tail)]) or key.strip(b"0123456789abcdef"):
            raise foreign
        with output.open("r+b") as file:
            file.truncate(end)
    return {row["id"] for row in rows}


def _prompts(config: DistillConfig, target: Target) -> Iterator[tuple[str, str, list[int]]]:
    """(id, source, prompt ids), each prompt once."""
    seen: set[str] = set()
    count = 0
    for path in config.prompts:
        for line, row in read_jsonl(path):
            source = str(row.get("source", row.get("category", "")))
            messages = _prompt_messages(row, f"{path}, line {line}")
            key = f"{example_key({'messages': messages}):016x}"
            if key in seen or not copies({"id": key}, min(1.0, config.mixture.get(source, 1.0))):
                continue
            seen.add(key)
            ids = target.prompt_ids(messages)
            if len(ids) > min(config.max_prompt_tokens, target.max_context - config.max_new_tokens):
                continue
            yield key, source, ids
            count += 1
            if count == config.limit:
                return


def _prompt_messages(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
            raise UserError(f"{where}: `turns` must be a list of texts that is not empty.")
        return [{"role": "user", "content": turns[0]}]
    messages: list[dict[str, str]] = []
    for message in messages_of(row, where) if "messages" in row else []:
        if message["role"] == "assistant":
            break
        messages.append(message)
    if not messages:
        raise UserError(f"{where}: neither `turns` nor `messages` that begin with a question.")
    return messages


def _answers(target: Target, prompts: list[list[int]], config: DistillConfig) -> list[list[int]]:
    pad = target.tokenizer.pad_token_id
    return batched_answers(
        target.model,
        prompts,
        pad=min(target.stop_ids, default=0) if pad is None else pad,
        stop_ids=target.stop_ids,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
    )
