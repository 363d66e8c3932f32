"""Notes about rows: short sentences that are counted over all rows, and then printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lit_ft.terminal.console import format_count

FIELDS = {
    "content": "the content",
    "reasoning_content": "the reasoning",
    "tool_calls": "the tool calls",
    "tools": "the tools",
}

EMPTY_ANSWER = "an answer is empty, so the model learns to end at once"
PROMPT_MERGES = (
    "the prompt that opens an answer and its first characters would share a token; they are kept "
    "apart, as they are when the model is used"
)
NO_END = (
    "an answer ends without a learnt end token, so the model does not learn to stop there; give a "
    "chat template that ends it, or that has the end between {% generation %} and "
    "{% endgeneration %}"
)
SPLIT = "a row is longer than an example may be and is split into several"
EOS_ADDED = (
    "the chat template ends the last answer with no token, so the end-of-text token is added"
)


def dropped(role: str, field: str, *, earlier: bool) -> str:
    """Return the note about a text that the template leaves out."""
    where = "earlier answers" if earlier else f"messages of the role {role}"
    if field == "tools":
        return "the chat template leaves out the tools"
    return f"the chat template leaves out {FIELDS[field]} of {where}"


def changed(role: str, field: str) -> str:
    """Return the note about a text that the template writes in another way."""
    return f"the chat template rewrites {FIELDS[field]} of messages of the role {role}"


def control_token(token: str, *, kept: bool) -> str:
    """Return the note about a control token in the text of a message."""
    way = "is kept as a token" if kept else "is encoded as ordinary text"
    return f"the control token {token} in the text of a message {way}"


def end_of_several_tokens(end: str) -> str:
    """Return the note about an end marker that is not a single token of the tokenizer."""
    return (
        f"answers end with {end!r}, which is not one token of this tokenizer, so the model may not "
        "stop there; give the chat template that belongs to the tokenizer"
    )


def unread(key: str) -> str:
    """Return the note about a key of a row that its format does not read."""
    return f"the key {key!r} is not read"


@dataclass(frozen=True)
class Counted:
    """The number of rows that a note is about, and the first of them.

    Args:
        count: The number of rows that the note is about.
        first: The place of the first of these rows, such as `my.jsonl:57`.
    """

    count: int
    first: str

    def __add__(self, other: Counted) -> Counted:
        return Counted(self.count + other.count, self.first)


def added(*counts: Mapping[str, Counted]) -> dict[str, Counted]:
    """Return the sum of several counts, keyed by note."""
    total: dict[str, Counted] = {}
    for one in counts:
        for note, counted in one.items():
            total[note] = total[note] + counted if note in total else counted
    return total


def count(origins: Iterable[str], notes: Iterable[Iterable[str]]) -> dict[str, Counted]:
    """Count the rows that each note is about, given the place and the notes of each row."""
    rows = zip(origins, notes, strict=True)
    return added(*({note: Counted(1, origin) for note in row} for origin, row in rows))


def lines(counts: Mapping[str, Counted]) -> Iterable[str]:
    """Yield a line for each note, as in "3 rows (first my.jsonl:57): an answer is empty."."""
    for note, counted in counts.items():
        rows = format_count(counted.count, "row")
        first = counted.first if counted.count == 1 else f"first {counted.first}"
        yield f"{rows} ({first}): {note}."
