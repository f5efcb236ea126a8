"""Drafter folders: what is saved comes back; what does not belong is refused in one sentence."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import build_drafter, build_target
from ctc_drafter.drafters import (
    EMBEDDED_DRAFTERS,
    NAMES,
    CTCConfig,
    CTCDrafter,
    NoDrafter,
    drafter_folder,
    folder_argument,
    load_drafter,
)
from ctc_drafter.errors import UserError
from ctc_drafter.inspection import inspect_path
from ctc_drafter.integrations.transformers import custom_generate
from ctc_drafter.target import EMBEDDED, Target
from helpers import save_model


def drafts(drafter: Any) -> torch.Tensor:
    torch.manual_seed(5)
    drafter.start(8)
    width = drafter.target.hidden_size * len(drafter.feature_layers)
    with torch.no_grad():
        tree = drafter.tree(drafter.draft(torch.randn(1, 8, width), torch.arange(8)[None]), 9)
    return torch.cat([tree.tokens, tree.parents, tree.depths])


@pytest.mark.parametrize(
    "config", [{}, {"topology": "merge", "tree": "paths"}, {"layers": 2, "feature_layers": [1, 2]}, {"vocabulary": 50}]
)
def test_round_trip(config: dict[str, Any], target: Target, tmp_path: Path) -> None:
    torch.manual_seed(3)
    fresh = CTCDrafter(CTCConfig(slots=5, labels=4, **config), target)
    with torch.no_grad():
        for p in fresh.parameters():
            p.normal_()
    fresh.fit_vocabulary(torch.randint(0, 99, (target.vocab_size,)))
    fresh.save_pretrained(tmp_path / "d", {"note": 1})
    fresh.prepare()
    loaded = load_drafter(str(tmp_path / "d"), target, dtype="float32")
    assert isinstance(loaded, CTCDrafter) and loaded.name == "d"
    assert loaded.config == fresh.config and loaded.feature_layers == fresh.feature_layers
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for name, value in fresh.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert torch.equal(drafts(loaded), drafts(fresh))


def test_weights_from_before_slot_layers_mean_zeros(copy: Path, target: Target) -> None:
    """They draft as they did; but one of the matrices alone missing is damage."""
    whole = load_file(copy / "model.safetensors")
    own = sorted(name for name in whole if ".slot_layers." in name)
    edit(copy, lambda c: c.pop("weights_sha256"))
    save_file(
        {name: torch.zeros_like(w) if name in own else w for name, w in whole.items()}, copy / "model.safetensors"
    )
    want = drafts(load_drafter(str(copy), target))
    save_file({name: w for name, w in whole.items() if name not in own}, copy / "model.safetensors")
    assert own and torch.equal(drafts(load_drafter(str(copy), target)), want)
    save_file({name: w for name, w in whole.items() if name != own[0]}, copy / "model.safetensors")
    assert own[0] in refused(copy, target)


def test_config_follows_the_convention(drafter_folder: Path, target: Target) -> None:
    config = json.loads((drafter_folder / "config.json").read_text())
    assert config["speculators_model_type"] == "ctc" and config["architectures"] == ["CTCDrafter"]
    spec = config["speculators_config"]
    assert spec["algorithm"] == "ctc"
    assert spec["proposal_methods"] == [{"proposal_type": "greedy", "speculative_tokens": 4}]
    verifier = spec["verifier"]
    assert (verifier["name_or_path"], verifier["architectures"]) == ("tiny", ["LlamaForCausalLM"])
    assert (verifier["hidden_size"], verifier["vocab_size"]) == (target.hidden_size, target.vocab_size)


def test_targets_own_weights_are_not_stored(drafter_folder: Path, target: Target) -> None:
    tensors = load_file(drafter_folder / "model.safetensors").values()
    shapes = [t.shape for t in tensors if t.is_floating_point()]
    assert all(target.vocab_size not in shape for shape in shapes)


def test_same_target_in_another_precision(drafter_folder: Path, target_folder: Path) -> None:
    load_drafter(str(drafter_folder), Target.load(target_folder, dtype="bf16", device="cpu"))


def test_none() -> None:
    assert isinstance(load_drafter("none", None), NoDrafter)  # type: ignore[arg-type]


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", [*NAMES, "mine", "runs/ctc"])
def test_a_folder_has_an_argument_that_chooses_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert drafter_folder(folder_argument(Path(name))).resolve() == (tmp_path / name).resolve()
    assert folder_argument(Path(name)) not in NAMES
    assert custom_generate(Path(name)).drafter == folder_argument(name)  # not that of the embedded drafter


@pytest.mark.parametrize("name", EMBEDDED_DRAFTERS)
def test_a_name_of_two_drafters_is_refused(
    name: str, drafter_folder: Path, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads it: one would measure ours, another look into the folder."""
    monkeypatch.chdir(tmp_path)
    embedded = Target.load(dtype="float32", device="cpu")
    assert load_drafter(name, embedded).name == name
    (tmp_path / name).mkdir()
    assert load_drafter(name, embedded).name == name  # of an empty folder nothing can be meant
    assert inspect_path(name, Target.load)["path"] == str(EMBEDDED / name)
    shutil.copytree(drafter_folder, tmp_path / name, dirs_exist_ok=True)
    for read in (
        lambda: load_drafter(name, embedded),
        lambda: load_drafter(f"{name}+lookup", embedded),
        lambda: inspect_path(name, Target.load),
    ):
        with pytest.raises(UserError, match=f"give './{name}' for the folder"):
            read()
    assert load_drafter(f"./{name}", target).num_parameters == load_drafter(str(drafter_folder), target).num_parameters
    assert inspect_path(f"./{name}", Target.load)["target"]["name_or_path"] == "tiny"
    assert load_drafter(None, embedded).name == "ctc+lookup"  # whoever names nothing means ours


