"""A drafter as a folder that other libraries can use."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..drafters import DRAFTERS
from ..errors import UserError
from ..files import WEIGHTS, write_folder
from ..inspection import inspect_path, is_well
from ..target import Target
from .chains import check_kind

WRITTEN = {"config.json", WEIGHTS, "README.md", "custom_generate", "vllm.yaml"}
"""What an export may hold."""
GENERATE = Path(__file__).with_name("exported_generate.py")

TRANSFORMERS_PAGE = """---
library_name: transformers
tags:
- custom_generate
- speculative-decoding
---

# A drafter for {target}

The same ids that the model's own `generate` gives, sooner. It needs `pip install ctc-drafter`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{target}")
model = AutoModelForCausalLM.from_pretrained("{target}")
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
ids = model.generate(**inputs, max_new_tokens=60, custom_generate="{folder}", trust_remote_code=True)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```

`{target}` is the name under which the drafter knows its model, and `{folder}` that of this folder: put paths in their
place. `trust_remote_code=True` lets transformers run `custom_generate/generate.py`, which calls the package. The
argument `budget` (8 by default) is the number of draft tokens scored per step.
"""

SPECULATORS_PAGE = """# A drafter of kind `{kind}` for {target}

`config.json` has the fields of the speculators convention: `speculators_model_type`, `architectures` and
`speculators_config` with `algorithm`, `proposal_methods`, `default_proposal_method` and `verifier`; under `drafter` is
the module's own config. The weights are in `model.safetensors`; embedding and LM head are the verifier's and not
stored. `kept` holds the ids of the drafted tokens.

The module is one of `ctc-drafter`, none of the speculators library's own, so that library can read the fields but has
no code to run it. The folder was not tried with the library. `ctc-drafter` reads it as it reads the original.
"""


VLLM_PAGE = """# A drafter for {target}, to run in vLLM

```bash
pip install 'ctc-drafter[vllm]'
vllm serve TARGET --config {folder}/vllm.yaml
```

TARGET is the folder or hub name of {target}. `vllm.yaml` names this folder by its place; after moving it, change
`drafter` there. It says what these two arguments would:

```
--speculative-config '{speculative}'
--additional-config '{additional}'
```
"""


def export(drafter: str | Path, to: str, output: Path, *, overwrite: bool = False) -> str:
    """Write `drafter` to the folder `output` for transformers, speculators or vllm; returns what to tell the user.

    Only an earlier export or an empty folder is overwritten. Raises UserError for a damaged drafter, for an existing
    folder without `overwrite`, and for what is not supported.
    """
    writers: dict[str, Callable[[Path, Any, Path], None]] = {
        "transformers": _transformers,
        "speculators": _speculators,
        "vllm": _vllm,
    }
    if to not in writers:
        raise UserError(f"--to must be one of {', '.join(writers)}, not '{to}'.")
    report = inspect_path(drafter, _no_target)
    if report["what"] != "drafter":
        raise UserError(f"'{drafter}' is a {report['what']}, not a drafter.")
    if not is_well(report):
        bad = "; ".join(f"{check['name']}: {check['note']}" for check in report["checks"] if not check["ok"])
        raise UserError(f"Drafter '{drafter}' is damaged and is not exported ({bad}).")
    if to == "vllm":
        check_kind(DRAFTERS[report["kind"]], str(drafter), "vLLM")
    folder = Path(report["path"])
    _check_output(folder, output, overwrite)

    def write(aside: Path) -> None:
        for name in ("config.json", WEIGHTS):
            shutil.copyfile(folder / name, aside / name)
        writers[to](aside, report, output)

    write_folder(output, write)
    notes = {
        "transformers": f"custom_generate='{output}' with trust_remote_code=True uses it.",
        "speculators": (
            "The config has the fields of the convention; it was not tried with the speculators library, "
            f"which has no code of its own for this module (kind '{report['kind']}')."
        ),
        "vllm": f"`vllm serve TARGET --config {output / 'vllm.yaml'}` runs it.",
    }
    return f"Exported: {output}. {notes[to]}"


def _no_target(name: str) -> Target:
    raise AssertionError(f"nothing asked for the target {name}")


def _check_output(folder: Path, output: Path, overwrite: bool) -> None:
    inside = output.resolve() in (folder.resolve(), *folder.resolve().parents)
    if inside:
        raise UserError(f"'{output}' holds the drafter itself; choose another folder.")
    if not output.exists():
        return
    if not overwrite:
        raise UserError(f"'{output}' exists already and is left as it is; choose another name or pass --overwrite.")
    if not output.is_dir() or (any(output.iterdir()) and not _is_export(output)):
        raise UserError(f"'{output}' is not an earlier export and is left as it is; choose another name.")


def _is_export(folder: Path) -> bool:
    """Whether there is nothing but what is written here, under one of the pages above."""
    page = folder / "README.md"
    if not page.is_file() or not {path.name for path in folder.iterdir()} <= WRITTEN:
        return False
    text = page.read_text("utf-8", errors="replace")
    return any(_begins_like(text, template) for template in (TRANSFORMERS_PAGE, SPECULATORS_PAGE, VLLM_PAGE))


def _begins_like(text: str, template: str) -> bool:
    """Whether a page is like the template down to its heading, whatever is named there."""
    head = template[: template.index("\n", template.index("# "))]
    return re.match(".+".join(map(re.escape, re.split(r"\{\w+\}", head))) + "\n", text) is not None


def _transformers(aside: Path, report: Any, output: Path) -> None:
    code = aside / "custom_generate"
    code.mkdir()
    shutil.copyfile(GENERATE, code / "generate.py")
    (code / "requirements.txt").write_text(f"ctc-drafter>={__version__}\n", encoding="utf-8")
    page = TRANSFORMERS_PAGE.format(target=report["target"]["name_or_path"], folder=output.name)
    (aside / "README.md").write_text(page, encoding="utf-8")


def _speculators(aside: Path, report: Any, output: Path) -> None:
    page = SPECULATORS_PAGE.format(kind=report["kind"], target=report["target"]["name_or_path"])
    (aside / "README.md").write_text(page, encoding="utf-8")


def vllm_config(drafter: str, longest: int) -> dict[str, dict[str, Any]]:
    """The arguments with which vLLM runs a drafter that proposes up to `longest` tokens."""
    proposer = {"method": "custom_class", "model": "ctc_drafter.integrations.vllm.CTCProposer"}
    return {
        "speculative-config": {**proposer, "num_speculative_tokens": longest},
        "additional-config": {"ctc_drafter": {"drafter": drafter}},
    }


def _vllm(aside: Path, report: Any, output: Path) -> None:
    content = json.loads((aside / "config.json").read_text(encoding="utf-8"))
    longest = content["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    config = vllm_config(str(output.resolve()), longest)
    (aside / "vllm.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    speculative, additional = (json.dumps(part) for part in config.values())
    page = VLLM_PAGE.format(
        target=report["target"]["name_or_path"], folder=output.name, speculative=speculative, additional=additional
    )
    (aside / "README.md").write_text(page, encoding="utf-8")
