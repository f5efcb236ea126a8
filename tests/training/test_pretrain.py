"""Pretraining: a tiny corpus becomes a model folder, also when the run is killed on the way."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ctc_drafter.errors import UserError
from ctc_drafter.target import Target
from ctc_drafter.training import cross_entropy
from ctc_drafter.training import pretrain as module
from ctc_drafter.training.lock import locked
from ctc_drafter.training.pretrain import PretrainConfig, pretrain
from helpers import Killed, refused

WORDS = ["apple", "dog", "fox", "lazy", "quick", "jumps", "over", "morning", "answer", "six", "how", "gives", "half"]


def corpus() -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    for i in range(300):
        words = [rng.choice(WORDS) for _ in range(12)]
        if i % 3:
            yield {"source": "stories", "text": f"{i} " + " ".join(words)}
        else:
            question = {"role": "user", "content": f"{i} " + " ".join(words[:6])}
            yield {"source": "chats", "messages": [question, {"role": "assistant", "content": " ".join(words[6:])}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in corpus()))
    return path


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        data=[str(data)],
        output=str(tmp_path / "model"),
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        layers=2,
        heads=2,
        kv_heads=1,
        context=96,
        block=16,
        batch=4,
        steps=6,
        warmup=2,
        decay=2,
        checkpoint_every=3,
        compile=False,
    )


def test_resuming_changes_nothing(recipe: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pretrain(replace(recipe, output=str(tmp_path / "whole")))
    real = module._batch

    def batch(blocks: torch.Tensor, step: int, config: PretrainConfig) -> torch.Tensor:
        if step == 5:
            raise Killed
        return real(blocks, step, config)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "_batch", batch)
        pretrain(recipe)
    assert not Path(recipe.output).exists()
    resumed = pretrain(recipe)
    mine, want = (load_file(folder / "model.safetensors") for folder in (resumed, whole))
    assert mine.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(mine[name], value), name
    told = [json.loads((folder / "pretrain.json").read_text())["history"] for folder in (resumed, whole)]
    assert told[0] == told[1]


def test_the_result_is_a_target(recipe: PretrainConfig) -> None:
    folder = pretrain(replace(recipe, steps=40, decay=10, lr_matrix=1e-2, lr_other=1e-2, checkpoint_every=20))
    target = Target.load(folder, device="cpu")
    assert target.max_context == 96 and target.vocab_size == 300
    assert target.prompt_ids([{"role": "user", "content": "how many"}])
    card = json.loads((folder / "pretrain.json").read_text())
    assert card["recipe"]["steps"] == 40 and card["tokens"] == 40 * 4 * 16
    assert card["history"][-1]["held_out"] < card["history"][0]["held_out"]


def test_float32_passes_learn_what_bfloat16_passes_learn(recipe: PretrainConfig, tmp_path: Path) -> None:
    run = replace(recipe, steps=20, decay=10, checkpoint_every=20)
    folders = [pretrain(replace(run, dtype=dtype, output=str(tmp_path / dtype))) for dtype in ("bfloat16", "float32")]
    low, full = (json.loads((folder / "pretrain.json").read_text())["held_out_loss"] for folder in folders)
    assert full == pytest.approx(low, rel=0.02)
    stored = load_file(folders[1] / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_compiled_short_blocks_learn_what_others_learn(
    recipe: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, they go through attention of another kind; its results are the same, and it ends with the training."""
    run = replace(recipe, dtype="float32", device="cpu", unlikelihood_steps=2, unlikelihood_tokens=8)
    attention = []

    def traced(made: Any) -> Any:
        attention.extend([made.config._attn_implementation] if hasattr(made, "config") else [])
        return made

    real = module._against_loops

    def against_loops(config: PretrainConfig, model: Any, *others: Any) -> Any:
        attention.append(model.config._attn_implementation)
        return real(config, model, *others)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(module, "_against_loops", against_loops)
    folders = [pretrain(replace(run, compile=c, output=str(tmp_path / str(c)))) for c in (True, False)]
    assert attention == ["eager", "sdpa", "sdpa"]
    mine, want = (json.loads((folder / "pretrain.json").read_text())["history"] for folder in folders)
    for row, other in zip(mine, want, strict=True):
        assert row == pytest.approx(other, abs=2e-3)


def test_training_goes_on_from_a_folder(recipe: PretrainConfig, tmp_path: Path) -> None:
    fast = replace(recipe, lr_matrix=1e-2, lr_other=1e-2)
    first = pretrain(replace(fast, steps=40, decay=10, checkpoint_every=20))
    later = pretrain(replace(fast, output=str(tmp_path / "later"), init=str(first), steps=3, checkpoint_every=3))
    cards = [json.loads((f / "pretrain.json").read_text()) for f in (first, later)]
    assert cards[1]["history"][0]["held_out"] < cards[0]["history"][0]["held_out"]
    assert cards[1]["before"] == cards[0]
    assert (first / "tokenizer.json").read_bytes() == (later / "tokenizer.json").read_bytes()


