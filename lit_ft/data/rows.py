"""Rows on their way from a source to the encoder."""

from __future__ import annotations

from typing import NamedTuple

from lit_ft.data.formats import Conversation, Row


class SourceRow(NamedTuple):
    """A row as its source gives it.

    Args:
        origin: Where it stands, for errors: `my.jsonl:57`.
        fields: What it holds; a format reads it.
        held_out: Whether it is for validation, or None where the source leaves that open.
    """

    origin: str
    fields: Row
    held_out: bool | None = None


class ParsedRow(NamedTuple):
    """A row that a format has read.

    Args:
        origin: As above.
        conversation: The messages of a chat, or plain text.
        held_out: As above.
    """

    origin: str
    conversation: Conversation
    held_out: bool | None = None
