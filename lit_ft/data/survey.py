"""Count the rows of a source, their lengths, and the padding in their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_ft.data.batching import GlobalBatchSampler
from lit_ft.data.encoded import EncodedRow, EncodingReport
from lit_ft.data.packing import pack


class Bar(NamedTuple):
    """A bar of a histogram of lengths.

    Args:
        first: The smallest number of tokens that a row in this bar can have.
        last: The largest number of tokens that a row in this bar can have.
        num_rows: The number of rows in this bar.
    """

    first: int
    last: int
    num_rows: int


@dataclass(frozen=True)
class Survey:
    """Counts of the rows that were read.

    Args:
        num_rows: The number of rows that were read.
        total_rows: The approximate number of rows in the source; None if it is unknown.
        report: The counts of examples, and of rows that were cut or left out.
        row_tokens: The number of tokens in each row before it is cut or left out, [rows]. Rows
            that could not be encoded are missing.
        num_tokens: The number of tokens in each example, [examples].
    """

    num_rows: int
    total_rows: int | None
    report: EncodingReport
    row_tokens: NDArray[np.int64]
    num_tokens: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[EncodedRow], *, total_rows: int | None) -> Survey:
        """Count encoded rows. Those with the same origin are parts of one row."""
        row_tokens = np.array([row.row_tokens for row in rows], dtype=np.int64)
        num_tokens = np.array([row.num_tokens for row in rows if row.num_targets], dtype=np.int64)
        return cls(
            num_rows=len({row.origin for row in rows}),
            total_rows=total_rows,
            report=EncodingReport.of_rows(rows),
            row_tokens=row_tokens[row_tokens > 0],
            num_tokens=num_tokens,
        )

    @property
    def scale(self) -> float | None:
        """The rows in the source divided by the rows read, at least 1; None if it is unknown."""
        if self.total_rows is None:
            return None
        return max(1.0, self.total_rows / max(1, self.num_rows))

    def share_above(self, max_length: int) -> float:
        """Return the share of rows with more tokens than `max_length`."""
        return float((self.row_tokens > max_length).mean()) if len(self.row_tokens) else 0.0

    def histogram(self, max_length: int) -> list[Bar]:
        """Return a histogram of the rows' lengths, with two bars for each doubling of the length.

        Args:
            max_length: The largest number of tokens in an example, at which a bar ends.
        """
        if not len(self.row_tokens):
            return []
        longest = int(self.row_tokens.max())
        octaves = np.arange(2, 2 * np.log2(longest + 1) + 2) / 2
        # Powers of 2 end a bar, since people choose them as limits.
        edges = np.unique([1, *(np.rint(2**octaves).astype(int) + 1), max_length + 1])
        counts, _ = np.histogram(self.row_tokens, [*edges, max(longest, edges[-1]) + 1])
        ends = [*edges[1:], edges[-1] + 1]
        bars = [
            Bar(int(first), int(end) - 1, int(count))
            for first, end, count in zip(edges, ends, counts, strict=True)
        ]
        occupied = [place for place, bar in enumerate(bars) if bar.num_rows]
        return bars[occupied[0] : occupied[-1] + 1]


def filled_by_batching(
    num_tokens: NDArray[np.int64], *, batch_size: int, micro_batches: int, group_by_length: bool
) -> float:
    """Return the share of tokens in an epoch's batches that are not padding.

    Args:
        num_tokens: The number of tokens in each example, [examples].
        batch_size: The number of rows in a micro-batch.
        micro_batches: The number of micro-batches in an optimizer step.
        group_by_length: Whether rows of similar length share a global batch.
    """
    batches = GlobalBatchSampler(
        num_tokens.tolist(),
        batch_size=batch_size,
        micro_batches=micro_batches,
        num_replicas=1,
        rank=0,
        shuffle=True,
        group_by_length=group_by_length,
        seed=0,
    )
    padded = sum(len(rows) * int(num_tokens[rows].max()) for rows in batches if rows)
    return float(num_tokens.sum() / padded) if padded else 1.0


def filled_by_packing(num_tokens: NDArray[np.int64], max_length: int) -> float:
    """Return the share of tokens in packed rows of `max_length` tokens that are not padding."""
    rows = pack(num_tokens.tolist(), max_length)
    return float(num_tokens.sum() / (len(rows) * max_length)) if rows else 1.0
