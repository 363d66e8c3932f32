"""Plain text: every token is a target."""

from __future__ import annotations

from dataclasses import dataclass

from lit_ft.data.formats import Conversation, Row, text_field


@dataclass(frozen=True)
class Text:
    """Rows `{text}`, for continued pre-training; the argument names the column."""

    text: str = "text"

    @property
    def wants(self) -> str:
        """The keys of a row."""
        return f"{{{self.text}}}"

    def matches(self, row: Row) -> bool:
        """Whether the row has the text."""
        return self.text in row

    def parse(self, row: Row) -> Conversation:
        """Return the text."""
        return text_field(row, self.text)
