"""What is this folder or file: a drafter, a target or a result of `bench`? Told and checked without a target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table
from rich.text import Text
from safetensors import safe_open
from transformers import AutoConfig

from .config import from_mapping
from .drafters import TrainableDrafter, drafter_folder
from .drafters.base import check_digest, described, load_trainable, weights_fault
from .drafters.shell import shell
from .errors import UserError
from .files import RESULT_KIND, WEIGHTS
from .jsonl import read_object
from .target import Target
from .target.loading import check_folder
from .words import byte_size, number, size

Report = dict[str, Any]
LoadTarget = Callable[[str], Target]


def inspect_path(
    path: str | Path,
    load: LoadTarget,
    *,
    target: str | None = None,
    self_test: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """A report (plain JSON) on a drafter folder, a target folder or a result file of `bench`.

    path: as a text, also the name of an embedded drafter; target: the target to hold a drafter against; self_test:
    let a target folder score a tree; both are loaded by `load`, nothing else is. The report's `checks` say what was
    looked at and whether it is well. Raises UserError for anything else.
    """
    place = drafter_folder(path) if isinstance(path, str) else path
    if place.is_file():
        _refuse(target is not None or self_test, f"'{place}' is a file; --target and --self-test are for folders.")
        return _result(place)
    if not place.is_dir():
        raise UserError(f"There is no file or folder '{place}'.")
    missing = f"'{place}' has no config.json, so it is neither a drafter nor a target."
    content = read_object(place / "config.json", missing)
    if "speculators_config" in content:
        _refuse(self_test, f"'{place}' is a drafter; --self-test is for targets, --target TARGET says what it fits.")
        return _drafter(place, content, None if target is None else lambda: load(target))
    if "model_type" in content:
        _refuse(target is not None, f"'{place}' is a target; --target is for drafters.")
        return _target(place, (lambda: load(str(place))) if self_test else None, trust_remote_code)
    raise UserError(f"'{place / 'config.json'}' describes neither a drafter nor a Hugging Face model.")


def is_well(report: Report) -> bool:
    """Whether every check of a report passed."""
    return all(check["ok"] for check in report.get("checks", []))


def weights_of(files: list[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of these safetensors files, from their headers alone."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is not a dictionary)
                part = opened.get_slice(name)
                found[name] = tuple(part.get_shape()), part.get_dtype()
    return found


# ---------------------------------------------------------------- drafters


def _drafter(folder: Path, content: Report, load: Callable[[], Target] | None) -> Report:
    cls, fields = described(folder, content)
    verifier = content["speculators_config"]["verifier"]
    report: Report = {
        "what": "drafter",
        "path": str(folder),
        "kind": cls.kind,
        "bytes": _folder_bytes(folder),
        "target": {key: verifier.get(key) for key in ("name_or_path", "architectures", "hidden_size", "vocab_size")},
        "config": fields,
        "training": _training(folder, content),
        "checks": [],
    }
    checks = report["checks"]
    drafter = _attempt(checks, "config", lambda: _shell(cls, fields, verifier, folder))
    if drafter is not None:
        report["parameters"] = drafter.num_parameters
        report["proposed_tokens"] = drafter.proposed_tokens
        report["kept_tokens"] = len(drafter.kept)
        _attempt(checks, "tensors", lambda: _compare(folder, drafter))
    _attempt(checks, "values", lambda: _check_values(folder, verifier))
    _attempt(checks, "digest", lambda: check_digest(folder, content))
    if load is not None:
        loaded = load()
        _attempt(checks, f"fits '{loaded.name}'", lambda: load_trainable(folder, loaded) and None)
    return report


def _shell(cls: Any, fields: Report, verifier: Report, folder: Path) -> TrainableDrafter:
    return shell(cls, from_mapping(cls.config_class, fields, str(folder / "config.json")), verifier, folder)


def _compare(folder: Path, drafter: TrainableDrafter) -> str:
    want = {name: tuple(tensor.shape) for name, tensor in drafter.state_dict().items()}
    have = weights_of([_weights_file(folder)])
    problems = [
        f"{name} has shape {list(have[name][0])}, not {list(want[name])}"
        for name in sorted(want.keys() & have.keys())
        if have[name][0] != want[name]
    ]
    # Names as loading takes them, since an older checkpoint may lack what is known to be zero.
    stand_in = {name: torch.empty(want.get(name, shape), device="meta") for name, (shape, _) in have.items()}
    loaded = drafter.load_state_dict(stand_in, strict=False)
    problems += [f"{name} is missing" for name in sorted(loaded.missing_keys)]
    problems += [f"{name} is not expected" for name in sorted(loaded.unexpected_keys)]
    if problems:
        raise UserError("; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else ""))
    return f"{len(have)} tensors, {', '.join(sorted({dtype for _, dtype in have.values()}))}"


def _check_values(folder: Path, verifier: Report) -> str:
    vocabulary = verifier.get("vocab_size")
    with safe_open(_weights_file(folder), "pt") as opened:
        names = list(opened.keys())
        weights = ((name, opened.get_tensor(name)) for name in names)
        fault = weights_fault(weights, vocabulary if isinstance(vocabulary, int) else None)
    if fault is not None:
        raise UserError(fault)
    return "finite; the kept tokens are ids of the vocabulary" if "kept" in names else "finite"


def _weights_file(folder: Path) -> Path:
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"there is no {WEIGHTS}")
    return file


def _training(folder: Path, content: Report) -> Report | None:
    """Steps, last held-out figures, and where the recipe and commit are known, those."""
    stored = content.get("training")
    training = dict(stored) if isinstance(stored, dict) else {}
    history = training.get("history")
    out: Report = {"steps": training.get("steps")}
    if isinstance(history, list) and history and isinstance(history[-1], dict):
        out["last"] = history[-1]
    try:
        run = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
        out["recipe"] = dict(run["recipe"])
        out["versions"] = dict(run.get("versions") or {})
    except Exception:  # yaml raises whatever its constructors stumble over
        pass  # a drafter does not need it
    return {key: value for key, value in out.items() if value is not None} or None


# ---------------------------------------------------------------- targets


def _target(folder: Path, load: Callable[[], Target] | None, trust_remote_code: bool) -> Report:
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        architectures = [str(name) for name in config.architectures or []]
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{folder / 'config.json'}' cannot be read as a model's: {reason}") from None
    text = config.get_text_config()
    report: Report = {
        "what": "target",
        "path": str(folder),
        "architectures": architectures,
        "model_type": config.model_type,
        "hidden_size": getattr(text, "hidden_size", None),
        "layers": getattr(text, "num_hidden_layers", None),
        "attention_heads": getattr(text, "num_attention_heads", None),
        "kv_heads": getattr(text, "num_key_value_heads", None),
        "vocab_size": getattr(text, "vocab_size", None),
        "context": getattr(text, "max_position_embeddings", None),
        "bytes": _folder_bytes(folder),
        "chat_template": _has_chat_template(folder),
        "stop_ids": _stop_ids(folder, text),
        "checks": [],
    }
    checks = report["checks"]
    _attempt(checks, "configs", lambda: check_folder(folder))
    weights = _attempt(checks, "weights", lambda: _target_weights(folder), note=lambda w: f"{len(w)} tensors")
    if weights is not None:
        report["parameters"] = sum(torch.Size(shape).numel() for shape, _ in weights.values())
        report["dtype"] = sorted({dtype for _, dtype in weights.values()})
    if load is not None:
        _attempt(checks, "tree self-test", lambda: f"passed in {load().dtype}".replace("torch.", ""))
    return report


def _target_weights(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """The tensors of the file or of the parts that its index names, as transformers chooses them."""
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file():
        return weights_of([folder / WEIGHTS])
    if not index.is_file():
        raise UserError(f"there is no {WEIGHTS}; other formats are not loaded")
    named = dict(read_object(index)["weight_map"])
    files = sorted({folder / str(name) for name in named.values()})
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(f"{len(absent)} of {len(files)} parts are missing, the first is {absent[0]}")
    found = weights_of(files)
    lost = sorted(named.keys() - found.keys())
    if lost:
        raise UserError(f"{len(lost)} tensors of the index are missing, the first is {lost[0]}")
    return found


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    return bool(_optional_json(folder / "tokenizer_config.json").get("chat_template"))


def _stop_ids(folder: Path, text: Any) -> list[int]:
    """The end-of-text ids of the model's and the generation's config; the tokenizer's own is added at load."""
    ids: set[int] = set()
    for value in (
        getattr(text, "eos_token_id", None),
        _optional_json(folder / "generation_config.json").get("eos_token_id"),
    ):
        ids.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    return sorted(ids)


