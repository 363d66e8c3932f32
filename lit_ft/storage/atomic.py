"""Files and folders that are whole or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def temporary_path(target: Path) -> Path:
    """Return where to write what will be `target`: on the same file system, under a hidden name."""
    return target.with_name(f".{target.name}.tmp")


def replace_atomically(new: Path, target: Path) -> None:
    """Let `new`, which is on disk, take the place of `target`, a file or folder or nothing.

    A file takes a file's place at once. A folder's place has to be free: between two renames
    `target` is not there, and `existing_or_backup` gives the one before it.

    Raises:
        OSError: It could not; `target` is what it was.
    """
    before = _before(target)
    moved = target.is_dir() or (new.is_dir() and target.exists())
    if moved:
        remove(before)  # of a target that is there, so that nobody needs it
        target.rename(before)
    try:
        new.replace(target)
    except OSError:
        if moved:
            before.rename(target)
        raise
    sync_folder(target.parent)  # the rename itself is on disk only when the folder is
    remove(before)


def existing_or_backup(path: str | Path) -> Path | None:
    """Return what is at `path`, or what a process killed in `replace_atomically` has left of it."""
    path = Path(path)
    return next((place for place in (path, _before(path)) if place.exists()), None)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _before(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")
