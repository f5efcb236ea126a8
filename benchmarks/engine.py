"""Every way to decode one model, in one process, answer by answer in turn.

    python benchmarks/engine.py --prompts PROMPTS.jsonl --limit 16 --compile --compiled-budget 7 --json OUT.json

`plain` and `speculative` are ours, with `--compile` also as compiled passes; the others are `model.generate` of
transformers, of the same weights without our packed products: as it is, with prompt lookup, and assisted by a smaller
model (`--assistant`) or, without one, by the target's own first layers (`--early-exit`), which were not trained for
that. All greedy, one sequence. Speedup is over the plain loop of the same kind: eager over eager, compiled over
compiled. With `--memory` each way also runs on the first prompt in a process of its own, whose peak is told.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from common import about, add_common, ready_drafter, timed
from ctc_drafter.bench.measure import Answer, peak_memory_mb, tau_of
from ctc_drafter.bench.prompts import Prompt, read_prompts
from ctc_drafter.bench.results import check_output, write_json
from ctc_drafter.cli.options import plain_errors
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import DEFAULT, Drafter, NoDrafter, compile_passes, load_drafter
from ctc_drafter.target import Target
from ctc_drafter.target.attention import NAME as GROUPED_ATTENTION

Run = Callable[[list[int]], Answer]
BASELINES = {"speculative": "plain", "speculative, compiled": "plain, compiled"}


def of_loop(target: Target, drafter: Drafter, options: argparse.Namespace, budget: int | None = None) -> Run:
    def run(ids: list[int]) -> Answer:
        answer = Answer()
        nodes = budget or options.budget
        for step in generate(target, drafter, ids, max_new_tokens=options.max_new_tokens, budget=nodes):
            answer.add(step)
        return answer

    return run


def as_loaded(target: Target) -> Any:
    """The model as transformers makes it: of the same weights, with products and attention of its own."""
    model = copy.deepcopy(target.model, {id(weight): weight for weight in target.model.parameters()})
    for module in model.modules():
        module.__dict__.pop("forward", None)
    if model.config.get_text_config()._attn_implementation == GROUPED_ATTENTION:
        model.set_attn_implementation("sdpa")
    return model


def of_transformers(target: Target, model: Any, options: argparse.Namespace, **how: Any) -> Run:
    @torch.inference_mode()
    def run(ids: list[int]) -> Answer:
        tokens = torch.tensor([ids], device=target.device)
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=sorted(target.stop_ids) or None,
            **how,
        )
        return Answer(out[0, len(ids) :].tolist())

    return run


def contenders(options: argparse.Namespace) -> tuple[Target, dict[str, Run], float | None]:
    """The target, each way to decode it by name, and the seconds that compiling took."""
    if "compiled" in (options.only or ""):  # nothing else in memory
        return compiled_ways(options)
    target = Target.load(options.target, dtype=options.dtype, device=options.device)
    model, drafter = as_loaded(target), ready_drafter(options.drafter, target)
    runs = {
        "plain": of_loop(target, NoDrafter(), options),
        "speculative": of_loop(target, drafter, options),
        "generate": of_transformers(target, model, options),
        "generate, prompt lookup": of_transformers(target, model, options, prompt_lookup_num_tokens=options.lookup),
    }
    if options.assistant:
        small: Any = AutoModelForCausalLM.from_pretrained(options.assistant, dtype=target.dtype, use_safetensors=True)
        runs["generate, assisted"] = of_transformers(
            target, model, options, assistant_model=small.to(target.device).eval()
        )
    elif 0 < options.early_exit < target.num_layers:
        name = f"generate, assisted by layers 1..{options.early_exit}"
        runs[name] = of_transformers(target, model, options, assistant_early_exit=options.early_exit)
    if not options.compile or options.only:
        return target, runs, None
    _, ways, seconds = compiled_ways(options)
    return target, runs | ways, seconds


def compiled_ways(options: argparse.Namespace) -> tuple[Target, dict[str, Run], float]:
    """As `contenders`, with a target of its own, since what is compiled stays compiled."""
    compiled = Target.load(options.target, dtype=options.dtype, device=options.device)
    drafter = load_drafter(options.drafter, compiled)
    seconds = compile_passes(compiled, drafter, options.compiled_budget)
    ways = {
        "plain, compiled": of_loop(compiled, NoDrafter(), options, options.compiled_budget),
        "speculative, compiled": of_loop(compiled, drafter, options, options.compiled_budget),
    }
    return compiled, ways, seconds


# ------------------------------------------------------------ measuring


def ids_of(target: Target, prompt: Prompt) -> list[int]:
    return target.prompt_ids([{"role": "user", "content": prompt.turns[0]}])


def measured(run: Run, ids: list[int], device: torch.device) -> Answer:
    """The answer, its seconds filled in."""
    answer, answer.seconds = timed(lambda: run(ids), device)
    return answer


def peak_of(name: str) -> float:
    """Peak memory in MiB of this script with only that way to decode, in a process of its own."""
    line = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return float(done.stdout.split()[-1])


def totals(rows: list[dict[str, Any]], names: list[str]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for name in names:
        mine = [row["runs"][name] for row in rows]
        tokens, seconds = sum(r["tokens"] for r in mine), sum(r["seconds"] for r in mine)
        out[name] = {"tokens_per_second": tokens / seconds, "identical": sum(r["identical"] for r in mine)}
        tau = tau_of(tokens, len(mine), sum(r["steps"] for r in mine))
        if name in BASELINES and tau:
            base = out[BASELINES[name]]["tokens_per_second"]
            speedup = tokens / seconds / base
            out[name] |= {"tau": tau, "speedup": speedup, "efficiency": speedup / tau}
    for name in names:
        ratios = [row["runs"]["generate"]["seconds"] / row["runs"][name]["seconds"] for row in rows]
        lengths = [row["runs"][name]["tokens"] / row["runs"]["generate"]["tokens"] for row in rows]
        out[name]["over_generate_median"] = statistics.median(a * b for a, b in zip(ratios, lengths))
    return out


def table(results: dict[str, dict[str, Any]], answers: int) -> str:
    lines = [f"{'':38}{'tok/s':>8}{'x generate':>12}{'tau':>6}{'speedup':>9}{'eff.':>6}{'MiB':>7}  identical to plain"]
    for name, t in results.items():
        own = f"{t['tau']:6.2f}{t['speedup']:9.2f}{t['efficiency']:6.2f}" if "tau" in t else " " * 21
        memory = f"{t['peak_mb']:.0f}" if "peak_mb" in t else ""
        head = f"{name:38}{t['tokens_per_second']:8.1f}{t['over_generate_median']:12.2f}"
        lines.append(f"{head}{own}{memory:>7}  {t['identical']} of {answers}")
    return "\n".join(lines)


def main() -> None:
    options = _arguments()
    check_output(options.json, options.overwrite or bool(options.only))
    target, runs, seconds = contenders(options)
    if seconds is not None:
        print(f"compiled in {seconds:.1f} s", flush=True)
    prompts = read_prompts(options.prompts, options.limit)
    if options.only:
        measured(runs[options.only], ids_of(target, prompts[0]), target.device)
        print(peak_memory_mb())
        return
    names, rows = list(runs), []
    for i, prompt in enumerate([prompts[0], *prompts]):
        ids = ids_of(target, prompt)
        turned = names[i % len(names) :] + names[: i % len(names)]  # so that drift of the machine cancels
        done = {name: measured(runs[name], ids, target.device) for name in turned}
        if i == 0:
            continue  # warm-up
        plain = done["plain"].tokens
        row: dict[str, Any] = {"id": prompt.id, "category": prompt.category, "prompt_tokens": len(ids), "runs": {}}
        for name, answer in done.items():
            row["runs"][name] = {
                "tokens": len(answer.tokens),
                "seconds": answer.seconds,
                "steps": len(answer.accepted),
                "identical": answer.tokens == plain,
            }
        rows.append(row)
    results = totals(rows, names)
    if options.memory:
        for name in names:
            results[name]["peak_mb"] = peak_of(name)
    print(table(results, len(rows)))
    made = {"target": target.name, "dtype": str(target.dtype), "budget": options.budget, "compile_seconds": seconds}
    made["compiled_budget"] = options.compiled_budget
    write_json(options.json, {**about(), **made, "totals": results, "rows": rows})
    print(f"Result: {options.json}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--drafter", default=DEFAULT)
    parser.add_argument("--assistant", help="A smaller model with the target's tokenizer.")
    parser.add_argument(
        "--early-exit", type=int, default=2, help="Without --assistant: the layers that assist; 0: none."
    )
    parser.add_argument("--lookup", type=int, default=10, help="Tokens that prompt lookup proposes.")
    parser.add_argument("--prompts", type=Path, required=True, nargs="+")
    parser.add_argument("--limit", type=int, default=16, help="Prompts of each file.")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--budget", type=int, default=8)
    parser.add_argument("--compiled-budget", type=int, help="Of the compiled passes; default: --budget.")
    parser.add_argument("--compile", action="store_true", help="Also as compiled passes.")
    parser.add_argument("--memory", action="store_true", help="Also the peak memory of each.")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    add_common(parser, "auto")
    options = parser.parse_args()
    options.compiled_budget = options.compiled_budget or options.budget
    return options


if __name__ == "__main__":
    with plain_errors():
        main()
