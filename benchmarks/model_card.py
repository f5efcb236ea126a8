"""Write the embedded models' card from what their training recorded.

python benchmarks/model_card.py src/ctc_drafter/embedded
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ctc_drafter.cli.options import plain_errors

CARD = """# The embedded models

`target/`: a Llama of {millions:.1f} M parameters ({layers} layers, width {width}, {vocabulary:,} byte-level BPE tokens, context
{context:,}) with its own chat template, trained from scratch. `ctc/`, `paper/`: its drafters. They exist so that
everything in this package can be run offline. The target has seen few tokens for its size: it writes in the style of its data
(worked sums, lists, explanations of code), mostly in whole sentences, often wrong, now and then with words that do not exist. Do
not ask it for facts, and read figures measured on it as figures of the method and the engine, not of a useful model.

Made again by `make embedded` (recipes: `recipes/embedded-target.yaml`, `embedded-target-2.yaml` to `embedded-target-5.yaml`,
`embedded-distill.yaml`, `embedded-ctc.yaml`, `embedded-ctc-2.yaml`, `paper.yaml`).
Weights are safetensors in bfloat16, the drafters' matrices in eight bits; licence Apache-2.0.

## Data

{tokens:,} tokens of a mixture of

| source | licence |
| --- | --- |
| WildEval/ZeroEval: model answers to CRUX, MATH level 5 and NumerSense questions | Apache-2.0 |
| teknium1/GPTeacher: general instructions | MIT |
| openai/grade-school-math, training part | MIT |
| lmarena/arena-hard-auto: model answers | Apache-2.0 |
| allenai/WildBench: model answers | Apache-2.0 |
| MicrosoftDocs/cpp-docs | CC-BY-4.0 |
| python/peps | public domain or CC0 |
| functions of {packages} | BSD-3-Clause, MIT or Apache-2.0 |

Rows that share 13 consecutive words with a prompt of MT-bench, GSM8K (test), HumanEval or Spec-Bench were dropped. One prompt in a
hundred, with all its answers, was held out (of each part's own data, so the held-out losses of two parts do not compare). The drafters were trained on the target's own greedy answers to prompts of this corpus.

## Target: loss in nats per token

{parts}

## Drafters: held-out figures while training

Both were trained on the answers of `recipes/embedded-distill.yaml`: `ctc/` is our best, in two parts (3,600 steps, then those of the
table), `paper/` the paper's drafter (plain CTC), for fewer steps and with a narrower MLP, to fit beside it. So the two do not compare as
methods; their losses are of different objectives, too.

{drafters}

`expected_accepted` is the drafter's own expectation of accepted labels ({labels}) at a random place of a held-out answer.
"""


PART = """Part {number}, {tokens:,} tokens:

| step | training | held-out |
| --- | --- | --- |
{losses}
"""
LOOPS = """
Then {steps} steps of sequence-level unlikelihood against repeating loops (Welleck et al. 2020), which took the share of looping
greedy answers to training prompts from {before:.0%} to {after:.0%}. Held-out loss of the weights as written: {final:.3f}.
"""
PACKAGES = Path(__file__).parent.parent / "recipes" / "python_functions.txt"


def runs_of(target: Path) -> list[dict[str, Any]]:
    """What `pretrain` recorded of the target and of what it was trained on from, the first part first."""
    runs = [json.loads((target / "pretrain.json").read_text())]
    while "before" in runs[0]:
        runs.insert(0, runs[0]["before"])
    return runs


def part(number: int, run: dict[str, Any]) -> str:
    """The loss table of one part, and what was done against loops after it."""
    losses = "\n".join(f"| {r['step']:,} | {r['loss']:.3f} | {r['held_out']:.3f} |" for r in run["history"])
    text = PART.format(number=number, tokens=run["tokens"], losses=losses)
    if loops := run["unlikelihood"]:
        before, after = loops[0]["looped"], loops[-1]["looped"]
        text += LOOPS.format(steps=loops[-1]["step"], before=before, after=after, final=run["held_out_loss"])
    return text


def main(folder: Path) -> None:
    config = json.loads((folder / "target" / "config.json").read_text())
    runs = runs_of(folder / "target")
    width, inner = config["hidden_size"], config["intermediate_size"]
    kv = width * config["num_key_value_heads"] // config["num_attention_heads"]
    layer = 2 * width * width + 2 * width * kv + 3 * width * inner + 2 * width
    parameters = config["vocab_size"] * width + config["num_hidden_layers"] * layer + width
    drafters, labels = [], []
    for name in ("ctc", "paper"):
        content = json.loads((folder / name / "config.json").read_text())
        labels.append(f"of {content['drafter']['labels']} for `{name}/`")
        history = content["training"]["history"]
        drafters.append(
            f"`{name}/`\n\n| step | held-out loss | expected_accepted | seconds |\n| --- | --- | --- | --- |"
        )
        drafters[-1] += "".join(
            f"\n| {r['step']:,} | {r['held_out']:.3f} | {r['expected_accepted']:.3f} | {r['seconds']:,.0f} |"
            for r in history
        )
    text = CARD.format(
        millions=parameters / 1e6,
        layers=config["num_hidden_layers"],
        width=width,
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        tokens=sum(run["tokens"] for run in runs),
        parts="\n".join(part(i, run) for i, run in enumerate(runs, 1)).rstrip(),
        packages=", ".join(line.partition("==")[0] for line in PACKAGES.read_text().split()),
        drafters="\n\n".join(drafters),
        labels=", ".join(labels),
    )
    (folder / "README.md").write_text(text)
    print(f"Result: {folder / 'README.md'}")


if __name__ == "__main__":
    with plain_errors():
        main(Path(sys.argv[1]))
