"""Replace the texts of a chat with marks, and find what its template writes between them.

A *rendering* is the text that a template makes of a chat. Its *words* are the pieces that the
template itself writes before, between and after the marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lit_ft.data.conversation import Conversation

_THINK_TAG = re.compile(r"(</?think>)")  # some templates cut a text at these tags
_EmptyTexts = Literal["all", "answers", "alone", "none"]
# Tried in turn, because many templates write something else if a text is empty.
EMPTY_TEXTS: tuple[_EmptyTexts, ...] = ("all", "answers", "alone", "none")


class Text(NamedTuple):
    """A text of a message.

    Args:
        message: The index of the message in the chat.
        field: The field of the message that holds the text: "content", "reasoning_content" or
            "tool_calls". "tools" stands for the tools of the whole chat.
        text: The text without the white space around it.
    """

    message: int
    field: str
    text: str


class Words(NamedTuple):
    """The template's words in a rendering of marks, and the marks between them.

    Args:
        words: The words in order. There is one more word than there are marks.
        marks: The marks in order, each as the index of a message and the number of a text.
    """

    words: list[str]
    marks: list[tuple[int, int]]


def mark_texts(
    chat: Conversation, stem: str, *, empty: _EmptyTexts = "none"
) -> tuple[Conversation, list[Text]]:
    """Return a chat with marks in place of its texts, and the texts in the order of their numbers.

    Args:
        chat: The chat to mark.
        stem: The string that each mark begins and ends with.
        empty: The empty contents that get a mark too: "all" or "none" of them, "answers" for those
            of assistant messages, or "alone" for those of assistant messages without other texts.
    """
    texts: list[Text] = []

    def marked(i: int, field: str, value: str) -> str:
        parts = []
        for part in _THINK_TAG.split(value):
            text = part.strip()
            if text and not _THINK_TAG.fullmatch(part):
                part = part.replace(text, f"{stem}{i}x{len(texts)}{stem}", 1)
                texts.append(Text(i, field, text))
            parts.append(part)
        return "".join(parts)

    messages = []
    for i, message in enumerate(chat.messages):
        message = {name: value for name, value in message.items() if name != "train"}
        for field in ("reasoning_content", "content"):
            if field in message:
                message[field] = marked(i, field, message[field])
        if "tool_calls" in message:
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "name": marked(i, "tool_calls", name)}}
                for call in message["tool_calls"]
                if (name := call["function"]["name"]) is not None
            ]
        fields = [text.field for text in texts if text.message == i]
        of_those = {
            "all": True,
            "answers": message["role"] == "assistant",
            "alone": message["role"] == "assistant" and not fields,
            "none": False,
        }
        if "content" not in fields and of_those[empty]:
            message["content"] += f"{stem}{i}x{len(texts)}{stem}"
            texts.append(Text(i, "content", ""))
        messages.append(message)
    return Conversation(messages, chat.tools, chat.template_options), texts


def put_back(
    text: str, words: Words, texts: Sequence[Text]
) -> tuple[list[int], list[tuple[int, int]], list[Text]] | None:
    """Find the template's words, and the texts between them, in the rendering of a chat.

    Args:
        text: The rendering of the chat with its own texts.
        words: The words and marks that `split_at_marks` finds in the rendering with marks.
        texts: The texts of the chat, in the order of their numbers.

    Returns:
        The index of the character at which each word starts, the places [first, last) of the texts,
        and the texts that the template has changed; None if the rendering has other words.
    """
    starts, spans, changed = [0], [], []
    if not text.startswith(words.words[0]):
        return None
    at = len(words.words[0])
    for (_, number), following in zip(words.marks, words.words[1:], strict=True):
        is_last = len(starts) == len(words.marks)
        after = at + len(texts[number].text)
        if not text.startswith(texts[number].text + following, at):
            after = text.find(following, at) if following else -1
            if after < 0:
                return None
            changed.append(texts[number])
        if is_last and after + len(following) != len(text):
            return None
        spans.append((at, after))
        starts.append(after)
        at = after + len(following)
    return (starts, spans, changed) if at == len(text) else None


def split_at_marks(text: str, stem: str) -> Words:
    """Return the words of a rendering, and the marks between them."""
    parts = re.split(rf"{stem}(\d+)x(\d+){stem}", text)
    marks = list(zip(map(int, parts[1::3]), map(int, parts[2::3]), strict=True))
    return Words(parts[::3], marks)


def key_of(chat: Conversation) -> str:
    """Return a chat as JSON, which `chat_of_key` turns back into the chat."""
    return json.dumps([list(chat.messages), chat.tools, dict(chat.template_options)])


def chat_of_key(key: str) -> Conversation:
    """Return the chat that `key_of` turned into JSON."""
    messages, tools, options = json.loads(key)
    return Conversation(messages, tools, options)


def unused_stem(text: str = "") -> str:
    """Return a stem for marks that does not occur in a text."""
    stem = "qzj"
    while stem in text:
        stem += "q"
    return stem
