"""Write files and folders so that they are either complete or absent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def temporary_path(target: Path) -> Path:
    """Return a hidden path beside `target`, to write to before `replace_atomically` moves it."""
    return target.with_name(f".{target.name}.tmp")


def replace_atomically(new: Path, target: Path) -> None:
    """Move `new`, a file or folder on disk, to `target`, and replace what is there.

    A file replaces another file in one step. A folder takes two renames. If the process is killed
    between the two, `target` is absent, and `existing_or_backup` finds the old folder.

    Raises:
        OSError: If the move fails. `target` is then unchanged.
    """
    before = _before(target)
    moved = target.is_dir() or (new.is_dir() and target.exists())
    if moved:
        remove(before)  # an older backup, not needed while `target` exists
        target.rename(before)
    try:
        new.replace(target)
    except OSError:
        if moved:
            before.rename(target)
        raise
    sync_folder(target.parent)  # the rename itself is on disk only once the folder is
    remove(before)


def write_text(target: Path, text: str) -> None:
    """Write a small file completely or not at all.

    Raises:
        OSError: If it cannot be written. `target` is then unchanged.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    try:
        remove(temporary)  # it may be a link, to a file that would be written to
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        replace_atomically(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def keep_copy(path: Path, copy: Path) -> None:
    """Make `copy` the present state of `path`, a file or folder, without writing its data again.

    The copy is a hard link, which keeps the data when `path` is replaced, not when it is written
    to. A file system without hard links gets a real copy.
    """
    temporary = temporary_path(copy)
    remove(temporary)
    if path.is_dir():
        shutil.copytree(path, temporary, copy_function=_link)
    else:
        _link(path, temporary)
    replace_atomically(temporary, copy)


def keep_earlier(path: Path, keep: int) -> None:
    """Keep the present state of `path`, which is about to be replaced, and those before it.

    Args:
        path: The file or folder, such as `last.ckpt`. Its earlier states are `last-1.ckpt`, the
            newest of them, `last-2.ckpt` and so on.
        keep: The number of states to keep, with the one that is about to be written.
    """
    if path.exists() and keep > 1:
        places = earlier(path, keep - 1)
        for newer, older in reversed(list(zip(places, places[1:], strict=False))):
            if newer.exists():
                replace_atomically(newer, older)
        keep_copy(path, places[0])


def earlier(path: Path, number: int) -> list[Path]:
    """Return the places of a number of earlier states of `path`, the newest first."""
    return [path.with_name(f"{path.stem}-{age + 1}{path.suffix}") for age in range(number)]


def _link(source: str | Path, target: str | Path) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return str(target)


def existing_or_backup(path: str | Path) -> Path | None:
    """Return `path`, or the backup that a killed `replace_atomically` left, or else None."""
    path = Path(path)
    return next((place for place in (path, _before(path)) if place.exists()), None)


def remove_left_over(folder: Path) -> None:
    """Remove the temporary files and the backups that killed processes have left in a folder.

    A backup stays if what it is a backup of is missing. No other process may write to the folder.
    """
    for path in folder.glob(".*"):
        replaced = path.with_name(path.stem.removeprefix("."))
        if path.suffix == ".tmp" or (path.suffix == ".old" and replaced.exists()):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or folder, if it exists; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until new and renamed entries of `folder` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _before(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")
