"""An interrupted write leaves the old content."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ctc_drafter.errors import UserError
from ctc_drafter.files import recover_folder, write_folder, write_text


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    return tmp_path / "out"


def test_folder_is_replaced_as_a_whole(old: Path) -> None:
    write_folder(old, lambda f: (f / "b").write_text("new"))
    assert content(old.parent) == {"out/b": "new"}


def test_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    write_folder(tmp_path / "x" / "y", lambda f: (f / "b").write_text("new"))
    assert content(tmp_path) == {"x/y/b": "new"}


def half(folder: Path) -> None:
    (folder / "b").write_text("half")
    full()


def failing_safetensors(folder: Path) -> None:
    save_file({"a": torch.zeros(3)}, folder / "no" / "such" / "folder.safetensors")


@pytest.mark.parametrize("write", [half, full, failing_safetensors])
def test_full_disk_keeps_the_old_folder(write: Callable[[Path], None], old: Path) -> None:
    with pytest.raises(UserError, match=r"out' could not be written .*; the earlier state is kept"):
        write_folder(old, write)
    assert content(old.parent) == {"out/a": "old"} and [p.name for p in old.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_interruption_keeps_the_old_folder(kind: type[BaseException], old: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "b").write_text("half")
        raise kind

    with pytest.raises(kind):
        write_folder(old, write)
    assert content(old.parent) == {"out/a": "old"} and [p.name for p in old.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("which", [0, 1])
def test_failing_rename_keeps_the_old_folder(which: int, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.replace, []

    def replace(a: Path, b: Path) -> None:
        calls.append(a)
        if len(calls) == which + 1:
            full()
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="the earlier state is kept"):
        write_folder(old, lambda f: (f / "b").write_text("new"))
    assert content(old.parent) == {"out/a": "old"}


def test_leftovers_of_a_killed_write_do_not_matter(old: Path) -> None:
    for name in (".out.writing", ".out.old"):
        (old.parent / name).mkdir()
        (old.parent / name / "c").write_text("left")
    write_folder(old, lambda f: (f / "b").write_text("new"))
    assert content(old.parent) == {"out/b": "new"}


def test_a_linked_folder_is_written_where_the_link_leads(old: Path) -> None:
    """Every time, and what a write through the link once left in the place of the old folder goes."""
    link = old.parent / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(old)
    (old.parent / ".out.old").symlink_to(old)
    for text in ("one", "two", "three"):
        write_folder(link, lambda f, text=text: (f / "b").write_text(text))
        assert link.is_symlink() and content(old.parent) == {"out/b": text}
    assert sorted(p.name for p in old.parent.iterdir()) == ["elsewhere", "out"]


def test_a_kill_between_the_renames_loses_nothing(old: Path) -> None:
    """The next write puts the old folder back before it begins, so that its failure leaves that one."""
    old.rename(old.with_name(".out.old"))
    with pytest.raises(UserError, match="the earlier state is kept"):
        write_folder(old, half)
    assert content(old.parent) == {"out/a": "old"}
    write_folder(old, lambda f: (f / "b").write_text("new"))
    assert content(old.parent) == {"out/b": "new"}


def test_only_a_whole_folder_is_put_back(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill amid the removal of the old folder leaves it under another name than the one that is put back."""

    class Killed(BaseException):
        pass

    def kill(path: Path, **_: object) -> None:
        if Path(path, "a").exists():
            Path(path, "a").unlink()
            raise Killed

    (old / "c").write_text("old")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("shutil.rmtree", kill)
        write_folder(old, lambda f: (f / "b").write_text("new"))
    shutil.rmtree(old)
    assert not recover_folder(old) and content(old.parent) == {}


def test_a_linked_file_is_written_where_the_link_leads(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "t")
    for text in ("new", "newer"):
        write_text(link, text)
        assert link.is_symlink() and (tmp_path / "real" / "t").read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_text_is_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "d" / "t", "één")
    write_text(tmp_path / "d" / "t", "twee")
    assert content(tmp_path) == {"d/t": "twee"}


def test_full_disk_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "t", "old")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_text(tmp_path / "t", "new")
    assert content(tmp_path) == {"t": "old"}


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(UserError, match="could not be written"):
        write_text(tmp_path / "f" / "t", "new")
    with pytest.raises(UserError, match="could not be written"):
        write_folder(tmp_path / "f" / "t", lambda f: None)
    assert content(tmp_path) == {"f": "old"}
