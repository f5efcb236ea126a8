"""The one place where metrics are defined: tau, acceptance, speedup, efficiency, identity, loops.

    tau                 tokens emitted after the prefill's token / verification steps (1 + accepted / steps)
    acceptance at k     steps that accepted their k-th draft token / steps (unconditional)
    speedup             (tokens / seconds) drafted / (tokens / seconds) plain, totals over totals
    efficiency          speedup / tau
    calibration         tokens that the drafter expects to be accepted, the sum of its tree's probabilities, beside
                        those that are, over the steps whose trees have probabilities, each answer's last left out
    identical           answers whose tokens all equal the plain run's
    looped              answers that end in a repeating loop; loops are easy to draft and flatter tau

Seconds are those of the model's work, prefill included; what a consumer does between two steps is not counted.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..acceptance import Sampling
from ..decoding import generate
from ..drafters import Drafter, load_drafter
from ..errors import UserError
from ..loops import ends_in_loop
from ..pace import Pace
from ..steps import PHASES, Step
from ..target import Target
from ..tree import DraftTree
from .prompts import Prompt

WARM_UP_TOKENS = 24

Row = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """A drafter with a budget, to be measured against plain decoding."""

    name: str
    drafter: Drafter
    budget: int
    pace: Pace | None = None
    """Chooses how much to draft up to the budget; None: always all of it."""


@dataclass
class Answer:
    """One generation: its tokens, the accepted length of each verification step, and where the time went."""

    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    finish: str | None = None
    expected: list[float | None] = field(default_factory=list)
    """What the drafter expected in place of `accepted`; None where its tree has no probabilities, and at the end."""

    def add(self, step: Step) -> None:
        """Count one step; the prefill (whose seconds say so) is not a verification step."""
        self.tokens += step.tokens
        if "prefill" not in step.seconds:
            self.accepted.append(step.accepted)
            # The last step is cut by the answer's end, of which no drafter knows.
            self.expected.append(None if step.finish else expected_length(step.tree))
        for name, seconds in step.seconds.items():
            self.parts[name] = self.parts.get(name, 0.0) + seconds
        self.finish = step.finish

    @property
    def tau(self) -> float | None:
        """Tokens per verification step; None before the first."""
        return tau_of(len(self.tokens), 1, len(self.accepted))

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of model work so far, prefill included."""
        return _ratio(len(self.tokens), self.seconds)


@dataclass
class Result:
    """What one contender did: a row per answer, the answers left out, and whether the run came to its end."""

    name: str
    budget: int
    parameters: int
    rows: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)
    complete: bool = False

    @property
    def totals(self) -> dict[str, Any]:
        """Totals over all rows, and under `categories` the same for each category."""
        names = dict.fromkeys(row["category"] for row in self.rows)
        by_category = {name: totals([row for row in self.rows if row["category"] == name]) for name in names}
        return {**totals(self.rows), "peak_memory_mb": peak_memory_mb(), "categories": by_category}


def timed(steps: Iterator[Step], answer: Answer, target: Target) -> Iterator[Step]:
    """Yield the steps and record them in `answer`; the clock runs only while the model works."""
    while True:
        began = time.perf_counter()
        step = next(steps, None)
        if step is None or step.finish is not None:
            _synchronize(target)
        answer.seconds += time.perf_counter() - began
        if step is None:
            return
        answer.add(step)
        yield step


def measure(
    target: Target,
    contenders: Sequence[Contender],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    raw: bool = False,
    skip_too_long: bool = False,
    profile: bool = False,
    on_row: Callable[[Result, Row], None] | None = None,
    on_skip: Callable[[int], None] | None = None,
) -> list[Result]:
    """Answer every turn once plainly and once with each contender, interleaved; one Result per contender.

    The order rotates from answer to answer, so that drift of the machine cancels. A conversation continues with the
    plain run's answer; `raw` joins its texts without a chat template. First turns that do not fit the context raise
    UserError before any work, unless `skip_too_long`; turns that do not fit, and so those after them, are listed in
    `Result.skipped`, and `on_skip` is told how many answers these are. Ctrl-C ends the measurement: the rows so far are
    returned with `complete` False. `profile` makes the time split true on a GPU, at the price of speed.
    """
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": stop, "profile": profile}
    rotation = _Rotation(target, contenders, options)
    results = [Result(c.name, c.budget, c.drafter.num_parameters) for c in contenders]
    if not skip_too_long:
        check_lengths(target, prompts, raw)
    try:
        for prompt in prompts:
            messages: list[dict[str, str]] = []
            for turn, text in enumerate(prompt.turns):
                messages.append({"role": "user", "content": text})
                ids = encode(target, messages, raw)
                if len(ids) >= target.max_context:
                    left = _left_out(prompt, turn, len(ids))
                    for result in results:
                        result.skipped += left
                    if on_skip is not None:
                        on_skip(len(left) * len(results))
                    break
                plain, *drafted = rotation.answers(ids)
                for result, answer in zip(results, drafted):
                    row: Row = {"id": prompt.id, "category": prompt.category, "turn": turn}
                    row |= compare(target, ids, answer, plain, sampling)
                    result.rows.append(row)
                    if on_row is not None:
                        on_row(result, row)
                messages.append({"role": "assistant", "content": decode(target, plain.tokens)})
    except KeyboardInterrupt:
        return results
    for result in results:
        result.complete = True
    return results