# ---------------------------------------------------------------- results


def _result(path: Path) -> Report:
    content = read_object(path)
    if content.get("kind") != RESULT_KIND or not isinstance(content.get("totals"), dict):
        raise UserError(f"'{path}' is not a result file of `ctc-drafter bench`.")
    keys = ("date", "complete", "target", "drafter", "versions")
    return {"what": "result", "path": str(path), **{k: content.get(k) for k in keys}, "totals": content["totals"]}


def result_line(report: Report) -> str:
    """The totals of a result in one line. Raises UserError if there are none."""
    try:
        target, drafter, totals = report["target"], report["drafter"], report["totals"]
        return (
            f"{drafter['name']}, budget {drafter['budget']}, on {target['name']} "
            f"({target['dtype']}, {target['device']}): "
            f"{totals['answers']} answers, {totals['tokens']} tokens, tau {number(totals['tau'])}, "
            f"{number(totals['tokens_per_second'], 1)} tok/s, plain {number(totals['plain_tokens_per_second'], 1)}, "
            f"speedup {number(totals['speedup'])}, efficiency {number(totals['efficiency'])}, "
            f"identical {_share(totals['identical'], totals['answers'])}"
            + ("" if report["complete"] else "; the run was interrupted")
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"'{report['path']}' lacks what a result of `ctc-drafter bench` has ({error!r}).") from None


