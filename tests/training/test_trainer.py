"""Training a drafter: the problems it is given, and resuming as if nothing had happened."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ctc_drafter.cli import app
from ctc_drafter.drafters import DRAFTERS, load_drafter
from ctc_drafter.drafters.base import TrainableDrafter
from ctc_drafter.target import Target
from ctc_drafter.training.problems import Sequence, batch_of, make_problems, split_problems
from ctc_drafter.training.trainer import TrainConfig, train
from helpers import Killed, killed_at, refused
from small_run import small_recipe, weights, write_data

# ---------------------------------------------------------------- problems


@st.composite
def sequences(draw: st.DrawFn) -> list[Sequence]:
    out = []
    for _ in range(draw(st.integers(1, 4))):
        mask = draw(st.lists(st.integers(0, 1), min_size=1, max_size=12)) + [1, 1, 1]
        mask += draw(st.lists(st.integers(0, 1), max_size=12))
        out.append(Sequence(list(range(100, 100 + len(mask))), mask))
    return out


@settings(max_examples=150, deadline=None)
@given(sequences(), st.integers(1, 20), st.integers(1, 5), st.integers(0, 99))
def test_problems_are_what_they_say(rows: list[Sequence], anchors: int, labels: int, seed: int) -> None:
    ids, where, what, possible = make_problems(rows, anchors, labels, torch.Generator().manual_seed(seed))
    assert ids.shape == (len(rows), max(len(r.ids) for r in rows))
    assert where.shape == (len(rows), anchors) and what.shape == (len(rows), anchors, labels)
    for i, row in enumerate(rows):
        assert ids[i, : len(row.ids)].tolist() == row.ids
        inside = row.mask + [0] * (ids.shape[1] + 2 - len(row.mask))
        assert possible[i].tolist() == [bool(inside[t + 1] and inside[t + 2]) for t in range(ids.shape[1])]
        for t, got in zip(where[i].tolist(), what[i].tolist()):
            assert row.mask[t + 1] and row.mask[t + 2]  # root and first label are in the answer
            want = []
            for j in range(t + 2, t + 2 + labels):
                inside = j < len(row.ids) and row.mask[j] and (not want or want[-1] != -100)
                want.append(row.ids[j] if inside else -100)
            assert got == want


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=5), st.integers(1, 20), st.integers(0, 99))
def test_long_answers_repeat_no_anchor(lengths: list[int], anchors: int, seed: int) -> None:
    """Also beside short ones, whose rows alone repeat theirs."""
    rows = [Sequence(list(range(5 + n)), [0] * 5 + [1] * n) for n in lengths]
    _, where, _, possible = make_problems(rows, anchors, 3, torch.Generator().manual_seed(seed))
    for row, length in zip(where.tolist(), lengths):
        assert len(set(row)) == anchors or length - 1 < anchors
    if min(lengths) > anchors:  # what a seed gave before must stay
        again = torch.multinomial(possible.float(), anchors, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(where, again)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_parts_are_the_whole(parts: int) -> None:
    rows = [Sequence(list(range(9 + i)), [0] + [1] * (8 + i)) for i in range(4)]
    whole = make_problems(rows, 5, 3, torch.Generator().manual_seed(0))
    split = split_problems(whole, parts)
    assert [len(part[0]) for part in split] == [len(range(i, 4, parts)) for i in range(parts)]
    for got, want in zip(zip(*split), whole):
        assert sorted(t.tolist() for part in got for t in part) == sorted(t.tolist() for t in want)


@pytest.mark.parametrize("count", [8, 50, 101])
def test_every_epoch_uses_every_batch_once(count: int) -> None:
    rows = [Sequence([i] * (1 + i % 17), [1]) for i in range(count)]
    config = TrainConfig(data=[], output="", batch=2, seed=3)
    per_epoch = count // 2
    for epoch in range(3):
        used = Counter(s.ids[0] for i in range(per_epoch) for s in batch_of(rows, epoch * per_epoch + i, config))
        assert set(used.values()) == {1} and len(used) == 2 * per_epoch
    assert batch_of(rows, 5, config) == batch_of(rows, 5, config)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def data(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "train.jsonl", target)


@pytest.fixture
def recipe(target_folder: Path, data: Path, tmp_path: Path) -> TrainConfig:
    return small_recipe(target_folder, data, tmp_path / "drafter")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [{}, {"topology": "merge", "objective": "label", "tree": "paths"}])
def test_resuming_changes_nothing(
    dtype: str, config: dict[str, Any], recipe: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(recipe, dtype=dtype, drafter={**recipe.drafter, **config})
    whole = train(replace(recipe, output=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        killed_at(5, patch)
        with pytest.raises(Killed):
            train(recipe)
    assert not Path(recipe.output).exists()
    resumed = train(recipe)
    mine, want = weights(resumed), weights(whole)
    assert mine.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(mine[name], value), name
    history = json.loads((resumed / "config.json").read_text())["training"]["history"]
    expected = json.loads((whole / "config.json").read_text())["training"]["history"]
    assert [row["step"] for row in history] == [3, 6]
    assert [{**row, "seconds": 0} for row in history] == [{**row, "seconds": 0} for row in expected]
    assert history[0]["seconds"] <= history[1]["seconds"]


def test_training_teaches(recipe: TrainConfig, target: Target) -> None:
    folder = train(replace(recipe, steps=40, checkpoint_every=10, lr_matrix=1e-2, lr_other=1e-2))
    history = json.loads((folder / "config.json").read_text())["training"]["history"]
    assert history[-1]["held_out"] < 0.9 * history[0]["held_out"]
    assert history[-1]["expected_accepted"] > history[0]["expected_accepted"]
    assert load_drafter(str(folder), target).num_parameters > 0
    run = yaml.safe_load((folder / "run.yaml").read_text())
    assert run["recipe"]["steps"] == 40 and {"torch", "transformers", "ctc_drafter"} <= run["versions"].keys()


def test_the_last_line_says_how_to_choose_the_drafter(
    recipe: TrainConfig, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a folder called as the embedded drafter is, which another run may start from."""
    monkeypatch.chdir(tmp_path)
    for name, init in (("ctc", None), ("trained-on", "./ctc")):
        small = replace(recipe, output=name, init=init, steps=1, checkpoint_every=1)
        Path("recipe.yaml").write_text(yaml.safe_dump(asdict(small)))
        result = CliRunner().invoke(app, ["train", "--config", "recipe.yaml"])
        assert result.exit_code == 0, result.output
        folder = result.stdout.removeprefix("Drafter: ").rstrip("\n")
        assert load_drafter(folder, target).num_parameters > 0 and Path(folder).samefile(name)


