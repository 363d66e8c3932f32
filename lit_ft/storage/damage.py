"""Notice damaged files before they are used.

torch writes a checkpoint file as a zip archive, which holds a checksum (CRC-32) of each record, and
does not look at it when it loads. A folder has the digests of its files in a file of its own.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash

from lit_ft.storage.plain_values import reason_of

CHECKSUMS = "checksums.json"


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if it is what was written.

    Args:
        path: A file that `torch.save` wrote, or a folder for which `write_checksums` was called. A
            folder without checksums is taken as it is.
    """
    return _damage_of_folder(path) if path.is_dir() else _damage_of_file(path)


def write_checksums(folder: Path) -> None:
    """Write the digests of the files in a folder to `checksums.json` in it."""
    digests = {file.name: _digest(file) for file in _files(folder)}
    (folder / CHECKSUMS).write_text(json.dumps(digests, indent=1) + "\n")


def _damage_of_file(path: Path) -> str | None:
    if path.exists() and not path.is_file():
        return "it is no file"  # to open a FIFO would wait for its writer
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            return f"the checksum of its record {broken} is wrong"
        # What stands around the records has no checksum. Nothing large is read here.
        torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        return None  # it is whole, and loading it refuses what it holds
    except Exception as error:  # broken archives and pickles raise errors of many kinds
        return f"it is no whole archive ({reason_of(error)})"
    return None


def _damage_of_folder(path: Path) -> str | None:
    for entry in path.iterdir():
        if not entry.is_file():
            return f"{entry.name} in it is no file"
    try:
        digests = json.loads((path / CHECKSUMS).read_text())
        for name, expected in digests.items():
            if not (path / name).is_file():
                return f"its file {name} is missing"
            if _digest(path / name) != expected:
                return f"the checksum of its file {name} is wrong"
    except FileNotFoundError:
        return None  # of an earlier version
    except (ValueError, AttributeError, TypeError) as error:
        return f"its {CHECKSUMS} cannot be read ({error})"
    return None


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.iterdir()) if file.name != CHECKSUMS)


def _digest(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