# ---------------------------------------------------------------- what a person reads


def report_table(report: Report) -> Table:
    """The report on a folder as two columns, its checks last."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = _drafter_rows(report) if report["what"] == "drafter" else _target_rows(report)
    for name, value in [(report["what"], report["path"]), *rows]:
        if value not in (None, ""):
            table.add_row(name, Text(str(value)))
    for check in report["checks"]:
        mark = Text("ok ", "green") if check["ok"] else Text("BAD", "red")
        table.add_row(Text(f"check: {check['name']}"), mark + Text(f"  {check['note']}"))
    return table


def _drafter_rows(report: Report) -> list[tuple[str, Any]]:
    target, training = report["target"], report["training"] or {}
    recipe = training.get("recipe", {})
    rows = [
        ("kind", report["kind"]),
        ("made for", f"{target['name_or_path']}: width {target['hidden_size']}, vocabulary {target['vocab_size']}"),
        ("size", _size(report)),
        ("proposes", f"up to {report['proposed_tokens']} tokens" if "proposed_tokens" in report else None),
        ("drafts", f"{report['kept_tokens']} of the vocabulary's tokens" if "kept_tokens" in report else None),
        ("config", _pairs(report["config"])),
        ("trained", f"{training['steps']} steps" if "steps" in training else None),
        ("last figures", _pairs(training.get("last", {}))),
        ("recipe", _pairs({k: recipe[k] for k in ("data", "target", "seed", "dtype") if k in recipe})),
        ("commit", training.get("versions", {}).get("git_commit")),
    ]
    return rows


def _target_rows(report: Report) -> list[tuple[str, Any]]:
    return [
        ("architecture", ", ".join(report["architectures"]) or report["model_type"]),
        ("size", _size(report)),
        ("dtype", ", ".join(report.get("dtype", []))),
        ("width, layers", f"{report['hidden_size']}, {report['layers']}"),
        ("heads", f"{report['attention_heads']}, of keys and values {report['kv_heads'] or report['attention_heads']}"),
        ("vocabulary", report["vocab_size"]),
        ("context", report["context"]),
        ("chat template", "yes" if report["chat_template"] else "no"),
        ("stop ids", ", ".join(map(str, report["stop_ids"])) or "none"),
    ]


def _size(report: Report) -> str:
    parameters = f"{size(report['parameters'])} parameters, " if "parameters" in report else ""
    return f"{parameters}{byte_size(report['bytes'])} on disk"


def _share(part: int | None, whole: int) -> str:
    return "not compared (sampled)" if part is None else f"{part} of {whole}"


def _pairs(values: Report) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


# ---------------------------------------------------------------- helpers


def _attempt(checks: list[Report], name: str, work: Callable[[], Any], note: Callable[[Any], str] | None = None) -> Any:
    """Record as a check whether `work` succeeds; returns what it returns, or None."""
    try:
        value = work()
    except Exception as error:  # a damaged file fails in ways of its own
        checks.append({"name": name, "ok": False, "note": " ".join(str(error).split())[:300]})
        return None
    text = note(value) if note else value if isinstance(value, str) else ""
    checks.append({"name": name, "ok": True, "note": text})
    return value


def _optional_json(path: Path) -> Report:
    try:
        return read_object(path)
    except UserError:
        return {}


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _refuse(condition: bool, sentence: str) -> None:
    if condition:
        raise UserError(sentence)
