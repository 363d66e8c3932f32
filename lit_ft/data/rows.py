"""Rows on their way from a source to the encoder."""

from __future__ import annotations

from typing import NamedTuple

from lit_ft.data.conversation import Content
from lit_ft.data.formats import Row


class SourceRow(NamedTuple):
    """A row as its source yields it.

    Args:
        origin: The place of the row in its source, for errors (`my.jsonl:57`).
        fields: The values of the row by column name, which a format reads; an error if the row
            could not be read.
        held_out: Whether the row is for validation; None where the source leaves that open.
    """

    origin: str
    fields: Row | ValueError
    held_out: bool | None = None


class ParsedRow(NamedTuple):
    """A row that a format has read.

    Args:
        origin: The place of the row in its source, for errors (`my.jsonl:57`).
        content: A chat, plain text or labelled segments; an error if the row could not be read.
        held_out: Whether the row is for validation; None where the source leaves that open.
        unread: The keys of the row that its format does not read.
    """

    origin: str
    content: Content | ValueError
    held_out: bool | None = None
    unread: tuple[str, ...] = ()
