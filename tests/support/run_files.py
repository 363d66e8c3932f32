"""What is in the folder of a run."""

from __future__ import annotations

from pathlib import Path

from lit_ft.run.files import LOCK


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of each file but the lock, keyed by its path in the folder."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
