"""Runs of vLLM, one after the other in this process: reads them as JSON, prints what came out of each as JSON.

    python engine.py '[{"drafter": null}, {"drafter": "ctc", "engine": {"tensor_parallel_size": 2}}]'

drafter: null for vLLM alone; options: what else our part of --additional-config says; questions, tokens: how many are
asked (or a list of texts), the longest answer; preface: begin every question with the same long text; engine, sampling:
arguments of LLM and SamplingParams (a list of them: the questions take turns); rounds: how often all are asked, or a
list of what differs each time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from ctc_drafter.target import EMBEDDED

QUESTIONS = [
    "Tom has 3 apples and buys 5 more. How many has he?",
    "Give three tips for staying healthy.",
    "Write a function that adds two numbers.",
    "What is the capital of France?",
    "A shop sells 4 boxes with 6 pens each. How many pens are that?",
    "Write a Python function that returns the largest number of a list.",
    "Describe a day at the sea in a few sentences.",
    "Nora reads 12 pages a day. How many pages does she read in a week?",
    "Explain why the sky is blue.",
    "Write a short poem about rain.",
    "Sort the numbers 5, 2, 9 and 1.",
    "There are 24 students in 4 equal groups. How many are in each group?",
]
PREFACE = (
    "Read this first. A farmer has a field with twelve rows of trees, and every row has nine trees. In spring he picks "
    "the flowers, in autumn he picks the fruit and sells it at the market. Now answer this: "
)
METHOD = {"method": "custom_class", "model": "ctc_drafter.integrations.vllm.CTCProposer"}


def speculation(drafter: str | None, longest: int = 6, **options: Any) -> dict[str, Any]:
    """The arguments of vLLM that ask for a drafter."""
    if drafter is None:
        return {}
    return {
        "speculative_config": {**METHOD, "num_speculative_tokens": longest},
        "additional_config": {"ctc_drafter": {"drafter": drafter, **options}},
    }


def counters(engine: Any) -> dict[str, int]:
    """vLLM's own counters, without their prefix."""
    return {
        metric.name.removeprefix("vllm:"): metric.value
        for metric in engine.get_metrics()
        if isinstance(getattr(metric, "value", None), int)
    }


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Answer, greedily if not told otherwise; ids of every answer, round by round, and what vLLM counted."""
    from vllm import LLM

    arguments = {
        "model": str(EMBEDDED / "target"),
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 8,
        "disable_log_stats": False,
        "distributed_executor_backend": "uni",
        **speculation(options.get("drafter"), options.get("longest", 6), **options.get("options", {})),
        **options.get("engine", {}),
    }
    engine = LLM(**arguments)
    rounds = options.get("rounds", 1)
    parts = [{}] * rounds if isinstance(rounds, int) else rounds
    return {"rounds": [ask(engine, {**options, **part}) for part in parts]}


def ask(engine: Any, options: dict[str, Any]) -> dict[str, Any]:
    """One round; with `n` in the sampling, the answers to a question follow each other."""
    from vllm import SamplingParams

    asked = options.get("questions", 8)
    questions = asked if isinstance(asked, list) else QUESTIONS[:asked]
    preface = PREFACE if options.get("preface") else ""
    chats = [[{"role": "user", "content": preface + question}] for question in questions]
    turns = options.get("sampling", {})
    turns = turns if isinstance(turns, list) else [turns]
    wanted = [{"temperature": 0, "max_tokens": options.get("tokens", 48), **turn} for turn in turns]
    sampling = [SamplingParams(**wanted[index % len(wanted)]) for index in range(len(chats))]
    before, began = counters(engine), time.perf_counter()
    outputs = engine.chat(chats, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    answers = [list(answer.token_ids) for output in outputs for answer in output.outputs]
    counted = {name: value - before[name] for name, value in counters(engine).items()}
    return {"answers": answers, "seconds": seconds, "counters": counted}


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    for options in json.loads(sys.argv[1]):
        print("RESULT " + json.dumps(run(options)), flush=True)
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else two processes want two NUMA nodes
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
