"""Draft chains for another engine: whatever it computes in whichever pieces, a context is what its tokens say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import TEXTS, build_drafter
from ctc_drafter.drafters import DRAFTERS, TrainableDrafter, load_drafter
from ctc_drafter.drafters.slots import SlotDrafter
from ctc_drafter.errors import UserError
from ctc_drafter.integrations import chains
from ctc_drafter.integrations.chains import ChainDrafter, Pass, drafter_layers
from ctc_drafter.target import Target

BUDGET = 12
Text = tuple[torch.Tensor, list[int]]


@pytest.fixture(autouse=True)
def small_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "MIN_CAPACITY", 4)  # so that they must grow


@pytest.fixture(scope="module")
def texts(target: Target, drafter_folder: Path) -> list[Text]:
    """Features and ids of a few texts."""
    target.capture(load_drafter(str(drafter_folder), target).feature_layers)
    found = []
    for text in (TEXTS[0] + TEXTS[1], TEXTS[1] + TEXTS[4], TEXTS[2] + TEXTS[0]):
        ids = target.tokenizer.encode(text)[:40]
        with torch.inference_mode():
            found.append((target.prefill(ids, target.new_cache(64))[1][0], ids))
    return found


def chain_drafter(target: Target, folder: Path) -> ChainDrafter:
    drafter = load_drafter(str(folder), target)
    return ChainDrafter(drafter, BUDGET, target.max_context)  # type: ignore[arg-type]


def part(text: Text, start: int, end: int, request: str = "r", longest: int = 9) -> Pass:
    """A pass that computed the positions start .. end - 1."""
    features, ids = text
    return Pass(request, start, features[start:end], torch.tensor(ids[start + 1 : end + 1]), longest)


def fresh(target: Target, folder: Path, text: Text, start: int, end: int) -> list[int]:
    """What a drafter that read these positions at once guesses."""
    drafter = load_drafter(str(folder), target)
    drafter.start(64)
    features, ids = text
    guess = drafter.draft(features[None, start:end], torch.tensor([ids[start + 1 : end + 1]]))
    return drafter.tree(guess, BUDGET).best_paths()[0]


@torch.inference_mode()
@pytest.mark.parametrize("pieces", [(0, 21), (0, 1, 2, 21), (0, 8, 16, 18, 21), (0, 14, 6, 21), (0, 20, 0, 21)])
def test_pieces_and_rewinds_change_nothing(
    target: Target, drafter_folder: Path, texts: list[Text], pieces: tuple[int, ...]
) -> None:
    drafter = chain_drafter(target, drafter_folder)
    begin = 0
    for end in pieces[1:]:
        if end < begin:  # preempted: what was read is computed again from here on
            begin = end
            continue
        chain = drafter.draft([part(texts[0], begin, end)])[0]
        begin = end
    assert chain == fresh(target, drafter_folder, texts[0], 0, 21) and chain


@torch.inference_mode()
def test_after_a_gap_the_drafter_knows_what_came_since(target: Target, drafter_folder: Path, texts: list[Text]) -> None:
    drafter = chain_drafter(target, drafter_folder)
    first = drafter.draft([part(texts[0], 8, 20)])[0]  # the first 8 positions were found in the engine's cache
    assert first == fresh(target, drafter_folder, texts[0], 8, 20)
    drafter.draft([part(texts[0], 22, 23)])
    assert drafter.draft([part(texts[0], 23, 30)])[0] == fresh(target, drafter_folder, texts[0], 22, 30)
    again = drafter.draft([part(texts[0], 4, 30)])[0]  # before the beginning
    assert again == fresh(target, drafter_folder, texts[0], 4, 30)


@torch.inference_mode()
def test_requests_of_a_batch_do_not_touch_each_other(target: Target, drafter_folder: Path, texts: list[Text]) -> None:
    drafter = chain_drafter(target, drafter_folder)
    lengths = (5, 17, 9)
    passes = [part(text, 0, n, str(i)) for i, (text, n) in enumerate(zip(texts, lengths))]
    assert drafter.draft(passes) == [fresh(target, drafter_folder, t, 0, n) for t, n in zip(texts, lengths)]
    nexts = [part(text, n, n + 3, str(i)) for i, (text, n) in enumerate(zip(texts, lengths))][::-1]
    nexts[1] = replace(nexts[1], longest=0)
    want = [fresh(target, drafter_folder, t, 0, n + 3) for t, n in zip(texts, lengths)][::-1]
    want[1] = []
    assert drafter.draft(nexts) == want
    drafter.keep_only({"1", "unknown"})
    assert len(drafter) == 1


@torch.inference_mode()
def test_a_chain_is_cut_where_it_is_of_no_use(target: Target, drafter_folder: Path, texts: list[Text]) -> None:
    drafter = chain_drafter(target, drafter_folder)
    whole = drafter.draft([part(texts[0], 0, 10)])[0]
    assert drafter.draft([part(texts[0], 0, 10, longest=1)])[0] == whole[:1]
    assert drafter.draft([part(texts[0], 0, 10, longest=0)])[0] == []
    assert drafter.draft([]) == []


@pytest.mark.parametrize("engine", ["vLLM", "SGLang"])
def test_only_what_fills_all_slots_at_once_can_run_elsewhere(engine: str, target: Target, tmp_path: Path) -> None:
    for kind, cls in DRAFTERS.items():
        if issubclass(cls, TrainableDrafter):
            folder = str(build_drafter(tmp_path / kind, target, kind))
            if issubclass(cls, SlotDrafter):
                assert drafter_layers(folder, engine) == load_drafter(folder, target).feature_layers
            else:
                with pytest.raises(UserError, match=f"'{kind}', which cannot run in {engine}"):
                    drafter_layers(folder, engine)
    with pytest.raises(UserError, match="no drafter 'nowhere'"):
        drafter_layers("nowhere", engine)
