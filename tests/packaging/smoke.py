"""What an installed ctc-drafter must do with nothing but its dependencies: `python smoke.py`, offline, in seconds.

It is run by the Python of a bare virtual environment, so it uses no test library and nothing of the checkout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
COMMAND = [str(Path(sys.executable).with_name("ctc-drafter"))]
QUESTION = [{"role": "user", "content": "Tom has 3 apples and buys 5 more. How many has he?"}]


def run(*arguments: object) -> str:
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
    given_up = [line for line in done.stderr.splitlines() if "FutureWarning" in line or "DeprecationWarning" in line]
    assert not given_up, f"{arguments}: a new version has given up a name: {given_up}"
    return done.stdout


def light_import() -> None:
    """The command line begins without torch."""
    code = "import sys, ctc_drafter, ctc_drafter.cli; assert 'torch' not in sys.modules; print(ctc_drafter.__file__)"
    place = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(place).is_relative_to(sys.prefix), f"{place} is not of this environment"
    assert run("--version").startswith("ctc-drafter ")


def demo() -> None:
    assert "1 of 1" in run("demo", "--limit", 1, "--max-new-tokens", 48)


def lossless() -> None:
    """Drafted is plain is transformers' own generate; so is custom_generate; a seeded sample is the plain one."""
    import torch

    from ctc_drafter import Batch, Sampling, Target, generate, load_drafter
    from ctc_drafter.integrations.transformers import custom_generate

    target = Target.load(dtype="float32", device="cpu")
    ids = target.prompt_ids(QUESTION)
    prompt = torch.tensor([ids])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 40, "do_sample": False}
    own = target.model.generate(prompt, **options)[0, len(ids) :].tolist()
    sampled = []
    for name in ("none", "ctc", "paper", "lookup"):
        drafter = load_drafter(name, target)
        steps = list(generate(target, drafter, ids, max_new_tokens=40))
        assert [t for step in steps for t in step.tokens] == own, name
        steps = list(generate(target, drafter, ids, max_new_tokens=40, sampling=Sampling(1.0, seed=3)))
        sampled.append([t for step in steps for t in step.tokens])
    assert all(sample == sampled[0] for sample in sampled) and sampled[0] != own

    batch = Batch(target, load_drafter("ctc", target), rows=2)
    answers: dict[object, list[int]] = {batch.add(ids, max_new_tokens=40): [] for _ in range(2)}
    while len(batch):
        for key, step in batch.step():
            answers[key] += step.tokens
    assert list(answers.values()) == [own, own]
    drafted = custom_generate("ctc", budget=8)
    assert target.model.generate(prompt, custom_generate=drafted, **options)[0, len(ids) :].tolist() == own


def train(folder: Path) -> None:
    """Answers, a drafter trained on them for a few steps, its figures, and what `inspect` says of it."""
    prompts, data, drafter = folder / "prompts.jsonl", folder / "data.jsonl", folder / "drafter"
    rows = [{"id": str(i), "category": "sums", "turns": [f"What is {i} plus {i + 1}?"]} for i in range(8)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("distill", "--prompts", prompts, "--output", data, "--max-new-tokens", 24)
    settings = {"batch": 4, "anchors": 8, "warmup": 1, "decay": 1, "held_out": 0.2, "device": "cpu"}
    extra = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    run("train", "--data", data, "--output", drafter, "--steps", 3, *extra)
    result = folder / "result.json"
    options = ["--limit", 2, "--max-new-tokens", 24, "--dtype", "float32", "--json", result]
    run("bench", "--prompts", prompts, "--drafter", drafter, *options)
    assert json.loads(result.read_text())["totals"]["identical"] == 2
    run("inspect", drafter)


def main() -> None:
    import torch
    import transformers

    light_import()
    demo()
    lossless()
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder))
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"smoke test passed: python {python}, torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