def _left_out(prompt: Prompt, turn: int, tokens: int) -> list[Row]:
    """What is said of a turn whose prompt has too many tokens, and of those that follow, whose prompts have more."""
    rest = range(turn, len(prompt.turns))
    return [{"id": prompt.id, "turn": t, "prompt_tokens": tokens if t == turn else None} for t in rest]


class _Rotation:
    """Plain decoding and the contenders, taking turns at being first; warmed up on the first prompt."""

    def __init__(self, target: Target, contenders: Sequence[Contender], options: dict[str, Any]) -> None:
        self._target = target
        self._runners = [Contender("none", load_drafter("none", target), 0), *contenders]
        self._options = options
        self._turn = 0

    def answers(self, ids: list[int]) -> list[Answer]:
        """One answer of each, plain first in the list, whatever the order in time."""
        n = len(self._runners)
        if self._turn == 0:
            for which in range(n):
                self._run(which, ids, min(WARM_UP_TOKENS, self._options["max_new_tokens"]))
        order = [(self._turn + i) % n for i in range(n)]
        self._turn += 1
        done = {which: self._run(which, ids, self._options["max_new_tokens"]) for which in order}
        return [done[which] for which in range(n)]

    def _run(self, which: int, ids: list[int], limit: int) -> Answer:
        runner, answer = self._runners[which], Answer()
        _synchronize(self._target)
        options = {**self._options, "max_new_tokens": limit, "pace": runner.pace}
        steps = generate(self._target, runner.drafter, ids, budget=runner.budget, **options)
        for _ in timed(steps, answer, self._target):
            pass
        return answer


def encode(target: Target, messages: list[dict[str, str]], raw: bool = False) -> list[int]:
    """Token ids of a conversation: through the chat template, or with `raw` of its texts, one under the other."""
    if not raw:
        return target.prompt_ids(messages)
    return list(target.tokenizer("\n".join(m["content"] for m in messages), verbose=False)["input_ids"])


def check_lengths(target: Target, prompts: Sequence[Prompt], raw: bool = False) -> None:
    """Raise UserError for the first prompt whose first turn leaves no room for an answer."""
    for prompt in prompts:
        n = len(encode(target, [{"role": "user", "content": prompt.turns[0]}], raw))
        if n >= target.max_context:
            raise UserError(
                f"Prompt '{prompt.id}' has {n} tokens, but the context of '{target.name}' ends at "
                f"{target.max_context}; remove it or pass --skip-too-long."
            )


def decode(target: Target, tokens: list[int]) -> str:
    """The answer's text without special tokens, as the next turn of a conversation needs it."""
    return str(target.tokenizer.decode(tokens, skip_special_tokens=True))


def compare(target: Target, ids: list[int], drafted: Answer, plain: Answer, sampling: Sampling = Sampling()) -> Row:
    """The row of one answer: the drafted run beside the plain run on prompt `ids`.

    Sampled answers cannot be compared token by token; under a repetition penalty raw logits say nothing of a near-tie.
    """
    identical = drafted.tokens == plain.tokens if sampling.temperature == 0 else None
    gap = 0.0 if identical else None
    if identical is False and sampling.repetition_penalty == 1.0:
        gap = first_gap(target, ids, plain.tokens, drafted.tokens)
    return {
        "tokens": len(drafted.tokens),
        "steps": len(drafted.accepted),
        "seconds": drafted.seconds,
        "plain_tokens": len(plain.tokens),
        "plain_seconds": plain.seconds,
        "identical": identical,
        "gap": gap,
        "looped": ends_in_loop(drafted.tokens),
        "accepted": drafted.accepted,
        "expected": [None if e is None else round(e, 3) for e in drafted.expected],
        "parts": drafted.parts,
    }


