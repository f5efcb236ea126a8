"""What a drafter brings inside vLLM: the same prompts by vLLM alone and with the drafter, one engine after the other.

    OMP_WAIT_POLICY=passive .venv-vllm/bin/python benchmarks/in_vllm.py --prompts PROMPTS.jsonl --limit 16 --json FILE

Seconds are also those of the process on its processors, which other work on the machine does not lengthen much, if
waiting threads sleep (OMP_WAIT_POLICY).
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from common import about
from ctc_drafter.bench.prompts import Prompt, demo_prompts, read_prompts
from ctc_drafter.bench.results import check_output, write_json
from ctc_drafter.cli.options import plain_errors
from ctc_drafter.integrations.export import vllm_config
from ctc_drafter.target import EMBEDDED

COUNTERS = {"steps": "vllm:spec_decode_num_drafts", "accepted": "vllm:spec_decode_num_accepted_tokens"}


def measure(arguments: argparse.Namespace, prompts: list[Prompt], drafter: str | None) -> list[dict[str, Any]]:
    """A row for every number of requests at a time: tokens, seconds, answers, and tau if there is a drafter."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    options: dict[str, Any] = {}
    if drafter is not None:
        config = vllm_config(drafter, arguments.longest)
        config["additional-config"]["ctc_drafter"]["budget"] = arguments.budget
        options = {name.replace("-", "_"): value for name, value in config.items()}
    engine = LLM(
        model=arguments.target,
        dtype=arguments.dtype,
        enforce_eager=True,
        max_num_seqs=max(arguments.at_once),
        disable_log_stats=False,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        **options,
    )
    sampling = SamplingParams(temperature=0, max_tokens=arguments.max_new_tokens)
    chats = [[{"role": "user", "content": prompt.turns[0]}] for prompt in prompts]
    engine.chat(chats[:1], sampling, use_tqdm=False)
    rows = []
    for count in arguments.at_once:
        before, wall, own = _counters(engine), time.perf_counter(), time.process_time()
        parts = [chats[i : i + count] for i in range(0, len(chats), count)]
        answers = [
            list(output.outputs[0].token_ids)
            for part in parts
            for output in engine.chat(part, sampling, use_tqdm=False)
        ]
        wall, own = time.perf_counter() - wall, time.process_time() - own
        tokens = sum(map(len, answers))
        row = {"drafter": drafter, "at_once": count, "tokens": tokens, "seconds": wall, "cpu_seconds": own}
        row |= {"tokens_per_second": tokens / wall, "tokens_per_cpu_second": tokens / own, "answers": answers}
        if drafter is not None:
            counted = {name: value - before[name] for name, value in _counters(engine).items()}
            row |= {**counted, "tau": 1 + counted["accepted"] / max(1, counted["steps"])}
        rows.append(row)
    del engine
    cleanup_dist_env_and_memory()
    return rows


def _counters(engine: Any) -> dict[str, int]:
    found = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    return {name: int(found.get(theirs, 0)) for name, theirs in COUNTERS.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default=str(EMBEDDED / "target"))
    parser.add_argument("--drafter", default="ctc")
    parser.add_argument("--prompts", type=Path, nargs="*", help="prompt files (none: those of the demo)")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--longest", type=int, default=8)
    parser.add_argument("--budget", type=int, default=16)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args()


def main() -> None:
    import vllm

    arguments = _arguments()
    check_output(arguments.json, arguments.overwrite)
    paths, limit = arguments.prompts, arguments.limit
    prompts = read_prompts(paths, limit) if paths else demo_prompts(limit)
    plain, drafted = (measure(arguments, prompts, drafter) for drafter in (None, arguments.drafter))
    for alone, row in zip(plain, drafted):
        row["identical"] = sum(a == b for a, b in zip(alone.pop("answers"), row.pop("answers")))
        row["answers"] = len(prompts)
        row["speedup"] = row["tokens_per_cpu_second"] / alone["tokens_per_cpu_second"]
        print(
            f"{row['at_once']} at once: tau {row['tau']:.2f}, {alone['tokens_per_cpu_second']:.0f} tokens per CPU "
            f"second alone, {row['tokens_per_cpu_second']:.0f} drafted, "
            f"identical {row['identical']} of {row['answers']}"
        )
    write_json(arguments.json, {**about(), "vllm": vllm.__version__, "rows": plain + drafted})


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with plain_errors():
        main()
