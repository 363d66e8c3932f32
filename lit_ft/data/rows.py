"""Rows on their way from a source to the encoder."""

from __future__ import annotations

from typing import NamedTuple

from lit_ft.data.formats import Conversation, Row


class SourceRow(NamedTuple):
    """A row as its source yields it.

    Args:
        origin: The place of the row in its source, for errors (`my.jsonl:57`).
        fields: The values of the row by column name, which a format reads.
        held_out: Whether the row is for validation; None where the source leaves that open.
    """

    origin: str
    fields: Row
    held_out: bool | None = None


class ParsedRow(NamedTuple):
    """A row that a format has read.

    Args:
        origin: The place of the row in its source, for errors (`my.jsonl:57`).
        conversation: The messages of a chat, or plain text.
        held_out: Whether the row is for validation; None where the source leaves that open.
    """

    origin: str
    conversation: Conversation
    held_out: bool | None = None
