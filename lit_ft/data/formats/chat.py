"""Chats: lists of messages, as OpenAI and as ShareGPT write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lit_ft.data.conversation import Conversation, Message
from lit_ft.data.formats import Row, unread_inside, unread_keys

# OpenAI's names are the chat templates' own; those of ShareGPT and of older files follow.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
COLUMNS = ("messages", "conversations")
BESIDE = ("tools", "chat_template_kwargs", "system")  # columns that say more about the chat
TRAIN_KEYS = ("train", "weight", "loss")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MESSAGE_KEYS = (
    *("role", "from", "content", "value", "name", "tool_call_id", "tool_calls", "function_call"),
    *("reasoning_content", "reasoning", "thinking", *TRAIN_KEYS),
)


@dataclass(frozen=True)
class Chat:
    """Rows `{messages: [{role, content}]}` or `{conversations: [{from, value}]}`.

    The content of a message is a string or a list of text parts. A message may have
    `reasoning_content` (also called `reasoning` or `thinking`) and `tool_calls` (or the older
    `function_call`). One of `train`, `weight` and `loss` may say whether the message is learnt.
    A row may have `tools`, a `system` message and `chat_template_kwargs`. `tools` and
    `chat_template_kwargs` may be written as JSON in strings.

    Sources: OpenAI's fine-tuning files, and FastChat's ShareGPT files
    (https://github.com/lm-sys/FastChat).

    Args:
        messages: The column with the list of messages; None takes `messages` or `conversations`,
            whichever the row has.
    """

    messages: str | None = None

    @property
    def wants(self) -> str:
        """The keys that this format reads, for error messages."""
        if self.messages is not None:
            return f"{{{self.messages}: [{{role, content}}]}}"
        return "{messages: [{role, content}]} or {conversations: [{from, value}]}"

    def matches(self, row: Row) -> bool:
        """Whether the row has a column for messages."""
        return any(name in row for name in self._columns)

    def parse(self, row: Row) -> Conversation:
        """Return the chat with OpenAI's names for its roles."""
        return conversation(read_messages(row, *self._columns), row)

    def unread(self, row: Row) -> list[str]:
        """Return the keys of the row and its messages that have a value but are not read."""
        column = _column(row, self._columns)
        return [*unread_keys(row, (column, *BESIDE)), *unread_inside(row, column, MESSAGE_KEYS)]

    @property
    def _columns(self) -> tuple[str, ...]:
        return COLUMNS if self.messages is None else (self.messages,)


def read_messages(row: Row, *columns: str) -> list[Message]:
    """Return the messages in the first of `columns` that has a value in the row.

    Raises:
        ValueError: If the row has none of the columns, or if a message cannot be read. The text of
            the error names the column or the message.
    """
    column = _column(row, columns)
    turns = row[column]
    if not isinstance(turns, list):
        raise ValueError(f"{column!r} must be a list of messages, not {type(turns).__name__}")
    if not turns:
        raise ValueError(f"{column!r} holds no message")
    return [_message(turn, f"{column}[{place}]") for place, turn in enumerate(turns)]


def _column(row: Row, columns: Sequence[str]) -> str:
    """Return the first of `columns` that has a value in the row, or else the first that exists."""
    found = [name for name in columns if name in row]
    if not found:
        missing = " or ".join(map(repr, columns))
        raise ValueError(f"the field {missing} is missing; the row has {sorted(map(str, row))}")
    return next((name for name in found if row[name] is not None), found[0])


def conversation(messages: Sequence[Message], row: Row) -> Conversation:
    """Return the chat of these messages, with the row's tools, system message and options.

    Raises:
        ValueError: If the row's `tools`, `system` or `chat_template_kwargs` cannot be read, if the
            messages begin with another system message than `system`, or if the chat has a value
            that JSON cannot hold, such as a date or half of a surrogate pair.
    """
    system = row.get("system")
    if system not in (None, ""):
        if not isinstance(system, str):
            raise ValueError(f"'system' must be a string, not {type(system).__name__}")
        if messages[0]["role"] != "system":
            messages = [Message(role="system", content=system), *messages]
        elif messages[0]["content"] != system:
            raise ValueError("the row has a 'system' and another message of the role system")
    tools = _decoded(row.get("tools"), "tools", list) or None
    options = _decoded(row.get("chat_template_kwargs"), "chat_template_kwargs", dict) or {}
    tools = tools and [_tool(tool) for tool in tools]
    try:
        json.dumps([messages, tools, options], ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise ValueError(f"the chat cannot be written as JSON in UTF-8: {error}") from error
    return Conversation(messages, tools, options)


def _tool(tool: Any) -> Any:
    """Read the schema of one tool, which may be JSON in a string or lack its outer object."""
    tool = _decoded(tool, "tools", dict)
    if isinstance(tool, dict) and "name" in tool and "function" not in tool:
        return {"type": "function", "function": tool}
    return tool


def _message(turn: Any, place: str) -> Message:
    """Read one turn. `place`, such as `messages[2]`, names it in errors."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"{place} must be an object, not {type(turn).__name__}")
    sharegpt = turn.get("role") is None and turn.get("from") is not None
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    role = turn.get(role_key)
    if not isinstance(role, str):
        raise ValueError(f"{place} needs a string {role_key!r}, found {role!r:.60}")
    if role not in ROLES:
        raise ValueError(
            f"{place} has the unknown role {role!r}; known roles are {', '.join(ROLES)}: "
            "rename it in the file"
        )
    message = Message(role=ROLES[role])
    calls = _calls(turn, place)
    if role == "function_call":  # ShareGPT's way to write a call: as JSON in place of the text
        calls = [_call(_decoded(turn.get(content_key), place, dict), place)]
        message["content"] = ""
    else:
        message["content"] = _text(turn.get(content_key), f"{place}.{content_key}", bool(calls))
    other_key = "content" if sharegpt else "value"
    if turn.get(other_key) not in (None, "", turn.get(content_key)):
        raise _ambiguous(place, [content_key, other_key])
    if reasoning := _one_of(turn, REASONING_KEYS, place, partial(_text, may_be_missing=False)):
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if turn.get(key) is not None:
            message[key] = turn[key]
    if (train := _one_of(turn, TRAIN_KEYS, place, _flag)) is not None:
        message["train"] = train
    return message


def _one_of(
    turn: Mapping[str, Any], keys: Sequence[str], place: str, read: Callable[[Any, str], Any]
) -> Any:
    """Return what a turn says under one of several keys; None if it has none of them."""
    given = {k: read(turn[k], f"{place}.{k}") for k in keys if turn.get(k) not in (None, "")}
    if len(set(given.values())) > 1:
        raise _ambiguous(place, list(given))
    return next(iter(given.values()), None)


def _ambiguous(place: str, keys: Sequence[str]) -> ValueError:
    return ValueError(
        f"{place} says different things under {' and '.join(keys)}, which mean the same: keep one"
    )


def _text(value: Any, place: str, may_be_missing: bool) -> str:
    """Return a text, which is either a string or the texts of a list of parts, joined."""
    if value is None and may_be_missing:
        return ""
    if isinstance(value, list):
        for part in value:
            if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise ValueError(
                    f"{place} has a part that is no text ({kind}); only text is learnt"
                )
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        name = place.rpartition(".")
        raise ValueError(f"{name[0]} needs a string {name[2]!r}, found {value!r:.60}")
    return value


def _calls(turn: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """Return the calls of a turn in OpenAI's form, with arguments as objects."""
    calls = _decoded(turn.get("tool_calls"), f"{place}.tool_calls", list) or []
    if turn.get("function_call"):
        calls = [*calls, {"function": turn["function_call"]}]
    return [_call(call, f"{place}.tool_calls") for call in calls]


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
        raise ValueError(f"{place} needs a function with a 'name', found {call!r:.60}")
    others = unread_keys(function, ("id", "index", "type", "name", "arguments"))
    if function.get("arguments") is None and others:
        raise ValueError(f"{place} has no 'arguments', but {', '.join(map(repr, others))}")
    arguments = _decoded(function.get("arguments"), f"{place}.arguments", dict)
    wrapped = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return identity | wrapped


def _decoded(value: Any, place: str, kind: type) -> Any:
    """Return a list or an object that may be JSON in a string; an empty one if it is missing."""
    if value in (None, ""):
        return kind()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{place} is a string that is not JSON: {error}") from error
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise ValueError(f"{place} must be a {kind.__name__}, not {type(value).__name__}")
    return value


def _flag(value: Any, place: str) -> bool:
    """Return whether a turn is learnt. Weights other than 0 and 1 are refused."""
    if value not in (0, 1):
        raise ValueError(f"{place} is {value!r}; a turn is learnt (1) or not (0)")
    return bool(value)