def test_the_embedded_drafters_can_be_named_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EMBEDDED)
    assert drafter_folder("ctc").samefile("ctc")


# ---------------------------------------------------------------- refusals


def refused(folder: Path | str, target: Target) -> str:
    with pytest.raises(UserError) as error:
        load_drafter(str(folder), target)
    message = str(error.value)
    assert "\n" not in message and "Traceback" not in message
    return message


@pytest.fixture
def copy(drafter_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drafter_folder, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def test_no_such_drafter(target: Target) -> None:
    assert "There is no drafter 'nowhere'" in refused("nowhere", target)


def test_other_weights(drafter_folder: Path, tmp_path: Path) -> None:
    other = Target.load(build_target(tmp_path / "other", seed=1), dtype="float32", device="cpu")
    assert "weights differ" in refused(drafter_folder, other)


def test_other_sizes(drafter_folder: Path, target: Target, tmp_path: Path) -> None:
    small = Target.load(save_model(tmp_path / "a", "llama"), dtype="float32", device="cpu")
    assert "hidden_size 64" in refused(drafter_folder, small)
    vocabulary = Target.load(save_model(tmp_path / "b", "llama", hidden_size=64), dtype="float32", device="cpu")
    assert f"vocab_size {target.vocab_size}" in refused(drafter_folder, vocabulary)


def test_target_folder_as_drafter(target_folder: Path, target: Target) -> None:
    assert "not a ctc-drafter checkpoint" in refused(target_folder, target)


def test_missing_config(copy: Path, target: Target) -> None:
    (copy / "config.json").unlink()
    assert "no config.json" in refused(copy, target)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"speculators_model_type": "ctc"}', "\xff", "[" * 9999])
def test_broken_config(text: str, copy: Path, target: Target) -> None:
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    assert "not a ctc-drafter checkpoint" in refused(copy, target)


@pytest.mark.parametrize("part", ["verifier", "drafter"])
def test_config_with_a_part_of_the_wrong_type(part: str, copy: Path, target: Target) -> None:
    def change(content: dict[str, Any]) -> None:
        (content["speculators_config"] if part == "verifier" else content)[part] = "text"

    edit(copy, change)
    refused(copy, target)


def test_unknown_kind(copy: Path, target: Target) -> None:
    edit(copy, lambda c: c.update(speculators_model_type="oracle"))
    assert "unknown kind 'oracle'" in refused(copy, target)


def test_kind_without_weights(copy: Path, target: Target) -> None:
    edit(copy, lambda c: c.update(speculators_model_type="none"))
    refused(copy, target)


