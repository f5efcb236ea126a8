"""The official client against a real server."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from openai import OpenAI
from typer.testing import CliRunner

from ctc_drafter.acceptance import Sampling
from ctc_drafter.cli import app
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import Drafter, LookupDrafter, NoDrafter
from ctc_drafter.target import Target
from live import NAME, QUESTIONS, Live, ask, chat_ids, live, text_of, tokens_of

HTTP = httpx2.Client(timeout=60)

PLAIN = {"ctc_drafter": {"drafter": "none"}}
LOOKUP = {"ctc_drafter": {"drafter": "lookup"}}
EXTRAS = pytest.mark.parametrize("extra", [{}, LOOKUP, PLAIN], ids=["ctc", "lookup", "plain"])
IDS = {"return_token_ids": True}


def streamed(client: OpenAI, **request: Any) -> list[str]:
    """The text of every choice, joined from its chunks."""
    texts: dict[int, str] = {}
    finished: dict[int, str] = {}
    for chunk in client.chat.completions.create(stream=True, **request):
        for choice in chunk.choices:
            assert choice.index not in finished, "a chunk after the last"
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                finished[choice.index] = choice.finish_reason
    assert texts.keys() == finished.keys()
    return [texts[i] for i in sorted(texts)]


@EXTRAS
def test_streamed_equals_whole_equals_generate(client: OpenAI, target: Target, extra: dict[str, Any]) -> None:
    tokens = tokens_of(target, NoDrafter(), chat_ids(target, QUESTIONS[0]), max_new_tokens=40)
    whole = client.chat.completions.create(**ask(QUESTIONS[0], extra_body={**extra, **IDS}))
    choice = whole.choices[0]
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == tokens
    assert choice.model_extra["prompt_token_ids"] == chat_ids(target, QUESTIONS[0])
    assert choice.message.content == text_of(target, tokens)
    assert choice.finish_reason == "length"
    assert streamed(client, **ask(QUESTIONS[0], extra_body=extra)) == [choice.message.content]


def test_chunks_carry_each_token_once(client: OpenAI, target: Target) -> None:
    tokens = tokens_of(target, NoDrafter(), chat_ids(target, QUESTIONS[1]), max_new_tokens=40)
    seen: list[int] = []
    for chunk in client.chat.completions.create(stream=True, **ask(QUESTIONS[1], extra_body=IDS)):
        seen += (chunk.choices[0].model_extra or {}).get("token_ids", [])
    assert seen == tokens


def test_eight_streams_at_once_equal_their_one_by_one_answers(client: OpenAI) -> None:
    requests = [ask(q, extra_body=(LOOKUP, {}, PLAIN)[i % 3]) for i, q in enumerate(QUESTIONS)]
    alone = [streamed(client, **r) for r in requests]
    assert len({texts[0] for texts in alone}) > 4
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            assert list(pool.map(lambda r: streamed(client, **r), requests)) == alone


def test_usage_tells_what_drafting_did(client: OpenAI, target: Target) -> None:
    ids = chat_ids(target, QUESTIONS[2])
    steps = list(generate(target, LookupDrafter(), ids, max_new_tokens=100, budget=6))
    usage = client.chat.completions.create(**ask(QUESTIONS[2], max_tokens=100, extra_body=LOOKUP)).usage
    assert usage is not None and usage.model_extra is not None
    written = sum(len(step.tokens) for step in steps)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(ids), written, len(ids) + written)
    accepted = sum(step.accepted for step in steps)
    assert accepted
    assert usage.model_extra["draft"] == {
        "drafter": "lookup",
        "steps": len(steps) - 1,
        "accepted": accepted,
        "tau": round((written - 1) / (len(steps) - 1), 4),
    }


def test_a_stream_ends_with_its_usage_if_asked(client: OpenAI) -> None:
    whole = client.chat.completions.create(**ask(QUESTIONS[3]))
    chunks = list(
        client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask(QUESTIONS[3]))
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"


@pytest.mark.parametrize("name", ["tiny-ctc", "lookup"])
def test_steps_are_told_on_request(client: OpenAI, name: str) -> None:
    extra = {"ctc_drafter": {"tree": True, "drafter": name}}
    text, drafted, accepted = "", 0, 0
    for chunk in client.chat.completions.create(stream=True, **ask(QUESTIONS[0], max_tokens=100, extra_body=extra)):
        content = chunk.choices[0].delta.content or ""
        told = (chunk.model_extra or {}).get("ctc_drafter")
        if told is None:
            assert content == ""  # the opening
            continue
        assert "".join(piece for piece, _ in told["pieces"]) == content
        assert all(a[1] != b[1] for a, b in pairwise(told["pieces"]))
        assert told["seconds"] > 0
        if not told["prefill"]:
            assert len(told["tree"]) <= told["drafted"] == 6
            assert sum(node["accepted"] for node in told["tree"]) == told["accepted"]
            assert all(node["parent"] < i for i, node in enumerate(told["tree"]))
            drafted, accepted = drafted + 1, accepted + told["accepted"]
        text += content
    assert drafted
    assert accepted or name != "lookup"
    assert text == client.chat.completions.create(**ask(QUESTIONS[0], max_tokens=100)).choices[0].message.content


# ---------------------------------------------------------------- sampling, n, stop


def test_seeded_samples_are_those_of_generate_and_repeat(client: OpenAI, target: Target, drafter: Drafter) -> None:
    request = ask(QUESTIONS[4], temperature=0.9, top_p=0.95, seed=11, extra_body={"top_k": 50})
    sampling = Sampling(temperature=0.9, top_p=0.95, top_k=50, seed=11)
    tokens = tokens_of(target, drafter, chat_ids(target, QUESTIONS[4]), max_new_tokens=40, sampling=sampling)
    texts = [client.chat.completions.create(**request).choices[0].message.content for _ in range(2)]
    assert texts == [text_of(target, tokens)] * 2
    assert streamed(client, **request) == texts[:1]


def test_n_choices_differ_and_repeat(client: OpenAI) -> None:
    request = ask(QUESTIONS[5], temperature=1, seed=5, n=3)
    reply = client.chat.completions.create(**request)
    texts = [choice.message.content for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert streamed(client, **request) == texts
    third = client.chat.completions.create(**{**request, "n": 1, "seed": 7})
    assert third.choices[0].message.content == texts[2]
    assert reply.usage is not None and reply.usage.completion_tokens > 3 * 20


def test_without_a_seed_samples_vary(client: OpenAI) -> None:
    request = ask(QUESTIONS[5], temperature=1, n=4)
    assert len({c.message.content for c in client.chat.completions.create(**request).choices}) > 1


@EXTRAS
def test_the_text_ends_before_a_stop_string(client: OpenAI, extra: dict[str, Any]) -> None:
    full = client.chat.completions.create(**ask(QUESTIONS[6])).choices[0].message.content
    assert full is not None
    for begin in range(3, len(full) - 6, 9):
        stop = full[begin : begin + 3]
        want = full[: full.index(stop)]
        for given in (stop, ["never said", stop]):
            request = ask(QUESTIONS[6], stop=given, extra_body=extra)
            choice = client.chat.completions.create(**request).choices[0]
            assert (choice.message.content, choice.finish_reason) == (want, "stop")
            assert streamed(client, **request) == [want]


def test_an_answer_ends_at_the_contexts_edge_and_at_the_servers_limit(client: OpenAI, target: Target) -> None:
    reply = client.chat.completions.create(**ask(QUESTIONS[0], max_tokens=10_000))
    assert reply.usage is not None
    assert (reply.usage.total_tokens, reply.choices[0].finish_reason) == (target.max_context, "length")
    assert client.chat.completions.create(**ask(QUESTIONS[0], max_completion_tokens=3)).usage.completion_tokens == 3  # type: ignore[union-attr]


# ---------------------------------------------------------------- other routes


def test_completions_take_texts_and_token_ids(client: OpenAI, target: Target) -> None:
    text = "The quick brown"
    ids = target.tokenizer(text)["input_ids"]
    want = text_of(target, tokens_of(target, NoDrafter(), ids, max_new_tokens=20))
    options: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 20}
    assert client.completions.create(prompt=text, **options).choices[0].text == want
    assert client.completions.create(prompt=ids, **options).choices[0].text == want
    chunks = client.completions.create(prompt=text, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == want
    many = client.completions.create(prompt=[text, "def add(a"], n=2, **options)
    assert [choice.text == want for choice in many.choices] == [True, True, False, False]
    assert many.usage is not None and many.usage.prompt_tokens == len(ids) + len(
        target.tokenizer("def add(a").input_ids
    )
    default = client.completions.create(prompt=text, model=NAME, temperature=0)
    assert default.usage is not None and default.usage.completion_tokens == 16


def test_parts_and_the_developers_role_are_read_as_text(client: OpenAI) -> None:
    def answer(*messages: Any) -> str | None:
        options = {k: v for k, v in ask("").items() if k != "messages"}
        return client.chat.completions.create(messages=list(messages), **options).choices[0].message.content

    parts = [{"type": "text", "text": "How many "}, {"type": "text", "text": "apples?"}]
    whole = answer({"role": "system", "content": "Count."}, {"role": "user", "content": "How many apples?"})
    assert answer({"role": "developer", "content": "Count."}, {"role": "user", "content": parts}) == whole


def test_an_answer_can_be_sent_back_as_the_client_dumps_it(client: OpenAI) -> None:
    request = ask(QUESTIONS[0])
    message = client.chat.completions.create(**request).choices[0].message
    request["messages"] = [*request["messages"], message, {"role": "user", "content": "And then?"}]
    assert client.chat.completions.create(**request).choices[0].message.content


def test_models_are_listed(client: OpenAI, target: Target) -> None:
    [model] = client.models.list().data
    assert (model.id, (model.model_extra or {})["max_model_len"]) == (NAME, target.max_context)
    assert client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_what_is_not_supported_is_refused_in_words(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"logit_bias.*takes no bias") as error:
        client.chat.completions.create(**ask("Hi", logit_bias={"5": 1}))
    assert (error.value.param, error.value.code) == ("logit_bias", "unsupported_parameter")
    harmless: dict[str, Any] = {"user": "me", "metadata": {"a": "b"}, "frequency_penalty": 0, "logprobs": False}
    assert client.chat.completions.create(**ask("Hi", tools=[], **harmless)).choices


def test_a_key_is_asked_for(target: Target) -> None:
    with live(target, {"none": NoDrafter()}, key="open-sésame") as guarded:
        for wrong in ("open-sesame", "open-s", "x" * 5000):
            with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
                guarded.client(wrong).chat.completions.create(**ask("Hi"))
        for path, status in (("/v1/models", 401), ("/metrics", 401), ("/health", 200), ("/", 200)):
            assert HTTP.get(guarded.base + path).status_code == status
        for scheme, status in (("Bearer", 200), ("bearer", 200), ("Basic", 401), ("Bearer x", 401)):
            header = f"{scheme} open-sésame".encode()
            assert HTTP.get(f"{guarded.base}/v1/models", headers={"Authorization": header}).status_code == status


def test_metrics_count_what_happened(server: Live, client: OpenAI) -> None:
    def read() -> dict[str, float]:
        lines = HTTP.get(f"{server.base}/metrics").text.splitlines()
        return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}

    before = read()
    usage = client.chat.completions.create(**ask(QUESTIONS[0])).usage
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**ask("Hi", model="other"))
    assert HTTP.get(f"{server.base}/made-up").status_code == 404
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert usage is not None and usage.model_extra is not None
    kind, draft = '{drafter="tiny-ctc"}', usage.model_extra["draft"]
    assert grown(f"ctc_drafter_completion_tokens_total{kind}") == usage.completion_tokens
    assert grown(f"ctc_drafter_prompt_tokens_total{kind}") == usage.prompt_tokens
    assert grown(f"ctc_drafter_steps_total{kind}") == draft["steps"]
    assert grown(f"ctc_drafter_accepted_tokens_total{kind}") == draft["accepted"]
    assert grown(f"ctc_drafter_accepted_length_count{kind}") == draft["steps"]
    assert grown(f"ctc_drafter_accepted_length_sum{kind}") == draft["accepted"]
    steps, emitted = (after[f"ctc_drafter_accepted_length_{name}{kind}"] for name in ("count", "sum"))
    assert after[f"ctc_drafter_tau{kind}"] == pytest.approx(1 + emitted / steps, rel=0.05)  # ends are cut
    for name in ("time_to_first_token", "time_per_token", "request"):
        assert grown(f"ctc_drafter_{name}_seconds_count{kind}") == 1
        assert grown(f"ctc_drafter_{name}_seconds_sum{kind}") > 0
    assert grown('ctc_drafter_requests_total{path="/v1/chat/completions",status="404"}') == 1
    assert grown('ctc_drafter_requests_total{path="other",status="404"}') == 1
    assert (after["ctc_drafter_running"], after["ctc_drafter_waiting"], after["ctc_drafter_slots"]) == (0, 0, 8)


@pytest.mark.parametrize("form", ["--api-tokens", "--api-chat"])
def test_distill_takes_its_answers_from_the_server(
    server: Live, target: Target, target_folder: Path, tmp_path: Path, form: str
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [question]}) + "\n" for question in QUESTIONS[:3]))
    arguments = ["distill", "--target", target_folder, "--prompts", prompts, "--output", output, form]
    arguments += ["--api-base", f"{server.base}/v1", "--max-new-tokens", 20]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.stderr
    assert "does not know" not in result.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    said = {tuple(row["prompt_ids"]): row["answer_ids"] for row in rows}
    for question in QUESTIONS[:3]:
        ids = chat_ids(target, question)
        assert said[tuple(ids)] == tokens_of(target, NoDrafter(), ids, max_new_tokens=20)


def test_the_schema_names_the_model_and_has_no_loose_ends(server: Live) -> None:
    text = HTTP.get(f"{server.base}/openapi.json").text
    document = json.loads(text)
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"} <= document["paths"].keys()
    schemas = document["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == [NAME]
    assert set(re.findall(r'"#/components/schemas/(\w+)"', text)) <= schemas.keys()


# ---------------------------------------------------------------- log probabilities


def own_bytes(entry: Any) -> bytes:
    assert entry.bytes is not None
    assert entry.token.startswith("bytes:") or entry.token.encode() == bytes(entry.bytes)
    return bytes(entry.bytes)


@EXTRAS
def test_log_probabilities_are_the_targets_own(client: OpenAI, target: Target, extra: dict[str, Any]) -> None:
    """Against one pass of the target over prompt and answer."""
    ids, count = chat_ids(target, QUESTIONS[4]), 12
    tokens = tokens_of(target, NoDrafter(), ids, max_new_tokens=count)
    with torch.inference_mode():
        scores = target.model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
    asked = ask(QUESTIONS[4], max_tokens=count, logprobs=True, top_logprobs=3, extra_body=extra)
    told = client.chat.completions.create(**asked).choices[0].logprobs
    assert told is not None and told.content is not None
    assert b"".join(map(own_bytes, told.content)).decode(errors="replace") == text_of(target, tokens)
    for each, token, row in zip(told.content, tokens, scores, strict=True):
        assert each.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(3)
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        name = target.tokenizer.decode([int(best.indices[0])])
        assert each.top_logprobs[0].token == name or ("\ufffd" in name and each.top_logprobs[0].token[:6] == "bytes:")
    chunks = list(client.chat.completions.create(stream=True, **asked))
    parts = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    streamed_tokens = [each.token for part in parts for each in part or []]
    assert streamed_tokens == [each.token for each in told.content]


def test_log_probabilities_of_text_completions(client: OpenAI, target: Target) -> None:
    reply = client.completions.create(model=NAME, prompt="How many", max_tokens=9, temperature=0, logprobs=2)
    told = reply.choices[0].logprobs
    assert told is not None and told.tokens and told.text_offset and told.token_logprobs and told.top_logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == 9
    assert all(value <= 0 for value in told.token_logprobs)
    assert all(max(top.values()) == pytest.approx(value) for top, value in zip(told.top_logprobs, told.token_logprobs))
    assert told.text_offset[0] == 0 and told.text_offset == sorted(told.text_offset)
    assert client.completions.create(model=NAME, prompt="Hi", max_tokens=2).choices[0].logprobs is None


def test_the_chosen_token_is_among_those_named(client: OpenAI) -> None:
    for count in (0, 2):
        told = (
            client.completions.create(
                model=NAME, prompt="How many", max_tokens=20, temperature=2, seed=1, logprobs=count
            )
            .choices[0]
            .logprobs
        )
        assert told is not None and told.tokens and told.top_logprobs and told.token_logprobs
        for token, value, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
            assert top[token] == value and count <= len(top) <= count + 1


def test_streamed_probabilities_are_the_whole_ones(client: OpenAI) -> None:
    """Also where a stop string cuts tokens off: the tokens that are told are those of the text."""
    request: dict[str, Any] = {"model": NAME, "prompt": "How many", "max_tokens": 30, "temperature": 0, "logprobs": 1}
    full = client.completions.create(**request).choices[0].text
    for stop in (None, full[8:11], full[15:20]):
        whole = client.completions.create(**request, stop=stop).choices[0]
        parts = [c.choices[0].logprobs for c in client.completions.create(**request, stop=stop, stream=True)]
        assert whole.logprobs is not None and whole.logprobs.tokens and whole.logprobs.text_offset
        for key in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
            joined = [each for part in parts if part is not None for each in getattr(part, key)]
            assert joined == getattr(whole.logprobs, key), key
        assert all(offset < len(whole.text) for offset in whole.logprobs.text_offset)
        if stop is not None:
            assert not "".join(whole.logprobs.tokens).startswith(whole.text + stop)


def test_what_other_servers_take_is_taken(client: OpenAI) -> None:
    greedy = client.chat.completions.create(**ask(QUESTIONS[1])).choices[0].message.content
    messages: list[Any] = [{"role": "user", "name": "Tom", "content": QUESTIONS[1]}]
    request = ask("") | {"messages": messages, "temperature": 1, "top_p": 0}
    assert client.chat.completions.create(**request).choices[0].message.content == greedy
    messages += [{"role": "assistant", "content": None}, {"role": "user", "content": "And now?"}]
    assert client.chat.completions.create(**request).choices


def test_samples_tell_the_probabilities_before_temperature(client: OpenAI) -> None:
    seen = [
        client.chat.completions.create(**ask(QUESTIONS[0], max_tokens=1, logprobs=True, top_logprobs=5) | more)
        for more in ({"temperature": 0}, {"temperature": 2, "seed": 3}, {"temperature": 0.3, "top_p": 0.5, "seed": 4})
    ]
    tops = [reply.choices[0].logprobs.content[0].top_logprobs for reply in seen]  # type: ignore[union-attr, index]
    for others in tops[1:]:
        assert [top.token for top in others] == [top.token for top in tops[0]]
        assert [top.logprob for top in others] == pytest.approx([top.logprob for top in tops[0]], abs=1e-4)
