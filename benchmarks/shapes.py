"""What drafting would gain at real sizes, without real weights: random models of known shapes, acceptance replayed.

    python benchmarks/shapes.py --shape vicuna-7b llama-3.1-8b --json OUT.json          # a GPU with room for them
    python benchmarks/shapes.py --shape vicuna-7b --scale 0.125 --layers 4 --json OUT.json    # shrunk, for a CPU

Measured: every part of a step (draft, tree, score, choose, compact), plain steps, the cost of scoring m nodes, memory,
and the bandwidth of the memory, by reading a large tensor. Replayed: how many draft tokens a step keeps, at the
rates that a result file of `bench` recorded with another model (`--accepted`). So the speedup is that of a drafter of
this size which guesses as well as that one did; whether one does at this size only training can tell.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from common import about, add_common, timed
from ctc_drafter import decoding
from ctc_drafter.acceptance import accepted_paths, largest
from ctc_drafter.bench.results import check_output, write_json
from ctc_drafter.cli.options import plain_errors
from ctc_drafter.drafters import CTCConfig, CTCDrafter, NoDrafter, compile_passes
from ctc_drafter.target import Target
from ctc_drafter.target.loading import resolve_device, resolve_dtype
from ctc_drafter.tree import DraftTree

# kind of model, hidden size, inner size, layers, heads, key/value heads, vocabulary
SHAPES = {
    "vicuna-7b": ("llama", 4096, 11008, 32, 32, 32, 32_000),
    "vicuna-13b": ("llama", 5120, 13824, 40, 40, 40, 32_000),
    "vicuna-33b": ("llama", 6656, 17920, 60, 52, 52, 32_000),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 32, 8, 128_256),
    "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, 151_936),
}
HEAD_DIM = 128  # of all of them
NODES = (0, 1, 2, 4, 8, 16, 32, 64, 128)
WARM_UP = 3
BLOCK = 16
"""Steps of one kind before it is the other's turn."""


def config_of(name: str, scale: float = 1.0, layers: int | None = None, positions: int = 4096) -> Any:
    """The config of that shape; widths and heads times `scale`, other `layers` if given."""
    kind, hidden, inner, depth, heads, kv_heads, vocabulary = SHAPES[name]
    heads, kv_heads = (max(1, round(n * scale)) for n in (heads, kv_heads))
    return AutoConfig.for_model(
        kind,
        hidden_size=max(HEAD_DIM, round(hidden * scale)),
        intermediate_size=max(HEAD_DIM, round(inner * scale)),
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
    )


def build(name: str, options: argparse.Namespace) -> Target:
    """A target of that shape with random weights."""
    config = config_of(name, options.scale, options.layers, 2 * options.context + 4096)
    device = resolve_device(options.device)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(resolve_dtype(options.dtype, device))
    try:
        with device:
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(kept)
    return Target.of(model, None, name)


def drafter_of(target: Target, vocabulary: int) -> CTCDrafter:
    """The CTC drafter of `recipes/ctc.yaml` with random weights."""
    recipe = yaml.safe_load((Path(__file__).parents[1] / "recipes" / "ctc.yaml").read_text(encoding="utf-8"))
    return CTCDrafter(CTCConfig(**recipe["drafter"] | {"vocabulary": vocabulary}), target)


def build_drafter(target: Target, vocabulary: int) -> CTCDrafter:
    """`drafter_of`, ready to draft."""
    drafter = drafter_of(target, vocabulary)
    drafter = drafter.to(target.device, target.dtype).eval().requires_grad_(False)
    drafter.prepare()
    return drafter


def replayed(rates: list[float], count: int) -> list[int]:
    """Accepted lengths of `count` steps in which the share of those that accept k tokens is as in `rates`, shuffled."""
    lengths = [sum(rate > (i + 0.5) / count for rate in rates) for i in range(count)]
    random.Random(0).shuffle(lengths)
    return lengths


# ------------------------------------------------------------ measuring


def replay(lengths: list[int]) -> Callable[..., list[tuple[list[int], list[int]]]]:
    """In place of `accepted_paths`: keeps as many nodes as recorded, whatever the target thinks of the draft."""
    left = iter(lengths)

    def paths(
        tree: DraftTree, chosen: torch.Tensor, budgets: Sequence[int] | None = None
    ) -> list[tuple[list[int], list[int]]]:
        accepted_paths(tree, chosen, budgets)  # it takes its time in a real step
        accepted = next(left) if tree.budget else 0
        # Every other node, so that there is something to move, as there mostly is.
        offsets = [0, *range(1, tree.budget + 1, 2 if 2 * accepted <= tree.budget else 1)][: accepted + 1]
        return [(offsets, chosen[0, offsets].tolist())]

    return paths


def bandwidth(device: torch.device) -> float:
    """Bytes per second of reading 1 GiB."""
    block = torch.zeros(2**28, device=device)
    return block.nbytes / statistics.median(timed(block.sum, device)[1] for _ in range(7))


def context_of(target: Target, options: argparse.Namespace) -> list[int]:
    return torch.randint(target.vocab_size, (options.context,)).tolist()


