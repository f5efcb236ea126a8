"""`model.generate(custom_generate=...)`: the ids that `generate` gives by itself, and a model left as it was."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
)

from conftest import build_drafter
from ctc_drafter import UserError
from ctc_drafter.integrations.generation_config import check_model_inputs
from ctc_drafter.integrations.transformers import CustomGenerate, custom_generate
from ctc_drafter.target import Target
from ctc_drafter.target.selftest import self_test
from helpers import CAPABLE, save_model

PROMPT = torch.tensor([[5, 40, 41, 42, 43, 44, 9, 40, 41, 42]])


@pytest.fixture(scope="module")
def model(target_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def fast(drafter_folder: Path) -> CustomGenerate:
    return custom_generate(drafter_folder, budget=6)


def both(model: Any, fast: Any, ids: torch.Tensor = PROMPT, **options: Any) -> tuple[Any, Any]:
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False, **options}
    return model.generate(ids, **options), model.generate(ids, custom_generate=fast, **options)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2", "qwen3", "gpt_neox", "gpt_oss", "opt"])
def test_greedy_ids_are_those_of_generate(kind: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / kind, kind, **CAPABLE[kind])
    drafter = build_drafter(tmp_path / "drafter", Target.load(folder, dtype="float32", device="cpu"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for fast in (custom_generate(drafter), custom_generate("lookup", 4)):
        for options in ({"eos_token_id": None}, {"repetition_penalty": 1.3}):
            want, got = both(model, fast, **options)
            assert want.tolist() == got.tolist() and got.dtype == torch.long


def test_lengths_and_eos_are_those_of_generate(model: Any, fast: Any) -> None:
    free, _ = both(model, fast, eos_token_id=None)
    eos = free[0, -8].item()
    for options in ({"eos_token_id": [eos, 3]}, {"max_new_tokens": None, "max_length": 17}, {"max_new_tokens": 1}):
        want, got = both(model, fast, **options)
        assert want.tolist() == got.tolist()
    got = model.generate(PROMPT, do_sample=False, max_new_tokens=5, custom_generate=fast, return_dict_in_generate=True)
    assert got.sequences.shape == (1, PROMPT.shape[1] + 5) or got.sequences[0, -1] == model.config.eos_token_id


def penalty_passes_over_padding() -> bool:
    """Whether this transformers keeps a repetition penalty off the padding of a batch (5.17 penalises it too)."""
    told = inspect.signature(RepetitionPenaltyLogitsProcessor).parameters["prompt_ignore_length"].annotation
    return "Tensor" in str(told)


def test_a_padded_batch_gives_the_ids_of_generate(model: Any, fast: Any) -> None:
    pad = model.config.pad_token_id
    ids, mask = torch.full((3, 10), pad), torch.zeros(3, 10, dtype=torch.long)
    for row, count in enumerate((10, 4, 7)):
        ids[row, -count:] = PROMPT[0, :count] + row
        mask[row, -count:] = 1
    free, _ = both(model, fast, ids, attention_mask=mask, eos_token_id=None)
    penalty = {"repetition_penalty": 1.4}
    for options in ({"eos_token_id": None}, {"eos_token_id": free[0, -9].item()}, penalty):
        if options is penalty and not penalty_passes_over_padding():
            with pytest.raises(UserError, match="RepetitionPenaltyLogitsProcessor cannot be honoured exactly"):
                both(model, fast, ids, attention_mask=mask, pad_token_id=pad, **options)
            continue
        want, got = both(model, fast, ids, attention_mask=mask, pad_token_id=pad, **options)
        assert want.tolist() == got.tolist()
    with pytest.raises(UserError, match="left"):
        model.generate(ids.flip(1), attention_mask=mask.flip(1), max_new_tokens=3, custom_generate=fast)


def test_sampling_follows_the_seed_and_the_model(model: Any, fast: Any) -> None:
    def sample(seed: int, **options: Any) -> list[int]:
        torch.manual_seed(seed)
        options = {"do_sample": True, "max_new_tokens": 20, "eos_token_id": None, **options}
        ids: list[int] = model.generate(PROMPT, custom_generate=fast, **options)[0].tolist()
        return ids

    assert sample(1) == sample(1) != sample(2)
    greedy, _ = both(model, fast, max_new_tokens=20, eos_token_id=None)
    assert sample(3, top_k=1) == greedy[0].tolist() == sample(3, top_p=1e-6)
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}
    ids = sample(4, **options)
    with torch.no_grad():
        ranks = model(torch.tensor([ids])).logits[0].argsort(-1, descending=True)
    assert all(ids[i + 1] in ranks[i, :60].tolist() for i in range(PROMPT.shape[1] - 1, len(ids) - 1))
    torch.manual_seed(0)
    two = model.generate(PROMPT, do_sample=True, num_return_sequences=2, max_new_tokens=20, custom_generate=fast)
    assert two.shape[0] == 2 and two[0].tolist() != two[1].tolist()


def test_first_tokens_have_the_models_distribution(model: Any, fast: Any) -> None:
    torch.manual_seed(0)
    many = PROMPT.repeat(600, 1)
    options = {"do_sample": True, "top_k": 4, "max_new_tokens": 1, "custom_generate": fast}
    drawn = model.generate(many, **options)[:, -1]
    with torch.no_grad():
        logits = model(PROMPT).logits[0, -1]
    likely = logits.topk(4)
    counts = torch.stack([(drawn == token).float().mean() for token in likely.indices])
    assert counts.sum() == 1 and (counts - likely.values.softmax(-1)).abs().max() < 0.08


class Until(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_stopping_criteria_are_asked_after_every_token(model: Any, fast: Any, target: Target) -> None:
    free, _ = both(model, fast, eos_token_id=None)
    texts = [target.tokenizer.decode(free[0, i : i + 2]) for i in range(PROMPT.shape[1], free.shape[1] - 4)]
    text = next(t for t in texts if "\ufffd" not in t)
    for criteria in (Until(15), StopStringCriteria(target.tokenizer, [text])):
        want, got = both(model, fast, eos_token_id=None, stopping_criteria=StoppingCriteriaList([criteria]))
        assert want.tolist() == got.tolist() and got.shape[1] < free.shape[1]
    with pytest.raises(UserError, match="Until"):
        both(model, fast, PROMPT.repeat(2, 1), stopping_criteria=StoppingCriteriaList([Until(15)]))


def test_tokens_are_streamed(model: Any, fast: Any, target: Target) -> None:
    streamer = TextIteratorStreamer(target.tokenizer, skip_prompt=True)
    ids = model.generate(PROMPT, max_new_tokens=12, do_sample=False, custom_generate=fast, token_streamer=streamer)
    assert "".join(streamer) == target.tokenizer.decode(ids[0, PROMPT.shape[1] :])


def test_a_model_is_tested_once(model: Any, drafter_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests: list[Target] = []
    monkeypatch.setattr("ctc_drafter.target.model.self_test", lambda target: (tests.append(target), self_test(target)))
    fast = custom_generate(drafter_folder)
    for _ in range(3):
        model.generate(PROMPT, do_sample=False, max_new_tokens=4, custom_generate=fast)
    assert len(tests) == 1


def test_the_model_is_left_as_it_was(model: Any, drafter_folder: Path) -> None:
    mine = copy.deepcopy(model).requires_grad_(True)
    fast = custom_generate(drafter_folder)
    before = mine.config._attn_implementation, [dict(m.__dict__).keys() for m in mine.modules()]
    want, got = both(mine, fast)
    assert want.tolist() == got.tolist() and all(p.requires_grad for p in mine.parameters())
    assert before == (mine.config._attn_implementation, [dict(m.__dict__).keys() for m in mine.modules()])
    assert not any(m._forward_hooks for m in mine.modules())

    with torch.no_grad():
        mine.model.layers[1].mlp.up_proj.weight[5:].add_(0.3 * torch.randn(123, 64))
    want, got = both(mine, fast)  # the probe of the drafter does not see this weight, the packed copies must
    assert want.tolist() == got.tolist()
    mine.train()
    with pytest.raises(UserError, match="training mode"):
        mine.generate(PROMPT, custom_generate=fast, max_new_tokens=3)


def test_what_cannot_be_honoured_is_refused(model: Any, fast: Any) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_beams": 2}, "beam_search"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGram"),
        ({"min_new_tokens": 3}, "MinLength"),
        ({"logits_processor": LogitsProcessorList([lambda ids, scores: scores])}, "function"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
        ({"past_key_values": DynamicCache()}, "past_key_values"),
        ({"position_ids": torch.arange(10)[None] + 3}, "position_ids"),
    ]
    for options, words in cases:
        with pytest.raises(UserError, match=words):
            model.generate(PROMPT, custom_generate=fast, **{"max_new_tokens": 4, **options})
    for name in ("past_key_values", "cache"):  # its name before transformers 5.24, and since
        check_model_inputs({name: DynamicCache()})
        mine = DynamicCache()
        mine.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
        with pytest.raises(UserError, match="past_key_values"):
            check_model_inputs({name: mine})
    with pytest.raises(UserError, match="budget"):
        custom_generate("lookup", -1)
    with pytest.raises(UserError, match="no drafter"):
        model.generate(PROMPT, custom_generate=custom_generate("nowhere"), max_new_tokens=4)


def test_models_and_drafters_that_do_not_fit_are_refused(fast: Any, tmp_path: Path) -> None:
    save_model(tmp_path / "other", "llama", **CAPABLE["llama"])
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=torch.float32)
    with pytest.raises(UserError, match="was made for target"):
        other.generate(PROMPT, custom_generate=fast, max_new_tokens=4)
    assert "forward" not in other.lm_head.__dict__ and other.config._attn_implementation == "sdpa"


def test_an_answer_ends_at_the_edge_of_the_context(model: Any, fast: Any) -> None:
    with pytest.warns(UserWarning, match="ends at 192"):
        ids = model.generate(
            PROMPT.repeat(1, 18), do_sample=False, max_new_tokens=40, eos_token_id=None, custom_generate=fast
        )
    assert ids.shape[1] == 192
