"""Tau and speedup against the size of the target: train targets of one family, a drafter for each, and measure.

    python benchmarks/scaling.py --prompts data/eval/gsm8k_test.jsonl --work runs/scaling \\
        --json benchmarks/results/scaling.json --figure docs/results/scaling.svg

For each size: `pretrain`, `distill`, `train` of a ctc drafter, `bench`; what was stopped goes on where it was. All
sizes see the same number of tokens, prompts and drafting steps, so the larger ones are trained less in proportion.
Rows: one for each size, drafter and budget.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from common import about, command
from ctc_drafter.bench.command import output_files
from ctc_drafter.bench.results import check_output, write_json
from ctc_drafter.bench.sheets import COLOURS, MARKERS, STYLE
from ctc_drafter.cli.options import plain_errors

SIZES: dict[str, dict[str, int]] = {
    "2m": {"hidden_size": 128, "intermediate_size": 352, "layers": 4, "heads": 2, "kv_heads": 1},
    "5m": {"hidden_size": 256, "intermediate_size": 704, "layers": 5, "heads": 4, "kv_heads": 2},
    "12m": {"hidden_size": 384, "intermediate_size": 1024, "layers": 6, "heads": 6, "kv_heads": 2},
    "40m": {"hidden_size": 576, "intermediate_size": 1536, "layers": 12, "heads": 9, "kv_heads": 3},
    "125m": {"hidden_size": 768, "intermediate_size": 2048, "layers": 18, "heads": 12, "kv_heads": 4},
    "350m": {"hidden_size": 1024, "intermediate_size": 2816, "layers": 28, "heads": 16, "kv_heads": 4},
}
"""Shapes of one family: heads of width 64, an MLP of 8/3 of the width."""
DRAFTER = Path(__file__).parents[1] / "recipes" / "ctc.yaml"
"""The drafter that we recommend."""
TOTALS = ("answers", "identical", "looped", "tau", "speedup", "efficiency", "plain_tokens_per_second")


def made(folder: Path, name: str, recipe: dict[str, Any], done: Path, threads: int | None) -> None:
    """Write the recipe into the folder and run the command `name` with it, unless `done` is there."""
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command(name, "--config", path, threads=threads)


def prepare(size: str, options: argparse.Namespace) -> Path:
    """Train the target of this size, its answers and its drafter; returns the folder that holds them."""
    folder: Path = options.work / size
    threads = (os.cpu_count() or 1) // options.jobs if options.jobs > 1 else None
    target, answers, drafter = folder / "target", folder / "distilled.jsonl", folder / "ctc"
    recipe = yaml.safe_load(options.config.read_text())
    recipe |= {**SIZES[size], "output": str(target), "steps": options.steps, "decay": options.steps * 2 // 5}
    recipe |= {"unlikelihood_steps": options.steps // 16, "dtype": options.dtype}
    made(folder, "pretrain", recipe, target / "model.safetensors", threads)
    recipe = yaml.safe_load(options.distill.read_text())
    recipe |= {"target": str(target), "output": str(answers), "dtype": options.dtype}
    made(folder, "distill", recipe, folder / "distilled.done", threads)
    (folder / "distilled.done").touch()
    content = {**yaml.safe_load(DRAFTER.read_text())["drafter"], "vocabulary": 2048}
    recipe = {"target": str(target), "data": [str(answers)], "output": str(drafter), "kind": "ctc", "drafter": content}
    recipe |= {"steps": options.drafter_steps, "decay": options.drafter_steps * 2 // 5, "dtype": options.dtype}
    made(folder, "train", recipe, drafter / "run.yaml", threads)
    return folder


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one size: plain and drafted, interleaved."""
    names = [str(folder / "ctc"), f"{folder / 'ctc'}+lookup", "lookup"]
    output, pairs = folder / "bench.json", list(itertools.product(names, dict.fromkeys(options.budgets)))
    command(
        "bench",
        *("--target", folder / "target", "--dtype", options.dtype, "--limit", options.limit),
        *(part for path in options.prompts for part in ("--prompts", path)),
        *(part for name in names for part in ("--drafter", name)),
        *(part for budget in options.budgets for part in ("--budget", budget)),
        *("--overwrite", "--json", output),
    )
    trained = json.loads((folder / "target" / "pretrain.json").read_text())
    facts = {"trained_on": trained["tokens"], "held_out_loss": trained["held_out_loss"]}
    rows = []
    for path in sorted(output_files(output, pairs)):
        content = json.loads(path.read_text())
        totals = content["totals"]
        row = {"size": folder.name, "parameters": content["target"]["parameters"], **facts}
        row |= {"drafter": content["drafter"]["name"], "drafter_parameters": content["drafter"]["parameters"]}
        row |= {"budget": content["drafter"]["budget"], **{key: totals[key] for key in TOTALS}}
        rows.append(row | {"draft_share": totals["split"]["draft"]})
    return rows


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Two panels: tau and speedup against the parameters of the target, a line for each drafter and budget."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        from matplotlib.figure import Figure

        figure: Any = Figure((9.6, 4.2), dpi=200, layout="constrained", facecolor="white")
        panels = figure.subplots(1, 2)
        lines = dict.fromkeys((row["drafter"], row["budget"]) for row in rows)
        drafters = list(dict.fromkeys(name for name, _ in lines))
        budgets = sorted({budget for _, budget in lines})
        for axes, key, unit in zip(panels, ("tau", "speedup"), ("tokens per target pass", "times plain decoding")):
            for name, budget in lines:
                mine = sorted(
                    (r["parameters"] / 1e6, r[key]) for r in rows if (r["drafter"], r["budget"]) == (name, budget)
                )
                place = drafters.index(name)
                style = {"color": COLOURS[place], "marker": MARKERS[place], "ls": "-" if budget == budgets[0] else "--"}
                axes.plot(*zip(*mine), label=f"{name}, budget {budget}", **style)
            axes.axhline(1, color="#9AA1AB", lw=1)
            sizes = sorted({row["parameters"] / 1e6 for row in rows})
            axes.set_xscale("log")
            axes.set_xticks(sizes, [f"{size:.1f} M" for size in sizes])
            axes.minorticks_off()
            axes.set(xlabel="parameters of the target", ylabel=f"{key} ({unit})")
            axes.set_ylim(bottom=0)
            axes.grid(axis="y")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.suptitle(title, fontweight="bold", x=0.02, ha="left")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    options = _arguments()
    check_output(options.json, options.overwrite)
    with ThreadPoolExecutor(options.jobs) as pool:  # the largest first: they take longest
        folders = list(
            pool.map(lambda size: prepare(size, options), sorted(options.sizes, key=list(SIZES).index)[::-1])
        )
    if options.train_only:
        print(f"trained  {options.work}; the same command without --train-only measures", flush=True)
        return
    rows = [row for folder in folders[::-1] for row in measure(folder, options)]
    recipe = {"target_steps": options.steps, "drafter_steps": options.drafter_steps}
    write_json(options.json, {**about(), **recipe, "rows": rows})
    for row in rows:
        at = f"{row['size']:>5} {row['drafter']:<12} {row['budget']:>3}"
        print(
            f"{at}  tau {row['tau']:.2f}  speedup {row['speedup']:.2f}  {row['identical']}/{row['answers']} identical"
        )
    print(f"Result: {options.json}")
    if options.figure:
        draw(rows, options.figure, "Tau and speedup against the size of the target")
        print(f"Figure: {options.figure}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("recipes/scaling-target.yaml"), help="Of `pretrain`.")
    parser.add_argument("--distill", type=Path, default=Path("recipes/scaling-distill.yaml"))
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True, help="Folder of what is trained.")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["2m", "5m", "12m"])
    parser.add_argument("--steps", type=int, default=300, help="Of each target.")
    parser.add_argument("--drafter-steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=1, help="Sizes trained at once; each has its share of the cores.")
    parser.add_argument("--budgets", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--limit", type=int, default=100, help="Prompts of each file.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--train-only", action="store_true", help="Leave measuring to a later run, on a quiet machine.")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    with plain_errors():
        main()
