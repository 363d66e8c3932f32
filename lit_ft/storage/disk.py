"""How much of a disk the files of a folder take."""

from __future__ import annotations

from pathlib import Path


def disk_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder and below it; a file with two names counts once."""
    files = [file.stat() for file in folder.rglob("*") if file.is_file()]
    sizes = {(file.st_dev, file.st_ino): file.st_size for file in files}
    return sum(sizes.values())
