"""The real commands: good runs in processes of their own, bad input by the same code in this one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from conftest import build_drafter, build_target
from ctc_drafter.cli import app
from ctc_drafter.target import Target

ROW_KEYS = {"id", "category", "turn", "tokens", "steps", "seconds", "plain_seconds", "identical", "gap", "looped"}
TOTAL_KEYS = {
    *("prompts", "tokens", "tau", "acceptance_at", "tokens_per_second", "plain_tokens_per_second", "speedup"),
    *("efficiency", "identical", "looped", "split", "peak_memory_mb", "categories"),
}
PROMPT = "How many apples are left?"


def run(*args: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ctc_drafter", *map(str, args)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)


def own_answer(target: Target, ids: list[int], tokens: int) -> str:
    """What the model's own greedy `generate` of transformers says."""
    prompt = torch.tensor([ids])
    out = target.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
    return str(target.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


def refused(*args: object, stdin: str | bytes = "") -> str:
    """Run a command that must fail; returns its one sentence."""
    result = CliRunner().invoke(app, [str(a) for a in args], input=stdin)
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in lines[0], result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def pair(target_folder: Path, drafter_folder: Path) -> list[object]:
    return ["--target", target_folder, "--drafter", drafter_folder]


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": i, "category": "ab"[i % 2], "turns": ["Hello there", "And again?"][: 1 + i % 2]} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------- what works


def test_generate_prints_the_targets_own_answer(target: Target, pair: list[object]) -> None:
    ids = target.prompt_ids([{"role": "user", "content": PROMPT}])
    drafted = run("generate", PROMPT, *pair, "--max-new-tokens", 60)
    assert drafted.returncode == 0, drafted.stderr
    assert drafted.stdout == own_answer(target, ids, 60) + "\n"
    assert "tokens/s, tau" in drafted.stderr


def test_generate_reads_standard_input_and_raw_text(target: Target, pair: list[object]) -> None:
    ids = target.tokenizer("The quick")["input_ids"]
    result = run("generate", "-", *pair, "--raw", "--no-stats", "--max-new-tokens", 8, stdin="The quick")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == own_answer(target, ids, 8) + "\n"


def test_bench_writes_the_stable_keys(pair: list[object], prompt_file: Path, tmp_path: Path) -> None:
    options = ["--budget", 4, "--budget", 8, "--max-new-tokens", 12, "--json", tmp_path / "r.json"]
    result = run("bench", "--prompts", prompt_file, *pair, *options)
    assert result.returncode == 0, result.stderr
    files = sorted(tmp_path.glob("r-*.json"))
    assert len(files) == 2 and all(f"Result: {path}" in result.stdout for path in files)
    for path in files:
        content = json.loads(path.read_text())
        assert content["complete"] and content["command"].startswith("ctc-drafter bench")
        assert {"machine", "versions", "arguments", "rows", "totals"} <= set(content)
        assert set(content["totals"]) >= TOTAL_KEYS and content["arguments"]["max_new_tokens"] == 12
        assert len(content["rows"]) == 4 and all(set(row) >= ROW_KEYS for row in content["rows"])
        assert content["totals"]["identical"] == 4 and content["totals"]["prompts"] == 3


def test_bench_keeps_its_result_if_nobody_reads_the_report(
    pair: list[object], prompt_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    command = ["bench", "--prompts", prompt_file, *pair, "--max-new-tokens", 4, "--json", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "ctc_drafter", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=120) != 0
    assert json.loads(out.read_text())["complete"]


def test_demo_without_a_terminal(pair: list[object]) -> None:
    result = run("demo", *pair, "--limit", 2, "--max-new-tokens", 16, "--threads", 1)
    assert result.returncode == 0, result.stderr
    assert "2 of 2" in result.stdout and result.stderr == ""


def test_sampling_is_repeatable_by_its_seed(pair: list[object]) -> None:
    def sample(seed: int) -> str:
        options = ["--temperature", "1.0", "--seed", str(seed), "--max-new-tokens", "12", "--no-stats"]
        result = CliRunner().invoke(app, ["generate", PROMPT, *map(str, pair), *options])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert sample(1) == sample(1) != sample(2)


def test_ctrl_c_ends_at_once_and_keeps_what_is_finished(pair: list[object], tmp_path: Path) -> None:
    prompts, out = tmp_path / "many.jsonl", tmp_path / "r.json"
    prompts.write_text('{"turns": ["Hello"]}\n' * 20_000)
    command = ["bench", "--prompts", prompts, *pair, "--max-new-tokens", 8, "--json", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "ctc_drafter", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not ignored, however the tests were started
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("1/20000")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in stderr
    content = json.loads(out.read_text())
    assert content["complete"] is False and 1 <= len(content["rows"]) < 20_000


# ---------------------------------------------------------------- what is refused


def test_missing_and_foreign_folders(target_folder: Path, drafter_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a model")
    assert "nowhere" in refused("generate", PROMPT, "--target", tmp_path / "nowhere")
    assert str(tmp_path) in refused("generate", PROMPT, "--target", tmp_path)
    assert "is a drafter" in refused("generate", PROMPT, "--target", drafter_folder)
    assert "nowhere" in refused("generate", PROMPT, "--target", target_folder, "--drafter", "nowhere")
    assert str(tmp_path) in refused("generate", PROMPT, "--target", target_folder, "--drafter", tmp_path)


def test_a_drafter_of_another_target(target_folder: Path, tmp_path: Path) -> None:
    other = Target.load(build_target(tmp_path / "other", seed=5), dtype="float32", device="cpu")
    drafter = build_drafter(tmp_path / "ctc", other, context_rank=8)
    assert "was made for target" in refused("generate", PROMPT, "--target", target_folder, "--drafter", drafter)


def test_prompts_that_cannot_be_answered(pair: list[object], tmp_path: Path) -> None:
    assert "empty" in refused("generate", " ", *pair)
    assert "empty" in refused("generate", "-", *pair, stdin="\n")
    assert "UTF-8" in refused("generate", "-", *pair, stdin=b"\xff\xfe\xff")
    assert "context" in refused("generate", "word " * 300, *pair)
    assert "temperature" in refused("generate", PROMPT, *pair, "--temperature", "-1")
    plain = build_target(tmp_path / "base", chat=False)
    assert "--raw" in refused("generate", PROMPT, "--target", plain, "--drafter", "none")


def test_bench_input_and_output(pair: list[object], prompt_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"turns": ["fine"]}\n{broken\n')
    assert "line 2" in refused("bench", "--prompts", bad, *pair, "--json", out)
    assert "does not exist" in refused("bench", "--prompts", tmp_path / "no.jsonl", *pair, "--json", out)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"id": "huge", "turns": ["word " * 300]}))
    assert "'huge'" in refused("bench", "--prompts", long, *pair, "--json", out)
    assert not out.exists()
    out.write_text("mine")
    assert "exists already" in refused("bench", "--prompts", prompt_file, *pair, "--json", out)
    assert out.read_text() == "mine"
    assert ".json" in refused("bench", "--prompts", prompt_file, *pair, "--json", tmp_path / "r.txt")


def test_recipes(tmp_path: Path) -> None:
    assert "does not exist" in refused("pretrain", "--config", tmp_path / "no.yaml")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("outputs: x\n")
    for command in ("pretrain", "train", "distill"):
        assert "unknown key 'outputs'" in refused(command, "--config", recipe)


def test_an_unknown_option_is_refused() -> None:
    assert CliRunner().invoke(app, ["generate", "Hi", "--bugdet", "4"]).exit_code == 2


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from ctc_drafter.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
