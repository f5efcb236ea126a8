"""Prompt lookup against a plain search of the text."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_drafter.drafters import LookupDrafter
from ctc_drafter.drafters.lookup import MAX_LENGTH, MAX_NGRAM


def continuations(text: list[int]) -> list[list[int]]:
    """What followed the earlier occurrences of the longest suffix, latest first."""
    for n in range(min(MAX_NGRAM, len(text)), 0, -1):
        ends = [i for i in range(len(text) - 1, n - 1, -1) if text[i - n : i] == text[-n:]]
        if ends:
            return [text[i : i + MAX_LENGTH] for i in ends]
    return []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 12), st.data())
def test_it_copies_what_followed_before(text: list[int], budget: int, data: st.DataObject) -> None:
    drafter = LookupDrafter()
    drafter.start(64)
    rest = text
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        drafter.draft(torch.empty(1, n, 0), torch.tensor([rest[:n]]))
        rest = rest[n:]
    tree = drafter.tree(torch.device("cpu"), budget)
    tree.check()
    assert tree.budget == budget
    paths: list[list[int]] = []
    for token, parent in zip(tree.tokens[0].tolist(), tree.parents[0].tolist()):
        paths.append((paths[parent] if parent >= 0 else []) + [token])
    wanted = continuations(text)
    if wanted:
        assert paths[: len(wanted[0])] == [wanted[0][: i + 1] for i in range(len(wanted[0]))][:budget]
        prefixes = [path[:i] for path in wanted for i in range(1, len(path) + 1)]
        assert all(path in prefixes or path == [0] for path in paths)  # [0] is padding
    else:
        assert all(path == [0] for path in paths)
