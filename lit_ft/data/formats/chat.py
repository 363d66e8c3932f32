"""Chats: lists of messages, as OpenAI and as ShareGPT write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_ft.data.formats import Message, Row

# OpenAI's names are the chat templates' own; the last two are ShareGPT's.
ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
}


@dataclass(frozen=True)
class Chat:
    """Rows `{messages: [{role, content}]}` or `{conversations: [{from, value}]}`.

    Sources: OpenAI's fine-tuning files, and FastChat's ShareGPT files
    (https://github.com/lm-sys/FastChat).

    Args:
        messages: The column with the list of messages; None takes `messages` or `conversations`,
            whichever the row has.
    """

    messages: str | None = None

    @property
    def wants(self) -> str:
        """The keys of a row."""
        if self.messages is not None:
            return f"{{{self.messages}: [{{role, content}}]}}"
        return "{messages: [{role, content}]} or {conversations: [{from, value}]}"

    def matches(self, row: Row) -> bool:
        """Whether the row has a list of messages under one of the names."""
        return any(name in row for name in self._columns)

    def parse(self, row: Row) -> list[Message]:
        """Return the messages with OpenAI's names for their roles."""
        column = next((name for name in self._columns if name in row), None)
        if column is None:
            missing = " or ".join(map(repr, self._columns))
            raise ValueError(f"the field {missing} is missing; the row has {sorted(map(str, row))}")
        turns = row[column]
        if not isinstance(turns, list):
            raise ValueError(f"{column!r} must be a list of messages, not {type(turns).__name__}")
        if not turns:
            raise ValueError(f"{column!r} holds no message")
        return [_message(turn, f"{column}[{place}]") for place, turn in enumerate(turns)]

    @property
    def _columns(self) -> tuple[str, ...]:
        return ("messages", "conversations") if self.messages is None else (self.messages,)


def _message(turn: Any, place: str) -> Message:
    """Read one turn. `place`, such as `messages[2]`, names it in errors."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"{place} must be an object, not {type(turn).__name__}")
    sharegpt = turn.get("role") is None and turn.get("from") is not None
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    for key in (role_key, content_key):
        if not isinstance(turn.get(key), str):
            raise ValueError(f"{place} needs a string {key!r}, found {turn.get(key)!r:.60}")
    if turn[role_key] not in ROLES:
        raise ValueError(
            f"{place} has the unknown role {turn[role_key]!r}; known roles are {', '.join(ROLES)}: "
            "rename it in the file"
        )
    # Ignoring these would lose what the author meant, or train on a turn that the author excluded.
    if turn.get("tool_calls"):
        raise ValueError(f"{place} calls a tool, which this format does not read: write the text")
    if turn.get("weight") not in (None, 1):
        raise ValueError(
            f"{place} has the weight {turn['weight']!r}, but every assistant turn is learnt: "
            "remove the weight, or end the conversation before this turn"
        )
    return Message(role=ROLES[turn[role_key]], content=turn[content_key])
