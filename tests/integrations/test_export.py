"""`ctc-drafter export`: a folder that transformers runs in a process of its own, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from conftest import TEXTS, build_drafter
from ctc_drafter.cli import app
from ctc_drafter.drafters import load_drafter
from ctc_drafter.target import Target

SCRIPT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextIteratorStreamer

target, folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(target)
model = AutoModelForCausalLM.from_pretrained(target).float()
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
drafted = {"custom_generate": folder, "trust_remote_code": True}
greedy = {"max_new_tokens": 24, "do_sample": False}
want = model.generate(**inputs, **greedy)
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
got = model.generate(**inputs, **greedy, **drafted, budget=4, streamer=streamer)
assert want.tolist() == got.tolist()
new = want[0, inputs["input_ids"].shape[1] :]
assert "".join(streamer) == tokenizer.decode(new)
texts = [tokenizer.decode(new[i : i + 2]) for i in range(3, 20)]
stop = next(text for text in texts if "\\ufffd" not in text)
stopped = model.generate(**inputs, **greedy, stop_strings=[stop], tokenizer=tokenizer)
config = GenerationConfig(stop_strings=[stop], **greedy)
for options in ({"stop_strings": [stop], **greedy}, {"generation_config": config}):
    got = model.generate(**inputs, **options, **drafted, drafter=folder, tokenizer=tokenizer)
    assert stopped.tolist() == got.tolist() and got.shape[1] < want.shape[1]
print("same")
"""


def run_export(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["export", *map(str, args)])
    return result.exit_code, result.stdout if result.exit_code == 0 else result.stderr


def test_transformers_uses_the_folder(target_folder: Path, drafter_folder: Path, tmp_path: Path) -> None:
    code, text = run_export(drafter_folder, "--to", "transformers", "--output", tmp_path / "made" / "here")
    assert code == 0 and "custom_generate" in text
    folder = shutil.move(tmp_path / "made" / "here", tmp_path / "moved-1.5")  # a folder knows no place
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(target_folder), str(folder), TEXTS[0]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("to", ["transformers", "speculators", "vllm"])
def test_an_export_is_a_drafter(to: str, target: Target, drafter_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text = run_export(drafter_folder, "--to", to, "--output", out)
    assert code == 0 and (to != "speculators" or "not tried" in text)
    assert load_drafter(str(out), target).num_parameters == load_drafter(str(drafter_folder), target).num_parameters
    content = json.loads((out / "config.json").read_text())
    assert {"speculators_model_type", "architectures", "speculators_config"} <= content.keys()
    wanted = {"algorithm", "proposal_methods", "default_proposal_method", "verifier"}
    assert wanted <= content["speculators_config"].keys()
    assert {"name_or_path", "architectures"} <= content["speculators_config"]["verifier"].keys()
    assert "tiny" in (out / "README.md").read_text()
    for other in ("transformers", "speculators", "vllm"):
        assert run_export(drafter_folder, "--to", other, "--output", out, "--overwrite")[0] == 0


def test_vllm_is_told_where_the_drafter_is(drafter_folder: Path, tmp_path: Path) -> None:
    code, text = run_export(drafter_folder, "--to", "vllm", "--output", tmp_path / "out")
    assert code == 0 and "vllm serve TARGET --config" in text
    config = yaml.safe_load((tmp_path / "out" / "vllm.yaml").read_text())
    assert config["additional-config"] == {"ctc_drafter": {"drafter": str(tmp_path / "out")}}
    assert config["speculative-config"]["num_speculative_tokens"] == 4
    module, name = config["speculative-config"]["model"].rsplit(".", 1)
    assert callable(getattr(import_module(module), name))
    page = (tmp_path / "out" / "README.md").read_text()
    assert all(json.dumps(part) in page for part in config.values())


def test_what_is_refused(target: Target, target_folder: Path, drafter_folder: Path, tmp_path: Path) -> None:
    mine, file, damaged = tmp_path / "mine", tmp_path / "file", Path(shutil.copytree(drafter_folder, tmp_path / "d"))
    other = Path(shutil.copytree(drafter_folder, tmp_path / "other"))
    told, more = Path(shutil.copytree(drafter_folder, tmp_path / "told")), tmp_path / "more"
    (told / "README.md").write_text("# A drafter for my thesis\n\nDo not lose it.\n")
    run_export(drafter_folder, "--to", "vllm", "--output", more)
    (more / "run.yaml").write_text("recipe: {}\n")
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    file.write_text("x")
    (damaged / "model.safetensors").write_bytes(b"")
    out = tmp_path / "out"
    cases: list[tuple[tuple[object, ...], str]] = [
        ((build_drafter(tmp_path / "eagle", target, "eagle"), "--to", "vllm", "--output", out), "cannot run in vLLM"),
        ((drafter_folder, "--to", "elsewhere", "--output", out), "transformers, speculators, vllm"),
        ((target_folder, "--to", "transformers", "--output", out), "not a drafter"),
        ((damaged, "--to", "transformers", "--output", out), "damaged"),
        ((tmp_path / "no", "--to", "transformers", "--output", out), "no file or folder"),
        ((drafter_folder, "--to", "transformers", "--output", mine), "exists already"),
        ((drafter_folder, "--to", "transformers", "--output", mine, "--overwrite"), "not an earlier export"),
        ((drafter_folder, "--to", "transformers", "--output", file, "--overwrite"), "not an earlier export"),
        ((drafter_folder, "--to", "transformers", "--output", target_folder, "--overwrite"), "not an earlier export"),
        ((drafter_folder, "--to", "transformers", "--output", other, "--overwrite"), "not an earlier export"),
        ((drafter_folder, "--to", "transformers", "--output", told, "--overwrite"), "not an earlier export"),
        ((drafter_folder, "--to", "transformers", "--output", more, "--overwrite"), "not an earlier export"),
        ((drafter_folder, "--to", "transformers", "--output", drafter_folder, "--overwrite"), "itself"),
        ((drafter_folder, "--to", "transformers", "--output", drafter_folder.parent, "--overwrite"), "itself"),
    ]
    for args, words in cases:
        code, text = run_export(*args)
        assert code == 2 and words in text and text.count("\n") == 1, text
    assert (mine / "thesis.txt").exists() and "Do not lose it" in (told / "README.md").read_text()
    assert (more / "run.yaml").exists() and not out.exists()
