"""Read JSON texts. An object that has the same key twice is an error, like text that is no JSON."""

from __future__ import annotations

import json
from typing import Any, Self


def decoded(text: bytes, *, mark: bool = False) -> Any:
    """Return the value of a JSON text, or the error that says what is wrong with it.

    Args:
        text: The text, in UTF-8.
        mark: Whether an object that has a key twice is no error, but is found by `repeated_key_in`.
    """
    try:
        decoder = _MARKS_REPEATED_KEYS if mark else _REFUSES_REPEATED_KEYS
        value: object = decoder.decode(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        where = f"byte 0x{text[error.start]:02x} at column {error.start + 1}"
        return ValueError(f"not UTF-8 ({where}); save the file as UTF-8")
    except RepeatedKey as error:
        return error
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON: {error}")
    if b"\\u" in text:
        # JSON allows half of a surrogate pair in an escape; UTF-8 and tokenizers do not.
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return ValueError("holds half of a \\u surrogate pair; write both halves or remove it")
    return value


def repeated_key_in(value: object) -> RepeatedKey | None:
    """Return the error of the first object in a value that has a key twice."""
    if isinstance(value, Marked):
        return value.error
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(repeated_key_in, parts)), None)


class RepeatedKey(ValueError):
    """The error for a JSON object that has the same key twice; Python would keep only the last."""

    @classmethod
    def of(cls, pairs: list[tuple[str, Any]]) -> Self:
        """Return the error for an object of these keys and values."""
        keys = [key for key, _ in pairs]
        return cls(next(key for key in keys if keys.count(key) > 1))

    def __init__(self, key: str) -> None:
        super().__init__(key)  # the arguments with which a copy in another process is made
        self.key = key

    def __str__(self) -> str:
        """Return the message."""
        return f"an object has the key {self.key!r} twice; remove one of the two"


class Marked(dict[str, Any]):
    """An object that has a key twice."""

    error: RepeatedKey


def _refusing(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise RepeatedKey.of(pairs)
    return fields


def _marking(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        fields = Marked(fields)
        fields.error = RepeatedKey.of(pairs)
    return fields


_REFUSES_REPEATED_KEYS = json.JSONDecoder(object_pairs_hook=_refusing)
_MARKS_REPEATED_KEYS = json.JSONDecoder(object_pairs_hook=_marking)  # to find their row
