"""Rows on their way from a source to the encoder."""

from __future__ import annotations

from typing import NamedTuple

from lit_ft.data.conversation import Content
from lit_ft.data.formats import Row


class SourceRow(NamedTuple):
    """A row as its source yields it.

    Args:
        origin: The place of the row in its source, such as `my.jsonl:57`, for error messages.
        fields: The values of the row, keyed by column name; an error if the row could not be read.
        held_out: Whether the row is for validation; None if the source does not decide this.
    """

    origin: str
    fields: Row | ValueError
    held_out: bool | None = None


class ParsedRow(NamedTuple):
    """A row that a format has read.

    Args:
        origin: The place of the row in its source, such as `my.jsonl:57`, for error messages.
        content: The content of the row: a chat, plain text or segments; an error if the row could
            not be read.
        held_out: Whether the row is for validation; None if the source does not decide this.
        unread: The keys of the row that have a value but that its format does not read.
    """

    origin: str
    content: Content | ValueError
    held_out: bool | None = None
    unread: tuple[str, ...] = ()


class Part(NamedTuple):
    """Some successive rows of a source.

    Args:
        first: The number of the first row, counted from 0.
        last: The number of the row after the last one; None for all rows to the end.
    """

    first: int = 0
    last: int | None = None


WHOLE = Part()
"""All rows of a source."""
