"""Is a budget that the clock chooses as good as the best constant one? Both in one interleaved run.

    python benchmarks/adaptive.py --prompts FILE.jsonl ... --json benchmarks/results/adaptive.json

For each drafter plain decoding, constant budgets, and `--adaptive` up to the largest of them take turns, prompt by
prompt, so that drift of the machine cancels. The adaptive one learns over all the prompts, from the warm-up on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import about, add_common, ready_drafter
from ctc_drafter.bench.measure import Contender, Result, measure
from ctc_drafter.bench.results import check_output, write_json
from ctc_drafter.bench.suites import load_prompts
from ctc_drafter.cli.options import plain_errors
from ctc_drafter.drafters import Drafter
from ctc_drafter.pace import Pace
from ctc_drafter.target import Target

KEPT = ("answers", "identical", "tau", "speedup", "efficiency", "tokens_per_second", "plain_tokens_per_second", "split")
"""Of a contender's totals."""


def contenders(drafter: Drafter, budgets: list[int]) -> list[Contender]:
    """Every constant budget, and last the adaptive way up to the largest."""
    constant = [Contender(f"{drafter.name}, budget {budget}", drafter, budget) for budget in budgets]
    most = max(budgets)
    return [*constant, Contender(f"{drafter.name}, adaptive up to {most}", drafter, most, Pace.up_to(most))]


def main() -> None:
    options = _arguments()
    check_output(options.json, options.overwrite)
    prompts = load_prompts(options.prompts, options.limit)
    target = Target.load(options.target, dtype=options.dtype, device=options.device)
    drafters = [ready_drafter(name, target) for name in options.drafter]
    ways = [way for drafter in drafters for way in contenders(drafter, options.budgets)]
    turns = sum(len(prompt.turns) for prompt in prompts)

    def told(result: Result, row: object) -> None:
        done = len(result.rows)
        if result.name == ways[0].name and done % 10 == 0:
            print(f"{done} of {turns} answers", flush=True)

    results = measure(target, ways, prompts, max_new_tokens=options.max_new_tokens, on_row=told)
    rows = []
    for way, result in zip(ways, results):
        if not result.rows:
            continue
        totals = result.totals
        rows.append({"drafter": way.drafter.name, "budget": way.budget, "adaptive": way.pace is not None})
        rows[-1] |= {key: totals[key] for key in KEPT}
        print(
            f"{way.name:<28} tau {totals['tau']:.2f}  speedup {totals['speedup']:.3f}"
            f"  identical {totals['identical']}/{totals['answers']}"
        )
    if rows:
        write_json(options.json, {**about(), "dtype": options.dtype, "rows": rows})
        print(f"Result: {options.json}")
    if not all(result.complete for result in results):
        raise KeyboardInterrupt  # only now, since what is measured must not be lost


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--target")
    parser.add_argument("--drafter", nargs="+", default=["ctc+lookup", "ctc"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--limit", type=int, help="Prompts of each file.")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    add_common(parser, "float32")
    return parser.parse_args()


if __name__ == "__main__":
    with plain_errors():
        main()
