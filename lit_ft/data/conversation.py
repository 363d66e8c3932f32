"""The content of a row: a chat, plain text, or segments of text with their own labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Message = dict[str, Any]
"""One turn of a chat, as chat templates read it.

It has a `role` and a `content` (a string). It may also have `reasoning_content`, `tool_calls`,
`name` and `tool_call_id`. A bool `train`, which is not rendered, says whether the turn is learnt,
whatever its role.
"""


@dataclass(frozen=True)
class Conversation:
    """A chat: its messages, and the other values that the chat template reads.

    Args:
        messages: The messages of the chat, in order.
        tools: The JSON schemas of the functions that the assistant may call; None if there are
            none.
        template_options: Further variables of the chat template, such as `enable_thinking`.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)


class Segment(NamedTuple):
    """A piece of text that is encoded without a chat template.

    Args:
        text: The text, with every control token that the model needs.
        label: Whether the tokens of the text are learnt.
    """

    text: str
    label: bool


Content = Conversation | Sequence[Message] | Sequence[Segment] | str
"""The content of a row: a chat (or only its messages), segments, or plain text."""


def chat_of(content: Content) -> Conversation | None:
    """Return the content of a row as a chat; None if it is plain text or segments."""
    if isinstance(content, Conversation):
        return content
    if isinstance(content, str):
        return None
    messages = [turn for turn in content if isinstance(turn, dict)]
    return Conversation(messages) if messages else None


def prompt_of(chat: Conversation) -> Sequence[Message]:
    """Return the messages before the last assistant turn; none if there is no such turn."""
    turns = [place for place, turn in enumerate(chat.messages) if turn["role"] == "assistant"]
    return chat.messages[: turns[-1]] if turns else []
