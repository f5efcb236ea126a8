"""Where the time of one step goes, and what a step costs against the length of the text and against the budget.

    python benchmarks/curves.py --json benchmarks/results/curves.json --figure docs/step.svg

Random tokens stand for the text, so only costs mean anything here; the target is read beyond the context that it was
trained for. Plain and drafted runs take turns. With `--compile` all passes of that one budget are compiled.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from common import about, add_common, ready_drafter
from ctc_drafter.bench.results import check_output, write_json
from ctc_drafter.bench.sheets import COLOURS, PHASE_COLOURS, STYLE
from ctc_drafter.cli.options import plain_errors
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import Drafter, NoDrafter, compile_passes
from ctc_drafter.steps import PHASES, Step
from ctc_drafter.target import Target

CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
BUDGETS = (1, 2, 4, 8, 16, 32, 64, 128)


def microseconds(steps: list[Step]) -> dict[str, float]:
    """Median of each phase over the steps after the first drafted one, which reads the whole prompt."""
    own = [step.seconds for step in steps[2:]]
    return {phase: 1e6 * statistics.median(s[phase] for s in own) for phase in PHASES}


def run(target: Target, drafter: Drafter, context: int, budget: int, options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of the phases of a step after `context` tokens, and the seconds of reading those."""
    ids = torch.randint(target.vocab_size, (context,), generator=torch.Generator().manual_seed(context)).tolist()
    steps = list(generate(target, drafter, ids, max_new_tokens=options.tokens, budget=budget, profile=True))
    return {"context": context, "budget": budget, "prefill_seconds": steps[0].seconds["prefill"], **microseconds(steps)}


def whole(row: dict[str, Any]) -> float:
    """Milliseconds of a step."""
    return sum(row[phase] for phase in PHASES) / 1e3


def measure(target: Target, drafter: Drafter, options: argparse.Namespace) -> list[dict[str, Any]]:
    plain = NoDrafter()
    run(target, drafter, CONTEXTS[0], options.budget, options)  # warm-up
    rows = []
    for curve, points in (
        ("context", [(c, options.budget) for c in CONTEXTS if c <= options.longest]),
        ("budget", [(CONTEXTS[0], b) for b in ([options.budget] if options.compile else BUDGETS)]),
    ):
        for context, budget in points:
            run(target, drafter, CONTEXTS[0], budget, options)  # packs weights for this number of rows
            for name, used in (("plain", plain), ("drafted", drafter)):
                rows.append({"curve": curve, "run": name, **run(target, used, context, budget, options)})
    return rows


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Panels: the phases of one step, the cost against context, and against budget if there are several."""
    import matplotlib

    curves = {"context": "tokens before the step", "budget": "draft nodes"}
    if len({r["budget"] for r in rows if r["curve"] == "budget"}) < 2:
        del curves["budget"]
    with matplotlib.rc_context(STYLE):
        from matplotlib.figure import Figure

        figure: Any = Figure((1 + 4 * (1 + len(curves)), 3.8), layout="constrained", facecolor="white")
        left, *others = figure.subplots(1, 1 + len(curves))
        _phases(left, [r for r in rows if r["curve"] == "context" and r["context"] == CONTEXTS[0]])
        for axis, (curve, label) in zip(others, curves.items()):
            for name, marker, color in (("plain", "o", COLOURS[0]), ("drafted", "s", COLOURS[1])):
                mine = [r for r in rows if r["curve"] == curve and r["run"] == name]
                places = [r[curve] for r in mine]
                axis.plot(places, [whole(r) for r in mine], marker=marker, color=color, label=name)
            axis.set_xscale("log", base=2)
            axis.set_xticks(places, [f"{place:,}" for place in places])
            axis.set(xlabel=label, ylabel="ms per step", title=f"against {curve}")
            axis.set_ylim(bottom=0)
            axis.grid(axis="y")
            axis.legend(fontsize=9)
        figure.suptitle(title)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _phases(axis: Any, rows: list[dict[str, Any]]) -> None:
    for y, row in enumerate(rows):
        start = 0.0
        for phase, color in PHASE_COLOURS.items():
            label = phase if y == len(rows) - 1 else None
            axis.barh(y, row[phase] / 1e3, left=start, color=color, label=label, height=0.6)
            start += row[phase] / 1e3
        axis.text(start, y, f" {start:.2f} ms", va="center")
    axis.set_yticks(range(len(rows)), [r["run"] for r in rows])
    axis.set(xlabel="ms", title=f"one step after {CONTEXTS[0]} tokens, budget {rows[-1]['budget']}")
    axis.set_xlim(0, 1.25 * max(whole(r) for r in rows))
    axis.legend(fontsize=9, loc="lower right")


def main() -> None:
    options = _arguments()
    check_output(options.json, options.overwrite)
    target = Target.load(options.target, dtype=options.dtype, device=options.device)
    target.max_context = max(target.max_context, options.longest + options.tokens + max(BUDGETS) + 1)
    target.stop_ids = frozenset()
    drafter = ready_drafter(options.drafter, target)
    if options.compile:
        print(f"compiled in {compile_passes(target, drafter, options.budget):.1f} s", flush=True)
    rows = measure(target, drafter, options)
    for row in rows:
        at = f"{row['curve']} {row[row['curve']]}"
        print(f"{at:14}{row['run']:9}{whole(row):8.2f} ms a step, prompt read in {row['prefill_seconds']:.2f} s")
    dtype = str(target.dtype).removeprefix("torch.")
    made = {"target": target.name, "dtype": dtype, "compiled": options.compile}
    write_json(options.json, {**about(), **made, "rows": rows})
    print(f"Result: {options.json}")
    if options.figure:
        threads = f"{torch.get_num_threads()} threads" if target.device.type == "cpu" else torch.cuda.get_device_name()
        kind = "compiled passes" if options.compile else "eager"
        draw(rows, options.figure, f"target '{target.name}', {dtype}, {kind}, {threads}")
        print(f"Figure: {options.figure}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--drafter", default="ctc")
    parser.add_argument("--budget", type=int, default=11, help="Of the profile, and of the curve over contexts.")
    parser.add_argument("--longest", type=int, default=8192, help="Longest context.")
    parser.add_argument("--tokens", type=int, default=32, help="New tokens of each run.")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--figure", type=Path)
    add_common(parser, "float32")
    return parser.parse_args()


if __name__ == "__main__":
    with plain_errors():
        main()
