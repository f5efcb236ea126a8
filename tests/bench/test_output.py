"""What people and programs read: tables, the result file, the demo."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from ctc_drafter.bench.command import _Watch, output_files
from ctc_drafter.bench.compare import compare_files
from ctc_drafter.bench.demo import run_demo
from ctc_drafter.bench.markdown import report_lines
from ctc_drafter.bench.measure import Result
from ctc_drafter.bench.prompts import Prompt
from ctc_drafter.bench.report import print_report
from ctc_drafter.bench.results import check_output, document, write_json
from ctc_drafter.drafters import load_drafter
from ctc_drafter.errors import UserError
from ctc_drafter.target import Target

ROW = {
    "id": 1,
    "category": "a",
    "turn": 0,
    "tokens": 5,
    "steps": 2,
    "seconds": 0.5,
    "plain_tokens": 5,
    "plain_seconds": 1.0,
    "identical": True,
    "gap": 0.0,
    "looped": False,
    "accepted": [1, 1],
    "expected": [0.5, 1.5],
    "parts": {"prefill": 0.1, "draft": 0.1, "tree": 0.1, "score": 0.1, "accept": 0.05, "commit": 0.05},
}


def console(**options: object) -> Console:
    return Console(file=io.StringIO(), width=110, **options)  # type: ignore[arg-type]


def text(of: Console) -> str:
    assert isinstance(of.file, io.StringIO)
    return of.file.getvalue()


def test_report_says_what_flatters_and_what_differs() -> None:
    rows = [ROW, {**ROW, "category": "b", "identical": False, "gap": 0.03, "looped": True}]
    out = console()
    print_report(out, [Result("ctc", 16, 10, rows, complete=False)])
    shown = text(out)
    assert "2.00" in shown and "1 of 2" in shown and "0.0300 nat" in shown
    assert "1 of 2 answers end in a loop" in shown and "Interrupted" in shown
    empty = console()
    print_report(empty, [Result("ctc", 16, 10)])
    assert "No answer was finished" in text(empty)


@pytest.mark.parametrize("name", ["[math]", "[/math]", "[", ":warning:", "a\\[b]"])
def test_names_that_look_like_markup_stay_as_they_are(name: str) -> None:
    rows = [{**ROW, "category": name}, {**ROW, "category": "b", "identical": False, "gap": 0.03, "looped": True}]
    result, out = Result(name, 16, 10, rows), console()
    print_report(out, [result])
    assert text(out).count(name) >= 7  # in each table, of which one has it twice, and in each line
    watch = _Watch([], 1)
    watch.on_row(result, rows[0])
    bar = console()
    bar.print(watch._bar.get_renderable())
    assert f"{name}, budget 16" in text(bar)


def test_turns_left_out_are_counted_as_such_everywhere(tmp_path: Path) -> None:
    skipped = [{"id": 1, "turn": turn, "prompt_tokens": None} for turn in range(1, 4)]
    result, out = Result("ctc", 16, 10, [ROW], skipped, complete=True), console()
    print_report(out, [result])
    target = {"name": "t", "dtype": "float32", "device": "cpu", "parameters": 5}
    write_json(tmp_path / "r.json", document(result, target, {"prompts": [], "max_new_tokens": 5}))
    lines = "\n".join(report_lines(compare_files([tmp_path / "r.json"]), []))
    for said in (text(out), lines):
        assert "3 turns left out for lack of room in the context" in said


def test_result_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    check_output(path, overwrite=False)
    result = Result("ctc", 16, 10, [ROW], complete=True)
    write_json(path, document(result, {"name": "t"}, {"limit": 1}))
    read = json.loads(path.read_text())
    assert read["rows"] == [ROW] and read["totals"]["tau"] == 2.0 and read["machine"]["cores"]
    with pytest.raises(UserError, match="exists already"):
        check_output(path, overwrite=False)
    check_output(path, overwrite=True)
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_a_folder_in_the_place_of_a_result_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "r.json").mkdir()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"r.json' is a folder and a file is to be written; choose another name"):
            check_output(tmp_path / "r.json", overwrite)


def test_each_contender_gets_a_file_of_its_own() -> None:
    pairs = [("ctc", 8), ("some/folder", 16)]
    assert [p.name for p in output_files(Path("r.json"), pairs)] == ["r-ctc-8.json", "r-folder-16.json"]
    assert output_files(Path("r.json"), pairs[:1]) == [Path("r.json")]
    with pytest.raises(UserError, match="collide"):
        output_files(Path("r.json"), [("a/x", 8), ("b/x", 8)])


@pytest.mark.parametrize("live", [False, True])
def test_demo_shows_both_runs_and_their_identity(
    target: Target, drafter_folder: Path, tmp_path: Path, live: bool
) -> None:
    out = console(force_terminal=live)
    prompts = [Prompt("[/one]", "a", ("How many apples?",)), Prompt("two", "a", ("Déjà vu?",))]
    drafter = load_drafter(str(drafter_folder), target)
    (tmp_path / "[").mkdir()
    picture = tmp_path / "[" / "red].svg"
    assert run_demo(target, drafter, prompts, out, max_new_tokens=24, budget=4, live=live, svg=picture)
    assert "[/one]" in text(out) and "[/red].svg" in text(out)  # no markup
    assert "plain" in text(out) and "drafted" in text(out) and "2 of 2" in text(out)
    assert "All 2 answers are identical" in text(out)
    assert picture.read_text().startswith("<svg")
