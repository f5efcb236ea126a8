from __future__ import annotations

from ctc_drafter.streaming import TextStream
from ctc_drafter.target import Target

TEXT = "Déjà vu: 你好世界 🙂🚀, naïve  spaces\n\n\tand the end."


def test_pieces_join_to_the_text_and_never_split_a_character(target: Target) -> None:
    ids = target.tokenizer(TEXT)["input_ids"]
    for size in (1, 2, 3, 7):
        stream = TextStream(target.tokenizer)
        pieces = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert all("\ufffd" not in piece for piece in pieces)
        assert "".join(pieces) + stream.finish() == TEXT


def test_a_cut_character_comes_out_at_the_end(target: Target) -> None:
    ids = target.tokenizer("ab🚀")["input_ids"][:-1]
    stream = TextStream(target.tokenizer)
    assert "".join(stream.push([token]) for token in ids) == "ab"
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_special_tokens_are_silent(target: Target) -> None:
    stream = TextStream(target.tokenizer)
    ids = target.tokenizer("dog")["input_ids"]
    end = target.tokenizer.eos_token_id
    assert "".join(stream.push([token]) for token in [*ids, end]) + stream.finish() == "dog"
