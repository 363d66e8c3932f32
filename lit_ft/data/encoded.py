"""Encoded rows, and counts of the rows that are kept, cut or left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_ft.data import notes
from lit_ft.data.notes import Counted
from lit_ft.terminal.console import format_count

REPORT_COLUMNS = ["num_tokens", "num_targets", "truncated", "overlong"]


class EncodedRow(NamedTuple):
    """The tokens and labels of one row, or of one part of a row that was split.

    An encoded row is an example if `num_targets` is positive. The others stay in the table, so that
    they can be counted.

    Args:
        origin: The place of the row in its source, such as `my.jsonl:57`, for error messages.
        input_ids: The token ids, [tokens]; empty if the row was left out.
        labels: The unshifted labels, [tokens]; -100 where there is nothing to learn.
        num_tokens: The number of token ids.
        row_tokens: The number of tokens in the whole row, before it is cut, split or left out. If a
            row is split, its first part has this number, and the other parts have 0.
        num_targets: The number of labels that are not -100.
        truncated: Whether tokens were cut off because the row was too long.
        overlong: Whether the row was left out because it was too long.
        prompt: The messages before the last assistant turn, as JSON; empty if there are none.
        held_out: Whether the row is for validation; None if the source does not decide this.
        notes: The notes about the row, which are counted over all rows; see `lit_ft.data.notes`.
        error: The message of the error that the row caused; empty if it caused none.
        digest: A number that is the same for rows with the same tokens and labels.
    """

    origin: str
    input_ids: list[int] = []
    labels: list[int] = []
    num_tokens: int = 0
    row_tokens: int = 0
    num_targets: int = 0
    truncated: bool = False
    overlong: bool = False
    prompt: str = ""
    held_out: bool | None = None
    notes: list[str] = []
    error: str = ""
    digest: int = 0


@dataclass(frozen=True)
class EncodingReport:
    """Counts of the rows of one split, including every row that was cut or left out.

    Args:
        examples: The number of rows that are trained or validated on.
        truncated: The number of examples that were cut at the maximum length.
        dropped_overlong: The number of rows left out because they are too long.
        dropped_without_targets: The number of rows left out because none of their tokens would be
            learnt.
        skipped: The number of rows left out because they could not be read or encoded.
        tokens: The number of tokens in the examples.
        targets: The number of learnt tokens in the examples.
        notes: The number of rows that each note is about, and the first of them, keyed by note.
        errors: The messages of the errors that the skipped rows caused.
    """

    examples: int = 0
    truncated: int = 0
    dropped_overlong: int = 0
    dropped_without_targets: int = 0
    skipped: int = 0
    tokens: int = 0
    targets: int = 0
    notes: Mapping[str, Counted] = field(default_factory=dict)
    errors: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        num_tokens: NDArray[Any],
        num_targets: NDArray[Any],
        truncated: NDArray[Any],
        overlong: NDArray[Any],
        *,
        notes: Mapping[str, Counted] | None = None,
        errors: Sequence[str] = (),
    ) -> EncodingReport:
        """Return the report of some rows, from their columns [rows], notes and errors."""
        kept = num_targets > 0
        return cls(
            examples=int(kept.sum()),
            truncated=int((truncated & kept).sum()),
            dropped_overlong=int(overlong.sum()),
            dropped_without_targets=int((~kept & ~overlong).sum()) - len(errors),
            skipped=len(errors),
            tokens=int(num_tokens[kept].sum()),
            targets=int(num_targets[kept].sum()),
            notes=notes or {},
            errors=errors,
        )

    @classmethod
    def of_rows(cls, rows: Sequence[EncodedRow]) -> EncodingReport:
        """Return the report of rows that are in memory."""
        return cls.of(
            **{name: np.array([getattr(row, name) for row in rows]) for name in REPORT_COLUMNS},
            notes=notes.count([row.origin for row in rows], [row.notes for row in rows]),
            errors=[row.error for row in rows if row.error],
        )

    def __add__(self, other: EncodingReport) -> EncodingReport:
        counts = {
            one.name: getattr(self, one.name) + getattr(other, one.name)
            for one in fields(self)
            if one.type == "int"
        }
        return EncodingReport(
            **counts,
            notes=notes.added(self.notes, other.notes),
            errors=[*self.errors, *other.errors],
        )

    def __str__(self) -> str:
        line = ", ".join(
            format_count(number, noun)
            for number, noun in (
                (self.examples, "example"),
                (self.tokens, "token"),
                (self.targets, "target"),
            )
        )
        counts = [
            (self.truncated, "truncated"),
            (self.dropped_overlong, "dropped as too long"),
            (self.dropped_without_targets, "dropped for lack of a target"),
            (self.skipped, "skipped as bad"),
        ]
        return "; ".join([line, *(f"{count:,} {what}" for count, what in counts if count)])