def test_unknown_field(copy: Path, target: Target) -> None:
    edit(copy, lambda c: c["drafter"].update(colour="red"))
    assert "unknown key 'colour'" in refused(copy, target)


def test_impossible_field(copy: Path, target: Target) -> None:
    edit(copy, lambda c: c["drafter"].update(slots=0))
    assert "slots" in refused(copy, target)


ABSURD = [("ctc", "slots"), ("ctc", "layers"), ("medusa", "slots"), ("parallel", "slots"), ("hydra", "steps")]
ABSURD += [("hydra", "layers"), ("eagle", "intermediate_size"), ("ctc", "context_rank")]


@pytest.mark.parametrize("size", [10**8, 10**12, 10**30])
@pytest.mark.parametrize(("kind", "name"), ABSURD)
def test_sizes_that_no_memory_holds(kind: str, name: str, size: int, target: Target, tmp_path: Path) -> None:
    folder = build_drafter(tmp_path / kind, target, kind)
    both = kind in ("medusa", "parallel")  # without blanks every slot is a label
    edit(folder, lambda c: c["drafter"].update({name: size, **({"labels": size} if both else {})}))
    assert "describes a drafter that cannot be built" in refused(folder, target)


def test_probes_of_the_wrong_type(copy: Path, target: Target) -> None:
    for probe in (5, ["a"], [[1]], [10**400]):
        edit(copy, lambda c, probe=probe: c["speculators_config"]["verifier"].update(probe=probe))  # type: ignore[misc]
        assert "not a ctc-drafter checkpoint" in refused(copy, target)


def test_feature_layer_that_the_target_lacks(copy: Path, target: Target) -> None:
    edit(copy, lambda c: c["drafter"].update(feature_layers=[7]))
    assert "no feature layer 7" in refused(copy, target)


def test_missing_weights(copy: Path, target: Target) -> None:
    (copy / "model.safetensors").unlink()
    assert "model.safetensors" in refused(copy, target)


def test_cut_weights(copy: Path, target: Target) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in refused(copy, target)


@pytest.mark.parametrize("change", ["drop", "reshape"])
def test_other_weights_than_the_config_says(change: str, copy: Path, target: Target) -> None:
    tensors = load_file(copy / "model.safetensors")
    if change == "drop":
        del tensors["blank"]
    else:
        tensors["blank"] = torch.zeros(1, 3)
    save_file(tensors, copy / "model.safetensors")
    assert "blank" in refused(copy, target)


def test_weights_that_are_not_numbers(copy: Path, target: Target) -> None:
    weights = copy / "model.safetensors"
    save_file({**load_file(weights), "blank": torch.full((1, target.hidden_size), torch.nan)}, weights)
    assert "blank holds numbers that are not finite" in refused(copy, target)


@pytest.mark.parametrize("kept", [[3, 2], [1, 1], [-1, 2], [5, 10**6]])
def test_kept_tokens_that_are_none(kept: list[int], target: Target, tmp_path: Path) -> None:
    build_drafter(tmp_path / "d", target, vocabulary=2)
    weights = tmp_path / "d" / "model.safetensors"
    save_file({**load_file(weights), "kept": torch.tensor(kept)}, weights)
    assert "kept does not name tokens of the target" in refused(tmp_path / "d", target)


def test_a_flipped_bit_is_noticed(copy: Path, target: Target) -> None:
    """A weight that is a little off, which nothing else could tell."""
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    assert "not the file that config.json was written with" in refused(copy, target)
    edit(copy, lambda c: c.pop("weights_sha256"))
    load_drafter(str(copy), target)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_pickle_is_opened(copy: Path, target: Target, tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "model.pt"):
        (copy / name).write_bytes(pickle.dumps(Canary(tmp_path / "opened")))
    refused(copy, target)
    assert not (tmp_path / "opened").exists()


def test_full_disk_keeps_the_old_checkpoint(copy: Path, target: Target) -> None:
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="could not be written"):
            CTCDrafter(CTCConfig(slots=5, labels=4), target).save_pretrained(copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


def test_saving_again_leaves_nothing_behind(target: Target, tmp_path: Path) -> None:
    build_drafter(tmp_path / "d", target)
    build_drafter(tmp_path / "d", target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["config.json", "model.safetensors"]
