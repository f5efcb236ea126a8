"""Names, bytes and places of tokens, also of those that are parts of a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from ctc_drafter.logprobs import LogProb
from ctc_drafter.serving.tokens import Offsets, TokenTexts
from ctc_drafter.target import Target


@pytest.fixture(scope="module")
def embedded() -> Target:
    return Target.load(device="cpu")


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=12))
def test_bytes_join_to_the_text_and_offsets_lie_in_it(embedded: Target, text: str) -> None:
    ids = embedded.tokenizer(text, add_special_tokens=False)["input_ids"]
    written = embedded.tokenizer.decode(ids)
    told = Offsets(embedded).push([LogProb(token, -1.0, [(token, -1.0)]) for token in ids])
    entries = TokenTexts(embedded).of_chat(told)["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == written
    for each, entry in zip(told, entries):
        rest = written[each.offset :].encode()
        own = bytes(entry["bytes"])
        # From where its character begins.
        assert own in rest[: len(own) + 3]
    assert [each.offset for each in told] == sorted(each.offset for each in told)
    named = TokenTexts(embedded).of_text(told)
    assert all(len(top) == 1 and token in top for token, top in zip(named["tokens"], named["top_logprobs"]))


def test_parts_of_characters_have_names_of_their_own(embedded: Target) -> None:
    ids = [token for token in range(embedded.vocab_size) if "\ufffd" in embedded.tokenizer.decode([token])]
    assert len(ids) > 100
    (entry,) = TokenTexts(embedded).of_chat(Offsets(embedded).push([LogProb(ids[0], 0.0, [(t, 0.0) for t in ids])]))[
        "content"
    ]
    assert len({each["token"] for each in entry["top_logprobs"]}) == len(ids)


def test_bytes_that_a_vocabulary_spells_out(embedded: Target) -> None:
    vocabulary = {"<unk>": 0, "a": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4, "\u2581b": 5}
    model = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    space = decoders.Replace("\u2581", " ")
    model.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    target = Target.__new__(Target)
    target.tokenizer, target.stop_ids = PreTrainedTokenizerFast(tokenizer_object=model), frozenset()
    told = Offsets(target).push([LogProb(token, 0.0, []) for token in (1, 2, 3, 4, 5)])
    assert [each.offset for each in told] == [0, 1, 1, 1, 2]
    entries = TokenTexts(target).of_chat(told)["content"]
    assert [entry["token"] for entry in entries] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", " b"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == "a€ b"
