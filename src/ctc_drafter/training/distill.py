"""The target's own answers to prompts: what a drafter has to predict."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..acceptance import SEEDS
from ..chat import prompt_ids
from ..errors import UserError
from ..jsonl import read_jsonl
from ..target import Target
from .answers import batched_answers
from .checkpoint import check_recipe
from .data import SPLIT, Exclusion, Prompt, copies, example_key, later_questions, prompt_messages, text_key
from .lock import locked
from .remote import RemoteTarget


@dataclass
class DistillConfig:
    """Recipe of a distilled data set."""

    prompts: list[str]
    """JSONL files with `messages` (all up to the first answer is the prompt) or `turns` (the first one is)."""
    output: str
    """JSONL file of {id, source, prompt_ids, answer_ids, answer}; continued if it exists."""
    target: str | None = None
    """Model folder or hub name; None: the embedded target."""
    turns: int = 1
    """Questions of a row to ask, each after the target's own answers to those before."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Share of each `source` (0..1) to use; 1.0 if absent."""
    exclude: list[str] = field(default_factory=list)
    """Prompt files; a prompt that shares 13 consecutive words with one of them, or asks a shorter one, is dropped."""
    limit: int = 0
    """Only the first so many prompts that fit, with their later questions; 0: all."""
    max_prompt_tokens: int = 512
    max_new_tokens: int = 192
    batch: int = 64
    temperature: float = 0.0
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False
    api_base: str | None = None
    """Address of an OpenAI-compatible server that runs the target, such as http://localhost:8000/v1; None: run it here.
    Of the target only the tokenizer is loaded then; `batch`, `dtype` and `device` have no meaning."""
    api_key_env: str | None = None
    """Environment variable that holds the server's key."""
    api_model: str | None = None
    """The target's name at the server; None: the only one there, or the one named like the target."""
    api_chat: bool = False
    """Send messages, which the server renders by its own chat template, instead of token ids."""
    concurrency: int = 16
    """Requests under way at once."""
    request_timeout: float = 600.0
    """Seconds without an answer after which a request is sent again."""

    def __post_init__(self) -> None:
        if min(self.batch, self.max_new_tokens, self.max_prompt_tokens, self.turns) < 1 or self.limit < 0:
            raise ValueError("batch, max_new_tokens, max_prompt_tokens and turns must be positive, limit not negative")
        if not 0 <= self.temperature < math.inf:
            raise ValueError("temperature must be finite and not negative")
        if not all(0 <= rate < math.inf for rate in self.mixture.values()):
            raise ValueError("the shares of mixture must be finite and not negative")
        if self.seed not in SEEDS:
            raise ValueError("seed must be at least -2**63 and below 2**64")
        if self.concurrency < 1 or not self.request_timeout > 0:
            raise ValueError("concurrency must be at least 1, request_timeout more than 0")
        if self.api_base is None and (self.api_key_env or self.api_model or self.api_chat):
            raise ValueError("api_key_env, api_model and api_chat have no meaning without api_base")


DECIDING = {"target", "temperature", "max_new_tokens"}
"""What may not change between a run and its continuation: it decides what an answer is."""


def distill(config: DistillConfig) -> Path:
    """Get what is missing from `config.output`; returns its path. A killed run continues where it stopped.

    Raises UserError while another run writes to it, or if it was begun with another target or other lengths.
    """
    output = Path(config.output)
    recipe = asdict(config)
    with locked(output.with_name(output.name + ".lock")):
        done = finished(output)
        kept = output.with_name(output.name + ".recipe.json")
        if not done:
            kept.unlink(missing_ok=True)
        check_recipe(kept, recipe, recipe.keys() - DECIDING, belongs=[output])
        return _distill(config, output, done)


def _distill(config: DistillConfig, output: Path, done: set[str]) -> Path:
    columns = (
        TextColumn("distilling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tokens]} tokens, {task.fields[rate]} tokens/s"),
    )
    target = RemoteTarget(config) if config.api_base is not None else _local_target(config)
    console = Console(markup=False, emoji=False)  # what a server says is no markup
    with Progress(*columns, console=console) as progress:
        prompts = _prompts(config, target.tokenizer, target.max_context, progress)
        if not prompts and not done:
            raise UserError(f"No usable prompt in {', '.join(config.prompts)}.")
        task = progress.add_task("", total=0, tokens=0, rate=0)
        output.parent.mkdir(parents=True, exist_ok=True)
        asked, total, began = 0, 0, time.monotonic()
        while prompts:
            missing = [p for p in prompts if p.key not in done]
            progress.update(task, total=asked + len(prompts), completed=asked + len(prompts) - len(missing))
            if isinstance(target, RemoteTarget):
                rows: Generator[list[dict[str, Any]]] = target.answers(missing)
            else:
                rows = _local_answers(target, prompts, done, config, asked)
            with closing(rows):
                for group in rows:
                    _append(output, "".join(json.dumps(row) + "\n" for row in group).encode())
                    total += sum(len(row["answer_ids"]) for row in group)
                    rate = total / max(time.monotonic() - began, 1e-3)
                    progress.update(task, advance=len(group), tokens=f"{total:,}", rate=f"{rate:,.0f}")
            asked += len(prompts)
            prompts = _follow_ups(prompts, output, config, target.tokenizer, target.max_context)
        if isinstance(target, RemoteTarget):
            for sentence in target.tally.sentences():
                progress.console.print(sentence)
            if not done:
                target.check_answered()
    return output


