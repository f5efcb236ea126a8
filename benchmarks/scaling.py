"""Tau and speedup against the size of the target: train targets of one family, a drafter for each, and measure.

    python benchmarks/scaling.py --config recipes/embedded-target.yaml --eval data/eval --work runs/scaling \\
        --json benchmarks/results/scaling.json

For each size: `pretrain` with the recipe's data and tokens, `distill`, `train` of a ctc drafter, `bench`; what was
stopped goes on where it was. All sizes see the same number of tokens, answers and drafting steps, so the larger ones
are trained less in proportion. Rows: one for each size, drafter and budget.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from common import FILES, about, command
from ctc_drafter.bench.results import check_output, write_json

SIZES: dict[str, dict[str, int]] = {
    "2m": {"hidden_size": 128, "intermediate_size": 352, "layers": 4, "heads": 2, "kv_heads": 1},
    "5m": {"hidden_size": 256, "intermediate_size": 704, "layers": 5, "heads": 4, "kv_heads": 2},
    "12m": {"hidden_size": 384, "intermediate_size": 1024, "layers": 6, "heads": 6, "kv_heads": 2},
    "40m": {"hidden_size": 576, "intermediate_size": 1536, "layers": 12, "heads": 9, "kv_heads": 3},
    "125m": {"hidden_size": 768, "intermediate_size": 2048, "layers": 18, "heads": 12, "kv_heads": 4},
    "350m": {"hidden_size": 1024, "intermediate_size": 2816, "layers": 28, "heads": 16, "kv_heads": 4},
}
"""Shapes of one family: heads of width 64, an MLP of 8/3 of the width."""


def made(folder: Path, name: str, recipe: dict[str, Any], done: Path) -> None:
    """Write the recipe into the folder and run the command `name` with it, unless `done` is there."""
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command(name, "--config", path)


def prepare(size: str, options: argparse.Namespace) -> Path:
    """Train the target of this size, its answers and its drafter; returns the folder that holds them."""
    folder: Path = options.work / size
    target, answers, drafter = folder / "target", folder / "distilled.jsonl", folder / "ctc"
    recipe = yaml.safe_load(options.config.read_text())
    recipe |= {**SIZES[size], "output": str(target), "steps": options.steps, "decay": options.steps * 2 // 5}
    recipe |= {"unlikelihood_steps": options.steps // 16, "init": None, "dtype": options.dtype}
    made(folder, "pretrain", recipe, target / "model.safetensors")
    recipe = yaml.safe_load(options.distill.read_text())
    recipe |= {"target": str(target), "output": str(answers), "prompts": recipe["prompts"][:1], "dtype": options.dtype}
    recipe["mixture"] = {name: share * options.share for name, share in recipe["mixture"].items()}
    made(folder, "distill", recipe, folder / "distilled.done")
    (folder / "distilled.done").touch()
    layers = SIZES[size]["layers"]
    content = {"feature_layers": sorted({max(1, layers // 3), max(1, 2 * layers // 3)}) + [-1], "slots": 7, "labels": 6}
    content |= {"topology": "label-context", "objective": "prefix", "vocabulary": 2048}
    recipe = {"target": str(target), "data": [str(answers)], "output": str(drafter), "kind": "ctc", "drafter": content}
    recipe |= {"steps": options.drafter_steps, "decay": options.drafter_steps * 2 // 5, "dtype": options.dtype}
    made(folder, "train", recipe, drafter / "run.yaml")
    return folder


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one size: plain and drafted, interleaved."""
    names = [str(folder / "ctc"), f"{folder / 'ctc'}+lookup", "lookup"]
    command(
        "bench",
        *("--target", folder / "target", "--dtype", options.dtype, "--limit", options.limit),
        *(part for name in FILES for part in ("--prompts", options.eval / name)),
        *(part for name in names for part in ("--drafter", name)),
        *(part for budget in options.budgets for part in ("--budget", budget)),
        *("--overwrite", "--json", folder / "bench.json"),
    )
    rows = []
    for path in sorted(folder.glob("bench*.json")):
        content = json.loads(path.read_text())
        totals = content["totals"]
        keys = ("answers", "identical", "looped", "tau", "speedup", "efficiency", "plain_tokens_per_second")
        facts = {"size": folder.name, "parameters": content["target"]["parameters"], **content["drafter"]}
        rows.append(facts | {key: totals[key] for key in keys} | {"draft_share": totals["split"]["draft"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="A recipe of `pretrain`, for its data and mixture.")
    parser.add_argument("--distill", type=Path, default=Path("recipes/embedded-distill.yaml"))
    parser.add_argument("--eval", type=Path, required=True, help=f"Folder with {', '.join(FILES)}.")
    parser.add_argument("--work", type=Path, required=True, help="Folder of what is trained.")
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=["2m", "5m", "12m"])
    parser.add_argument("--steps", type=int, default=400, help="Of each target.")
    parser.add_argument("--share", type=float, default=0.25, help="Of the distill recipe's prompts.")
    parser.add_argument("--drafter-steps", type=int, default=200)
    parser.add_argument("--budgets", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--limit", type=int, default=8, help="Prompts of each file.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--train-only", action="store_true", help="Leave measuring to a later run, on a quiet machine.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    check_output(options.json, options.overwrite)
    folders = [prepare(size, options) for size in options.sizes]
    if options.train_only:
        print(f"trained  {options.work}; the same command without --train-only measures", flush=True)
        return
    rows = [row for folder in folders for row in measure(folder, options)]
    write_json(options.json, {**about(), "steps": options.steps, "rows": rows})
    for row in rows:
        print(
            f"{row['size']:>5} {row['name']:<12} {row['budget']:>3}  tau {row['tau']:.2f}  speedup {row['speedup']:.2f}"
        )
    print(f"Result: {options.json}")


if __name__ == "__main__":
    main()
