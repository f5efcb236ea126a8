"""Time to the first token of prompts that begin alike, with what earlier ones began with kept, and without.

    python benchmarks/prefixes.py --json benchmarks/results/prefixes.json

Random tokens stand for the text, the same for both ways, which take turns; rows run one at a time.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from common import about, add_common, timed
from ctc_drafter.batch import Batch
from ctc_drafter.bench.results import check_output, write_json
from ctc_drafter.cli.options import plain_errors
from ctc_drafter.drafters import load_drafter
from ctc_drafter.target import Target

LENGTHS = (128, 256, 512, 896)


def first_token(batch: Batch, ids: list[int], tokens: int) -> tuple[float, list[int]]:
    """Seconds to the first token, and the answer."""
    batch.add(ids, max_new_tokens=tokens)
    [(_, step)], seconds = timed(batch.step, batch.target.device)
    answer = list(step.tokens)
    while len(batch):
        answer += [token for _, step in batch.step() for token in step.tokens]
    return seconds, answer


def measure(target: Target, shared: int, options: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(shared)

    def some(count: int) -> list[int]:
        return torch.randint(target.vocab_size, (count,), generator=generator).tolist()

    drafter = load_drafter(options.drafter, target)
    beginning, sizes = some(shared), {"without": 0, "with": 2**28}
    batches = {name: Batch(target, drafter, rows=1, adaptive=False, prefix_cache=size) for name, size in sizes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    same = 0
    for i in range(options.prompts + 1):
        ids = beginning + some(options.own)
        answers = []
        for name, batch in batches.items():
            taken, answer = first_token(batch, ids, options.tokens)
            answers.append(answer)
            if i:  # the first prompt is read whole by both
                seconds[name].append(taken)
        same += answers[0] == answers[1]
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    kept = batches["with"].prefixes
    assert kept is not None
    return {"shared": shared, "own": options.own, **medians, "identical": same, "prompts": i + 1, "kept": kept.nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--drafter", default="ctc")
    parser.add_argument("--prompts", type=int, default=12, help="Prompts for each length that they share.")
    parser.add_argument("--own", type=int, default=24, help="Tokens of each prompt that no other has.")
    parser.add_argument("--tokens", type=int, default=16, help="New tokens, for the comparison of the answers.")
    add_common(parser, "float32")
    options = parser.parse_args()
    check_output(options.json, options.overwrite)
    target = Target.load(options.target, dtype=options.dtype, device=options.device)
    target.stop_ids = frozenset()
    rows = [measure(target, shared, options) for shared in LENGTHS]
    for row in rows:
        print(
            f"{row['shared']:5} shared + {row['own']} own tokens: first token after {1e3 * row['without']:.1f} ms, "
            f"{1e3 * row['with']:.1f} ms with the prefix kept; {row['identical']} of {row['prompts']} answers identical"
        )
    write_json(options.json, {**about(), "dtype": options.dtype, "rows": rows})
    print(f"Result: {options.json}")


if __name__ == "__main__":
    with plain_errors():
        main()
