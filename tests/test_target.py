"""The target: every family that can score a tree does it right; every one that cannot is refused in words."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from conftest import build_target
from ctc_drafter.drafters import NoDrafter
from ctc_drafter.errors import UserError
from ctc_drafter.target import LAST, Target, stop_ids
from ctc_drafter.target.selftest import self_test
from ctc_drafter.tree import DraftTree
from helpers import CAPABLE, CONTEXT, INCAPABLE, Scripted, chain, equal_siblings, plain, random_tree, run, save_model

PROMPT = [5, 9, 260, 31, 7, 7, 118, 40, 22, 3, 250]


@pytest.fixture(scope="module", params=CAPABLE)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = save_model(tmp_path_factory.mktemp("families") / request.param, request.param, **CAPABLE[request.param])
    return Target.load(folder, dtype="float32", device="cpu")


def scored_tree(target: Target, prompt: list[int], root: int, tree: DraftTree) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        cache = target.new_cache(CONTEXT)
        target.prefill(prompt, cache)
        return target.score(torch.tensor([[root]]), tree, tree.ancestor_mask(), cache)


def test_tree_scores_are_branch_scores(family: Target) -> None:
    """Longer than the self-test, with any topology: at each node the model's own logits for that branch."""
    tree = random_tree(Scripted(random_tree, [], list(range(50, 80)), family.vocab_size), 0, 12)
    family.capture((LAST, 1))
    logits, features = scored_tree(family, PROMPT, 77, tree)
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    for node in range(-1, 12):
        branch, i = [], node
        while i >= 0:
            branch.insert(0, tokens[i])
            i = parents[i]
        with torch.inference_mode():
            want, seen = family.forward(torch.tensor([[*PROMPT, 77, *branch]]), use_cache=False)
        torch.testing.assert_close(logits[0, node + 1], want[0, -1], rtol=1e-3, atol=1e-3 * float(want.std()))
        torch.testing.assert_close(features[0, node + 1], seen[0, -1], rtol=1e-3, atol=1e-3 * float(seen.std()))
    assert features.shape[-1] == 2 * family.hidden_size
    family.capture(())


@pytest.mark.parametrize("chunk", [1, 4, 10])
def test_a_prompt_read_in_chunks_is_the_prompt_read_whole(family: Target, chunk: int) -> None:
    family.capture((1, LAST))
    read: list[int] = []
    with torch.inference_mode():
        whole, parts = family.new_cache(CONTEXT), family.new_cache(CONTEXT)
        want = family.prefill(PROMPT, whole)
        got = family.prefill(PROMPT, parts, chunk=chunk, on_read=read.append)
    family.capture(())
    for a, b in zip((*got, *parts._planes), (*want, *whole._planes)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    assert read == [*range(chunk, len(PROMPT), chunk), len(PROMPT)]
    assert parts.lengths == whole.lengths == [len(PROMPT)]


def test_decoding_is_the_models_own(family: Target) -> None:
    want = plain(family, PROMPT, 24)
    assert run(family, NoDrafter(), PROMPT, 24)[0] == want
    for build in (random_tree, equal_siblings):
        drafter = Scripted(build, PROMPT, want, family.vocab_size)
        assert run(family, drafter, PROMPT, 24, budget=8)[0] == want


def test_rows_of_a_batch_score_as_alone(family: Target) -> None:
    """Ragged rows, one of them longer than any window: the numbers of each are those of a cache of its own."""
    prompts = [[5], PROMPT, [9, 31, 7]]
    script = Scripted(random_tree, [], list(range(50, 80)), family.vocab_size)
    trees = [random_tree(script, 0, size) for size in (7, 4, 0)]
    family.capture((LAST, 1))
    alone = [scored_tree(family, prompt, 77 + i, tree) for i, (prompt, tree) in enumerate(zip(prompts, trees))]
    tree = DraftTree.stack(trees)
    with torch.inference_mode():
        cache = family.new_cache(CONTEXT)
        for i, prompt in enumerate(prompts):
            family.prefill(prompt, cache, i and cache.claim(CONTEXT))
        together = family.score(torch.tensor([[77], [78], [79]]), tree, tree.ancestor_mask(), cache)
    for i, (own, pair) in enumerate(zip(trees, alone)):
        for got, want in zip(together, pair):
            mine = got[i : i + 1, : own.budget + 1]
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4 * float(want.std()))
    family.capture(())


def one_sentence(text: str) -> None:
    assert "\n" not in text and "Traceback" not in text and len(text) < 600


