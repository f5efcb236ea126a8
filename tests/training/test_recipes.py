"""Scripts of recipes/."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_questions_of_one_source_become_conversations(tmp_path: Path) -> None:
    """Every question is asked once, two of one source in a row; a third of them alone; the same rows each time."""
    rows = [
        {"source": s, "messages": [{"role": "user", "content": f"{s} {i}"}]} for s in ("sums", "code") for i in range(9)
    ]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outputs = [tmp_path / "one.jsonl", tmp_path / "other.jsonl"]
    for output in outputs:
        subprocess.run([sys.executable, ROOT / "recipes/two_turns.py", output, asked], check=True, capture_output=True)
    made = [json.loads(line) for line in outputs[0].read_text().splitlines()]
    assert outputs[0].read_text() == outputs[1].read_text()
    assert sorted(turn for row in made for turn in row["turns"]) == sorted(r["messages"][0]["content"] for r in rows)
    assert all(turn.startswith(row["source"]) for row in made for turn in row["turns"])
    assert Counter((row["source"], len(row["turns"])) for row in made) == {
        (source, turns): 3 for source in ("sums", "code") for turns in (1, 2)
    }
