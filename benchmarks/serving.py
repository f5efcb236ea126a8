"""Loads servers with streaming clients, and checks every answer against the one given alone.

    python benchmarks/serving.py --json benchmarks/results/serving.json \\
        --clients 32 --slots 32 --seconds 300 120 --vllm .venv-vllm/bin/python

One server process after the other: ours with each `--drafter`, then vLLM's if there is one. First every prompt is
answered alone; then `--clients` clients stream answers for `--seconds`. Time to first token: from sending a request to
the first chunk with tokens. Time per token: from that chunk to the last, over the tokens that came after the first; a
mean for each answer, of which percentiles are taken. `wrong` counts answers whose token ids differ from those given
alone, `errors` those that failed, those whose stream and usage disagree included; both count the answers of `--ramp`
too, the other figures do not. Memory is resident memory of the server's processes, read every second; what it does
after the first fifth of the time says whether it is flat.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import threading
import time
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import about
from ctc_drafter.bench.measure import tau_of
from ctc_drafter.bench.prompts import demo_prompts, read_prompts
from ctc_drafter.bench.results import check_output, write_json
from ctc_drafter.cli.options import plain_errors
from servers import Row, Server, ours, vllm

VLLM = "vllm"
FLAT = 0.02
"""Memory is flat if from the second fifth to the last it grows by no more than this part."""


def load(
    server: Server, prompts: list[str], alone: list[Row], seconds: float, arguments: argparse.Namespace
) -> tuple[list[Row], Row]:
    """Rows of prompts and of the memory under load, and the totals."""
    answers: list[Row] = []
    memory: list[Row] = []
    began = time.perf_counter() + arguments.ramp
    end = began + seconds

    def client(number: int) -> None:
        turn = number * len(prompts) // arguments.clients
        time.sleep(number * arguments.ramp / arguments.clients)
        while (now := time.perf_counter()) < end:
            place = turn % len(prompts)
            row: Row = {"prompt": place, "measured": now >= began}
            try:
                row |= server.ask(prompts[place], arguments.max_tokens)
                ids, want = row.pop("ids"), alone[place]["ids"]
                row["tokens"] = len(ids)
                row["identical"] = ids == want
                if ids != want:
                    row["differs_at"] = next(
                        (i for i, (a, b) in enumerate(zip(ids, want)) if a != b), min(len(ids), len(want))
                    )
            except (OSError, RuntimeError, http.client.HTTPException, ValueError) as error:
                row["error"] = f"{type(error).__name__}: {error}"[:200]
            answers.append(row)
            turn += 1

    threads = [threading.Thread(target=client, args=(i,)) for i in range(arguments.clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append({"at": round(time.perf_counter() - began, 1), "memory_mb": round(server.memory_mb(), 1)})
        time.sleep(1.0)
    seconds = time.perf_counter() - began
    checked = [row for row in answers if "error" not in row]
    good = [row for row in checked if row["measured"]]
    tokens = sum(row["tokens"] for row in good)
    steps = [row["steps"] for row in good if row["steps"] is not None]
    totals = {
        "seconds": seconds,
        "answers": len(answers),
        "errors": len(answers) - len(checked),
        "wrong": sum(not row["identical"] for row in checked),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "tau": tau_of(tokens, len(good), sum(steps)) if steps else None,
        "first_token_seconds": percentiles([row["first"] for row in good]),
        "per_token_seconds": percentiles([row["per_token"] for row in good if row["per_token"] is not None]),
        "memory": judged([row for row in memory if row["at"] >= 0]),
        **server.processes(),
    }
    return by_prompt(answers, len(prompts)) + memory[:: max(1, len(memory) // 60)], totals


def by_prompt(answers: list[Row], count: int) -> list[Row]:
    """A row for each prompt, and one for each kind of answer that is not the one given alone."""
    rows: list[Row] = []
    for place in range(count):
        mine = [row for row in answers if row["prompt"] == place]
        same = sum(bool(row.get("identical")) for row in mine)
        rows.append({"prompt": place, "answers": len(mine), "identical": same})
        for what in ("error", "differs_at"):
            kinds = sorted({row[what] for row in mine if what in row})
            rows += [{"prompt": place, what: kind, "times": sum(r.get(what) == kind for r in mine)} for kind in kinds]
    return rows


def judged(memory: list[Row]) -> Row:
    """Where memory stands, and how it goes on after the first fifth of the time.

    growth_mb: median of the last fifth less that of the second; slope: least squares over all but the first fifth.
    """
    fifth = max(1, len(memory) // 5)
    sizes = [row["memory_mb"] for row in memory]
    told: Row = {"first_mb": sizes[0], "peak_mb": max(sizes), "last_mb": sizes[-1]}
    later = memory[fifth:]
    if len(later) < 4:
        return told
    warm, end = statistics.median(sizes[fifth : 2 * fifth]), statistics.median(sizes[-fifth:])
    slope = statistics.linear_regression([r["at"] for r in later], [r["memory_mb"] for r in later]).slope
    growth = end - warm
    return told | {
        "warm_mb": warm,
        "growth_mb": round(growth, 2),
        "slope_mb_per_minute": round(60 * slope, 3),
        "flat": growth <= FLAT * warm,
    }


def percentiles(values: list[float]) -> Row | None:
    """p50 and p99 by linear interpolation."""
    if len(values) < 2:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98]}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--drafter", nargs="+", default=["ctc+lookup", "none"])
    parser.add_argument("--vllm", type=Path, help="python of an environment with vLLM: also load its server")
    parser.add_argument("--budget", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, help="of each server")
    parser.add_argument("--prompts", type=Path, nargs="+", help="JSONL as for bench; default: the demo's")
    parser.add_argument("--limit", type=int, default=16, help="prompts of each file")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--slots", type=int, default=32, help="answers at once, at vLLM too")
    parser.add_argument(
        "--seconds",
        type=float,
        nargs="+",
        default=[300, 120],
        help="of each server in turn; the last holds for the rest",
    )
    parser.add_argument("--ramp", type=float, default=0, help="seconds before, in which the clients come one by one")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args()


def servers(arguments: argparse.Namespace) -> dict[str, AbstractContextManager[Server]]:
    """What is to be loaded, by name; nothing is started yet."""
    common: dict[str, Any] = {name: getattr(arguments, name) for name in ("target", "dtype", "threads", "slots")}
    chosen: dict[str, AbstractContextManager[Server]] = {
        drafter: ours(drafter, budget=arguments.budget, **common) for drafter in arguments.drafter
    }
    if arguments.vllm is not None:
        if arguments.vllm.is_file():
            chosen[VLLM] = vllm(arguments.vllm.absolute(), **common)
        else:
            print(f"There is no '{arguments.vllm}', so vLLM is left out; make test-vllm makes an environment with it.")
    return chosen


def main() -> None:
    arguments = _arguments()
    check_output(arguments.json, arguments.overwrite)
    source = read_prompts(arguments.prompts, arguments.limit) if arguments.prompts else demo_prompts(arguments.limit)
    prompts = [prompt.turns[0] for prompt in source]
    rows: list[Row] = []
    totals: dict[str, Row] = {}
    texts: dict[str, list[str]] = {}
    for place, (name, starting) in enumerate(servers(arguments).items()):
        seconds = arguments.seconds[min(place, len(arguments.seconds) - 1)]
        with starting as server:
            began = time.perf_counter()
            alone = [server.ask(prompt, arguments.max_tokens) for prompt in prompts]
            rate = sum(len(row["ids"]) for row in alone) / (time.perf_counter() - began)
            loaded, totals[name] = load(server, prompts, alone, seconds, arguments)
        totals[name]["alone_tokens_per_second"] = rate
        texts[name] = [row["text"] for row in alone]
        rows += [{"server": name, **row} for row in loaded]
        print(name, json.dumps(totals[name]), flush=True)
    first = next(iter(texts.values()))
    for name, said in texts.items():
        totals[name]["same_text_as_first"] = sum(a == b for a, b in zip(said, first))
    document = {
        "kind": "ctc-drafter serving",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **about(),
        "arguments": json.loads(json.dumps(vars(arguments), default=str)),
        "prompts": len(prompts),
        "totals": totals,
        "rows": rows,
    }
    write_json(arguments.json, document)
    print(f"Result: {arguments.json}")


if __name__ == "__main__":
    with plain_errors():
        main()
