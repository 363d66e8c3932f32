"""Alpaca: an instruction, an optional input, and the desired output."""

from __future__ import annotations

from dataclasses import dataclass

from lit_ft.data.formats import Conversation, Message, Row, text_field


@dataclass(frozen=True)
class Alpaca:
    """Rows `{instruction, input?, output}`; the arguments name the columns.

    The user's turn is the instruction and, after an empty line, the input if there is one. The
    format's preamble is left to the chat template. Source:
    https://github.com/tatsu-lab/stanford_alpaca.
    """

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"

    @property
    def wants(self) -> str:
        """The keys of a row."""
        return f"{{{self.instruction}, {self.input} (optional), {self.output}}}"

    def matches(self, row: Row) -> bool:
        """Whether the row has an instruction and an output."""
        return self.instruction in row and self.output in row

    def parse(self, row: Row) -> Conversation:
        """Return one user turn and one assistant turn."""
        prompt = text_field(row, self.instruction)
        if row.get(self.input) not in (None, ""):
            prompt = f"{prompt}\n\n{text_field(row, self.input)}"
        return [
            Message(role="user", content=prompt),
            Message(role="assistant", content=text_field(row, self.output)),
        ]
