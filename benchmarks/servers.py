"""Server processes for the scripts of this folder, and how to ask them: our own, and vLLM's for the same target."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ctc_drafter.target import EMBEDDED

Row = dict[str, Any]
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}


class Server:
    """A server process that speaks OpenAI's API."""

    def __init__(self, process: subprocess.Popen[Any], port: int) -> None:
        self.process, self.port = process, port
        self.model = self.get("/v1/models")["data"][0]["id"]

    def get(self, path: str) -> Any:
        return json.loads(self.text(path))

    def text(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def ask(self, prompt: str, max_tokens: int) -> Row:
        """Stream one greedy answer; returns its text, token ids, steps (None at vLLM) and times in seconds."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        began = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read(500)!r}")
        ids: list[int] = []
        text, first, last, opening, usage = "", 0.0, 0.0, 0, None
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                if new := choice.get("token_ids"):
                    last = time.perf_counter()
                    ids += new
                    if not first:
                        first, opening = last, len(new)
                text += choice["delta"].get("content") or ""
        connection.close()
        if usage is None:
            raise RuntimeError("the stream ended early")
        if usage["completion_tokens"] != len(ids):
            raise RuntimeError(f"{len(ids)} tokens came, and the usage says {usage['completion_tokens']}")
        later = len(ids) - opening
        return {
            "text": text,
            "ids": ids,
            "steps": usage.get("draft", {}).get("steps"),
            "first": first - began,
            "per_token": (last - first) / later if later else None,
            "seconds": time.perf_counter() - began,
        }

    def processes(self) -> dict[str, int]:
        """How many processes the server has, and how many threads these have in all."""
        pids = _family(self.process.pid)
        return {"processes": len(pids), "threads": sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids)}

    def memory_mb(self) -> float:
        """Resident memory of the process and those that it started, in MB (of 10^6 bytes)."""
        return sum(_resident(pid) for pid in _family(self.process.pid)) / 1e6


@contextmanager
def ours(
    drafter: str, *, target: str | None = None, dtype: str = "float32", threads: int | None = None, **options: int
) -> Iterator[Server]:
    """Our server for the time of the block; its end must be clean. options: others of `serve`, slots=8 and so on."""
    command = [sys.executable, "-m", "ctc_drafter", "serve", "--port", "0", "--drafter", drafter, "--dtype", dtype]
    command += ["--target", target] if target else []
    command += ["--threads", str(threads)] if threads else []
    for name, value in options.items():
        command += ["--" + name.replace("_", "-"), str(value)]
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


@contextmanager
def vllm(
    python: Path, *, target: str | None, dtype: str, threads: int | None, slots: int, limit: float = 300
) -> Iterator[Server]:
    """vLLM's own server for the same target, by the Python of its environment, in a process group of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", target or str(EMBEDDED / "target")]
    command += ["--port", str(port), "--host", "127.0.0.1", "--served-model-name", "target", "--dtype", dtype]
    command += ["--max-num-seqs", str(slots), "--no-enable-prefix-caching", "--enforce-eager"]
    command += ["--disable-uvicorn-access-log", "--distributed-executor-backend", "uni"]
    environment = {**os.environ, **VLLM_ENVIRONMENT}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    with tempfile.TemporaryFile() as log:
        options: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, env=environment, **options)
        until = time.monotonic() + limit
        try:
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise SystemExit("vLLM's server did not start: " + log.read().decode(errors="replace")[-3000:])
                time.sleep(0.5)
            yield Server(process, port)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: list[int] = []
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            children += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return [pid, *(each for child in children for each in _family(child))]


def _resident(pid: int) -> int:
    """Bytes; 0 for a process that has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0
