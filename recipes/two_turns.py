"""Join questions of one kind into conversations of two turns: prompts for `distill --turns 2`.

    python recipes/two_turns.py runs/embedded/two_turns.jsonl data/corpus/chat.jsonl.xz runs/embedded/functions.jsonl

Of each source two thirds of the questions are joined in pairs, one asked after the other; a third stays alone. So a
third of the answers that the target then gives are second ones. Which are joined is drawn with a fixed seed.
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from pathlib import Path

from ctc_drafter.jsonl import read_jsonl
from ctc_drafter.training.data import prompt_messages


def conversations(questions: dict[str, list[str]]) -> list[dict[str, object]]:
    """Rows of `turns`, two questions or one, of every source; in a drawn order."""
    draw = random.Random(0)
    rows: list[dict[str, object]] = []
    for source, asked in questions.items():
        asked = sorted(set(asked))
        draw.shuffle(asked)
        pairs = len(asked) // 3
        rows += [{"source": source, "turns": asked[2 * i : 2 * i + 2]} for i in range(pairs)]
        rows += [{"source": source, "turns": [question]} for question in asked[2 * pairs :]]
    draw.shuffle(rows)
    return rows


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(f"usage: {sys.argv[0]} OUTPUT FILE...")
    questions: dict[str, list[str]] = defaultdict(list)
    for path in sys.argv[2:]:
        for line, row in read_jsonl(path):
            messages = prompt_messages(row, f"{path}, line {line}")
            if len(messages) == 1:  # a system message belongs to its question
                questions[str(row.get("source", path))].append(messages[0]["content"])
    output = Path(sys.argv[1])
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = conversations(questions)
    output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} conversations, {sum(len(row['turns']) for row in rows)} questions, written to {output}")


if __name__ == "__main__":
    main()
