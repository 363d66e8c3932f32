"""The formats that the rows of a dataset may have, each in a file of this package.

A format is a dataclass whose fields name the columns that it reads. To add one, add a file with its
class to this package, and edit nothing else. `detect` chooses a format from the keys of a row.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from functools import cache
from itertools import product
from typing import Any, Protocol, cast

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal, Remedy
from lit_ft.data.conversation import Content

Row = Mapping[str, Any]


class Format(Protocol):
    """Reads the content of rows.

    A format may also have a method `unread(row)`. It returns the keys of the row that have a value
    but are not read, so that a run can count and name them.
    """

    @property
    def wants(self) -> str:
        """The keys that this format reads, for error messages: `{prompt, completion}`."""
        ...

    def matches(self, row: Row) -> bool:
        """Whether the row has this format's keys."""
        ...

    def parse(self, row: Row) -> Content:
        """Return the content of the row, with every character unchanged.

        Raises:
            ValueError: If a field is missing, a type is wrong or a role is unknown. The message
                names it.
        """
        ...


@cache
def available() -> tuple[type[Format], ...]:
    """Return every format class of this package, in the alphabetical order of their files."""
    found: list[type[Format]] = []
    for info in pkgutil.iter_modules(__path__, f"{__name__}."):
        module = importlib.import_module(info.name)
        found += [
            cast(type[Format], kind)
            for _, kind in inspect.getmembers(module, inspect.isclass)
            if kind.__module__ == info.name and hasattr(kind, "matches") and hasattr(kind, "parse")
        ]
    return tuple(found)


def named(name: str) -> Format:
    """Return the format called `name`, with its default columns; raise ValueError if unknown."""
    kinds = {_name(kind): kind for kind in available()}
    if name not in kinds:
        raise ValueError(f"format={name}: there is no such format. There are: {', '.join(kinds)}.")
    return kinds[name]()


def _name(kind: type[Format]) -> str:
    return kind.__module__.rpartition(".")[2]


def detect(row: Row) -> Format:
    """Return the first of the `available` formats that matches the row with its default columns.

    Raises:
        ValueError: If none matches. The message lists the keys of the row and those of each format.
    """
    formats = [kind() for kind in available()]
    for candidate in formats:
        if candidate.matches(row):
            return candidate
    wanted = "; ".join(f"{_name(type(one))}: {one.wants}" for one in formats)
    raise Refusal(
        f"no format fits a row with the keys {sorted(map(str, row))}. Known formats are {wanted}",
        Remedy("rename the keys"),
        _nearest(formats, row) or remedies.NAMED_COLUMNS,
    )


_QUESTIONS = ("question", "query", "prompt", "instruction", "input")
_ANSWERS = ("answer", "response", "output", "reply", "completion", "target")
# What people call the columns of the formats, keyed by the format's argument.
_USUAL: dict[str, tuple[str, ...]] = {"instruction": _QUESTIONS, "prompt": _QUESTIONS}
_USUAL |= {"output": _ANSWERS, "completion": _ANSWERS}


def _nearest(formats: Iterable[Any], row: Row) -> Remedy | None:
    """Return how to read the row in a format that misses one of its columns, if only one does."""
    found = []
    for one in formats:
        columns = {field.name: getattr(one, field.name) for field in fields(one)}
        missing = [name for name, column in columns.items() if column not in row]
        others = [key for key in row if key not in columns.values()]
        if len(missing) < len(columns):  # the row has a column of this format
            found += [
                (one, name, key)
                for name, key in product(missing, others)
                if key in _USUAL.get(name, ()) and replace(one, **{name: key}).matches(row)
            ]
    if len(found) != 1:
        return None
    [(one, column, key)] = found
    return Remedy(
        f'name the column, as in format={type(one).__name__}({column}="{key}")',
        {"data/format": _name(type(one)), f"data.format.{column}": key},
    )


def unread_keys(row: Mapping[str, Any], read: Collection[str]) -> list[str]:
    """Return the keys of a row, or of a message, that have a value and are not among `read`."""
    return [str(key) for key, value in row.items() if key not in read and value not in _NOTHING]


def unread_inside(row: Row, column: str, read: Collection[str]) -> list[str]:
    """Return the unread keys of the objects in a row's list, each once, such as `messages[].x`."""
    entries = row.get(column)
    if not isinstance(entries, list):
        return []
    keys = [key for entry in entries for key in unread_keys(entry, read)]
    return [f"{column}[].{key}" for key in dict.fromkeys(keys)]


_NOTHING: tuple[Any, ...] = (None, "", [], {})  # a table has every column in every row


def text_field(row: Row, name: str) -> str:
    """Return the string in a row's column; raise ValueError if it is missing or not a string."""
    if name not in row:
        raise ValueError(f"the field {name!r} is missing; the row has {sorted(map(str, row))}")
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"the field {name!r} must be a string, not {type(value).__name__}")
    return value
