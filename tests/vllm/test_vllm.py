"""The drafter inside vLLM: the tokens of vLLM alone, with accepted drafts. Real processes; run by make test-vllm.

Sampled tokens have the distribution of vLLM alone; two samples are compared by chi-square at the level 1e-5.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ctc_drafter.integrations.vllm import repair_sampling
from ctc_drafter.target import EMBEDDED
from distribution import chi_square_limit
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
DRAWS = {"questions": 1, "tokens": 3}
FEW = {"questions": 4, "tokens": 32}
SAMPLED: dict[str, dict[str, Any]] = {
    "greedy": {"tokens": 32},
    "cold": {"tokens": 32, "sampling": {"temperature": 0.01}},
    "one token": {**FEW, "sampling": [{"temperature": 1, "top_k": 1}, {"temperature": 0.7, "top_p": 1e-6}]},
    "mixed": {**FEW, "sampling": [{"temperature": 0}, {"temperature": 1, "seed": 5}]},
    "top_k": {**FEW, "sampling": {"temperature": 1, "top_k": 5}},
    "draws": {**DRAWS, "sampling": {"temperature": 1, "n": 1024}},
    "cut draws": {**DRAWS, "sampling": {"temperature": 1, "n": 1024, "top_k": 5, "top_p": 0.9}},
}
"""One round each; the first token of an answer is never drafted, the second and third of `draws` are."""

Result = dict[str, Any]


def environment() -> dict[str, str]:
    """Waiting threads sleep: on a machine with other work they would take its cores from those that compute."""
    waiting = {"OMP_WAIT_POLICY": "passive"}
    return {**waiting, **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


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


# ---------------------------------------------------------------- sampling


@pytest.fixture(scope="session")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Result]]:
    """The rounds of SAMPLED by vLLM alone, and with the drafter from another seed."""
    rounds, runs = list(SAMPLED.values()), []
    for drafter, seed in ((None, 0), ("ctc", 1)):
        engine = {"seed": seed, "max_num_seqs": 64, "enable_prefix_caching": False}
        runs.append({"drafter": drafter, "longest": 4, "options": {"budget": 8}, "engine": engine, "rounds": rounds})
    results = run_all(runs, tmp_path_factory.mktemp("sampled") / "log")
    parts = [dict(zip(SAMPLED, result["rounds"], strict=True)) for result in results]
    return dict(zip(("plain", "drafted"), parts, strict=True))


def agreement(some: list[list[int]], others: list[list[int]]) -> float:
    """The share of the tokens before the first that differs."""
    alike = [[x == y for x, y in zip(a, b)] + [False] for a, b in zip(some, others, strict=True)]
    return sum(same.index(False) for same in alike) / sum(map(len, others))


def test_cold_sampling_is_nearly_greedy(sampled: dict[str, dict[str, Result]]) -> None:
    """At temperature 0.01 only near ties are drawn, so that texts and accepted drafts are nearly those of greedy."""
    greedy, cold = sampled["drafted"]["greedy"], sampled["drafted"]["cold"]
    share = [
        accepted(part, name) / part["counters"]["spec_decode_num_draft_tokens"]
        for name, part in (("greedy", greedy), ("cold", cold))
    ]
    alike = agreement(cold["answers"], greedy["answers"])
    print(f"accepted share of drafts {share[0]:.3f} greedy, {share[1]:.3f} cold; {alike:.3f} of the tokens alike")
    assert greedy["answers"] == sampled["plain"]["greedy"]["answers"]
    assert alike > 0.8
    assert 0.8 < share[1] / share[0] < 1.25


def test_one_token_to_draw_from_is_greedy(sampled: dict[str, dict[str, Result]]) -> None:
    """Whatever the temperature: top_k 1 by turns with a tiny top_p, in one batch."""
    part = sampled["drafted"]["one token"]
    assert part["answers"] == sampled["plain"]["greedy"]["answers"][:4]
    assert accepted(part, "one token") > 0


def test_greedy_requests_stay_greedy_beside_sampled_ones(sampled: dict[str, dict[str, Result]]) -> None:
    part, greedy = sampled["drafted"]["mixed"], sampled["plain"]["greedy"]["answers"]
    assert part["answers"][0:4:2] == greedy[0:4:2]
    assert part["answers"][1:4:2] != greedy[1:4:2]


def test_only_what_is_wrong_in_vllm_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if not current_platform.is_cpu():
        pytest.skip("only on a CPU anything is replaced")
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", lambda x, ends, total, *_: x.new_zeros(total))
    monkeypatch.setattr(rejection_sampler, "apply_top_k_top_p", lambda logits, k, p: logits)
    assert repair_sampling() == ["expand_batch_to_tokens"]
    temperatures, ends = torch.tensor([0.5, 0.0, 2.5]), torch.tensor([2, 3, 3], dtype=torch.int32)
    assert rejection_sampler.expand_batch_to_tokens(temperatures, ends, 3, 0, 1).tolist() == [0.5, 0.5, 1.0]
    assert repair_sampling() == []
    monkeypatch.setattr(rejection_sampler, "apply_top_k_top_p", lambda logits, k, p: logits[:, : k.max()])
    assert repair_sampling() == ["apply_top_k_top_p"]
    assert rejection_sampler.apply_top_k_top_p(torch.empty(0, 5), ends[:0], None).shape == (0, 5)
    assert rejection_sampler.apply_top_k_top_p(torch.empty(1, 5), ends[:1], None).shape == (1, 2)


def test_top_k_without_top_p_runs(sampled: dict[str, dict[str, Result]]) -> None:
    """vLLM 0.32 itself raises in the first pass of it, that of the prompts."""
    assert accepted(sampled["drafted"]["top_k"], "top_k") > 0


def texts(part: Result, length: int) -> list[tuple[int, ...]]:
    return [tuple(answer[:length]) for answer in part["answers"]]


def two_samples(some: Iterable[Any], others: Iterable[Any]) -> tuple[float, int]:
    """Chi-square of the hypothesis that both have one distribution, and its degrees of freedom.

    What both together have fewer than ten of shares one cell.
    """
    a, b = Counter(some), Counter(others)
    cells = [(a[text], b[text]) for text in a | b if a[text] + b[text] >= 10]
    rest = (a.total() - sum(x for x, _ in cells), b.total() - sum(y for _, y in cells))
    if sum(rest) >= 10:
        cells.append(rest)
    weight = (b.total() / a.total()) ** 0.5
    return sum((x * weight - y / weight) ** 2 / (x + y) for x, y in cells), len(cells) - 1


def too_eager(draws: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """A sampler that takes the likeliest second token half of the time without asking the target."""
    seconds: dict[int, Counter[int]] = {}
    for first, second, *_ in draws:
        seconds.setdefault(first, Counter())[second] += 1
    best = {first: counts.most_common(1)[0][0] for first, counts in seconds.items()}
    return [(d[0], best[d[0]], *d[2:]) if index % 2 else d for index, d in enumerate(draws)]


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("name", ["draws", "cut draws"])
def test_sampled_tokens_have_the_distribution_of_vllm_alone(
    sampled: dict[str, dict[str, Result]], name: str, length: int
) -> None:
    plain, drafted = (texts(sampled[who][name], length) for who in ("plain", "drafted"))
    assert accepted(sampled["drafted"][name], name) > 0
    found, freedom = two_samples(drafted, plain)
    wrong, freedom_wrong = two_samples(too_eager(drafted), plain)
    limits = chi_square_limit(freedom), chi_square_limit(freedom_wrong)
    print(f"{name}, {length} tokens: {found:.1f} of {limits[0]:.1f}; too eager {wrong:.1f} of {limits[1]:.1f}")
    assert found < limits[0]
    assert wrong > limits[1]


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
