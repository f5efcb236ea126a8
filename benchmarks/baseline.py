"""Is the plain loop an honest baseline? Times it beside `model.generate` on the same model, prompt by prompt.

python benchmarks/baseline.py --prompts PROMPTS.jsonl --limit 20 --json OUT.json
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ctc_drafter.bench.prompts import read_prompts
from ctc_drafter.bench.results import write_json
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import NoDrafter
from ctc_drafter.environment import machine, versions
from ctc_drafter.target import Target


def timed(run: Callable[[list[int]], list[int]], ids: list[int]) -> tuple[list[int], float]:
    began = time.perf_counter()
    tokens = run(ids)
    return tokens, time.perf_counter() - began


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target")
    parser.add_argument("--prompts", type=Path, required=True, nargs="+")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    rows = []
    for dtype in arguments.dtype:
        target = Target.load(arguments.target, dtype=dtype)

        def plain(ids: list[int], target: Target = target) -> list[int]:
            steps = generate(target, NoDrafter(), ids, max_new_tokens=arguments.max_new_tokens)
            return [t for step in steps for t in step.tokens]

        def transformers_generate(ids: list[int], target: Target = target) -> list[int]:
            with torch.inference_mode():
                out = target.model.generate(
                    torch.tensor([ids], device=target.device),
                    max_new_tokens=arguments.max_new_tokens,
                    do_sample=False,
                    repetition_penalty=1.0,
                    eos_token_id=sorted(target.stop_ids) or None,
                )
            return out[0, len(ids) :].tolist()

        prompts = [
            target.prompt_ids([{"role": "user", "content": p.turns[0]}])
            for p in read_prompts(arguments.prompts, arguments.limit)
        ]
        for i, ids in enumerate([prompts[0], *prompts]):
            runs = [("plain", plain), ("generate", transformers_generate)]
            done = {name: timed(run, ids) for name, run in (runs if i % 2 else runs[::-1])}
            if i == 0:
                continue  # warm-up
            row = {
                "dtype": dtype,
                "tokens": len(done["plain"][0]),
                "identical": done["plain"][0] == done["generate"][0],
            }
            row |= {f"{name}_seconds": seconds for name, (_, seconds) in done.items()}
            rows.append(row)
    totals = {}
    for dtype in arguments.dtype:
        mine = [row for row in rows if row["dtype"] == dtype]
        ratios = [row["generate_seconds"] / row["plain_seconds"] for row in mine]
        tokens = sum(row["tokens"] for row in mine)
        totals[dtype] = {
            "plain_tokens_per_second": tokens / sum(row["plain_seconds"] for row in mine),
            "generate_tokens_per_second": tokens / sum(row["generate_seconds"] for row in mine),
            "plain_over_generate_median": statistics.median(ratios),
            "identical": sum(row["identical"] for row in mine),
            "answers": len(mine),
        }
        print(dtype, {k: round(v, 3) for k, v in totals[dtype].items()})
    command = shlex.join(["python", *sys.argv])
    write_json(
        arguments.json,
        {"command": command, "machine": machine(), "versions": versions(), "totals": totals, "rows": rows},
    )
    print(f"Result: {arguments.json}")


if __name__ == "__main__":
    main()
