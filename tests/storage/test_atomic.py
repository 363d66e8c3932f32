"""At every moment of a replacement there is something whole to be found."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_ft.storage.atomic import existing_or_backup, replace_atomically, temporary_path

KINDS = ["file", "folder"]


def make(path: Path, kind: str, content: str) -> Path:
    if kind == "folder":
        path.mkdir()
        (path / "part").write_text(content)
    else:
        path.write_text(content)
    return path


def content(path: Path) -> str:
    return (path / "part" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("before", [None, *KINDS])
@pytest.mark.parametrize("after", KINDS)
def test_what_is_new_takes_the_place_of_anything_and_leaves_nothing(before, after, tmp_path):
    target = tmp_path / "last.ckpt"
    if before is not None:
        make(target, before, "before")
    replace_atomically(make(temporary_path(target), after, "after"), target)
    assert content(target) == "after"
    assert target.is_dir() is (after == "folder")
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("before", KINDS)
@pytest.mark.parametrize("after", KINDS)
@pytest.mark.parametrize("rename", ["rename", "replace"])
def test_killed_at_any_rename_it_leaves_something_whole(
    rename, before, after, tmp_path, monkeypatch
):
    target = make(tmp_path / "last.ckpt", before, "before")

    class Killed(BaseException):
        pass

    def killed(self, target):
        raise Killed

    new = make(temporary_path(target), after, "after")
    with monkeypatch.context() as patched:
        patched.setattr(Path, rename, killed)
        try:
            replace_atomically(new, target)
            assert (before, after) == ("file", "file")  # which takes one rename alone
            assert rename == "rename"
        except Killed:
            assert content(existing_or_backup(target)) == "before"
    # The next save does not stumble over what was left.
    replace_atomically(make(temporary_path(tmp_path / "other"), after, "next"), target)
    assert content(target) == "next"
    assert content(existing_or_backup(target)) == "next"


@pytest.mark.parametrize("after", KINDS)
def test_a_refused_rename_leaves_what_was_there(after, tmp_path, monkeypatch):
    target = make(tmp_path / "last.ckpt", "folder", "before")

    def refused(self, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(PermissionError):
        replace_atomically(make(temporary_path(target), after, "after"), target)
    assert content(target) == "before"


def test_half_a_folder_is_never_found(tmp_path):
    target = tmp_path / "last.ckpt"
    make(temporary_path(target), "folder", "half")
    assert existing_or_backup(target) is None
