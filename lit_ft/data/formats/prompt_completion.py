"""A prompt and its completion."""

from __future__ import annotations

from dataclasses import dataclass

from lit_ft.data.conversation import Conversation, Message
from lit_ft.data.formats import Row, text_field, unread_inside, unread_keys
from lit_ft.data.formats.chat import BESIDE, MESSAGE_KEYS, conversation, read_messages


@dataclass(frozen=True)
class PromptCompletion:
    """Rows `{prompt, completion}`; the arguments name the columns.

    Each column holds a string or a list of messages. A prompt that is a string is one user turn,
    and a completion that is a string is one assistant turn. A message of the prompt is learnt only
    if it says so itself. Source: the TRL library's data formats,
    https://huggingface.co/docs/trl/dataset_formats.
    """

    prompt: str = "prompt"
    completion: str = "completion"

    @property
    def wants(self) -> str:
        """The keys that this format reads, for error messages."""
        return f"{{{self.prompt}, {self.completion}}}"

    def matches(self, row: Row) -> bool:
        """Whether the row has a prompt and a completion."""
        return self.prompt in row and self.completion in row

    def parse(self, row: Row) -> Conversation:
        """Return the messages of the prompt, followed by those of the completion."""
        ahead = [{"train": False, **turn} for turn in _messages(row, self.prompt, "user")]
        return conversation([*ahead, *_messages(row, self.completion, "assistant")], row)

    def unread(self, row: Row) -> list[str]:
        """Return the keys of the row and its messages that have a value but are not read."""
        columns = (self.prompt, self.completion)
        inside = [key for column in columns for key in unread_inside(row, column, MESSAGE_KEYS)]
        return [*unread_keys(row, (*columns, *BESIDE)), *inside]


def _messages(row: Row, field: str, role: str) -> list[Message]:
    if isinstance(row.get(field), list):
        return read_messages(row, field)
    return [Message(role=role, content=text_field(row, field))]
