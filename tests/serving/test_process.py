"""The real command in a process of its own: start, signals, sudden death."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from typer.testing import CliRunner

from ctc_drafter.cli import app
from ctc_drafter.drafters import NoDrafter
from ctc_drafter.files import file_digest
from ctc_drafter.target import Target
from live import QUESTIONS, ask, chat_ids, text_of, tokens_of, wait_until

HTTP = httpx2.Client(timeout=60)


@contextmanager
def served(
    *args: object, cwd: Path | None = None, program: Sequence[str] = ("-m", "ctc_drafter")
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address; it is killed at the end if it still runs."""
    command = [sys.executable, *program, "serve", "--port", "0", "--threads", "1", *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Serving "), process.communicate(timeout=60)
        yield process, line.split()[-1].removesuffix("/v1")
    finally:
        process.kill()
        process.communicate()


def client_of(base: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0, timeout=60)


def request(i: int, **options: Any) -> dict[str, Any]:
    return ask(QUESTIONS[i], **options) | {"model": options.pop("model", "tiny")}


def test_sigterm_lets_answers_finish_and_takes_no_new_ones(target: Target, target_folder: Path) -> None:
    want = [text_of(target, tokens_of(target, NoDrafter(), chat_ids(target, q), max_new_tokens=140)) for q in QUESTIONS]
    with served("--target", target_folder, "--drafter", "none") as (process, base), ThreadPoolExecutor(8) as pool:
        client = client_of(base)

        def read(i: int) -> str:
            chunks = client.chat.completions.create(stream=True, **request(i, max_tokens=140))
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        texts = [pool.submit(read, i) for i in range(8)]
        wait_until(lambda: HTTP.get(f"{base}/health").json()["running"] > 4)
        with httpx2.Client(base_url=base, timeout=60) as http:
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: http.get("/health").json()["status"] == "draining")
            response = http.post("/v1/chat/completions", json=request(0))
            assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
        assert [t.result() for t in texts] == want
        assert process.wait(20) == 0


def test_a_model_that_fails_ends_the_server(target_folder: Path) -> None:
    code = (
        "from ctc_drafter.batch import Batch; from ctc_drafter.cli import main; real = Batch.step\n"
        "def step(batch):\n"
        "    return [][1] if len(batch) > 1 else real(batch)\n"
        "Batch.step = step; main()"
    )
    options = ("--target", target_folder, "--drafter", "none")
    with served(*options, program=["-c", code]) as (process, base), ThreadPoolExecutor(2) as pool:
        client = client_of(base)
        asked = [pool.submit(client.chat.completions.create, **request(i, max_tokens=140)) for i in range(2)]
        assert any(isinstance(reply.exception(), openai.APIError) for reply in asked)
        assert process.wait(20) == 1
        assert process.stderr is not None
        told = process.stderr.read()
        assert "IndexError" in told and "The model has failed, so the server has ended" in told


@pytest.mark.slow
def test_a_second_signal_ends_the_server_at_once(target_folder: Path) -> None:
    with served("--target", target_folder, "--drafter", "none", "--slots", 1) as (process, base):
        client = client_of(base)
        stream = client.chat.completions.create(stream=True, n=16, **request(0, max_tokens=140, temperature=1))
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "Finishing 16 answers" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        with pytest.raises((openai.APIError, httpx2.HTTPError)):
            list(stream)
        assert process.wait(30) == 0