def totals(rows: Sequence[Row]) -> dict[str, Any]:
    """Sums and ratios of sums over `rows`; a ratio without a denominator is None."""
    tokens, seconds = sum(row["tokens"] for row in rows), sum(row["seconds"] for row in rows)
    steps = sum(row["steps"] for row in rows)
    tau = tau_of(tokens, len(rows), steps)
    rate = _ratio(tokens, seconds)
    plain_rate = _ratio(sum(row["plain_tokens"] for row in rows), sum(row["plain_seconds"] for row in rows))
    speedup = _ratio(rate, plain_rate)
    sampled = any(row["identical"] is None for row in rows)
    gaps = [row["gap"] for row in rows if row["gap"] is not None]
    return {
        "prompts": len({(row["category"], row["id"]) for row in rows}),
        "answers": len(rows),
        "tokens": tokens,
        "steps": steps,
        "tau": tau,
        "acceptance_at": acceptance_at([n for row in rows for n in row["accepted"]]),
        "tokens_per_second": rate,
        "plain_tokens_per_second": plain_rate,
        "speedup": speedup,
        "efficiency": _ratio(speedup, tau),
        "identical": None if sampled else sum(row["identical"] for row in rows),
        "largest_gap": max(gaps, default=None),
        "calibration": calibration([pair for row in rows for pair in zip(row["expected"], row["accepted"])]),
        "looped": sum(row["looped"] for row in rows),
        "split": split([row["parts"] for row in rows], steps),
    }


def tau_of(tokens: int, answers: int, steps: int) -> float | None:
    """Tokens per verification step, the first of each answer not counted: it comes from the prefill. None: no step."""
    return _ratio(tokens - answers, steps)


def acceptance_at(accepted: Sequence[int]) -> list[float]:
    """For k = 1, 2, ...: the share of steps that accepted at least k draft tokens."""
    return [sum(n >= k for n in accepted) / len(accepted) for k in range(1, max(accepted, default=0) + 1)]


def expected_length(tree: DraftTree | None) -> float | None:
    """How many nodes of a tree of one row are accepted, by its own probabilities; None if it has none."""
    if tree is None or tree.log_probs is None:
        return None
    return float(tree.log_probs.exp().sum())


def calibration(steps: Sequence[tuple[float | None, int]]) -> dict[str, Any] | None:
    """Mean expected and mean accepted length of (expected, accepted) pairs, and of those by the expected length's
    whole part under `bins`: [steps, expected, accepted]. Pairs without an expectation do not count; None: no other."""
    known = [(expected, accepted) for expected, accepted in steps if expected is not None]
    if not known:
        return None

    def mean(pairs: Sequence[tuple[float, int]]) -> list[float]:
        return [sum(column) / len(pairs) for column in zip(*pairs)]

    parts = [[pair for pair in known if int(pair[0]) == n] for n in range(int(max(known)[0]) + 1)]
    expected, accepted = mean(known)
    bins = [[len(part), *mean(part)] for part in parts if part]
    return {"steps": len(known), "expected": expected, "accepted": accepted, "bins": bins}


def split(parts: Sequence[dict[str, float]], steps: int) -> dict[str, Any]:
    """Share of step time of each part, and under `microseconds` its mean per step (`step`: all of it)."""
    seconds = {name: sum(p.get(name, 0.0) for p in parts) for name in PHASES}
    whole = sum(seconds.values())
    micro = {name: _ratio(1e6 * s, steps) for name, s in {**seconds, "step": whole}.items()}
    return {**{name: _ratio(s, whole) for name, s in seconds.items()}, "microseconds": micro}


@torch.inference_mode()
def first_gap(target: Target, ids: list[int], plain: list[int], drafted: list[int]) -> float | None:
    """Log-probability gap in nats, under the target, between the two tokens where the answers first differ.

    One teacher-forced pass over the common prefix in the run's dtype, its LM head in float32: bfloat16 logits around 20
    are 0.125 apart, so the difference of two of them says little. None if one answer only ends earlier.
    """
    common = next((i for i, (a, b) in enumerate(zip(plain, drafted)) if a != b), None)
    if common is None:
        return None
    context = torch.tensor([ids + plain[:common]], device=target.device)
    with _float32_head(target.head):
        logits = target.model(input_ids=context, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    return abs(float(logits[plain[common]] - logits[drafted[common]]))


@contextmanager
def _float32_head(head: Any) -> Iterator[None]:
    weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()
    own = head.__dict__.get("forward")
    head.forward = lambda x: torch.nn.functional.linear(x.float(), weight, bias)
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def peak_memory_mb() -> float:
    """Largest memory use of this process so far: on the GPU where there is one, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    with suppress(OSError, StopIteration):  # getrusage also counts what the parent held when this process began
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _synchronize(target: Target) -> None:
    if torch.device(target.device).type == "cuda":
        torch.cuda.synchronize()