@pytest.mark.parametrize("kind", INCAPABLE)
def test_other_families_are_refused(kind: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / kind, kind, **INCAPABLE[kind])
    with pytest.raises(UserError, match="can only be used by its own generate") as error:
        Target.load(folder, device="cpu")
    one_sentence(str(error.value))


def test_self_test_notices_a_wrong_mask(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal mask over the packed nodes, which lets siblings see each other, must not pass."""

    def causal(self: DraftTree) -> torch.Tensor:
        return torch.ones(1, self.budget + 1, self.budget + 1, dtype=torch.bool).tril()

    monkeypatch.setattr(DraftTree, "ancestor_mask", causal)
    with pytest.raises(UserError, match="differently from its branches"):
        self_test(target)


def test_self_test_notices_wrong_positions(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_slot(self: DraftTree) -> torch.Tensor:
        return torch.arange(self.budget + 1)[None]

    monkeypatch.setattr(DraftTree, "offsets", by_slot)
    with pytest.raises(UserError, match="differently from its branches"):
        self_test(target)


def test_self_test_notices_a_window_that_is_ignored(tmp_path: Path) -> None:
    target = Target.load(save_model(tmp_path / "m", "mistral", sliding_window=6), dtype="float32", device="cpu")
    target._windows = {"full_attention": None}
    with pytest.raises(UserError, match="differently from its branches"):
        self_test(target)


def test_bfloat16_passes_the_self_test(target_folder: Path) -> None:
    assert Target.load(target_folder, dtype="bf16", device="cpu").dtype == torch.bfloat16


# ---------------------------------------------------------------- features


def test_captured_layers(target: Target) -> None:
    ids = torch.tensor([[5, 9, 31, 7]])
    with torch.no_grad():
        want = target.model(ids, output_hidden_states=True)
        target.capture((1, LAST))
        logits, features = target.forward(ids)
        target.capture(())
        assert target.forward(ids)[1].shape == (1, 4, 0)
    assert torch.equal(logits, want.logits)
    assert torch.equal(features, torch.cat([want.hidden_states[1], want.hidden_states[-1]], -1))


def test_missing_feature_layer(target: Target) -> None:
    target.capture((LAST,))
    with pytest.raises(UserError, match=r"layers 1\.\.2, so no feature layer 3"):
        target.capture((1, 3))
    with torch.no_grad():
        assert target.forward(torch.tensor([[5, 9]]))[1].shape == (1, 2, target.hidden_size)
    target.capture(())


def test_last_layer_needs_no_layer_list(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "num_layers", 77)
    target.capture((LAST,))
    with pytest.raises(UserError, match="use the last layer only"):
        target.capture((1,))
    target.capture(())


# ---------------------------------------------------------------- loading


def refuse(path: Any, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as error:
        Target.load(path, **{"device": "cpu", **options})
    one_sentence(str(error.value))


def copy_with(folder: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


def test_no_such_folder(tmp_path: Path, target_folder: Path) -> None:
    refuse(tmp_path / "nowhere", "There is no model folder")
    refuse("./nowhere", "There is no model folder")
    refuse(target_folder / "config.json", "There is no model folder")


def test_folder_without_config(tmp_path: Path) -> None:
    refuse(tmp_path, "no config.json")


def test_broken_config(target_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(target_folder, tmp_path / "t")
    for text, match in (
        ("{", "not valid JSON"),
        ("5", "no JSON object"),
        ("null", "no JSON object"),
        ("[" * 9999, "nested"),
    ):
        (tmp_path / "t" / "config.json").write_text(text)
        refuse(tmp_path / "t", match)


def test_stop_tokens_that_only_the_generation_config_names(target_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(target_folder, tmp_path / "t"))
    path = folder / "generation_config.json"
    path.write_text('{"eos_token_id": [7, 9]}')
    assert {7, 9} <= Target.load(folder, dtype="float32", device="cpu").stop_ids
    path.write_text('{"eos_token_id": [7, ')
    refuse(folder, "generation_config.json' is not valid JSON")
    path.unlink()
    assert not {7, 9} & Target.load(folder, dtype="float32", device="cpu").stop_ids


@pytest.mark.parametrize("value", ["x", {"a": 1}, [1, "b"], [[1]], [None], 1.5, True])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_stop_tokens_that_are_none(name: str, value: Any, target_folder: Path, tmp_path: Path) -> None:
    """A string among the stop tokens would end no answer, and nobody would be told."""
    folder = Path(shutil.copytree(target_folder, tmp_path / "t"))
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, "eos_token_id": value}))
    refuse(folder, rf"{name}' has the eos_token_id .*, which must be a token id")
    (folder / name).write_text(json.dumps({**content, "eos_token_id": [7, 9]}))
    assert {7, 9} <= Target.load(folder, dtype="float32", device="cpu").stop_ids


def test_stop_tokens_of_a_model_in_memory(target: Target) -> None:
    """It has no folder that could be looked into first, and a model of a hub has none either."""
    config = LlamaConfig(eos_token_id=3)
    generation = GenerationConfig(eos_token_id=[4, 5])
    model = SimpleNamespace(config=config, generation_config=generation)
    assert stop_ids(model, target.tokenizer) == {3, 4, 5, target.tokenizer.eos_token_id}
    assert stop_ids(SimpleNamespace(config=config), None) == {3}
    generation.eos_token_id = [4, "five"]  # type: ignore[list-item]
    config.name_or_path = "org/model"
    with pytest.raises(UserError, match=r"generation_config.json of 'org/model' has the eos_token_id \[4, 'five'\]"):
        stop_ids(model, target.tokenizer)


def test_unknown_family(target_folder: Path, tmp_path: Path) -> None:
    refuse(copy_with(target_folder, tmp_path / "t", model_type="no-such-family"), "cannot be loaded")


def test_encoder_decoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    refuse(tmp_path, "cannot be loaded")


def test_damaged_weights(target_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(target_folder, tmp_path / "t")
    weights = tmp_path / "t" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refuse(tmp_path / "t", "cannot be loaded")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(value: float, target_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(target_folder, tmp_path / "t")
    weights = load_file(tmp_path / "t" / "model.safetensors")
    weights["model.norm.weight"][3] = value
    save_file(weights, tmp_path / "t" / "model.safetensors", {"format": "pt"})
    refuse(tmp_path / "t", "gives logits that are not finite")


def test_drafter_given_as_target(drafter_folder: Path) -> None:
    refuse(drafter_folder, "is a drafter, not a target")


def test_unknown_dtype_and_device(target_folder: Path) -> None:
    refuse(target_folder, "Unknown dtype 'int8'", dtype="int8")
    refuse(target_folder, "Device 'abacus' cannot be used", device="abacus")


class Canary:
    opened: Path

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_pickle_is_opened(target_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(target_folder, tmp_path / "t")
    (tmp_path / "t" / "model.safetensors").unlink()
    (tmp_path / "t" / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "opened")))
    refuse(tmp_path / "t", "cannot be loaded")
    assert not (tmp_path / "opened").exists()


def test_remote_code_is_not_run(target_folder: Path, tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    folder = copy_with(target_folder, tmp_path / "t", model_type="evil", auto_map=auto_map)
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    refuse(folder, "cannot be loaded")
    assert not (tmp_path / "ran").exists()


def test_stop_ids_are_a_set_from_all_sources(target_folder: Path, tmp_path: Path) -> None:
    folder = copy_with(target_folder, tmp_path / "t")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [17, 18]}))
    target = Target.load(folder, device="cpu")
    assert {17, 18, target.tokenizer.eos_token_id} <= target.stop_ids


def test_no_chat_template(tmp_path: Path) -> None:
    target = Target.load(build_target(tmp_path / "t", chat=False), device="cpu")
    with pytest.raises(UserError, match="chat template"):
        target.prompt_ids([{"role": "user", "content": "Hello"}])


def test_chain_of_nodes_is_plain_text(target: Target) -> None:
    logits, _ = scored_tree(target, PROMPT, 77, chain([4, 5, 6]))
    with torch.inference_mode():
        want = target.model(torch.tensor([[*PROMPT, 77, 4, 5, 6]])).logits
    torch.testing.assert_close(logits[0], want[0, -4:], rtol=1e-4, atol=1e-4)


def test_the_cache_by_its_newer_name(target_folder: Path) -> None:
    """As in transformers 5.24, which calls the argument `cache`."""
    model = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    own = model.forward

    def forward(input_ids: torch.Tensor, cache: Any = None, **options: Any) -> Any:
        return own(input_ids, past_key_values=cache, **options)

    model.forward = forward
    target = Target.of(model, None, "newer")
    tokens, _ = run(target, NoDrafter(), PROMPT, 12)
    assert tokens == plain(Target.load(target_folder, dtype="float32", device="cpu"), PROMPT, 12)
