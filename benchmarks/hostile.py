"""Requests that no server may answer with anything but a 4xx, made up at random: bodies, fields, headers, bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = ("Content-Type", "application/json")


@dataclass(frozen=True)
class Case:
    """The bytes of a request; `cut`: the client hangs up after them, so that no answer is due."""

    kind: str
    data: bytes
    cut: bool = False


def request(
    path: str,
    body: bytes,
    headers: tuple[tuple[str, str], ...] = (JSON,),
    method: str = "POST",
    host: str = "localhost",
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def head_of(path: str) -> str:
    """The first lines of a POST; the length and the empty line are missing."""
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def good(path: str, model: str) -> dict[str, Any]:
    """A body that would be answered."""
    prompt = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    return {"model": model, "max_tokens": 2, "temperature": 0, **prompt}


# ---------------------------------------------------------------- values

WRONG: dict[str, list[Any]] = {
    "model": [None, 5, "", "gpt-4o", "../../etc/passwd", "é" * 9000, ["embedded"], {}, True, "embedded\x00"],
    "messages": [None, [], "Hi", {}, [None], ["Hi"], [[]], [{}], [{"role": "user"}], [{"content": "x"}], 0, False],
    "prompt": [
        None,
        "",
        [],
        5,
        {},
        [""],
        [[]],
        [5.5],
        [-1],
        [10**9],
        [-(2**63)],
        [True],
        ["x", 5],
        [["x"]],
        [[10**30]],
    ],
    "n": [0, -1, 1.5, "2", True, [1], 129, 10**30, -(10**400), 100, {}],
    "stream": [1, "yes", [], {}, 0.0, "true"],
    "stop": [5, "", [""], [5], ["x"] * 17, "x" * 257, {}, [None], [["x"]], ["ok", ""], True, [{"a": 1}]],
    "seed": [1.5, "1", 2**63, -(2**63) - 1, -(10**400), True, [1], {}, 1e300],
    "temperature": [-0.1, 2.1, "1", True, [], 1e300, -1e-300, {}, "NaN"],
    "top_p": [-1, 1.01, "1", [], 1e300, True],
    "max_tokens": [0, -1, 1.5, "5", True, -(10**30), [], {}, "many"],
    "top_k": [-2, 1.5, "x", [], -(10**30)],
    "min_p": [-1, 2, "x", 1e300, []],
    "repetition_penalty": [0, -1, 1e300, "x", 1e-300, []],
    "stream_options": [5, {"include_usage": True}, {"include_usage": "yes"}, [], "x"],
    "logit_bias": [{"5": 100}, {"-1": 1}, {"x": "y"}, [5], 5, {"5": 10**400}, "x"],
    "tools": [[{"type": "function"}], 5, "x", {"a": 1}],
    "tool_choice": ["required", 5, {"type": "function"}],
    "response_format": [{"type": "json_object"}, 5, "json", {"type": "json_schema", "json_schema": {}}],
    "frequency_penalty": [0.5, "x", 1e300, []],
    "presence_penalty": [-2, "x", True],
    "stop_token_ids": [[5], "x", [1.5], [-1], [10**30], {}],
    "ctc_drafter": [5, {"drafter": "other"}, {"drafter": 5}, {"steps": 1}, {"made_up": True}, [], "ctc", {"tree": "x"}],
    "user_": ["x"],
    "suffix": ["x", 5],
    "best_of": [2, "x", 0],
    "echo": [True, "x"],
}
"""For every field values with which it must be refused."""


def _text(rng: random.Random, size: int) -> str:
    ranges = ((32, 126), (0, 31), (0x80, 0x7FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0x202A, 0x202E))
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(size))


def _content(rng: random.Random) -> Any:
    """What is no content of a message."""
    return rng.choice(
        [
            None,
            5,
            [],
            {},
            ["x"],
            [{"type": "text"}],
            [{"type": "text", "text": 5}],
            [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}],
            [{"type": _text(rng, 50), "text": "x"}],
            "apple " * 3000,
        ]
    )


# ---------------------------------------------------------------- kinds of cases


def wrong_field(rng: random.Random, path: str, model: str) -> Case:
    body = good(path, model)
    other = "messages" if path == TEXT else "prompt"
    for name in rng.sample([n for n in WRONG if n != other], rng.choice([1, 1, 1, 2, 3])):
        body[name] = rng.choice(WRONG[name])
    return Case("wrong field", request(path, json.dumps(body).encode()))


def missing_field(rng: random.Random, path: str, model: str) -> Case:
    body = good(path, model)
    del body[rng.choice(["model", "messages" if path == CHAT else "prompt"])]
    return Case("missing field", request(path, json.dumps(body).encode()))


def unknown_field(rng: random.Random, path: str, model: str) -> Case:
    body = good(path, model) | {"?" + _text(rng, rng.choice([1, 9, 5000])): rng.choice([1, "x", [], {"a": 1}, True])}
    return Case("unknown field", request(path, json.dumps(body).encode()))


def wrong_message(rng: random.Random, path: str, model: str) -> Case:
    message: dict[str, Any] = {"role": "user", "content": "Hi"}
    change = rng.choice(["role", "content", "more"])
    if change == "role":
        message["role"] = rng.choice([None, 1, "", "tool", "function", "root", "USER", _text(rng, 20), ["user"]])
    elif change == "content":
        message["content"] = _content(rng)
    else:
        message["?" + _text(rng, 5)] = "x"
    messages = [{"role": "user", "content": "Hi"}] * rng.randint(0, 3) + [message]
    return Case("wrong message", request(CHAT, json.dumps(good(CHAT, model) | {"messages": messages}).encode()))


def broken_json(rng: random.Random, path: str, model: str) -> Case:
    text = json.dumps(good(path, model)).encode()
    while True:
        place = rng.randrange(len(text))
        junk = bytes(rng.randrange(256) for _ in range(rng.randint(1, 4)))
        changed = rng.choice(
            [
                text[:place],
                text[:place] + text[place + 1 :],
                text + junk,
                text[:place] + junk + text[place:],
                junk + text,
            ]
        )
        try:
            json.loads(changed.decode("utf-8"))
        except ValueError:
            return Case("broken JSON", request(path, changed))


def strange_number(rng: random.Random, path: str, model: str) -> Case:
    names = ["temperature", "top_p", "max_tokens", "n", "seed", "min_p", "top_k"]
    number = rng.choice(
        [
            "NaN",
            "Infinity",
            "-Infinity",
            "1e999",
            "-1e999",
            "-" + "9" * rng.randint(400, 6000),
            "0x10",
            "1_000",
            "01",
            "+1",
            ".5",
        ]
    )
    text = json.dumps(good(path, model))[:-1] + f', "{rng.choice(names)}": {number}}}'
    return Case("strange number", request(path, text.encode()))


def deep(rng: random.Random, path: str, model: str) -> Case:
    depth = rng.choice([500, 2000, 20_000, 150_000])
    nest = rng.choice(["[" * depth + "]" * depth, "[" * depth, '{"a":' * depth, '{"a":' * depth + "1" + "}" * depth])
    inside = json.dumps(good(path, model))[:-1] + f', "{rng.choice(list(WRONG))}": {nest}}}'
    return Case("deep nesting", request(path, rng.choice([nest, inside]).encode()))


def half_character(rng: random.Random, path: str, model: str) -> Case:
    half = f"\\u{rng.randint(0xD800, 0xDFFF):04x}"
    body = good(path, model) | {"user": "HERE"}
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": rng.choice(["HERE", "HERE x", "x HERE"])}]
    else:
        body["prompt"] = "HERE"
    text = json.dumps(body | {"stop": rng.choice(["HERE", "x"])}).replace("HERE", half)
    bad = rng.choice([text.encode(), text.replace(half, "\x7f").encode().replace(b"\x7f", b"\xed\xa0\x80")])
    return Case("half character", request(path, bad))


def wrong_type(rng: random.Random, path: str, model: str) -> Case:
    kinds = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "x", "", "text/json"]
    body = json.dumps(good(path, model)).encode()
    headers = () if rng.random() < 0.1 else (("Content-Type", rng.choice([*kinds, "application/" + "x" * 900])),)
    return Case("wrong content type", request(path, body, headers))


def wrong_route(rng: random.Random, path: str, model: str) -> Case:
    places = [
        "/v1",
        "/v1/",
        path + "/",
        "/v1/embeddings",
        "/v1/models/x",
        "/..%2f..%2fetc/passwd",
        "//",
        "/docs",
        "/%00",
    ]
    places += [
        "/v1/models/" + "x" * 3000,
        "/page.js/",
        "/%ff%fe",
        "/health/../v1",
        "/v1/chat",
        "/?/../x/y"[:1] + "x" * 50,
    ]
    if rng.random() < 0.5:
        return Case("wrong route", request(rng.choice(places), b"", (), rng.choice(["GET", "POST", "PUT"])))
    method = rng.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "X" * 60])
    return Case("wrong method", request(path, b"", (JSON,), method))


def oversized(rng: random.Random, path: str, model: str) -> Case:
    if rng.random() < 0.9:
        size = rng.choice([2**20 + 1, 10**9, 10**15, 10**18])
        return Case("oversized", (head_of(path) + f"Content-Length: {size}\r\n\r\n").encode())
    body = json.dumps(good(path, model) | {"user": "x" * 2**20}).encode()
    return Case("oversized", request(path, body))


def cut_body(rng: random.Random, path: str, model: str) -> Case:
    whole = request(path, json.dumps(good(path, model) | {"stream": rng.random() < 0.5}).encode())
    return Case("cut", whole[: rng.randrange(1, len(whole))], cut=True)


def heavy(rng: random.Random, path: str, model: str) -> Case:
    """Text that would take seconds to tokenize."""
    body = good(path, model)
    if path == TEXT and rng.random() < 0.5:
        return Case("many prompts", request(path, json.dumps(body | {"prompt": ["a"] * 150_000}).encode()))
    text = rng.choice(["a", "x ", "é"]) * 150_000
    body |= {"prompt": text} if path == TEXT else {"messages": [{"role": "user", "content": text}]}
    return Case("long text", request(path, json.dumps(body, ensure_ascii=False).encode()))


def slow_head(rng: random.Random, path: str, model: str) -> Case:
    head = head_of(path).encode()
    return Case("slow head", head[: rng.randrange(len(head))])  # the rest never comes


def bad_head(rng: random.Random, path: str, model: str) -> Case:
    body = json.dumps(good(path, model)).encode()
    start, size = head_of(path), f"Content-Length: {len(body)}"
    heads = [
        f"{start}Content-Length: -1",
        f"{start}Content-Length: abc",
        f"{start}Content-Length: {len(body)}\r\nContent-Length: {len(body) + 1}",
        f"{start}Content-Length: {len(body)}, {len(body) + 1}",
        f"{start}Transfer-Encoding: gzip",
        f"{start}Transfer-Encoding: chunked, chunked",
        f"{start}{size}\r\nX\x00: y",
        f"{start}{size}\r\nX y: z",
        f"{start}{size}\r\n: nothing",
        f"{start}{size}\r\nX: " + "y" * 100_000,
        f"{start}{size}\r\n" + "\r\n".join(f"X{i}: {'y' * 200}" for i in range(500)),
        f"POST {path} HTTP/9.9\r\nHost: localhost\r\n{size}",
        f"POST {path}\r\nHost: localhost\r\n{size}",
        f"POST  {path} HTTP/1.1\r\nHost: localhost\r\n{size}",
        f"POST {path} {path} HTTP/1.1\r\nHost: localhost\r\n{size}",
        f"\x16\x03\x01\x02 {path} HTTP/1.1\r\nHost: localhost",
        f"PO ST {path} HTTP/1.1\r\nHost: localhost",
        f"POST {path} HTTP/1.1\r\nContent-Type: application/json\r\n{size}",
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nHost: elsewhere\r\n{size}",
        f"POST /\xe9\xff HTTP/1.1\r\nHost: localhost\r\n{size}",
        _text(rng, 40).replace("\n", "x").encode("latin-1", "replace").decode("latin-1"),
    ]
    return Case("bad head", rng.choice(heads).encode("latin-1", "replace") + b"\r\n\r\n" + body)


def foreign_host(rng: random.Random, path: str, model: str) -> Case:
    host = rng.choice(
        ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "[::1", "x" * 300, "", "LOCALHOST:x@y"[9:]]
    )
    return Case("foreign host", request(path, json.dumps(good(path, model)).encode(), host=host))


def bad_chunks(rng: random.Random, path: str, model: str) -> Case:
    head = head_of(path) + "Transfer-Encoding: chunked\r\n\r\n"
    if rng.random() < 0.1:
        return Case("slow body", head.encode() + b"5;" + b"x" * 50_000 + b"\r\nhello\r\n")  # the rest never comes
    body = rng.choice(
        [
            b"zz\r\nxx\r\n",
            b"-5\r\nhello\r\n",
            b"3\r\nabcdef\r\n0\r\n\r\n",
            b"\x00\xff",
        ]
    )
    return Case("bad chunks", head.encode() + body)


KINDS: dict[Callable[[random.Random, str, str], Case], float] = {
    wrong_field: 30,
    wrong_message: 10,
    broken_json: 14,
    strange_number: 8,
    unknown_field: 5,
    missing_field: 2,
    half_character: 6,
    wrong_type: 5,
    wrong_route: 6,
    deep: 3,
    oversized: 3,
    cut_body: 6,
    bad_head: 8,
    foreign_host: 3,
    bad_chunks: 0.6,
    heavy: 2,
    slow_head: 0.1,
}
"""The kinds and how often each comes."""


def cases(count: int, seed: int, model: str) -> list[Case]:
    rng = random.Random(seed)
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=count)
    return [kind(rng, rng.choice([CHAT, TEXT]), model) for kind in kinds]
