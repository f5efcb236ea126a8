"""Answers from a server: a real one over HTTP, which computes them with the tiny target, and fails in every way."""

from __future__ import annotations

import email.utils
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ctc_drafter.cli import app
from ctc_drafter.target import Target
from ctc_drafter.training import client, remote
from ctc_drafter.training.distill import DistillConfig, distill
from fake_server import FakeServer, Plan
from helpers import refused

TOKENS = 12


@pytest.fixture
def server(target: Target, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(client, "BACKOFF", 0.01)
    fake = FakeServer(target)
    thread = threading.Thread(target=fake.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join()


@pytest.fixture
def recipe(target_folder: Path, tmp_path: Path, server: FakeServer) -> DistillConfig:
    rows = [{"turns": [f"Question {i}" + " and more" * (i % 4)], "category": "a"} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return DistillConfig(
        prompts=[str(tmp_path / "prompts.jsonl")],
        output=str(tmp_path / "out" / "answers.jsonl"),
        target=str(target_folder),
        max_new_tokens=TOKENS,
        dtype="float32",
        device="cpu",
        api_base=server.base,
        concurrency=4,
    )


def rows_of(path: Path | str) -> list[dict[str, Any]]:
    return sorted((json.loads(line) for line in Path(path).read_text().splitlines()), key=lambda r: str(r["id"]))


@pytest.fixture
def expected(recipe: DistillConfig, tmp_path: Path) -> list[dict[str, Any]]:
    """What the target says when it runs here."""
    return rows_of(distill(replace(recipe, api_base=None, output=str(tmp_path / "local.jsonl"))))


@pytest.mark.parametrize("chat", [False, True])
def test_same_rows_as_here(
    chat: bool,
    recipe: DistillConfig,
    server: FakeServer,
    expected: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Target, "load", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    assert rows_of(distill(replace(recipe, api_chat=chat))) == expected
    assert {r["path"] for r in server.requests} == {"/v1/chat/completions" if chat else "/v1/completions"}
    wanted = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert all(r.items() >= {**wanted, "model": "tiny", "max_tokens": TOKENS}.items() for r in server.requests)
    assert len(server.requests) == 20 and 2 <= server.most_busy <= 4
    out = capsys.readouterr().out
    assert "tokens/s" in out and "survive" not in out and "left out" not in out


def test_later_turns_are_those_of_here(recipe: DistillConfig, tmp_path: Path) -> None:
    Path(recipe.prompts[0]).write_text("".join(f'{{"turns": ["Question {i}", "Why?", "So?"]}}\n' for i in range(6)))
    ways: dict[str, dict[str, Any]] = {"here": {"api_base": None}, "ids": {}, "chat": {"api_chat": True}}
    runs = [distill(replace(recipe, turns=2, output=str(tmp_path / name), **ways[name])) for name in ways]
    assert len(rows_of(runs[0])) == 12 and rows_of(runs[0]) == rows_of(runs[1]) == rows_of(runs[2])


def test_text_is_tokenized_again(
    recipe: DistillConfig, server: FakeServer, expected: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The random model talks nonsense that no tokenizer would write so: all text stays, and all changes are counted."""
    server.gives_ids = False
    rows = rows_of(distill(recipe))
    assert [r["id"] for r in rows] == [r["id"] for r in expected]
    changed = [got["answer_ids"] != want["answer_ids"] for got, want in zip(rows, expected)]
    assert sum(changed) > 0
    reported = int(capsys.readouterr().out.split("of 20 answers do not survive")[0].split()[-1])
    assert sum(changed) - reported <= 1 + sum(changed) // 4  # equal lengths may hide a change
    for row, want in zip(rows, expected):
        assert (row["prompt_ids"] == want["prompt_ids"] and row["answer"] == want["answer"]) or "�" in want["answer"]


def test_plain_text_gets_its_stop_token(recipe: DistillConfig, server: FakeServer, target: Target) -> None:
    ids = list(target.tokenizer("6 apples left", add_special_tokens=False)["input_ids"])

    def plan(number: int, body: dict[str, Any]) -> Any:
        reason = ["stop", "length"][number % 2]
        return 200, {"choices": [{"text": "6 apples left", "finish_reason": reason}]}

    server.plan = plan
    answers = [row["answer_ids"] for row in rows_of(distill(recipe))]
    assert sorted(answers, key=len) == [ids] * 10 + [[*ids, target.tokenizer.eos_token_id]] * 10


def test_ids_end_with_the_first_stop_token(recipe: DistillConfig, server: FakeServer, target: Target) -> None:
    stop = target.tokenizer.eos_token_id
    for given, reason, want in (
        ([7, 8], "stop", [7, 8, stop]),
        ([7, stop, 9], "length", [7, stop]),
        ([], "stop", [stop]),
    ):
        choice = {"text": target.tokenizer.decode(given), "token_ids": given, "finish_reason": reason}
        server.plan = lambda number, body, choice=choice: (200, {"choices": [choice]})  # type: ignore[misc]
        Path(recipe.output).unlink(missing_ok=True)
        assert [r["answer_ids"] for r in rows_of(distill(replace(recipe, limit=1)))] == [want]


def test_prompts_that_the_server_renders_differently(
    recipe: DistillConfig, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "prompt_token_ids": [5, 6, 7]}
    server.plan = lambda number, body: (200, reply)
    assert all(row["prompt_ids"] == [5, 6, 7] for row in rows_of(distill(replace(recipe, api_chat=True))))
    assert "20 of 20 prompts were rendered differently" in " ".join(capsys.readouterr().out.split())


def test_sampling_sends_a_seed_of_each_prompt(recipe: DistillConfig, server: FakeServer) -> None:
    distill(replace(recipe, temperature=0.7, seed=3))
    assert len({r["seed"] for r in server.requests}) == 20
    assert all(0 <= r["seed"] < 2**31 and r["temperature"] == 0.7 for r in server.requests)


def test_options_that_a_strict_server_does_not_know(
    recipe: DistillConfig, server: FakeServer, expected: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(number: int, body: dict[str, Any]) -> Any:
        foreign = {"top_k", "min_p"} & body.keys()
        return (
            (400, {"error": {"message": f"Unrecognized request argument: {', '.join(foreign)}"}}) if foreign else None
        )

    server.plan = plan
    assert rows_of(distill(recipe)) == expected
    assert "does not know min_p, top_k" in capsys.readouterr().out


def test_the_key_is_sent(recipe: DistillConfig, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "secret"
    monkeypatch.setenv("MY_KEY", "secret")
    assert len(rows_of(distill(replace(recipe, api_key_env="MY_KEY")))) == 20


def test_the_context_of_the_server_counts(recipe: DistillConfig, server: FakeServer) -> None:
    server.models = [{"id": "tiny", "max_model_len": 30}]
    assert all(len(r["prompt_ids"]) <= 30 - TOKENS for r in rows_of(distill(recipe)))


# ---------------------------------------------------------------- which model


def test_the_model_named_like_the_target(recipe: DistillConfig, server: FakeServer) -> None:
    server.models = [{"id": "other"}, {"id": "org/tiny"}]
    distill(recipe)
    assert {r["model"] for r in server.requests} == {"org/tiny"}


@pytest.mark.parametrize(
    ("models", "name", "match"),
    [
        (["a", "b"], "c", "no model 'c'; give one of 'a', 'b' with --api-model"),
        (["a", "b"], None, "several models; give one of 'a', 'b' with --api-model"),
        ([], None, "lists no models; name one with --api-model"),
    ],
)
def test_unknown_models(
    models: list[str], name: str | None, match: str, recipe: DistillConfig, server: FakeServer
) -> None:
    server.models = [{"id": m} for m in models]
    assert match in refused(distill, replace(recipe, api_model=name))
    assert not Path(recipe.output).exists() and not server.requests


def test_a_server_that_lists_nothing_is_believed(recipe: DistillConfig, server: FakeServer) -> None:
    server.models = []
    server.plan = lambda number, body: (404, {"error": {"message": "The model `mine` does not exist."}})
    assert "The model `mine` does not exist (status 404)" in refused(distill, replace(recipe, api_model="mine"))


# ---------------------------------------------------------------- failures


def fails_first(times: int, action: Any) -> Plan:
    """The first `times` requests fail."""
    return lambda number, body: action if number < times else None


@pytest.mark.parametrize(
    "action",
    [(500, {"detail": "oops"}), (503, b"<html>loading</html>"), (429, {"error": {"message": "slow down"}}), "drop"],
    ids=["500", "503", "429", "drop"],
)
def test_passing_failures(
    action: Any, recipe: DistillConfig, server: FakeServer, expected: list[dict[str, Any]]
) -> None:
    server.plan = fails_first(9, action)
    assert rows_of(distill(recipe)) == expected
    assert len(server.requests) == 29


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(as_date: bool, recipe: DistillConfig, server: FakeServer) -> None:
    when = email.utils.formatdate(time.time() + 2, usegmt=True)
    server.plan = fails_first(1, (429, {}, {"Retry-After": when if as_date else "1.2"}))
    distill(replace(recipe, concurrency=1))
    assert server.times[1] - server.times[0] >= (0.8 if as_date else 1.2)
    assert len(server.requests) == 21


def test_a_slow_queue_does_not_end_the_run(recipe: DistillConfig, server: FakeServer) -> None:
    """Three of four requests are turned away, many more than ATTEMPTS in all; the queue moves, so nobody gives up."""
    server.plan = lambda number, body: None if number % 4 == 3 else (429, {}, {"Retry-After": "0"})
    assert len(rows_of(distill(replace(recipe, concurrency=8)))) == 20


def test_a_hanging_server(recipe: DistillConfig, server: FakeServer) -> None:
    server.plan = lambda number, body: time.sleep(3) if number == 0 else None
    assert len(rows_of(distill(replace(recipe, request_timeout=0.5)))) == 20


def test_a_server_that_dies_for_good(recipe: DistillConfig, server: FakeServer) -> None:
    """What was finished is kept, and the next run asks only for the rest."""
    server.plan = lambda number, body: None if number < 10 else "drop"
    assert "cannot be used: no answer to /completions" in refused(distill, replace(recipe, concurrency=2))
    assert len(rows_of(recipe.output)) == 10
    server.plan, before = (lambda number, body: None), len(server.requests)
    assert len(rows_of(distill(recipe))) == 20 and len(server.requests) == before + 10


def test_a_prompt_that_always_fails_is_left_out(
    recipe: DistillConfig, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    victims: list[Any] = []

    def plan(number: int, body: dict[str, Any]) -> Any:
        victims.extend([body["prompt"]] * (number == 5))
        return (400, {"message": "[math] [/INST]."}) if body["prompt"] in victims else None

    server.plan = plan
    assert len(rows_of(distill(recipe))) == 19
    assert "1 prompts were left out; of the last the server said: [math] [/INST]." in capsys.readouterr().out


def test_nobody_listens(recipe: DistillConfig) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    base = f"http://127.0.0.1:{port}/v1"
    assert refused(distill, replace(recipe, api_base=base)).startswith(
        f"The server at {base} cannot be used: no answer"
    )
    assert time.monotonic() - began < 5 and not Path(recipe.output).exists()


@pytest.mark.parametrize("base", ["localhost:8000", "ftp://x/v1", "http://", "http://[::1", ""])
def test_addresses_that_are_none(base: str, recipe: DistillConfig) -> None:
    assert "is not the address of a server" in refused(distill, replace(recipe, api_base=base))


def test_a_wrong_key(recipe: DistillConfig, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "secret"
    assert "refuses the key (status 401)" in refused(distill, recipe)
    monkeypatch.setenv("MY_KEY", "guess")
    assert "--api-key-env" in refused(distill, replace(recipe, api_key_env="MY_KEY"))
    monkeypatch.delenv("MY_KEY")
    assert "'MY_KEY' holds no key" in refused(distill, replace(recipe, api_key_env="MY_KEY"))


@pytest.mark.parametrize(
    ("action", "match"),
    [
        (b"<html>hello</html>", "is not a JSON object"),
        (b"[1]", "is not a JSON object"),
        (b"[" * 9999, "is not a JSON object"),
        (b"{}", "holds no answer"),
        (b'{"choices": []}', "holds no answer"),
        (b'{"choices": [3]}', "holds no answer"),
        (b'{"choices": [{"text": "a", "token_ids": ["a"]}]}', "holds token ids that are none"),
        (b'{"choices": [{"text": "a", "token_ids": [100000]}]}', "gave token 100000"),
        (b'{"choices": [{"text": null}]}', "refuses to answer: an answer came without text"),
        ((400, {"error": {"message": "No."}}), "refuses to answer: No."),
        ((404, {"detail": "Not Found"}), "/completions cannot be used: Not Found (status 404)"),
        ((302, {}, {"Location": "https://elsewhere/v1"}), "redirects /completions to https://elsewhere/v1"),
        ((500, {}), "cannot be used: /completions failed with status 500"),
    ],
)
def test_replies_that_end_the_run(action: Any, match: str, recipe: DistillConfig, server: FakeServer) -> None:
    server.plan = lambda number, body: action
    assert match in refused(distill, recipe)
    assert len(server.requests) < 4 * (client.ATTEMPTS + 1) + 20
    assert not Path(recipe.output).exists()


def test_not_an_api_at_all(recipe: DistillConfig, server: FakeServer) -> None:
    base = server.base.removesuffix("/v1")
    assert "lists no models; name one with --api-model" in refused(distill, replace(recipe, api_base=base))
    server.models = [{"name": "x"}]
    assert "lists no models; is this an OpenAI-compatible server?" in refused(distill, recipe)


def test_a_target_that_is_not_whole(recipe: DistillConfig, tmp_path: Path) -> None:
    assert "cannot be loaded" in refused(distill, replace(recipe, target=str(tmp_path / "nowhere")))
    folder = Path(shutil.copytree(str(recipe.target), tmp_path / "damaged"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, ')  # or its stop tokens would be lost
    assert "generation_config.json' is not valid JSON" in refused(distill, replace(recipe, target=str(folder)))


# ---------------------------------------------------------------- resuming and the command


@pytest.mark.parametrize("kept", [0, 1, 13, 20])
def test_resuming_after_a_kill(kept: int, recipe: DistillConfig, server: FakeServer) -> None:
    output = distill(recipe)
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:kept]) + "".join(lines[kept:])[:23])
    before = len(server.requests)
    distill(recipe)
    assert sorted(output.read_text().splitlines(keepends=True)) == sorted(lines)
    assert output.read_text().startswith("".join(lines[:kept])) and len(server.requests) == before + 20 - kept


def test_a_run_may_go_on_here(recipe: DistillConfig, expected: list[dict[str, Any]]) -> None:
    """One file format: what a server began, the target in this process finishes."""
    output = distill(replace(recipe, limit=7))
    assert len(rows_of(output)) == 7
    assert rows_of(distill(replace(recipe, api_base=None))) == expected


def command(recipe: DistillConfig, *more: str) -> list[str]:
    options = {"--prompts": recipe.prompts[0], "--output": recipe.output, "--target": str(recipe.target)}
    options |= {"--max-new-tokens": str(TOKENS), "--api-base": str(recipe.api_base)}
    return ["distill", *(word for pair in options.items() for word in pair), *more]


def test_the_command(recipe: DistillConfig, server: FakeServer, expected: list[dict[str, Any]]) -> None:
    result = CliRunner().invoke(app, command(recipe, "--api-chat", "--api-model", "tiny", "--concurrency", "3"))
    assert result.exit_code == 0, result.stderr
    assert f"Answers: {recipe.output}" in result.stdout.replace("\n", "") and rows_of(recipe.output) == expected
    assert server.most_busy <= 3
    result = CliRunner().invoke(app, command(recipe, "--api-model", "huge"))
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1


def test_ctrl_c_keeps_what_is_finished(
    recipe: DistillConfig, server: FakeServer, expected: list[dict[str, Any]]
) -> None:
    """Also when replies are under way that would take a minute."""
    server.plan = lambda number, body: time.sleep(60) if number >= 8 else None
    process = subprocess.Popen(
        [sys.executable, "-m", "ctc_drafter", *command(recipe, "--concurrency", "4")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not ignored, however the tests were started
    )
    output, deadline = Path(recipe.output), time.monotonic() + 120
    while not (output.exists() and output.read_text().count("\n") == 8):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert len(rows_of(output)) == 8
    server.plan = lambda number, body: None
    assert rows_of(distill(recipe)) == expected


def test_notes_name_only_what_happened() -> None:
    assert remote.Tally(written=5).sentences() == []
    assert len(remote.Tally(5, 1, 1, 1, "why", {"top_k"}).sentences()) == 4
