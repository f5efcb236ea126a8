"""The `report` command: from result files as `bench` writes them to a page with figures."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ctc_drafter.bench.compare import compare_files, read_drafter_folder, read_history
from ctc_drafter.bench.markdown import run_report
from ctc_drafter.bench.measure import Result
from ctc_drafter.bench.results import document, write_json
from ctc_drafter.bench.sheets import PHASE_COLOURS, Sheets
from ctc_drafter.cli import app
from ctc_drafter.errors import UserError
from ctc_drafter.steps import PHASES
from ctc_drafter.words import duration

TARGET = {"name": "tiny", "dtype": "float32", "device": "cpu", "parameters": 12_000_000}
ARGUMENTS = {"prompts": ["some/where/mine.jsonl"], "max_new_tokens": 64, "temperature": 0.0}
HISTORY = [{"step": s, "loss": 5 - s / 100, "held_out": 4 - s / 100, "seconds": 50.0 * s} for s in (50, 100, 150)]


def rows(seconds: float, accepted: int = 2, identical: bool = True) -> list[dict[str, Any]]:
    """Four answers in two categories; each has 4 steps and takes a second when plain."""
    return [
        {
            **{"id": i, "category": "ab"[i % 2], "turn": 0, "tokens": 1 + 4 * (1 + accepted), "steps": 4},
            **{"seconds": seconds, "plain_tokens": 1 + 4 * (1 + accepted), "plain_seconds": 1.0},
            **{"identical": identical or i > 0, "gap": 0.0 if identical or i > 0 else 0.03, "looped": False},
            **{"accepted": [accepted] * 4, "expected": [1.25, 2.5, 2.0, None]},
            **{"parts": {name: seconds / 5 for name in PHASES}},
        }
        for i in range(4)
    ]


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a result file through the real `document`; `seconds` below 1 is faster than plain."""

    def write(drafter: str, budget: int, seconds: float = 0.5, change: Any = None, **of_rows: Any) -> Path:
        result = Result(drafter, budget, 2_000_000, rows(seconds, **of_rows), complete=True)
        content = document(result, copy.deepcopy(TARGET), copy.deepcopy(ARGUMENTS))
        if change:
            change(content)
        path = tmp_path / f"{drafter}-{budget}.json"
        write_json(path, content)
        return path

    return write


def page(*files: Path, output: Path, **options: Any) -> str:
    return run_report(files, output=output, **{"figures": False, **options}).read_text()


# ---------------------------------------------------------------- the page


def test_the_table_is_sorted_by_speedup_and_says_what_is_wrong(write: Write, tmp_path: Path) -> None:
    slow = write("slow", 8, 2.0, identical=False)
    text = page(slow, write("ctc", 16, 0.5), write("ctc", 8, 0.8), output=tmp_path / "out")
    lines = [line for line in text.splitlines() if line.startswith(("| `ctc`", "| `slow`"))][:3]
    assert lines[0].startswith("| `ctc` | 8 | 2.0 M | 3.00 | 1.25 | 0.42 |")
    assert (
        lines[1].startswith("| `ctc` | **16** | 2.0 M | 3.00 | **2.00** | 0.67 |")
        and "20.0% | 4 of 4 | 0 |" in lines[1]
    )
    assert lines[2].startswith("| `slow` | **8** | 2.0 M | 3.00 | **0.50** |") and "3 of 4" in lines[2]
    assert "Fastest: `ctc` with budget 16, 2.00 times" in text
    assert "`slow`, budget 8: **slower than plain decoding** (0.500 times its speed)" in text
    assert "**not identical to plain decoding**: 1 of 4 answers differ, by at most 0.0300 nat" in text
    assert "No method is faster" in page(slow, output=tmp_path / "alone")


def test_what_is_wrong_with_all_is_said_once(write: Write, tmp_path: Path) -> None:
    files = [write("ctc", budget, seconds, identical=False) for budget, seconds in ((8, 0.5), (16, 2.0))]
    text = page(*files, output=tmp_path / "out")
    assert text.count("not identical to plain decoding") == 1 and "- All: **not identical" in text
    assert "- `ctc`, budget 16: **slower than plain decoding** (0.500 times its speed).\n" in text
    assert "`ctc`, budget 8:" not in text


