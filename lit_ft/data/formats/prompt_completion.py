"""A prompt and its completion."""

from __future__ import annotations

from dataclasses import dataclass

from lit_ft.data.formats import Conversation, Message, Row, text_field
from lit_ft.data.formats.chat import Chat


@dataclass(frozen=True)
class PromptCompletion:
    """Rows `{prompt, completion}`; the arguments name the columns.

    Each column holds a string (one user turn, or one assistant turn) or a list of chat messages. In
    a list, every assistant turn is learnt, including those of the prompt. Source: the TRL library's
    data formats, https://huggingface.co/docs/trl/dataset_formats.
    """

    prompt: str = "prompt"
    completion: str = "completion"

    @property
    def wants(self) -> str:
        """The keys of a row."""
        return f"{{{self.prompt}, {self.completion}}}"

    def matches(self, row: Row) -> bool:
        """Whether the row has a prompt and a completion."""
        return self.prompt in row and self.completion in row

    def parse(self, row: Row) -> Conversation:
        """Return the prompt's messages and then the completion's."""
        return _messages(row, self.prompt, "user") + _messages(row, self.completion, "assistant")


def _messages(row: Row, field: str, role: str) -> list[Message]:
    if isinstance(row.get(field), list):
        return Chat(messages=field).parse(row)
    return [Message(role=role, content=text_field(row, field))]
