"""Coverage-guided fuzzing of the readers, with atheris where it is installed.

Runs as `python -m faults.coverage_guided OUTCOMES [libFuzzer options]`: the first byte of an input chooses the reader.
The file OUTCOMES gets the counts, now and then: libFuzzer ends the process without a word to Python.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["ctc_drafter", "yaml", "json"]):
        from faults.parsers import READERS, read

    names, seen, outcomes = list(READERS), Counter[str](), Path(sys.argv.pop(1))
    folder = Path(tempfile.mkdtemp())

    def one(data: bytes) -> None:
        what = names[data[0] % len(names)] if data else names[0]
        seen[f"{what}/{read(what, data[1:], folder)}"] += 1
        if seen.total() % 100 == 0:
            outcomes.write_text(json.dumps(seen))

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
