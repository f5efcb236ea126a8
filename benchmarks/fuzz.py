"""10,000 malformed or hostile requests that a real server refuses with a 4xx in OpenAI's shape, never a 5xx.

    python benchmarks/fuzz.py --json benchmarks/results/fuzz.json

First schemathesis asks by the server's own schema, rightly and wrongly (pip install 'schemathesis>=4'); then come the
requests of `hostile.py`, until `--count` have been refused; those whose end never comes take half a minute each. In
between and at the end the server must answer one prompt as it did before. What is wrong is printed with the bytes that
did it; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import about
from ctc_drafter.bench.results import check_output, write_json
from ctc_drafter.cli.options import plain_errors
from hostile import Case, cases
from servers import Server, ours

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
QUESTION = "Name three colours."


def send(port: int, case: Case, timeout: float = 600.0) -> tuple[int | None, bytes]:
    """Status and body of the answer; no status if the server closed the connection without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        with suppress(ConnectionError):  # the server may answer, and close, before it has read all
            connection.sendall(case.data)
        if case.cut:
            return None, b""
        answer = b""
        with suppress(ConnectionError):
            while not _whole(answer) and (part := connection.recv(65536)):
                answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
    return (int(status[1]) if status else None), body


def _whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
    return bool(end) and length is not None and len(body) >= int(length[1])


def fault(case: Case, status: int | None, body: bytes) -> str | None:
    """What is wrong with the answer."""
    if case.cut:
        return None
    if status is None or not 400 <= status < 500:
        return f"status {status}"
    try:
        error = json.loads(body)["error"]
        if error.keys() != {"message", "type", "param", "code"} or not error["message"] or not error["type"]:
            return "the error lacks something"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"status {status} without OpenAI's error: {body[:80]!r}"
    return None


def attack(port: int, chosen: list[Case], threads: int) -> tuple[dict[str, Counter[str]], list[dict[str, Any]]]:
    """Statuses by kind, and the faults."""
    statuses: dict[str, Counter[str]] = {}
    faults: list[dict[str, Any]] = []
    lock, queue = threading.Lock(), iter(chosen)

    def work() -> None:
        while True:
            with lock:
                case = next(queue, None)
            if case is None:
                return
            try:
                status, body = send(port, case)
                wrong = fault(case, status, body)
            except OSError as error:
                status, wrong = None, f"{type(error).__name__}: {error}"
            with lock:
                statuses.setdefault(case.kind, Counter())["hung up" if case.cut else str(status)] += 1
                if wrong:
                    faults.append({"kind": case.kind, "wrong": wrong, "request": repr(case.data[:600])})

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return statuses, faults


def by_schema(server: Server, examples: int, seed: int) -> tuple[Counter[str], int]:
    """Statuses of what schemathesis asked, by the server's own count, and its exit code."""
    before = counted(server)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{server.port}/openapi.json"]
    command += ["--phases", "coverage,fuzzing", "--checks", CHECKS, "--request-timeout", "600", "--seed", str(seed)]
    command += ["--max-examples", str(examples), "--continue-on-failure"]
    code = subprocess.run(command, check=False).returncode
    return counted(server) - before, code


def refused(*counts: Counter[str]) -> int:
    """How many of these statuses are 4xx; neither what was answered nor those who hung up count."""
    return sum(number for each in counts for status, number in each.items() if re.fullmatch(r"4\d\d", status))


def counted(server: Server) -> Counter[str]:
    """The server's own count of requests by status."""
    out: Counter[str] = Counter()
    for line in server.text("/metrics").splitlines():
        if match := re.match(r'ctc_drafter_requests_total\{.*status="(\d+)"\} (\S+)', line):
            out[match[1]] += int(float(match[2]))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=200, help="of schemathesis, for each route; 0: leave it out")
    parser.add_argument("--own", type=int, default=6_000, help="the fewest of our own")
    parser.add_argument("--threads", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    check_output(arguments.json, arguments.overwrite)
    began = time.perf_counter()
    with ours("ctc", max_new_tokens=24, queue=64) as server:
        want = server.ask(QUESTION, 24)["ids"]
        schema: Counter[str] = Counter()
        code = 0
        if arguments.examples:
            schema, code = by_schema(server, arguments.examples, arguments.seed)
            assert server.ask(QUESTION, 24)["ids"] == want
        statuses: dict[str, Counter[str]] = {}
        faults: list[dict[str, Any]] = []
        sent = 0
        while (left := max(arguments.own - sent, arguments.count - refused(schema, *statuses.values()))) > 0:
            chosen = cases(min(2000, left), arguments.seed + sent, server.model)
            sent += len(chosen)
            told, wrong = attack(server.port, chosen, arguments.threads)
            for kind, counts in told.items():
                statuses.setdefault(kind, Counter()).update(counts)
            faults += wrong
            assert server.ask(QUESTION, 24)["ids"] == want, "the server answers otherwise than before"
        health, five = server.get("/health"), {s: n for s, n in counted(server).items() if s.startswith("5")}
    own = sum((counts for counts in statuses.values()), Counter())
    total = schema.total() + own.total()
    document = {
        "kind": "ctc-drafter fuzz",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **about(),
        "arguments": json.loads(json.dumps(vars(arguments), default=str)),
        "totals": {
            "requests": total,
            "refused": refused(schema, own),
            "seconds": time.perf_counter() - began,
            "by_schema": {"requests": schema.total(), "statuses": dict(sorted(schema.items())), "exit_code": code},
            "own": {"requests": own.total(), "statuses": dict(sorted(own.items()))},
            "faults": len(faults),
            "server_errors": five,
            "health_afterwards": health,
        },
        "rows": [{"kind": kind, **dict(sorted(counts.items()))} for kind, counts in sorted(statuses.items())],
        "faults": faults[:50],
    }
    for each in faults[:20]:
        print(each)
    print(json.dumps(document["totals"]))
    write_json(arguments.json, document)
    statuses_of_all = dict(sorted((schema + own).items()))
    print(f"{total} requests, {refused(schema, own)} refused; statuses {statuses_of_all}; faults {len(faults)}.")
    print(f"Result: {arguments.json}")
    return 1 if faults or five or code else 0


if __name__ == "__main__":
    with plain_errors():
        sys.exit(main())