def test_blocks_hold_each_kept_row_and_its_labels(recipe: PretrainConfig) -> None:
    """Held-out prompts are not in the training blocks; masked prompts carry no label; the mixture drops sources."""
    folder = pretrain(replace(recipe, steps=1, answers_only=["chats"], mixture={"stories": 0.0}))
    work = folder.with_name("model.work")
    blocks = load_file(work / "blocks.safetensors")
    target = Target.load(folder, device="cpu")
    ids, labels = blocks["train"][:, 0], blocks["train"][:, 1]
    assert bool(((labels == ids) | (labels == -100)).all())
    text = target.tokenizer.decode(ids.flatten().tolist())
    trained = target.tokenizer.decode(labels[labels != -100].tolist())
    assert "<|user|>" in text and "<|user|>" not in trained and trained.count("<|end|>") > 80
    held = target.tokenizer.decode(blocks["held"][:, 0].flatten().tolist())
    questions = [part.split("<|end|>")[0] for part in held.split("<|user|>")[1:]]
    assert questions and all(f"<|user|>{q}<|end|>" not in text for q in questions[:-1])


def test_all_answers_to_a_held_out_prompt_are_held_out(recipe: PretrainConfig, tmp_path: Path) -> None:
    rows = []
    for i in range(200):
        for answer in ("red", "green", "blue"):
            chat = [("user", f"Question {i}"), ("assistant", f"{answer} {i}")]
            rows.append({"messages": [{"role": role, "content": text} for role, text in chat]})
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = pretrain(replace(recipe, data=[str(path)], steps=1))
    blocks = load_file(folder.with_name("model.work") / "blocks.safetensors")
    target = Target.load(folder, device="cpu")
    asked = {}
    for name, block in blocks.items():
        text = target.tokenizer.decode(block[:, 0].flatten().tolist())
        asked[name] = set(re.findall(r"<\|user\|>(Question \d+)<", text))
    assert asked["held"] and len(asked["train"]) > 150 and not asked["held"] & asked["train"]


@pytest.mark.parametrize("count", [8, 11])
def test_every_epoch_uses_every_block_once(count: int, recipe: PretrainConfig) -> None:
    blocks = torch.arange(count)[:, None]
    for epoch in range(3):
        used = [b for i in range(count // 4) for b in module._batch(blocks, epoch * (count // 4) + i, recipe).flatten()]
        assert len({int(b) for b in used}) == len(used) == count // 4 * 4


def test_evaluation_prompts_are_dropped(recipe: PretrainConfig, data: Path, tmp_path: Path) -> None:
    row = next(r for r in corpus() if "text" in r)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"turns": [row["text"].upper()]}) + "\n")
    folder = pretrain(replace(recipe, steps=1, exclude=[str(tmp_path / "eval.jsonl")]))
    blocks = load_file(folder.with_name("model.work") / "blocks.safetensors")
    target = Target.load(folder, device="cpu")
    text = target.tokenizer.decode(torch.cat([b[:, 0].flatten() for b in blocks.values()]).tolist())
    assert row["text"] not in text
    others = [r["text"] for r in corpus() if "text" in r and r != row]
    assert sum(t in text for t in others) > 150


def test_short_evaluation_prompts_are_dropped(
    recipe: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fewer words than the overlap takes: dropped where the whole prompt is the same."""
    questions = [r["messages"][0]["content"] for r in corpus() if "messages" in r]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps({"turns": [q.upper()]}) + "\n" for q in questions[5:8]))
    folder = pretrain(replace(recipe, steps=1, exclude=[str(tmp_path / "eval.jsonl")]))
    assert "3 training rows dropped" in capsys.readouterr().out
    blocks = load_file(folder.with_name("model.work") / "blocks.safetensors")
    target = Target.load(folder, device="cpu")
    text = target.tokenizer.decode(torch.cat([b[:, 0].flatten() for b in blocks.values()]).tolist())
    assert not any(q in text for q in questions[5:8]) and sum(q in text for q in questions) > 80


def test_chunked_loss_is_cross_entropy_with_z_loss() -> None:
    """Value and gradients, against autograd on the whole matrix."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(cross_entropy.CHUNK + 40, 8), torch.randn(30, 8)
    labels = torch.randint(0, 30, (cross_entropy.CHUNK + 40,))
    labels[::5] = -100
    results = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            step = partial(cross_entropy.chunk_step, z_loss=0.01)
            loss = cross_entropy._ChunkedCrossEntropy.apply(h, w, labels, step)
        else:
            logits = h @ w.T
            loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        if not chunked:
            z = 0.01 * (h @ w.T).logsumexp(-1)[labels != -100].square().mean()
            z.backward()
        results.append((loss.detach(), h.grad, w.grad))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"unlikelihood_batch": 0}, "unlikelihood_batch must be finite and at least 1"),
        ({"unlikelihood_tokens": 0, "kv_heads": 0}, "kv_heads and unlikelihood_tokens must be finite and at least 1"),
        ({"unlikelihood_steps": -1}, "unlikelihood_steps must be finite and at least 0"),
        ({"unlikelihood_lr": math.nan, "lr_other": math.inf}, "lr_other and unlikelihood_lr must be finite"),
        ({"heads": 3}, "hidden_size must be a multiple of heads"),
        ({"mixture": {"chats": -0.5}}, "rates of mixture must be finite and not negative"),
        ({"mixture": {"chats": math.nan}}, "rates of mixture must be finite and not negative"),
        ({"seed": 2**64}, "seed must be"),
    ],
)
def test_impossible_recipes(change: dict[str, Any], match: str, recipe: PretrainConfig) -> None:
    with pytest.raises(ValueError, match=match):
        replace(recipe, **change)