def test_the_head_says_what_was_measured_where(write: Write, tmp_path: Path) -> None:
    head = page(write("ctc", 8), output=tmp_path / "out").split("## Methods")[0]
    for fact in ("Command: `ctc-drafter", "Machine:", "torch", "Git commit:", "tiny (12.0 M parameters), float32"):
        assert fact in head
    assert "mine.jsonl (4 prompts, 4 answers)" in head and "greedy, at most 64 new tokens" in head


def test_the_numbers_are_those_of_the_files(write: Write, tmp_path: Path) -> None:
    path = write("ctc", 8, 0.5, accepted=3)
    totals = json.loads(path.read_text())["totals"]
    text = page(path, output=tmp_path / "out")
    assert f"| a | {totals['categories']['a']['tau']:.2f} / {totals['categories']['a']['speedup']:.2f} |" in text
    assert "| `ctc` | 100.0% | 100.0% | 100.0% |" in text
    assert totals["calibration"]["bins"] == [[4, 1.25, 3.0], [8, 2.25, 3.0]]
    assert "| `ctc` | 25,000 | 25,000 | 25,000 | 25,000 | 25,000 | 125,000 |" in text


def test_histories_and_drafter_folders_tell_the_training(write: Write, tmp_path: Path) -> None:
    history = tmp_path / "ctc.history.json"
    history.write_text(json.dumps(HISTORY))
    folder = tmp_path / "medusa"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"training": {"steps": 50, "history": HISTORY[:1]}}))
    given: dict[str, Any] = {"histories": [history], "drafter_folders": [folder]}
    text = page(write("ctc", 8), write("paper", 8), output=tmp_path / "out", **given)
    assert "| 150 | 2 h 5 min |" in text and "| - | - |" in text
    assert "Trained, but in none of the result files: `medusa`" in text
    assert read_history(history).curve("tau", "held_out") == ([50, 100, 150], [3.5, 3.0, 2.5])
    assert read_drafter_folder(folder).steps == 50
    assert [duration(s) for s in (None, 7.4, 3590, 3600)] == ["-", "7 s", "1 h 0 min", "1 h 0 min"]


def test_results_without_steps_or_rates_have_dashes(write: Write, tmp_path: Path) -> None:
    def none(content: dict[str, Any]) -> None:
        for totals in (content["totals"], *content["totals"]["categories"].values()):
            totals.update(tau=None, speedup=None, efficiency=None, identical=None, acceptance_at=[])
            totals["split"] = {**dict.fromkeys(PHASES), "microseconds": dict.fromkeys((*PHASES, "step"))}

    path = write("ctc", 8, change=none)
    text = page(path, write("paper", 8, 0.7), output=tmp_path / "out", figures=find_spec("matplotlib") is not None)
    assert "| `ctc` | **8** | 2.0 M | - | **-** | - |" in text and "cannot be compared" in text


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("format", ["png", "svg"])
def test_figures_are_drawn_and_shown(write: Write, tmp_path: Path, format: str) -> None:
    pytest.importorskip("matplotlib")
    history = tmp_path / "ctc.history.json"
    history.write_text(json.dumps([{**row, "tau": 1 + row["step"] / 100} for row in HISTORY]))
    files = [write("ctc", 8, 0.5), write("ctc", 16, 0.6), write("paper", 8, 1.5, accepted=2)]
    out = tmp_path / "out"
    text = page(*files, output=out, figures=True, format=format, histories=[history])
    names = ["acceptance", "budget", "categories", "speedup", "time", "training"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*(f"{n}.{format}" for n in names), "report.md"])
    for name in names:
        path = out / f"{name}.{format}"
        assert f"]({path.name})" in text
        if format == "svg":
            assert "<svg" in path.read_text()[:500] and path.stat().st_size > 10_000
            continue
        from PIL import Image

        image = Image.open(path).convert("RGB")
        colours = image.getcolors(1 << 20)
        assert image.width > 1500 and image.height > 400 and colours is not None and len(colours) > 50


