"""Plain text: every token but the first is a target."""

from __future__ import annotations

from dataclasses import dataclass

from lit_ft.data.formats import Row, text_field, unread_keys


@dataclass(frozen=True)
class Text:
    """Rows `{text}`, for continued pre-training; the argument names the column."""

    text: str = "text"

    @property
    def wants(self) -> str:
        """The keys that this format reads, for error messages."""
        return f"{{{self.text}}}"

    def matches(self, row: Row) -> bool:
        """Whether the row has the text."""
        return self.text in row

    def parse(self, row: Row) -> str:
        """Return the text."""
        return text_field(row, self.text)

    def unread(self, row: Row) -> list[str]:
        """Return the keys of the row that have a value but are not read."""
        return unread_keys(row, (self.text,))
