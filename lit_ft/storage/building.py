"""Make a folder that is complete before anybody sees it, and clear up after processes that died."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX = "building-"


@contextmanager
def building(parent: Path) -> Iterator[Path]:
    """Make a new folder in `parent`, to be moved elsewhere when it is complete.

    What is left of it is removed at the end, and so is what killed processes have left in `parent`.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(parent)
    folder = parent / f"{_PREFIX}{uuid.uuid4().hex}"
    lock = FileLock(_lock_of(folder))  # the system releases it if the process dies
    with lock:
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _lock_of(folder).unlink(missing_ok=True)


def _remove_left_over(parent: Path) -> None:
    for file in parent.glob(f"{_PREFIX}*.lock"):
        try:
            with FileLock(file, timeout=0):
                shutil.rmtree(file.with_suffix(""), ignore_errors=True)
                file.unlink(missing_ok=True)
        except (Timeout, OSError):
            continue  # its process is alive, or the file belongs to another user


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
