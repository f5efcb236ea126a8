"""Train every method on one target, with the same data, steps and anchors, and measure them in one interleaved run.

    python benchmarks/methods.py table --target T --data distilled.jsonl --eval data/eval --work runs/methods \\
        --json OUT.json
    python benchmarks/methods.py ablation ...

`table` is Table 1 of the paper: lookup, medusa, hydra, eagle, the paper's drafter and ours, each at its own size.
`ablation` is {heads, attention} x {cross-entropy, merge, label context, label context with the prefix objective} x
{every slot a token, collapsed paths, exact prefix tree}, where the combination exists. A killed run resumes where it
stopped: a finished drafter is kept, a half-trained one is trained on. Each step of a method takes the target's features
of the same sequences at the same number of anchors. Results: OUT-<method>-<budget>.json;
`ctc-drafter report OUT-*.json` makes the page. With several seeds each method is trained once for each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from ctc_drafter.drafters import CTCConfig

FILES = ("mt_bench.jsonl", "gsm8k_test.jsonl", "humaneval.jsonl")
LAYERS = [2, 4, -1]
CONTEXT = {"topology": "label-context", "objective": "prefix", "slots": 7, "labels": 6}

TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "medusa": ("medusa", {}),
    "hydra": ("hydra", {}),
    "eagle": ("eagle", {}),
    "paper": ("ctc", {"topology": "merge", "objective": "label", "slots": 8, "labels": 6, "tree": "paths"}),
    "parallel": ("parallel", {"feature_layers": LAYERS, "label_context": True}),
    "ctc": ("ctc", {**CONTEXT, "feature_layers": LAYERS}),
}
"""Kind and own config of each method of Table 1."""

LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ce": ("parallel", {"slots": 5, "labels": 5}),
    "merge": ("ctc", {"topology": "merge", "objective": "label", "slots": 8, "labels": 5}),
    "context": ("ctc", {**CONTEXT, "objective": "label", "slots": 8, "labels": 5}),
    "prefix": ("ctc", {**CONTEXT, "slots": 8, "labels": 5}),
}
SEARCHES = ("slots", "paths", "prefix")


def trained(kind: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> kind and config of the drafters to train."""
    if kind == "table":
        return TABLE
    return {
        f"{module}-{loss}": (drafter, {"module": module, **config})
        for module in ("heads", "attention")
        for loss, (drafter, config) in LOSSES.items()
    }


def searched(folder: Path, kind: str, ablation: bool) -> list[Path]:
    """The folders to measure: the drafter itself, or a copy for each tree search that its topology allows."""
    if not ablation or kind != "ctc":
        return [folder]
    folders = []
    for search in SEARCHES:
        content = json.loads((folder / "config.json").read_text())
        content["drafter"]["tree"] = search
        try:
            CTCConfig(**content["drafter"])
        except ValueError:
            continue
        copy = folder.with_name(f"{folder.name}-{search}")
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        (copy / "config.json").write_text(json.dumps(content, indent=1))
        folders.append(copy)
    return folders


def command(*arguments: object) -> None:
    """Run a command of the package in a process of its own; its failure ends this script too."""
    line = [sys.executable, "-m", "ctc_drafter", *map(str, arguments)]
    print("+", "ctc-drafter", *map(str, arguments), flush=True)
    code = subprocess.run(line).returncode
    if code:
        sys.exit(code)


def train(name: str, kind: str, config: dict[str, Any], seed: int, options: argparse.Namespace) -> Path:
    """Train one drafter, unless that is done; returns its folder."""
    output: Path = options.work / (name if len(options.seeds) == 1 else f"{name}-seed{seed}")
    if not (output / "run.yaml").is_file():
        own = {**config, "vocabulary": options.vocabulary} if options.vocabulary else config
        recipe = {
            "target": options.target,
            "data": [options.data],
            "output": str(output),
            "kind": kind,
            "drafter": own,
            "steps": options.steps,
            "decay": options.steps * 2 // 5,
            "dtype": options.dtype,
            "seed": seed,
            "features": options.features,
        }
        path = output.with_suffix(".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        command("train", "--config", path)
    return output


def cache_features(options: argparse.Namespace) -> None:
    """Let the target run over the data once, for all methods and seeds: the layers that any of them reads."""
    recipe = {
        "target": options.target,
        "data": [options.data],
        "output": str(options.work / "none"),
        "drafter": {"feature_layers": LAYERS},
        "dtype": options.dtype,
    }
    path = options.work / "features.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command("cache-features", "--config", path, "--output", options.features)


def main() -> None:
    options = _arguments()
    ablation = options.kind == "ablation"
    if options.features:
        cache_features(options)
    folders: list[Path] = []
    for seed in options.seeds:
        for name, (kind, config) in trained(options.kind).items():
            folders += searched(train(name, kind, config, seed, options), kind, ablation)
    if options.train_only:
        print(f"trained  {options.work}; the same command without --train-only measures", flush=True)
        return
    drafters = [*([] if ablation else ["lookup"]), *folders]
    command(
        "bench",
        *("--target", options.target, "--dtype", options.dtype, "--limit", options.limit, "--json", options.json),
        *(part for name in FILES for part in ("--prompts", options.eval / name)),
        *(part for drafter in drafters for part in ("--drafter", drafter)),
        *(part for budget in options.budgets for part in ("--budget", budget)),
        *(["--overwrite"] if options.overwrite else []),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("table", "ablation"))
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True, help="Distilled answers of that target.")
    parser.add_argument("--eval", type=Path, required=True, help=f"Folder with {', '.join(FILES)}.")
    parser.add_argument("--work", type=Path, required=True, help="Folder of the trained drafters.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--features", help="Keep the target's features here: it runs over the data once.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--budgets", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--limit", type=int, default=200, help="Prompts of each file.")
    parser.add_argument("--vocabulary", type=int, default=0, help="Draft only so many tokens, all methods alike.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--train-only", action="store_true", help="Leave measuring to a later run, on a quiet machine.")
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