def test_kill_9_in_mid_stream_is_a_clean_error_and_harms_nothing(
    target: Target, target_folder: Path, drafter_folder: Path, tmp_path: Path
) -> None:
    """All that the server could write to is compared, and the next server on the port answers as ever."""
    models = tmp_path / "models"
    shutil.copytree(target_folder, models / "target")
    shutil.copytree(drafter_folder, models / "drafter")
    before = digests(tmp_path)
    want = text_of(target, tokens_of(target, NoDrafter(), chat_ids(target, QUESTIONS[0]), max_new_tokens=40))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ("--target", models / "target", "--drafter", models / "drafter", "--port", port, "--model-name", "tiny")
    with served(*arguments, cwd=tmp_path) as (process, base):
        client = client_of(base)
        streams = [
            client.chat.completions.create(stream=True, **request(i, max_tokens=140, temperature=1)) for i in range(8)
        ]
        for stream in streams:
            next(iter(stream))
        # Sixteen answers take the slots several times over, so that this one cannot have ended.
        long = client.chat.completions.create(stream=True, **request(0, n=16, max_tokens=140, temperature=1))
        next(iter(long))
        waiting = ThreadPoolExecutor(1).submit(client.chat.completions.create, **request(0, n=16, max_tokens=140))
        wait_until(lambda: HTTP.get(f"{base}/health").json()["waiting"] > 0)
        process.kill()  # SIGKILL
        assert process.wait(20) == -signal.SIGKILL
        with pytest.raises((openai.APIError, httpx2.HTTPError)):
            list(long)
        for stream in streams:
            try:
                *_, last = stream
            except (openai.APIError, httpx2.HTTPError):
                continue
            assert last.usage is not None or last.choices[0].finish_reason is not None  # it had ended before
        with pytest.raises(openai.APIConnectionError):
            waiting.result(20)
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    assert digests(tmp_path) == before
    with served(*arguments, cwd=tmp_path) as (process, base):
        reply = client_of(base).chat.completions.create(**request(0))
        assert reply.choices[0].message.content == want
    assert digests(tmp_path) == before


def digests(folder: Path) -> dict[str, str]:
    return {str(p): file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_the_embedded_model_is_served_drafted() -> None:
    with served() as (process, base):
        client = client_of(base)
        texts = []
        for extra in ({}, {"ctc_drafter": {"drafter": "none"}}):
            reply = client.chat.completions.create(**request(0, model="embedded", extra_body=extra))
            texts.append(reply.choices[0].message.content)
            assert reply.usage is not None and reply.usage.model_extra is not None
            assert (reply.usage.model_extra["draft"]["tau"] > 1.3) == (not extra)
        assert texts[0] == texts[1] != ""
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_a_context_shorter_than_the_warm_up_is_served(target_folder: Path) -> None:
    with served("--target", target_folder, "--drafter", "none", "--max-context", 8) as (_, base):
        body = {"model": target_folder.name, "prompt": [5, 6, 7]}
        reply = HTTP.post(f"{base}/v1/completions", json=body).json()
        assert reply["usage"]["total_tokens"] <= 8


# ---------------------------------------------------------------- what cannot start


def refused(*args: object) -> str:
    result = CliRunner().invoke(app, ["serve", *map(str, args)])
    assert result.exit_code == 2, (result.exit_code, result.stderr, result.exception)
    [line] = result.stderr.strip().splitlines()
    return line


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be listened on" in refused("--port", port)
    assert "cannot be listened on" in refused("--host", "no such host")


def test_a_missing_key_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert "'NO_SUCH_KEY' holds no key" in refused("--api-key-env", "NO_SUCH_KEY")


def test_a_context_without_room_for_an_answer_is_said(target_folder: Path, target: Target) -> None:
    options = ("--port", 0, "--target", target_folder, "--dtype", "float32", "--drafter", "none", "--slots", 2)
    few = (1 + 2 * 8 + 1) * 2 * target.position_bytes  # one position of each slot, beside its longest draft
    for limit in (("--max-context", 1), ("--memory-limit", few)):
        assert "Each of the 2 slots would hold 1 token" in refused(*options, *limit)


def test_a_missing_extra_is_said_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert "pip install 'ctc-drafter[serve]'" in refused()


def test_the_command_line_loads_without_the_extra() -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(['fastapi', 'uvicorn', 'prometheus_client']); import ctc_drafter.cli"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ})
