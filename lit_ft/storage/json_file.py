"""Small JSON files that are written completely or not at all, and whose damage is noticed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from lit_ft.storage.atomic import write_text

CHECKSUM = "checksum"
"""The last key of a file: the digest of all other keys and values."""


def write_json(path: Path, fields: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write the fields of an object and their checksum.

    Args:
        path: The file.
        fields: The keys and values. What is not JSON is written as text.
        indent: The number of spaces before a key; None writes one line.

    Raises:
        OSError: If the file cannot be written. An earlier one is then unchanged.
    """
    plain = as_plain(fields)
    sealed = {**plain, CHECKSUM: _digest(plain)}
    write_text(path, json.dumps(sealed, indent=indent) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the fields of an object, without their checksum. A file may have none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not what was written. The message names it.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is damaged: it is no file")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"it holds a {type(fields).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    expected = fields.pop(CHECKSUM, None)
    if expected is not None and expected != _digest(fields):
        raise ValueError(f"{path} is damaged: its checksum is wrong")
    return fields


def as_plain(value: Any) -> Any:
    """Return a value as it comes back from a file. What is not JSON becomes text."""
    return json.loads(json.dumps(value, default=str))


def _digest(fields: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())
