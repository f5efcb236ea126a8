"""Train every method on one target, with the same data and steps, and measure them in one interleaved run.

    python benchmarks/methods.py table --target T --data distilled.jsonl --eval data/eval --work runs/methods \\
        --json OUT.json
    python benchmarks/methods.py ablation ...
    python benchmarks/methods.py ideas ...

`table` is Table 1 of the paper: lookup, medusa, hydra, eagle, the paper's drafter and ours, each at its own size.
`ablation` is {heads, attention} x {cross-entropy, merge, label context, label context with the prefix objective} x
{every slot a token, collapsed paths, exact prefix tree}, where the combination exists. `ideas` is our drafter with one
thing changed in each row, and Medusa and EAGLE beside it. A killed run resumes where it stopped: a finished drafter is
kept, a half-trained one is trained on. Each step of a method takes the target's features of the same sequences, at the
same number of anchors unless that is the idea. Results: OUT-<method>-<budget>.json; `ctc-drafter report OUT-*.json`
makes the page. With several seeds each method is trained once for each; OUT.json holds the means and spreads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from common import FILES, about, command
from ctc_drafter.bench.command import output_files
from ctc_drafter.bench.results import check_output, write_json
from ctc_drafter.cli.options import plain_errors
from ctc_drafter.drafters import CTCConfig
from ctc_drafter.errors import UserError

Pair = tuple[str, int]
"""A drafter and a budget."""
LAYERS = [2, 4, -1]
WEIGHTS = {"decay": 1.0, "reach": 0.5}
CONTEXT = {"topology": "label-context", "objective": "prefix", "slots": 9, "labels": 8, **WEIGHTS}


@dataclass(frozen=True)
class Method:
    """A drafter to train: its kind, its own config, and what else of the recipe differs."""

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)


TABLE: dict[str, Method] = {
    "medusa": Method("medusa"),
    "hydra": Method("hydra"),
    "eagle": Method("eagle"),
    "paper": Method("ctc", {"topology": "merge", "objective": "label", "slots": 8, "labels": 6, "tree": "paths"}),
    "parallel": Method("parallel", {"label_context": True, "slots": 8, "labels": 8, **WEIGHTS}),
    "ctc": Method("ctc", CONTEXT),
    "ctc-three-layers": Method("ctc", {**CONTEXT, "feature_layers": LAYERS}),
}
"""Table 1."""

LOSSES: dict[str, Method] = {
    "ce": Method("parallel", {"slots": 5, "labels": 5}),
    "merge": Method("ctc", {"topology": "merge", "objective": "label", "slots": 8, "labels": 5}),
    "context": Method("ctc", {**CONTEXT, "objective": "label", "slots": 8, "labels": 5}),
    "prefix": Method("ctc", {**CONTEXT, "slots": 8, "labels": 5}),
}
OURS = TABLE["ctc"].config
IDEAS: dict[str, Method] = {
    "medusa": TABLE["medusa"],
    "eagle": TABLE["eagle"],
    "ours": TABLE["ctc"],
    "three-layers": TABLE["ctc-three-layers"],
    "two-layers": Method("ctc", {**OURS, "layers": 2}),
    "parallel": TABLE["parallel"],
    "no-context": Method("ctc", {**OURS, "topology": "merge"}),
    "whole-label": Method("ctc", {**OURS, "objective": "label"}),
    "six-labels": Method("ctc", {**OURS, "slots": 7, "labels": 6}),
    "eight-slots": Method("ctc", {**OURS, "slots": 8}),
    "twelve-slots": Method("ctc", {**OURS, "slots": 12}),
    "decay-0.8": Method("ctc", {**OURS, "decay": 0.8, "reach": 0.0}),
    "reach-0": Method("ctc", {**OURS, "reach": 0.0}),
    "reach-1": Method("ctc", {**OURS, "reach": 1.0}),
    "rank-32": Method("ctc", {**OURS, "context_rank": 32}),
    "anchors-24": Method("ctc", OURS, {"anchors": 24}),
    "anchors-128": Method("ctc", OURS, {"anchors": 128}),
}
"""Our drafter, and what one change to it does."""
SEARCHES = ("slots", "paths", "prefix")


def methods(kind: str) -> dict[str, Method]:
    """Name -> what to train."""
    if kind != "ablation":
        return TABLE if kind == "table" else IDEAS
    return {
        f"{module}-{loss}": replace(method, config={"module": module, **method.config})
        for module in ("heads", "attention")
        for loss, method in LOSSES.items()
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


def folder_of(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Of a trained drafter."""
    work: Path = options.work
    return work / (name if len(options.seeds) == 1 else f"{name}-seed{seed}")


def finished(folder: Path) -> bool:
    """Whether a training has ended there."""
    return (folder / "run.yaml").is_file()


