"""Total tokens per second of batches: plain, drafted, and drafted only where the engine finds that it pays.

python benchmarks/batches.py --prompts PROMPTS.jsonl --limit 32 --json OUT.json

For each batch size all prompts run through a batch of so many rows, a new one joining whenever one ends, so that the
batch is full but for the end. The three ways take turns round by round. `identical` counts answers equal to those of
plain decoding one by one; where one differs, `gaps` has the distance in nat between the two tokens at the first
difference, by the logits of a pass over the text so far.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

from common import about, ready_drafter
from ctc_drafter.batch import Batch
from ctc_drafter.bench.measure import first_gap, tau_of
from ctc_drafter.bench.prompts import read_prompts
from ctc_drafter.bench.results import check_output, write_json
from ctc_drafter.cli.options import plain_errors
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import Drafter, NoDrafter
from ctc_drafter.target import Target
from ctc_drafter.words import number

MODES = ("plain", "drafted", "adaptive")


def run(batch: Batch, prompts: list[list[int]], max_new_tokens: int) -> tuple[list[list[int]], dict[str, Any]]:
    """All answers, and what it took; the seconds of full batches are counted apart from those of the end."""
    waiting = deque(enumerate(prompts))
    answers: list[list[int]] = [[] for _ in prompts]
    index: dict[int, int] = {}
    passes: Counter[int] = Counter()
    began, row_passes = time.perf_counter(), 0
    full_seconds = full_tokens = 0.0
    while waiting or len(batch):
        while waiting and batch.free:
            i, ids = waiting.popleft()
            index[batch.add(ids, max_new_tokens=max_new_tokens)] = i
        full, start = not batch.free, time.perf_counter()
        steps = batch.step()
        seconds, tokens = time.perf_counter() - start, 0
        for key, step in steps:
            answers[index[key]] += step.tokens
            tokens += len(step.tokens)
        decoded = [step for _, step in steps if step.tree is not None]
        row_passes += len(decoded)
        if decoded:
            passes[max(step.drafted for step in decoded)] += 1
        if full:
            full_seconds, full_tokens = full_seconds + seconds, full_tokens + tokens
    total = sum(map(len, answers))
    return answers, {
        "seconds": time.perf_counter() - began,
        "tokens": total,
        "full_seconds": full_seconds,
        "full_tokens": full_tokens,
        "tau": tau_of(total, len(prompts), row_passes),
        "passes_by_budget": dict(sorted(passes.items())),
    }


def measure(target: Target, drafter: Drafter, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every round, batch size and mode."""
    prompts = [
        target.prompt_ids([{"role": "user", "content": p.turns[0]}])
        for p in read_prompts(options.prompts, options.limit)
    ]
    alone = [
        [t for step in generate(target, NoDrafter(), ids, max_new_tokens=options.max_new_tokens) for t in step.tokens]
        for ids in prompts
    ]
    rows = []
    for size in options.sizes:
        # The adaptive batch is kept over the rounds, as a server would keep it: it learns once.
        batches = {
            "plain": Batch(target, NoDrafter(), rows=size, budget=0),
            "drafted": Batch(target, drafter, rows=size, budget=options.budget, adaptive=False),
            "adaptive": Batch(target, drafter, rows=size, budget=options.budget),
        }
        for batch in batches.values():
            run(batch, prompts[:size], 16)  # warm-up
        for round_ in range(options.rounds):
            turn = MODES[round_ % 3 :] + MODES[: round_ % 3]
            for mode in turn:
                answers, row = run(batches[mode], prompts, options.max_new_tokens)
                different = [(i, a, b) for i, (a, b) in enumerate(zip(alone, answers)) if a != b]
                row["identical"], row["answers"] = len(prompts) - len(different), len(prompts)
                row["gaps"] = [first_gap(target, prompts[i], a, b) for i, a, b in different]
                rows.append({"batch": size, "mode": mode, "round": round_, **row})
                speed = row["tokens"] / row["seconds"]
                print(
                    f"batch {size:2}  {mode:8}  {speed:7.1f} tok/s  tau {number(row['tau'])}  "
                    f"{row['identical']} of {row['answers']} identical  {row['passes_by_budget']}",
                    flush=True,
                )
    return rows


def totals(rows: list[dict[str, Any]], sizes: list[int]) -> list[dict[str, Any]]:
    """Tokens per second over all rounds, and the speedup over plain: totals over totals, and the median of rounds."""
    out = []
    for size in sizes:
        entry: dict[str, Any] = {"batch": size}
        of = {mode: [r for r in rows if r["batch"] == size and r["mode"] == mode] for mode in MODES}
        for mode, mine in of.items():
            speed = sum(r["tokens"] for r in mine) / sum(r["seconds"] for r in mine)
            full = sum(r["full_seconds"] for r in mine)
            ratios = [
                r["tokens"] / r["seconds"] / (p["tokens"] / p["seconds"])
                for r, p in zip(mine, of["plain"], strict=True)
            ]
            entry[mode] = {
                "tokens_per_second": speed,
                "full_batch_tokens_per_second": sum(r["full_tokens"] for r in mine) / full if full else None,
                "speedup": speed / entry["plain"]["tokens_per_second"] if "plain" in entry else 1.0,
                "speedup_median": statistics.median(ratios),
                "identical": sum(r["identical"] for r in mine),
                "answers": sum(r["answers"] for r in mine),
            }
        out.append(entry)
    return out


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--drafter", default="ctc")
    parser.add_argument("--prompts", type=Path, required=True, nargs="+")
    parser.add_argument("--limit", type=int, default=32, help="Prompts of each file.")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--budget", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    check_output(options.json, options.overwrite)
    results = {}
    for dtype in options.dtype:
        target = Target.load(options.target, dtype=dtype)
        rows = measure(target, ready_drafter(options.drafter, target), options)
        results[dtype] = {"totals": totals(rows, options.sizes), "rows": rows}
        for entry in results[dtype]["totals"]:
            said = (f"{mode} {entry[mode]['tokens_per_second']:.1f} ({entry[mode]['speedup']:.2f})" for mode in MODES)
            print(dtype, f"batch {entry['batch']:2}:", ", ".join(said), "tok/s (speedup)")
    write_json(options.json, {**about(), "results": results})
    print(f"Result: {options.json}")


if __name__ == "__main__":
    with plain_errors():
        main()
