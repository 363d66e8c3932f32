"""Alpaca: an instruction, an optional input, and the desired output."""

from __future__ import annotations

from dataclasses import dataclass

from lit_ft.data.conversation import Conversation, Message
from lit_ft.data.formats import Row, text_field, unread_keys
from lit_ft.data.formats.chat import BESIDE, conversation


@dataclass(frozen=True)
class Alpaca:
    """Rows `{instruction, input?, output, system?, history?}`; the arguments name the columns.

    The user's turn is the instruction, followed by an empty line and the input if there is one.
    `system`, a column whose name is fixed, holds a system message. `history` is a list of earlier
    pairs of an instruction and an output. Alpaca's preamble ("Below is an instruction ...") is not
    added.

    Sources: https://github.com/tatsu-lab/stanford_alpaca, and LLaMA-Factory for `system` and
    `history`.
    """

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    history: str = "history"

    @property
    def wants(self) -> str:
        """The keys that this format reads, for error messages."""
        return f"{{{self.instruction}, {self.input} (optional), {self.output}}}"

    def matches(self, row: Row) -> bool:
        """Whether the row has an instruction and an output."""
        return self.instruction in row and self.output in row

    def parse(self, row: Row) -> Conversation:
        """Return the turns of the history, followed by one user turn and one assistant turn."""
        prompt = text_field(row, self.instruction)
        if row.get(self.input) not in (None, ""):
            prompt = f"{prompt}\n\n{text_field(row, self.input)}"
        pairs = [*self._history(row), (prompt, text_field(row, self.output))]
        messages = [
            Message(role=role, content=text)
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return conversation(messages, row)

    def unread(self, row: Row) -> list[str]:
        """Return the keys of the row that have a value but are not read."""
        return unread_keys(row, (self.instruction, self.input, self.output, self.history, *BESIDE))

    def _history(self, row: Row) -> list[tuple[str, str]]:
        pairs = row.get(self.history) or []
        if not isinstance(pairs, list):
            raise ValueError(f"{self.history!r} must be a list, not {type(pairs).__name__}")
        for place, pair in enumerate(pairs):
            if not (
                isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
            ):
                raise ValueError(
                    f"{self.history}[{place}] must be a pair of an instruction and an output"
                )
        return [(question, answer) for question, answer in pairs]
