"""Loads the server with streaming clients, and checks every answer against the one given alone.

python benchmarks/serving.py --json benchmarks/results/serving.json

For each drafter a server process is started. First every prompt is answered alone; then `--clients` clients stream
answers for `--seconds`. Time to first token: from sending a request to the first chunk with text. Time per token: from
that chunk to the last, over the tokens after the first chunk's step; a mean for each answer, of which percentiles are
taken. `wrong` counts answers that differ from the one given alone, `errors` those that failed. Rows are answers, and
the server's resident memory every second.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import about
from ctc_drafter.bench.measure import tau_of
from ctc_drafter.bench.prompts import demo_prompts, read_prompts
from ctc_drafter.bench.results import check_output, write_json

Row = dict[str, Any]


class Server:
    """A server process and how to ask it."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port
        self.model = self.get("/v1/models")["data"][0]["id"]

    def get(self, path: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())

    def ask(self, prompt: str, max_tokens: int) -> Row:
        """Stream one greedy answer; returns its text, tokens and times in seconds."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ctc_drafter": {"steps": True},
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        began = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read(500)!r}")
        text, first, last, opening, usage = "", 0.0, 0.0, 0, None
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            usage = chunk.get("usage") or usage
            if "ctc_drafter" in chunk:
                last = time.perf_counter()
                if not first:
                    first, opening = last, chunk["ctc_drafter"]["tokens"]
                text += chunk["choices"][0]["delta"].get("content", "")
        connection.close()
        if usage is None:
            raise RuntimeError("the stream ended early")
        later = usage["completion_tokens"] - opening
        return {
            "text": text,
            "tokens": usage["completion_tokens"],
            "steps": usage["draft"]["steps"],
            "first": first - began,
            "per_token": (last - first) / later if later else None,
            "seconds": time.perf_counter() - began,
        }


@contextmanager
def running(arguments: argparse.Namespace, drafter: str) -> Iterator[Server]:
    """A server for the time of the block; its end must be clean."""
    command = [sys.executable, "-m", "ctc_drafter", "serve", "--port", "0", "--drafter", drafter]
    command += ["--slots", str(arguments.slots), "--budget", str(arguments.budget), "--dtype", arguments.dtype]
    command += ["--target", arguments.target] if arguments.target else []
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("The server did not start.")
        yield Server(process, int(line.rsplit(":", 1)[1].split("/")[0]))
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise SystemExit(f"The server ended with code {process.returncode}.")
    finally:
        process.kill()


def memory_mb(pid: int) -> float:
    """Resident memory of a process in MB (of 10^6 bytes)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def load(server: Server, prompts: list[str], alone: list[Row], arguments: argparse.Namespace) -> tuple[list[Row], Row]:
    """Rows of all answers under load and of the memory, and the totals."""
    rows: list[Row] = []
    memory: list[Row] = []
    began = time.perf_counter()
    end = began + arguments.seconds

    def client(number: int) -> None:
        turn = number * len(prompts) // arguments.clients
        while time.perf_counter() < end:
            place = turn % len(prompts)
            row: Row = {"client": number, "prompt": place}
            try:
                row |= server.ask(prompts[place], arguments.max_tokens)
                row["identical"] = row.pop("text") == alone[place]["text"]
            except (OSError, RuntimeError, http.client.HTTPException, ValueError) as error:
                row["error"] = f"{type(error).__name__}: {error}"[:200]
            rows.append(row)
            turn += 1

    threads = [threading.Thread(target=client, args=(i,)) for i in range(arguments.clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append({"at": time.perf_counter() - began, "memory_mb": memory_mb(server.process.pid)})
        time.sleep(1.0)
    seconds = time.perf_counter() - began
    good = [row for row in rows if "error" not in row]
    sizes = [row["memory_mb"] for row in memory]
    return rows + memory, {
        "seconds": seconds,
        "answers": len(rows),
        "errors": len(rows) - len(good),
        "wrong": sum(not row["identical"] for row in good),
        "tokens_per_second": sum(row["tokens"] for row in good) / seconds,
        "tau": tau_of(sum(row["tokens"] for row in good), len(good), sum(row["steps"] for row in good)),
        "first_token_seconds": percentiles([row["first"] for row in good]),
        "per_token_seconds": percentiles([row["per_token"] for row in good if row["per_token"] is not None]),
        "memory_mb": {"first": sizes[0], "peak": max(sizes), "last": sizes[-1]},
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
    parser.add_argument("--drafter", nargs="+", default=["ctc", "none"])
    parser.add_argument("--budget", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompts", type=Path, nargs="+", help="JSONL as for bench; default: the demo's")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    check_output(arguments.json, arguments.overwrite)
    source = read_prompts(arguments.prompts, arguments.limit) if arguments.prompts else demo_prompts(arguments.limit)
    prompts = [prompt.turns[0] for prompt in source]
    rows: list[Row] = []
    totals: dict[str, Row] = {}
    texts: dict[str, list[str]] = {}
    for drafter in arguments.drafter:
        with running(arguments, drafter) as server:
            began = time.perf_counter()
            alone = [server.ask(prompt, arguments.max_tokens) for prompt in prompts]
            rate = sum(row["tokens"] for row in alone) / (time.perf_counter() - began)
            loaded, totals[drafter] = load(server, prompts, alone, arguments)
        totals[drafter]["alone_tokens_per_second"] = rate
        texts[drafter] = [row["text"] for row in alone]
        rows += [{"drafter": drafter, **row} for row in loaded]
        print(drafter, json.dumps(totals[drafter]), flush=True)
    first = texts[arguments.drafter[0]]
    for drafter, said in texts.items():
        totals[drafter]["same_text_as_first"] = sum(a == b for a, b in zip(said, first))
    document = {
        "kind": "ctc-drafter serving",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **about(),
        "arguments": {k: [str(p) for p in v] if k == "prompts" and v else v for k, v in vars(arguments).items()},
        "totals": totals,
        "rows": rows,
    }
    document["arguments"]["json"] = str(arguments.json)
    write_json(arguments.json, document)
    print(f"Result: {arguments.json}")


if __name__ == "__main__":
    main()