def train(name: str, method: Method, seed: int, options: argparse.Namespace) -> Path:
    """Train one drafter, unless that is done; returns its folder."""
    output = folder_of(name, seed, options)
    if not finished(output):
        own = {**method.config, "vocabulary": options.vocabulary} if options.vocabulary else method.config
        recipe = {
            "target": options.target,
            "data": [options.data],
            "output": str(output),
            "kind": method.kind,
            "drafter": own,
            "steps": options.steps,
            "batch": options.batch,
            "anchors": options.anchors,
            "decay": options.steps * 2 // 5,
            "dtype": options.dtype,
            "seed": seed,
            "features": options.features,
            **method.recipe,
        }
        path = output.with_suffix(".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        command("train", "--config", path, threads=(os.cpu_count() or 1) // options.jobs if options.jobs > 1 else None)
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
    check_output(options.json, options.overwrite)
    rows = methods(options.kind)
    unknown = set(options.methods or ()) - set(rows)
    if unknown:
        raise UserError(f"--methods {min(unknown)} is none of {', '.join(rows)}.")
    chosen = {name: method for name, method in rows.items() if name in (options.methods or rows)}
    runs = [(name, method, seed) for seed in options.seeds for name, method in chosen.items()]
    if options.features and not all(finished(folder_of(name, seed, options)) for name, _, seed in runs):
        cache_features(options)
    with ThreadPoolExecutor(options.jobs) as pool:
        trained = list(pool.map(lambda run: train(*run, options), runs))
    folders = [
        part for (_, method, _), folder in zip(runs, trained) for part in searched(folder, method.kind, ablation)
    ]
    if options.train_only:
        print(f"trained  {options.work}; the same command without --train-only measures", flush=True)
        return
    drafters = [*([] if ablation else ["lookup"]), *folders]
    summary(measure([str(drafter) for drafter in drafters], options), options)


def measure(drafters: list[str], options: argparse.Namespace) -> dict[Pair, Path]:
    """Run `bench`; returns its result files, by drafter and budget."""
    pairs = list(itertools.product(drafters, dict.fromkeys(options.budgets)))
    output = options.json
    if len(pairs) == 1:  # its result would be OUT.json, which the means are for
        output = output.with_stem(f"{output.stem}-{Path(pairs[0][0]).name}-{pairs[0][1]}")
    command(
        "bench",
        *("--target", options.target, "--dtype", options.dtype, "--limit", options.limit, "--json", output),
        *("--max-new-tokens", options.max_new_tokens),
        *(part for name in options.files for part in ("--prompts", options.eval / name)),
        *(part for drafter in drafters for part in ("--drafter", drafter)),
        *(part for budget in options.budgets for part in ("--budget", budget)),
        *(["--overwrite"] if options.overwrite else []),
    )
    return dict(zip(pairs, output_files(output, pairs)))


def summary(measured: dict[Pair, Path], options: argparse.Namespace) -> None:
    """Write OUT.json: mean and spread over the seeds of each method, search and budget; and print them."""
    groups: dict[Pair, list[dict[str, Any]]] = {}
    for (drafter, budget), path in measured.items():
        method = re.sub(r"-seed\d+", "", Path(drafter).name)
        groups.setdefault((method, budget), []).append(json.loads(path.read_text())["totals"])
    rows = []
    for (name, budget), runs in sorted(groups.items()):
        row: dict[str, Any] = {"method": name, "budget": budget, "runs": len(runs)}
        row |= {key: [each[key] for each in runs] for key in ("answers", "identical", "tau", "speedup")}
        row |= {f"mean_{key}": statistics.fmean(row[key]) for key in ("tau", "speedup")}
        row["spread_tau"] = max(row["tau"]) - min(row["tau"])
        rows.append(row)
        print(
            f"{name:<28} {budget:>3}  tau {row['mean_tau']:.3f} (spread {row['spread_tau']:.3f})"
            f"  speedup {row['mean_speedup']:.2f}  identical {sum(row['identical'])}/{sum(row['answers'])}"
        )
    write_json(
        options.json, {**about(), "steps": options.steps, "batch": options.batch, "seeds": options.seeds, "rows": rows}
    )
    print(f"Result: {options.json}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("table", "ablation", "ideas"))
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True, help="Distilled answers of that target.")
    parser.add_argument("--eval", type=Path, required=True, help="Folder with the files of prompts.")
    parser.add_argument("--files", nargs="+", default=list(FILES), help="Of that folder.")
    parser.add_argument("--methods", nargs="+", help="Only these rows.")
    parser.add_argument("--work", type=Path, required=True, help="Folder of the trained drafters.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--features", help="Keep the target's features here: it runs over the data once.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16, help="Sequences in a step.")
    parser.add_argument("--jobs", type=int, default=1, help="Trainings at once; each has its share of the cores.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--budgets", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=200, help="Prompts of each file.")
    parser.add_argument("--anchors", type=int, default=64, help="Of each sequence; EAGLE learns at every position.")
    parser.add_argument("--vocabulary", type=int, default=0, help="Draft only so many tokens, all methods alike.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--train-only", action="store_true", help="Leave measuring to a later run, on a quiet machine.")
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    with plain_errors():
        main()