def test_calibration_is_drawn_where_there_are_enough_steps(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bins = [[30, 0.5, 0.6], [25, 1.5, 1.25], [3, 2.5, 9.0]]
    known = {"steps": 58, "expected": 1.0, "accepted": 1.3, "bins": bins}
    text = page(write("ctc", 8, change=put("totals", "calibration", known)), output=tmp_path / "out", figures=True)
    assert "](calibration.png)" in text and (tmp_path / "out" / "calibration.png").stat().st_size > 10_000


def test_a_method_keeps_its_colour_and_every_phase_has_one(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from ctc_drafter.bench.compare import Training

    comparison = compare_files([write("ctc", 8), write("paper", 8, 0.2), write("ctc", 16)])
    trainings = [Training("paper", HISTORY), Training("new", HISTORY)]  # type: ignore[arg-type]
    sheets = Sheets(comparison, trainings, tmp_path, "png")
    assert len({sheets.colour(name) for name in ("ctc", "paper", "new")}) == 3
    assert sheets.of_training(trainings[0]) == "paper"
    assert tuple(PHASE_COLOURS) == PHASES


def test_matplotlib_is_asked_for_only_when_needed(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write("ctc", 8)
    with pytest.raises(UserError, match=r"pip install 'ctc-drafter\[plots\]', or pass --no-figures"):
        page(path, output=tmp_path / "out", figures=True)
    assert not (tmp_path / "out").exists()
    assert "![" not in page(path, output=tmp_path / "out")


# ---------------------------------------------------------------- what is refused


def put(part: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[part].update({key: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("target", "name", "other"), "target other"),
        (put("target", "dtype", "bfloat16"), "dtype bfloat16 instead of float32"),
        (put("machine", "cpu", "Z80"), "machine Z80"),
        (put("arguments", "max_new_tokens", 128), "--max-new-tokens 128 instead of 64"),
        (put("arguments", "stop", ["\n"]), "--stop"),
        (
            lambda content: (content["rows"].pop(), content["totals"].update(prompts=3, answers=3)),
            "3 prompts, 3 answers instead of 4 prompts",
        ),
        (lambda content: content["rows"][0].update(id=99), "other prompts"),
        (lambda content: content["rows"][0].update(plain_tokens=3), "other plain answers"),
    ],
)
def test_what_was_not_measured_alike_is_refused_or_noted(write: Write, tmp_path: Path, change: Any, words: str) -> None:
    first, other = write("ctc", 8), write("paper", 8, 0.4, change)
    with pytest.raises(UserError, match=r"paper-8.json' cannot be compared with .*ctc-8.json") as refusal:
        compare_files([first, other])
    assert words in str(refusal.value) and "--allow-mixed" in str(refusal.value)
    text = page(first, other, output=tmp_path / "out", allow_mixed=True)
    assert "Mixed files" in text and words in text


def test_one_name_never_stands_for_two_measurements(write: Write, tmp_path: Path) -> None:
    first, second = write("ctc", 8), tmp_path / "again.json"
    second.write_text(first.read_text())
    with pytest.raises(UserError, match=r"again.json' and .*ctc-8.json' both hold drafter 'ctc' with budget 8"):
        compare_files([first, second])
    assert [e.method for e in compare_files([first, second], True).entries] == ["ctc", "ctc [again]"]
    assert len(compare_files([first, first]).entries) == 1
    mixed = [first, write("ctc", 16, change=put("arguments", "max_new_tokens", 9)), write("ctc", 32)]
    assert [e.method for e in compare_files(mixed, True).entries] == ["ctc", "ctc [ctc-16]", "ctc"]
    dtype = [first, write("ctc", 16, change=put("target", "dtype", "bfloat16"))]
    assert [e.method for e in compare_files(dtype, True).entries] == ["ctc (float32)", "ctc (bfloat16)"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{broken", "is not valid JSON"),
        ('{"a": ' + "1" * 5000 + "}", "is not valid JSON"),
        ("[1]", "is not a result file of"),
        ('{"kind": "something else"}', "is not a result file of"),
        ('{"kind": "ctc-drafter bench"}', "it has no 'target'"),
    ],
)
def test_unreadable_and_foreign_files_are_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    result = CliRunner().invoke(app, ["report", str(path), "--output", str(tmp_path / "out")])
    assert result.exit_code == 2 and result.stdout == ""
    assert str(path) in result.stderr and words in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_damaged_results_and_histories_are_named(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no 'totals.speedup'"):
        compare_files([write("ctc", 8, change=lambda content: content["totals"].pop("speedup"))])
    for value in ("1.5", [], 10**400):
        with pytest.raises(UserError, match=r"its 'totals.speedup' is of another kind"):
            compare_files(
                [write("ctc", 8, change=lambda content, value=value: content["totals"].update(speedup=value))]
            )
    with pytest.raises(UserError, match="its 'rows' are not"):
        compare_files([write("ctc", 8, change=lambda content: content["rows"][0].pop("turn"))])
    history = tmp_path / "ctc.history.json"
    huge = f'[{{"step": 1, "loss": {"1" * 400}}}]'
    for content in ("[]", "{}", '[{"step": 1}]', '[{"step": 1, "loss": "x"}]', '[{"step": null, "loss": 1}]', huge):
        history.write_text(content)
        with pytest.raises(UserError, match=r"ctc.history.json' holds no training history"):
            read_history(history)
    with pytest.raises(UserError, match="is not named <drafter>"):
        read_history(tmp_path / "history.txt")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="tells nothing of a training"):
        read_drafter_folder(tmp_path)


def within(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Puts `value` at a place, such as `totals.split`, or leaves that out if it is `...`."""
    *path, last = place.split(".")

    def change(content: dict[str, Any]) -> None:
        for part in path:
            content = content[part]
        content.pop(last) if value is ... else content.update({last: value})

    return change


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("totals.split", {}),
        ("totals.split.draft", "x"),
        ("totals.split.microseconds.step", ...),
        ("totals.split.microseconds.score", []),
        ("totals.categories", {"a": 5}),
        ("totals.categories.a.tau", "x"),
        ("totals.acceptance_at", ["x"]),
        ("totals.acceptance_at", [None]),
        ("totals.calibration", {"bins": [[30, 0.5]]}),
        ("totals.tau", float("nan")),
        ("totals.answers", True),
        ("arguments.prompts", None),
        ("arguments.prompts", [5]),
        ("arguments.temperature", "x"),
        ("target", 5),
        ("skipped", 5),
    ],
)
def test_what_is_damaged_within_is_named_too(write: Write, place: str, value: Any) -> None:
    part = ".".join(place.split(".")[:2])
    with pytest.raises(UserError, match=rf"is damaged or of another version: it(s| has no) '{part}"):
        compare_files([write("ctc", 8, change=within(place, value))])


def test_what_may_be_unknown_is_said_to_be(write: Write, tmp_path: Path) -> None:
    path = write("ctc", 8, change=within("machine.cores", None))
    history = tmp_path / "ctc.history.json"
    history.write_text('[{"step": 1, "loss": 2.5, "seconds": NaN}]')
    text = page(path, output=tmp_path / "out", histories=[history])
    assert "an unknown number of cores" in text and "| 1 | - |" in text


def test_an_existing_report_stays(write: Write, tmp_path: Path) -> None:
    path, out = write("ctc", 8), tmp_path / "out"
    page(path, output=out)
    with pytest.raises(UserError, match=r"report.md' exists already"):
        page(path, output=out)
    page(path, output=out, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        page(path, output=path)
    with pytest.raises(UserError, match="no figure format 'gif'"):
        page(path, output=tmp_path / "gif", format="gif")