def steps(target: Target, drafter: CTCDrafter, lengths: list[int], options: argparse.Namespace) -> tuple[float, float]:
    """Median seconds of a plain step and of a drafted one of the loop, block by block in turn."""
    decoding.accepted_paths = replay([1] * WARM_UP + lengths)
    target.stop_ids = frozenset()
    room, ids = sum(lengths) + len(lengths) + 2 * WARM_UP + 1, context_of(target, options)
    runs = {
        "plain": decoding.generate(target, NoDrafter(), ids, max_new_tokens=room),
        "drafted": decoding.generate(target, drafter, ids, max_new_tokens=room, budget=options.budget),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(1 + WARM_UP):  # the first reads the context
            next(run)
    for start in range(0, len(lengths), BLOCK):
        for name, run in runs.items():
            for _ in lengths[start : start + BLOCK]:
                seconds[name].append(timed(lambda run=run: next(run), target.device)[1])
    return statistics.median(seconds["plain"]), statistics.median(seconds["drafted"])


def scoring(target: Target, options: argparse.Namespace) -> tuple[dict[int, float], int]:
    """Median seconds of scoring root + m nodes behind the context, for each m; and the bytes of its keys and values."""
    target.capture(())
    cache = target.new_cache(options.context + max(NODES) + 1)
    logits, _ = target.prefill(context_of(target, options), cache)
    root, out = largest(logits)[None], {}
    for m in NODES:
        nothing = torch.zeros(1, m, dtype=torch.long, device=target.device)
        tree = DraftTree(nothing, nothing - 1, nothing + 1)
        ancestors = tree.ancestor_mask()

        def run(tree: DraftTree = tree, ancestors: torch.Tensor = ancestors) -> None:
            target.score(root, tree, ancestors, cache)

        for _ in range(WARM_UP):
            run()
        out[m] = statistics.median(timed(run, target.device)[1] for _ in range(9))
    return out, options.context * target.position_bytes


@torch.inference_mode()
def measure(name: str, rates: list[float], options: argparse.Namespace) -> dict[str, Any]:
    """All about one shape; rates: of steps that accepted their k-th draft token."""
    target = build(name, options)
    drafter = build_drafter(target, options.vocabulary)
    if options.compile:
        print(f"compiled in {compile_passes(target, drafter, options.budget):.1f} s", flush=True)
    lengths = replayed(rates, options.steps)
    costs, kv = scoring(target, options)
    plain, drafted = steps(target, drafter, lengths, options)
    tau = 1 + sum(lengths) / len(lengths)
    weights = sum(p.nbytes for p in target.model.parameters())
    own = sum(p.nbytes for p in drafter.parameters())
    rate = bandwidth(target.device)
    read = weights - target.embedding.weight.nbytes + kv  # one row of the embedding is read
    return {
        "shape": name,
        "parameters": target.num_parameters,
        "layers": target.num_layers,
        "hidden_size": target.hidden_size,
        "drafter_share": own / weights,
        "measured": {
            "gigabytes_per_second": rate / 1e9,
            "plain_ms": 1e3 * plain,
            "roofline_fraction": read / rate / plain,
            "drafted_ms": 1e3 * drafted,
            "score_ms": {m: 1e3 * s for m, s in costs.items()},
        },
        "replayed": {"tau": tau, "rates": rates},
        "of_both": {"speedup": tau * plain / drafted, "efficiency": plain / drafted},
    }


def tell(row: dict[str, Any]) -> None:
    m, r, both = row["measured"], row["replayed"], row["of_both"]
    relative = ", ".join(f"{n}: {s / m['score_ms'][0]:.2f}" for n, s in m["score_ms"].items())
    print(f"{row['shape']}: {row['parameters'] / 1e9:.2f} B parameters, drafter {100 * row['drafter_share']:.1f} %")
    print(
        f"  measured  plain step {m['plain_ms']:.2f} ms, {100 * m['roofline_fraction']:.0f} % of the bandwidth's limit"
    )
    print(f"  measured  drafted step {m['drafted_ms']:.2f} ms; scoring m nodes, relative to none: {relative}")
    print(f"  replayed  tau {r['tau']:.2f}")
    print(f"  of both   speedup {both['speedup']:.2f}, efficiency {both['efficiency']:.2f}", flush=True)


def main() -> None:
    options = _arguments()
    check_output(options.json, options.overwrite)
    recorded = json.loads(options.accepted.read_text())
    options.budget = options.budget or recorded["drafter"]["budget"]
    torch.manual_seed(0)
    arguments = {k: os.path.relpath(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    rows = []
    for name in options.shape:
        rows.append(measure(name, recorded["totals"]["acceptance_at"], options))
        tell(rows[-1])
        write_json(
            options.json, {**about(), "arguments": arguments, "rows": rows}
        )  # so that a shape too large loses only itself
    print(f"Result: {options.json}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--scale", type=float, default=1.0, help="Of widths and heads.")
    parser.add_argument("--layers", type=int, default=0, help="0: the shape's own.")
    parser.add_argument("--context", type=int, default=512, help="Tokens before the first step.")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--budget", type=int, default=0, help="0: that of the recorded run.")
    default = Path(__file__).parent / "results" / "float32-ctc-16.json"
    parser.add_argument("--accepted", type=Path, default=default, help="Result of `bench` with the rates to replay.")
    parser.add_argument("--compile", action="store_true", help="Compile the passes of the loop; on a GPU, as graphs.")
    parser.add_argument("--vocabulary", type=int, default=0, help="Tokens that are drafted; 0: all.")
    add_common(parser, "bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    with plain_errors():
        main()
