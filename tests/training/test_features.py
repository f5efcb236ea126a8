"""Cached features: the same training as online, and shards that are killed, cut and damaged."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from conftest import build_target
from ctc_drafter.cli import app
from ctc_drafter.drafters import DRAFTERS, TrainableDrafter
from ctc_drafter.target import LAST, Target
from ctc_drafter.training import features
from ctc_drafter.training.evaluate import problem_loss
from ctc_drafter.training.features import CachedFeatures, cache_features
from ctc_drafter.training.problems import Sequence, make_problems, read_sequences
from ctc_drafter.training.trainer import TrainConfig, train
from helpers import Killed, refused
from small_run import history, small_recipe, weights, write_data


@pytest.fixture(scope="module")
def data(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "train.jsonl", target)


@pytest.fixture
def recipe(target_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Its features take several shards, of which one is open at a time."""
    monkeypatch.setattr(features, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(features, "OPEN_SHARDS", 1)
    return small_recipe(target_folder, data, tmp_path / "drafter", features=str(tmp_path / "features"))


@pytest.fixture
def folder(recipe: TrainConfig) -> Path:
    made = cache_features(recipe, str(recipe.features))
    assert len(list(made.glob("hs_*.safetensors"))) > 2
    return made


def opened(recipe: TrainConfig, target: Target, *layers: int) -> CachedFeatures:
    return CachedFeatures(recipe, target, layers or (LAST,), Console(quiet=True))


def test_a_folder_that_looks_like_markup_is_said_as_it_is(
    recipe: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = cache_features(recipe, tmp_path / "[" / "bold]")
    assert str(made) in capsys.readouterr().err.replace("\n", "")


def test_the_estimate_says_that_the_target_does_not_run(
    folder: Path, recipe: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe, dry_run=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "so no forward pass of the target" in said and "passes of the target" not in said


# ---------------------------------------------------------------- the same as online


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.02)])
@pytest.mark.parametrize("layers", [[LAST], [1, LAST]])
def test_training_is_the_same_as_online(
    dtype: str,
    tolerance: float,
    layers: list[int],
    recipe: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Muon works in bfloat16: at its full rate one rounding moves a weight by more than the tolerance.
    recipe = replace(recipe, dtype=dtype, drafter={**recipe.drafter, "feature_layers": layers}, lr_matrix=5e-4)
    online = train(replace(recipe, features=None, output=str(tmp_path / "online")))
    cache_features(recipe, str(recipe.features))
    real = Target.forward

    def forward(self: Target, ids: torch.Tensor, **options: Any) -> Any:
        assert options.get("use_cache"), "the target ran over a training sequence"  # the self-test fills a cache
        return real(self, ids, **options)

    monkeypatch.setattr(Target, "forward", forward)
    cached = train(recipe)
    assert len(history(cached)) == 2
    for mine, want in zip(history(cached), history(online), strict=True):
        assert mine == pytest.approx(want, rel=tolerance, abs=tolerance)
    for name, value in weights(online).items():
        torch.testing.assert_close(weights(cached)[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", [k for k, cls in DRAFTERS.items() if issubclass(cls, TrainableDrafter)])
def test_every_drafter_sees_the_same(kind: str, recipe: TrainConfig, target: Target) -> None:
    """Padding has no features in the cache, so no drafter may look at it."""
    recipe = replace(recipe, kind=kind, drafter={})
    cache_features(recipe, str(recipe.features))
    cls: Any = DRAFTERS[kind]
    torch.manual_seed(0)
    drafter = cls(cls.config_class(), target)
    target.capture(drafter.feature_layers)
    longest_first = sorted(read_sequences(recipe, target)[0], key=lambda s: -len(s.ids))
    problems = make_problems(longest_first[::5], 6, drafter.proposed_labels, torch.Generator().manual_seed(0))
    results = []
    for cached in (None, opened(recipe, target, *drafter.feature_layers)):
        torch.manual_seed(1)  # drafters may draw noise
        loss, metrics = problem_loss(target, drafter, problems, cached)
        results.append({"loss": float(loss.detach()), **{k: float(v) for k, v in metrics.items()}})
    assert results[1] == pytest.approx(results[0], rel=1e-4, abs=1e-4)


def test_features_of_padded_batches(recipe: TrainConfig, target: Target, folder: Path) -> None:
    cached = opened(recipe, target)
    train_set, held_set = read_sequences(recipe, target)
    target.capture([LAST])
    for group in (train_set[:3], train_set[3:10], held_set):
        ids = torch.zeros(len(group), max(len(s.ids) for s in group), dtype=torch.long)
        for i, s in enumerate(group):
            ids[i, : len(s.ids)] = torch.tensor(s.ids)
        with torch.no_grad():
            _, want = target.forward(ids, use_cache=False)
        got = cached.read(ids)
        assert got.dtype == target.dtype
        for i, s in enumerate(group):
            torch.testing.assert_close(got[i, : len(s.ids)], want[i, : len(s.ids)], rtol=1e-4, atol=1e-5)
            assert not got[i, len(s.ids) :].any()


def test_some_of_the_layers(recipe: TrainConfig, target: Target) -> None:
    """One folder serves drafters that read different layers."""
    wide = replace(recipe, drafter={**recipe.drafter, "feature_layers": [1, 2, LAST]})
    cache_features(wide, str(recipe.features))
    ids = torch.tensor([read_sequences(recipe, target)[0][0].ids])
    parts = opened(recipe, target, 1, 2, LAST).read(ids).split(target.hidden_size, -1)
    for layers, want in (((LAST,), parts[2:]), ((1, LAST), (parts[0], parts[2])), ((2, 1), (parts[1], parts[0]))):
        assert torch.equal(opened(recipe, target, *layers).read(ids), torch.cat(want, -1))
    train(recipe)


def test_shards_hold_what_they_say(recipe: TrainConfig, target: Target, folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    assert index["layers"] == [LAST] and index["dtype"] == "float32" and index["max_tokens"] == recipe.max_tokens
    stored = []
    for shard in index["shards"]:
        tensors = load_file(folder / shard["name"])
        offsets = tensors["offsets"].tolist()
        assert tensors["features"].shape == (offsets[-1], target.hidden_size)
        for start, end in pairwise(offsets):
            ids, mask = tensors["token_ids"][start:end].tolist(), tensors["mask"][start:end].tolist()
            stored.append(Sequence(ids, mask))
    sequences = [s for part in read_sequences(recipe, target) for s in part]
    assert {tuple(s.ids) for s in stored} == {tuple(s.ids) for s in sequences}
    assert len(stored) == index["sequences"] < len(sequences)  # each text once
    assert all(s in sequences for s in stored)


def test_texts_that_differ_in_trailing_zeros() -> None:
    short, long, other = (Sequence(ids, [1] * len(ids)) for ids in ([5, 6], [5, 6, 0, 0], [5, 6, 0, 7]))
    assert features._distinct([short, long, short, other]) == [long, other]
    assert features._distinct([long, short, other]) == [long, other]


def test_a_run_may_go_on_without_its_features(recipe: TrainConfig, folder: Path) -> None:
    train(replace(recipe, steps=3))
    shutil.rmtree(folder)
    train(replace(recipe, features=None))
    assert [row["step"] for row in history(Path(recipe.output))] == [3, 6]


# ---------------------------------------------------------------- damage


def flipped(path: Path, tensor: str) -> None:
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8 : 8 + length])[tensor]["data_offsets"]
    content[8 + length + (start + end) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-100]),
    "cut in the header": lambda p: p.write_bytes(p.read_bytes()[:50]),
    "empty": lambda p: p.write_bytes(b""),
    "missing": Path.unlink,
    "foreign": lambda p: p.write_text("my notes" * 100),
    "a neighbour's": lambda p: shutil.copy(p.with_name("hs_00000.safetensors"), p),
    "wrong features": lambda p: flipped(p, "features"),
    "wrong tokens": lambda p: flipped(p, "token_ids"),
    "wrong offsets": lambda p: flipped(p, "offsets"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_shards(
    damage: str, recipe: TrainConfig, target: Target, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = opened(recipe, target)
    sequences = [s for part in read_sequences(recipe, target) for s in part]
    bad = folder / "hs_00001.safetensors"
    before = bad.read_bytes()
    DAMAGES[damage](bad)
    message = refused(train, recipe)
    assert str(bad) in message and "cannot be used" in message and "skip_bad_shards" in message
    lost = [s for s in sequences if whole._where[features._key(s.ids)][0] == bad]
    skipping = replace(recipe, skip_bad_shards=True, output=recipe.output + "2")
    kept = opened(skipping, target).available(sequences, "")
    assert len(lost) > 0 and len(kept) >= len(sequences) - len(lost) and not any(s in lost for s in kept)
    train(skipping)
    assert "skipped  1 bad shards: hs_00001.safetensors" in " ".join(capsys.readouterr().err.split(" "))
    cache_features(recipe, folder)
    assert bad.read_bytes() == before
    train(recipe)


def test_too_many_bad_shards(recipe: TrainConfig, folder: Path) -> None:
    for path in folder.glob("hs_*"):
        path.write_bytes(b"")
    assert "0 sequences in good shards, fewer than one batch" in refused(train, replace(recipe, skip_bad_shards=True))


def test_damaged_index(recipe: TrainConfig, folder: Path) -> None:
    whole = (folder / "index.json").read_text()
    changes = [whole.replace('"name"', '"nane"'), whole.replace('"layers": [', '"layers": 5, "x": [')]
    changes += [whole.replace('"shards"', '"shards": ["a"], "x"')]
    for content in ("{", "[]", "{}", "[" * 9999, *changes):
        assert content != whole
        (folder / "index.json").write_text(content)
        for work in ((train, recipe), (cache_features, recipe, folder)):
            message = refused(*work)
            assert "index.json'" in message and "run cache-features into another folder" in message


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("at", [0, 1, 2])
def test_resuming_after_a_kill(
    at: int, recipe: TrainConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished shards are not computed again, and all are the same in the end."""
    again = tmp_path / "again"
    real, saved = features.write_file, []

    def save(path: Path, write: Callable[[Path], object]) -> None:
        if len(saved) == at:
            path.with_name(f".{path.name}.writing").write_bytes(b"half")
            raise Killed
        saved.append(path.name)
        real(path, write)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(features, "write_file", save)
        cache_features(recipe, again)
    assert sorted(p.name for p in again.glob("hs_*")) == saved == [f"hs_{i:05}.safetensors" for i in range(at)]
    times = {p: p.stat().st_mtime_ns for p in again.glob("hs_*")}
    cache_features(recipe, again)
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert all(p.stat().st_mtime_ns == time for p, time in times.items())


def test_a_finished_folder_is_left_alone(
    recipe: TrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(features, "write_file", lambda *args: pytest.fail("written again"))
    capsys.readouterr()
    cache_features(recipe, folder)
    assert "0.0 MB will be written" in " ".join(capsys.readouterr().err.split())


def test_other_folders_are_not_touched(recipe: TrainConfig, folder: Path, data: Path, tmp_path: Path) -> None:
    changed = replace(recipe, max_tokens=9)
    assert "(max_tokens, data differ)" in refused(cache_features, changed, folder)
    assert "(dtype differ)" in refused(cache_features, replace(recipe, dtype="bfloat16"), folder)
    other = replace(recipe, target=str(build_target(tmp_path / "other", seed=5)))
    assert "(target differ)" in refused(cache_features, other, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("precious")
    assert "does not come from cache-features" in refused(cache_features, recipe, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes"]


def test_features_that_do_not_fit(recipe: TrainConfig, folder: Path, data: Path, tmp_path: Path) -> None:
    assert "no index.json" in refused(train, replace(recipe, features=str(tmp_path / "nowhere")))
    assert "max_tokens 512 instead of 9" in refused(train, replace(recipe, max_tokens=9))
    assert "dtype float32 instead of bfloat16" in refused(train, replace(recipe, dtype="bfloat16"))
    layers = {**recipe.drafter, "feature_layers": [1, LAST]}
    assert "layers [-1] without 1" in refused(train, replace(recipe, drafter=layers))
    other = replace(recipe, target=str(build_target(tmp_path / "other", seed=5)))
    assert "another target, 'tiny'" in refused(train, other)
    more = tmp_path / "more.jsonl"
    more.write_text(data.read_text() + '{"id": "x", "prompt_ids": [5, 6], "answer_ids": [7, 8, 9]}\n')
    assert "lacks the features of 1 of" in refused(train, replace(recipe, data=[str(more)]))
    assert not list(Path(recipe.output).parent.glob("drafter*"))


# ---------------------------------------------------------------- disk and command


def test_the_estimate_is_what_is_written(
    recipe: TrainConfig, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    cache_features(recipe, tmp_path / "again")
    said = " ".join(capsys.readouterr().err.split())
    written = sum(p.stat().st_size for p in folder.glob("hs_*"))
    estimate = float(said.split(" MB will be written")[0].split()[-1]) * 1e6
    assert written - 0.05e6 <= estimate <= 1.05 * written + 0.05e6
    target = Target.load(str(recipe.target), device="cpu")
    shards = features._split(features._distinct(s for part in read_sequences(recipe, target) for s in part), 256)
    assert written <= features._bytes(shards, 256) <= written + 300 * len(shards)


def test_a_disk_that_is_too_small(recipe: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**6, 0, 100_000))
    message = refused(cache_features, recipe, str(recipe.features))
    assert "more than half of the 0.1 MB that are free" in message and "--yes" in message
    assert list(tmp_path.iterdir()) == []
    cache_features(recipe, str(recipe.features), yes=True)
    train(recipe)


def test_the_command(recipe: TrainConfig, tmp_path: Path) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({**asdict(recipe), "features": None}))
    result = CliRunner().invoke(app, ["cache-features", "--config", str(path)])
    assert result.exit_code == 2 and "--output" in result.stderr
    result = CliRunner().invoke(app, ["cache-features", "--config", str(path), "--output", str(out)])
    assert result.exit_code == 0, result.stderr
    assert f"Features: {out}" in result.stdout.replace("\n", "") and (out / "hs_00000.safetensors").exists()
    result = CliRunner().invoke(app, ["train", "--config", str(path), "--set", f"features={out}"])
    assert result.exit_code == 0, result.stderr
    assert len(history(Path(recipe.output))) == 2


@pytest.mark.parametrize("change", [{"kind": "none"}, {"drafter": {"slotz": 3}}, {"data": ["nowhere.jsonl"]}])
def test_impossible_recipes(change: dict[str, Any], recipe: TrainConfig) -> None:
    refused(cache_features, replace(recipe, **change), str(recipe.features))
    assert not Path(str(recipe.features)).exists()