@pytest.mark.parametrize("kind", sorted(k for k, c in DRAFTERS.items() if issubclass(c, TrainableDrafter)))
def test_every_kind_trains_and_resumes(kind: str, recipe: TrainConfig, target: Target) -> None:
    recipe = replace(recipe, kind=kind, drafter={}, steps=2, checkpoint_every=2)
    folder = train(recipe)
    before = weights(folder)
    assert all(torch.equal(value, before[name]) for name, value in weights(train(recipe)).items())
    assert load_drafter(str(folder), target).num_parameters > 0


def test_seed_decides_the_weights(recipe: TrainConfig, tmp_path: Path) -> None:
    one, other = (train(replace(recipe, output=str(tmp_path / str(s)), seed=s, steps=1)) for s in (1, 2))
    assert not torch.equal(weights(one)["module.fuse.weight"], weights(other)["module.fuse.weight"])


def test_dry_run_writes_nothing(recipe: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe, dry_run=True)
    assert "6 steps x 4 sequences x 6 anchors" in capsys.readouterr().err
    assert list(Path(recipe.output).parent.iterdir()) == []


def test_a_path_that_looks_like_markup_is_said_as_it_is(
    recipe: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "[bold]:warning:" / "[" / "red]" / "out"
    train(replace(recipe, output=str(place)), dry_run=True)
    assert str(place) in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("store", ["auto", "float8_e4m3fn"])
def test_estimate_is_what_the_run_does(store: str, recipe: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes on disk, sequences, passes of the target; and a time that is positive."""
    train(replace(recipe, accumulate=2, store=store), dry_run=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "24 sequences" in said and "12 forward passes" in said
    folder = train(replace(recipe, accumulate=2, store=store))
    for words, file in (("drafter ([0-9.]+) MB", folder), ("state ([0-9.]+) MB", folder.with_name("drafter.state"))):
        predicted = re.search(words, said)
        stored = sum(f.stat().st_size for f in file.glob("*.safetensors")) / 1e6
        assert predicted is not None and float(predicted[1]) == pytest.approx(stored, abs=0.06)
    seconds = re.search(r"time ([0-9.e-]+) s a step, about \d+ s in all", said)
    assert seconds is not None and 0 < float(seconds[1]) < 60


def test_existing_folder_is_not_overwritten(recipe: TrainConfig) -> None:
    Path(recipe.output).mkdir()
    (Path(recipe.output) / "mine").write_text("precious")
    assert "choose another output" in refused(train, recipe)
    assert (Path(recipe.output) / "mine").read_text() == "precious"


def test_fewer_steps_than_were_done(recipe: TrainConfig) -> None:
    train(recipe)
    assert "is of step 6 and steps is 3; raise that to at least 6" in refused(train, replace(recipe, steps=3, decay=1))
    train(recipe)


def test_state_of_another_shape(recipe: TrainConfig) -> None:
    train(recipe)
    assert "another recipe (drafter differ)" in refused(train, replace(recipe, drafter={**recipe.drafter, "slots": 5}))


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_damaged_state(name: str, recipe: TrainConfig) -> None:
    folder = train(recipe)
    state = folder.with_name("drafter.state") / name
    state.write_bytes(state.read_bytes()[:-20])
    assert "damaged" in refused(train, recipe)


def test_state_without_its_step(recipe: TrainConfig) -> None:
    folder = train(recipe)
    state = folder.with_name("drafter.state")
    meta = json.loads((state / "state.json").read_text())
    del meta["step"]
    (state / "state.json").write_text(json.dumps(meta))
    assert "damaged" in refused(train, recipe)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "oracle"}, "no trainable drafter 'oracle'"),
        ({"kind": "none"}, "no trainable drafter 'none'"),
        ({"drafter": {"slotz": 3}}, "unknown key 'slotz'"),
        ({"drafter": {"slots": 2}}, "labels"),
        ({"drafter": {"feature_layers": [9]}}, "no feature layer 9"),
        ({"batch": 100}, "fewer than one batch of 100"),
    ],
)
def test_impossible_recipes(change: dict[str, Any], match: str, recipe: TrainConfig) -> None:
    assert match in refused(train, replace(recipe, **change))


@pytest.mark.parametrize("seed", [1_700_000_000_123_456_789, 2**64 - 1, -(2**63)])
def test_every_seed_that_torch_takes_is_one(seed: int, recipe: TrainConfig) -> None:
    assert train(replace(recipe, seed=seed, steps=2)).is_dir()
    for beyond in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match="seed must be at least"):
            replace(recipe, seed=beyond)


@pytest.mark.parametrize("rate", [math.nan, math.inf, -1.0])
def test_impossible_rates(rate: float, recipe: TrainConfig) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        replace(recipe, lr_matrix=rate)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"note": "only this"}, "line 2: expected prompt_ids and answer_ids, messages, or text"),
        ({"messages": [{"role": "user"}]}, "line 2: each message needs a `role` and a `content`"),
        ({"prompt_ids": [1], "answer_ids": [2, 3, 10**6]}, "line 2: token 1000000 is outside the vocabulary"),
    ],
)
def test_foreign_data(row: dict[str, Any], match: str, recipe: TrainConfig, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "foreign.jsonl"
    path.write_text(data.read_text().splitlines()[0] + "\n" + json.dumps(row) + "\n")
    assert match in refused(train, replace(recipe, data=[str(path)]))


def test_sequences_longer_than_the_context_are_cut(recipe: TrainConfig, target: Target, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    ids = [5 + i % 90 for i in range(target.max_context + 50)]
    rows = [{"id": str(i), "prompt_ids": ids[:3], "answer_ids": ids} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(replace(recipe, data=[str(path)], steps=1, batch=2, held_out=0.0))


def test_answers_without_two_neighbours_are_left_out(recipe: TrainConfig, data: Path, tmp_path: Path) -> None:
    """There is no root and label in them; they must not end the run."""
    path = tmp_path / "short.jsonl"
    short = json.dumps({"id": "x", "prompt_ids": [5, 6], "answer_ids": [7]}) + "\n"
    path.write_text(short * 5 + data.read_text())
    train(replace(recipe, data=[str(path)], steps=9, batch=4))


def test_nothing_is_lost_when_a_run_is_repeated(recipe: TrainConfig, tmp_path: Path) -> None:
    folder = train(recipe)
    before = weights(folder)
    train(recipe)
    assert all(torch.equal(value, before[name]) for name, value in weights(folder).items())
    shutil.rmtree(folder)
    train(recipe)
    assert all(torch.equal(value, before[name]) for name, value in weights(folder).items())
