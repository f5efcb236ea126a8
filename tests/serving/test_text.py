"""Text in pieces: nothing lost, nothing doubled, nothing of a stop string, however tokens are grouped in steps."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_drafter.ending import Ending
from ctc_drafter.serving.text import AnswerText
from ctc_drafter.steps import Step
from ctc_drafter.target import Target

ALPHABET = "ab \nné你好🙂🚀\u200d"


def steps_of(tokens: list[int], sizes: list[int]) -> list[Step]:
    steps, at = [], 0
    for i in range(len(tokens)):
        if at >= len(tokens):
            break
        part = tokens[at : at + sizes[i % len(sizes)]]
        at += len(part)
        steps.append(Step(part, len(part) - 1, 0, {}, "length" if at >= len(tokens) else None))
    return steps


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pieces_join_to_the_text_before_the_first_stop(target: Target, data: st.DataObject) -> None:
    text = data.draw(st.text(ALPHABET, min_size=1, max_size=40))
    stops = data.draw(st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3))
    tokens = target.tokenizer(text)["input_ids"]
    whole = target.tokenizer.decode(tokens)
    assert whole == text
    outs = []
    for sizes in ([1], [len(tokens)], data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))):
        answer = AnswerText(target.tokenizer, stops)
        pieces = [piece for step in steps_of(tokens, sizes) for piece in answer.push(step)]
        assert all(piece.text and "\ufffd" not in piece.text for piece in pieces)
        outs.append("".join(piece.text for piece in pieces))
        assert answer.stopped == any(s in text for s in stops)
    assert outs == outs[:1] * 3
    assert text.startswith(outs[0])
    assert not any(s in outs[0] for s in stops)
    if not any(s in text for s in stops):
        assert outs[0] == text
    elif len(stops) == 1:
        assert outs[0] == text[: text.index(stops[0])]


def test_a_cut_character_comes_out_as_one_sign_at_the_end(target: Target) -> None:
    tokens = target.tokenizer("ab🚀")["input_ids"][:-1]
    answer = AnswerText(target.tokenizer)
    pieces = [piece for step in steps_of(tokens, [1]) for piece in answer.push(step)]
    assert "".join(piece.text for piece in pieces) == "ab\ufffd"


def test_accepted_tokens_are_one_piece(target: Target) -> None:
    tokens = target.tokenizer("the dog jumps")["input_ids"]
    answer = AnswerText(target.tokenizer)
    [guessed, own] = answer.push(Step(tokens, len(tokens) - 1, 8, {}, "length"))
    assert guessed.accepted and not own.accepted
    assert guessed.text + own.text == "the dog jumps"
    assert own.text == target.tokenizer.decode(tokens[-1:])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_generation_ends_where_the_text_is_cut(target: Target, data: st.DataObject) -> None:
    """The loop ends answers by tokens and the server cuts them by text: neither goes on where the other has stopped."""
    tokenizer = target.tokenizer
    pool = {*tokenizer.all_special_ids, *tokenizer("abé🙂")["input_ids"]} - target.stop_ids
    tokens = data.draw(st.lists(st.sampled_from(sorted(pool)), min_size=2, max_size=14))
    stop = data.draw(st.text("abé", min_size=1, max_size=3))
    ending, answer = Ending(target, [stop], len(tokens) + 1), AnswerText(tokenizer, [stop])
    for token in tokens:
        _, finish = ending.cut([token])
        answer.push(Step([token], 0, 0, {}, finish))
        assert (finish == "stop") == answer.stopped
        if answer.stopped:
            break


def test_a_special_token_can_be_a_stop_string_and_its_name_hides_none(target: Target) -> None:
    begin, tokens = target.tokenizer("a<|begin|>")["input_ids"][-1], target.tokenizer("ab")["input_ids"]
    for stop, finishes in (("<|begin|>", [None, "stop"]), ("begin", [None, None])):
        ending = Ending(target, [stop], 9)
        assert [ending.cut([token])[1] for token in (tokens[0], begin)] == finishes
