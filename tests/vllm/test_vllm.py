"""The drafter inside vLLM: the tokens of vLLM alone, with accepted drafts. Real processes; run by make test-vllm."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ctc_drafter.target import EMBEDDED
from engine import QUESTIONS, speculation

ENGINE = Path(__file__).with_name("engine.py")
LONG = {"preface": True, "questions": 6, "tokens": 40, "engine": {"block_size": 32}}
EDGE = {"questions": 3, "tokens": 200, "engine": {"max_model_len": 80}}
PIECES = {"max_num_batched_tokens": 9, "enable_prefix_caching": False}
FEW_BLOCKS = {"num_gpu_blocks_override": 12, "block_size": 32, "max_model_len": 128}
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"drafter": None},
    "drafted": {"drafter": "ctc"},
    "pieces": {"drafter": "ctc", "engine": PIECES},
    "few blocks": {"drafter": "ctc", "engine": FEW_BLOCKS},
    "plain long": {"drafter": None, **LONG},
    "drafted long": {"drafter": "ctc", "rounds": 2, **LONG},
    "plain edge": {"drafter": None, **EDGE},
    "drafted edge": {"drafter": "ctc", **EDGE},
}

Result = dict[str, Any]


def environment() -> dict[str, str]:
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A process with a group of its own, so that vLLM's workers can be ended with it."""
    with log.open("wb") as out:
        command = [sys.executable, *arguments]
        return subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )


def end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(runs: list[dict[str, Any]], log: Path, limit: float = 3000) -> list[Result]:
    process = start([str(ENGINE), json.dumps(runs)], log)
    try:
        process.wait(limit)
    finally:
        end(process)
    lines = log.read_text(errors="replace").splitlines()
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    assert len(results) == len(runs), "\n".join(lines[-60:])
    return results


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """All runs of RUNS, one engine after the other in one process."""
    log = tmp_path_factory.mktemp("runs") / "log"
    return dict(zip(RUNS, run_all(list(RUNS.values()), log), strict=True))


def answers(result: Result) -> list[list[int]]:
    found: list[list[int]] = result["rounds"][0]["answers"]
    return found


def accepted(part: Result, name: str) -> int:
    """Accepted drafts of a round; prints tau, tokens per step of a request."""
    counted = part["counters"]
    good, steps = counted["spec_decode_num_accepted_tokens"], counted["spec_decode_num_drafts"]
    print(f"{name}: tau {1 + good / max(1, steps):.2f}, {counted['generation_tokens'] / part['seconds']:.0f} tokens/s")
    return int(good)


@pytest.mark.parametrize("name", ["drafted", "pieces", "few blocks"])
def test_drafts_change_no_token(results: dict[str, Result], name: str) -> None:
    assert answers(results[name]) == answers(results["plain"])
    assert accepted(results[name]["rounds"][0], name) > 0


def test_few_blocks_means_preemption(results: dict[str, Result]) -> None:
    assert results["few blocks"]["rounds"][0]["counters"]["num_preemptions"] > 0


def test_prefix_cache_hits_cost_drafts_but_change_no_token(results: dict[str, Result]) -> None:
    want = answers(results["plain long"])
    for index, part in enumerate(results["drafted long"]["rounds"]):
        assert part["answers"] == want
        assert part["counters"]["prefix_cache_hits"] > 0
        assert accepted(part, f"prefix cache, round {index}") > 0


def test_answers_end_at_the_edge_of_the_context(results: dict[str, Result]) -> None:
    assert answers(results["drafted edge"]) == answers(results["plain edge"])
    assert accepted(results["drafted edge"]["rounds"][0], "edge") > 0


def test_two_tensor_parallel_processes(results: dict[str, Result], tmp_path: Path) -> None:
    (result,) = run_all([{"drafter": "ctc", "engine": TWO}], tmp_path / "log")
    assert answers(result) == answers(results["plain"])
    assert accepted(result["rounds"][0], "two processes") > 0


# ---------------------------------------------------------------- the server


@contextmanager
def serving(log: Path, limit: float = 1500) -> Iterator[str]:
    """vLLM's HTTP server with the drafter; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = speculation("ctc")
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(EMBEDDED / "target"), "--port", str(port)]
    arguments += ["--served-model-name", "target", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"]
    for name, value in options.items():
        arguments += ["--" + name.replace("_", "-"), json.dumps(value)]
    process = start(arguments, log)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + limit
    try:
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text(errors="replace")[-4000:]
            try:
                with urllib.request.urlopen(url + "/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        yield url
    finally:
        end(process)


def ask(url: str, question: str) -> list[int]:
    body = {
        "model": "target",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 48,
        "return_token_ids": True,
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as reply:
        ids: list[int] = json.load(reply)["choices"][0]["token_ids"]
        return ids


def test_the_http_server_says_the_same(results: dict[str, Result], tmp_path: Path) -> None:
    with serving(tmp_path / "log") as url:
        assert [ask(url, question) for question in QUESTIONS[:3]] == answers(results["plain"])[:3]
        with urllib.request.urlopen(url + "/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
    counts = [float(x.split()[-1]) for x in lines if x.startswith("vllm:spec_decode_num_accepted_tokens_total")]
    assert sum(counts) > 0


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"drafter": "nowhere"}, "There is no drafter 'nowhere'"),
        ({"drafter": "ctc", "options": {"bugdet": 3}}, "unknown key 'bugdet'"),
    ],
)
def test_a_wrong_option_is_told_in_a_sentence(tmp_path: Path, run: dict[str, Any], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        run_all([run], tmp_path / "log")
