"""Would a budget chosen anew in every step beat the best constant one? A replay of recorded steps.

    python benchmarks/budgets.py --prompts data/eval/*.jsonl --limit 4 --json benchmarks/results/budgets.json

Measured: the median time that scoring, acceptance and commit take with each budget, and steps drafted with the largest
one, of which the time of drafting, the probability of every node and the nodes that were accepted are kept. Replayed:
the tokens that the best m nodes of each recorded tree would have brought, with m constant, or with m chosen for each
step so that (1 + expected tokens) / time is largest, the expected tokens being the sum of the nodes' probabilities.
What the text would then have been drafted from is not replayed: the steps stay those of the largest budget.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from common import about, add_common
from ctc_drafter.bench.measure import encode
from ctc_drafter.bench.prompts import read_prompts
from ctc_drafter.bench.results import check_output, write_json
from ctc_drafter.cli.options import plain_errors
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import DEFAULT, Drafter, load_drafter
from ctc_drafter.steps import Step
from ctc_drafter.target import Target

Recorded = tuple[list[float], list[int], float]
"""Probabilities of a tree's nodes, falling, the places of the accepted ones among them, and the seconds of drafting."""


def steps_of(target: Target, drafter: Drafter, prompts: list[list[int]], budget: int, limit: int) -> list[Step]:
    """All drafted steps of the answers."""
    return [
        step
        for ids in prompts
        for step in generate(target, drafter, ids, max_new_tokens=limit, budget=budget, profile=True)
        if step.tree is not None
    ]


def recorded(step: Step) -> Recorded:
    """What the replay needs of a step. Raises SystemExit if its drafter gives no probabilities."""
    tree = step.tree
    if tree is None or tree.log_probs is None:
        raise SystemExit("This drafter gives no probabilities, so there is nothing to choose by.")
    probs = sorted(tree.log_probs[0].exp().tolist(), reverse=True)
    return probs, step.ranks[: step.accepted], drafting(step)


def drafting(step: Step) -> float:
    """Seconds that the step took before the target's pass, whatever the budget."""
    return step.seconds["draft"] + step.seconds["tree"]


def replay(steps: list[Recorded], seconds: dict[int, float]) -> dict[str, Any]:
    """Tokens per second with each constant budget, and with one chosen for each step."""

    def rate(budgets: list[int]) -> float:
        tokens = sum(1 + sum(i < m for i in accepted) for m, (_, accepted, _) in zip(budgets, steps))
        return tokens / sum(seconds[m] + own for m, (_, _, own) in zip(budgets, steps))

    constant = {m: rate([m] * len(steps)) for m in seconds}
    chosen, best = [max(constant, key=lambda m: constant[m])] * len(steps), 0.0
    # The choice that makes tokens / seconds largest is that of the largest tokens - rate * seconds (Dinkelbach 1967).
    for _ in range(20):
        best = rate(chosen)
        chosen = [max(seconds, key=lambda m: 1 + sum(probs[:m]) - best * seconds[m]) for probs, _, _ in steps]
    counts = {m: chosen.count(m) for m in seconds}
    return {"constant": constant, "chosen": rate(chosen), "steps_with_budget": counts}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=4, help="Prompts of each file.")
    parser.add_argument("--target", default=None)
    parser.add_argument("--drafters", nargs="+", default=[DEFAULT, "ctc"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[2, 4, 6, 8, 10, 12, 14, 16, 20, 24])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    add_common(parser, "float32")
    options = parser.parse_args()
    check_output(options.json, options.overwrite)
    target = Target.load(options.target, dtype=options.dtype, device=options.device)
    read = read_prompts(options.prompts, options.limit)
    prompts = [encode(target, [{"role": "user", "content": prompt.turns[0]}]) for prompt in read]
    rows = []
    for name in options.drafters:
        drafter = load_drafter(name, target)
        steps_of(target, drafter, prompts[:1], max(options.budgets), 24)  # warms up
        runs = {m: steps_of(target, drafter, prompts, m, options.max_new_tokens) for m in options.budgets}
        seconds = {
            m: statistics.median(sum(s.seconds.values()) - drafting(s) for s in steps) for m, steps in runs.items()
        }
        steps = [recorded(step) for step in runs[max(options.budgets)]]
        row = {"drafter": name, "steps": len(steps), "seconds": seconds, **replay(steps, seconds)}
        rows.append(row)
        best = max(row["constant"], key=lambda m: row["constant"][m])
        gain = row["chosen"] / row["constant"][best] - 1
        print(f"{name}: best constant budget {best}, {row['constant'][best]:.0f} tokens/s; chosen anew: {gain:+.1%}")
    write_json(options.json, {**about(), "target": target.name, "dtype": str(target.dtype), "rows": rows})
    print(f"Result: {options.json}")


if __name__ == "__main__":
    with plain_errors():
        main()