def _local_target(config: DistillConfig) -> Target:
    return Target.load(
        config.target, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code
    )


def _local_answers(
    target: Target, prompts: list[Prompt], done: set[str], config: DistillConfig, asked: int
) -> Generator[list[dict[str, Any]]]:
    """Rows of the prompts that are not `done`, a batch at a time, prompts of similar length together.

    asked: how many prompts came before these, in earlier turns.
    """
    for start in range(0, len(prompts), config.batch * 16):
        window = sorted(prompts[start : start + config.batch * 16], key=lambda p: len(p.ids))
        for i in range(0, len(window), config.batch):
            group = [p for p in window[i : i + config.batch] if p.key not in done]
            if not group:
                continue
            # A resumed run samples what an unbroken one does.
            torch.manual_seed((config.seed * 10**6 + asked + start + i) % 2**64)
            answers = _answers(target, [p.ids for p in group], config)
            yield [
                prompt.row(answer, target.tokenizer.decode(answer, skip_special_tokens=True))
                for prompt, answer in zip(group, answers)
            ]


def _append(output: Path, lines: bytes) -> None:
    """Add lines to the file: all of them or, on a full disk, none. Raises UserError then."""
    try:
        with output.open("ab", buffering=0) as out:
            size = out.tell()
            try:
                written = 0
                while written < len(lines):
                    written += out.write(lines[written:])
            except OSError:
                out.truncate(size)
                raise
    except OSError as error:
        raise UserError(
            f"'{output}' could not be written ({error.strerror or error}); the answers in it are kept, a rerun goes on."
        ) from None


def finished(output: Path) -> set[str]:
    """Ids already in the file; a last line cut by a kill is removed. Raises UserError for a file of another kind."""
    if not output.exists():
        return set()
    content = output.read_bytes()
    end = content.rfind(b"\n") + 1
    foreign = UserError(f"'{output}' exists and is not a distilled data set; choose another output.")
    try:
        rows = [json.loads(line) for line in content[:end].splitlines()]
    except (ValueError, RecursionError):
        raise foreign from None
    if not all(isinstance(row, dict) and isinstance(row.get("id"), str) and "answer_ids" in row for row in rows):
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


def _prompts(config: DistillConfig, tokenizer: Any, max_context: int, progress: Progress) -> list[Prompt]:
    """The prompts to answer, each once."""
    seen: set[str] = set()
    found: list[Prompt] = []
    banned = Exclusion(config.exclude)
    dropped = 0
    for where, row in _rows(config):
        source = str(row.get("source", row.get("category", "")))
        messages = prompt_messages(row, where)
        later = tuple(later_questions(row, where)[: config.turns - 1]) if config.turns > 1 else ()
        key = f"{example_key({'messages': messages}):016x}"
        if key in seen or not copies({"id": key}, min(1.0, config.mixture.get(source, 1.0))):
            continue
        seen.add(key)
        if banned.dropped_by({"messages": messages + [{"role": "user", "content": text} for text in later]}):
            dropped += 1
            continue
        ids = prompt_ids(tokenizer, messages)
        if len(ids) > _longest(config, max_context):
            continue
        found.append(Prompt(key, source, messages, ids, later))
        if len(found) == config.limit:
            break
    if config.exclude:
        progress.console.print(f"{dropped} prompts dropped for an overlap with {len(config.exclude)} prompt files")
    return found


def _follow_ups(
    prompts: list[Prompt], output: Path, config: DistillConfig, tokenizer: Any, max_context: int
) -> list[Prompt]:
    """The next questions of the prompts, after their answers in `output`; what does not fit is left out."""
    wanted = {p.key for p in prompts if p.later}
    if not wanted:
        return []
    answers = {row["id"]: row.get("answer") for _, row in read_jsonl(output) if row["id"] in wanted}
    found = []
    for prompt in prompts:
        answer = answers.get(prompt.key)
        if not isinstance(answer, str):  # refused by the server, or none of ours
            continue
        said = {"role": "assistant", "content": answer}, {"role": "user", "content": prompt.later[0]}
        messages = [*prompt.messages, *said]
        ids = prompt_ids(tokenizer, messages)
        if len(ids) <= _longest(config, max_context):
            found.append(Prompt(_next_key(prompt), prompt.source, messages, ids, prompt.later[1:]))
    return found


def _next_key(prompt: Prompt) -> str:
    """Of the next turn: its remainder by which rows are held out is that of the turn before, so they go together."""
    key, before = text_key(f"{prompt.key} {prompt.later[0]}"), int(prompt.key, 16)
    return f"{key - key % SPLIT + before % SPLIT:016x}"


def _longest(config: DistillConfig, max_context: int) -> int:
    """Tokens that a prompt may have."""
    return min(config.max_prompt_tokens, max_context - config.max_new_tokens)


def _rows(config: DistillConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in config.prompts:
        for line, row in read_jsonl(path):
            yield f"{path}, line {line}", row


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
