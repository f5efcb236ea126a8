"""One run at a time writes to an output: who holds the lock, and what becomes of one whose owner is dead."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ctc_drafter.errors import UserError
from ctc_drafter.training.lock import locked


def test_a_lock_is_held_and_gone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.lock"
    with locked(path):
        owner = json.loads(path.read_text())
        assert owner["pid"] == os.getpid() and owner["host"] == platform.node()
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), locked(path):
            pass
        assert path.exists()
    assert list(path.parent.iterdir()) == []


def test_a_lock_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with locked(tmp_path / "x.lock"), pytest.raises(UserError, match="Another run"), locked(tmp_path / "x.lock"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_changed_hands_is_left(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with locked(path):
        path.write_text('{"pid": 1, "host": "elsewhere"}')
    assert path.exists()


@pytest.mark.parametrize(
    ("owner", "free"),
    [
        ({"started": 1}, True),  # the number went to another process
        ({"pid": 2**22 + 1}, True),
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "pid": 2**22 + 1}, False),
        ({"pid": 10**30}, False),
        ("damaged", False),
        ("[" * 9999, False),
    ],
)
def test_only_a_dead_owner_on_this_host_is_replaced(owner: Any, free: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with locked(path):
        mine = json.loads(path.read_text())
    text = json.dumps({**mine, **owner}) if isinstance(owner, dict) else owner
    path.write_text(text)
    if free:
        with locked(path):
            assert json.loads(path.read_text()) == mine
        assert not path.exists()
    else:
        with pytest.raises(UserError, match="remove"), locked(path):
            pass
        assert path.read_text() == text


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from ctc_drafter.training.lock import locked\nfrom ctc_drafter.errors import UserError\n"
        "go = Path(sys.argv[1] + '.go')\nprint(flush=True)\nwhile not go.exists(): pass\n"
        "try:\n    with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()\n"
        "except UserError: print('refused', flush=True)\n"
    )
    path = tmp_path / "x.lock"
    with locked(path):
        dead = {**json.loads(path.read_text()), "pid": 2**22 + 1}
    path.write_text(json.dumps(dead))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes) for _ in range(4)]
    for process in runs:
        assert process.stdout is not None and process.stdout.readline()
    path.with_name("x.lock.go").touch()
    said = [process.stdout.readline().strip() for process in runs if process.stdout is not None]
    for process in runs:
        process.communicate()
    assert sorted(said) == ["held"] + ["refused"] * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.lock.go"]
