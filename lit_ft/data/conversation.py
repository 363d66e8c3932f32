"""What a row says: the messages of a chat, plain text, or pieces of text with their own labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Message = dict[str, Any]
"""One turn of a chat, as chat templates read it.

It has a `role`, a `content` (a string), and where the row says so `reasoning_content`,
`tool_calls`, `name` or `tool_call_id`. `train`, a bool, is not rendered: it says whether the turn
is learnt, whatever its role.
"""


@dataclass(frozen=True)
class Conversation:
    """A chat, and what else its row gives to the chat template.

    Args:
        messages: The turns, in order.
        tools: The JSON schemas of the functions that the assistant may call; None if there are
            none.
        template_options: Further variables of the chat template, such as `enable_thinking`.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)


class Segment(NamedTuple):
    """A piece of text that is rendered by no template.

    Args:
        text: The text, with every control token that the model needs.
        label: Whether its tokens are learnt.
    """

    text: str
    label: bool


Content = Conversation | Sequence[Message] | Sequence[Segment] | str
"""What a row says: a chat (or its messages alone), segments, or plain text to continue."""


def chat_of(content: Content) -> Conversation | None:
    """Return the chat that a row's content is; None for plain text and segments."""
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