@pytest.mark.parametrize("seed", [1_700_000_000_123_456_789, 2**64 - 1, -(2**63)])
def test_every_seed_that_torch_takes_is_one(seed: int, recipe: PretrainConfig) -> None:
    assert pretrain(replace(recipe, seed=seed, steps=2)).is_dir()


def test_corpus_that_is_too_small(recipe: PretrainConfig) -> None:
    assert "takes at least 1000 and 1" in refused(pretrain, replace(recipe, batch=1000))


def test_damaged_blocks(recipe: PretrainConfig, tmp_path: Path) -> None:
    first = pretrain(recipe)
    path = tmp_path / "model.work" / "blocks.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[: len(whole) // 2], whole[:-1], whole.replace(b'"held"', b'"hold"')):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"blocks.safetensors' is damaged .*; remove it") as error:
            pretrain(recipe)
        assert "\n" not in str(error.value)
    path.unlink()
    pretrain(recipe)
    assert path.read_bytes() == whole and (first / "model.safetensors").is_file()


def test_a_damaged_card_of_the_first_target_is_found_before_training(
    recipe: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pretrain(recipe)
    (first / "pretrain.json").write_text('{"recipe": ')
    monkeypatch.setattr(module, "_optimize", None)
    with pytest.raises(UserError, match=r"pretrain.json' is not valid JSON"):
        pretrain(replace(recipe, output=str(tmp_path / "later"), init=str(first)))


@pytest.fixture(scope="module")
def first(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target to go on from."""
    return Path(shutil.copytree(target_folder, tmp_path_factory.mktemp("first") / "target"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"version": "1.0", '),
        ("tokenizer_config.json", None),  # it names the tokens that begin and end a text
        ("tokenizer_config.json", "{"),
        ("config.json", None),
        ("config.json", '{"model_type": "gpt2"}'),
        ("model.safetensors", None),
        ("model.safetensors", "cut"),
    ],
)
def test_a_first_target_that_is_not_whole(
    name: str, content: str | None, recipe: PretrainConfig, first: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(first, tmp_path / "damaged"))
    (damaged / name).unlink()
    if content is not None:
        (damaged / name).write_text(content)
    assert str(damaged) in refused(pretrain, replace(recipe, init=str(damaged)))
    assert not Path(recipe.output).exists()


def test_a_damaged_tokenizer_of_an_earlier_run(recipe: PretrainConfig) -> None:
    pretrain(replace(recipe, steps=1))
    path = Path(recipe.output + ".work", "tokenizer", "tokenizer.json")
    path.write_bytes(path.read_bytes()[:99])
    assert "remove that folder, and a rerun makes it anew" in refused(pretrain, recipe)


def test_fewer_steps_than_were_done(recipe: PretrainConfig) -> None:
    pretrain(recipe)
    assert "is of step 6; set steps to at least that" in refused(pretrain, replace(recipe, steps=3, decay=1))


def test_a_second_run_into_one_folder(recipe: PretrainConfig) -> None:
    with locked(Path(recipe.output + ".lock")):
        assert "Another run" in refused(pretrain, recipe)
    pretrain(recipe)


def test_unlikelihood_needs_questions(recipe: PretrainConfig) -> None:
    recipe = replace(recipe, mixture={"chats": 0.0}, unlikelihood_steps=2)
    assert "no `messages` with a question of at most" in refused(pretrain, recipe)
    assert not Path(recipe.output + ".work", "state").exists()


def test_foreign_rows(recipe: PretrainConfig, tmp_path: Path) -> None:
    (tmp_path / "foreign.jsonl").write_text('{"text": "fine"}\n{"content": "what?"}\n')
    assert "line 2: expected `messages` or `text`" in refused(
        pretrain, replace(recipe, data=[str(tmp_path / "foreign.jsonl")])
    )


def test_rows_need_no_source(recipe: PretrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "source"}) + "\n" for row in corpus()))
    pretrain(replace(recipe, data=[str(path)], steps=1))


def test_unlikelihood_after_training(recipe: PretrainConfig) -> None:
    """A nearly untrained model runs in circles; a few steps against that are taken and reported."""
    folder = pretrain(replace(recipe, steps=2, unlikelihood_steps=10, unlikelihood_batch=2, unlikelihood_tokens=40))
    card = json.loads((folder / "pretrain.json").read_text())
    assert len(card["unlikelihood"]) == 1 and 0 <= card["unlikelihood"][0]["looped"] <= 1
    Target.load(folder, device="cpu")
