"""What the target's matrix products cost by number of rows, each way of keeping the weights; on a CPU.

    python benchmarks/products.py --json benchmarks/results/products.json

All linear layers of the target, one after another on random rows, as a pass runs them; milliseconds for all of them,
the median of interleaved rounds. `linear` is torch's own, `transposed` a plain product with weights kept (in, out), as
compiled passes do it, `mkl` and `onednn` are packed by those libraries beforehand, `bfloat16` by oneDNN;
`bfloat16_unpacked` is a plain product, as compiled passes make it where the processor has tiles (AMX).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import about
from ctc_drafter.bench.results import check_output, write_json
from ctc_drafter.cli.options import plain_errors
from ctc_drafter.target import Target

Run = Callable[[], None]
INNER = 15


def ways(weights: list[torch.Tensor], rows: int) -> dict[str, Run]:
    """Each way as a function that makes all products of `rows` rows."""
    x = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in weights}
    low = {width: values.bfloat16() for width, values in x.items()}
    transposed = [w.t().contiguous() for w in weights]
    packed = [torch.ops.mkl._mkl_reorder_linear_weight(w, rows) for w in weights]
    blocked = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]
    halves = [w.bfloat16() for w in weights]
    small = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in halves]

    def linear() -> None:
        for w in weights:
            F.linear(x[w.shape[1]], w)

    def of_transposed() -> None:
        for w in transposed:
            torch.mm(x[w.shape[0]], w)

    def mkl() -> None:
        for w, p in zip(weights, packed):
            torch.ops.mkl._mkl_linear(x[w.shape[1]], p, w, None, rows)

    def onednn() -> None:
        for w, p in zip(weights, blocked):
            torch.ops.mkldnn._linear_pointwise(x[w.shape[1]], p, None, "none", [], "")

    def bfloat16() -> None:
        for w, p in zip(weights, small):
            torch.ops.mkldnn._linear_pointwise(low[w.shape[1]], p, None, "none", [], "")

    def unpacked() -> None:
        for w in halves:
            torch.mm(low[w.shape[1]], w.t())

    return {
        "linear": linear,
        "transposed": of_transposed,
        "mkl": mkl,
        "onednn": onednn,
        "bfloat16": bfloat16,
        "bfloat16_unpacked": unpacked,
    }


def measure(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median milliseconds of each. In turns of INNER runs each, for a decoding loop finds its weights in the cache."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            for _ in range(INNER):
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=None)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 9, 12, 16, 17, 24, 32])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    check_output(options.json, options.overwrite)
    target = Target.load(options.target, dtype="float32", device="cpu")
    weights = [m.weight.detach() for m in target.model.modules() if type(m) is nn.Linear]
    lines = []
    for rows in options.rows:
        line = {"rows": rows, **measure(ways(weights, rows), options.rounds)}
        lines.append(line)
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v:>3}" for k, v in line.items()))
    size = sum(w.nbytes for w in weights)
    write_json(options.json, {**about(), "target": target.name, "megabytes": size / 1e6, "rows": lines})
    print(f"Result: {options.json}")


if __name__ == "__main__":
    with plain_errors():
        main()
